//! The bare-metal guests of `guest-kernel/bare-metal` and how one of them is run: for `harrier selftest` and for tests.
//!
//! [`GUESTS`] is the one list of guests. [`run`] boots a guest in a whole machine and [`Transcript`] is what it said. Where
//! the programs are the caller knows.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use harrier_engine::{CpuModel, Engine};
use harrier_machine::boot::{Boot, ElfEntry, FileImage};
use harrier_machine::{MachineBuilder, MachineConfig, MachineEnd, MachineHandle, RunReport};

/// A bare-metal guest.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// File name of its program.
    pub name: &'static str,
    /// Processors that it wants.
    pub cpus: u32,
    /// Checks that it makes at least, those that it skips for want of a feature included.
    pub checks: u32,
}

/// The guests that check something.
pub const GUESTS: &[Guest] = &[
    Guest { name: "integer", cpus: 1, checks: 276 },
    Guest { name: "strings", cpus: 1, checks: 308 },
    Guest { name: "paging", cpus: 1, checks: 257 },
    Guest { name: "long_mode", cpus: 1, checks: 165 },
    Guest { name: "system_registers", cpus: 1, checks: 146 },
    Guest { name: "devices", cpus: 1, checks: 54 },
    Guest { name: "apic", cpus: 1, checks: 156 },
    Guest { name: "smp", cpus: 2, checks: 54 },
    Guest { name: "self_modifying", cpus: 1, checks: 70 },
    Guest { name: "fpu", cpus: 1, checks: 130 },
    Guest { name: "real_mode", cpus: 1, checks: 94 },
    Guest { name: "protected_mode", cpus: 1, checks: 189 },
    HYPERCALLS,
];

/// The guest that makes hypercalls; it counts one skipped check where there is no doorbell.
pub const HYPERCALLS: Guest = Guest { name: "hypercalls", cpus: 1, checks: 90 };

/// The guest that measures.
pub const BENCH: Guest = Guest { name: "bench", cpus: 1, checks: 10 };

/// How long a guest may take. They need well under a second of a processor for themselves.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// What every guest can count on.
pub const MEMORY_BYTES: u64 = 64 << 20;

impl Guest {
    /// Its command line.
    pub fn command_line(&self) -> String {
        format!("cpus={}", self.cpus)
    }
}

/// What a guest said on its serial port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The text.
    pub text: String,
}

impl Transcript {
    fn starting_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter(move |line| line.starts_with(prefix))
    }

    /// The names of the checks that were skipped, with reasons.
    pub fn skipped(&self) -> Vec<&str> {
        self.starting_with("skip ").collect()
    }

    /// Checks made and skipped.
    pub fn checks(&self) -> u32 {
        u32::try_from(self.starting_with("ok ").count() + self.skipped().len()).unwrap_or(u32::MAX)
    }

    /// Finds out whether all went well: nothing failed, and the guest's own sums agree with its lines.
    ///
    /// # Errors
    /// The failures, or what is missing.
    pub fn verdict(&self) -> Result<(), String> {
        let failures: Vec<&str> = self.starting_with("not ok ").collect();
        if !failures.is_empty() {
            return Err(failures.join("\n"));
        }
        let ok = self.starting_with("ok ").count();
        let last = format!("done {ok} 0 {}", self.skipped().len());
        match self.text.lines().last() {
            Some(line) if line == last => Ok(()),
            Some(line) => Err(format!("the last line is '{line}', not '{last}'")),
            None => Err("the guest said nothing".to_owned()),
        }
    }
}

/// Collects what the serial port prints.
#[derive(Debug, Clone, Default)]
pub struct Collector(Arc<Mutex<Vec<u8>>>);

impl Collector {
    /// What was printed so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Lines so far.
    pub fn lines(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|byte| **byte == b'\n').count()
    }
}

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a run has been.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended and what was counted.
    pub report: RunReport,
    /// What the guest said.
    pub transcript: Transcript,
    /// Ticks of the guest's time-stamp counter in a millisecond.
    pub tsc_khz: u32,
}

/// Boots `guest`, whose program is the file `program`, on `engine` and waits for its end, at most `deadline`.
///
/// # Errors
/// The machine could not be built or started; the text says why.
pub fn run(
    engine: &dyn Engine,
    guest: &Guest,
    program: &Path,
    command_line: &str,
    deadline: Duration,
) -> Result<Outcome, Box<dyn std::error::Error>> {
    run_with(engine, guest, program, command_line, deadline, |_| ())
}

/// Like [`run`], and does `meanwhile` once the machine runs.
///
/// # Errors
/// The machine could not be built or started; the text says why.
pub fn run_with(
    engine: &dyn Engine,
    guest: &Guest,
    program: &Path,
    command_line: &str,
    deadline: Duration,
    meanwhile: impl FnOnce(&MachineHandle),
) -> Result<Outcome, Box<dyn std::error::Error>> {
    // There are KVMs that offer less than v2.
    let offered = engine.cpu_models();
    let cpu_model = offered.into_iter().filter(|model| *model <= CpuModel::V2).max().unwrap_or(CpuModel::V2);
    let config = MachineConfig { vcpu_count: guest.cpus, memory_bytes: MEMORY_BYTES, cpu_model };
    let mut builder = MachineBuilder::new(engine, &config)?;
    let said = Collector::default();
    builder.add_platform_devices()?;
    builder.add_debug_exit()?;
    builder.add_serial(Box::new(said.clone()), None)?;
    builder.add_doorbell()?;
    let image = FileImage::open(program)?;
    let boot = Boot::Kernel { kernel: &image, elf_entry: ElfEntry::Auto, initrd: None, command_line };
    let mut machine = builder.build(&boot)?;
    let handle = machine.handle();
    machine.start()?;
    meanwhile(&handle);
    if handle.wait_for_end(Some(Instant::now() + deadline)).is_none() {
        handle.stop();
    }
    let tsc_khz = machine.vm().tsc_khz();
    let report = machine.wait();
    Ok(Outcome { report, transcript: Transcript { text: said.text() }, tsc_khz })
}

/// Runs `guest` on `engine`, at most `deadline`, and checks everything that it says.
///
/// # Errors
/// What went wrong, for people.
pub fn check(
    engine: &dyn Engine,
    guest: &Guest,
    program: &Path,
    deadline: Duration,
) -> Result<Transcript, String> {
    let Outcome { report, transcript, .. } =
        run(engine, guest, program, &guest.command_line(), deadline).map_err(|err| err.to_string())?;
    let with_end = |what: String| format!("{what}\n{}\n{}", report.end, tail(&transcript.text));
    if report.end == MachineEnd::Stopped {
        return Err(with_end(format!("it has not come to an end in {deadline:?}")));
    }
    transcript.verdict().map_err(with_end)?;
    if report.end != MachineEnd::DebugExit(0) {
        return Err(with_end("every check succeeded, and yet".to_owned()));
    }
    if transcript.checks() < guest.checks {
        return Err(format!("{} checks instead of {}", transcript.checks(), guest.checks));
    }
    Ok(transcript)
}

/// The last lines, where a guest that stopped says how far it came.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(3)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_is_good_only_if_the_guests_sums_agree_with_its_lines() {
        let verdict = |text: &str| Transcript { text: text.to_owned() }.verdict();
        assert_eq!(verdict("ok a\nskip b\ndone 1 0 1\n"), Ok(()));
        assert_eq!(verdict("ok a\nnot ok b\ndone 1 1 0\n"), Err("not ok b".to_owned()));
        assert_eq!(
            verdict("ok a\ndone 2 0 0\n"),
            Err("the last line is 'done 2 0 0', not 'done 1 0 0'".to_owned())
        );
        assert_eq!(verdict(""), Err("the guest said nothing".to_owned()));
        let short = Transcript { text: "ok a\nok b\nskip c\n".to_owned() };
        assert_eq!((short.checks(), short.skipped().len()), (3, 1));
    }
}
