//! Where guest memory lies on the host, and which of it holds decoded code.
#![expect(unsafe_code, reason = "makes host pointers into regions that the map keeps mapped")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use harrier_engine::{GuestRegion, PageLog};
use vm_memory::{Address, GuestMemoryRegion, MmapRegion};

use super::PAGE;
use crate::native::mem::HostPtr;

/// Bytes that one bit of a code mask stands for.
const CHUNK: u64 = PAGE / 64;

/// One region, with a mask per page that says which 64-byte chunks hold decoded code of some vCPU.
pub(crate) struct Mapped {
    pub start: u64,
    pub end: u64,
    pub read_only: bool,
    host: u64,
    region: Arc<GuestRegion>,
    code: Box<[AtomicU64]>,
}

/// All regions; replaced as a whole when one is mapped or unmapped.
#[derive(Default)]
pub(crate) struct MemoryMap {
    regions: Vec<Arc<Mapped>>,
}

/// A physical page that is memory.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    mapped: &'a Mapped,
    index: usize,
}

/// So many zeros. The host gives them when they are used: most pages never hold code, and eight bytes for each page of a large
/// guest are much.
fn untouched(count: usize) -> Box<[AtomicU64]> {
    // The allocator knows that fresh pages are zero.
    let zeros = Box::into_raw(vec![0_u64; count].into_boxed_slice());
    // SAFETY: the pointer comes from a box, and an atomic has the size, alignment and valid values of its integer (documentation
    // of `AtomicU64`), so the box is freed with the layout that it was allocated with.
    unsafe { Box::from_raw(zeros as *mut [AtomicU64]) }
}

impl Mapped {
    pub(crate) fn new(region: Arc<GuestRegion>, read_only: bool) -> Mapped {
        let start = region.start_addr().raw_value();
        let len = region.len();
        Mapped {
            start,
            end: start.saturating_add(len),
            read_only,
            host: region.as_ptr() as u64,
            region,
            code: untouched(len.div_ceil(PAGE) as usize),
        }
    }

    /// Empties the page log, as a snapshot does.
    #[cfg(test)]
    pub(crate) fn clear_log(&self) {
        self.log().take_dirty();
    }

    fn log(&self) -> &PageLog {
        let mapping: &MmapRegion<PageLog> = &self.region;
        mapping.bitmap()
    }
}

/// The chunks that `len` bytes at this page offset touch.
pub(crate) fn chunk_mask(offset: u64, len: u64) -> u64 {
    let first = (offset / CHUNK).min(63);
    let last = ((offset + len.max(1) - 1) / CHUNK).min(63);
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl MemoryMap {
    /// This map with one more region. The caller has checked that it does not overlap.
    pub(crate) fn with(&self, mapped: Mapped) -> MemoryMap {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(mapped));
        MemoryMap { regions }
    }

    /// This map without the region that starts there; `None` when there is none.
    pub(crate) fn without(&self, start: u64) -> Option<MemoryMap> {
        let regions: Vec<_> = self.regions.iter().filter(|r| r.start != start).cloned().collect();
        (regions.len() < self.regions.len()).then_some(MemoryMap { regions })
    }

    pub(crate) fn regions(&self) -> &[Arc<Mapped>] {
        &self.regions
    }

    /// The page of memory that holds `gpa`, or `None` for device space.
    #[inline]
    pub(crate) fn page(&self, gpa: u64) -> Option<Page<'_>> {
        self.regions
            .iter()
            .find(|r| gpa >= r.start && gpa < r.end)
            .map(|mapped| Page { mapped, index: ((gpa - mapped.start) / PAGE) as usize })
    }

    /// Marks the page at this host address as written.
    pub(crate) fn mark_dirty_host(&self, host_page: u64) {
        for mapped in &self.regions {
            let offset = host_page.wrapping_sub(mapped.host);
            if offset < mapped.end - mapped.start {
                mapped.log().mark_dirty_unwatched((offset / PAGE) as usize);
            }
        }
    }
}

impl Page<'_> {
    /// Host address of the page.
    pub(crate) fn host(&self) -> u64 {
        self.mapped.host + self.index as u64 * PAGE
    }

    /// Host address of the byte at this offset in the page.
    pub(crate) fn ptr(&self, offset: u64) -> HostPtr {
        // SAFETY: the page lies inside a region that the map holds mapped; offsets are masked to the page.
        unsafe { HostPtr::new(self.host() + (offset & (PAGE - 1))) }
    }

    pub(crate) fn read_only(&self) -> bool {
        self.mapped.read_only
    }

    /// Logs a write to the page.
    pub(crate) fn mark_dirty(&self) {
        // The log of the page alone: its watcher is for writes that do not come from vCPUs.
        self.mapped.log().mark_dirty_unwatched(self.index);
    }

    /// Whether a write to the page is in the log.
    pub(crate) fn is_dirty(&self) -> bool {
        use vm_memory::bitmap::Bitmap;
        self.mapped.log().dirty_at(self.index * PAGE as usize)
    }

    /// Chunks that hold decoded code.
    pub(crate) fn code(&self) -> u64 {
        self.mapped.code.get(self.index).map_or(0, |mask| mask.load(Ordering::SeqCst))
    }

    /// Adds chunks that hold decoded code; answers the mask before.
    pub(crate) fn add_code(&self, chunks: u64) -> u64 {
        let Some(mask) = self.mapped.code.get(self.index) else { return 0 };
        let before = mask.fetch_or(chunks, Ordering::SeqCst);
        if before == 0 {
            self.mapped.log().watch(self.index, true);
        }
        before
    }

    /// Takes chunks out of the mask.
    pub(crate) fn remove_code(&self, chunks: u64) {
        if let Some(mask) = self.mapped.code.get(self.index)
            && mask.fetch_and(!chunks, Ordering::SeqCst) & !chunks == 0
        {
            self.mapped.log().watch(self.index, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_for_a_large_guest_take_no_memory() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        // For a guest of 64 GiB: 128 MiB.
        let zeros = untouched(1 << 24);
        assert!(resident() < before + 4096, "{before} pages, then {}", resident());
        zeros[1 << 23].store(u64::MAX, Ordering::Relaxed);
        assert_eq!((zeros.len(), zeros[(1 << 24) - 1].load(Ordering::Relaxed)), (1 << 24, 0));
    }

    #[test]
    fn chunks_cover_the_bytes_that_are_touched() {
        assert_eq!(chunk_mask(0, 1), 1);
        assert_eq!(chunk_mask(63, 2), 3);
        assert_eq!(chunk_mask(4095, 1), 1 << 63);
        assert_eq!(chunk_mask(0, 4096), u64::MAX);
        assert_eq!(chunk_mask(4095, 15), 1 << 63);
    }
}
