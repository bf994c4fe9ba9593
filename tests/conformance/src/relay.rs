//! A guest that is handed from machine to machine by snapshots.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::{CpuModel, CpuState, Engine};
use harrier_machine::boot::{Boot, ElfEntry, FileImage};
use harrier_machine::snapshot::{Kind, Request, Restoration};
use harrier_machine::{Machine, MachineBuilder, MachineConfig, MachineEnd};
use harrier_snapshot::Chain;

use crate::{Collector, DEADLINE, Guest, MEMORY_BYTES, Transcript, tail};

type Failure = Box<dyn std::error::Error>;

/// Hands `guest` over `legs` times, at moments spread over its checks, to the engines of `route` in turn, and checks
/// everything that it says.
///
/// # Errors
/// What went wrong, for people.
pub fn check(route: &[&dyn Engine], guest: &Guest, legs: u32) -> Result<(), String> {
    let said = Collector::default();
    let folder = Folder::new().map_err(|err| err.to_string())?;
    let end =
        run(route, guest, legs, &said, &folder.0).map_err(|err| format!("{err}\n{}", tail(&said.text())))?;
    let transcript = Transcript { text: said.text() };
    let with_end = |what: String| format!("{what}\n{end}\n{}", tail(&transcript.text));
    transcript.verdict().map_err(with_end)?;
    if end != MachineEnd::DebugExit(0) || transcript.checks() < guest.checks {
        return Err(with_end(format!("{} checks instead of {}", transcript.checks(), guest.checks)));
    }
    Ok(())
}

struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("harrier-relay-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn run(
    route: &[&dyn Engine],
    guest: &Guest,
    legs: u32,
    said: &Collector,
    folder: &Path,
) -> Result<MachineEnd, Failure> {
    let model = route
        .iter()
        .filter_map(|engine| engine.cpu_models().into_iter().filter(|model| *model <= CpuModel::V2).max())
        .min()
        .unwrap_or(CpuModel::V2);
    let mut engines = route.iter().cycle();
    let mut next_engine = || *engines.next().unwrap_or(&route[0]);
    let mut machine = boot(next_engine(), guest, model, said)?;
    machine.start()?;
    for leg in 1..=legs {
        let wanted = (guest.checks * leg / (legs + 1)) as usize;
        let handle = machine.handle();
        let deadline = Instant::now() + DEADLINE;
        while said.lines() < wanted && handle.wait_for_end(Some(Instant::now())).is_none() {
            if Instant::now() > deadline {
                return Err(format!("no check after {} lines", said.lines()).into());
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        let target = folder.join(format!("leg-{leg}"));
        let Ok(report) = handle.snapshot(Request {
            target: &target,
            // Every second one needs the one before.
            kind: if leg % 2 == 0 { Kind::Difference } else { Kind::Full },
            stay_paused: true,
            compress: false,
            quiesce_limit: Duration::ZERO,
            rest: None,
            producer: "relay",
            owner: &mut |_| Ok(()),
            settle: &mut || Ok(()),
            progress: &mut |_| true,
        }) else {
            // It was faster.
            break;
        };
        let before = machine.cpu_states()?;
        drop(machine);
        let chain = Arc::new(Chain::from_snapshot(report.snapshot)?);
        let mut builder = MachineBuilder::restoring(next_engine(), &chain)?;
        add_devices(&mut builder, said)?;
        machine = builder.restore(&chain, &Restoration::default())?;
        if machine.identity().generation != u64::from(leg) {
            return Err(format!("generation {} after {leg} restores", machine.identity().generation).into());
        }
        same(&before, &machine.cpu_states()?)?;
        machine.start()?;
    }
    let handle = machine.handle();
    if handle.wait_for_end(Some(Instant::now() + DEADLINE)).is_none() {
        handle.stop();
    }
    Ok(machine.wait().end)
}

fn add_devices(builder: &mut MachineBuilder, said: &Collector) -> Result<(), Failure> {
    builder.add_platform_devices()?;
    builder.add_debug_exit()?;
    builder.add_serial(Box::new(said.clone()), None)?;
    builder.add_doorbell()?;
    Ok(())
}

fn boot(engine: &dyn Engine, guest: &Guest, model: CpuModel, said: &Collector) -> Result<Machine, Failure> {
    let config = MachineConfig { vcpu_count: guest.cpus, memory_bytes: MEMORY_BYTES, cpu_model: model };
    let mut builder = MachineBuilder::new(engine, &config)?;
    add_devices(&mut builder, said)?;
    let image = FileImage::open(&crate::program(guest))?;
    let command_line = &guest.command_line();
    Ok(builder.build(&Boot::Kernel {
        kernel: &image,
        elf_entry: ElfEntry::Auto,
        initrd: None,
        command_line,
    })?)
}

/// Compares what one engine gave and the next one took over, field by field.
///
/// The time-stamp counter may be the host's on either side, which nobody sets: then it has its own value and frequency, and
/// a deadline follows it.
///
/// # Errors
/// The fields that differ.
pub fn same(before: &[CpuState], after: &[CpuState]) -> Result<(), Failure> {
    for (index, (before, after)) in before.iter().zip(after).enumerate() {
        let (mut before, mut after) = (before.clone(), after.clone());
        for state in [&mut before, &mut after] {
            state.tsc = Default::default();
            state.msrs.retain(|(msr, _)| *msr != harrier_engine::cpu_state::msr::IA32_TSC_DEADLINE);
        }
        let differences = before.differences(&after);
        if !differences.is_empty() {
            return Err(format!("vcpu {index} differs: {}", differences.join("; ")).into());
        }
    }
    Ok(())
}
