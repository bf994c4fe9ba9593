//! From the PVH entry to 64-bit mode, and the tables that every processor uses.
//!
//! PVH (Xen's "x86/HVM direct boot ABI") starts in 32-bit protected mode without paging, EBX pointing to the start
//! info. All of the first 4 GiB is identity-mapped by 2 MiB pages, for the kernel only.

use core::arch::global_asm;
use core::cell::UnsafeCell;

use crate::{cpu, trap};

/// Processors that a guest can use.
pub const MAX_CPUS: usize = 8;

/// Selectors of the descriptor table.
pub mod selector {
    pub const CODE64: u64 = 0x08;
    pub const DATA: u64 = 0x10;
    pub const USER_CODE32: u64 = 0x18 | 3;
    pub const USER_DATA: u64 = 0x20 | 3;
    pub const USER_CODE64: u64 = 0x28 | 3;
    pub const CODE32: u64 = 0x30;
    /// 16-bit code with a limit of 64 KiB, base 0x30000.
    pub const CODE16: u64 = 0x38;
    /// Data with base 0 and a limit of 64 KiB, as real mode leaves it.
    pub const DATA16: u64 = 0x40;
    /// First of the descriptors that checks may change, up to [`LAST_SPARE`].
    pub const SPARE: u64 = 0x48;
    pub const LAST_SPARE: u64 = 0x88;
    /// Task state of processor 0; the next ones follow 16 bytes apart.
    pub const TASK: u64 = 0x90;
}

/// A static that everybody may reach by raw pointer.
#[repr(C, align(4096))]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: the guests order their accesses themselves.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub const fn new(value: T) -> Self {
        Shared(UnsafeCell::new(value))
    }

    pub const fn get(&self) -> *mut T {
        self.0.get()
    }
}

/// Entries of the global descriptor table.
pub const GDT_ENTRIES: usize = 0x90 / 8 + 2 * MAX_CPUS;

const fn gdt() -> [u64; GDT_ENTRIES] {
    let mut table = [0; GDT_ENTRIES];
    table[1] = 0x00af_9b00_0000_ffff;
    table[2] = 0x00cf_9300_0000_ffff;
    table[3] = 0x00cf_fb00_0000_ffff;
    table[4] = 0x00cf_f300_0000_ffff;
    table[5] = 0x00af_fb00_0000_ffff;
    table[6] = 0x00cf_9b00_0000_ffff;
    table[7] = 0x0000_9b03_0000_ffff;
    table[8] = 0x0000_9300_0000_ffff;
    table
}

/// The global descriptor table of all processors.
#[unsafe(no_mangle)]
pub static GDT: Shared<[u64; GDT_ENTRIES]> = Shared::new(gdt());

/// The page tables that the guest boots with: PML4, PDPT and four page directories.
#[unsafe(no_mangle)]
pub static BOOT_TABLES: Shared<[[u64; 512]; 6]> = Shared::new([[0; 512]; 6]);

static START_INFO: Shared<u64> = Shared::new(0);

global_asm!(
    ".section .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad start",
    ".section .boot, \"awx\"",
    ".code32",
    ".globl start",
    "start:",
    "cli",
    "cld",
    "mov ebp, ebx",
    // Code for real mode goes where it was linked.
    "mov esi, offset low_load",
    "mov edi, offset LOW_START",
    "mov ecx, offset low_size",
    "rep movsb",
    // PML4 and PDPT, then 2048 pages of 2 MiB.
    "mov eax, offset BOOT_TABLES + 0x1003",
    "mov [BOOT_TABLES], eax",
    "mov edi, offset BOOT_TABLES + 0x1000",
    "mov eax, offset BOOT_TABLES + 0x2003",
    "mov ecx, 4",
    "2: mov [edi], eax",
    "add eax, 0x1000",
    "add edi, 8",
    "dec ecx",
    "jnz 2b",
    "mov edi, offset BOOT_TABLES + 0x2000",
    "mov eax, 0x83",
    "mov ecx, 2048",
    "2: mov [edi], eax",
    "add eax, 0x200000",
    "add edi, 8",
    "dec ecx",
    "jnz 2b",
    "mov esp, offset CPU_BLOCKS + 0x10000",
    "mov eax, offset start64",
    "push eax",
    "jmp enter_long_mode",
    // 32-bit, flat segments, no paging: enters long mode and goes on at the address on the stack.
    ".globl enter_long_mode",
    "enter_long_mode:",
    "mov eax, offset gdt_pointer",
    "lgdt [eax]",
    "mov eax, offset BOOT_TABLES",
    "mov cr3, eax",
    "mov eax, {cr4}",
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    // SCE, LME, NXE
    "or eax, 0x901",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    "pop eax",
    "push 8",
    "push eax",
    "retf",
    ".balign 8",
    ".word 0",
    ".globl gdt_pointer",
    "gdt_pointer:",
    ".word {gdt_limit}",
    ".quad GDT",
    ".code64",
    "start64:",
    "mov esp, esp",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov edi, ebp",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    gdt_limit = const GDT_ENTRIES * 8 - 1,
    cr4 = const CR4,
    main = sym boot_main,
);

/// CR4 as the guests start with it.
pub const CR4: u64 = cpu::cr4::PAE | cpu::cr4::PGE | cpu::cr4::OSFXSR | cpu::cr4::OSXMMEXCPT;

unsafe extern "C" {
    fn guest_main();
}

unsafe extern "C" fn boot_main(start_info: u64) -> ! {
    *START_INFO.get() = start_info;
    trap::init_tables();
    trap::init_processor(0);
    guest_main();
    crate::report::finish()
}

/// The PVH start info's word at this offset.
fn start_info(offset: u64) -> u64 {
    unsafe { *((*START_INFO.get() + offset) as *const u64) }
}

/// The command line; empty if there is none.
pub fn command_line() -> &'static str {
    let gpa = start_info(24);
    if gpa == 0 {
        return "";
    }
    let bytes = unsafe { core::ffi::CStr::from_ptr(gpa as *const _) };
    bytes.to_str().unwrap_or("")
}

/// The number in `NAME=NUMBER` on the command line.
pub fn parameter(name: &str) -> Option<u64> {
    command_line()
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// Where the ACPI root pointer is; 0 if the loader did not say.
pub fn rsdp() -> u64 {
    start_info(32)
}
