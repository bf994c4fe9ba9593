//! The lives of a machine as its guest sees them: CHECKPOINT, which returns twice; QUIESCE and its events; IDENTITY; the
//! VM generation id.
//!
//! `mode=1` takes a checkpoint, `mode=2` comes to rest when it is asked to, `mode=3` takes its time, `mode=4` watches the
//! clock until it is stopped, `mode=5` waits for the interrupt of another generation id, `mode=6`
//! asks for the clock with another machine's TSC. The first one says as its last
//! comment as whom it has returned.

#![no_std]
#![no_main]

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering};

use harrier_bare_metal::boot::parameter;
use harrier_bare_metal::hypercall::calls::{
    CheckpointArgs, CheckpointResult, IdentityResult, QUIESCE_ASK, QUIESCE_READY, QuiesceArgs, QuiesceResult,
    ROLE_ORIGINAL,
};
use harrier_bare_metal::hypercall::port::event;
use harrier_bare_metal::hypercall::{
    self, Answer, Block, Status, block, code, features, mark, number, port, set_register,
};
use harrier_bare_metal::paging::{peek, peek8};
use harrier_bare_metal::{Frame, apic, check, check_true, comment, cpu, guest_main, skip, trap};

guest_main!(main);

fn main() {
    if !hypercall::present() {
        skip("lives", "this machine has no doorbell");
        return;
    }
    match parameter("mode") {
        Some(1) => checkpoint(),
        Some(2) => rest(),
        Some(4) => watch_the_clock(),
        Some(5) => hear_of_another_generation(),
        Some(6) => ask_for_the_clock_in_between(),
        _ => take_time(),
    }
}

fn events() -> u32 {
    hypercall::register(port::REG_EVENTS)
}

fn identity(sequence: u64) -> IdentityResult {
    let answer = hypercall::ring(&Block { sequence, channel: 1, ..block(number::IDENTITY, &[]) });
    check("IDENTITY", answer.code(), code(Status::Ok));
    IdentityResult::from_bytes(&answer.result)
}

/// Where ACPI says that the generation id is: a package of two double words named ADDR.
fn generation_id() -> Option<[u64; 2]> {
    let dword = |at: u64| (0..4).fold(0, |value, byte| value | u64::from(peek8(at + byte)) << (8 * byte));
    let mut places = 0xe_0000..0xf_0000u64;
    let at = places.find(|at| b"ADDR".iter().zip(*at..).all(|(byte, at)| peek8(at) == *byte))?;
    // A package's head, its length and count, and the two numbers with a prefix each: 0x0c for 32 bits, 0x00 is zero.
    let low = (at..at + 12).find(|at| peek8(*at) == 0x0c)?;
    let address = dword(low + 1);
    Some([peek(address), peek(address + 8)])
}

fn checkpoint() {
    hypercall::features(features::IDENTITY);
    let (first, second) = (identity(5), identity(5));
    check("nothing led to a machine that was booted", first.generation, 0);
    check("which is the original", first.role.into(), ROLE_ORIGINAL.into());
    check_true("its randomness is other each time", first.entropy != second.entropy);
    check_true("and not zero", first.entropy != [0; 32]);
    let id = generation_id();
    check_true("ACPI names the generation id", id.is_some_and(|id| id != [0, 0]));
    let wrong = CheckpointArgs { flags: 0, reserved: 1 }.to_bytes();
    let refused = hypercall::ring(&block(number::CHECKPOINT, &wrong));
    check("a reserved field", refused.code(), code(Status::BadArgument));

    let mut call =
        Block { sequence: 9, channel: 2, ..block(number::CHECKPOINT, &CheckpointArgs::default().to_bytes()) };
    let mut answer = hypercall::ring(&call);
    if answer.code() == code(Status::HostFailed) {
        comment(format_args!("refused"));
        call.sequence += 1;
        answer = hypercall::ring(&call);
    }
    check("CHECKPOINT", answer.code(), code(Status::Ok));
    let me = CheckpointResult::from_bytes(&answer.result);
    let now = identity(5);
    check("IDENTITY knows the same generation", now.generation, me.generation);
    check("and the same clone", now.clone_index.into(), me.clone_index.into());
    if me.role == ROLE_ORIGINAL {
        check("no event in the original", events().into(), 0);
        check_true("whose generation id stays", generation_id() == id);
    } else {
        check("IDENTITY knows the same role", now.role.into(), me.role.into());
        check("the event GENERATION", events().into(), event::GENERATION.into());
        check_true("another generation id", generation_id() != id);
        let again = hypercall::ring(&call);
        check("the call once more", again.code(), code(Status::Ok));
        check_true("is answered from memory", again.result == answer.result);
        set_register(port::REG_EVENTS, event::GENERATION);
        check("the event is gone", events().into(), 0);
    }
    comment(format_args!("returned as {} {} {}", me.role, me.generation, me.clone_index));
}

fn quiesce(op: u32, request: u64) -> (Answer, QuiesceResult) {
    let answer =
        hypercall::ring(&block(number::QUIESCE, &QuiesceArgs { op, reserved: 0, request }.to_bytes()));
    (answer, QuiesceResult::from_bytes(&answer.result))
}

fn wait_for(event: u32) {
    while events() & event == 0 {
        spin_loop();
    }
    set_register(port::REG_EVENTS, event);
}

fn listen() {
    hypercall::features(features::QUIESCE);
    let (answer, wanted) = quiesce(QUIESCE_ASK, 0);
    check("QUIESCE", answer.code(), code(Status::Ok));
    check("nothing is asked", wanted.request, 0);
    let (answer, _) = quiesce(QUIESCE_READY, 1);
    check("READY for nothing", answer.code(), code(Status::Stale));
    mark(8, "", 0);
    wait_for(event::QUIESCE);
}

fn rest() {
    listen();
    let (_, wanted) = quiesce(QUIESCE_ASK, 0);
    check_true("there is a request", wanted.request != 0);
    check_true("with some time", wanted.remaining_ms > 0);
    let (answer, _) = quiesce(QUIESCE_READY, wanted.request + 1);
    check("READY for another one", answer.code(), code(Status::Stale));
    let (answer, _) = quiesce(QUIESCE_READY, wanted.request);
    check("READY", answer.code(), code(Status::Ok));
    wait_for(event::THAW);
    let (_, wanted) = quiesce(QUIESCE_ASK, 0);
    check("nothing is asked any more", wanted.request, 0);
    check("and nothing pending", events().into(), 0);
}

/// The pin of the I/O APIC where ACPI says that another generation id is told.
const GENERATION_PIN: u32 = 1;
const TOLD: u32 = 0x61;
static TIMES_TOLD: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn told(_: &mut Frame, _: &mut trap::Block) {
    TIMES_TOLD.fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

fn hear_of_another_generation() {
    if parameter("identity").is_some() {
        hypercall::features(features::IDENTITY);
    }
    apic::enable();
    trap::set_handler(TOLD.into(), Some(told));
    apic::ioapic_route(GENERATION_PIN, 0, TOLD);
    let id = generation_id();
    cpu::sti();
    mark(8, "", 0);
    while TIMES_TOLD.load(Ordering::SeqCst) == 0 && events() & event::GENERATION == 0 {
        spin_loop();
    }
    check_true("another generation id", generation_id() != id);
    comment(format_args!("acpi {} doorbell {}", TIMES_TOLD.load(Ordering::SeqCst), events()));
}

/// Whose TSC was read in one machine may ask for the clock in the next.
fn ask_for_the_clock_in_between() {
    hypercall::features(features::IDENTITY);
    let tsc = cpu::rdtsc();
    mark(8, "", 0);
    while events() & event::GENERATION == 0 {
        spin_loop();
    }
    let (answer, clock) = hypercall::clock_at(tsc);
    check("CLOCK", answer.code(), code(Status::Ok));
    let now = hypercall::now(clock.clock_page);
    check_true("guest time goes on from the answer", now >= clock.monotonic_ns);
    check_true("by less than an hour", now - clock.monotonic_ns < 3_600_000_000_000);
}

fn watch_the_clock() {
    let (answer, clock) = hypercall::clock();
    check("CLOCK", answer.code(), code(Status::Ok));
    mark(8, "", 0);
    let mut last = 0;
    loop {
        let now = hypercall::now(clock.clock_page);
        if now < last {
            check("guest time goes on", now, last);
            return;
        }
        last = now;
        if events() & event::CLOCK != 0 {
            set_register(port::REG_EVENTS, event::CLOCK);
            comment(format_args!("another wall clock"));
        }
    }
}

fn take_time() {
    listen();
    let (_, wanted) = quiesce(QUIESCE_ASK, 0);
    wait_for(event::THAW);
    let (answer, _) = quiesce(QUIESCE_READY, wanted.request);
    check("READY after all", answer.code(), code(Status::Stale));
    check("and nothing pending", events().into(), 0);
}
