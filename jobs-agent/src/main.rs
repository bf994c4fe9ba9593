//! The program that runs jobs inside a guest.
//!
//! As process 1 of the initramfs it prepares the machine ([`init`]), dials the host ([`dial`]) and serves it
//! ([`session`]): it runs commands ([`command`], [`spawn`]), streams their input and output, reaps every process that is
//! left to it and switches the machine off in the end. It keeps commands to their [`limits`], and copies
//! files for the host ([`transfer`]). The first command may name a disk as its root
//! file system ([`root`]).
//!
//! Outside a machine, `harrier-jobs-agent --connect-unix PATH` or `--connect-fd N` serves one connection as an
//! ordinary process, `--redial-unix PATH` dials again when it is lost: the same session without mounts, for tests and
//! development.
//!
//! Under the name `harrier-guest` it is another program, for jobs ([`guest`]).
//!
//! One thread, one poll loop. All unsafe code is in [`sys`]. The host's side is `harrier-jobs`.

mod command;
mod dial;
mod exit;
mod guest;
mod identity;
mod init;
mod isolate;
mod limits;
mod progress;
mod root;
mod session;
mod spawn;
mod sys;
mod transfer;
mod users;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use harrier_agent_protocol::BootTimes;

use crate::dial::Dialer;

fn main() -> ExitCode {
    let start_ns = sys::monotonic_ns();
    if std::process::id() == 1 {
        init::run(start_ns)
    }
    let arguments: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let (name, arguments) = arguments.split_first().map_or(("", [].as_slice()), |(name, rest)| (name, rest));
    if std::path::Path::new(name).file_name().is_some_and(|name| name == guest::NAME) {
        return guest::run(arguments);
    }
    let mut dialer = Dialer::Given;
    let connection = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [option @ ("--connect-unix" | "--redial-unix"), path] => {
            if *option == "--redial-unix" {
                dialer = Dialer::Unix(path.into());
            }
            UnixStream::connect(path)
                .map(|stream| File::from(OwnedFd::from(stream)))
                .map_err(|error| format!("cannot connect to {path}: {error}"))
        }
        ["--connect-fd", number] => number
            .parse()
            .map_err(|_| format!("{number:?} is not a file descriptor"))
            .and_then(|fd| sys::inherited_fd(fd).map_err(|error| format!("file descriptor {fd}: {error}")))
            .map(File::from),
        _ => {
            Err("runs as process 1 of a machine; elsewhere use --connect-unix PATH, --redial-unix PATH or --connect-fd N".into())
        }
    };
    let ended = connection.and_then(|connection| {
        let times =
            BootTimes { agent_start_ns: start_ns, mounted_ns: start_ns, connected_ns: sys::monotonic_ns() };
        session::Session::new(connection, dialer, session::Place::Process, times)
            .and_then(|mut session| session.run())
            .map_err(|error| error.to_string())
    });
    match ended {
        Ok(_) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("harrier-jobs-agent: {message}");
            ExitCode::FAILURE
        }
    }
}
