//! Disks over others, beside what they are said to be.

use vmm_sys_util::tempfile::TempFile;

use super::super::block::Block;
use super::super::test_driver::{BUFFERS, Driver, WRITE};
use super::*;

const BLOCKS: u64 = 40;
/// The last block is not a whole one.
const LEN: u64 = (BLOCKS - 1) * BLOCK_BYTES + 3 * 512;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + 0x1000;

fn file(bytes: &[u8]) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.write_all_at(bytes, 0).unwrap();
    file
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Two layers over a bottom, and what they are together.
fn base(random: &mut Random) -> (Base, Vec<u8>) {
    let mut content: Vec<u8> = (0..LEN).map(|at| (at / 700 + 1) as u8).collect();
    let bottom = file(&content);
    let mut layers = Vec::new();
    for value in [100, 200] {
        let layer = Layer { file: file(&[]), blocks: BlockMap::empty(LEN) };
        layer.file.set_len(LEN).unwrap();
        for _ in 0..12 {
            let block = random.below(BLOCKS);
            layer.blocks.add(block, 1);
            let start = (block * BLOCK_BYTES) as usize;
            let end = (start + BLOCK_BYTES as usize).min(LEN as usize);
            // A hole that it has is zero, whatever lies below.
            let value = if random.below(4) == 0 { 0 } else { value + (block as u8) };
            content[start..end].fill(value);
            layer.file.write_all_at(&content[start..end], start as u64).unwrap();
        }
        layers.insert(0, layer);
    }
    (Base { layers, bottom }, content)
}

fn all(disk: &DiskFile) -> Vec<u8> {
    let mut bytes = vec![9; LEN as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.write(HEADER, &header);
    driver.write(STATUS, &[0xee]);
    let mut chain = vec![(HEADER, 16, 0)];
    chain.extend(data);
    chain.push((STATUS, 1, WRITE));
    driver.offer(0, &chain);
    driver.kick(0);
    driver.used(0).unwrap();
    driver.read(STATUS, 1)[0]
}

#[test]
fn whatever_a_guest_does_reads_as_on_a_disk_of_one_file_and_the_base_stays() {
    for seed in 0..8 {
        let mut random = Random(seed);
        let (base, mut content) = base(&mut random);
        let below = content.clone();
        let again = Base {
            layers: base
                .layers
                .iter()
                .map(|layer| Layer {
                    file: layer.file.try_clone().unwrap(),
                    blocks: BlockMap::from_words(LEN, layer.blocks.words()),
                })
                .collect(),
            bottom: base.bottom.try_clone().unwrap(),
        };
        let disk = DiskFile::over(base, file(&[]), LEN).unwrap();
        assert_eq!(all(&disk), content);
        let block = Block::from_disk(disk.clone(), false, b"over");
        let copies = block.copies().unwrap();
        let mut driver = Driver::new(Box::new(block));
        let sectors = LEN / 512;
        for step in 0..200 {
            let first = random.below(sectors);
            let count = 1 + random.below((sectors - first).min(24));
            let (at, bytes) = (first as usize * 512, count as usize * 512);
            match random.below(4) {
                0 => {
                    let text: Vec<u8> = (0..bytes).map(|at| (at + step) as u8).collect();
                    driver.write(DATA, &text);
                    assert_eq!(request(&mut driver, 1, first, &[(DATA, bytes as u32, 0)]), 0);
                    content[at..at + bytes].copy_from_slice(&text);
                }
                1 => {
                    assert_eq!(request(&mut driver, 0, first, &[(DATA, bytes as u32, WRITE)]), 0);
                    assert!(driver.read(DATA, bytes) == content[at..at + bytes], "seed {seed} step {step}");
                }
                kind => {
                    // Discarded blocks are given up at once, so they read as zeros too.
                    let mut range = [0; 16];
                    range[..8].copy_from_slice(&first.to_le_bytes());
                    range[8..12].copy_from_slice(&(count as u32).to_le_bytes());
                    driver.write(DATA, &range);
                    let kind = if kind == 2 { 11 } else { 13 };
                    assert_eq!(request(&mut driver, kind, 0, &[(DATA, 16, 0)]), 0);
                    content[at..at + bytes].fill(0);
                }
            }
        }
        assert!(all(&disk) == content, "seed {seed}");
        let untouched = DiskFile::over(again, file(&[]), LEN).unwrap();
        assert!(all(&untouched) == below, "nobody else sees it");

        // The blocks that have changed, laid over the same base, are the same disk.
        let changed = copies.take_changed();
        assert_eq!(copies.take_changed(), []);
        let to = file(&[]);
        let copy = copies.begin(to.try_clone().unwrap(), Some(&changed)).unwrap();
        // What the guest does from now on is not in it.
        driver.write(DATA, &[77; 512]);
        assert_eq!(request(&mut driver, 1, 5, &[(DATA, 512, 0)]), 0);
        copy.finish().unwrap();
        let DiskFile { over: Some(over), .. } = &untouched else { panic!("it lies over nothing") };
        let mut below = vec![0; BLOCK_BYTES as usize];
        for number in 0..BLOCKS {
            let start = (number * BLOCK_BYTES) as usize;
            let end = (start + BLOCK_BYTES as usize).min(LEN as usize);
            let part = &mut below[..end - start];
            if BlockMap::from_words(LEN, changed.iter().copied()).has(number) {
                to.read_exact_at(part, start as u64).unwrap();
            } else {
                untouched.read_at(part, start as u64).unwrap();
            }
            assert!(*part == content[start..end], "seed {seed} block {number}");
        }
        assert_eq!(over.0.words(), []);
        assert_eq!(copies.take_changed(), [(0, 1)], "sector 5 is in the first block");
        copies.put_back_changed(&changed);
        assert_eq!(copies.take_changed(), changed);
    }
}

#[test]
fn a_disk_over_another_costs_only_what_is_written() {
    use std::os::unix::fs::MetadataExt;
    let len = 1 << 30;
    let bottom = file(b"begin");
    bottom.set_len(len).unwrap();
    let own = file(&[]);
    let disk = DiskFile::over(Base { layers: Vec::new(), bottom }, own.try_clone().unwrap(), len).unwrap();
    let mut driver = Driver::new(Box::new(Block::from_disk(disk, false, b"over")));
    driver.write(DATA, &[7; 512]);
    assert_eq!(request(&mut driver, 1, 8, &[(DATA, 512, 0)]), 0);
    assert_eq!(own.metadata().unwrap().len(), len);
    assert!(own.metadata().unwrap().blocks() <= 8, "{} blocks", own.metadata().unwrap().blocks());
}

#[test]
fn a_copy_of_a_disk_that_is_mostly_a_hole_takes_the_time_of_what_there_is() {
    let len = 15 << 40;
    let far = len - 8192;
    let bottom = file(b"begin");
    bottom.set_len(len).unwrap();
    bottom.write_all_at(b"end", far).unwrap();
    let layer = Layer { file: file(&[]), blocks: BlockMap::empty(len) };
    layer.blocks.add(1 << 30, 1);
    layer.file.set_len(len).unwrap();
    layer.file.write_all_at(b"middle", 1 << 42).unwrap();
    let own = file(&[]);
    let disk = DiskFile::over(Base { layers: vec![layer], bottom }, own, len).unwrap();
    for (from, to) in [(0, 0), (100 << 20, 1 << 42), (1 << 42, 1 << 42), ((1 << 42) + 4096, far)] {
        assert_eq!(disk.next_data(from).unwrap(), to, "{from}");
    }
    assert_eq!(disk.next_data(far + 4096).unwrap(), len);
    let block = Block::from_disk(disk, false, b"over");
    let copies = block.copies().unwrap();
    let mut driver = Driver::new(Box::new(block));
    let to = file(&[]);
    let copy = copies.begin(to.try_clone().unwrap(), None).unwrap();
    driver.write(DATA, &[7; 512]);
    for sector in [far / 512, (1 << 41) / 512] {
        assert_eq!(request(&mut driver, 1, sector, &[(DATA, 512, 0)]), 0);
    }
    copy.finish().unwrap();
    let mut bytes = [1; 6];
    for (at, text) in [(0, b"begin\0"), (1 << 42, b"middle"), (far, b"end\0\0\0"), (1 << 41, b"\0\0\0\0\0\0")]
    {
        to.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(&bytes, text);
    }
    assert_eq!(copies.take_changed(), [(1 << 23, 1), (far / 4096 / 64, 1 << (far / 4096 % 64))]);
}
