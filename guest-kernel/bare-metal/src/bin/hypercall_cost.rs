//! What calls cost, beside the instructions that a call might replace. Loops are short, so that a busy host interrupts few. For each one line `cost ROUNDS TICKS NAME`; the
//! machine's owner knows how long a tick is. The first thing that it does is a MARK: what it took to boot.

#![no_std]
#![no_main]

use core::fmt::Write;

use harrier_bare_metal::apic;
use harrier_bare_metal::cpu::{self, inb, inl, msr, outb};
use harrier_bare_metal::hypercall::calls::{MemRange, PARK_NO_TIMEOUT};
use harrier_bare_metal::hypercall::{self, port};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke};
use harrier_bare_metal::report::Console;
use harrier_bare_metal::trap::{Block, set_handler};
use harrier_bare_metal::{Frame, check_true, guest_main};

guest_main!(main);

const VECTOR: u32 = 0x61;

unsafe extern "C" fn end_interrupt(_: &mut Frame, _: &mut Block) {
    apic::eoi();
}

fn main() {
    hypercall::mark(1, "", 0);
    apic::enable();
    apic::enable_x2apic();
    set_handler(VECTOR.into(), Some(end_interrupt));

    cost("a port read", 5_000, |_| inl(port::BASE) == port::SIGNATURE);
    hypercall::features(0);
    cost("a call: FEATURES with its block ready", 5_000, |_| hypercall::ring_again());
    cost("FEATURES with its block written and read", 300, |_| hypercall::features(0).0.is_ok());
    cost("CLOCK", 300, |_| hypercall::clock().0.is_ok());
    cost("MARK", 200, |n| hypercall::mark(0, "cost", n).is_ok());
    cost("CONSOLE of 1 byte", 200, |_| hypercall::console(b"\n").1 == 1);
    let text = unsafe { core::slice::from_raw_parts(frame(0) as *const u8, 4096) };
    for n in 0..512 {
        poke(frame(0) + n * 8, 0x0a23_2323_2323_2323);
    }
    cost("CONSOLE of 4 KiB", 4, |_| hypercall::console(text).1 == 4096);
    cost("the serial port for 1 byte", 200, |_| {
        while inb(0x3fd) & 0x20 == 0 {}
        outb(0x3f8, b'\n');
        true
    });
    cost("the serial port for 4 KiB", 4, |_| {
        text.iter().for_each(|&byte| {
            while inb(0x3fd) & 0x20 == 0 {}
            outb(0x3f8, byte);
        });
        true
    });
    cost("PARK and back by an interrupt that is pending", 300, |_| {
        apic::send_ipi(0, 1 << 18 | VECTOR);
        hypercall::park(PARK_NO_TIMEOUT, 0).is_ok()
    });
    cost("HLT and back by an interrupt that is pending", 300, |_| {
        apic::send_ipi(0, 1 << 18 | VECTOR);
        cpu::wait_for_interrupt();
        true
    });
    cost("PARK with a time of 0", 300, |_| hypercall::park(0, VECTOR).is_ok());
    cost("a timer set by its register, and HLT", 300, |_| {
        apic::write(apic::LVT_TIMER, VECTOR);
        apic::write(apic::TIMER_INITIAL, 1);
        cpu::wait_for_interrupt();
        true
    });
    cost("writing 512 pages", 4, |_| {
        (0..512).for_each(|n| poke(frame(512 + n), 1));
        true
    });
    cost("MEM_RELEASE of 512 pages in a piece, written before", 4, |_| {
        (0..512).for_each(|n| poke(frame(512 + n), 1));
        hypercall::mem_release(&[MemRange { gpa: frame(512), len: 512 * 4096 }]).0.is_ok()
    });
    cost("MEM_RELEASE of 512 pages in 32 pieces, written before", 4, |_| {
        (0..512).for_each(|n| poke(frame(512 + n), 1));
        let ranges: [MemRange; 32] =
            core::array::from_fn(|n| MemRange { gpa: frame(512 + 16 * n as u64), len: 16 * 4096 });
        hypercall::mem_release(&ranges).0.is_ok()
    });

    // What calls of classical paravirtualization would replace.
    if cpu::cpuid(1, 0).ecx >> 24 & 1 == 1 {
        apic::write(apic::LVT_TIMER, 2 << 17 | VECTOR);
        cost("timer: WRMSR of the TSC deadline", 5_000, |_| {
            cpu::wrmsr(msr::TSC_DEADLINE, u64::MAX);
            true
        });
        cpu::wrmsr(msr::TSC_DEADLINE, 0);
    }
    apic::write(apic::LVT_TIMER, apic::MASKED);
    cost("timer: the initial count", 5_000, |_| {
        apic::write(apic::TIMER_INITIAL, u32::MAX);
        true
    });
    apic::write(apic::TIMER_INITIAL, 0);
    let page = TEST_BASE + 0x40_0000;
    map(page, frame(0) | entry::P | entry::W);
    cost("TLB: INVLPG and an access", 5_000, |_| {
        cpu::invlpg(page);
        peek(page) != 0
    });
    cost("TLB: MOV to CR3 and an access", 5_000, |_| {
        cpu::set_cr3(cpu::cr3());
        peek(page) != 0
    });
    for n in 0..64 {
        map(page + n * 4096, frame(n) | entry::P | entry::W);
    }
    let table = entry(page, 1) as u64;
    cost("page tables: 64 entries and 64 INVLPG", 200, |round| {
        for n in 0..64 {
            poke(table + n * 8, frame(n ^ (round & 1)) | entry::P | entry::W);
            cpu::invlpg(page + n * 4096);
        }
        true
    });
}

/// Does it so many times and prints what it took.
fn cost(name: &str, rounds: u64, mut body: impl FnMut(u64) -> bool) {
    let start = cpu::rdtsc();
    let ended = (0..rounds).all(&mut body);
    let ticks = cpu::rdtsc() - start;
    _ = writeln!(Console, "cost {rounds} {ticks} {name}");
    check_true(name, ended);
}
