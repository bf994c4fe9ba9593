//! The block device, driven through its registers and queue.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::virtio::mmio::INTERRUPT_USED;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + 0x1000;

fn image(bytes: &[u8]) -> (TempFile, File) {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    let again = OpenOptions::new().read(true).write(true).open(file.as_path()).unwrap();
    (file, again)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i % 251) as u8).collect()
}

struct Disk {
    driver: Driver,
    file: TempFile,
}

impl Disk {
    fn new(bytes: &[u8], read_only: bool) -> Self {
        let (file, again) = image(bytes);
        let disk = Block::from_file(again, read_only, b"disk-id").unwrap();
        Disk { driver: Driver::new(Box::new(disk)), file }
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::open(self.file.as_path()).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// Serves one request with its data in `data`; answers status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[0xee]);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(data);
        chain.push((STATUS, 1, WRITE));
        let head = self.driver.offer(0, &chain);
        self.driver.kick(0);
        let (used, len) = self.driver.used(0).unwrap();
        assert_eq!(used, head);
        (self.driver.read(STATUS, 1)[0], len)
    }
}

#[test]
fn what_is_written_is_read_back_in_any_cut() {
    let mut disk = Disk::new(&vec![0; 64 * 512], false);
    let bytes = pattern(8 * 512);
    disk.driver.write(DATA, &bytes);
    assert_eq!(disk.request(REQUEST_WRITE, 3, &[(DATA, 100, 0), (DATA + 100, 3996, 0)]), (0, 1));
    assert_eq!(disk.contents()[3 * 512..11 * 512], bytes);
    let target = DATA + 0x10_0000;
    let cut = [(target, 1, WRITE), (target + 0x2000, 4000, WRITE), (target + 0x5000, 95, WRITE)];
    assert_eq!(disk.request(REQUEST_READ, 3, &cut), (0, 4097));
    let mut read = disk.driver.read(target, 1);
    read.extend(disk.driver.read(target + 0x2000, 4000));
    read.extend(disk.driver.read(target + 0x5000, 95));
    assert_eq!(read, bytes);
    assert_eq!(disk.driver.interrupt(), INTERRUPT_USED);
}

#[test]
fn header_and_status_may_be_cut_and_joined_with_data() {
    let mut disk = Disk::new(&pattern(4 * 512), false);
    let mut header = [0; 16];
    header[8] = 1;
    disk.driver.write(HEADER, &header);
    disk.driver.offer(0, &[(HEADER, 7, 0), (HEADER + 7, 9, 0), (DATA, 500, WRITE), (DATA + 500, 13, WRITE)]);
    disk.driver.write(DATA + 512, &[0xee]);
    disk.driver.kick(0);
    assert_eq!(disk.driver.used(0).unwrap().1, 513);
    assert_eq!(disk.driver.read(DATA, 512), pattern(4 * 512)[512..1024]);
    assert_eq!(disk.driver.read(DATA + 512, 1), [0]);
}

#[test]
fn writes_to_guest_memory_are_logged_as_dirty() {
    use vm_memory::GuestMemoryBackend;
    let mut disk = Disk::new(&pattern(64 * 512), false);
    let log = |disk: &Disk| {
        let region = disk.driver.mem.find_region(vm_memory::GuestAddress(0)).unwrap();
        let words = std::ops::Deref::deref(region).bitmap().take_dirty();
        words[(DATA / 4096 / 64) as usize] >> (DATA / 4096 % 64) & 0xff
    };
    log(&disk);
    assert_eq!(
        disk.request(REQUEST_READ, 0, &[(DATA + 4000, 512, WRITE), (DATA + 5 * 4096, 512, WRITE)]).0,
        0
    );
    assert_eq!(log(&disk), 0b10_0011);
}

#[test]
fn requests_beyond_the_end_and_of_odd_length_fail_without_touching_anything() {
    let mut disk = Disk::new(&vec![7; 8 * 512], false);
    for (sector, len) in
        [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512 + 1, 512), (0, 511), (0, 9 * 512)]
    {
        assert_eq!(disk.request(REQUEST_WRITE, sector, &[(DATA, len, 0)]).0, Status::IoError as u8);
        assert_eq!(disk.request(REQUEST_READ, sector, &[(DATA, len, WRITE)]).0, Status::IoError as u8);
    }
    assert_eq!(disk.contents(), vec![7; 8 * 512]);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    let mut disk = Disk::new(&vec![7; 8 * 512], true);
    disk.driver.set(0x14, 0);
    assert_ne!(u64::from(disk.driver.get(0x10)) & FEATURE_READ_ONLY, 0);
    disk.driver.write(DATA, &[0; 16]);
    disk.driver.write(DATA + 8, &[1]);
    for kind in [REQUEST_WRITE, REQUEST_DISCARD, REQUEST_WRITE_ZEROES] {
        let len = if kind == REQUEST_WRITE { 512 } else { 16 };
        assert_eq!(disk.request(kind, 0, &[(DATA, len, 0)]).0, Status::IoError as u8);
    }
    assert_eq!(disk.request(REQUEST_FLUSH, 0, &[]), (0, 1));
    assert_eq!(disk.request(REQUEST_READ, 7, &[(DATA, 512, WRITE)]).0, 0);
    assert_eq!(disk.contents(), vec![7; 8 * 512]);
}

#[test]
fn the_last_sector_of_an_odd_image_ends_in_zeros_and_can_be_written() {
    let mut disk = Disk::new(&[9; 1000], false);
    assert_eq!((disk.driver.get(0x100), disk.driver.get(0x104)), (2, 0));
    disk.driver.write(DATA, &[1; 512]);
    assert_eq!(disk.request(REQUEST_READ, 1, &[(DATA, 512, WRITE)]), (0, 513));
    let mut expected = vec![9; 488];
    expected.resize(512, 0);
    assert_eq!(disk.driver.read(DATA, 512), expected);
    disk.driver.write(DATA, &[5; 512]);
    assert_eq!(disk.request(REQUEST_WRITE, 1, &[(DATA, 512, 0)]).0, 0);
    assert_eq!(disk.contents()[512..], [5; 512]);
}

#[test]
fn discard_and_write_zeroes_clear_their_ranges_and_check_them() {
    let mut disk = Disk::new(&vec![7; 64 * 512], false);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let two = [range(0, 1, 0), range(2, 3, WRITE_ZEROES_UNMAP)].concat();
    disk.driver.write(DATA, &two);
    assert_eq!(disk.request(REQUEST_WRITE_ZEROES, 0, &[(DATA, 32, 0)]).0, 0);
    let contents = disk.contents();
    for (sector, bytes) in contents.chunks(512).enumerate() {
        let zero = matches!(sector, 0 | 2..5);
        assert_eq!(bytes, [if zero { 0 } else { 7 }; 512], "{sector}");
    }
    for (bytes, status) in [
        (range(63, 2, 0), Status::IoError),
        (range(u64::MAX, 1, 0), Status::IoError),
        (range(0, u32::MAX, 0), Status::IoError),
        (range(8, 8, 4), Status::Unsupported),
        (range(8, 8, 0), Status::Ok),
    ] {
        disk.driver.write(DATA, &bytes);
        assert_eq!(disk.request(REQUEST_DISCARD, 0, &[(DATA, 16, 0)]).0, status as u8);
    }
    assert_eq!(disk.request(REQUEST_DISCARD, 0, &[(DATA, 15, 0)]).0, Status::IoError as u8);
    assert_eq!(disk.contents()[16 * 512..], vec![7; 48 * 512]);
}

#[test]
fn identifier_and_unknown_requests_are_answered() {
    let mut disk = Disk::new(&[0; 512], false);
    assert_eq!(disk.request(REQUEST_GET_ID, 0, &[(DATA, 20, WRITE)]), (0, 21));
    assert_eq!(disk.driver.read(DATA, 20), *b"disk-id\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(disk.request(77, 0, &[]).0, Status::Unsupported as u8);
}

#[test]
fn requests_without_header_or_status_are_handed_back() {
    let mut disk = Disk::new(&[0; 512], false);
    disk.driver.offer(0, &[(HEADER, 16, 0)]);
    disk.driver.offer(0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
    disk.driver.write(STATUS, &[0xee]);
    disk.driver.kick(0);
    assert_eq!(disk.driver.used(0).unwrap().1, 0);
    assert_eq!(disk.driver.used(0).unwrap().1, 1);
    assert_eq!(disk.driver.read(STATUS, 1), [Status::IoError as u8]);
    assert!(!disk.driver.needs_reset());
}

#[test]
fn a_host_error_is_an_io_error_of_the_guest() {
    let (file, _) = image(&[0; 4096]);
    // Opened for reading only, but the device does not know: as when the host's disk fails.
    let read_end = File::open(file.as_path()).unwrap();
    let driver = Driver::new(Box::new(Block::from_file(read_end, false, b"").unwrap()));
    let mut disk = Disk { driver, file };
    assert_eq!(disk.request(REQUEST_WRITE, 0, &[(DATA, 512, 0)]).0, Status::IoError as u8);
    assert_eq!(disk.request(REQUEST_READ, 0, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn an_image_that_shrinks_reads_as_zeros() {
    let mut disk = Disk::new(&[3; 4096], false);
    disk.file.as_file().set_len(512).unwrap();
    assert_eq!(disk.request(REQUEST_READ, 0, &[(DATA, 1024, WRITE)]).0, 0);
    assert_eq!(disk.driver.read(DATA, 1024), [[3; 512], [0; 512]].concat());
}

#[test]
fn more_requests_than_a_batch_are_all_served() {
    let mut disk = Disk::new(&[0; 512], false);
    disk.driver.write(HEADER, &REQUEST_FLUSH.to_le_bytes());
    for _ in 0..100 {
        disk.driver.offer(0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    }
    disk.driver.kick(0);
    for _ in 0..100 / BATCH {
        disk.driver.transport.process_pending();
    }
    assert_eq!(std::iter::from_fn(|| disk.driver.used(0)).count(), 100);
}

#[test]
fn a_request_for_more_data_than_anybody_needs_fails_and_others_have_their_turn() {
    // The same memory named many times over: 120 MiB of data for a disk that is large enough.
    let mut disk = Disk::new(&[], false);
    let large = disk.file.as_file().try_clone().unwrap();
    large.set_len(1 << 30).unwrap();
    disk.driver = Driver::new(Box::new(Block::from_file(large, false, b"").unwrap()));
    let many = [(0, 12 << 20, 0); 10];
    assert_eq!(disk.request(REQUEST_WRITE, 0, &many).0, Status::IoError as u8);
    assert_eq!(disk.request(REQUEST_WRITE, 0, &many[..5]).0, 0);
    disk.driver.write(HEADER, &[0; 16]);
    disk.driver.write(HEADER, &REQUEST_WRITE.to_le_bytes());
    for _ in 0..4 {
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(&many[..5]);
        chain.push((STATUS, 1, WRITE));
        disk.driver.offer(0, &chain);
    }
    disk.driver.kick(0);
    let mut served = std::iter::from_fn(|| disk.driver.used(0)).count();
    assert_eq!(served, 2);
    disk.driver.transport.process_pending();
    served += std::iter::from_fn(|| disk.driver.used(0)).count();
    assert_eq!(served, 4);
}

#[test]
fn unusable_images_are_refused_with_their_name() {
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let missing = dir.as_path().join("missing.img");
    let error = |result: Result<Block, OpenError>| result.err().unwrap().to_string();
    assert!(error(Block::open(&missing, false)).contains("missing.img"));
    assert!(error(Block::open(dir.as_path(), true)).contains("no file and no block device"));
    let empty = dir.as_path().join("empty.img");
    File::create(&empty).unwrap();
    assert!(error(Block::open(&empty, false)).contains("is empty"));
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let (file, _again) = image(&[0; 512]);
    let writer = Block::open(file.as_path(), false).unwrap();
    assert!(matches!(Block::open(file.as_path(), false), Err(OpenError::InUse(_))));
    assert!(matches!(Block::open(file.as_path(), true), Err(OpenError::InUse(_))));
    drop(writer);
    let _reader = Block::open(file.as_path(), true).unwrap();
    let _another = Block::open(file.as_path(), true).unwrap();
    assert!(matches!(Block::open(file.as_path(), false), Err(OpenError::InUse(_))));
    file.as_file().write_at(&[1], 0).unwrap();
}
