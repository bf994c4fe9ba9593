//! What a guest says: one line a check on COM1, and the code with which it ends the machine.
//!
//! Lines: `ok NAME`, `not ok NAME: got X, expected Y`, `skip NAME: REASON`, `# COMMENT`, and last
//! `done OK FAILED SKIPPED`. The code is 0 when nothing failed.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::{inb, outb, outl};
use crate::hypercall;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const HOLDING_EMPTY: u8 = 1 << 5;
/// Port that ends the machine with the code written to it.
pub const DEBUG_EXIT: u16 = 0xf4;

static PASSED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);
static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// The serial port as a place to write to.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(LINE_STATUS) & HOLDING_EMPTY == 0 {}
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line that is no result.
pub fn comment(text: fmt::Arguments<'_>) {
    _ = writeln!(Console, "# {text}");
}

/// Compares two numbers.
pub fn check(name: &str, got: u64, expected: u64) {
    if got == expected {
        pass(name);
    } else {
        fail(name, format_args!("got {got:#x}, expected {expected:#x}"));
    }
}

/// Compares two byte strings.
pub fn check_bytes(name: &str, got: &[u8], expected: &[u8]) {
    if got == expected {
        pass(name);
    } else {
        fail(name, format_args!("got {got:x?}, expected {expected:x?}"));
    }
}

/// Compares two texts.
pub fn check_text(name: &str, got: &str, expected: &str) {
    if got == expected {
        pass(name);
    } else {
        fail(name, format_args!("got {got:?}, expected {expected:?}"));
    }
}

/// Checks a condition.
pub fn check_true(name: &str, condition: bool) {
    check(name, u64::from(condition), 1);
}

/// Says that a check was not made.
pub fn skip(name: &str, reason: &str) {
    SKIPPED.fetch_add(1, Ordering::Relaxed);
    _ = writeln!(Console, "skip {name}: {reason}");
}

/// Under QEMU's translator says that the check is not made, because the translator is known to differ from the
/// architecture there, and answers true.
pub fn tcg_lacks(name: &str) -> bool {
    let tcg = crate::cpu::under_tcg();
    if tcg {
        skip(name, "QEMU TCG differs from the architecture");
    }
    tcg
}

fn pass(name: &str) {
    PASSED.fetch_add(1, Ordering::Relaxed);
    _ = writeln!(Console, "ok {name}");
}

/// Records a failure in the caller's own words.
pub fn fail(name: &str, what: fmt::Arguments<'_>) {
    FAILED.fetch_add(1, Ordering::Relaxed);
    _ = writeln!(Console, "not ok {name}: {what}");
}

/// Prints the sums and ends the machine.
pub fn finish() -> ! {
    let failed = FAILED.load(Ordering::Relaxed);
    let passed = PASSED.load(Ordering::Relaxed);
    _ = writeln!(Console, "done {passed} {failed} {}", SKIPPED.load(Ordering::Relaxed));
    exit(u32::from(failed != 0))
}

/// Ends the machine.
pub fn exit(code: u32) -> ! {
    // The transmitter may still be shifting out the last line.
    while inb(LINE_STATUS) & (HOLDING_EMPTY << 1) == 0 {}
    outl(DEBUG_EXIT, code);
    // A machine without that port may have a doorbell.
    if hypercall::present() {
        hypercall::exit(code, 0, "");
    }
    loop {
        crate::cpu::halt_forever();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    FAILED.fetch_add(1, Ordering::Relaxed);
    _ = writeln!(Console, "not ok panic: {info}");
    exit(2)
}
