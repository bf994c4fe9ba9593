//! What is behind a disk: one file, or a file of the machine's own over others that never change.
//!
//! [`DiskFile::over`] is the copy-on-write layer of a machine that is made of a snapshot, where the file system cannot share
//! blocks: nothing is copied when it is made. A map says of each block of 4 KiB whether the machine's own file has it;
//! what has it not is read from the youngest layer below that has it, or from the base. A write of a part of a block brings
//! the rest of it up first. The map is in memory: it goes with the machine, as its own file does, and a snapshot
//! writes down what it needs of both ([`super::block_copy`]).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::chain::Buffers;

/// Bytes of a block, the unit of maps: what most file systems in guests write at least.
pub const BLOCK_BYTES: u64 = 4096;

/// Words of a piece of a map: a page of them, for 128 MiB of the disk.
const PIECE_WORDS: u64 = 512;
/// Most bytes of a disk that can be written: 64 TiB.
pub const MAX_BYTES: u64 = 1 << 46;

type Piece = [AtomicU64; PIECE_WORDS as usize];

/// A set of a disk's blocks, that threads may share. Blocks behind its end are never in it. What it takes is bounded by the
/// blocks that have been in it: a disk that is mostly a hole may be of any size.
///
/// From outside it is words with their index that have any block, 64 in each, lowest first.
#[derive(Debug)]
pub struct BlockMap(Box<[OnceLock<Box<Piece>>]>);

impl BlockMap {
    /// None of the blocks of so many bytes.
    pub fn empty(disk_bytes: u64) -> Self {
        let pieces = disk_bytes.min(MAX_BYTES).div_ceil(BLOCK_BYTES).div_ceil(64).div_ceil(PIECE_WORDS);
        BlockMap((0..pieces).map(|_| OnceLock::new()).collect())
    }

    /// Those of a disk of so many bytes whose bits are set.
    pub fn from_words(disk_bytes: u64, words: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let map = Self::empty(disk_bytes);
        map.add_words(words);
        map
    }

    /// The words that have any.
    pub fn words(&self) -> Vec<(u64, u64)> {
        self.each_word(|word| word.load(Ordering::Acquire))
    }

    /// The words that have any; afterwards no block is in it.
    pub fn take(&self) -> Vec<(u64, u64)> {
        self.each_word(|word| word.swap(0, Ordering::AcqRel))
    }

    fn each_word(&self, get: impl Fn(&AtomicU64) -> u64) -> Vec<(u64, u64)> {
        let mut words = Vec::new();
        for (piece, first) in self.0.iter().zip((0..).step_by(PIECE_WORDS as usize)) {
            let piece = piece.get().into_iter().flat_map(|piece| piece.iter());
            words.extend((first..).zip(piece.map(&get)).filter(|(_, word)| *word != 0));
        }
        words
    }

    /// Adds the blocks of such words.
    pub fn add_words(&self, words: impl IntoIterator<Item = (u64, u64)>) {
        words.into_iter().for_each(|(index, word)| self.add_word(index, word));
    }

    fn add_word(&self, index: u64, bits: u64) {
        let Some(piece) = self.0.get((index / PIECE_WORDS) as usize) else { return };
        let piece = piece.get_or_init(|| Box::new([const { AtomicU64::new(0) }; PIECE_WORDS as usize]));
        if let Some(word) = piece.get((index % PIECE_WORDS) as usize) {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Whether a block is in it.
    pub fn has(&self, block: u64) -> bool {
        let index = block / 64;
        self.0
            .get((index / PIECE_WORDS) as usize)
            .and_then(OnceLock::get)
            .and_then(|piece| piece.get((index % PIECE_WORDS) as usize))
            .is_some_and(|word| word.load(Ordering::Acquire) >> (block % 64) & 1 != 0)
    }

    /// The first block from this one on that is in it.
    fn next(&self, block: u64) -> Option<u64> {
        let mut index = block / 64;
        let mut mask = u64::MAX << (block % 64);
        while let Some(piece) = self.0.get((index / PIECE_WORDS) as usize) {
            let Some(piece) = piece.get() else {
                (index, mask) = ((index / PIECE_WORDS + 1) * PIECE_WORDS, u64::MAX);
                continue;
            };
            let word = piece.get((index % PIECE_WORDS) as usize)?.load(Ordering::Acquire) & mask;
            if word != 0 {
                return Some(index * 64 + u64::from(word.trailing_zeros()));
            }
            (index, mask) = (index + 1, u64::MAX);
        }
        None
    }

    /// Adds blocks.
    pub fn add(&self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        let mut block = first;
        while block < end && block / 64 / PIECE_WORDS < self.0.len() as u64 {
            let here = (64 - block % 64).min(end - block);
            self.add_word(block / 64, u64::MAX >> (64 - here) << (block % 64));
            block += here;
        }
    }

    /// Adds the blocks that a range of bytes touches.
    pub(super) fn add_bytes(&self, offset: u64, bytes: u64) {
        if bytes > 0 {
            let first = offset / BLOCK_BYTES;
            self.add(first, offset.saturating_add(bytes).div_ceil(BLOCK_BYTES) - first);
        }
    }
}

/// A file that has some of a disk's blocks, each at its place.
#[derive(Debug)]
pub struct Layer {
    /// The file.
    pub file: File,
    /// The blocks that it has.
    pub blocks: BlockMap,
}

/// What a machine's own file lies on. None of it ever changes.
#[derive(Debug)]
pub struct Base {
    /// Youngest first.
    pub layers: Vec<Layer>,
    /// Has everything that no layer has.
    pub bottom: File,
}

/// What is behind a disk; clones are the same disk.
#[derive(Debug, Clone)]
pub struct DiskFile {
    own: Arc<File>,
    /// For a file that does not have everything: what it has, and where the rest is.
    over: Option<Arc<(BlockMap, Base)>>,
    len: u64,
}

impl DiskFile {
    /// A file that has everything.
    ///
    /// # Errors
    /// Its length cannot be found.
    pub fn whole(mut file: File) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        Ok(DiskFile { own: Arc::new(file), over: None, len })
    }

    /// The empty file `own` over `base`, which has `len` bytes.
    ///
    /// # Errors
    /// The host's, or it is larger than [`MAX_BYTES`].
    pub fn over(base: Base, own: File, len: u64) -> io::Result<Self> {
        if len > MAX_BYTES {
            let text = format!("a disk of {len} bytes is larger than {MAX_BYTES}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        own.set_len(len)?;
        Ok(DiskFile { own: Arc::new(own), over: Some(Arc::new((BlockMap::empty(len), base))), len })
    }

    /// Bytes of the disk when it was made.
    #[expect(clippy::len_without_is_empty, reason = "whether it is empty is of no interest")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The one file that has everything, if there is one.
    pub fn as_whole(&self) -> Option<&File> {
        self.over.is_none().then_some(&*self.own)
    }

    /// The file that has the block, and how many after it, up to `limit` in all, are in the same.
    fn run(&self, block: u64, limit: u64) -> (&File, u64) {
        let Some(over) = &self.over else { return (&self.own, limit) };
        let (own, base) = &**over;
        let place = |block| match own.has(block) {
            true => 0,
            false => {
                1 + base.layers.iter().position(|layer| layer.blocks.has(block)).unwrap_or(base.layers.len())
            }
        };
        let here = place(block);
        let count = 1
            + (block + 1..block.saturating_add(limit)).take_while(|next| place(*next) == here).count() as u64;
        let file = match here.checked_sub(1) {
            None => &self.own,
            Some(layer) => base.layers.get(layer).map_or(&base.bottom, |layer| &layer.file),
        };
        (file, count)
    }

    /// The first byte from `offset` on that may not be zero; the disk's length if there is none.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<u64> {
        let in_file = |file: &File| match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(at) => Ok(at.min(self.len)),
            Err(rustix::io::Errno::NXIO) => Ok(self.len),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let Some(over) = &self.over else { return in_file(&self.own) };
        let (own, base) = &**over;
        let mut next = in_file(&base.bottom)?;
        for blocks in base.layers.iter().map(|layer| &layer.blocks).chain([own]) {
            if let Some(block) = blocks.next(offset / BLOCK_BYTES) {
                next = next.min((block * BLOCK_BYTES).max(offset));
            }
        }
        Ok(next)
    }

    /// Calls `each` with the pieces of a range that have one file each: file, offset, length.
    fn pieces(
        &self,
        mut offset: u64,
        mut bytes: u64,
        mut each: impl FnMut(&File, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        while bytes > 0 {
            let block = offset / BLOCK_BYTES;
            let in_first = offset % BLOCK_BYTES;
            let (file, count) = self.run(block, (in_first + bytes).div_ceil(BLOCK_BYTES));
            let part = bytes.min(count.saturating_mul(BLOCK_BYTES) - in_first);
            each(file, offset, part)?;
            offset += part;
            bytes -= part;
        }
        Ok(())
    }

    /// Fills a buffer; behind the end of the file there are zeros.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buffer;
        self.pieces(offset, rest.len() as u64, |file, offset, bytes| {
            let (mut part, after) = std::mem::take(&mut rest).split_at_mut(bytes as usize);
            rest = after;
            let mut offset = offset;
            while !part.is_empty() {
                match file.read_at(part, offset) {
                    Ok(0) => {
                        part.fill(0);
                        break;
                    }
                    Ok(count) => {
                        part = part.get_mut(count..).unwrap_or_default();
                        offset += count as u64;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    }

    /// Reads into guest memory.
    pub(super) fn read(&self, mut to: Buffers<'_>, offset: u64) -> io::Result<()> {
        self.pieces(offset, to.len() as u64, |file, offset, bytes| {
            to.split_front(bytes as usize).read_file(file, offset)
        })
    }

    /// Writes from guest memory.
    pub(super) fn write(&self, from: Buffers<'_>, offset: u64) -> io::Result<()> {
        let bytes = from.len() as u64;
        self.bring_up_edges(offset, bytes)?;
        from.write_file(&*self.own, offset)?;
        self.has_now(offset, bytes);
        Ok(())
    }

    /// Brings up the blocks of which a change of these bytes leaves a part as it is.
    fn bring_up_edges(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let Some(over) = &self.over else { return Ok(()) };
        if bytes == 0 {
            return Ok(());
        }
        let end = offset.saturating_add(bytes);
        let edges = [(offset, offset / BLOCK_BYTES), (end, (end - 1) / BLOCK_BYTES)];
        for (edge, block) in edges {
            if edge.is_multiple_of(BLOCK_BYTES) || over.0.has(block) {
                continue;
            }
            let mut content = [0; BLOCK_BYTES as usize];
            self.read_at(&mut content, block * BLOCK_BYTES)?;
            // A disk may end within a block.
            let len = BLOCK_BYTES.min(self.len.max(end) - block * BLOCK_BYTES);
            self.own.write_all_at(content.get(..len as usize).unwrap_or(&content), block * BLOCK_BYTES)?;
            over.0.add(block, 1);
        }
        Ok(())
    }

    fn has_now(&self, offset: u64, bytes: u64) {
        if let Some(over) = &self.over {
            over.0.add_bytes(offset, bytes);
        }
    }

    /// Makes a range zero, or advises that nobody needs it: then it reads as before or as zero.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.bring_up_edges(offset, bytes)?;
        fallocate(&*self.own, FallocateMode::PunchHole, true, offset, bytes)
            .map_err(|error| io::Error::other(error.to_string()))?;
        self.has_now(offset, bytes);
        Ok(())
    }

    /// Makes a range zero; its blocks are given back if `unmap` asks for that.
    pub(super) fn zero(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        self.bring_up_edges(offset, bytes)?;
        // In a file that lies over others, what was never written is a hole.
        let mode =
            if unmap || self.over.is_some() { FallocateMode::PunchHole } else { FallocateMode::ZeroRange };
        if fallocate(&*self.own, mode, true, offset, bytes).is_err() {
            // A file system without holes.
            let zeros = vec![0; bytes.min(1 << 20) as usize];
            let end = offset.saturating_add(bytes);
            let mut at = offset;
            while at < end {
                let part = zeros.get(..(end - at).min(1 << 20) as usize).unwrap_or(&zeros);
                self.own.write_all_at(part, at)?;
                at += part.len() as u64;
            }
        }
        self.has_now(offset, bytes);
        Ok(())
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.own.sync_data()
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
