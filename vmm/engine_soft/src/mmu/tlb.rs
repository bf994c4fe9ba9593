//! Translation look-aside buffers: direct mapped, one data and one code buffer per kind of rights.
//!
//! An entry's tag is the page's address with a generation number in the low bits, so that forgetting all
//! translations is one addition. A hit gives the host address by one addition to the guest's.
#![expect(unsafe_code, reason = "makes host pointers from translations that the walk has checked")]

use super::{PAGE, Rights};
use crate::native::mem::{HostPtr, Word};

const DATA_BITS: u32 = 10;
const DATA_ENTRIES: usize = 1 << DATA_BITS;
/// Length of the list of entries that may be written, twice their number, so that sorting out is rare.
const MAX_WRITABLE: usize = 2 * 4 * DATA_ENTRIES;
const CODE_BITS: u32 = 8;
const CODE_ENTRIES: usize = 1 << CODE_BITS;
/// Generations that fit into a tag; 0 marks an empty entry.
const GENERATIONS: u64 = PAGE - 1;

#[derive(Clone, Copy, Default)]
struct DataEntry {
    /// Page address and generation where reads may go straight to memory.
    read: u64,
    /// The same for writes: the page is writable, dirty in page table and log, and holds no decoded code.
    write: u64,
    /// Host address minus guest address.
    addend: u64,
    _pad: u64,
}

#[derive(Clone, Copy, Default)]
struct CodeEntry {
    tag: u64,
    /// Guest physical address of the page.
    page: u64,
}

pub(crate) struct Tlb {
    data: Box<[DataEntry; 4 * DATA_ENTRIES]>,
    code: Box<[CodeEntry; 4 * CODE_ENTRIES]>,
    generation: u64,
    /// Every data entry of this generation with the right to write is named here; others may be, too.
    writable: Vec<u16>,
    /// Where large pages' entries may lie, by 2 MiB.
    large: AddressFilter,
}

/// A set of addresses that may hold more than was put in, never less: a bit for each of 4,096 hashes.
#[derive(Clone)]
pub(crate) struct AddressFilter([u64; 64]);

impl AddressFilter {
    pub(crate) fn new() -> AddressFilter {
        AddressFilter([0; 64])
    }

    /// Neighbours get bits of their own.
    #[inline(always)]
    fn bit(number: u64) -> (usize, u64) {
        let hash = (number ^ number >> 12 ^ number >> 24) & 0xfff;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, number: u64) {
        let (word, bit) = Self::bit(number);
        self.0[word] |= bit;
    }

    pub(crate) fn may_contain(&self, number: u64) -> bool {
        let (word, bit) = Self::bit(number);
        self.0[word] & bit != 0
    }

    pub(crate) fn clear(&mut self) {
        self.0 = [0; 64];
    }
}

/// Large pages are noted in pieces of this size.
const LARGE_SHIFT: u32 = 21;

impl Tlb {
    pub(crate) fn new() -> Tlb {
        Tlb {
            data: Box::new([DataEntry::default(); 4 * DATA_ENTRIES]),
            code: Box::new([CodeEntry::default(); 4 * CODE_ENTRIES]),
            generation: 1,
            writable: Vec::with_capacity(MAX_WRITABLE),
            large: AddressFilter::new(),
        }
    }

    #[inline(always)]
    fn data_index(rights: Rights, va: u64) -> usize {
        ((rights as usize) << DATA_BITS | (va >> 12) as usize & (DATA_ENTRIES - 1)) & (4 * DATA_ENTRIES - 1)
    }

    #[inline(always)]
    fn code_index(rights: Rights, va: u64) -> usize {
        ((rights as usize) << CODE_BITS | (va >> 12) as usize & (CODE_ENTRIES - 1)) & (4 * CODE_ENTRIES - 1)
    }

    /// Where a read of `W` at `va` may go. An access that crosses into the next page never hits, because that
    /// page's tag lives in the next entry.
    #[inline(always)]
    pub(crate) fn read<W: Word>(&self, rights: Rights, va: u64) -> Option<HostPtr> {
        self.read_len(rights, va, W::SIZE as u64)
    }

    /// The same for `len` bytes, 1 to 4096.
    #[inline(always)]
    pub(crate) fn read_len(&self, rights: Rights, va: u64, len: u64) -> Option<HostPtr> {
        let entry = &self.data[Self::data_index(rights, va)];
        let tag = (va.wrapping_add(len - 1) & !(PAGE - 1)) | self.generation;
        // SAFETY: a matching tag means that the walk mapped the whole page to host memory.
        (entry.read == tag).then(|| unsafe { HostPtr::new(va.wrapping_add(entry.addend)) })
    }

    /// Where a write of `W` at `va` may go.
    #[inline(always)]
    pub(crate) fn write<W: Word>(&self, rights: Rights, va: u64) -> Option<HostPtr> {
        self.write_len(rights, va, W::SIZE as u64)
    }

    /// The same for `len` bytes, 1 to 4096.
    #[inline(always)]
    pub(crate) fn write_len(&self, rights: Rights, va: u64, len: u64) -> Option<HostPtr> {
        let entry = &self.data[Self::data_index(rights, va)];
        let tag = (va.wrapping_add(len - 1) & !(PAGE - 1)) | self.generation;
        // SAFETY: as for read.
        (entry.write == tag).then(|| unsafe { HostPtr::new(va.wrapping_add(entry.addend)) })
    }

    /// Guest physical address of code at `va`.
    #[inline(always)]
    pub(crate) fn fetch(&self, rights: Rights, va: u64) -> Option<u64> {
        let entry = &self.code[Self::code_index(rights, va)];
        (entry.tag == (va & !(PAGE - 1)) | self.generation).then_some(entry.page | (va & (PAGE - 1)))
    }

    /// Enters a data translation. `host_page` is the host address of the page.
    pub(crate) fn fill_data(&mut self, rights: Rights, va: u64, host_page: u64, writable: bool) {
        let page = va & !(PAGE - 1);
        let tag = page | self.generation;
        let index = Self::data_index(rights, va);
        self.data[index] = DataEntry {
            read: tag,
            write: if writable { tag } else { 0 },
            addend: host_page.wrapping_sub(page),
            _pad: 0,
        };
        if writable {
            self.note_writable(index);
        }
    }

    fn note_writable(&mut self, index: usize) {
        if self.writable.len() == MAX_WRITABLE {
            let (data, generation) = (&self.data, self.generation);
            self.writable.retain(|&index| data[usize::from(index)].write & (PAGE - 1) == generation);
            self.writable.sort_unstable();
            self.writable.dedup();
        }
        self.writable.push(index as u16);
    }

    /// Enters a code translation.
    pub(crate) fn fill_code(&mut self, rights: Rights, va: u64, gpa: u64) {
        self.code[Self::code_index(rights, va)] =
            CodeEntry { tag: (va & !(PAGE - 1)) | self.generation, page: gpa & !(PAGE - 1) };
    }

    /// Notes that entries inside this large page may exist.
    pub(crate) fn note_large(&mut self, va: u64, size: u64) {
        for piece in (va & !(size - 1)) >> LARGE_SHIFT..=(va | (size - 1)) >> LARGE_SHIFT {
            self.large.add(piece);
        }
    }

    pub(crate) fn flush(&mut self) {
        self.large.clear();
        self.writable.clear();
        if self.generation == GENERATIONS {
            self.data.fill(DataEntry::default());
            self.code.fill(CodeEntry::default());
            self.generation = 0;
        }
        self.generation += 1;
    }

    /// Forgets the page at `va`; true when everything was forgotten, because the page may be a large one.
    pub(crate) fn flush_page(&mut self, va: u64) -> bool {
        if self.large.may_contain(va >> LARGE_SHIFT) {
            self.flush();
            return true;
        }
        for rights in [Rights::User, Rights::Supervisor, Rights::SupervisorSmap] {
            self.data[Self::data_index(rights, va)] = DataEntry::default();
            self.code[Self::code_index(rights, va)] = CodeEntry::default();
        }
        false
    }

    /// Takes away the right to write straight to the page at this host address; true if there was one.
    pub(crate) fn protect_host_page(&mut self, host_page: u64) -> bool {
        let mut found = false;
        for &index in &self.writable {
            let entry = &mut self.data[usize::from(index)];
            if entry.write & (PAGE - 1) == self.generation
                && (entry.write & !(PAGE - 1)).wrapping_add(entry.addend) == host_page
            {
                entry.write = 0;
                found = true;
            }
        }
        found
    }

    /// Takes away the right to write straight to any page, and tells which ones had it.
    pub(crate) fn forget_writable(&mut self, mut had: impl FnMut(u64)) {
        for index in self.writable.drain(..) {
            let entry = &mut self.data[usize::from(index)];
            if entry.write & (PAGE - 1) == self.generation {
                had((entry.write & !(PAGE - 1)).wrapping_add(entry.addend));
                entry.write = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hit_needs_the_same_rights_page_and_generation() {
        let mut tlb = Tlb::new();
        tlb.fill_data(Rights::User, 0x5123, 0x7f00_0000_0000, false);
        let hit = tlb.read::<u32>(Rights::User, 0x5ffc).map(HostPtr::addr);
        assert_eq!(hit, Some(0x7f00_0000_0ffc));
        assert_eq!(tlb.write::<u32>(Rights::User, 0x5ffc), None);
        assert_eq!(tlb.read::<u32>(Rights::Supervisor, 0x5ffc), None);
        assert_eq!(tlb.read::<u32>(Rights::User, 0x5ffd), None, "crosses into the next page");
        assert_eq!(tlb.read::<u8>(Rights::User, 0x5000 + PAGE * DATA_ENTRIES as u64), None);
        tlb.flush();
        assert_eq!(tlb.read::<u8>(Rights::User, 0x5000), None);
    }

    #[test]
    fn the_right_to_write_is_taken_from_every_entry_that_has_it() {
        let mut tlb = Tlb::new();
        let host = |page: u64| 0x7f00_0000_0000 + page * PAGE;
        // Far more fillings than entries: the list is sorted out several times.
        for round in 0..40u64 {
            for page in 0..DATA_ENTRIES as u64 {
                tlb.fill_data(Rights::User, page * PAGE, host(page), (page + round) % 3 != 0);
            }
        }
        let writable = |tlb: &Tlb, page: u64| tlb.write::<u8>(Rights::User, page * PAGE).is_some();
        assert!(writable(&tlb, 1) && tlb.protect_host_page(host(1)) && !writable(&tlb, 1));
        assert!(!tlb.protect_host_page(host(1)), "it has no right any more");
        let expected: Vec<u64> =
            (0..DATA_ENTRIES as u64).filter(|&page| writable(&tlb, page)).map(host).collect();
        let mut had = Vec::new();
        tlb.forget_writable(|page| had.push(page));
        had.sort_unstable();
        assert_eq!(had, expected);
        assert!((0..DATA_ENTRIES as u64).all(|page| !writable(&tlb, page)));
    }

    #[test]
    fn generations_wrap_without_bringing_entries_back() {
        let mut tlb = Tlb::new();
        tlb.fill_code(Rights::User, 0x5000, 0x9000);
        for _ in 0..2 * GENERATIONS {
            tlb.flush();
            assert_eq!(tlb.fetch(Rights::User, 0x5000), None);
        }
    }

    #[test]
    fn flushing_a_page_inside_a_large_one_flushes_all_of_it() {
        let mut tlb = Tlb::new();
        tlb.note_large(0x20_0000, 0x20_0000);
        tlb.fill_data(Rights::Supervisor, 0x20_1000, 0x7000, true);
        assert!(!tlb.flush_page(0x40_0000), "not in it");
        assert!(tlb.read::<u8>(Rights::Supervisor, 0x20_1000).is_some());
        assert!(tlb.flush_page(0x3f_f000));
        assert_eq!(tlb.read::<u8>(Rights::Supervisor, 0x20_1000), None);
    }

    #[test]
    fn a_filter_forgets_nothing_that_was_put_in() {
        let mut filter = AddressFilter::new();
        let numbers: Vec<u64> = (0..300).map(|n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 12).collect();
        assert!(numbers.iter().all(|&n| !filter.may_contain(n)));
        numbers.iter().for_each(|&n| filter.add(n));
        assert!(numbers.iter().all(|&n| filter.may_contain(n)));
        filter.clear();
        assert!(numbers.iter().all(|&n| !filter.may_contain(n)));
    }
}
