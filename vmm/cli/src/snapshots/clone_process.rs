//! The processes of clones: copies of the process that forks them.
//!
//! What every monitor makes for itself before it does anything - addresses that the loader puts in, tables of the
//! decoder - is about two thirds of what an idle clone has of its own. A copy of this process shares it with the other copies
//! until it writes there. Clones are machines of one user that share their memory anyway; that they know one another's
//! addresses is the price.
#![expect(unsafe_code, reason = "fork of a process that has one thread, and closing what it had open")]

use std::ffi::OsString;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::time::Instant;

use harrier_control::{Handover, MonitorProcess};

use crate::exit::HARRIER_FAILED;
use crate::flags::MonitorFlags;
use crate::monitor;

/// A copy of this process.
#[derive(Debug)]
struct CloneProcess(libc::pid_t);

/// Makes what the copies are to share. What a machine writes to must not be among it.
pub(super) fn prepare() {
    crate::own_memory::share_between_threads();
    harrier_engine_soft::prepare_tables();
}

/// Starts a monitor as a copy of this process, which must have one thread and comes back only here.
///
/// # Errors
/// The host's.
pub(super) fn start(handover: Handover, args: Vec<OsString>) -> io::Result<Box<dyn MonitorProcess>> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("this process has {threads} threads: a bug in harrier")));
    }
    // SAFETY: this process has one thread, so that no lock can be held by a thread that the copy lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => run(handover, args),
        pid => Ok(Box::new(CloneProcess(pid))),
    }
}

/// What the copy does: it never returns to what its original was at, and drops nothing of it.
fn run(handover: Handover, args: Vec<OsString>) -> ! {
    let Handover { folder, lock, word, log } = handover;
    let ended = catch_unwind(AssertUnwindSafe(|| {
        take_streams([lock, word, log]).map_err(crate::exit::no_stream)?;
        monitor::detached(MonitorFlags { folder, args }, Instant::now())
    }));
    let code = match ended {
        Ok(Ok(code)) => code,
        Ok(Err(failure)) => {
            crate::print_failure(&failure);
            failure.code
        }
        // The hook has told of it.
        Err(_) => HARRIER_FAILED,
    };
    std::process::exit(code.into())
}

/// Puts these in the places of the standard streams, and closes everything else that was open.
fn take_streams([lock, word, log]: [OwnedFd; 3]) -> io::Result<()> {
    rustix::stdio::dup2_stdin(&lock)?;
    rustix::stdio::dup2_stdout(&word)?;
    rustix::stdio::dup2_stderr(&log)?;
    for stream in [lock, word, log] {
        // Closed with the others.
        let _ = stream.into_raw_fd();
    }
    let names = std::fs::read_dir("/proc/self/fd")?;
    let open: Vec<libc::c_int> =
        names.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > libc::STDERR_FILENO) {
        // SAFETY: whatever owned it is never dropped in this copy, since `run` does not return. The folder's own is closed.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

impl MonitorProcess for CloneProcess {
    fn kill(&mut self) -> io::Result<()> {
        // SAFETY: a child that was not waited for, so that the number is its own.
        match unsafe { libc::kill(self.0, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn wait(&mut self) -> io::Result<ExitStatus> {
        let mut status = 0;
        loop {
            // SAFETY: the pointer is valid for writes of an int.
            if unsafe { libc::waitpid(self.0, &raw mut status, 0) } == self.0 {
                return Ok(ExitStatus::from_raw(status));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
