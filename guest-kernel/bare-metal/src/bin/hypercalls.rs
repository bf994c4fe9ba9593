//! Hypercalls: discovery, every call, every error, idle that wakes on time and on interrupts, events from the host.
//! Elsewhere than in Harrier there is no doorbell, and the guest only says so.
//!
//! `mode=1` on the command line ends the machine by EXIT, `mode=2` waits for an event from the host, `mode=3` makes calls
//! without end.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};

use harrier_bare_metal::apic;
use harrier_bare_metal::boot::parameter;
use harrier_bare_metal::cpu::{self, flags};
use harrier_bare_metal::hypercall::calls::{CONSOLE_MAX, MEM_RELEASE_MAX_RANGES, MemRange, PARK_NO_TIMEOUT};
use harrier_bare_metal::hypercall::{self, Block, Status, block, code, features, number, port};
use harrier_bare_metal::paging::{frame, peek, peek8, poke, poke_bytes, user, user_stack};
use harrier_bare_metal::trap::{self, set_handler, vector};
use harrier_bare_metal::{Frame, check, check_true, code64, comment, guest_main, run, skip};

guest_main!(main);

const WAKE: u32 = 0x51;
const OTHER: u32 = 0x61;
const EVENT: u32 = 0x71;
const LEVEL: u32 = 1 << 15;
/// Between the guest's end of memory and what is at 3 GiB.
const NO_MEMORY: u64 = 0xb000_0000;

fn main() {
    if !hypercall::present() {
        skip("hypercalls", "this machine has no doorbell");
        return;
    }
    match parameter("mode") {
        Some(1) => leave(),
        Some(2) => wait_for_event(),
        Some(3) => storm(),
        _ => {
            discovery();
            errors();
            user_mode();
            sequence_numbers();
            console();
            marks();
            clock();
            memory();
            idle();
        }
    }
}

fn discovery() {
    let offered = features::CONSOLE
        | features::MARK
        | features::CLOCK
        | features::PARK
        | features::MEM_RELEASE
        | features::EXIT;
    check("the version", hypercall::register(port::REG_VERSION).into(), 0x1_0002);
    let word = u64::from(hypercall::register(port::REG_FEATURES_LOW))
        | u64::from(hypercall::register(port::REG_FEATURES_HIGH)) << 32;
    check("all calls that are not reserved are offered", word & offered, offered);
    let (answer, result) = hypercall::features(0);
    check("FEATURES", answer.code(), code(Status::Ok));
    check("its feature word is the register's", result.features, word);
    check(
        "its shared page is the register's",
        result.shared_page,
        u64::from(hypercall::register(port::REG_SHARED_PAGE)) << 12,
    );
    check(
        "its interrupt is the register's",
        result.interrupt.into(),
        hypercall::register(port::REG_INTERRUPT).into(),
    );
    check("its caps are the ABI's", result.console_max.into(), CONSOLE_MAX.into());
    check("and for ranges", result.mem_release_max_ranges.into(), MEM_RELEASE_MAX_RANGES.into());
    check("the page is clear before the first CLOCK", peek(result.shared_page), 0);
    check_true("ACPI names the device", in_acpi_tables(b"HARV0001"));
    check("other widths read ones", cpu::inb(port::BASE).into(), 0xff);
}

/// Whether these bytes are somewhere in the area of the ACPI tables.
fn in_acpi_tables(name: &[u8]) -> bool {
    (0xe_0000..0xf_0000u64).any(|at| name.iter().zip(at..).all(|(byte, at)| peek8(at) == *byte))
}

fn errors() {
    let good = block(number::FEATURES, &[0; 8]);
    for (name, bad, status) in [
        ("an unknown number", Block { number: 99, ..good }, Status::UnknownCall),
        ("a foreign version", Block { version: 2, ..good }, Status::BadVersion),
        ("a wrong length", Block { args_len: 4, ..good }, Status::BadLength),
        ("a channel too many", Block { channel: 256, ..good }, Status::BadArgument),
        ("a flag", Block { flags: 1, ..good }, Status::BadArgument),
        (
            "a call that is not offered",
            Block { number: number::CHECKPOINT, args_len: 0, ..good },
            Status::Unsupported,
        ),
    ] {
        check(name, hypercall::ring(&bad).code(), code(status));
    }
    let rejected = hypercall::register(port::REG_REJECTED);
    for place in [NO_MEMORY / 64, u64::from(u32::MAX)] {
        hypercall::set_register(port::REG_DOORBELL, place as u32);
    }
    check(
        "blocks outside memory are counted",
        hypercall::register(port::REG_REJECTED).into(),
        u64::from(rejected) + 2,
    );
    check("and the next call is answered", hypercall::ring(&good).code(), code(Status::Ok));
}

/// User mode does not reach the port: the processor refuses it before any device hears of it.
fn user_mode() {
    let rejected = hypercall::register(port::REG_REJECTED);
    let knock = user(code64!("mov edx, 0x5a0", "mov eax, 0xffffffff", "out dx, eax"));
    let end = run(Frame::user(knock, user_stack()));
    check("user mode gets #GP at the doorbell", end.vector, vector::GP);
    let look = user(code64!("mov edx, 0x5a0", "in eax, dx"));
    check("and at the signature", run(Frame::user(look, user_stack())).vector, vector::GP);
    check("nobody was called", hypercall::register(port::REG_REJECTED).into(), rejected.into());
}

fn sequence_numbers() {
    let numbered =
        |sequence| Block { sequence, channel: 3, ..block(number::CLOCK, &cpu::rdtsc().to_le_bytes()) };
    let first = hypercall::ring(&numbered(10));
    check("a numbered call", first.code(), code(Status::Ok));
    let again = hypercall::ring(&numbered(10));
    check("the same number again", again.code(), code(Status::Ok));
    check_true("has the same answer", again.result == first.result && again.result_len == first.result_len);
    check("an older number", hypercall::ring(&numbered(9)).code(), code(Status::Stale));
    let next = hypercall::ring(&numbered(11));
    check_true("the next one is made", next.is_ok() && next.result != first.result);
}

fn console() {
    let text = b"# these words came by CONSOLE\n";
    let (answer, accepted) = hypercall::console(text);
    check("CONSOLE", answer.code(), code(Status::Ok));
    check("takes all", accepted.into(), text.len() as u64);
    let args = |gpa: u64, len: u32| hypercall::calls::ConsoleArgs { gpa, len, reserved: 0 }.to_bytes();
    for (name, args, status) in [
        ("more than its cap", args(frame(0), CONSOLE_MAX + 1), Status::BadLength),
        ("from where there is no memory", args(NO_MEMORY, 1), Status::BadPointer),
        ("from beyond the last address", args(u64::MAX, 2), Status::BadPointer),
    ] {
        check(name, hypercall::ring(&block(number::CONSOLE, &args)).code(), code(status));
    }
}

fn marks() {
    check("MARK", hypercall::mark(1, "", 7).code(), code(Status::Ok));
    check("with a name", hypercall::mark(0, "half-way", 8).code(), code(Status::Ok));
    check("of an unknown phase", hypercall::mark(77, "", 0).code(), code(Status::BadArgument));
    check("without phase and name", hypercall::mark(0, "", 0).code(), code(Status::BadArgument));
}

/// Guest time now. The machine may be restored elsewhere at any moment: the page counts, not a copy of it.
fn clock() {
    let (answer, first) = hypercall::clock();
    let at = first.clock_page;
    check("CLOCK", answer.code(), code(Status::Ok));
    let page = hypercall::read_clock(at);
    check("the page is valid, the TSC reliable", page.flags.into(), 3);
    comment(format_args!("tsc {} kHz, lapic timer {} kHz", page.tsc_khz, page.lapic_timer_khz));
    let second = hypercall::now(at);
    check_true("guest time has gone on since the call", second >= first.monotonic_ns);
    check_true("the wall clock is this century's", first.wall_ns > 1_700_000_000_000_000_000);
    let wall = (hypercall::now(at) as i64).wrapping_add(hypercall::read_clock(at).wall_offset_ns);
    check_true("and on the page", wall >= first.wall_ns);
    let (answer, third) = hypercall::clock();
    check_true("a second call does not go back", answer.is_ok() && third.monotonic_ns >= second);
    let again = hypercall::read_clock(at);
    // A pause does, and may come in between.
    let keeps_the_base = || {
        let before = hypercall::read_clock(at);
        hypercall::clock().0.is_ok() && hypercall::read_clock(at).tsc_base == before.tsc_base
    };
    check_true("nor does it move the base", (0..50).any(|_| keeps_the_base()));
    check("the sequence is even", u64::from(again.sequence) & 1, 0);
    check_true("and another one", again.sequence != page.sequence);
    timer_frequency(at);
}

/// Counts the local APIC's timer against the TSC. The host may take the processor away in between: it has more than one
/// try.
fn timer_frequency(clock_page: u64) {
    apic::enable();
    apic::write(apic::TIMER_DIVIDE, 0xb);
    let agrees = || {
        let page = hypercall::read_clock(clock_page);
        apic::write(apic::TIMER_INITIAL, u32::MAX);
        let start = cpu::rdtsc();
        let ticks = u64::from(page.tsc_khz) * 2;
        while cpu::rdtsc().wrapping_sub(start) < ticks {
            cpu::pause();
        }
        let counted = u64::from(u32::MAX - apic::read(apic::TIMER_CURRENT));
        let passed = u128::from(cpu::rdtsc().wrapping_sub(start));
        let expected = (passed * u128::from(page.lapic_timer_khz) / u128::from(page.tsc_khz)) as u64;
        counted.abs_diff(expected) < expected / 10
    };
    check_true("the local APIC's timer runs at the page's frequency", (0..50).any(|_| agrees()));
    apic::write(apic::TIMER_INITIAL, 0);
}

fn memory() {
    let range = |n: u64, pages: u64| MemRange { gpa: frame(n), len: pages * 4096 };
    for n in 8..14 {
        poke(frame(n), n);
        poke(frame(n) + 4088, n);
    }
    let (answer, result) = hypercall::mem_release(&[range(9, 1), range(11, 2)]);
    check("MEM_RELEASE", answer.code(), code(Status::Ok));
    check("all ranges are done", result.done.into(), 2);
    check("and counted", result.released_bytes, 3 * 4096);
    for (n, expected) in [(8, 8), (9, 0), (10, 10), (11, 0), (12, 0), (13, 13)] {
        check("the first word of a page", peek(frame(n)), expected);
        check("the last word of a page", peek(frame(n) + 4088), expected);
    }
    poke(frame(9), 5);
    check("a released page is used again", peek(frame(9)), 5);

    // Code in a released page is gone, and what is executed is zeros: add [rax], al, up to the next page.
    poke_bytes(frame(20), &[0xb9, 1, 0, 0, 0, 0xcd, 0xff]);
    poke_bytes(frame(21), &[0xcd, 0xff]);
    let execute = || run(Frame { rax: frame(22), ..Frame::kernel(frame(20)) });
    check("code in a page", execute().rcx, 1);
    check("the page is released", hypercall::mem_release(&[range(20, 1)]).0.code(), code(Status::Ok));
    let end = execute();
    check("its code is gone", end.rcx, 0);
    check("and zeros were executed", end.rip, frame(21) + 2);

    for (name, ranges, status, done) in [
        ("an empty range", [range(8, 1), range(8, 0)], Status::BadLength, 1),
        ("no page boundary", [range(8, 1), MemRange { gpa: frame(8) + 8, len: 4096 }], Status::BadPointer, 1),
        ("a piece of a page", [MemRange { gpa: frame(8), len: 4095 }, range(8, 1)], Status::BadLength, 0),
        ("no memory", [range(8, 1), MemRange { gpa: NO_MEMORY, len: 4096 }], Status::BadPointer, 1),
        ("past the end", [range(8, 1), MemRange { gpa: frame(8), len: 1 << 27 }], Status::BadPointer, 1),
        ("past the last address", [range(8, 1), MemRange { gpa: !0xfff, len: 8192 }], Status::BadPointer, 1),
        ("more than the cap", [range(8, 1), MemRange { gpa: 0, len: 1 << 28 }], Status::BadLength, 1),
    ] {
        let (answer, result) = hypercall::mem_release(&ranges);
        check(name, answer.code(), code(status));
        check("the ranges before it are done", result.done.into(), done);
    }
    let args = |list_gpa, count| hypercall::calls::MemReleaseArgs { list_gpa, count, reserved: 0 }.to_bytes();
    for (name, args, status) in [
        ("too many ranges", args(frame(8), MEM_RELEASE_MAX_RANGES + 1), Status::BadLength),
        ("a list outside memory", args(NO_MEMORY, 1), Status::BadPointer),
        ("a list at an odd address", args(frame(8) + 4, 1), Status::BadPointer),
    ] {
        check(name, hypercall::ring(&block(number::MEM_RELEASE, &args)).code(), code(status));
    }
}

static WOKEN: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn note(frame: &mut Frame, _: &mut trap::Block) {
    WOKEN.fetch_or(1 << (frame.vector >> 4), Ordering::SeqCst);
    apic::eoi();
}

/// Which of the vectors came since the last look, a bit each: 5, 6 and 7.
fn woken() -> u64 {
    WOKEN.swap(0, Ordering::SeqCst).into()
}

fn idle() {
    apic::enable();
    for n in [WAKE, OTHER] {
        set_handler(n.into(), Some(note));
    }
    let (_, clock) = hypercall::clock();
    for timeout_ns in [0, 1, 100_000, 3_000_000] {
        let before = hypercall::now(clock.clock_page);
        let answer = hypercall::park(timeout_ns, WAKE);
        let passed = hypercall::now(clock.clock_page).saturating_sub(before);
        check("PARK with a time", answer.code(), code(Status::Ok));
        check("wakes by its vector", woken(), 1 << 5);
        // The clocks of guest and host may differ a little.
        check_true("and not before its time", passed + timeout_ns / 100 >= timeout_ns);
    }
    let ipi = |vector: u32| apic::send_ipi(0, 1 << 18 | vector);
    ipi(OTHER);
    check("PARK with an interrupt pending", hypercall::park(PARK_NO_TIMEOUT, 0).code(), code(Status::Ok));
    check("wakes at once", woken(), 1 << 6);
    // The local APIC's own timer, whose interrupt comes while the processor waits.
    apic::write(apic::TIMER_DIVIDE, 0xb);
    let by_timer = (0..20).filter(|_| {
        apic::write(apic::LVT_TIMER, OTHER);
        apic::write(apic::TIMER_INITIAL, 50_000);
        hypercall::park(PARK_NO_TIMEOUT, WAKE);
        woken() == 1 << 6
    });
    check("PARK wakes by the local timer", by_timer.count() as u64, 20);
    let by_time = (0..200).filter(|n| {
        hypercall::park(n * 100, WAKE);
        woken() == 1 << 5
    });
    check("two hundred short waits end", by_time.count() as u64, 200);
    ipi(OTHER);
    hypercall::park(3_600_000_000_000, WAKE);
    check("an interrupt comes before an hour's wait is over", woken(), 1 << 6);
    hypercall::park(1, WAKE);
    check("a shorter time replaces it", woken(), 1 << 5);
    let args = |apic_id, vector| hypercall::calls::ParkArgs { timeout_ns: 0, apic_id, vector }.to_bytes();
    for (name, args) in [
        ("an exception's vector", args(0, 31)),
        ("a vector too many", args(0, 256)),
        ("a processor too many", args(256, WAKE)),
    ] {
        check(name, hypercall::ring(&block(number::PARK, &args)).code(), code(Status::BadArgument));
    }
}

/// Ends with a code of its own, after words that must arrive.
fn leave() {
    let args = hypercall::calls::ExitArgs { code: 256, reason: 0, message: [0; 32] }.to_bytes();
    check("a code above 255", hypercall::ring(&block(number::EXIT, &args)).code(), code(Status::BadArgument));
    hypercall::console(b"last words\n");
    hypercall::exit(42, 1, "as asked");
    check_true("EXIT does not come back", false);
}

/// Routes the doorbell's interrupt, says that it waits, and reports which event woke it.
fn wait_for_event() {
    apic::enable();
    apic::ioapic_route(hypercall::register(port::REG_INTERRUPT), 0, LEVEL | EVENT);
    unsafe extern "C" fn acknowledge(_: &mut Frame, _: &mut trap::Block) {
        let pending = hypercall::register(port::REG_EVENTS);
        SEEN.fetch_or(pending, Ordering::SeqCst);
        TIMES.fetch_add(1, Ordering::SeqCst);
        hypercall::set_register(port::REG_EVENTS, pending);
        apic::eoi();
    }
    static SEEN: AtomicU32 = AtomicU32::new(0);
    static TIMES: AtomicU32 = AtomicU32::new(0);
    set_handler(EVENT.into(), Some(acknowledge));
    check("no event is pending", hypercall::register(port::REG_EVENTS).into(), 0);
    hypercall::mark(8, "", 0);
    while SEEN.load(Ordering::SeqCst) & port::event::CLOCK == 0 {
        hypercall::park(PARK_NO_TIMEOUT, 0);
    }
    check("the event", SEEN.load(Ordering::SeqCst).into(), port::event::CLOCK.into());
    check("came once", TIMES.load(Ordering::SeqCst).into(), 1);
    check("and is gone", hypercall::register(port::REG_EVENTS).into(), 0);
    check("interrupts are off again", cpu_flags() & flags::IF, 0);
}

fn cpu_flags() -> u64 {
    run(Frame::kernel(code64!("pushfq", "pop rax"))).rax
}

/// Calls that are wrong in every way, until somebody ends the machine.
fn storm() {
    hypercall::mark(8, "", 0);
    let mut number = 0u16;
    loop {
        hypercall::ring(&block(number, &[0xff; 48]));
        hypercall::set_register(port::REG_DOORBELL, u32::MAX - u32::from(number));
        number = number.wrapping_add(1);
    }
}
