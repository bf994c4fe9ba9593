//! pause, resume, stop, kill, wait, rm.

use std::time::Duration;

use harrier_control::api::{KillRequest, StopRequest};
use harrier_control::{ClientError, Entry, Life, Registry, RegistryError};

use super::{LOST, about, ask, client, for_each, not_alive, print_line, refuse};
use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::{KillFlags, NamesFlags, ResumeFlags, RmFlags, StopFlags, WaitFlags};
use crate::units::parse_time;

/// How long a monitor may take to answer before it is killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a monitor may take to end after its machine has been ended.
const END_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn pause(flags: &NamesFlags, registry: &Registry) -> Result<u8, Failure> {
    for_each(registry, &flags.machines, |entry| {
        ask(entry, |client| client.pause()).map(drop).map_err(|err| about(entry, not_alive(entry, err)))
    })
}

pub(super) fn resume(flags: &ResumeFlags, registry: &Registry) -> Result<u8, Failure> {
    let for_jobs = [("--json", flags.json), ("--queue", flags.place.place.is_some())];
    let machine = flags.targets.iter().find(|target| !crate::jobs::is_job(target));
    refuse(&for_jobs, machine.map_or("", String::as_str))?;
    for_each(registry, &flags.targets, |entry| {
        ask(entry, |client| client.resume()).map(drop).map_err(|err| about(entry, not_alive(entry, err)))
    })
}

pub(super) fn stop(flags: &StopFlags, registry: &Registry) -> Result<u8, Failure> {
    let timeout = match flags.timeout.trim() {
        "0" | "0s" => Duration::ZERO,
        text => parse_time(text).map_err(|err| Failure::new(format!("--timeout: {err}")))?,
    };
    let request = StopRequest { timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) };
    for_each(registry, &flags.machines, |entry| {
        if !ended_already(entry, ask(entry, |client| client.stop(request)))? {
            wait_for_end(entry, timeout.saturating_add(END_TIMEOUT))?;
        }
        Ok(())
    })
}

pub(super) fn kill(flags: &KillFlags, registry: &Registry) -> Result<u8, Failure> {
    let signal = flags.signal.as_deref().map(parse_signal).transpose()?;
    for_each(registry, &flags.machines, |entry| match signal {
        None | Some(9) => kill_machine(entry),
        Some(_) => ask(entry, |client| client.kill(KillRequest { signal }))
            .map(drop)
            .map_err(|err| about(entry, not_alive(entry, err))),
    })
}

/// Ends a machine at once and waits until its monitor is gone. A monitor that does not answer is killed.
fn kill_machine(entry: &Entry) -> Result<(), Failure> {
    let killed = ask(entry, |client| client.clone().with_timeout(KILL_TIMEOUT).kill(KillRequest::default()));
    match killed {
        Err(ClientError::NoAnswer(_)) => match client(entry).monitor() {
            // It still holds the machine's lock, so the process is the one that listens.
            Some(pid) if entry.is_alive() => {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).map_err(|err| {
                    about(entry, format!("its monitor does not answer and cannot be killed ({err})"))
                })?
            }
            _ => {}
        },
        Err(err) if entry.life == Life::Alive && matches!(err, ClientError::NotRunning) => {}
        Err(err) => return Err(about(entry, not_alive(entry, err))),
        Ok(_) => {}
    }
    wait_for_end(entry, END_TIMEOUT)
}

pub(super) fn wait(flags: &WaitFlags, registry: &Registry) -> Result<u8, Failure> {
    let for_jobs = [
        ("--any", flags.any),
        ("--timeout", flags.timeout.is_some()),
        ("--json", flags.json),
        ("--queue", flags.place.place.is_some()),
    ];
    let machine = flags.targets.iter().find(|target| !crate::jobs::is_job(target));
    refuse(&for_jobs, machine.map_or("", String::as_str))?;
    let mut last = 0;
    let entries: Vec<Entry> =
        flags.targets.iter().map(|name| registry.find(name)).collect::<Result<_, _>>()?;
    for entry in entries {
        let life = match &entry.life {
            Life::Alive => entry.wait()?,
            over => over.clone(),
        };
        match life {
            Life::Ended(exit) => {
                print_line(exit.exit_code)?;
                last = exit.exit_code;
            }
            Life::Lost | Life::Alive => {
                crate::print_failure(&about(&entry, LOST));
                last = HARRIER_FAILED;
            }
        }
    }
    Ok(last)
}

pub(super) fn rm(flags: &RmFlags, registry: &Registry) -> Result<u8, Failure> {
    for_each(registry, &flags.machines, |entry| {
        if flags.force && entry.life == Life::Alive {
            kill_machine(entry)?;
            // A machine that removes itself at its end has done so.
            return match registry.remove(entry) {
                Err(RegistryError::NotFound(_)) => Ok(()),
                result => Ok(result?),
            };
        }
        Ok(registry.remove(entry)?)
    })
}

/// Whether the machine has ended before it could be asked to; that is not a failure of who wants it to end.
fn ended_already<T>(entry: &Entry, asked: Result<T, ClientError>) -> Result<bool, Failure> {
    match asked {
        Ok(_) => Ok(false),
        Err(ClientError::NotRunning) if entry.is_alive() => {
            Err(about(entry, "its monitor lives and cannot be reached: try 'harrier rm --force'"))
        }
        Err(ClientError::NotRunning) => Ok(true),
        Err(err) => Err(about(entry, err)),
    }
}

fn wait_for_end(entry: &Entry, limit: Duration) -> Result<(), Failure> {
    match entry.wait_within(Some(limit)) {
        Ok(Some(_)) | Err(RegistryError::NotFound(_)) => Ok(()),
        Ok(None) => {
            Err(about(entry, format!("its monitor has not ended within {limit:?}: try 'harrier kill'")))
        }
        Err(err) => Err(err.into()),
    }
}

/// A signal's number, by number or by name with or without SIG.
fn parse_signal(text: &str) -> Result<u8, Failure> {
    const NAMES: &[(&str, i32)] = &[
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ILL", libc::SIGILL),
        ("TRAP", libc::SIGTRAP),
        ("ABRT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("SEGV", libc::SIGSEGV),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("CHLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("TTIN", libc::SIGTTIN),
        ("TTOU", libc::SIGTTOU),
        ("URG", libc::SIGURG),
        ("WINCH", libc::SIGWINCH),
        ("IO", libc::SIGIO),
        ("SYS", libc::SIGSYS),
    ];
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named
        .or_else(|| text.parse().ok())
        .and_then(|number| u8::try_from(number).ok())
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(|| {
            Failure::new(format!("--signal '{text}' is no signal: give a name like TERM, or 1 to 64"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("TERM", 15), ("sigint", 2), ("SIGKILL", 9), ("1", 1), ("64", 64)] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for bad in ["", "SIG", "NOPE", "0", "65", "-1", "1.5"] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
    }
}
