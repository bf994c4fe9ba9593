//! The file `memory`: every page at its place, and a trailer behind them.
//!
//! The file can be mapped as it is: page `n` of guest memory is at offset `4096 * n`, a hole where it is zero or the
//! parent's. Checksums are made from the file when all pages are written, so that a page that was written twice
//! costs nothing more. One that is compressed ([`super::packed`]) is made from such a file, and becomes one when it is mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::{FallocateFlags, fallocate};
use sha2::{Digest, Sha256};

use crate::error::{SnapshotError, host};
use crate::id::{Checksum, SnapshotId};
use crate::manifest::{Compression, MemoryEntry};
use crate::nameless::{nameless_beside, nameless_elsewhere};
use crate::packed::{self, Packed};
use crate::{PAGE_BYTES, PageKind, PageMap};

/// Name of the file.
pub(crate) const FILE: &str = "memory";
/// Name of the file that compressed memory is made from, while a snapshot is written.
pub(crate) const RAW_FILE: &str = "memory.raw";
/// Pages that share a checksum: 1 MiB.
pub const CHUNK_PAGES: u64 = 256;

const MAGIC: [u8; 8] = *b"HARRMEM\n";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 48;
const CHECKSUM_BYTES: u64 = 32;
const PAGE: u64 = PAGE_BYTES as u64;

/// Length of the trailer for so many pages.
fn trailer_bytes(pages: u64, compression: Option<Compression>) -> u64 {
    let chunks = pages.div_ceil(CHUNK_PAGES);
    let lengths = if compression.is_some() { packed::LENGTH_BYTES * chunks } else { 0 };
    HEADER_BYTES + PageMap::encoded_bytes(pages) + CHECKSUM_BYTES * chunks + lengths
}

fn header(id: SnapshotId, pages: u64) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [0; HEADER_BYTES as usize];
    let fields: [(usize, &[u8]); 6] = [
        (0, &MAGIC),
        (8, &VERSION.to_le_bytes()),
        (12, &(PAGE_BYTES as u32).to_le_bytes()),
        (16, &id.0),
        (32, &pages.to_le_bytes()),
        (40, &(CHUNK_PAGES as u32).to_le_bytes()),
    ];
    for (offset, field) in fields {
        for (to, from) in bytes.iter_mut().skip(offset).zip(field) {
            *to = *from;
        }
    }
    bytes
}

/// Writes pages in any order, as often as needed.
pub struct MemoryWriter {
    file: File,
    path: PathBuf,
    map: PageMap,
    /// Where the pages go when all are written, compressed.
    packed: Option<File>,
}

impl MemoryWriter {
    pub(crate) fn new(
        file: File,
        path: PathBuf,
        pages: u64,
        others: PageKind,
        packed: Option<File>,
    ) -> Result<Self, SnapshotError> {
        // Long enough to be mapped even if its last pages are holes.
        file.set_len(pages.saturating_mul(PAGE)).map_err(host("write", &path))?;
        Ok(MemoryWriter { file, path, map: PageMap::new(pages, others), packed })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.map.pages()
    }

    /// Writes whole pages from `first` on. Pages of zeros take no room in the file.
    ///
    /// # Errors
    /// The host's, for instance a full disk; or the pages do not exist.
    pub fn write(&mut self, first: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let count = (bytes.len() / PAGE_BYTES) as u64;
        let inside = first.checked_add(count).is_some_and(|end| end <= self.map.pages());
        if !bytes.len().is_multiple_of(PAGE_BYTES) || !inside {
            return Err(host("write", &self.path)(io::ErrorKind::InvalidInput.into()));
        }
        let mut at = 0;
        let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let pages: Vec<&[u8]> = bytes.chunks_exact(PAGE_BYTES).collect();
        while let Some(page) = pages.get(at) {
            let is_zero = zero(page);
            let run = pages.iter().skip(at).take_while(|page| zero(page) == is_zero).count();
            let start = first + at as u64;
            if is_zero {
                self.release(start, run as u64)?;
            } else {
                let run_bytes = bytes.get(at * PAGE_BYTES..(at + run) * PAGE_BYTES).unwrap_or_default();
                self.file.write_all_at(run_bytes, start * PAGE).map_err(host("write", &self.path))?;
                (start..start + run as u64).for_each(|page| self.map.set(page, PageKind::Data));
            }
            at += run;
        }
        Ok(())
    }

    /// Says that pages are zero.
    ///
    /// # Errors
    /// The host's.
    pub fn release(&mut self, first: u64, count: u64) -> Result<(), SnapshotError> {
        for page in first..first.saturating_add(count).min(self.map.pages()) {
            if self.map.get(page) == PageKind::Data {
                self.punch(page)?;
            }
            self.map.set(page, PageKind::Zero);
        }
        Ok(())
    }

    fn punch(&self, page: u64) -> Result<(), SnapshotError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, flags, page * PAGE, PAGE).is_ok() {
            return Ok(());
        }
        // A file system without holes.
        self.file.write_all_at(&[0; PAGE_BYTES], page * PAGE).map_err(host("write", &self.path))
    }

    /// Adds checksums, if it is to have them, and trailer, and makes all of it durable if it is to be.
    pub(crate) fn finish(
        self,
        id: SnapshotId,
        durable: bool,
        checked: bool,
    ) -> Result<MemoryEntry, SnapshotError> {
        let failed = host("write", &self.path);
        let pages = self.map.pages();
        let mut trailer = header(id, pages).to_vec();
        trailer.extend_from_slice(self.map.encode());
        for chunk in 0..pages.div_ceil(CHUNK_PAGES) {
            if !checked {
                trailer.extend_from_slice(&[0; CHECKSUM_BYTES as usize]);
                continue;
            }
            let bytes = chunk_data(&self.file, &self.map, chunk).map_err(host("read", &self.path))?;
            trailer.extend_from_slice(&checksum(&bytes));
        }
        let (file, end) = match &self.packed {
            None => (&self.file, pages * PAGE),
            Some(to) => {
                let lengths = packed::pack(&self.file, &self.map, to).map_err(&failed)?;
                let end = lengths.iter().map(|length| u64::from(*length)).sum();
                lengths.iter().for_each(|length| trailer.extend_from_slice(&length.to_le_bytes()));
                std::fs::remove_file(&self.path).map_err(host("remove", &self.path))?;
                (to, end)
            }
        };
        file.write_all_at(&trailer, end).map_err(&failed)?;
        if durable {
            file.sync_all().map_err(&failed)?;
        }
        Ok(MemoryEntry {
            pages,
            trailer_bytes: trailer.len() as u64,
            trailer_sha256: Checksum::of(&trailer),
            compression: self.packed.as_ref().map(|_| Compression::Lz4),
        })
    }
}

/// The data pages of a chunk, one after the other.
pub(crate) fn chunk_data(file: &File, map: &PageMap, chunk: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (page, count) in data_runs(map, chunk) {
        let from = bytes.len();
        bytes.resize(from + (count * PAGE) as usize, 0);
        file.read_exact_at(bytes.get_mut(from..).unwrap_or_default(), page * PAGE)?;
    }
    Ok(bytes)
}

/// Runs of data pages in a chunk: first and count.
pub(crate) fn data_runs(map: &PageMap, chunk: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = (chunk * CHUNK_PAGES + CHUNK_PAGES).min(map.pages());
    let mut page = chunk * CHUNK_PAGES;
    std::iter::from_fn(move || {
        page = (page..end).find(|&page| map.get(page) == PageKind::Data)?;
        let first = page;
        page = (page..end).find(|&page| map.get(page) != PageKind::Data).unwrap_or(end);
        Some((first, page - first))
    })
}

/// SHA-256 of a chunk's data pages; zeros if there are none.
fn checksum(data: &[u8]) -> [u8; 32] {
    if data.is_empty() { [0; 32] } else { Sha256::digest(data).into() }
}

/// The open file `memory` of a snapshot.
#[derive(Debug)]
pub struct MemoryImage {
    /// As it is stored.
    stored: Arc<File>,
    folder: PathBuf,
    /// Where each page is.
    pub map: PageMap,
    checksums: Vec<u8>,
    /// Of one that is compressed: where each chunk is.
    packed: Option<Packed>,
    /// What it becomes when it is mapped.
    unpacked: OnceLock<Arc<File>>,
}

impl MemoryImage {
    /// Opens the file of the snapshot in `folder` and checks all but the pages themselves.
    pub(crate) fn open(folder: &Path, id: SnapshotId, entry: &MemoryEntry) -> Result<Self, SnapshotError> {
        let path = folder.join(FILE);
        let file = File::open(&path).map_err(host("open", &path))?;
        let damaged = |offset: u64, reason: String| SnapshotError::Damaged {
            path: folder.to_owned(),
            part: FILE.to_owned(),
            offset,
            reason,
        };
        let len = file.metadata().map_err(host("read", &path))?.len();
        let wanted = trailer_bytes(entry.pages, entry.compression);
        let plain = entry.pages.saturating_mul(PAGE);
        // How long compressed pages are stands in the trailer, which is at the end.
        let start = if entry.compression.is_some() { len.saturating_sub(wanted) } else { plain };
        if entry.trailer_bytes != wanted || len != start.saturating_add(wanted) {
            return Err(damaged(
                len,
                format!("it has {len} bytes instead of {}", start.saturating_add(wanted)),
            ));
        }
        let mut trailer = vec![0; wanted as usize];
        file.read_exact_at(&mut trailer, start).map_err(host("read", &path))?;
        if Checksum::of(&trailer) != entry.trailer_sha256 {
            return Err(damaged(start, "the trailer's checksum is another one".to_owned()));
        }
        let (head, rest) = trailer.split_at(HEADER_BYTES as usize);
        if head != header(id, entry.pages) {
            return Err(damaged(start, "the trailer belongs to another snapshot".to_owned()));
        }
        let (map, rest) = rest.split_at(PageMap::encoded_bytes(entry.pages) as usize);
        let map = PageMap::decode(entry.pages, map)
            .map_err(|at| damaged(start + HEADER_BYTES + at, "no such kind of page".to_owned()))?;
        let chunks = entry.pages.div_ceil(CHUNK_PAGES);
        let (checksums, lengths) = rest.split_at((CHECKSUM_BYTES * chunks) as usize);
        let packed = match entry.compression {
            None => None,
            Some(Compression::Lz4) => {
                Some(Packed::new(lengths, &map, start).map_err(|reason| damaged(start, reason))?)
            }
        };
        let checksums = checksums.to_vec();
        let (stored, folder) = (Arc::new(file), folder.to_owned());
        Ok(MemoryImage { stored, folder, map, checksums, packed, unpacked: OnceLock::new() })
    }

    /// A file with every page at its place: the snapshot's, or one without a name that its pages are unpacked into, once.
    ///
    /// # Errors
    /// The host's; or packed pages are damaged.
    pub fn file(&self) -> Result<Arc<File>, SnapshotError> {
        let Some(packed) = &self.packed else { return Ok(Arc::clone(&self.stored)) };
        if let Some(file) = self.unpacked.get() {
            return Ok(Arc::clone(file));
        }
        let room = nameless_beside(&self.folder).map_err(host("make room beside", &self.folder))?;
        let room = match self.unpack_into(packed, &room) {
            Err(SnapshotError::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {
                let room = nameless_elsewhere().map_err(host("make room for the memory of", &self.folder))?;
                self.unpack_into(packed, &room)?;
                room
            }
            done => done.map(|()| room)?,
        };
        Ok(Arc::clone(self.unpacked.get_or_init(|| Arc::new(room))))
    }

    fn unpack_into(&self, packed: &Packed, room: &File) -> Result<(), SnapshotError> {
        let unpacked = || host("unpack the memory of", &self.folder);
        room.set_len(self.map.pages().saturating_mul(PAGE)).map_err(unpacked())?;
        for chunk in 0..self.chunks() {
            let bytes =
                packed.data(&self.stored, &self.map, chunk).map_err(|error| self.damaged(chunk, &error))?;
            // A chunk that is another one would be a machine's memory from now on.
            if !self.is_right(chunk, &bytes) {
                return Err(self.damaged(chunk, &"the pages' checksum is another one"));
            }
            let mut rest = bytes.as_slice();
            for (page, count) in data_runs(&self.map, chunk) {
                let (run, after) = rest.split_at(((count * PAGE) as usize).min(rest.len()));
                room.write_all_at(run, page * PAGE).map_err(unpacked())?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Whether it is compressed.
    pub fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    fn damaged(&self, chunk: u64, reason: &dyn std::fmt::Display) -> SnapshotError {
        let (offset, _) = self.place(chunk);
        let part = FILE.to_owned();
        SnapshotError::Damaged { path: self.folder.clone(), part, offset, reason: reason.to_string() }
    }

    /// Number of chunks that have a checksum.
    pub(crate) fn chunks(&self) -> u64 {
        self.map.pages().div_ceil(CHUNK_PAGES)
    }

    /// Where a chunk is in the file, and how long.
    pub(crate) fn place(&self, chunk: u64) -> (u64, u64) {
        match &self.packed {
            Some(packed) => packed.place(chunk),
            None => {
                let first = chunk * CHUNK_PAGES;
                (first * PAGE, CHUNK_PAGES.min(self.map.pages().saturating_sub(first)) * PAGE)
            }
        }
    }

    fn is_right(&self, chunk: u64, data: &[u8]) -> bool {
        let at = (chunk * CHECKSUM_BYTES) as usize;
        self.checksums.get(at..at + CHECKSUM_BYTES as usize) == Some(&checksum(data))
    }

    /// Whether a chunk's pages are as they were written, and holes where there are to be holes.
    pub(crate) fn chunk_is_whole(&self, chunk: u64) -> io::Result<bool> {
        if let Some(packed) = &self.packed {
            return Ok(self.is_right(chunk, &packed.data(&self.stored, &self.map, chunk)?));
        }
        let (offset, len) = self.place(chunk);
        let mut bytes = vec![0; len as usize];
        self.stored.read_exact_at(&mut bytes, offset)?;
        let stray = |(page, bytes): (u64, &[u8])| {
            self.map.get(page) != PageKind::Data && bytes.iter().any(|byte| *byte != 0)
        };
        if (chunk * CHUNK_PAGES..).zip(bytes.chunks_exact(PAGE_BYTES)).any(stray) {
            return Ok(false);
        }
        Ok(self.is_right(chunk, &chunk_data(&self.stored, &self.map, chunk)?))
    }
}
