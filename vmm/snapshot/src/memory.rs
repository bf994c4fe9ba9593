//! The file `memory`: every page at its place, and a trailer behind them.
//!
//! The file can be mapped as it is: page `n` of guest memory is at offset `4096 * n`, a hole where it is zero or the
//! parent's. Checksums are made from the file when all pages are written, so that a page that was written twice
//! costs nothing more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use sha2::{Digest, Sha256};

use crate::error::{SnapshotError, host};
use crate::id::{Checksum, SnapshotId};
use crate::manifest::MemoryEntry;
use crate::{PAGE_BYTES, PageKind, PageMap};

/// Name of the file.
pub(crate) const FILE: &str = "memory";
/// Pages that share a checksum: 1 MiB.
pub const CHUNK_PAGES: u64 = 256;

const MAGIC: [u8; 8] = *b"HARRMEM\n";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 48;
const CHECKSUM_BYTES: u64 = 32;
const PAGE: u64 = PAGE_BYTES as u64;

/// Length of the trailer for so many pages.
pub(crate) fn trailer_bytes(pages: u64) -> u64 {
    HEADER_BYTES + PageMap::encoded_bytes(pages) + CHECKSUM_BYTES * pages.div_ceil(CHUNK_PAGES)
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
}

impl MemoryWriter {
    pub(crate) fn new(
        file: File,
        path: PathBuf,
        pages: u64,
        others: PageKind,
    ) -> Result<Self, SnapshotError> {
        // Long enough to be mapped even if its last pages are holes.
        file.set_len(pages.saturating_mul(PAGE)).map_err(host("write", &path))?;
        Ok(MemoryWriter { file, path, map: PageMap::new(pages, others) })
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

    /// Adds checksums and trailer, and makes all of it durable if it is to be.
    pub(crate) fn finish(self, id: SnapshotId, durable: bool) -> Result<MemoryEntry, SnapshotError> {
        let failed = host("write", &self.path);
        let pages = self.map.pages();
        let mut trailer = header(id, pages).to_vec();
        trailer.extend_from_slice(self.map.encode());
        for chunk in 0..pages.div_ceil(CHUNK_PAGES) {
            let checksum = chunk_checksum(&self.file, &self.map, chunk).map_err(host("read", &self.path))?;
            trailer.extend_from_slice(&checksum);
        }
        self.file.write_all_at(&trailer, pages * PAGE).map_err(&failed)?;
        if durable {
            self.file.sync_all().map_err(&failed)?;
        }
        Ok(MemoryEntry { pages, trailer_bytes: trailer.len() as u64, trailer_sha256: Checksum::of(&trailer) })
    }
}

/// SHA-256 of the data pages of a chunk, one after the other; zeros if there are none.
fn chunk_checksum(file: &File, map: &PageMap, chunk: u64) -> io::Result<[u8; 32]> {
    let first = chunk * CHUNK_PAGES;
    let end = (first + CHUNK_PAGES).min(map.pages());
    let mut hash: Option<Sha256> = None;
    let mut buffer = Vec::new();
    let mut page = first;
    while page < end {
        if map.get(page) != PageKind::Data {
            page += 1;
            continue;
        }
        let run = (page..end).take_while(|&page| map.get(page) == PageKind::Data).count() as u64;
        buffer.resize((run * PAGE) as usize, 0);
        file.read_exact_at(&mut buffer, page * PAGE)?;
        hash.get_or_insert_default().update(&buffer);
        page += run;
    }
    Ok(hash.map_or([0; 32], |hash| hash.finalize().into()))
}

/// The open file `memory` of a snapshot.
#[derive(Debug)]
pub struct MemoryImage {
    /// The file.
    pub file: Arc<File>,
    /// Where each page is.
    pub map: PageMap,
    checksums: Vec<u8>,
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
        let start = entry.pages.saturating_mul(PAGE);
        let wanted = trailer_bytes(entry.pages);
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
        let (map, checksums) = rest.split_at(PageMap::encoded_bytes(entry.pages) as usize);
        let map = PageMap::decode(entry.pages, map)
            .map_err(|at| damaged(start + HEADER_BYTES + at, "no such kind of page".to_owned()))?;
        Ok(MemoryImage { file: Arc::new(file), map, checksums: checksums.to_vec() })
    }

    /// Number of chunks that have a checksum.
    pub(crate) fn chunks(&self) -> u64 {
        self.map.pages().div_ceil(CHUNK_PAGES)
    }

    /// Whether a chunk's pages are as they were written, and holes where there are to be holes.
    pub(crate) fn chunk_is_whole(&self, chunk: u64) -> io::Result<bool> {
        let first = chunk * CHUNK_PAGES;
        let mut bytes = vec![0; (CHUNK_PAGES.min(self.map.pages() - first) * PAGE) as usize];
        self.file.read_exact_at(&mut bytes, first * PAGE)?;
        let stray = |(page, bytes): (u64, &[u8])| {
            self.map.get(page) != PageKind::Data && bytes.iter().any(|byte| *byte != 0)
        };
        if (first..).zip(bytes.chunks_exact(PAGE_BYTES)).any(stray) {
            return Ok(false);
        }
        let found = chunk_checksum(&self.file, &self.map, chunk)?;
        let at = (chunk * CHECKSUM_BYTES) as usize;
        Ok(self.checksums.get(at..at + CHECKSUM_BYTES as usize) == Some(&found))
    }
}
