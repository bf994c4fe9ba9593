//! What was lent of each address space, and whether that still holds.
//!
//! A translation may be used until the guest flushes it. So a page that was lent is remembered together with the page-table
//! entries that led to it, and after a flush these are compared with what is in memory: what did not change may stay,
//! however often the guest changes its address space meanwhile.

use std::collections::HashMap;

use harrier_engine::user_mode::UserPage;

use super::LentPages;
use crate::mmu::path::Path;
use crate::mmu::walk::{ACCESSED, DIRTY};
use crate::mmu::{Mmu, PAGE};

/// Address spaces that are remembered.
const MOST_SPACES: usize = 16;
/// Addresses that one last table translates.
pub(super) const GROUP_SHIFT: u32 = 21;
/// So many pages of a space that do not hold any longer are as good as all.
const TOO_MANY: usize = 48;

/// Pages of one stretch of 2 MiB.
struct Group {
    path: Path,
    /// The last entry as it was when the page was lent; 0: it was not.
    entries: Box<[u64; 512]>,
    /// Pages that may be written.
    writable: [u64; 8],
    /// Versions of pages that may be executed.
    code: HashMap<u16, u64>,
}

#[derive(Default)]
struct Space {
    groups: HashMap<u64, Group>,
    has_large: bool,
    /// When it was compared last: flushes of everything, and the age of [`LentPages`].
    compared: (u64, u64),
    used: u64,
}

/// All address spaces of a processor, by the root of their tables.
#[derive(Default)]
pub(super) struct Spaces {
    by_root: HashMap<u64, Space>,
    time: u64,
}

/// What has to be forgotten of a space.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stale {
    Nothing,
    Pages(Vec<u64>),
    Everything,
}

fn index(va: u64) -> usize {
    (va / PAGE) as usize & 511
}

/// Whether a page-table entry leads where it led before.
fn same(seen: u64, now: u64, written: bool) -> bool {
    let wanted = if written { ACCESSED | DIRTY } else { ACCESSED };
    (seen ^ now) & !(ACCESSED | DIRTY) == 0 && now & wanted == wanted
}

impl Group {
    fn is_writable(&self, index: usize) -> bool {
        self.writable.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// Whether the way to the last table is the same.
    fn is_reached(&self, mmu: &Mmu) -> bool {
        self.path.upper().iter().all(|entry| same(entry.value, mmu.entry(entry.at), false))
    }

    /// Whether this page may stay.
    fn holds(&self, index: usize, mmu: &Mmu, lent: &LentPages) -> bool {
        let seen = self.entries.get(index).copied().unwrap_or(0);
        let writable = self.is_writable(index);
        if !same(seen, mmu.entry(self.path.leaf_at(index)), writable) {
            return false;
        }
        let gpa = self.path.gpa(seen, index);
        let Some(page) = mmu.map.page(gpa) else { return false };
        let written_unseen = !writable || page.is_dirty() && page.code() == 0;
        let version = self.code.get(&(index as u16));
        written_unseen
            && version.is_none_or(|&version| lent.has_version(gpa, version) && page.code() == u64::MAX)
    }

    fn drop(&mut self, index: usize) {
        if let Some(entry) = self.entries.get_mut(index) {
            *entry = 0;
        }
        self.set_writable(index, false);
        self.code.remove(&(index as u16));
    }

    fn set_writable(&mut self, index: usize, on: bool) {
        if let Some(word) = self.writable.get_mut(index / 64) {
            *word = *word & !(1 << (index % 64)) | u64::from(on) << (index % 64);
        }
    }
}

impl Spaces {
    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.by_root.clear();
    }

    /// Forgets a space.
    pub(super) fn remove(&mut self, root: u64) {
        self.by_root.remove(&root);
    }

    /// Makes room for another space; answers the one that has to go.
    pub(super) fn make_room(&mut self, root: u64) -> Option<u64> {
        self.time += 1;
        let time = self.time;
        if let Some(space) = self.by_root.get_mut(&root) {
            space.used = time;
            return None;
        }
        let oldest = self.by_root.iter().min_by_key(|(_, space)| space.used).map(|(&root, _)| root);
        let goes = oldest.filter(|_| self.by_root.len() >= MOST_SPACES);
        if let Some(goes) = goes {
            self.by_root.remove(&goes);
        }
        self.by_root.insert(root, Space { used: time, ..Space::default() });
        goes
    }

    /// Compares what was lent of a space with the guest's page tables, as far as flushes make that necessary.
    pub(super) fn compare(&mut self, root: u64, mmu: &mut Mmu, lent: &LentPages) -> Stale {
        let now = (mmu.flushes.whole, lent.age());
        let pages = std::mem::take(&mut mmu.flushes.pages);
        let Some(space) = self.by_root.get_mut(&root) else { return Stale::Nothing };
        let all = space.compared != now || space.has_large && !pages.is_empty();
        space.compared = now;
        if !all && pages.is_empty() {
            return Stale::Nothing;
        }
        let mut stale = Vec::new();
        for (&number, group) in &mut space.groups {
            let reached = group.is_reached(mmu);
            let mut look = |group: &mut Group, index: usize| {
                if group.entries.get(index).is_some_and(|&seen| seen != 0)
                    && !(reached && group.holds(index, mmu, lent))
                {
                    group.drop(index);
                    stale.push(number << GROUP_SHIFT | index as u64 * PAGE);
                }
            };
            if all || !reached {
                (0..512).for_each(|index| look(group, index));
            } else {
                let here = pages.iter().filter(|&&va| va >> GROUP_SHIFT == number);
                here.for_each(|&va| look(group, index(va)));
            }
            if stale.len() > TOO_MANY {
                *space = Space { compared: now, used: space.used, ..Space::default() };
                return Stale::Everything;
            }
        }
        if all {
            space.groups.retain(|_, group| group.entries.iter().any(|&seen| seen != 0));
        }
        if stale.is_empty() { Stale::Nothing } else { Stale::Pages(stale) }
    }

    /// Remembers that a page was lent.
    pub(super) fn note(&mut self, root: u64, va: u64, path: Path, page: &UserPage) {
        let Some(space) = self.by_root.get_mut(&root) else { return };
        space.has_large |= path.is_large();
        let leaf = path.leaf();
        let group = space.groups.entry(va >> GROUP_SHIFT).or_insert_with(|| Group {
            path,
            entries: Box::new([0; 512]),
            writable: [0; 8],
            code: HashMap::new(),
        });
        let index = index(va);
        group.drop(index);
        let mut same = group.path.same_tables(&path);
        if !same && group.entries.iter().all(|&seen| seen == 0) {
            (group.path, same) = (path, true);
        }
        if let Some(entry) = group.entries.get_mut(index) {
            // Where the guest has changed its tables and not flushed yet, the page is found stale when it does.
            *entry = if same { leaf } else { u64::MAX };
        }
        group.set_writable(index, page.writable);
        if let Some(code) = page.code {
            group.code.insert(index as u16, code.version);
        }
    }

    /// Whether the page at this address was lent.
    pub(super) fn has(&self, root: u64, va: u64) -> bool {
        let group = self.by_root.get(&root).and_then(|space| space.groups.get(&(va >> GROUP_SHIFT)));
        group.and_then(|group| group.entries.get(index(va))).is_some_and(|&seen| seen != 0)
    }
}

#[cfg(test)]
mod tests {
    use harrier_engine::user_mode::{UserAccess, UserMemory};
    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;
    use crate::cpu::{Cpu, cr0, cr4, efer};
    use crate::lend::lens::Lens;
    use crate::native::mem::Word;
    use crate::testing::{flat_vcpu, memory};
    use crate::vcpu::SoftVcpu;

    const BASE: u64 = 0x10_0000;
    const TABLE: u64 = BASE + 0x3000;
    const VA: u64 = 0x40_0000;
    const PAGES: u64 = 8;
    /// Present, writable, user, accessed, dirty.
    const BITS: u64 = 0x67;

    struct Guest {
        vcpu: SoftVcpu,
        spaces: Spaces,
    }

    impl Guest {
        /// [`PAGES`] pages at [`VA`], which lead to those from BASE + 0x10000 on.
        fn new() -> Guest {
            let region = memory(BASE, 1 << 20);
            let write = |at: u64, value: u64| {
                region.write_obj(value, MemoryRegionAddress(at - BASE)).unwrap();
            };
            write(BASE, BASE + 0x1000 | BITS);
            write(BASE + 0x1000, BASE + 0x2000 | BITS);
            write(BASE + 0x2000 + 8 * 2, TABLE | BITS);
            for page in 0..PAGES {
                write(TABLE + 8 * page, BASE + 0x1_0000 + page * PAGE | BITS);
            }
            let mut vcpu = flat_vcpu(region);
            vcpu.cpu().mmu.set_paging(cr0::PG, BASE, cr4::PAE, efer::LMA | efer::NXE);
            let mut spaces = Spaces::default();
            spaces.make_room(BASE);
            let mut guest = Guest { vcpu, spaces };
            guest.compare();
            guest
        }

        fn cpu(&mut self) -> &mut Cpu {
            self.vcpu.cpu()
        }

        fn lens<T>(&mut self, ask: impl FnOnce(&mut Lens) -> T) -> T {
            ask(&mut Lens { cpu: self.vcpu.cpu(), spaces: &mut self.spaces, root: BASE, faults: 0 })
        }

        fn translate(&mut self, page: u64, access: UserAccess) -> Option<UserPage> {
            self.lens(|lens| lens.translate(VA + page * PAGE, access))
        }

        fn compare(&mut self) -> Stale {
            let cpu = self.vcpu.cpu();
            self.spaces.compare(BASE, &mut cpu.mmu, &cpu.lent)
        }

        fn set_entry(&mut self, page: u64, entry: u64) {
            let map = std::sync::Arc::clone(&self.cpu().mmu.map);
            u64::store(map.page(TABLE).unwrap().ptr(8 * page), entry);
        }

        fn take_log(&mut self) {
            for mapped in self.cpu().mmu.map.regions() {
                mapped.clear_log();
            }
        }
    }

    fn pages(numbers: &[u64]) -> Stale {
        Stale::Pages(numbers.iter().map(|page| VA + page * PAGE).collect())
    }

    #[test]
    fn a_fault_is_one_however_many_pages_come_with_it() {
        let (near, faults) = Guest::new().lens(|lens| {
            lens.translate(VA, UserAccess::Read).unwrap();
            (lens.nearby(VA, UserAccess::Read).len(), lens.faults)
        });
        assert_eq!((near as u64, faults), (PAGES - 1, 1));
    }

    #[test]
    fn only_pages_whose_entries_changed_are_stale_and_only_after_a_flush() {
        let mut guest = Guest::new();
        assert!((0..PAGES).all(|page| guest.translate(page, UserAccess::Read).is_some()));
        guest.set_entry(2, BASE + 0x2_0000 | BITS);
        guest.set_entry(3, 0);
        assert_eq!(guest.compare(), Stale::Nothing);
        guest.cpu().mmu.flush_page(VA + 3 * PAGE);
        assert_eq!(guest.compare(), pages(&[3]));
        guest.cpu().mmu.switch_space(BASE);
        assert_eq!(guest.compare(), pages(&[2]));
        guest.cpu().mmu.flush();
        assert_eq!(guest.compare(), Stale::Nothing);
    }

    #[test]
    fn a_dirty_bit_that_the_guest_clears_takes_the_right_to_write() {
        let mut guest = Guest::new();
        assert!(guest.translate(0, UserAccess::Write).unwrap().writable);
        assert!(!guest.translate(1, UserAccess::Read).unwrap().writable, "not in the log yet");
        for page in [0, 1] {
            guest.set_entry(page, BASE + 0x1_0000 + page * PAGE | BITS & !DIRTY);
        }
        guest.cpu().mmu.flush();
        assert_eq!(guest.compare(), pages(&[0]));
    }

    #[test]
    fn what_user_mode_writes_is_in_the_page_log_before_and_after_it_was_taken() {
        let mut guest = Guest::new();
        guest.take_log();
        guest.translate(0, UserAccess::Write).unwrap();
        guest.translate(1, UserAccess::Read).unwrap();
        let is_dirty = |guest: &mut Guest, page: u64| {
            guest.cpu().mmu.map.page(BASE + 0x1_0000 + page * PAGE).unwrap().is_dirty()
        };
        assert!(is_dirty(&mut guest, 0) && !is_dirty(&mut guest, 1));
        // The end of a run, after which the log may be taken.
        guest.cpu().lent.forget();
        assert_eq!(guest.compare(), Stale::Nothing, "the log was not taken");
        guest.take_log();
        guest.cpu().lent.forget();
        assert_eq!(guest.compare(), pages(&[0]));
        guest.translate(0, UserAccess::Write).unwrap();
        assert!(is_dirty(&mut guest, 0));
    }

    #[test]
    fn a_page_is_either_written_or_executed_and_a_changed_one_is_another_version() {
        let mut guest = Guest::new();
        guest.translate(0, UserAccess::Write).unwrap();
        assert_eq!(guest.translate(0, UserAccess::Fetch), None, "it could be written until now");
        assert_eq!(guest.compare(), pages(&[0]));
        let code = guest.translate(0, UserAccess::Fetch).unwrap().code.unwrap();
        assert_eq!(guest.translate(0, UserAccess::Write), None, "software has to see that");
        assert_eq!(guest.translate(0, UserAccess::Fetch).unwrap().code, Some(code));
        guest.cpu().lent.written(BASE + 0x1_0000);
        assert_eq!(guest.compare(), pages(&[0]));
        assert_ne!(guest.translate(0, UserAccess::Fetch).unwrap().code, Some(code));
    }

    #[test]
    fn neighbours_are_given_once_and_only_those_that_are_there() {
        let mut guest = Guest::new();
        guest.set_entry(5, 0);
        guest.set_entry(6, BASE + 0x1_6000 | BITS & !4);
        guest.translate(1, UserAccess::Read).unwrap();
        guest.translate(0, UserAccess::Read).unwrap();
        let near = guest.lens(|lens| lens.nearby(VA, UserAccess::Read));
        let numbers: Vec<u64> = near.iter().map(|(va, _)| (va - VA) / PAGE).collect();
        assert_eq!(numbers, [2, 3, 4, 7]);
        assert_eq!(guest.lens(|lens| lens.nearby(VA, UserAccess::Read)).len(), 0);
    }

    #[test]
    fn a_table_that_was_replaced_makes_all_its_pages_stale() {
        let mut guest = Guest::new();
        guest.translate(0, UserAccess::Read).unwrap();
        guest.translate(4, UserAccess::Read).unwrap();
        let map = std::sync::Arc::clone(&guest.cpu().mmu.map);
        u64::store(map.page(BASE + 0x2000).unwrap().ptr(16), BASE + 0x4000 | BITS);
        guest.cpu().mmu.flush_page(0x1234_5000);
        let Stale::Pages(mut stale) = guest.compare() else { panic!("nothing is stale") };
        stale.sort_unstable();
        assert_eq!(stale, [VA, VA + 4 * PAGE]);
    }

    #[test]
    fn so_many_spaces_and_then_the_oldest_goes() {
        let mut spaces = Spaces::default();
        for root in 1..=MOST_SPACES as u64 {
            assert_eq!(spaces.make_room(root), None);
        }
        assert_eq!(spaces.make_room(1), None);
        assert_eq!(spaces.make_room(100), Some(2));
        assert_eq!(spaces.make_room(2), Some(3));
    }
}
