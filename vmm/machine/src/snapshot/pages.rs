//! Which pages a snapshot has to have.
//!
//! Every page has a number: its place in the memory file, where the regions follow each other without gaps.

use std::path::PathBuf;
use std::sync::Arc;

use harrier_engine::PageLog;
use harrier_engine::memory::PAGE_SIZE;
use harrier_snapshot::{Chain, Source};
use vm_memory::{GuestMemoryRegion as _, MmapRegion};

use super::TakeError;
use crate::machine::Parts;
use crate::memory::{Backing, GuestRam};
use crate::pagemap;

const PAGE: u64 = PAGE_SIZE as u64;

/// A set of pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct PageSet {
    /// One bit a page, lowest first.
    words: Vec<u64>,
}

impl PageSet {
    pub(crate) fn insert(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            let word = (page / 64) as usize;
            if word >= self.words.len() {
                self.words.resize(word + 1, 0);
            }
            if let Some(word) = self.words.get_mut(word) {
                *word |= 1 << (page % 64);
            }
        }
    }

    pub(crate) fn union(&mut self, other: &PageSet) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to |= from;
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Runs of pages, first and count, none longer than `longest`.
    pub(crate) fn runs(&self, longest: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let has =
            |page: u64| self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0);
        let end = self.words.len() as u64 * 64;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < end && !has(at) {
                // A word without pages is passed at once.
                let empty = self.words.get((at / 64) as usize) == Some(&0);
                at = if empty { (at / 64 + 1) * 64 } else { at + 1 };
            }
            let first = at;
            while at < end && at - first < longest && has(at) {
                at += 1;
            }
            (first < at).then_some((first, at - first))
        })
    }
}

/// What a machine knows of its written pages.
#[derive(Debug)]
pub(crate) struct Written {
    /// Written since the parent was taken, and out of the engine's log.
    pub(crate) since_parent: PageSet,
    /// Written since the machine was made of a snapshot, whose files do not have these pages.
    pub(crate) since_start: PageSet,
    /// The snapshot that the next difference is one to.
    pub(crate) parent: Option<PathBuf>,
}

impl Written {
    /// Of a machine that boots.
    pub(crate) fn since_boot() -> Self {
        Written { since_parent: PageSet::default(), since_start: PageSet::default(), parent: None }
    }

    /// Of a machine made of a snapshot, which the next difference may be one to.
    pub(crate) fn since_restore(parent: Option<PathBuf>) -> Self {
        Written { parent, ..Self::since_boot() }
    }

    /// Takes the engine's log; answers what is in it. No vCPU runs: so nothing is written between taking the log and
    /// the moment from which on it is kept again.
    pub(crate) fn collect(&mut self, parts: &Parts) -> Result<PageSet, TakeError> {
        parts.vm.sync_dirty_pages()?;
        let mut new = PageSet::default();
        let mut region_first = 0;
        for region in &parts.ram.regions {
            let region_pages = region.len() / PAGE;
            let mapping: &MmapRegion<PageLog> = region;
            let words = mapping.bitmap().take_dirty();
            // Regions begin at multiples of 64 pages: their sizes are, but for the last one's.
            debug_assert_eq!(region_first % 64, 0);
            let at = (region_first / 64) as usize;
            new.words.resize(at, 0);
            new.words.extend(words);
            region_first += region_pages;
        }
        self.since_parent.union(&new);
        if matches!(parts.ram.backing, Backing::Image(_)) {
            self.since_start.union(&new);
        }
        Ok(new)
    }
}

/// Pages that may be anything but zero.
pub(crate) fn present(ram: &GuestRam, written: &Written) -> Result<PageSet, TakeError> {
    let mut pages = PageSet::default();
    match &ram.backing {
        Backing::Own(laid) => {
            let seen = pagemap::visit(&ram.regions, |page, entry| {
                if entry.is_used() {
                    pages.insert(page, 1);
                }
            });
            if let Err(err) = seen {
                // Slower, and as right: pages of zeros are not kept.
                log::info!(
                    "every page of guest memory is looked at: /proc/self/pagemap cannot be read ({err})"
                );
                pages.insert(0, ram.pages());
            }
            for (first, count) in ram.page_numbers(laid.ranges()) {
                pages.insert(first, count);
            }
            Ok(pages)
        }
        Backing::Image(chain) => {
            let chain: &Arc<Chain> = chain;
            for run in chain.runs()? {
                if matches!(run.source, Source::File(_)) {
                    pages.insert(run.first, run.count);
                }
            }
            pages.union(&written.since_start);
            Ok(pages)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_those_that_were_inserted() {
        let mut pages = PageSet::default();
        for (first, count) in [(0, 1), (5, 3), (63, 2), (200, 300), (1000, 1)] {
            pages.insert(first, count);
        }
        let runs: Vec<_> = pages.runs(256).collect();
        assert_eq!(runs, [(0, 1), (5, 3), (63, 2), (200, 256), (456, 44), (1000, 1)]);
        assert_eq!(pages.len(), 307);
        let mut other = PageSet::default();
        other.insert(2000, 1);
        other.union(&pages);
        assert_eq!((other.len(), PageSet::default().runs(1).count()), (308, 0));
    }
}
