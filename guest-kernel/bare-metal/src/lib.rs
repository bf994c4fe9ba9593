//! What the bare-metal guests have in common.
//!
//! A guest is one ELF file with a PVH entry. [`boot`] brings the processor from there to 64-bit mode with
//! identity-mapped memory and calls the guest's `guest_main`; [`report`] prints what the checks found on COM1 and
//! ends the machine through the debug-exit port. Checks run small pieces of assembly with known registers and
//! look at how they ended: [`trap`] does that in long mode at any privilege level, [`legacy`] in real mode and in
//! 32-bit protected mode. [`paging`], [`apic`] and [`smp`] are the machine around the instructions,
//! [`hypercall`] calls the host.
//!
//! Nearly everything here is what `unsafe` is for: the guests have the processor to themselves and put it into states
//! that the compiler knows nothing of. Rules that keep the compiled code right: interrupts and exceptions use stacks
//! of their own (the compiler uses the red zone), and handlers written in Rust run with the FPU state saved.

#![no_std]

pub mod apic;
pub mod boot;
pub mod cpu;
pub mod hypercall;
pub mod legacy;
mod memory_functions;
pub mod paging;
pub mod report;
pub mod smp;
pub mod trap;

pub use report::{check, check_bytes, check_text, check_true, comment, skip, tcg_lacks};
pub use trap::{Frame, run};

/// A piece of assembly that checks can run; the value is its address. It must not fall off its end.
#[macro_export]
macro_rules! code {
    ($($line:expr),+ $(,)?) => {{
        #[unsafe(naked)]
        extern "C" fn piece() {
            core::arch::naked_asm!($($line),+)
        }
        piece as *const () as u64
    }};
}

/// Like [`code!`], with 16-bit instructions, in low memory.
#[macro_export]
macro_rules! code16 {
    ($($line:expr),+ $(,)?) => {{
        #[unsafe(naked)]
        #[unsafe(link_section = ".low.code")]
        extern "C" fn piece() {
            core::arch::naked_asm!(".code16", $($line),+, "int 0xff", ".code64")
        }
        piece as *const () as u64
    }};
}

/// Like [`code!`], with 32-bit instructions; ends with `int 0xff`.
#[macro_export]
macro_rules! code32 {
    ($($line:expr),+ $(,)?) => {{
        #[unsafe(naked)]
        extern "C" fn piece() {
            core::arch::naked_asm!(".code32", $($line),+, "int 0xff", ".code64")
        }
        piece as *const () as u64
    }};
}

/// Like [`code!`], and ends with `int 0xff`, which brings a run to its regular end.
#[macro_export]
macro_rules! code64 {
    ($($line:expr),+ $(,)?) => {{
        #[unsafe(naked)]
        extern "C" fn piece() {
            core::arch::naked_asm!($($line),+, "int 0xff")
        }
        piece as *const () as u64
    }};
}

/// Names the guest's main function.
#[macro_export]
macro_rules! guest_main {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() {
            $main()
        }
    };
}
