//! What the host's kernel has behind the pages of guest memory, by /proc/self/pagemap
//! (admin-guide/mm/pagemap.rst in Linux' documentation).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use harrier_engine::GuestRegion;
use harrier_engine::memory::PAGE_SIZE;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

/// Entries that are read at a time.
const CHUNK: usize = 8192;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or of memory that processes share.
const OF_FILE: u64 = 1 << 61;

/// The kernel's word about one page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Mapped into this process.
    pub(crate) fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// Used by this process: it is there, or was put out to swap.
    pub(crate) fn is_used(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// The file's own page, not a copy of this process.
    pub(crate) fn is_of_file(self) -> bool {
        self.0 & OF_FILE != 0
    }
}

/// Tells `visit` of every page of `regions` that the kernel knows something of, by its number: regions follow each other
/// without gaps.
///
/// # Errors
/// The host's, where /proc is not mounted for example.
pub(crate) fn visit(regions: &[Arc<GuestRegion>], mut visit: impl FnMut(u64, Entry)) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut bytes = vec![0; CHUNK * 8];
    let mut region_first = 0;
    for region in regions {
        let pages = region.len() / PAGE_SIZE as u64;
        let start = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(CHUNK as u64);
            let chunk = bytes.get_mut(..count as usize * 8).unwrap_or_default();
            pagemap.read_exact_at(chunk, (start as u64 / PAGE_SIZE as u64 + at) * 8)?;
            for (page, entry) in (region_first + at..).zip(chunk.chunks_exact(8)) {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                if entry != 0 {
                    visit(page, Entry(entry));
                }
            }
            at += count;
        }
        region_first += pages;
    }
    Ok(())
}
