//! The commands around the queue: each opens a [`Store`] and says what came of it.

pub(crate) mod flags;
mod ids;
mod list;
mod place;
mod submit;
mod table;
mod text;
mod watch;
mod worker;

use std::io::{self, Write};

use serde::Serialize;

use self::flags::JobCommand;
use crate::exit::Failure;

pub(crate) use ids::is_job;
pub(crate) use watch::{logs, wait};

/// Runs one of the commands and answers the exit code.
pub(crate) fn run(command: JobCommand) -> Result<u8, Failure> {
    match command {
        JobCommand::Submit(flags) => submit::run(*flags),
        JobCommand::Queue(flags) => list::queue(&flags),
        JobCommand::Status(flags) => list::status(&flags),
        JobCommand::Worker(flags) => worker::run(flags),
    }
}

/// Prints a value as JSON.
fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints text; a reader that has gone away wants no more.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(err) if err.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("stdout cannot be written ({err}): give it another place")))
        }
        _ => Ok(()),
    }
}
