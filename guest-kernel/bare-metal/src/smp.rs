//! The other processors: starting them by INIT and SIPI, and giving them work.
//!
//! An application processor starts in real mode at the beginning of low memory, goes the same way to long mode as the
//! first one, and then waits for a function to run.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::boot::{MAX_CPUS, selector};
use crate::{apic, cpu, trap};

/// Page of the start-up code: the vector of the start-up message.
pub const START_PAGE: u32 = 0x30;

#[unsafe(no_mangle)]
static AP_STARTS: AtomicU32 = AtomicU32::new(0);
/// CR0 as the last application processor found it.
#[unsafe(no_mangle)]
static AP_CR0: AtomicU32 = AtomicU32::new(0);
/// Work by processor; zero is none.
static JOBS: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(u32::MAX) }; MAX_CPUS];
static READY: AtomicU32 = AtomicU32::new(0);

global_asm!(
    ".section .low.start, \"awx\"",
    ".code16",
    ".globl ap_start",
    "ap_start:",
    "cli",
    "cld",
    "mov ax, cs",
    "mov ds, ax",
    // lgdt with a 32-bit base
    ".byte 0x66, 0x0f, 0x01, 0x16",
    ".word ap_gdt_pointer - ap_start",
    "mov eax, cr0",
    "mov ebx, eax",
    "or al, 1",
    "mov cr0, eax",
    // a far jump with a 32-bit offset
    ".byte 0x66, 0xea",
    ".long ap_start32",
    ".word {code32}",
    ".balign 8",
    "ap_gdt_pointer:",
    ".word {gdt_limit}",
    ".long GDT",
    ".code32",
    "ap_start32:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov [AP_CR0], ebx",
    "mov eax, 1",
    "lock xadd [AP_STARTS], eax",
    "inc eax",
    "and eax, {last_cpu}",
    "inc eax",
    "shl eax, 16",
    "lea esp, [eax + CPU_BLOCKS]",
    "lea eax, [ap_start64]",
    "push eax",
    "lea eax, [enter_long_mode]",
    "jmp eax",
    ".code64",
    ".section .text.ap, \"ax\"",
    "ap_start64:",
    "mov esp, esp",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    code32 = const selector::CODE32,
    data = const selector::DATA,
    gdt_limit = const crate::boot::GDT_ENTRIES * 8 - 1,
    last_cpu = const MAX_CPUS - 1,
    main = sym ap_main,
);

unsafe extern "C" fn ap_main() -> ! {
    let number = trap::number_by_stack();
    trap::init_processor(number);
    apic::enable();
    APIC_IDS[number].store(cpu::cpuid(1, 0).ebx >> 24, Ordering::SeqCst);
    READY.fetch_add(1, Ordering::SeqCst);
    loop {
        let job = JOBS[number].load(Ordering::Acquire);
        if job == 0 {
            cpu::pause();
            continue;
        }
        // SAFETY: only `start` writes other numbers than zero, and those are functions.
        let job: fn() = unsafe { core::mem::transmute(job) };
        job();
        JOBS[number].store(0, Ordering::Release);
    }
}

/// How many processors there are: `cpus=N` of the command line, 1 without.
pub fn expected() -> usize {
    crate::boot::parameter("cpus").unwrap_or(1).clamp(1, MAX_CPUS as u64) as usize
}

/// How often an application processor has started.
pub fn starts() -> u32 {
    AP_STARTS.load(Ordering::SeqCst)
}

/// How many application processors have come to wait for work.
pub fn ready() -> u32 {
    READY.load(Ordering::SeqCst)
}

/// CR0 as the last application processor found it.
pub fn first_cr0() -> u32 {
    AP_CR0.load(Ordering::SeqCst)
}

/// The APIC id of processor `number`, once it is ready.
pub fn apic_id(number: usize) -> u32 {
    APIC_IDS[number].load(Ordering::SeqCst)
}

/// Waits for some time-stamp ticks.
pub fn delay(ticks: u64) {
    let start = cpu::rdtsc();
    while cpu::rdtsc() - start < ticks {
        cpu::pause();
    }
}

/// Waits until `condition` holds; false if it does not for a very long time.
pub fn wait_until(condition: impl Fn() -> bool) -> bool {
    // Eight seconds or more; processors that share a busy host have to wait long. The counter may jump where the machine
    // goes on elsewhere.
    let (mut last, mut waited) = (cpu::rdtsc(), 0);
    while waited < 20_000_000_000 {
        if condition() {
            return true;
        }
        cpu::pause();
        let now = cpu::rdtsc();
        waited += now.wrapping_sub(last).min(100_000_000);
        last = now;
    }
    condition()
}

/// Starts all other processors and waits for them.
pub fn start_all() -> bool {
    apic::send_ipi(0, 0xc_4500);
    delay(1_000_000);
    apic::send_ipi(0, 0xc_4600 | START_PAGE);
    wait_until(|| ready() as usize == expected() - 1)
}

/// Gives processor `number` something to do.
pub fn give(number: usize, job: fn()) {
    JOBS[number].store(job as usize, Ordering::Release);
}

/// Waits until processor `number` has done it.
pub fn join(number: usize) -> bool {
    wait_until(|| JOBS[number].load(Ordering::Acquire) == 0)
}

/// Takes back what processor `number` was doing, after it was reset.
pub fn forget(number: usize) {
    JOBS[number].store(0, Ordering::Release);
}

/// Lets the next processor that starts be processor `number`.
pub fn reuse(number: usize) {
    AP_STARTS.store(number as u32 - 1, Ordering::SeqCst);
}
