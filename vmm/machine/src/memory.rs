//! Guest memory, mapped in one or two pieces around the hole for device registers: anonymous memory of this process, or a
//! private view of a snapshot.
//!
//! [`GuestRam::new`] checks the size against the host before anything is created. Pages are taken from the
//! host only when they are first used. Anonymous memory, because a page of it costs half of what a page of a memfd costs, and
//! because the host may use large pages for it.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::{GuestMemory, GuestRegion, PageLog};
use harrier_snapshot::{Chain, SnapshotError};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, MmapRegion};

use crate::layout::{HIGH_MEMORY_START, MMIO_HOLE_START};

#[path = "memory_overlay.rs"]
mod overlay;

pub(crate) use overlay::{Need, get_ahead};

/// Less memory than this holds no guest at all, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

// mmap(2) constants of Linux on x86-64.
const PROT_READ_WRITE: i32 = 1 | 2;
const MAP_PRIVATE: i32 = 2;
const MAP_ANONYMOUS: i32 = 0x20;
const MAP_NORESERVE: i32 = 0x4000;

/// A number of bytes for people: `512M`, `1536K`, `100 bytes`. From 10M on, parts of a mebibyte are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 >> shift != 0 && self.0.trailing_zeros() >= shift;
        match self.0 {
            _ if fits(30) => write!(f, "{}G", self.0 >> 30),
            _ if fits(20) || self.0 >= 10 << 20 => write!(f, "{}M", self.0 >> 20),
            _ if fits(10) => write!(f, "{}K", self.0 >> 10),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No guest fits.
    #[error("guest memory of {size} is too little: give at least {}", ByteSize(MIN_MEMORY_BYTES))]
    TooSmall {
        /// What was asked for.
        size: ByteSize,
    },
    /// Not a whole number of pages.
    #[error("guest memory of {} bytes is not a multiple of 4K: round it to one", .size.0)]
    Misaligned {
        /// What was asked for.
        size: ByteSize,
    },
    /// The host does not have that much.
    #[error("guest memory of {size} is more than the {host} that this host has: give less")]
    TooLarge {
        /// What was asked for.
        size: ByteSize,
        /// The host's memory.
        host: ByteSize,
    },
    /// The host refused.
    #[error(
        "guest memory of {size}: the host refused ({reason}): give less, free memory, or raise the limit that says so"
    )]
    Refused {
        /// What was asked for.
        size: ByteSize,
        /// The host's answer.
        reason: String,
    },
    /// The snapshot that it is made of.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// Why a range was not given back.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// It is not page aligned, or not in one region.
    #[error("the range is not in one piece of guest memory")]
    NotMemory,
    /// The host refused.
    #[error("the host does not release memory: {0}")]
    Host(std::io::Error),
}

/// All guest memory and what is behind it; clones share them.
#[derive(Clone)]
pub struct GuestRam {
    /// The regions, mapped.
    pub memory: GuestMemory,
    /// The same regions one by one, as an engine takes them. In snapshots they follow each other without gaps.
    pub regions: Vec<Arc<GuestRegion>>,
    /// What is behind all regions.
    pub backing: Backing,
}

/// What is behind guest memory.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Anonymous memory, but for what a boot loader laid over it.
    Own(Laid),
    /// Files of snapshots, mapped privately: what is written stays in this process.
    Image(Arc<Chain>),
}

/// Where memory shows the pages of files that a boot loader mapped, by guest physical addresses; clones share the list.
#[derive(Debug, Clone, Default)]
pub struct Laid(Arc<Mutex<Vec<Range<u64>>>>);

impl Laid {
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, range: Range<u64>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(range);
    }

    fn overlaps(&self, other: &Range<u64>) -> bool {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().any(|range| range.start < other.end && other.start < range.end)
    }
}

impl GuestRam {
    /// Creates `size_bytes` of zeroed guest memory.
    ///
    /// # Errors
    /// [`MemoryError`] if the size is below [`MIN_MEMORY_BYTES`], not page aligned, more than the host's
    /// memory, or refused by the host.
    pub fn new(size_bytes: u64) -> Result<Self, MemoryError> {
        check_size(size_bytes, host_memory_bytes())?;
        let mut regions = Vec::new();
        for (gpa, _, len) in pieces(size_bytes) {
            regions.push(map(size_bytes, gpa, len, MAP_ANONYMOUS, None)?);
        }
        Self::of(size_bytes, regions, Backing::Own(Laid::default()))
    }

    /// Guest memory as a snapshot has it. Pages are read when they are first used; what the machine writes is its own.
    ///
    /// # Errors
    /// [`MemoryError`] if the host refuses.
    pub fn from_snapshot(chain: &Arc<Chain>) -> Result<Self, MemoryError> {
        let size_bytes = chain.pages().saturating_mul(PAGE_SIZE as u64);
        check_size(size_bytes, host_memory_bytes())?;
        let refused = |err: &dyn fmt::Display| MemoryError::Refused {
            size: ByteSize(size_bytes),
            reason: err.to_string(),
        };
        let file = chain.base().file()?;
        let mut regions = Vec::new();
        for (gpa, offset, len) in pieces(size_bytes) {
            regions.push(map(
                size_bytes,
                gpa,
                len,
                0,
                Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            )?);
        }
        let ram = Self::of(size_bytes, regions, Backing::Image(Arc::clone(chain)))?;
        if !chain.is_full() {
            overlay::apply(chain, &file, chain.runs()?, &ram).map_err(|err| refused(&err))?;
            // What was copied is what the snapshot has: nothing was written yet.
            for region in &ram.regions {
                let mapping: &MmapRegion<PageLog> = region;
                mapping.bitmap().take_dirty();
            }
        }
        Ok(ram)
    }

    fn of(size_bytes: u64, regions: Vec<Arc<GuestRegion>>, backing: Backing) -> Result<Self, MemoryError> {
        let memory = GuestMemory::from_arc_regions(regions.clone())
            .map_err(|err| MemoryError::Refused { size: ByteSize(size_bytes), reason: err.to_string() })?;
        for region in &regions {
            // Without it a crash of the monitor would write all of the guest's secrets to the disk.
            if let Err(err) = overlay::keep_out_of_core_dumps(region) {
                log::debug!("guest memory would be in a core dump: {err}");
            }
        }
        Ok(GuestRam { memory, regions, backing })
    }
}

/// Maps `len_bytes` of memory for `gpa`, private to this process. Its pages are of `file`, or zero.
fn map(
    size_bytes: u64,
    gpa: u64,
    len_bytes: u64,
    flags: i32,
    file: Option<FileOffset>,
) -> Result<Arc<GuestRegion>, MemoryError> {
    let refused = |reason: String| MemoryError::Refused { size: ByteSize(size_bytes), reason };
    let len = usize::try_from(len_bytes).map_err(|err| refused(err.to_string()))?;
    let mut builder = MmapRegionBuilder::new_with_bitmap(len, PageLog::with_len(len))
        .with_mmap_prot(PROT_READ_WRITE)
        .with_mmap_flags(flags | MAP_PRIVATE | MAP_NORESERVE);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping = builder.build().map_err(|err| refused(err.to_string()))?;
    let region = GuestRegion::new(mapping, GuestAddress(gpa))
        .ok_or_else(|| refused("the addresses overflow".to_owned()))?;
    Ok(Arc::new(region))
}

impl GuestRam {
    /// Number of pages in all regions.
    pub(crate) fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.len() / PAGE_SIZE as u64).sum()
    }

    /// First page and number of pages of each range of guest physical addresses, as far as there is memory.
    pub(crate) fn page_numbers(&self, ranges: Vec<Range<u64>>) -> Vec<(u64, u64)> {
        let page = PAGE_SIZE as u64;
        let mut numbers = Vec::new();
        let mut region_first = 0;
        for region in &self.regions {
            let (start, len) = (region.start_addr().0, region.len());
            for range in &ranges {
                let (from, to) = (range.start.max(start), range.end.min(start + len));
                if from < to {
                    let first = (from - start) / page;
                    numbers.push((region_first + first, (to - start).div_ceil(page) - first));
                }
            }
            region_first += len / page;
        }
        numbers
    }

    /// Shows the pages of `file` from `offset` on at `gpa`, privately, where memory is this machine's own. What the guest
    /// does not use is not read, and machines share what they only read. The file must not change while a machine lives.
    ///
    /// All in whole pages; false if that cannot be, and then nothing was done.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn lay(&self, file: &File, offset: u64, gpa: u64, len_bytes: u64) -> std::io::Result<bool> {
        let page = PAGE_SIZE as u64;
        let Backing::Own(laid) = &self.backing else { return Ok(false) };
        let Some(end) = gpa.checked_add(len_bytes) else { return Ok(false) };
        let whole = [offset, gpa, len_bytes].iter().all(|value| value.is_multiple_of(page)) && len_bytes > 0;
        let region = self.regions.iter().find(|region| {
            let start = region.start_addr().0;
            start <= gpa && end <= start + region.len()
        });
        let Some(region) = region.filter(|_| whole) else { return Ok(false) };
        let at = gpa - region.start_addr().0;
        overlay::lay(region, at, len_bytes as usize, file, offset)?;
        laid.add(gpa..end);
        region.bitmap().mark_dirty(at as usize, len_bytes as usize);
        Ok(true)
    }

    /// Asks the host for large pages in a range that the guest will use all of. Advice only.
    pub(crate) fn advise_large(&self, range: Range<u64>) {
        if !matches!(self.backing, Backing::Own(_)) {
            return;
        }
        for region in &self.regions {
            let start = region.start_addr().0;
            let (from, to) = (range.start.max(start), range.end.min(start + region.len()));
            if from < to
                && let Err(err) = overlay::advise_large(region, from - start, (to - from) as usize)
            {
                log::debug!("large pages for guest memory: {err}");
            }
        }
    }

    /// Gives the pages of a range back to the host: they read as zero from now on, and count as written, so that a
    /// snapshot records the zeros and translations of code in them are dropped.
    ///
    /// # Errors
    /// [`ReleaseError`] if the range is not page aligned, not in one region, or the host refuses.
    pub fn release(&self, gpa: u64, len_bytes: u64) -> Result<(), ReleaseError> {
        let page = PAGE_SIZE as u64;
        if !gpa.is_multiple_of(page) || !len_bytes.is_multiple_of(page) || len_bytes == 0 {
            return Err(ReleaseError::NotMemory);
        }
        let within = |region: &&Arc<GuestRegion>| {
            let offset = gpa.checked_sub(region.start_addr().0)?;
            (offset.checked_add(len_bytes)? <= region.len()).then_some(())
        };
        let region =
            self.regions.iter().find(|region| within(region).is_some()).ok_or(ReleaseError::NotMemory)?;
        let offset = gpa - region.start_addr().0;
        match &self.backing {
            Backing::Own(laid) if !laid.overlaps(&(gpa..gpa + len_bytes)) => {
                overlay::give_back(region, offset, len_bytes as usize).map_err(ReleaseError::Host)?;
            }
            // A hole in a private view would show the file's bytes again.
            Backing::Own(_) | Backing::Image(_) => {
                overlay::zero(region, offset, len_bytes).map_err(ReleaseError::Host)?;
            }
        }
        region.bitmap().mark_dirty(offset as usize, len_bytes as usize);
        Ok(())
    }
}

/// The host's memory in bytes, swap not counted.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)))
}

fn check_size(size_bytes: u64, host_bytes: u64) -> Result<(), MemoryError> {
    let size = ByteSize(size_bytes);
    if size_bytes < MIN_MEMORY_BYTES {
        return Err(MemoryError::TooSmall { size });
    }
    if size_bytes > host_bytes {
        return Err(MemoryError::TooLarge { size, host: ByteSize(host_bytes) });
    }
    if !size_bytes.is_multiple_of(PAGE_SIZE as u64) {
        return Err(MemoryError::Misaligned { size });
    }
    Ok(())
}

/// Guest physical address, file offset and length of each region.
fn pieces(size_bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = size_bytes.min(MMIO_HOLE_START);
    let mut pieces = vec![(0, 0, low)];
    if size_bytes > low {
        pieces.push((HIGH_MEMORY_START, low, size_bytes - low));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    /// Numbers of the pages that take memory of the host's.
    fn used(ram: &GuestRam) -> Vec<u64> {
        let mut pages = Vec::new();
        crate::pagemap::visit(&ram.regions, |page, entry| {
            if entry.is_used() {
                pages.push(page);
            }
        })
        .unwrap();
        pages
    }

    #[test]
    fn sizes_that_cannot_work_are_refused_with_the_value_and_a_remedy() {
        for (size, host, text) in [
            (0, 8 << 30, "guest memory of 0 bytes is too little: give at least 2M"),
            ((1 << 20) + 1, 8 << 30, "guest memory of 1048577 bytes is too little: give at least 2M"),
            (
                (4 << 20) + 1,
                8 << 30,
                "guest memory of 4194305 bytes is not a multiple of 4K: round it to one",
            ),
            (16 << 30, 8 << 30, "guest memory of 16G is more than the 8G that this host has: give less"),
            (
                u64::MAX,
                8 << 30,
                "guest memory of 17592186044415M is more than the 8G that this host has: give less",
            ),
        ] {
            assert_eq!(check_size(size, host).unwrap_err().to_string(), text);
        }
        check_size(2 << 20, 2 << 20).unwrap();
    }

    #[test]
    fn memory_above_3_gib_goes_on_at_4_gib() {
        assert_eq!(pieces(512 << 20), [(0, 0, 512 << 20)]);
        assert_eq!(pieces(0xc000_0000), [(0, 0, 0xc000_0000)]);
        assert_eq!(pieces(4 << 30), [(0, 0, 0xc000_0000), (0x1_0000_0000, 0xc000_0000, 0x4000_0000)]);
    }

    #[test]
    fn memory_is_zero_writable_and_logged() {
        let ram = GuestRam::new(4 << 20).unwrap();
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        ram.memory.write_obj(7u32, GuestAddress(0x2ffe)).unwrap();
        let region = ram.memory.iter().next().unwrap();
        assert_eq!(region.len(), 4 << 20);
        let dirty = [0x1000, 0x2fff, 0x3000, 0x4000].map(|at| region.bitmap().dirty_at(at));
        assert_eq!(dirty, [false, true, true, false]);
    }

    #[test]
    fn released_pages_cost_nothing_read_as_zero_and_count_as_written() {
        let ram = GuestRam::new(4 << 20).unwrap();
        ram.memory.write_slice(&[7; 0x3000], GuestAddress(0x1000)).unwrap();
        let log = vm_memory::MmapRegion::bitmap(&ram.regions[0]).clone();
        log.take_dirty();
        assert_eq!(used(&ram), [1, 2, 3]);
        ram.release(0x2000, 0x2000).unwrap();
        assert_eq!(used(&ram), [1]);
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x1ff8)).unwrap(), 0x0707_0707_0707_0707);
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x3ff8)).unwrap(), 0);
        assert_eq!(log.take_dirty()[0], 0b1100);
        ram.memory.write_obj(1u8, GuestAddress(0x2000)).unwrap();
        assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 1);
    }

    #[test]
    fn only_whole_pages_of_one_region_are_released() {
        let ram = GuestRam::new(4 << 20).unwrap();
        for (gpa, len) in [
            (1, 0x1000),
            (0, 0),
            (0, 0x1001),
            (4 << 20, 0x1000),
            ((4 << 20) - 0x1000, 0x2000),
            (u64::MAX - 0xfff, 0x1000),
            (0x1000, u64::MAX - 0xfff),
        ] {
            assert!(matches!(ram.release(gpa, len), Err(ReleaseError::NotMemory)), "{gpa:#x} {len:#x}");
        }
        ram.release(0, 4 << 20).unwrap();
    }

    #[test]
    fn byte_sizes_are_exact_up_to_10_mebibytes() {
        let texts =
            [0, 512 << 20, 1536 << 10, 3 << 30, 4097, (100 << 20) + 4096].map(|n| ByteSize(n).to_string());
        assert_eq!(texts, ["0 bytes", "512M", "1536K", "3G", "4097 bytes", "100M"]);
    }
}
