//! Mappings over parts of guest memory: pages of a chain's younger snapshots over the oldest one's, a kernel's file over memory
//! that is still zero, zeros over what is given back; and advice about such parts.
//!
//! Long runs are mapped over what is there and read when they are used. Short ones are copied: a mapping costs more than
//! a few pages, and the number of mappings of a process is limited.
//!
//! Unsafe, because replacing a mapping is.
#![expect(unsafe_code, reason = "mmap over a part of a mapping, madvise on one")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use harrier_engine::GuestRegion;
use harrier_engine::memory::PAGE_SIZE;
use harrier_snapshot::{Chain, Run, Source};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use super::GuestRam;

/// Runs of fewer pages are copied.
const MAPPED_RUN_PAGES: u64 = 16;
/// More mappings are not made; Linux allows 65530 in a process (Documentation/admin-guide/sysctl/vm.rst).
const MAX_MAPPINGS: usize = 16_384;

/// Lays the runs of a chain, but those of `base`, which is mapped already, over memory.
pub(super) fn apply(chain: &Chain, base: &Arc<File>, runs: Vec<Run>, ram: &GuestRam) -> io::Result<()> {
    let mut mappings = 0;
    for run in runs {
        if matches!(&run.source, Source::File(file) if Arc::ptr_eq(file, base)) {
            continue;
        }
        for piece in pieces(ram, &run) {
            if matches!(run.source, Source::Zero) && is_hole(chain, &piece) {
                continue;
            }
            if piece.count >= MAPPED_RUN_PAGES && mappings < MAX_MAPPINGS {
                map(ram, &piece, &run.source)?;
                mappings += 1;
            } else {
                copy(ram, &piece, &run.source)?;
            }
        }
    }
    Ok(())
}

/// A part of a run in one region.
struct Piece {
    region: usize,
    /// First page of the run, in the file.
    page: u64,
    /// Offset in the region, in bytes.
    offset: u64,
    count: u64,
}

fn pieces(ram: &GuestRam, run: &Run) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut region_first = 0;
    for (region, mapped) in ram.regions.iter().enumerate() {
        let region_pages = mapped.len() / PAGE_SIZE as u64;
        let first = run.first.max(region_first);
        let end = (run.first + run.count).min(region_first + region_pages);
        if first < end {
            let offset = (first - region_first) * PAGE_SIZE as u64;
            pieces.push(Piece { region, page: first, offset, count: end - first });
        }
        region_first += region_pages;
    }
    pieces
}

/// Whether the oldest snapshot has only zeros there, as the piece wants.
fn is_hole(chain: &Chain, piece: &Piece) -> bool {
    let map = &chain.base().map;
    (piece.page..piece.page + piece.count).all(|page| map.get(page) == harrier_snapshot::PageKind::Zero)
}

fn copy(ram: &GuestRam, piece: &Piece, source: &Source) -> io::Result<()> {
    let Some(region) = ram.regions.get(piece.region) else { return Ok(()) };
    let mut bytes = vec![0; PAGE_SIZE];
    for index in 0..piece.count {
        if let Source::File(file) = source {
            file.read_exact_at(&mut bytes, (piece.page + index) * PAGE_SIZE as u64)?;
        }
        let at = MemoryRegionAddress(piece.offset + index * PAGE_SIZE as u64);
        region.write_slice(&bytes, at).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Makes a range of a region zero, and gives its memory back where that is worth a mapping.
pub(super) fn zero(region: &GuestRegion, offset: u64, len_bytes: u64) -> io::Result<()> {
    if len_bytes >= MAPPED_RUN_PAGES * PAGE_SIZE as u64 {
        return map_at(region, offset, len_bytes as usize, None, 0);
    }
    let zeros = vec![0; len_bytes as usize];
    region.write_slice(&zeros, MemoryRegionAddress(offset)).map_err(io::Error::other)
}

/// What a page is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Reading: the host's kernel begins to read it from the disk. What is read already is mapped by the kernel when it is
    /// used, with its neighbours, and faster than one by one ahead of time.
    InHostMemory,
    /// Writing: the machine gets its own copy.
    Own,
}

/// Gets a range of a region ahead of its use.
pub(crate) fn get_ahead(region: &GuestRegion, offset: u64, len: usize, need: Need) -> io::Result<()> {
    let advice = match need {
        Need::InHostMemory => Advice::WillNeed,
        Need::Own => Advice::LinuxPopulateWrite,
    };
    // SAFETY: no content changes: a page that is made writable is a copy of what was read there before.
    unsafe { advise(region, offset, len, advice) }
}

/// Shows the pages of `file` from `from` on.
pub(super) fn lay(region: &GuestRegion, offset: u64, len: usize, file: &File, from: u64) -> io::Result<()> {
    map_at(region, offset, len, Some(file.as_fd()), from)
}

/// Gives the pages of anonymous memory back; they read as zero from then on.
pub(super) fn give_back(region: &GuestRegion, offset: u64, len: usize) -> io::Result<()> {
    // SAFETY: the advice is about the region's own anonymous memory, whose pages become zero. Guest memory is only reached by
    // volatile accesses, never by references.
    unsafe { advise(region, offset, len, Advice::LinuxDontNeed) }
}

/// Large pages, where the host has them for who asks.
pub(super) fn advise_large(region: &GuestRegion, offset: u64, len: usize) -> io::Result<()> {
    // SAFETY: no content changes.
    unsafe { advise(region, offset, len, Advice::LinuxHugepage) }
}

/// Leaves a region out of core dumps.
pub(super) fn keep_out_of_core_dumps(region: &GuestRegion) -> io::Result<()> {
    // SAFETY: no content changes.
    unsafe { advise(region, 0, region.len() as usize, Advice::LinuxDontDump) }
}

/// # Safety
/// `advice` does to the range what its user may do to guest memory.
unsafe fn advise(region: &GuestRegion, offset: u64, len: usize, advice: Advice) -> io::Result<()> {
    if offset.checked_add(len as u64).is_none_or(|end| end > region.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let at = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
    // SAFETY: `at` and `len` lie in the region's own mapping, which stays mapped as long as the region lives; the caller
    // vouches for the advice.
    unsafe { madvise(at.cast(), len, advice) }.map_err(Into::into)
}

fn map(ram: &GuestRam, piece: &Piece, source: &Source) -> io::Result<()> {
    let Some(region) = ram.regions.get(piece.region) else { return Ok(()) };
    let len = piece.count as usize * PAGE_SIZE;
    let fd = match source {
        Source::File(file) => Some(file.as_fd()),
        Source::Zero => None,
    };
    map_at(region, piece.offset, len, fd, piece.page * PAGE_SIZE as u64)
}

/// Maps a file, or zeros, over a part of a region.
fn map_at(
    region: &GuestRegion,
    offset: u64,
    len: usize,
    file: Option<BorrowedFd<'_>>,
    from: u64,
) -> io::Result<()> {
    let inside = offset.checked_add(len as u64).is_some_and(|end| end <= region.len());
    if !inside {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let at = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: `at` and `len` lie in the region's own mapping, which stays mapped as long as the region lives and is
    // unmapped with it. Guest memory is only reached by volatile accesses, never by references, and the new mapping has
    // the same protection.
    unsafe {
        match file {
            Some(file) => mmap(at.cast(), len, protection, flags, file, from)?,
            None => mmap_anonymous(at.cast(), len, protection, flags)?,
        };
        // As the region's own mapping.
        madvise(at.cast(), len, Advice::LinuxDontDump).map_err(Into::into)
    }
}
