//! Page tables for user code, and the few supervisor pages that catch everything else.
//!
//! All of it lies in a region of its own, far above guest memory. The upper half of each address space holds a
//! descriptor table, an interrupt table whose gates lead to one HLT each, and a stack; the lower half is filled
//! page by page. KVM keeps shadows of tables and does not hear of what we write to them: an entry that was not present
//! may be written at any time, one that was must be cleared by the guest itself, with the code at [`CLEAR`]. To forget a
//! whole space is to begin a new root for it. A page that was a table can be used again only after the region was taken
//! away from KVM, which happens when it is full.

use std::collections::HashMap;
use std::sync::Arc;

use super::code::TRAP;
use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::{EngineError, GuestRegion, PageLog};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

/// Where the first processor's region is; guest memory ends below.
const FIRST_GPA: u64 = 1 << 40;
/// Size of a region: two thousand tables, taken from the host when they are used.
const BYTES: usize = 8 << 20;
const LARGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = PAGE_SIZE as u64;
const PAGES: u64 = BYTES as u64 / PAGE;

/// Linear address of the region's first pages, in the upper half.
pub(super) const BASE: u64 = 0xffff_ff00_0000_0000;
/// Entry of the root that leads there.
const BASE_ROOT_INDEX: u64 = 510;
/// Pages of the region and what they hold.
mod page {
    pub(super) const DESCRIPTORS: u64 = 0;
    pub(super) const INTERRUPTS: u64 = 1;
    pub(super) const STUBS: u64 = 2;
    pub(super) const STACK: u64 = 3;
    pub(super) const LEVEL_3: u64 = 4;
    pub(super) const LEVEL_2: u64 = 5;
    pub(super) const LEVEL_1: u64 = 6;
    pub(super) const LIST: u64 = 7;
    pub(super) const FIRST_FREE: u64 = 8;
}

/// Global descriptor table.
pub(super) const GDT: u64 = BASE + page::DESCRIPTORS * PAGE;
/// Last byte of the table.
pub(super) const GDT_LIMIT: u16 = 0x3f;
/// Selector of the supervisor's code, and of its data behind it.
pub(super) const CODE_SELECTOR: u16 = 0x10;
/// Selector of the task state.
pub(super) const TASK_SELECTOR: u16 = 0x30;
/// Task state segment.
pub(super) const TASK: u64 = GDT + TASK_OFFSET;
const TASK_OFFSET: u64 = 0x100;
/// Last byte of the task state: no I/O permission map.
pub(super) const TASK_LIMIT: u32 = 0x67;
/// Interrupt table.
pub(super) const IDT: u64 = BASE + page::INTERRUPTS * PAGE;
/// Where the stub of vector 0 is; the others follow at [`STUB_BYTES`].
pub(super) const STUBS: u64 = BASE + page::STUBS * PAGE;
/// From one stub to the next.
pub(super) const STUB_BYTES: u64 = 8;
/// The stub of SYSCALL, after those of 256 vectors.
pub(super) const SYSCALL_STUB: u64 = 256;
/// Code that clears the entries whose addresses are in [`LIST`], RCX of them, and stops at the HLT behind itself.
pub(super) const CLEAR: u64 = STUBS + CLEAR_OFFSET;
const CLEAR_OFFSET: u64 = (SYSCALL_STUB + 1) * STUB_BYTES;
/// lodsq; mov qword [rax], 0; dec ecx; jnz to the begin; hlt
const CLEAR_CODE: [u8; 14] = [0x48, 0xad, 0x48, 0xc7, 0x00, 0, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf3, 0xf4];
/// Where that HLT is.
pub(super) const CLEARED: u64 = CLEAR + CLEAR_CODE.len() as u64 - 1;
/// Addresses of entries, for [`CLEAR`].
pub(super) const LIST: u64 = BASE + page::LIST * PAGE;
/// So many fit.
pub(super) const LIST_LENGTH: usize = PAGE_SIZE / 8;
/// Where the guest itself sees the whole region.
const WINDOW: u64 = BASE + LARGE_PAGE;
/// End of the stack that every gate switches to.
pub(super) const STACK_TOP: u64 = BASE + (page::STACK + 1) * PAGE;

/// Bits of page table entries; accessed and dirty are set in advance.
mod bit {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const LARGE: u64 = 1 << 7;
    pub(super) const USED: u64 = 1 << 5 | 1 << 6;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// The tables of one processor.
#[derive(Debug)]
pub(super) struct Tables {
    region: Arc<GuestRegion>,
    gpa: u64,
    /// Page of each space's root, by its number in the region.
    roots: HashMap<u64, u64>,
    /// Copies of pages, by guest physical address.
    copies: HashMap<u64, Copy>,
    next_free: u64,
}

/// The region is full: it must be taken away from KVM and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

/// A copy of a page.
#[derive(Debug)]
struct Copy {
    version: u64,
    traps: Vec<usize>,
    /// Its number in the region.
    page: u64,
}

/// How a page is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) gpa: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
}

impl Tables {
    pub(super) fn new(index: u32) -> Result<Tables, EngineError> {
        let gpa = FIRST_GPA + u64::from(index) * BYTES as u64;
        let refused = |reason: String| EngineError::Memory { gpa, size_bytes: BYTES as u64, reason };
        let mapping = MmapRegionBuilder::new_with_bitmap(BYTES, PageLog::with_len(0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|err| refused(err.to_string()))?;
        let region = GuestRegion::new(mapping, GuestAddress(gpa))
            .ok_or_else(|| refused("the addresses overflow".to_owned()))?;
        let mut tables = Tables {
            region: Arc::new(region),
            gpa,
            roots: HashMap::new(),
            copies: HashMap::new(),
            next_free: page::FIRST_FREE,
        };
        tables.write_supervisor_pages();
        Ok(tables)
    }

    /// The region that KVM must have mapped.
    pub(super) fn region(&self) -> Arc<GuestRegion> {
        Arc::clone(&self.region)
    }

    /// Guest physical address of the region.
    pub(super) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Value of CR3 for a space; begins it if need be.
    pub(super) fn root(&mut self, space: u64) -> Result<u64, Full> {
        let root = match self.roots.get(&space) {
            Some(&root) => root,
            None => {
                let root = self.allocate()?;
                let upper = self.gpa + page::LEVEL_3 * PAGE | bit::PRESENT | bit::WRITABLE | bit::USED;
                self.write(root, BASE_ROOT_INDEX * 8, upper);
                self.roots.insert(space, root);
                root
            }
        };
        Ok(self.gpa + root * PAGE)
    }

    fn write(&self, page: u64, offset: u64, value: u64) {
        // Pages are below PAGES and offsets below PAGE, so the write is inside the region.
        let _ = self.region.write_obj(value, MemoryRegionAddress(page * PAGE + offset));
    }

    fn read(&self, page: u64, offset: u64) -> u64 {
        self.region.read_obj(MemoryRegionAddress(page * PAGE + offset)).unwrap_or(0)
    }

    /// The word at a linear address of the stack page; zero elsewhere.
    pub(super) fn stack_word(&self, va: u64) -> u64 {
        let offset = va.wrapping_sub(STACK_TOP - PAGE);
        if offset > PAGE - 8 { 0 } else { self.read(page::STACK, offset) }
    }

    fn write_supervisor_pages(&mut self) {
        // 64-bit code and data of level 0 (Intel SDM volume 3, 3.4.5), then the task state.
        let code = u64::from(CODE_SELECTOR);
        self.write(page::DESCRIPTORS, code, 0x00af_9b00_0000_ffff);
        self.write(page::DESCRIPTORS, code + 8, 0x00cf_9300_0000_ffff);
        let base = TASK;
        let low = u64::from(TASK_LIMIT) | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
        self.write(page::DESCRIPTORS, TASK_SELECTOR.into(), low);
        self.write(page::DESCRIPTORS, u64::from(TASK_SELECTOR) + 8, base >> 32);
        // RSP0 and the first interrupt stack; both are at addresses that are not multiples of 8.
        for offset in [4, 0x24] {
            self.write(page::DESCRIPTORS, TASK_OFFSET + offset, STACK_TOP);
        }
        // The I/O permission map begins beyond the limit: no port is permitted.
        self.write(page::DESCRIPTORS, TASK_OFFSET + 0x60, (u64::from(TASK_LIMIT) + 1) << 48);
        for vector in 0..256 {
            // Interrupt gate of level 0: INT n of user mode faults instead of passing.
            let target = STUBS + vector * STUB_BYTES;
            let gate = target & 0xffff | code << 16 | 1 << 32 | 0x8e << 40 | (target >> 16 & 0xffff) << 48;
            self.write(page::INTERRUPTS, vector * 16, gate);
            self.write(page::INTERRUPTS, vector * 16 + 8, target >> 32);
        }
        for stub in 0..=SYSCALL_STUB {
            // hlt; jmp back to it
            self.write(page::STUBS, stub * STUB_BYTES, 0x00fd_ebf4);
        }
        let table = bit::PRESENT | bit::WRITABLE | bit::USED;
        self.write(page::LEVEL_3, 0, self.gpa + page::LEVEL_2 * PAGE | table);
        self.write(page::LEVEL_2, 0, self.gpa + page::LEVEL_1 * PAGE | table);
        for page in [page::DESCRIPTORS, page::INTERRUPTS, page::STUBS, page::STACK, page::LIST] {
            self.write(page::LEVEL_1, page * 8, self.gpa + page * PAGE | table);
        }
        let _ = self.region.write_slice(&CLEAR_CODE, MemoryRegionAddress(page::STUBS * PAGE + CLEAR_OFFSET));
        for large in 0..BYTES as u64 / LARGE_PAGE {
            let entry = self.gpa + large * LARGE_PAGE | table | bit::LARGE | bit::NO_EXECUTE;
            self.write(page::LEVEL_2, (large + 1) * 8, entry);
        }
    }

    /// Starts over with an empty region; KVM must have forgotten it.
    pub(super) fn reset(&mut self) {
        self.next_free = page::FIRST_FREE;
        self.roots.clear();
        self.copies.clear();
    }

    /// Forgets all translations of a space: it gets a new root when it is used again.
    pub(super) fn forget_space(&mut self, space: u64) {
        self.roots.remove(&space);
    }

    /// Forgets all translations.
    pub(super) fn forget_spaces(&mut self) {
        self.roots.clear();
    }

    /// Writes the list for [`CLEAR`]: of the entries of these addresses that are present, at most [`LIST_LENGTH`].
    /// Answers how many there are.
    pub(super) fn list_entries(&self, space: u64, vas: &[u64]) -> u64 {
        let mut count = 0;
        for (table, index) in vas.iter().filter_map(|&va| Some((self.leaf(space, va)?, index(va, 1)))) {
            if count < LIST_LENGTH as u64 && self.read(table, index * 8) & bit::PRESENT != 0 {
                self.write(page::LIST, count * 8, WINDOW + table * PAGE + index * 8);
                count += 1;
            }
        }
        count
    }

    /// An empty page.
    fn allocate(&mut self) -> Result<u64, Full> {
        if self.next_free >= PAGES {
            return Err(Full);
        }
        let page = self.next_free;
        self.next_free += 1;
        let _ = self.region.write_slice(&[0; PAGE_SIZE], MemoryRegionAddress(page * PAGE));
        Ok(page)
    }

    /// Maps the page that holds `va`, an address of the lower half, in a space that has a root. An entry that KVM may
    /// have a shadow of is only ever given more rights.
    pub(super) fn map(&mut self, space: u64, va: u64, to: Mapping) -> Result<(), Full> {
        let Some(&root) = self.roots.get(&space) else { return Err(Full) };
        let (mut table, mut level) = (root, 4);
        while level > 1 {
            let at = index(va, level) * 8;
            let entry = self.read(table, at);
            let next = if entry & bit::PRESENT != 0 {
                self.page_of(entry)
            } else {
                let page = self.allocate()?;
                let flags = bit::PRESENT | bit::WRITABLE | bit::USER | bit::USED;
                self.write(table, at, self.gpa + page * PAGE | flags);
                page
            };
            (table, level) = (next, level - 1);
        }
        let mut entry = to.gpa & bit::ADDRESS | bit::PRESENT | bit::USER | bit::USED;
        if to.writable {
            entry |= bit::WRITABLE;
        }
        if !to.executable {
            entry |= bit::NO_EXECUTE;
        }
        self.write(table, index(va, 1) * 8, entry);
        Ok(())
    }

    /// Where the copy of a page is that has traps at these offsets.
    pub(super) fn copy(
        &mut self,
        gpa: u64,
        version: u64,
        content: &[u8],
        traps: Vec<usize>,
    ) -> Result<u64, Full> {
        if let Some(known) = self.copies.get(&gpa)
            && known.version == version
            && known.traps == traps
        {
            return Ok(self.gpa + known.page * PAGE);
        }
        let page = self.allocate()?;
        let mut bytes = content.get(..PAGE_SIZE).unwrap_or(content).to_vec();
        for &at in &traps {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = TRAP;
            }
        }
        let _ = self.region.write_slice(&bytes, MemoryRegionAddress(page * PAGE));
        self.copies.insert(gpa, Copy { version, traps, page });
        Ok(self.gpa + page * PAGE)
    }

    /// Number of the page that a table's entry names.
    fn page_of(&self, entry: u64) -> u64 {
        (entry & bit::ADDRESS).wrapping_sub(self.gpa) / PAGE
    }

    /// The last table on the way to `va`, if there is one.
    fn leaf(&self, space: u64, va: u64) -> Option<u64> {
        let mut table = *self.roots.get(&space)?;
        for level in [4, 3, 2] {
            let entry = self.read(table, index(va, level) * 8);
            if entry & bit::PRESENT == 0 {
                return None;
            }
            table = self.page_of(entry);
        }
        Some(table)
    }

    /// How `va`, an address of the lower half, is mapped.
    pub(super) fn mapping(&self, space: u64, va: u64) -> Option<Mapping> {
        let entry = self.read(self.leaf(space, va)?, index(va, 1) * 8);
        (entry & bit::PRESENT != 0).then_some(Mapping {
            gpa: entry & bit::ADDRESS,
            writable: entry & bit::WRITABLE != 0,
            executable: entry & bit::NO_EXECUTE == 0,
        })
    }
}

/// Index of `va` into a table of this level.
fn index(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * (level - 1)) & 511
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: Mapping = Mapping { gpa: 0x5000, writable: false, executable: true };

    #[test]
    fn a_page_is_mapped_in_its_space_until_that_is_forgotten() {
        let mut tables = Tables::new(0).unwrap();
        let before = tables.root(1).unwrap();
        assert_ne!(tables.root(2).unwrap(), before);
        tables.map(1, 0x7fff_ffff_e123, CODE).unwrap();
        assert_eq!(tables.mapping(1, 0x7fff_ffff_e000), Some(CODE));
        assert_eq!(tables.mapping(1, 0x7fff_ffff_d000), None);
        assert_eq!(tables.mapping(2, 0x7fff_ffff_e000), None);
        tables.forget_space(2);
        assert_eq!(tables.root(1).unwrap(), before);
        tables.forget_space(1);
        assert_ne!(tables.root(1).unwrap(), before);
        assert_eq!(tables.mapping(1, 0x7fff_ffff_e000), None);
    }

    #[test]
    fn a_full_region_says_so_and_is_usable_again_after_a_reset() {
        let mut tables = Tables::new(3).unwrap();
        tables.root(7).unwrap();
        let mut va = 0;
        while tables.map(7, va, CODE).is_ok() {
            va += 1 << 21;
        }
        assert!(va > 1900 << 21);
        tables.forget_spaces();
        assert_eq!(tables.root(7), Err(Full));
        tables.reset();
        tables.root(7).unwrap();
        assert_eq!(tables.mapping(7, 0), None);
        tables.map(7, 0, CODE).unwrap();
        assert_eq!(tables.mapping(7, 0), Some(CODE));
    }

    #[test]
    fn only_entries_that_are_present_are_listed_to_be_cleared() {
        let mut tables = Tables::new(0).unwrap();
        tables.root(1).unwrap();
        tables.map(1, 0x40_1000, CODE).unwrap();
        assert_eq!(tables.list_entries(1, &[0x40_0000, 0x40_1000, 0x7000_0000]), 1);
        assert_eq!(tables.read(page::LIST, 0) & 0xfff, 8);
        assert_eq!(tables.list_entries(2, &[0x40_1000]), 0);
    }

    #[test]
    fn a_copy_is_made_once_for_each_version_and_place_of_traps() {
        let mut tables = Tables::new(0).unwrap();
        let first = tables.copy(0x5000, 1, &[1; 4096], vec![1]).unwrap();
        assert_eq!(tables.copy(0x5000, 1, &[1; 4096], vec![1]).unwrap(), first);
        let at = MemoryRegionAddress(first - tables.gpa);
        assert_eq!(tables.region.read_obj::<u32>(at).unwrap(), 0x0101_f401);
        assert_ne!(tables.copy(0x5000, 1, &[1; 4096], vec![2]).unwrap(), first);
        assert_ne!(tables.copy(0x5000, 2, &[2; 4096], vec![1]).unwrap(), first);
    }
}
