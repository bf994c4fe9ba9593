//! Checkpoints from inside, requests to come to rest, and who a machine is, on every engine. What the guest sees, it checks
//! itself (`lives` among the bare-metal guests).

use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use harrier_conformance::{DEADLINE, Guest, MEMORY_BYTES, Transcript, engines, program};
use harrier_engine::{CpuModel, Engine, Probe};
use harrier_hypercall_abi::shared_page::{CLOCK_OFFSET, ClockPage};
use harrier_machine::boot::{Boot, ElfEntry, FileImage};
use harrier_machine::layout::SHARED_PAGE;
use harrier_machine::snapshot::{Kind, Report, Request, Restoration, Role, TakeError};
use harrier_machine::{Machine, MachineBuilder, MachineConfig, MachineEnd, MachineHandle, Quiesced};
use harrier_snapshot::Chain;
use vm_memory::{Bytes, GuestAddress};

const GUEST: Guest = Guest { name: "lives", cpus: 1, checks: 0 };

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn add_devices(builder: &mut MachineBuilder, said: &Said) {
    builder.add_platform_devices().unwrap();
    builder.add_debug_exit().unwrap();
    builder.add_serial(Box::new(said.clone()), None).unwrap();
    builder.add_doorbell().unwrap();
}

fn boot(engine: &dyn Engine, mode: u32, said: &Said) -> Machine {
    boot_with(engine, &format!("mode={mode}"), said)
}

fn boot_with(engine: &dyn Engine, command_line: &str, said: &Said) -> Machine {
    let config = MachineConfig { vcpu_count: 1, memory_bytes: MEMORY_BYTES, cpu_model: CpuModel::V1 };
    let mut builder = MachineBuilder::new(engine, &config).unwrap();
    add_devices(&mut builder, said);
    let image = FileImage::open(&program(&GUEST)).unwrap();
    let boot = Boot::Kernel { kernel: &image, elf_entry: ElfEntry::Auto, initrd: None, command_line };
    builder.build(&boot).unwrap()
}

fn restore(engine: &dyn Engine, folder: &Path, restoration: &Restoration, said: &Said) -> Machine {
    let chain = Arc::new(Chain::open(folder).unwrap());
    let mut builder = MachineBuilder::restoring(engine, &chain).unwrap();
    add_devices(&mut builder, said);
    builder.restore(&chain, restoration).unwrap()
}

/// Waits for the end, which has to be a good one, and answers the last comment.
fn end(machine: Machine, said: &Said) -> String {
    machine.handle().wait_for_end(Some(Instant::now() + DEADLINE));
    machine.handle().stop();
    let end = machine.wait().end;
    let text = said.text();
    assert_eq!(end, MachineEnd::DebugExit(0), "{text}");
    let comment = text.lines().rev().find_map(|line| line.strip_prefix("# ")).unwrap_or_default().to_owned();
    // A restored machine says the rest of what was begun, so the sums are not those of its own lines.
    assert!(!text.contains("not ok"), "{text}");
    comment
}

fn snapshot(handle: &MachineHandle, target: &Path, limit: Duration) -> Result<Report, TakeError> {
    handle.snapshot(Request {
        target,
        kind: Kind::Full,
        stay_paused: false,
        compress: false,
        quiesce_limit: limit,
        rest: None,
        producer: "lives",
        owner: &mut |_| Ok(()),
        settle: &mut || Ok(()),
        progress: &mut |_| true,
    })
}

/// Every engine that is available here.
fn with_engines(test: impl Fn(&dyn Engine)) {
    for engine in engines() {
        match engine.probe() {
            Probe::Available { .. } => test(engine.as_ref()),
            Probe::Unavailable { reason } => {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
            }
        }
    }
}

#[test]
fn a_checkpoint_returns_in_the_machine_and_in_each_that_is_made_of_it() {
    with_engines(|engine| {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("checkpoint");
        let said = Said::default();
        let mut machine = boot(engine, 1, &said);
        let (ask, asked) = channel();
        machine.on_checkpoint(Box::new(move || ask.send(()).is_ok()));
        let handle = machine.handle();
        machine.start().unwrap();
        // The first one is refused: the guest hears of it, and tries again.
        asked.recv_timeout(DEADLINE).unwrap();
        handle.checkpoint_done(false);
        asked.recv_timeout(DEADLINE).unwrap();
        snapshot(&handle, &target, Duration::ZERO).unwrap();
        handle.checkpoint_done(true);
        assert_eq!(end(machine, &said), "returned as 0 0 0", "{}", engine.name());
        Transcript { text: said.text() }.verdict().unwrap();

        for (restoration, comment) in [
            (Restoration::default(), "returned as 1 1 0"),
            (Restoration { role: Role::Clone, clone_index: 3, is_parent: false }, "returned as 2 1 3"),
        ] {
            let said = Said::default();
            let mut machine = restore(engine, &target, &restoration, &said);
            machine.on_checkpoint(Box::new(|| false));
            let again = folder.path().join(format!("again-{}", restoration.clone_index));
            snapshot(&machine.handle(), &again, Duration::ZERO).unwrap();
            machine.start().unwrap();
            assert_eq!(end(machine, &said), comment, "{}", engine.name());
            let machine = restore(engine, &again, &Restoration::default(), &Said::default());
            assert_eq!((machine.identity().generation, machine.identity().role), (2, Role::Restored));
        }
    });
}

#[test]
fn a_guest_that_listens_comes_to_rest_and_goes_on_in_every_copy() {
    with_engines(|engine| {
        let folder = tempfile::tempdir().unwrap();
        for (mode, limit, quiesced) in [
            (2, DEADLINE, Quiesced::AtRest),
            (3, Duration::from_millis(50), Quiesced::TooLate),
            (3, Duration::ZERO, Quiesced::NotAsked),
        ] {
            let target = folder.path().join(format!("{mode}-{}", limit.as_millis()));
            let said = Said::default();
            let mut machine = boot(engine, mode, &said);
            let handle = machine.handle();
            machine.start().unwrap();
            let give_up = Instant::now() + DEADLINE;
            while handle.hypercalls().marks.is_empty() && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(1));
            }
            let report = snapshot(&handle, &target, limit).unwrap();
            assert_eq!(report.quiesced, quiesced, "{} {mode}", engine.name());
            if quiesced == Quiesced::NotAsked {
                // It still waits, here and in the copy.
                continue;
            }
            end(machine, &said);
            let said = Said::default();
            let mut machine = restore(engine, &target, &Restoration::default(), &said);
            machine.start().unwrap();
            end(machine, &said);
        }
    });
}

#[test]
fn a_machine_that_stands_is_not_asked_to_rest() {
    with_engines(|engine| {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = boot(engine, 2, &Said::default());
        let handle = machine.handle();
        machine.start().unwrap();
        while handle.hypercalls().marks.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(handle.pause());
        let report = snapshot(&handle, &folder.path().join("s"), DEADLINE).unwrap();
        assert_eq!(report.quiesced, Quiesced::NotAsked);
        handle.stop();
    });
}

#[test]
fn a_guest_that_did_not_ask_for_the_event_hears_of_its_copy_by_acpi_and_nobody_hears_twice() {
    with_engines(|engine| {
        let folder = tempfile::tempdir().unwrap();
        for (command_line, comment) in
            [("mode=5", "acpi 1 doorbell 0"), ("mode=5 identity=1", "acpi 0 doorbell 256")]
        {
            let mut machine = boot_with(engine, command_line, &Said::default());
            machine.start().unwrap();
            while machine.handle().hypercalls().marks.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let target = folder.path().join(comment);
            snapshot(&machine.handle(), &target, Duration::ZERO).unwrap();
            machine.handle().stop();
            assert_eq!(machine.wait().end, MachineEnd::Stopped, "nobody tells the original");
            let said = Said::default();
            let mut machine = restore(engine, &target, &Restoration::default(), &said);
            machine.start().unwrap();
            assert_eq!(end(machine, &said), comment, "{}", engine.name());
        }
    });
}

#[test]
fn a_clock_that_was_asked_for_in_one_machine_is_right_in_the_next() {
    with_engines(|first| {
        with_engines(|second| {
            let folder = tempfile::tempdir().unwrap();
            let mut machine = boot(first, 6, &Said::default());
            machine.start().unwrap();
            eventually(|| !machine.handle().hypercalls().marks.is_empty());
            let target = folder.path().join("taken");
            snapshot(&machine.handle(), &target, Duration::ZERO).unwrap();
            drop(machine);
            let said = Said::default();
            let mut machine = restore(second, &target, &Restoration::default(), &said);
            machine.start().unwrap();
            end(machine, &said);
        });
    });
}

fn eventually(mut holds: impl FnMut() -> bool) {
    let give_up = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < give_up);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Guest time as the guest reads it on its clock page (docs/hypercalls.md), in nanoseconds.
fn guest_time_ns(machine: &Machine) -> u64 {
    let mut bytes = [0; ClockPage::SIZE];
    machine.memory().read_slice(&mut bytes, GuestAddress(SHARED_PAGE + CLOCK_OFFSET)).unwrap();
    let page = ClockPage::from_bytes(&bytes);
    let ticks = u128::from(machine.cpu_states().unwrap()[0].tsc.value.wrapping_sub(page.tsc_base));
    let shifted = if page.tsc_shift < 0 { ticks >> -page.tsc_shift } else { ticks << page.tsc_shift };
    page.monotonic_base_ns + (shifted * u128::from(page.tsc_to_ns_multiplier) >> 32) as u64
}

#[test]
fn guest_time_stands_still_in_a_pause_and_goes_on_from_there_in_every_copy() {
    let stand = || std::thread::sleep(Duration::from_millis(20));
    with_engines(|first| {
        with_engines(|second| {
            let route = format!("{} {}", first.name(), second.name());
            let folder = tempfile::tempdir().unwrap();
            let said = Said::default();
            let mut machine = boot(first, 4, &said);
            machine.start().unwrap();
            while machine.handle().hypercalls().marks.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(machine.handle().pause());
            let mut before = guest_time_ns(&machine);
            for copy in 0..6 {
                stand();
                let begin = Instant::now();
                machine.handle().resume();
                // The wall clock did not stand still. A restored machine has not asked for it yet.
                if copy == 0 {
                    eventually(|| said.text().contains("# another wall clock"));
                }
                // A snapshot stops the machine twice.
                let target = folder.path().join(copy.to_string());
                snapshot(&machine.handle(), &target, Duration::ZERO).unwrap();
                assert!(machine.handle().pause());
                let after = guest_time_ns(&machine);
                let passed = begin.elapsed() + Duration::from_millis(1);
                assert!(
                    after.saturating_sub(before) <= passed.as_nanos() as u64,
                    "{route}: {before} {after}"
                );
                assert!(!said.text().contains("not ok"), "{route}: {}", said.text());

                let engine = if copy % 2 == 0 { second } else { first };
                machine = restore(engine, &target, &Restoration::default(), &said);
                let begin = Instant::now();
                machine.start().unwrap();
                assert!(machine.handle().pause());
                before = guest_time_ns(&machine);
                // It was taken before the end of the last pass.
                let latest = after + (begin.elapsed() + Duration::from_millis(1)).as_nanos() as u64;
                assert!(before <= latest, "{route}: {after} {before}");
            }
            machine.handle().stop();
            assert_eq!(machine.wait().end, MachineEnd::Stopped, "{route}: {}", said.text());
        });
    });
}
