//! The `harrier` command: flags become one validated configuration, a machine runs, an exit code comes back.
//!
//! [`flags`] is what the user typed, [`config`] what it means; [`run`] runs a command or a plain kernel, [`monitor`]
//! makes its machine one that others find, [`machines`] has the commands for those, [`jobs`]
//! those for the queue and its workers; [`doctor`] looks at the host and [`selftest`] tries the engines on it. Whatever goes wrong is one line on stderr that
//! names the value and the remedy, and exit code 125.

mod attempt;
mod config;
mod console;
mod disks;
mod doctor;
mod engines;
mod exit;
mod files;
mod flags;
mod guest_files;
mod jobs;
mod limits;
mod logging;
mod machines;
mod monitor;
mod own_memory;
mod report;
mod run;
mod run_command;
mod run_console;
mod runtime_dir;
mod sandbox;
mod selftest;
mod signals;
mod snapshots;
mod stdout_check;
mod table;
mod terminal;
mod warm;

use std::io::{IsTerminal, Write};
use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use clap::error::ErrorKind;
use harrier_jobs::units;

use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::{Command, Flags};

fn main() -> ExitCode {
    let started = Instant::now();
    install_panic_hook();
    signals::survive_file_limits();
    // The hook has said what there is to say.
    let code = catch_unwind(|| dispatch(started)).unwrap_or(HARRIER_FAILED);
    terminal::restore();
    ExitCode::from(code)
}

fn dispatch(started: Instant) -> u8 {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(err) => return report_usage(&err),
    };
    if stdout_check::stdout_was_closed() {
        print_failure(&Failure::new("stdout is closed: send it somewhere, to /dev/null if nobody wants it"));
        return HARRIER_FAILED;
    }
    let runtime_dir = flags.runtime_dir.as_deref();
    let result = match flags.command {
        Command::Run(run_flags) => {
            logging::init(run_flags.verbose);
            run::run(*run_flags, runtime_dir, started)
        }
        Command::Restore(restore_flags) => {
            logging::init(restore_flags.verbose);
            snapshots::restore(*restore_flags, runtime_dir, started)
        }
        Command::Snapshots(command) => {
            logging::init(0);
            snapshots::run(command)
        }
        Command::Monitor(monitor_flags) => monitor::detached(monitor_flags, started),
        Command::Doctor(doctor_flags) => {
            logging::init(0);
            doctor::run(&doctor_flags)
        }
        Command::Selftest(selftest_flags) => {
            logging::init(0);
            selftest::run(&selftest_flags)
        }
        Command::Job(command) => {
            logging::init(0);
            jobs::run(command)
        }
        other => {
            logging::init(0);
            machines_or_jobs(other, runtime_dir)
        }
    };
    result.unwrap_or_else(|failure| {
        print_failure(&failure);
        failure.code
    })
}

/// Commands that machines and jobs share: a number is a job's, everything else names a machine.
fn machines_or_jobs(command: Command, runtime_dir: Option<&Path>) -> Result<u8, Failure> {
    match command {
        Command::Logs(flags) if jobs::is_job(&flags.target) => jobs::logs(&flags),
        Command::Wait(flags) if flags.targets.iter().all(|target| jobs::is_job(target)) => jobs::wait(&flags),
        Command::Resume(flags) if flags.targets.iter().all(|target| jobs::is_job(target)) => {
            jobs::resume(flags)
        }
        other => machines::run(other, runtime_dir),
    }
}

pub(crate) fn print_failure(failure: &Failure) {
    terminal::restore();
    // Without stderr there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "harrier: {}", one_line(&failure.message));
}

/// Messages may quote paths and arguments, which may hold anything.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Help goes to stdout; a mistake is one line on stderr.
fn report_usage(err: &clap::Error) -> u8 {
    match err.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = err.print();
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = writeln!(std::io::stderr(), "harrier: no command given: try 'harrier --help'");
            HARRIER_FAILED
        }
        _ => {
            let text = err.render().to_string();
            let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("unusable arguments");
            let mut line = first.trim_start_matches("error: ").trim_end_matches(':').to_owned();
            // Some of clap's messages go on in an indented list.
            for more in text.lines().skip(1).take_while(|line| line.starts_with("  ")) {
                line.push(' ');
                line.push_str(more.trim());
            }
            if let Some(tip) = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")) {
                line.push_str(&format!(" ({tip})"));
            }
            let help = help_for(&text);
            let _ = writeln!(std::io::stderr(), "harrier: {}: try '{help} --help'", one_line(&line));
            HARRIER_FAILED
        }
    }
}

/// The command that clap's message is about.
fn help_for(message: &str) -> String {
    let usage = message.lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap_or("harrier");
    let is_name = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase()) && !word.is_empty();
    usage.split(' ').take_while(is_name).collect::<Vec<_>>().join(" ")
}

/// A panic is a bug; it is told in one line, with the terminal as it was before.
fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        terminal::restore();
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        let text = info
            .payload()
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let text = one_line(&text);
        let _ = writeln!(
            std::io::stderr(),
            "harrier: internal error: {text}{place}: this is a bug in harrier, please report it"
        );
    }));
}

/// Whether remarks for people, as opposed to errors, go to stderr.
fn remarks_wanted(quiet: bool, verbose: u8) -> bool {
    !quiet && (verbose > 0 || std::io::stderr().is_terminal())
}
