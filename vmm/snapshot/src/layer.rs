//! The blocks of a disk that a difference has, and the disk that a chain has in all.
//!
//! A file `NAME.layer` is as long as the disk `NAME`, with every block of 4 KiB that it has at its place and holes
//! elsewhere. Behind that, at the next multiple of 4 KiB, stand a bit for each block and a footer of 48 bytes. The file's
//! checksum is in the table of contents like every other file's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::error::{SnapshotError, host};
use crate::{Chain, Snapshot, SnapshotId};

const SUFFIX: &str = ".layer";
const MAGIC: [u8; 8] = *b"HARRDSK\n";
const VERSION: u32 = 1;
const BLOCK: u64 = 4096;
const FOOTER_BYTES: u64 = 48;
/// Most bytes of a disk that has layers: 16 TiB.
const MAX_BYTES: u64 = 1 << 44;
/// Most bytes of any disk: 64 TiB. A file that is mostly a hole can claim much more.
const MAX_DISK_BYTES: u64 = 1 << 46;
/// Words of a piece of a map, which is a page of the file.
const PIECE_WORDS: u64 = BLOCK / 8;

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

/// Makes a layer of a file in which blocks of a disk have been written. `words` are those of the map that have any, 64 blocks
/// in each, lowest first, with their index.
///
/// # Errors
/// The host's, or the disk is larger than 16 TiB.
pub fn seal_layer(
    file: &File,
    id: SnapshotId,
    disk_bytes: u64,
    words: impl IntoIterator<Item = (u64, u64)>,
) -> io::Result<()> {
    if disk_bytes > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a disk of {disk_bytes} bytes is larger than {MAX_BYTES}: take a full snapshot"),
        ));
    }
    let count = disk_bytes.div_ceil(BLOCK);
    let mut blocks = Blocks::default();
    for (index, word) in words.into_iter().filter(|(index, _)| *index < self::words(disk_bytes)) {
        let here = (count - index * 64).min(64);
        blocks.add(index, word & (u64::MAX >> (64 - here)));
    }
    let map = map_offset(disk_bytes);
    for (piece, words) in &blocks.pieces {
        let first = piece * PIECE_WORDS;
        let len = (self::words(disk_bytes) - first).min(PIECE_WORDS) as usize;
        let bytes: Vec<u8> = words.iter().take(len).flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, map + first * 8)?;
    }
    file.write_all_at(&footer(id, disk_bytes), map + self::words(disk_bytes) * 8)
}

/// A set of a disk's blocks. What it takes is bounded by the blocks that are in it, not by the size of the disk.
#[derive(Debug, Default)]
pub struct Blocks {
    /// Pieces of the map that are not empty.
    pieces: BTreeMap<u64, Box<[u64; PIECE_WORDS as usize]>>,
}

impl Blocks {
    fn add(&mut self, index: u64, word: u64) {
        if word != 0 {
            let piece = self.pieces.entry(index / PIECE_WORDS);
            let piece = piece.or_insert_with(|| Box::new([0; PIECE_WORDS as usize]));
            if let Some(place) = piece.get_mut((index % PIECE_WORDS) as usize) {
                *place |= word;
            }
        }
    }

    fn word(&self, index: u64) -> u64 {
        let piece = self.pieces.get(&(index / PIECE_WORDS));
        piece.and_then(|piece| piece.get((index % PIECE_WORDS) as usize)).copied().unwrap_or(0)
    }

    /// Whether it has a block.
    pub fn has(&self, block: u64) -> bool {
        self.word(block / 64) >> (block % 64) & 1 != 0
    }

    /// The words that have any, 64 blocks in each, lowest first, with their index.
    pub fn words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().flat_map(|(piece, words)| {
            (piece * PIECE_WORDS..).zip(words.iter().copied()).filter(|(_, word)| *word != 0)
        })
    }

    /// The blocks one by one.
    fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words().flat_map(|(index, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| index * 64 + bit)
        })
    }
}

/// A layer, open.
#[derive(Debug)]
pub struct DiskLayer {
    /// Has its blocks at their places.
    pub file: File,
    /// Which it has.
    pub blocks: Blocks,
    /// Bytes of the disk.
    pub disk_bytes: u64,
}

/// The next bytes of a file from `offset` to `end` that are no hole.
pub(crate) fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let begin = match seek(file, SeekFrom::Data(offset)) {
        Ok(begin) => begin,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if begin >= end {
        return Ok(None);
    }
    Ok(Some(begin..seek(file, SeekFrom::Hole(begin))?.min(end)))
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
    /// Writes all of it into an empty file; zeros are holes. What takes time is what there is, not how large the disk is.
    pub(crate) fn flatten(&self, to: &File) -> io::Result<()> {
        to.set_len(self.bytes)?;
        let mut data = 0..0;
        while let Some(next) = next_data(&self.base, data.end, self.bytes)? {
            data = next.start / BLOCK * BLOCK..next.end.next_multiple_of(BLOCK);
            for block in data.start / BLOCK..data.end / BLOCK {
                if !self.layers.iter().any(|layer| layer.blocks.has(block)) {
                    self.copy_block(&self.base, block, to)?;
                }
            }
        }
        for (depth, layer) in self.layers.iter().enumerate() {
            for block in layer.blocks.iter() {
                if !self.layers.iter().take(depth).any(|younger| younger.blocks.has(block)) {
                    self.copy_block(&layer.file, block, to)?;
                }
            }
        }
        Ok(())
    }

    fn copy_block(&self, from: &File, block: u64, to: &File) -> io::Result<()> {
        let mut buffer = [0; BLOCK as usize];
        let len = BLOCK.min(self.bytes.saturating_sub(block * BLOCK)) as usize;
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        from.read_exact_at(bytes, block * BLOCK)?;
        if bytes.iter().any(|byte| *byte != 0) {
            to.write_all_at(bytes, block * BLOCK)?;
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
        let map = map_offset(size);
        let mut blocks = Blocks::default();
        let mut buffer = [0; BLOCK as usize];
        // A map that is mostly a hole may be of a disk of any size.
        let mut at = map;
        while let Some(data) = next_data(&file, at, footer_at).map_err(host("read", &path))? {
            at = (data.start - map) / 8 * 8 + map;
            while at < data.end {
                let len = BLOCK.min(footer_at - at) as usize;
                let bytes = buffer.get_mut(..len).unwrap_or_default();
                file.read_exact_at(bytes, at).map_err(host("read", &path))?;
                for (index, word) in ((at - map) / 8..).zip(bytes.chunks_exact(8)) {
                    blocks.add(index, word.try_into().map_or(0, u64::from_le_bytes));
                }
                at += len as u64;
            }
        }
        let behind = size.div_ceil(BLOCK) % 64;
        if behind != 0 && blocks.word(words(size).saturating_sub(1)) >> behind != 0 {
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
                if bytes > MAX_DISK_BYTES {
                    let reason = format!("a disk of {bytes} bytes is larger than {MAX_DISK_BYTES}");
                    return Err(snapshot.damaged(name, MAX_DISK_BYTES, reason));
                }
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
