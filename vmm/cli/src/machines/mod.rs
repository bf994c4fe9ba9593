//! The commands for machines that run or have run: each finds machines in the registry and speaks to their monitors.

mod inspect;
mod lifecycle;
mod logs;
mod ps;
mod streams;

use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use harrier_control::{Client, ClientError, Entry, Life, Registry};

use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::Command;
use crate::runtime_dir;

/// How long a monitor that lives may take to be there for questions.
const REACH: Duration = Duration::from_secs(5);
const REACH_STEP: Duration = Duration::from_millis(10);

/// Runs one of these commands and answers its exit code.
pub(crate) fn run(command: Command, runtime_dir: Option<&Path>) -> Result<u8, Failure> {
    let registry = runtime_dir::open(runtime_dir)?;
    match command {
        Command::Ps(flags) => ps::run(&flags, &registry),
        Command::Inspect(flags) => inspect::run(&flags, &registry),
        Command::Logs(flags) => logs::run(&flags, &registry),
        Command::Exec(flags) => streams::exec(&flags, &registry),
        Command::Attach(flags) => streams::attach(&flags, &registry),
        Command::Pause(flags) => lifecycle::pause(&flags, &registry),
        Command::Resume(flags) => lifecycle::resume(&flags, &registry),
        Command::Stop(flags) => lifecycle::stop(&flags, &registry),
        Command::Kill(flags) => lifecycle::kill(&flags, &registry),
        Command::Wait(flags) => lifecycle::wait(&flags, &registry),
        Command::Rm(flags) => lifecycle::rm(&flags, &registry),
        Command::Snapshot(flags) => crate::snapshots::take(&flags, &registry),
        Command::Fork(flags) => crate::snapshots::fork(&flags, &registry),
        Command::Run(_)
        | Command::Restore(_)
        | Command::Snapshots(_)
        | Command::Doctor(_)
        | Command::Selftest(_)
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

/// Asks a machine's monitor. One that is just beginning is waited for, and one that is just ending.
fn ask<T>(entry: &Entry, ask: impl Fn(&Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
    let client = client(entry);
    let begun = Instant::now();
    loop {
        match ask(&client) {
            Err(ClientError::NotRunning) if entry.is_alive() && begun.elapsed() < REACH => {
                std::thread::sleep(REACH_STEP);
            }
            result => return result,
        }
    }
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

/// What is said of a machine that is [`Life::Lost`].
const LOST: &str = "its monitor was killed, so nothing is known of its end";

/// The error of a machine that has ended says so.
fn not_alive(entry: &Entry, err: ClientError) -> String {
    match (&entry.life, &err) {
        (Life::Ended(exit), ClientError::NotRunning) => format!("it has ended with code {}", exit.exit_code),
        (Life::Lost, ClientError::NotRunning) => LOST.to_owned(),
        _ => err.to_string(),
    }
}

/// A failure that names the machine.
fn about(entry: &Entry, err: impl Display) -> Failure {
    Failure::new(format!("machine '{}': {err}", entry.record.name))
}
