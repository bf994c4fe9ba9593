//! Page tables for user code, and the few supervisor pages that catch everything else.
//!
//! All of it lies in a region of its own, far above guest memory. The upper half of the address space holds a
//! descriptor table, an interrupt table whose gates lead to one HLT each, and a stack; the lower half is filled
//! page by page. To forget is to begin a new root: KVM keeps shadows of tables, and drops those of a region only
//! when the region is taken away, which happens when it is full.

use std::sync::Arc;

use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::user_mode::UserPage;
use harrier_engine::{EngineError, GuestRegion, PageLog};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

/// Where the first processor's region is; guest memory ends below.
const FIRST_GPA: u64 = 1 << 40;
/// Size of a region: a thousand tables, taken from the host when they are used.
const BYTES: usize = 4 << 20;
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
    pub(super) const FIRST_FREE: u64 = 7;
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
/// End of the stack that every gate switches to.
pub(super) const STACK_TOP: u64 = BASE + (page::STACK + 1) * PAGE;

/// Bits of page table entries; accessed and dirty are set in advance.
mod bit {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const USED: u64 = 1 << 5 | 1 << 6;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// The tables of one processor.
#[derive(Debug)]
pub(super) struct Tables {
    region: Arc<GuestRegion>,
    gpa: u64,
    /// Page of the root, by its number in the region.
    root: u64,
    next_free: u64,
}

/// The region is full: it must be taken away from KVM and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

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
        let mut tables = Tables { region: Arc::new(region), gpa, root: 0, next_free: 0 };
        tables.write_supervisor_pages();
        tables.reset();
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

    /// Value of CR3.
    pub(super) fn root(&self) -> u64 {
        self.gpa + self.root * PAGE
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
        for page in [page::DESCRIPTORS, page::INTERRUPTS, page::STUBS, page::STACK] {
            self.write(page::LEVEL_1, page * 8, self.gpa + page * PAGE | table);
        }
    }

    /// Starts over with an empty region; KVM must have forgotten it.
    pub(super) fn reset(&mut self) {
        self.next_free = page::FIRST_FREE;
        let _ = self.begin();
    }

    /// Forgets all translations by beginning a new root.
    pub(super) fn begin(&mut self) -> Result<(), Full> {
        self.root = self.allocate()?;
        let upper = self.gpa + page::LEVEL_3 * PAGE | bit::PRESENT | bit::WRITABLE | bit::USED;
        self.write(self.root, BASE_ROOT_INDEX * 8, upper);
        Ok(())
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

    /// Maps the page that holds `va`, an address of the lower half.
    pub(super) fn map(&mut self, va: u64, to: UserPage) -> Result<(), Full> {
        let (mut table, mut level) = (self.root, 4);
        while level > 1 {
            let at = index(va, level) * 8;
            let entry = self.read(table, at);
            let next = if entry & bit::PRESENT != 0 {
                (entry & bit::ADDRESS).wrapping_sub(self.gpa) / PAGE
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

    /// Maps a page of our own at `va`: executable, not writable, with this content.
    pub(super) fn map_copy(&mut self, va: u64, content: &[u8]) -> Result<(), Full> {
        let page = self.allocate()?;
        let content = content.get(..PAGE_SIZE).unwrap_or(content);
        let _ = self.region.write_slice(content, MemoryRegionAddress(page * PAGE));
        let gpa = self.gpa + page * PAGE;
        self.map(va, UserPage { gpa, writable: false, executable: true, cpuid: false })
    }

    /// Whether something is mapped at `va`.
    pub(super) fn is_mapped(&self, va: u64) -> bool {
        let (mut table, mut level) = (self.root, 4);
        loop {
            let entry = self.read(table, index(va, level) * 8);
            if entry & bit::PRESENT == 0 || level == 1 {
                return entry & bit::PRESENT != 0;
            }
            (table, level) = ((entry & bit::ADDRESS).wrapping_sub(self.gpa) / PAGE, level - 1);
        }
    }
}

/// Index of `va` into a table of this level.
fn index(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * (level - 1)) & 511
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_OF_CODE: UserPage = UserPage { gpa: 0x5000, writable: false, executable: true, cpuid: false };

    #[test]
    fn a_page_is_mapped_until_a_new_root_begins() {
        let mut tables = Tables::new(0).unwrap();
        let before = tables.root();
        tables.map(0x7fff_ffff_e123, PAGE_OF_CODE).unwrap();
        assert!(tables.is_mapped(0x7fff_ffff_e000));
        assert!(!tables.is_mapped(0x7fff_ffff_d000));
        assert!(tables.is_mapped(STUBS));
        tables.begin().unwrap();
        assert!(!tables.is_mapped(0x7fff_ffff_e000));
        assert!(tables.is_mapped(STUBS));
        assert_ne!(tables.root(), before);
    }

    #[test]
    fn a_full_region_says_so_and_is_usable_again_after_a_reset() {
        let mut tables = Tables::new(3).unwrap();
        let mut va = 0;
        while tables.map(va, PAGE_OF_CODE).is_ok() {
            va += 1 << 21;
        }
        assert!(va > 900 << 21);
        assert_eq!(tables.begin(), Err(Full));
        tables.reset();
        assert!(!tables.is_mapped(0));
        tables.map(0, PAGE_OF_CODE).unwrap();
        assert!(tables.is_mapped(0));
    }
}
