//! The modes without 64 bits: [`run_real`] and [`run_protected`] leave long mode altogether, run a piece of code until it
//! traps, and come back.
//!
//! Real mode has its vector table at address 0 and its code in segment 0x3000; protected mode has an interrupt table and
//! a 32-bit task state of its own. Only the first processor does this, with interrupts disabled.

use core::arch::{asm, global_asm};
use core::mem::offset_of;

use crate::boot::{Shared, selector};
use crate::trap;

/// Real-mode segment of the code that [`crate::code16!`] makes, and of its usual data and stack.
pub const SEGMENT: u16 = 0x3000;
/// Linear address at which that segment begins.
pub const LOW_START: u64 = 0x30000;
/// Offset of the top of the usual real-mode stack in that segment.
pub const STACK16: u32 = 0xfff0;
/// Selector of the 32-bit task state.
pub const TASK32: u64 = selector::LAST_SPARE;

/// All registers, before and after.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Registers {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
    pub esp: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub ss: u32,
    pub cs: u32,
    pub eip: u32,
    pub eflags: u32,
    /// Control registers while the code runs (protected mode only).
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    /// How it ended.
    pub vector: u32,
    pub error: u32,
    pub cr2: u32,
    /// Stack pointer after the processor had pushed (protected mode: error code or zero included).
    pub pushed_at: u32,
}

impl Registers {
    /// For real mode code at this linear address in low memory.
    pub fn real(code: u64) -> Registers {
        let segment = u32::from(SEGMENT);
        Registers {
            cs: segment,
            ds: segment,
            es: segment,
            ss: segment,
            eip: (code - LOW_START) as u32,
            esp: STACK16,
            eflags: 2,
            ..Registers::default()
        }
    }

    /// For 32-bit protected-mode code at level 0, flat segments, no paging.
    pub fn protected(code: u64) -> Registers {
        let data = selector::DATA as u32;
        Registers {
            cs: selector::CODE32 as u32,
            ds: data,
            es: data,
            fs: 0,
            gs: 0,
            ss: data,
            eip: code as u32,
            esp: trap::snippet_stack() as u32,
            eflags: 2,
            cr0: 0x31,
            ..Registers::default()
        }
    }

    /// For 32-bit protected-mode code at level 3.
    pub fn protected_user(code: u64) -> Registers {
        let data = selector::USER_DATA as u32;
        Registers {
            cs: selector::USER_CODE32 as u32,
            ds: data,
            es: data,
            ss: data,
            ..Registers::protected(code)
        }
    }
}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".low.data")]
static LEGACY: Shared<Registers> = Shared::new(Registers {
    eax: 0,
    ebx: 0,
    ecx: 0,
    edx: 0,
    esi: 0,
    edi: 0,
    ebp: 0,
    esp: 0,
    ds: 0,
    es: 0,
    fs: 0,
    gs: 0,
    ss: 0,
    cs: 0,
    eip: 0,
    eflags: 0,
    cr0: 0,
    cr3: 0,
    cr4: 0,
    vector: 0,
    error: 0,
    cr2: 0,
    pushed_at: 0,
});
#[unsafe(no_mangle)]
static LEGACY_RSP: Shared<u64> = Shared::new(0);
/// The interrupt descriptor table of protected mode.
#[unsafe(no_mangle)]
pub static IDT32: Shared<[u64; 256]> = Shared::new([0; 256]);
/// The task state of protected mode: back link, ESP0, SS0 and so on (Intel SDM volume 3, 8.2.1).
pub static TSS32: Shared<[u32; 26]> = Shared::new([0; 26]);
#[unsafe(no_mangle)]
static STACK32: Shared<[u8; 4096]> = Shared::new([0; 4096]);

global_asm!(
    ".section .text.legacy, \"ax\"",
    // legacy_run(real: u32)
    ".globl legacy_run",
    "legacy_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [LEGACY_RSP], rsp",
    "mov ebp, edi",
    "push {code32}",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2:",
    "mov eax, {data}",
    "mov ss, eax",
    "mov ds, eax",
    "lea esp, [STACK32 + 4096]",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "test ebp, ebp",
    "jnz enter_real",
    // Protected mode.
    "mov eax, [LEGACY + {cr4}]",
    "mov cr4, eax",
    "mov eax, [LEGACY + {cr3}]",
    "mov cr3, eax",
    "lea eax, [idt32_pointer]",
    "lidt [eax]",
    "mov eax, {task32}",
    "ltr ax",
    "mov eax, [LEGACY + {cr0}]",
    "mov cr0, eax",
    "mov eax, [LEGACY + {cs}]",
    "test al, 3",
    "jz 3f",
    "push dword ptr [LEGACY + {ss}]",
    "push dword ptr [LEGACY + {esp}]",
    "jmp 4f",
    "3: mov ss, [LEGACY + {ss}]",
    "mov esp, [LEGACY + {esp}]",
    "4: push dword ptr [LEGACY + {eflags}]",
    "push dword ptr [LEGACY + {cs}]",
    "push dword ptr [LEGACY + {eip}]",
    "mov es, [LEGACY + {es}]",
    "mov fs, [LEGACY + {fs}]",
    "mov gs, [LEGACY + {gs}]",
    "mov eax, [LEGACY + {eax}]",
    "mov ebx, [LEGACY + {ebx}]",
    "mov ecx, [LEGACY + {ecx}]",
    "mov edx, [LEGACY + {edx}]",
    "mov esi, [LEGACY + {esi}]",
    "mov edi, [LEGACY + {edi}]",
    "mov ebp, [LEGACY + {ebp}]",
    "mov ds, [LEGACY + {ds}]",
    "iretd",
    ".balign 4",
    ".word 0",
    "idt32_pointer: .word 0x7ff",
    ".long IDT32",
    // Where every vector of protected mode enters.
    ".balign 16",
    ".globl legacy_stubs",
    "legacy_stubs:",
    ".set n, 0",
    ".rept 256",
    ".balign 16",
    ".if n != 8 && n != 10 && n != 11 && n != 12 && n != 13 && n != 14 && n != 17",
    ".byte 0x6a, 0",
    ".endif",
    ".byte 0x68",
    ".long n",
    "jmp 5f",
    ".set n, n + 1",
    ".endr",
    "5:",
    "pushad",
    ".byte 0x1e",
    "mov eax, {data}",
    "mov ds, eax",
    "lea eax, [esp + 40]",
    "mov [LEGACY + {pushed_at}], eax",
    "pop dword ptr [LEGACY + {ds}]",
    "pop dword ptr [LEGACY + {edi}]",
    "pop dword ptr [LEGACY + {esi}]",
    "pop dword ptr [LEGACY + {ebp}]",
    "pop eax",
    "pop dword ptr [LEGACY + {ebx}]",
    "pop dword ptr [LEGACY + {edx}]",
    "pop dword ptr [LEGACY + {ecx}]",
    "pop dword ptr [LEGACY + {eax}]",
    "pop dword ptr [LEGACY + {vector}]",
    "pop dword ptr [LEGACY + {error}]",
    "pop dword ptr [LEGACY + {eip}]",
    "pop dword ptr [LEGACY + {cs}]",
    "pop dword ptr [LEGACY + {eflags}]",
    "mov [LEGACY + {esp}], esp",
    "mov eax, ss",
    "mov [LEGACY + {ss}], eax",
    // From level 3 or virtual-8086 mode the stack was pushed as well.
    "test dword ptr [LEGACY + {eflags}], 0x20000",
    "jnz 10f",
    "test byte ptr [LEGACY + {cs}], 3",
    "jz 6f",
    "10:",
    "pop dword ptr [LEGACY + {esp}]",
    "pop dword ptr [LEGACY + {ss}]",
    "6:",
    "mov eax, es",
    "mov [LEGACY + {es}], eax",
    "mov eax, fs",
    "mov [LEGACY + {fs}], eax",
    "mov eax, gs",
    "mov [LEGACY + {gs}], eax",
    "mov eax, cr2",
    "mov [LEGACY + {cr2}], eax",
    "mov eax, cr3",
    "mov [LEGACY + {cr3}], eax",
    "mov eax, cr0",
    "mov [LEGACY + {cr0}], eax",
    "legacy_back:",
    "mov eax, {data}",
    "mov ss, eax",
    "lea esp, [STACK32 + 4096]",
    "mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "lea eax, [legacy_back64]",
    "push eax",
    "lea eax, [enter_long_mode]",
    "jmp eax",
    ".code64",
    "legacy_back64:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rsp, [LEGACY_RSP]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".code32",
    "enter_real:",
    "lea eax, [ivt_pointer]",
    "lidt [eax]",
    "mov eax, {data16}",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ss, eax",
    "push {code16}",
    "lea eax, [7f - {low_start}]",
    "push eax",
    "retf",
    // Real mode, in low memory.
    ".section .low.legacy, \"awx\"",
    ".code16",
    "7:",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word 8f - {low_start}, {segment}",
    "8:",
    "mov ax, cs",
    "mov ds, ax",
    "mov es, [LEGACY - {low_start} + {es}]",
    "mov fs, [LEGACY - {low_start} + {fs}]",
    "mov gs, [LEGACY - {low_start} + {gs}]",
    "mov ss, [LEGACY - {low_start} + {ss}]",
    "mov esp, [LEGACY - {low_start} + {esp}]",
    "push word ptr [LEGACY - {low_start} + {eflags}]",
    "push word ptr [LEGACY - {low_start} + {cs}]",
    "push word ptr [LEGACY - {low_start} + {eip}]",
    "mov eax, [LEGACY - {low_start} + {eax}]",
    "mov ebx, [LEGACY - {low_start} + {ebx}]",
    "mov ecx, [LEGACY - {low_start} + {ecx}]",
    "mov edx, [LEGACY - {low_start} + {edx}]",
    "mov esi, [LEGACY - {low_start} + {esi}]",
    "mov edi, [LEGACY - {low_start} + {edi}]",
    "mov ebp, [LEGACY - {low_start} + {ebp}]",
    "mov ds, [LEGACY - {low_start} + {ds}]",
    "iret",
    // Where every vector of real mode enters.
    ".balign 8",
    ".globl real_stubs",
    "real_stubs:",
    ".set n, 0",
    ".rept 256",
    ".balign 8",
    ".byte 0x68",
    ".word n",
    ".byte 0xe9",
    ".word 9f - . - 2",
    ".set n, n + 1",
    ".endr",
    "9:",
    "mov cs:[LEGACY - {low_start} + {eax}], eax",
    "mov ax, ds",
    "mov cs:[LEGACY - {low_start} + {ds}], ax",
    "mov ax, cs",
    "mov ds, ax",
    "mov [LEGACY - {low_start} + {ebx}], ebx",
    "mov [LEGACY - {low_start} + {ecx}], ecx",
    "mov [LEGACY - {low_start} + {edx}], edx",
    "mov [LEGACY - {low_start} + {esi}], esi",
    "mov [LEGACY - {low_start} + {edi}], edi",
    "mov [LEGACY - {low_start} + {ebp}], ebp",
    "mov [LEGACY - {low_start} + {es}], es",
    "mov [LEGACY - {low_start} + {fs}], fs",
    "mov [LEGACY - {low_start} + {gs}], gs",
    "mov [LEGACY - {low_start} + {ss}], ss",
    "pop word ptr [LEGACY - {low_start} + {vector}]",
    "mov [LEGACY - {low_start} + {pushed_at}], esp",
    "pop word ptr [LEGACY - {low_start} + {eip}]",
    "pop word ptr [LEGACY - {low_start} + {cs}]",
    "pop word ptr [LEGACY - {low_start} + {eflags}]",
    "mov [LEGACY - {low_start} + {esp}], esp",
    "mov eax, cr0",
    "mov [LEGACY - {low_start} + {cr0}], eax",
    "or al, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long legacy_back_real",
    ".word {code32}",
    ".balign 4",
    "ivt_pointer: .word 0x3ff",
    ".long 0",
    ".code32",
    "legacy_back_real:",
    "mov eax, {data}",
    "mov ds, eax",
    "lea eax, [legacy_back]",
    "jmp eax",
    ".code64",
    code32 = const selector::CODE32,
    code16 = const selector::CODE16,
    data = const selector::DATA,
    data16 = const selector::DATA16,
    task32 = const TASK32,
    segment = const SEGMENT,
    low_start = const LOW_START,
    eax = const offset_of!(Registers, eax),
    ebx = const offset_of!(Registers, ebx),
    ecx = const offset_of!(Registers, ecx),
    edx = const offset_of!(Registers, edx),
    esi = const offset_of!(Registers, esi),
    edi = const offset_of!(Registers, edi),
    ebp = const offset_of!(Registers, ebp),
    esp = const offset_of!(Registers, esp),
    ds = const offset_of!(Registers, ds),
    es = const offset_of!(Registers, es),
    fs = const offset_of!(Registers, fs),
    gs = const offset_of!(Registers, gs),
    ss = const offset_of!(Registers, ss),
    cs = const offset_of!(Registers, cs),
    eip = const offset_of!(Registers, eip),
    eflags = const offset_of!(Registers, eflags),
    cr0 = const offset_of!(Registers, cr0),
    cr2 = const offset_of!(Registers, cr2),
    cr3 = const offset_of!(Registers, cr3),
    cr4 = const offset_of!(Registers, cr4),
    vector = const offset_of!(Registers, vector),
    error = const offset_of!(Registers, error),
    pushed_at = const offset_of!(Registers, pushed_at),
);

unsafe extern "C" {
    fn legacy_run(real: u32);
    static legacy_stubs: [u8; 0];
    static real_stubs: [u8; 0];
}

/// Where vector `n` of protected mode enters.
pub fn stub32(n: u64) -> u64 {
    &raw const legacy_stubs as u64 + n * 16
}

/// Where vector `n` of real mode enters, in [`SEGMENT`].
pub fn stub16(n: u64) -> u16 {
    (&raw const real_stubs as u64 + n * 8 - LOW_START) as u16
}

/// A gate of protected mode: 0xe is an interrupt gate, 0xf a trap gate, 0x6 and 0x7 their 16-bit forms.
pub fn gate32(target: u64, selector: u64, kind: u64, dpl: u64) -> u64 {
    target & 0xffff | selector << 16 | (0x80 | dpl << 5 | kind) << 40 | (target >> 16 & 0xffff) << 48
}

/// Sets vector `n` of protected mode to its usual gate.
pub fn default_gate(n: u64) {
    let dpl = if matches!(n, 3 | 4 | 0xff) { 3 } else { 0 };
    unsafe { (*IDT32.get())[n as usize] = gate32(stub32(n), selector::CODE32, 0xe, dpl) }
}

/// Sets vector `n` of real mode.
pub fn set_vector16(n: u64, segment: u16, offset: u16) {
    crate::paging::poke32(n * 4, u32::from(segment) << 16 | u32::from(offset));
}

/// Sets both vector tables and the task state to what they usually are.
pub fn init() {
    for n in 0..256 {
        default_gate(n);
        set_vector16(n, SEGMENT, stub16(n));
    }
    let stack = STACK32.get() as u32 + 2048;
    unsafe {
        (*TSS32.get())[1] = stack;
        (*TSS32.get())[2] = selector::DATA as u32;
        (*TSS32.get())[25] = 104 << 16;
    }
}

/// The top of the stack that interrupts from level 3 use.
pub fn esp0() -> u32 {
    unsafe { (*TSS32.get())[1] }
}

fn run(registers: Registers, real: u32) -> Registers {
    let task = TSS32.get() as u64;
    trap::set_descriptor(TASK32, 103 | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24) << 56);
    unsafe {
        LEGACY.get().write_volatile(registers);
        legacy_run(real);
        trap::load_idt(trap::IDT.get() as u64, 4095);
        let own = trap::descriptor(selector::TASK);
        trap::set_descriptor(selector::TASK, own & !(1 << 41));
        asm!("ltr ax", in("ax") selector::TASK as u16);
        LEGACY.get().read_volatile()
    }
}

/// Runs in real mode until something interrupts; `int 0xff` is the regular end.
pub fn run_real(registers: Registers) -> Registers {
    run(registers, 1)
}

/// Runs in 32-bit protected mode until something traps; `int 0xff` is the regular end.
pub fn run_protected(registers: Registers) -> Registers {
    run(registers, 0)
}
