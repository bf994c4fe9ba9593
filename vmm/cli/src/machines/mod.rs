//! The commands for machines that run or have run: each finds machines in the registry and speaks to their monitors.

mod inspect;
mod lifecycle;
mod logs;
mod ps;

use std::fmt::Display;
use std::io::Write;
use std::path::Path;

use harrier_control::{Client, Entry, Registry};

use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::Command;
use crate::runtime_dir;

/// Runs one of these commands and answers its exit code.
pub(crate) fn run(command: Command, runtime_dir: Option<&Path>) -> Result<u8, Failure> {
    let registry = runtime_dir::open(runtime_dir)?;
    match command {
        Command::Ps(flags) => ps::run(&flags, &registry),
        Command::Inspect(flags) => inspect::run(&flags, &registry),
        Command::Logs(flags) => logs::run(&flags, &registry),
        Command::Pause(flags) => lifecycle::pause(&flags, &registry),
        Command::Resume(flags) => lifecycle::resume(&flags, &registry),
        Command::Stop(flags) => lifecycle::stop(&flags, &registry),
        Command::Kill(flags) => lifecycle::kill(&flags, &registry),
        Command::Wait(flags) => lifecycle::wait(&flags, &registry),
        Command::Rm(flags) => lifecycle::rm(&flags, &registry),
        Command::Snapshot(flags) => crate::snapshots::take(&flags, &registry),
        Command::Run(_)
        | Command::Restore(_)
        | Command::Snapshots(_)
        | Command::Doctor(_)
        | Command::Monitor(_)
        | Command::Job(_) => Err(Failure::new("not a command for machines")),
    }
}

/// Flags that mean something for jobs only are not passed over in silence.
fn refuse(for_jobs: &[(&str, bool)], target: &str) -> Result<(), Failure> {
    match for_jobs.iter().find(|(_, given)| *given) {
        Some((flag, _)) => {
            Err(Failure::new(format!("{flag} is for jobs, and '{target}' is no job's number: leave it out")))
        }
        None => Ok(()),
    }
}

fn client(entry: &Entry) -> Client {
    Client::new(&entry.folder)
}

/// Does something with each machine and prints its name as the user wrote it; what goes wrong with one is told, and
/// the others are done.
fn for_each(
    registry: &Registry,
    names: &[String],
    act: impl Fn(&Entry) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let mut code = 0;
    for name in names {
        let done = registry.find(name).map_err(Failure::new).and_then(|entry| act(&entry));
        match done {
            Ok(()) => print_line(name)?,
            Err(failure) => {
                crate::print_failure(&failure);
                code = HARRIER_FAILED;
            }
        }
    }
    Ok(code)
}

/// A line on stdout. Whoever has closed it wants no more.
fn print_line(text: impl Display) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{text}")
        .map_err(|err| Failure::new(format!("stdout cannot be written ({err})")))
}

/// A failure that names the machine.
fn about(entry: &Entry, err: impl Display) -> Failure {
    Failure::new(format!("machine '{}': {err}", entry.record.name))
}
