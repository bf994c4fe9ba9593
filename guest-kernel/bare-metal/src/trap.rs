//! Exceptions and interrupts in long mode, and [`run`], which executes a piece of code until it traps.
//!
//! Every vector has a gate with a stack of its own (IST 1; IST 2 for NMI, IST 3 for the double fault). What arrives is
//! counted, then given to the handler that [`set_handler`] installed for the vector; without one it ends the [`run`]
//! that is under way, and without that it is an error of the guest.
//!
//! Each processor has a [`Block`] of 64 KiB, aligned to its size, that holds its stacks: so code on any of
//! them finds the block by masking RSP.

use core::arch::{global_asm, naked_asm};
use core::mem::offset_of;

use crate::boot::{GDT, MAX_CPUS, Shared, selector};
use crate::report::{Console, exit};

/// Exception vectors.
pub mod vector {
    pub const DE: u64 = 0;
    pub const DB: u64 = 1;
    pub const NMI: u64 = 2;
    pub const BP: u64 = 3;
    pub const OF: u64 = 4;
    pub const BR: u64 = 5;
    pub const UD: u64 = 6;
    pub const NM: u64 = 7;
    pub const DF: u64 = 8;
    pub const TS: u64 = 10;
    pub const NP: u64 = 11;
    pub const SS: u64 = 12;
    pub const GP: u64 = 13;
    pub const PF: u64 = 14;
    pub const MF: u64 = 16;
    pub const AC: u64 = 17;
    pub const XM: u64 = 19;
    /// What ends a piece of code that did all it should.
    pub const END: u64 = 0xff;
}

/// All general registers, and why they were saved.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
    /// The stack pointer after the processor had pushed (of the frame with an error code or a zero in its place).
    pub pushed_at: u64,
}

const FRAME_WORDS: usize = 22;

impl Frame {
    /// For kernel code at `rip`: interrupts disabled, a stack of its own, all else zero.
    pub fn kernel(rip: u64) -> Frame {
        Frame {
            rip,
            cs: selector::CODE64,
            ss: selector::DATA,
            rflags: 2,
            rsp: snippet_stack(),
            ..Frame::default()
        }
    }

    /// For 64-bit user code at `rip`, an address that user mode may execute.
    pub fn user(rip: u64, rsp: u64) -> Frame {
        Frame { rip, cs: selector::USER_CODE64, ss: selector::USER_DATA, rflags: 2, rsp, ..Frame::default() }
    }
}

/// What a processor has for itself.
#[repr(C, align(16))]
pub struct Block {
    saved_rsp: u64,
    frame: *mut Frame,
    /// Arrivals by vector.
    pub counts: [u32; 256],
    /// This processor's number.
    pub number: u32,
    /// Task state segment.
    pub task: TaskState,
    fpu: FpuArea,
}

#[repr(C, align(16))]
struct FpuArea([u8; 512]);

/// The 64-bit task state segment (Intel SDM volume 3, 9.7), then the first bytes of an I/O permission map.
#[repr(C, packed(4))]
pub struct TaskState {
    reserved0: u32,
    pub rsp: [u64; 3],
    reserved1: u64,
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    pub io_map_base: u16,
    pub io_map: [u8; 256],
}

const _: () = assert!(size_of::<Block>() < 0x4000);

/// Offsets of stack tops in a block. The second one is for code under test, the last one for Rust.
const TOP_IST1: u64 = 0x5000;
const TOP_IST2: u64 = 0x6000;
const TOP_IST3: u64 = 0x7000;
const TOP_RSP0: u64 = 0x8000;
const TOP_SNIPPET: u64 = 0x9000;

/// The blocks of all processors.
#[unsafe(no_mangle)]
static CPU_BLOCKS: Shared<[Space; MAX_CPUS]> = Shared::new([const { Space([0; 65536]) }; MAX_CPUS]);

#[repr(C, align(65536))]
struct Space([u8; 65536]);

/// The handlers by vector.
static HANDLERS: Shared<[Option<Handler>; 256]> = Shared::new([None; 256]);

/// A handler may change the frame to which it returns.
pub type Handler = unsafe extern "C" fn(&mut Frame, &mut Block);

/// An interrupt or trap gate.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Gate {
    pub low: u64,
    pub high: u64,
}

impl Gate {
    /// A present interrupt gate to 64-bit kernel code.
    pub fn new(target: u64, ist: u64, dpl: u64) -> Gate {
        Gate {
            low: target & 0xffff
                | selector::CODE64 << 16
                | ist << 32
                | (0x8e | dpl << 5) << 40
                | (target >> 16 & 0xffff) << 48,
            high: target >> 32,
        }
    }
}

/// The interrupt descriptor table of all processors.
pub static IDT: Shared<[Gate; 256]> = Shared::new([Gate { low: 0, high: 0 }; 256]);

global_asm!(
    ".section .text.trap, \"ax\"",
    ".balign 16",
    ".globl trap_stubs",
    "trap_stubs:",
    ".set n, 0",
    ".rept 256",
    ".balign 16",
    // #DF #TS #NP #SS #GP #PF #AC #CP push an error code themselves.
    ".if n != 8 && n != 10 && n != 11 && n != 12 && n != 13 && n != 14 && n != 17 && n != 21",
    "push 0",
    ".endif",
    "push n",
    "jmp trap_common",
    ".set n, n + 1",
    ".endr",
    ".balign 16",
    "trap_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rbx, rsp",
    "and rbx, -65536",
    "movzx eax, byte ptr [rsp + {vector}]",
    "mov [rsp + {vector}], rax",
    "inc dword ptr [rbx + {counts} + rax * 4]",
    "mov rcx, [{handlers} + rax * 8]",
    "test rcx, rcx",
    "jnz 3f",
    "mov rdx, [rbx + {saved_rsp}]",
    "test rdx, rdx",
    "jz 4f",
    // The end of a run: the frame goes to its caller, and so do we.
    "mov rdi, [rbx + {frame}]",
    "mov rsi, rsp",
    "mov ecx, {words}",
    "rep movsq",
    "mov rax, cr2",
    "mov [rdi], rax",
    "lea rax, [rsp + {error}]",
    "mov [rdi + 8], rax",
    "mov qword ptr [rbx + {saved_rsp}], 0",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "push 0x10",
    "push rdx",
    "push 2",
    "push 8",
    "lea rax, [rip + run_end]",
    "push rax",
    "iretq",
    "3:",
    "fxsave64 [rbx + {fpu}]",
    "mov rdi, rsp",
    "mov rsi, rbx",
    "mov rbp, rsp",
    "and rsp, -16",
    "call rcx",
    "mov rsp, rbp",
    "fxrstor64 [rbx + {fpu}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "4:",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {unexpected}",
    "ud2",
    // run_frame(frame)
    ".globl run_frame",
    "run_frame:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "pushfq",
    "mov rax, rsp",
    "and rax, -65536",
    "mov [rax + {frame}], rdi",
    "mov [rax + {saved_rsp}], rsp",
    "mov rsp, rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    // run_frame_controlled(frame, cr0, cr4)
    ".globl run_frame_controlled",
    "run_frame_controlled:",
    "push rbx",
    "push r12",
    "mov rbx, cr0",
    "mov r12, cr4",
    "mov cr0, rsi",
    "mov cr4, rdx",
    "call run_frame",
    "mov cr0, rbx",
    "mov cr4, r12",
    "pop r12",
    "pop rbx",
    "ret",
    "run_end:",
    "popfq",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    vector = const offset_of!(Frame, vector),
    error = const offset_of!(Frame, error),
    words = const FRAME_WORDS,
    counts = const offset_of!(Block, counts),
    saved_rsp = const offset_of!(Block, saved_rsp),
    frame = const offset_of!(Block, frame),
    fpu = const offset_of!(Block, fpu),
    handlers = sym HANDLERS,
    unexpected = sym unexpected,
);

unsafe extern "C" {
    fn run_frame(frame: *mut Frame);
    fn run_frame_controlled(frame: *mut Frame, cr0: u64, cr4: u64);
    static trap_stubs: [u8; 0];
}

unsafe extern "C" fn unexpected(frame: &Frame) -> ! {
    use core::fmt::Write;
    let cr2 = crate::cpu::cr2();
    _ = writeln!(Console, "not ok unexpected trap: cr2 {cr2:#x} {frame:x?}");
    exit(3)
}

/// Executes from the frame's registers on until something traps for which there is no handler, and answers the
/// registers as they were then.
pub fn run(start: Frame) -> Frame {
    let mut frame = start;
    unsafe { run_frame(&mut frame) };
    frame
}

/// Like [`run`], with CR0 and CR4 set while the code runs and no longer: compiled code needs the FPU.
pub fn run_controlled(start: Frame, cr0: u64, cr4: u64) -> Frame {
    let mut frame = start;
    unsafe { run_frame_controlled(&mut frame, cr0, cr4) };
    frame
}

/// Runs kernel code with all registers zero.
pub fn run_kernel(rip: u64) -> Frame {
    run(Frame::kernel(rip))
}

/// Where vector `n` enters.
pub fn stub(n: u64) -> u64 {
    &raw const trap_stubs as u64 + n * 16
}

/// The block of this processor.
pub fn this_cpu() -> &'static mut Block {
    unsafe { &mut *(stack_pointer() as *mut Block) }
}

#[unsafe(naked)]
extern "C" fn stack_pointer() -> u64 {
    naked_asm!("mov rax, rsp", "and rax, -65536", "ret")
}

/// The number of the processor on whose stack this runs.
pub(crate) fn number_by_stack() -> usize {
    (stack_pointer() - CPU_BLOCKS.get() as u64) as usize / 65536
}

/// The block of processor `number`.
pub fn block(number: usize) -> *mut Block {
    assert!(number < MAX_CPUS);
    unsafe { CPU_BLOCKS.get().cast::<Space>().add(number).cast() }
}

/// The top of the stack that code under test uses.
pub fn snippet_stack() -> u64 {
    &raw const *this_cpu() as u64 + TOP_SNIPPET
}

/// The top of the stack that interrupts from user mode use when their gate names none.
pub fn rsp0() -> u64 {
    &raw const *this_cpu() as u64 + TOP_RSP0
}

/// The top of the stack that most gates name.
pub fn ist1() -> u64 {
    &raw const *this_cpu() as u64 + TOP_IST1
}

/// Fills the interrupt descriptor table. `int 0xff` and `int3`, `into` may be used from user mode.
pub fn init_tables() {
    for n in 0..256 {
        set_gate(n, default_gate(n));
    }
}

/// The gate that vector `n` normally has.
pub fn default_gate(n: u64) -> Gate {
    let ist = match n {
        vector::NMI => 2,
        vector::DF => 3,
        _ => 1,
    };
    let dpl = if matches!(n, vector::BP | vector::OF | vector::END) { 3 } else { 0 };
    Gate::new(stub(n), ist, dpl)
}

/// Replaces the gate of vector `n`.
pub fn set_gate(n: u64, gate: Gate) {
    unsafe { (*IDT.get())[n as usize] = gate }
}

/// Gives vector `n` a handler, or none.
pub fn set_handler(n: u64, handler: Option<Handler>) {
    unsafe { (*HANDLERS.get())[n as usize] = handler }
}

/// How often vector `n` arrived at this processor.
pub fn count(n: u64) -> u32 {
    unsafe { core::ptr::read_volatile(&raw const this_cpu().counts[n as usize]) }
}

/// Descriptor `index` of the global table.
pub fn descriptor(selector: u64) -> u64 {
    unsafe { (*GDT.get())[selector as usize / 8] }
}

/// Replaces a descriptor of the global table.
pub fn set_descriptor(selector: u64, value: u64) {
    unsafe { core::ptr::write_volatile(&raw mut (*GDT.get())[selector as usize / 8], value) }
}

/// Loads this processor's task register and interrupt descriptor table.
pub fn init_processor(number: usize) {
    let base = block(number) as u64;
    unsafe {
        let block = &mut *block(number);
        block.number = number as u32;
        block.task.rsp = [base + TOP_RSP0; 3];
        block.task.ist = [base + TOP_IST1, base + TOP_IST2, base + TOP_IST3, 0, 0, 0, 0];
        block.task.io_map_base = offset_of!(TaskState, io_map) as u16;
        block.task.io_map = [0xff; 256];
    }
    let task = base + offset_of!(Block, task) as u64;
    let limit = size_of::<TaskState>() as u64 - 1;
    let selector = selector::TASK + 16 * number as u64;
    set_descriptor(selector, limit | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56);
    set_descriptor(selector + 8, task >> 32);
    load_idt(IDT.get() as u64, 4095);
    unsafe { core::arch::asm!("ltr ax", in("ax") selector as u16) }
}

/// Loads the interrupt descriptor table register.
pub fn load_idt(base: u64, limit: u16) {
    let mut pointer = [0u16; 5];
    pointer[0] = limit;
    for (index, word) in pointer[1..].iter_mut().enumerate() {
        *word = (base >> (16 * index)) as u16;
    }
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &pointer) }
}
