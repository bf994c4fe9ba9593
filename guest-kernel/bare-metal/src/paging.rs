//! Page tables for checks: single pages at addresses of their own, and a view of low memory for user mode.

use crate::boot::{BOOT_TABLES, Shared};
use crate::cpu;

/// Bits of a page-table entry (Intel SDM volume 3, 4.5).
pub mod entry {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// Page size in a directory entry.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Where checks map pages: the second 512 GiB.
pub const TEST_BASE: u64 = 0x80_0000_0000;
/// Where user mode sees the first GiB of memory: the third 512 GiB.
pub const USER_BASE: u64 = 0x100_0000_0000;
/// Guest memory from here on belongs to the checks, up to [`FRAMES_END`].
pub const FRAMES: u64 = 16 << 20;
/// The guests want 64 MiB.
pub const FRAMES_END: u64 = 64 << 20;

const POOL_PAGES: usize = 24;
static POOL: Shared<[[u64; 512]; POOL_PAGES]> = Shared::new([[0; 512]; POOL_PAGES]);
static POOL_USED: Shared<usize> = Shared::new(0);

fn new_table() -> u64 {
    unsafe {
        let index = *POOL_USED.get();
        assert!(index < POOL_PAGES, "out of page tables");
        *POOL_USED.get() = index + 1;
        POOL.get() as u64 + index as u64 * 4096
    }
}

/// Guest physical address of the `n`th page that checks may use.
pub const fn frame(n: u64) -> u64 {
    FRAMES + n * 4096
}

/// Reads or changes memory behind the compiler's back.
pub fn peek(address: u64) -> u64 {
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes memory behind the compiler's back.
pub fn poke(address: u64, value: u64) {
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// Reads four bytes.
pub fn peek32(address: u64) -> u32 {
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes four bytes.
pub fn poke32(address: u64, value: u32) {
    unsafe { (address as *mut u32).write_volatile(value) }
}

/// Writes one byte.
pub fn poke8(address: u64, value: u8) {
    unsafe { (address as *mut u8).write_volatile(value) }
}

/// Reads one byte.
pub fn peek8(address: u64) -> u8 {
    unsafe { (address as *const u8).read_volatile() }
}

/// Copies bytes to an address, for machine code and test data.
pub fn poke_bytes(address: u64, bytes: &[u8]) {
    for (index, byte) in bytes.iter().enumerate() {
        poke8(address + index as u64, *byte);
    }
}

/// The entry for `va` at `level`: 4 is the PML4's, 1 the page table's. Missing tables are added, for all uses.
pub fn entry(va: u64, level: u32) -> *mut u64 {
    let mut table = BOOT_TABLES.get() as u64;
    let mut at = 4;
    loop {
        let slot = (table + (va >> (12 + 9 * (at - 1)) & 511) * 8) as *mut u64;
        if at == level {
            return slot;
        }
        unsafe {
            if slot.read_volatile() & entry::P == 0 {
                slot.write_volatile(new_table() | entry::P | entry::W | entry::U);
            }
            assert!(slot.read_volatile() & entry::PS == 0, "a large page is there");
            table = slot.read_volatile() & 0x000f_ffff_ffff_f000;
        }
        at -= 1;
    }
}

/// Sets the page-table entry for `va` and forgets what the processor knew of it.
pub fn map(va: u64, value: u64) {
    unsafe { entry(va, 1).write_volatile(value) }
    cpu::invlpg(va);
}

/// Sets the directory entry for `va`: a 2 MiB page, if `value` says so.
pub fn map_2m(va: u64, value: u64) {
    unsafe { entry(va, 2).write_volatile(value) }
    cpu::invlpg(va);
}

/// Where user mode sees the kernel's `address`. User mode may read, write and execute everything there.
pub fn user(address: u64) -> u64 {
    let first = entry(USER_BASE, 2);
    if unsafe { first.read_volatile() } == 0 {
        for n in 0..512 {
            unsafe {
                first
                    .add(n)
                    .write_volatile((n as u64 * (2 << 20)) | entry::PS | entry::P | entry::W | entry::U)
            }
        }
    }
    assert!(address < 1 << 30);
    USER_BASE + address
}

/// The top of a stack for user mode, as user mode sees it.
pub fn user_stack() -> u64 {
    user(crate::trap::snippet_stack())
}
