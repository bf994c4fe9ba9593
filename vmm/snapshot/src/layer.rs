//! The blocks of a disk that a difference has, and the disk that a chain has in all.
//!
//! A file `NAME.layer` is as long as the disk `NAME`, with every block of 4 KiB that it has at its place and holes
//! elsewhere. Behind that, at the next multiple of 4 KiB, stand a bit for each block and a footer of 48 bytes. The file's
//! checksum is in the table of contents like every other file's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::{SnapshotError, host};
use crate::{Chain, Snapshot, SnapshotId};

const SUFFIX: &str = ".layer";
const MAGIC: [u8; 8] = *b"HARRDSK\n";
const VERSION: u32 = 1;
const BLOCK: u64 = 4096;
const FOOTER_BYTES: u64 = 48;
/// Most bytes of a disk that has layers: 16 TiB.
const MAX_BYTES: u64 = 1 << 44;

/// Name of the file with those of a disk's blocks that a difference has.
pub fn layer_name(disk: &str) -> String {
    format!("{disk}{SUFFIX}")
}

/// The disk whose layer has this name.
pub(crate) fn disk_of(file: &str) -> Option<&str> {
    file.strip_suffix(SUFFIX)
}

/// Words of the map of a disk of so many bytes.
fn words(disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(BLOCK).div_ceil(64)
}

/// Where the map begins.
fn map_offset(disk_bytes: u64) -> u64 {
    disk_bytes.next_multiple_of(BLOCK)
}

fn footer(id: SnapshotId, disk_bytes: u64) -> [u8; FOOTER_BYTES as usize] {
    let mut bytes = [0; FOOTER_BYTES as usize];
    let fields: [(usize, &[u8]); 5] = [
        (0, &id.0),
        (16, &disk_bytes.to_le_bytes()),
        (32, &(BLOCK as u32).to_le_bytes()),
        (36, &VERSION.to_le_bytes()),
        (40, &MAGIC),
    ];
    for (offset, field) in fields {
        for (to, from) in bytes.iter_mut().skip(offset).zip(field) {
            *to = *from;
        }
    }
    bytes
}

/// Makes a layer of a file in which `blocks` of a disk have been written: 64 in each word, lowest first.
///
/// # Errors
/// The host's, or the disk is larger than 16 TiB.
pub fn seal_layer(file: &File, id: SnapshotId, disk_bytes: u64, blocks: &[u64]) -> io::Result<()> {
    if disk_bytes > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a disk of {disk_bytes} bytes is larger than {MAX_BYTES}: take a full snapshot"),
        ));
    }
    let count = disk_bytes.div_ceil(BLOCK);
    let mut bytes = Vec::new();
    for (index, word) in (0..words(disk_bytes)).zip(blocks.iter().copied().chain(std::iter::repeat(0))) {
        let here = (count - index * 64).min(64);
        bytes.extend_from_slice(&(word & (u64::MAX >> (64 - here))).to_le_bytes());
    }
    bytes.extend_from_slice(&footer(id, disk_bytes));
    file.write_all_at(&bytes, map_offset(disk_bytes))
}

/// A layer, open.
#[derive(Debug)]
pub struct DiskLayer {
    /// Has its blocks at their places.
    pub file: File,
    /// Which it has: 64 in each word, lowest first.
    pub blocks: Vec<u64>,
    /// Bytes of the disk.
    pub disk_bytes: u64,
}

impl DiskLayer {
    pub(crate) fn has(&self, block: u64) -> bool {
        self.blocks.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }
}

/// A disk as a chain has it.
#[derive(Debug)]
pub struct ChainDisk {
    /// Has what no layer has.
    pub base: File,
    /// Youngest first.
    pub layers: Vec<DiskLayer>,
    /// Bytes of the disk.
    pub bytes: u64,
}

impl ChainDisk {
    /// Reads from one block, which is not behind the disk's end.
    pub(crate) fn read_block(&self, block: u64, bytes: &mut [u8]) -> io::Result<()> {
        let layer = self.layers.iter().find(|layer| layer.has(block));
        layer.map_or(&self.base, |layer| &layer.file).read_exact_at(bytes, block * BLOCK)
    }

    /// Writes all of it into an empty file; zeros are holes.
    pub(crate) fn flatten(&self, to: &File) -> io::Result<()> {
        to.set_len(self.bytes)?;
        let mut buffer = [0; BLOCK as usize];
        for block in 0..self.bytes.div_ceil(BLOCK) {
            let len = BLOCK.min(self.bytes - block * BLOCK) as usize;
            let bytes = buffer.get_mut(..len).unwrap_or_default();
            self.read_block(block, bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                to.write_all_at(bytes, block * BLOCK)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// Opens the layer of a disk, whose map is checked against everything but its checksum.
    ///
    /// # Errors
    /// It is not there, not one, or another snapshot's.
    pub fn layer(&self, disk: &str) -> Result<DiskLayer, SnapshotError> {
        let name = layer_name(disk);
        let file = self.file(&name)?;
        let path = self.path().join(&name);
        let len = file.metadata().map_err(host("read", &path))?.len();
        let wrong = |offset: u64, reason: &str| self.damaged(&name, offset, reason.to_owned());
        let footer_at =
            len.checked_sub(FOOTER_BYTES).ok_or_else(|| wrong(len, "it is shorter than its footer"))?;
        let mut found = [0; FOOTER_BYTES as usize];
        file.read_exact_at(&mut found, footer_at).map_err(host("read", &path))?;
        let size = found.get(16..24).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
        if found != footer(self.manifest().id, size) {
            return Err(wrong(footer_at, "the footer belongs to another snapshot, or is none"));
        }
        if size > MAX_BYTES || map_offset(size) + words(size) * 8 != footer_at {
            return Err(wrong(footer_at + 16, "it is not as long as its disk asks for"));
        }
        // Real bytes of a file, at most 512 MiB of them.
        let mut map = vec![0; (words(size) * 8) as usize];
        file.read_exact_at(&mut map, map_offset(size)).map_err(host("read", &path))?;
        let blocks: Vec<u64> =
            map.chunks_exact(8).map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes)).collect();
        let behind = size.div_ceil(BLOCK) % 64;
        if behind != 0 && blocks.last().is_some_and(|word| word >> behind != 0) {
            return Err(wrong(footer_at - 8, "it has blocks behind the disk's end"));
        }
        Ok(DiskLayer { file, blocks, disk_bytes: size })
    }
}

impl Chain {
    /// The disk with this name.
    ///
    /// # Errors
    /// A snapshot has no part of it, or the parts do not fit each other.
    pub fn disk(&self, name: &str) -> Result<ChainDisk, SnapshotError> {
        let mut layers: Vec<DiskLayer> = Vec::new();
        for snapshot in self.snapshots() {
            let fits = |bytes: u64, part: &str| match layers.first() {
                Some(layer) if layer.disk_bytes != bytes => {
                    let wanted = layer.disk_bytes;
                    Err(snapshot.damaged(part, 0, format!("a disk of {bytes} bytes instead of {wanted}")))
                }
                _ => Ok(()),
            };
            if snapshot.manifest().files.iter().any(|file| file.name == name) {
                let base = snapshot.file(name)?;
                let bytes = base.metadata().map_err(host("read", snapshot.path()))?.len();
                fits(bytes, name)?;
                return Ok(ChainDisk { base, layers, bytes });
            }
            let layer = snapshot.layer(name)?;
            fits(layer.disk_bytes, &layer_name(name))?;
            layers.push(layer);
        }
        let oldest = self.snapshots().last().unwrap_or_else(|| self.snapshot());
        Err(oldest.damaged(
            &layer_name(name),
            0,
            "blocks are said to be the parent's, and there is none".to_owned(),
        ))
    }
}
