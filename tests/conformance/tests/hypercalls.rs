//! Hypercalls as the machine's owner sees them, on every engine: ends by EXIT, marks, events from the host, and a storm of
//! calls. What the guest sees, it checks itself (`hypercalls` among the bare-metal guests).

use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_conformance::{DEADLINE, Guest, HYPERCALLS, check, engines, run, run_with};
use harrier_engine::{Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use harrier_hypercall_abi::port::event;
use harrier_machine::{MachineEnd, MachineHandle};
use libtest_mimic::{Arguments, Failed, Trial};

type Test = fn(&dyn Engine) -> Result<(), Failed>;

const HELLO: Guest = Guest { name: "hello", cpus: 1, checks: 0 };

const TESTS: &[(&str, Test)] = &[
    ("the_smallest_guest_says_hello_and_gives_its_code", hello),
    ("exit_carries_code_reason_and_words_after_the_console", exit),
    ("marks_parks_and_released_memory_are_reported", report),
    ("an_event_of_the_host_wakes_a_parked_guest", event_wakes),
    ("a_parked_guest_can_be_paused_and_stopped", stop_parked),
    ("a_storm_of_wrong_calls_ends_when_the_owner_says_so", storm),
];

fn main() {
    let mut trials = Vec::new();
    for engine in engines() {
        let engine: &'static dyn Engine = Box::leak(engine);
        let available = match engine.probe() {
            Probe::Available { .. } => true,
            Probe::Unavailable { reason } => {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                false
            }
        };
        for (name, test) in TESTS {
            let trial = Trial::test(format!("{}::{name}", engine.name()), move || test(engine));
            trials.push(trial.with_ignored_flag(!available));
        }
    }
    trials.push(kvm_alone());
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Where KVM emulates kernel mode, the software processor has it in the tests above. Here KVM keeps it, with its own local
/// APIC, as on hardware: a wait that a device asks for is KVM's to make.
fn kvm_alone() -> Trial {
    let engine = KvmEngine::default().with_assistant(Arc::new(SoftEngine));
    let available = matches!(engine.probe(), Probe::Available { .. });
    let run = move || {
        check(&engine, &HYPERCALLS)?;
        Ok(())
    };
    Trial::test("kvm-alone::every_call_and_every_error", run).with_ignored_flag(!available)
}

fn expect<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), Failed> {
    if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}").into()) }
}

fn hello(engine: &dyn Engine) -> Result<(), Failed> {
    let outcome = run(engine, &HELLO, "code=3", DEADLINE)?;
    let end = MachineEnd::GuestExit { code: 3, reason: 0, message: String::new() };
    expect((outcome.report.end, outcome.transcript.text.as_str()), (end, "hello\n"))?;
    let marks = &outcome.report.hypercalls.marks;
    expect((marks.len(), marks.first().map(|mark| mark.label())), (1, Some("kernel".to_owned())))
}

fn exit(engine: &dyn Engine) -> Result<(), Failed> {
    let outcome = run(engine, &HYPERCALLS, "mode=1", DEADLINE)?;
    let end = MachineEnd::GuestExit { code: 42, reason: 1, message: "as asked".to_owned() };
    expect(outcome.report.end, end)?;
    expect(outcome.transcript.text.lines().last(), Some("last words"))
}

fn report(engine: &dyn Engine) -> Result<(), Failed> {
    let mut reports = Vec::new();
    let outcome = run_with(engine, &HYPERCALLS, "", DEADLINE, |handle| {
        handle.wait_for_end(Some(Instant::now() + DEADLINE));
        reports.push(handle.hypercalls());
    })?;
    outcome.transcript.verdict()?;
    reports.push(outcome.report.hypercalls);
    for report in reports {
        let marks: Vec<_> = report.marks.iter().map(|mark| (mark.label(), mark.value)).collect();
        expect(marks, vec![("kernel".to_owned(), 7), ("half-way".to_owned(), 8)])?;
        if !report.marks.is_sorted_by_key(|mark| mark.at) {
            return Err("marks are out of order".into());
        }
        expect(report.console_calls, 1)?;
        // Four waits with a time, one with an interrupt pending, twenty by the local timer, two hundred short ones, two more.
        expect(report.parks, 4 + 1 + 20 + 200 + 2)?;
        // 3 pages, the page with code, and one page before the bad range of six lists.
        expect(report.released_bytes, (3 + 1 + 6) * 4096)?;
    }
    Ok(())
}

/// Waits for the guest's mark that it is ready; it parks next.
fn wait_until_ready(handle: &MachineHandle) -> bool {
    let give_up = Instant::now() + DEADLINE;
    while handle.hypercalls().marks.is_empty() {
        if Instant::now() > give_up {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn event_wakes(engine: &dyn Engine) -> Result<(), Failed> {
    let outcome = run_with(engine, &HYPERCALLS, "mode=2", DEADLINE, |handle| {
        if wait_until_ready(handle) {
            handle.signal_guest(event::CLOCK);
        }
    })?;
    outcome.transcript.verdict()?;
    expect(outcome.report.end, MachineEnd::DebugExit(0))
}

fn stop_parked(engine: &dyn Engine) -> Result<(), Failed> {
    let mut paused = false;
    let outcome = run_with(engine, &HYPERCALLS, "mode=2", DEADLINE, |handle| {
        paused = wait_until_ready(handle) && handle.pause();
        handle.resume();
        handle.stop();
    })?;
    expect((paused, outcome.report.end), (true, MachineEnd::Stopped))
}

fn storm(engine: &dyn Engine) -> Result<(), Failed> {
    let outcome = run_with(engine, &HYPERCALLS, "mode=3", DEADLINE, |handle| {
        wait_until_ready(handle);
        std::thread::sleep(Duration::from_millis(200));
        handle.stop();
    })?;
    expect(outcome.report.end, MachineEnd::Stopped)?;
    // Another machine works as before.
    check(engine, &HYPERCALLS)?;
    Ok(())
}
