//! The commands around the queue: each opens a [`Store`] and says what came of it.

mod act;
mod coordinator;
mod fetch;
pub(crate) mod flags;
mod ids;
mod list;
mod place;
mod status;
mod submit;
mod table;
mod text;
mod watch;
mod worker;

use std::io::{self, Write};

use harrier_jobs::store::Action;
use serde::Serialize;

use self::flags::JobCommand;
use crate::exit::Failure;

pub(crate) use act::resume;
pub(crate) use ids::is_job;
pub(crate) use watch::{logs, wait};

/// Runs one of the commands and answers the exit code.
pub(crate) fn run(command: JobCommand) -> Result<u8, Failure> {
    match command {
        JobCommand::Submit(flags) => submit::run(*flags),
        JobCommand::Queue(flags) => list::queue(&flags),
        JobCommand::History(flags) => list::history(&flags),
        JobCommand::Status(flags) => status::status(&flags),
        JobCommand::Why(flags) => status::why(&flags),
        JobCommand::Events(flags) => watch::events(&flags),
        JobCommand::Cancel(flags) => act::act(&Action::Cancel, &flags),
        JobCommand::Hold(flags) => act::act(&Action::Hold, &flags),
        JobCommand::Release(flags) => act::act(&Action::Release, &flags),
        JobCommand::Requeue(flags) => act::act(&Action::Requeue, &flags),
        JobCommand::Suspend(flags) => act::act(&Action::Suspend, &flags),
        JobCommand::Fetch(flags) => fetch::run(&flags),
        JobCommand::Checkpoint(flags) => act::act(&Action::Checkpoint, &flags),
        JobCommand::Vacate(flags) => act::vacate(&flags),
        JobCommand::Prio(flags) => act::prio(&flags),
        JobCommand::Hosts(flags) => list::hosts(&flags),
        JobCommand::Stats(flags) => list::stats(&flags),
        JobCommand::Worker(flags) => worker::run(*flags),
        JobCommand::Coordinator(flags) => coordinator::run(&flags),
    }
}

/// Prints a value as JSON.
fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints text. A reader that has gone away wants no more: then the program ends, as in any pipe.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(err) => Err(Failure::new(format!("stdout cannot be written ({err}): give it another place"))),
        _ => Ok(()),
    }
}
