//! What leaves the guest, many times each, for whoever watches the monitor's processor time: `@begin NAME`, then
//! `@end NAME|COUNT|0`. The names are those of the group `exits` of the benchmarks.

#![no_std]
#![no_main]

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};

use harrier_bare_metal::report::Console;
use harrier_bare_metal::trap::{Block, set_handler};
use harrier_bare_metal::{Frame, apic, check_true, code64, cpu, guest_main, hypercall, run};

guest_main!(main);

/// Vector of the timer.
const TIMER: u8 = 0x40;
static TICKS: AtomicU64 = AtomicU64::new(0);

fn main() {
    let scale = harrier_bare_metal::boot::parameter("scale").unwrap_or(1).clamp(1, 1000);
    let kernel = |code: u64, rcx: u64| {
        run(Frame { rcx, rsi: apic::IOAPIC, ..Frame::kernel(code) }).vector
            == harrier_bare_metal::trap::vector::END
    };
    // The scratch register of the serial port: a device that does nothing more.
    let count = 20_000 * scale;
    let port = code64!("mov edx, 0x3ff", "2: out dx, al", "dec ecx", "jnz 2b");
    measure("port write", count, || kernel(port, count));
    let port = code64!("mov edx, 0x3ff", "2: in al, dx", "dec ecx", "jnz 2b");
    measure("port read", count, || kernel(port, count));
    // The index register of the I/O APIC.
    let store = code64!("2: mov dword ptr [rsi], 1", "dec ecx", "jnz 2b");
    measure("memory-mapped write", count, || kernel(store, count));
    let load = code64!("2: mov eax, [rsi]", "dec ecx", "jnz 2b");
    measure("memory-mapped read", count, || kernel(load, count));
    let count = 100_000 * scale;
    let cpuid = code64!("mov r8, rcx", "2: mov eax, 1", "cpuid", "dec r8", "jnz 2b");
    measure("cpuid", count, || kernel(cpuid, count));
    // Only Harrier has calls: FEATURES, with its block ready, does nothing more.
    if hypercall::present() && hypercall::features(0).0.is_ok() {
        let count = 20_000 * scale;
        measure("hypercall", count, || (0..count).all(|_| hypercall::ring_again()));
    }

    unsafe extern "C" fn tick(_: &mut Frame, _: &mut Block) {
        TICKS.fetch_add(1, Ordering::SeqCst);
        apic::eoi();
    }
    set_handler(TIMER.into(), Some(tick));
    apic::enable();
    apic::write(apic::TIMER_DIVIDE, 0b1011);
    apic::write(apic::LVT_TIMER, TIMER.into());
    let count = 2_000 * scale;
    measure("timer interrupt that ends a wait", count, || {
        for number in 1..=count {
            apic::write(apic::TIMER_INITIAL, 1000);
            while TICKS.load(Ordering::SeqCst) < number {
                cpu::wait_for_interrupt();
            }
        }
        true
    });
    _ = writeln!(Console, "@done");
}

/// Runs `body` between marks.
fn measure(name: &str, count: u64, body: impl FnOnce() -> bool) {
    _ = writeln!(Console, "@begin {name}");
    let ended = body();
    _ = writeln!(Console, "@end {name}|{count}|0");
    check_true(name, ended);
}
