//! `harrier selftest`: the bare-metal guests and a Linux on every engine that this host has, as a table or as JSON.
//!
//! [`checks`] runs them one by one, each with a deadline; [`linux`] boots the default guest by this program's own
//! `harrier run`; [`unexercised`] knows what cannot be tried on this host; [`report`] is what is printed.

mod checks;
mod linux;
mod report;
mod unexercised;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::{Engine, EngineError, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use harrier_guest_checks::{GUESTS, Guest};
use harrier_jobs::units::parse_time;

use crate::doctor;
use crate::engines::{EngineChoice, EngineChoiceError};
use crate::exit::Failure;
use crate::flags::SelftestFlags;
use report::{Outcome, Report, Row};

/// At least one check failed.
const CHECKS_FAILED: u8 = 1;

/// Where KVM emulates kernel mode, the engine leaves that to the software processor. These guests are run once more with KVM
/// alone, so that the KVM engine's own loop, exits, memory slots and interrupt controllers are tried there, too. The others
/// meet gaps of the host's emulator.
const ON_KVM_ALONE: &[&str] = &["devices", "hypercalls"];

/// An engine, or a way to use one.
struct Subject {
    name: &'static str,
    engine: Arc<dyn Engine>,
    /// Why it cannot run here.
    unusable: Option<Unusable>,
    /// Nothing but these guests, if it is not everything.
    guests: Option<&'static [&'static str]>,
}

/// Why an engine cannot be used.
enum Unusable {
    /// The host does not have it.
    Missing(String),
    /// It is there, and does not do what it should.
    Faulty(String),
}

/// What is tried on each engine.
#[derive(Clone, Copy)]
enum Check {
    Guest(&'static Guest),
    Linux(&'static linux::Command),
}

impl Subject {
    fn takes(&self, check: Check) -> bool {
        self.guests.is_none_or(|guests| guests.contains(&check.name()))
    }
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::Guest(guest) => guest.name,
            Check::Linux(command) => command.name,
        }
    }
}

/// Tries everything that the flags ask for and prints what came of it.
pub(crate) fn run(flags: &SelftestFlags) -> Result<u8, Failure> {
    let limit = parse_time(&flags.timeout).map_err(|err| Failure::new(format!("--timeout {err}")))?;
    let choice = flags.engine.as_deref().map(str::parse::<EngineChoice>).transpose()?;
    let subjects = subjects(choice)?;
    let checks = wanted(&flags.only)?;
    let needs_guests = checks.iter().any(|check| matches!(check, Check::Guest(_)));
    let programs = needs_guests.then(crate::guest_files::find_bare_metal).transpose()?;
    let steps =
        subjects.iter().map(|subject| checks.iter().filter(|check| subject.takes(**check)).count()).sum();
    let mut progress = Progress::new(steps);
    let mut rows = Vec::new();
    for subject in &subjects {
        // A guest that cannot be stopped keeps its thread and maybe a processor: nothing after it would tell much.
        let mut stuck = None;
        for check in checks.iter().filter(|check| subject.takes(**check)) {
            progress.show(subject.name, check.name());
            let started = Instant::now();
            let outcome = match (&subject.unusable, &stuck) {
                (Some(Unusable::Missing(reason)), _) => Outcome::skipped(reason),
                (Some(Unusable::Faulty(reason)), _) => Outcome::failed(reason),
                (None, Some(name)) => Outcome::skipped(&format!("'{name}' could not be stopped")),
                (None, None) => match (check, &programs) {
                    (Check::Guest(guest), Some(folder)) => {
                        checks::guest(&subject.engine, guest, &folder.join(guest.name), limit)
                    }
                    (Check::Guest(_), None) => Outcome::failed("no programs"),
                    (Check::Linux(command), _) => linux::run(subject.name, command, limit),
                },
            };
            if outcome.is_stuck {
                stuck = Some(check.name());
            }
            rows.push(Row { check: check.name(), engine: subject.name, outcome, took: started.elapsed() });
        }
    }
    progress.clear();
    let report = Report { rows, host: doctor::look(), unexercised: unexercised::here() };
    let text = if flags.json { format!("{}\n", report.to_json()) } else { report.to_text() };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|err| Failure::new(format!("stdout cannot be written ({err}): give it another place")))?;
    Ok(if report.failures() == 0 { 0 } else { CHECKS_FAILED })
}

/// The engines to try. One that was named has to be there; without a name, one that is missing is passed over.
fn subjects(choice: Option<EngineChoice>) -> Result<Vec<Subject>, EngineChoiceError> {
    let wants = |own| matches!(choice, None | Some(EngineChoice::Auto)) || choice == Some(own);
    let mut subjects = Vec::new();
    if wants(EngineChoice::Soft) {
        let unusable = match SoftEngine.probe() {
            Probe::Available { .. } => None,
            Probe::Unavailable { reason } => Some(Unusable::Missing(reason)),
        };
        subjects.push(Subject { name: "soft", engine: Arc::new(SoftEngine), unusable, guests: None });
    }
    if wants(EngineChoice::Kvm) {
        let kvm = KvmEngine::default().with_software(Arc::new(SoftEngine));
        let found = kvm.runs_kernel_mode();
        let emulates = matches!(found, Ok(false));
        let unusable = match found {
            Ok(_) => None,
            Err(EngineError::Unavailable { reason, .. }) if choice == Some(EngineChoice::Kvm) => {
                return Err(EngineChoiceError::NoKvm(reason));
            }
            Err(EngineError::Unavailable { reason, .. }) => Some(Unusable::Missing(reason)),
            Err(err) => Some(Unusable::Faulty(err.to_string())),
        };
        subjects.push(Subject { name: "kvm", engine: Arc::new(kvm), unusable, guests: None });
        if emulates {
            let alone = KvmEngine::default().with_assistant(Arc::new(SoftEngine));
            let guests = Some(ON_KVM_ALONE);
            subjects.push(Subject { name: "kvm-alone", engine: Arc::new(alone), unusable: None, guests });
        }
    }
    Ok(subjects)
}

/// The checks whose names are, or begin with, one of `only`; all of them if there is none.
fn wanted(only: &[String]) -> Result<Vec<Check>, Failure> {
    let all = GUESTS.iter().map(Check::Guest).chain(linux::COMMANDS.iter().map(Check::Linux));
    let all: Vec<Check> = all.collect();
    for name in only {
        if name.is_empty() || !all.iter().any(|check| check.name().starts_with(name.as_str())) {
            let names: Vec<&str> = all.iter().map(|check| check.name()).collect();
            return Err(Failure::new(format!(
                "--only '{name}' is no check: use one of {}",
                names.join(", ")
            )));
        }
    }
    let is_wanted =
        |check: &Check| only.is_empty() || only.iter().any(|name| check.name().starts_with(name.as_str()));
    Ok(all.into_iter().filter(is_wanted).collect())
}

/// What is being done, on a terminal, in one line that is written over.
struct Progress {
    step: usize,
    steps: usize,
    is_shown: bool,
}

impl Progress {
    fn new(steps: usize) -> Self {
        Progress { step: 0, steps, is_shown: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, engine: &str, check: &str) {
        self.step += 1;
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K{} of {}: {check} on {engine}", self.step, self.steps);
        }
    }

    fn clear(&self) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Milliseconds, for tables and JSON.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_chosen_by_the_beginning_of_their_names() {
        let names = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
            wanted(&only).map(|checks| checks.iter().map(|check| check.name()).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), GUESTS.len() + linux::COMMANDS.len());
        assert_eq!(names(&["linux"]).unwrap(), ["linux-true", "linux-checksum"]);
        assert_eq!(names(&["smp", "integer"]).unwrap(), ["integer", "smp"]);
        for wrong in ["", "pentium"] {
            let text = names(&["smp", wrong]).unwrap_err().message;
            assert!(
                text.starts_with(&format!("--only '{wrong}' is no check: use one of integer, ")),
                "{text}"
            );
        }
    }
}
