//! Guest memory as every crate sees it: vm-memory regions whose bitmap is a [`PageLog`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

/// All of a machine's memory.
pub type GuestMemory = GuestMemoryMmap<PageLog>;
/// One contiguous piece of it.
pub type GuestRegion = GuestRegionMmap<PageLog>;

/// Size of the pages that are logged, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// Hears of writes to pages that it watches.
pub trait WriteWatcher: Send + Sync {
    /// `len` bytes at `offset` from the region's start were written, in at least one watched page.
    fn written(&self, offset: usize, len: usize);
}

/// Which pages of a region were written since the log was last taken, and which ones somebody watches.
///
/// Writes through vm-memory (devices, boot loaders) are logged by themselves; an engine calls
/// [`Bitmap::mark_dirty`] for what its vCPUs write. The software engine watches pages that hold translated
/// code, so that a device's write to them is noticed.
#[derive(Clone, Default)]
pub struct PageLog {
    pages: Arc<Pages>,
}

#[derive(Default)]
struct Pages {
    dirty: Box<[AtomicU64]>,
    watched: Box<[AtomicU64]>,
    watcher: OnceLock<Arc<dyn WriteWatcher>>,
}

impl std::fmt::Debug for PageLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageLog").field("words", &self.pages.dirty.len()).finish_non_exhaustive()
    }
}

impl PageLog {
    /// Sets who hears of writes to watched pages. Only the first call counts; later ones answer false.
    pub fn set_watcher(&self, watcher: Arc<dyn WriteWatcher>) -> bool {
        self.pages.watcher.set(watcher).is_ok()
    }

    /// Starts or stops watching the page with this index.
    pub fn watch(&self, page: usize, on: bool) {
        if let Some(word) = self.pages.watched.get(page / 64) {
            let bit = 1 << (page % 64);
            if on {
                word.fetch_or(bit, Ordering::SeqCst);
            } else {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    /// Marks the page with this index without telling the watcher: for writes by the watcher itself.
    pub fn mark_dirty_unwatched(&self, page: usize) {
        if let Some(word) = self.pages.dirty.get(page / 64) {
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Takes the log: one bit per page, lowest first, and clears it.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.pages.dirty.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect()
    }

    /// Number of pages marked as written.
    pub fn dirty_pages(&self) -> usize {
        self.pages.dirty.iter().map(|word| word.load(Ordering::Acquire).count_ones() as usize).sum()
    }
}

impl Bitmap for PageLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_SIZE;
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        let mut seen = false;
        for page in first..=last {
            let (Some(dirty), Some(watched)) =
                (self.pages.dirty.get(page / 64), self.pages.watched.get(page / 64))
            else {
                break;
            };
            let bit = 1 << (page % 64);
            if dirty.load(Ordering::Relaxed) & bit == 0 {
                dirty.fetch_or(bit, Ordering::AcqRel);
            }
            seen |= watched.load(Ordering::SeqCst) & bit != 0;
        }
        if seen && let Some(watcher) = self.pages.watcher.get() {
            watcher.written(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        self.pages
            .dirty
            .get(page / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, PageLog> {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for PageLog {
    type S = RefSlice<'a, PageLog>;
}

impl NewBitmap for PageLog {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(PAGE_SIZE).div_ceil(64);
        let zeroed = || (0..words).map(|_| AtomicU64::new(0)).collect();
        PageLog { pages: Arc::new(Pages { dirty: zeroed(), watched: zeroed(), watcher: OnceLock::new() }) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Heard(Mutex<Vec<(usize, usize)>>);

    impl WriteWatcher for Heard {
        fn written(&self, offset: usize, len: usize) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn a_write_marks_every_page_that_it_touches_and_taking_clears() {
        let log = PageLog::with_len(256 * PAGE_SIZE);
        log.mark_dirty(PAGE_SIZE * 63 + 4095, 2);
        assert_eq!(log.take_dirty(), [1 << 63, 1, 0, 0]);
        assert_eq!(log.dirty_pages(), 0);
    }

    #[test]
    fn a_write_past_the_end_is_ignored() {
        let log = PageLog::with_len(PAGE_SIZE);
        log.mark_dirty(usize::MAX - 1, 2);
        log.mark_dirty(PAGE_SIZE * 64, 1);
        assert_eq!(log.dirty_pages(), 0);
    }

    #[test]
    fn only_writes_to_watched_pages_are_reported() {
        let log = PageLog::with_len(16 * PAGE_SIZE);
        let heard = Arc::new(Heard(Mutex::new(Vec::new())));
        assert!(log.set_watcher(heard.clone()));
        log.watch(3, true);
        log.slice_at(PAGE_SIZE).mark_dirty(PAGE_SIZE, 8);
        log.slice_at(PAGE_SIZE).mark_dirty(2 * PAGE_SIZE + 16, 8);
        log.watch(3, false);
        log.mark_dirty(3 * PAGE_SIZE, 1);
        assert_eq!(*heard.0.lock().unwrap(), [(3 * PAGE_SIZE + 16, 8)]);
    }
}
