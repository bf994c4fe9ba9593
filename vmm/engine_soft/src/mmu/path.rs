//! The page-table entries on the way to an address, for whoever wants to see later whether they have changed.

use super::walk::{ACCESSED, ADDRESS, DIRTY, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use super::{Mmu, PAGE, Paging};

/// A page-table entry: where it is, and what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Entry {
    pub at: u64,
    pub value: u64,
}

/// Entries of 64-bit mode, from the root to the one that names the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Path {
    entries: [Entry; 4],
    count: usize,
}

impl Path {
    /// All but the last.
    pub(crate) fn upper(&self) -> &[Entry] {
        self.entries.get(..self.count.saturating_sub(1)).unwrap_or_default()
    }

    fn last(&self) -> Entry {
        self.entries.get(self.count.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// The entry that names the page.
    pub(crate) fn leaf(&self) -> u64 {
        self.last().value
    }

    /// The page has 2 MiB.
    pub(crate) fn is_large(&self) -> bool {
        self.count < 4
    }

    /// Whether both go through the same tables, whatever page they name.
    pub(crate) fn same_tables(&self, other: &Path) -> bool {
        let table = |path: &Path| if path.is_large() { path.last().at } else { path.last().at & !(PAGE - 1) };
        let places = |path: &Path| path.upper().iter().map(|entry| entry.at).collect::<Vec<_>>();
        self.count == other.count && table(self) == table(other) && places(self) == places(other)
    }

    /// Where the entry of page `index`, of the 512 of 2 MiB, is.
    pub(crate) fn leaf_at(&self, index: usize) -> u64 {
        let at = self.last().at;
        if self.is_large() { at } else { (at & !(PAGE - 1)) + 8 * (index as u64 & 511) }
    }

    /// Page `index`, of the 512 of 2 MiB, under a last entry of this value.
    pub(crate) fn gpa(&self, leaf: u64, index: usize) -> u64 {
        if self.is_large() {
            (leaf & ADDRESS & !((1 << 21) - 1)) + PAGE * (index as u64 & 511)
        } else {
            leaf & ADDRESS
        }
    }

    /// Guest physical address of the page of `va`.
    pub(crate) fn leads_to(&self, va: u64) -> u64 {
        let size = if self.is_large() { 1 << 21 } else { PAGE };
        self.leaf() & ADDRESS & !(size - 1) | va & (size - 1) & !(PAGE - 1)
    }

    /// Whether user mode may write, and the page counts as written.
    pub(crate) fn is_writable(&self) -> bool {
        self.upper().iter().all(|entry| entry.value & WRITABLE != 0)
            && self.leaf() & (WRITABLE | DIRTY) == WRITABLE | DIRTY
    }

    /// Whether user mode may read, or execute, a page whose last entry has this value.
    pub(crate) fn allows_user(&self, leaf: u64, execute: bool) -> bool {
        leaf & (PRESENT | USER) == PRESENT | USER && !(execute && leaf & NO_EXECUTE != 0)
    }
}

impl Mmu {
    /// The way to `va` after a walk that succeeded; `None` if it is no longer there, leads to a page of 1 GiB, or is not of
    /// 64-bit mode.
    pub(crate) fn path(&self, va: u64) -> Option<Path> {
        if self.config.paging != Paging::Long {
            return None;
        }
        let mut path = Path { entries: [Entry::default(); 4], count: 0 };
        let mut table = self.config.cr3 & ADDRESS;
        for (place, level) in path.entries.iter_mut().zip([4, 3, 2, 1]) {
            let at = table + (va >> (12 + 9 * (level - 1)) & 511) * 8;
            let value = self.entry(at);
            if value & (PRESENT | ACCESSED) != PRESENT | ACCESSED {
                return None;
            }
            *place = Entry { at, value };
            path.count += 1;
            match level {
                3 if value & LARGE != 0 => return None,
                2 if value & LARGE != 0 => break,
                _ => {}
            }
            table = value & ADDRESS;
        }
        Some(path)
    }

    /// An entry of 8 bytes as it is now; what is not memory reads as not present.
    pub(crate) fn entry(&self, at: u64) -> u64 {
        self.read_entry::<u64>(at)
    }
}
