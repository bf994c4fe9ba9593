//! A command in namespaces of its own: processes, mounts, IPC, host name and control groups.
//!
//! A process that is number 1 in its namespace is not ended by signals that it does not handle, and has to reap others. So that
//! the command is a process like any other, two processes stand before it: the *keeper*, which the agent knows and
//! waits for, and in the new namespace a first process that reaps. The keeper ends as the command does.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd;

use crate::sys::{self, Ended, Fork};

/// Puts the calling process, a child of the agent, into new namespaces and returns in the command's process. The keeper and
/// the first process never return; they close every file, so that the ends of the command's streams are its own.
pub(crate) fn enter() -> Result<(), Errno> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces)?;
    let (ended, tell) = unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    match fork()? {
        Fork::Parent(first) => keep(first, &ended),
        Fork::Child => {}
    }
    drop(ended);
    mount_own()?;
    match fork()? {
        Fork::Parent(command) => reap_until(command, &tell),
        Fork::Child => {
            drop(tell);
            Ok(())
        }
    }
}

fn fork() -> Result<Fork, Errno> {
    sys::fork().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// What the machine mounts from now on is not seen here, nor the other way round; /proc shows these processes, and the control
/// groups are this command's, and not to be written.
fn mount_own() -> Result<(), Errno> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none)?;
    // The machine's own is below it, and the same file system is not mounted twice in one place.
    let _ = umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH);
    match mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), flags | MsFlags::MS_RDONLY, none) {
        // A root file system without that folder, or a kernel without control groups: nothing is shown then.
        Ok(()) | Err(Errno::ENOENT | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The keeper: waits for the first process and ends as the command did.
fn keep(first: libc::pid_t, ended: &OwnedFd) -> ! {
    // Signals are meant for the command, which gets them with its group.
    sys::ignore_signals();
    sys::close_all_but(ended.as_raw_fd());
    let how = sys::read_ended(ended);
    sys::wait_for(first);
    match how {
        Some(Ended::Code(code)) => sys::exit_now(code.into()),
        Some(Ended::Signal(number)) => sys::end_by_signal(number),
        // The first process was killed before it could tell.
        None => sys::end_by_signal(libc::SIGKILL as u8),
    }
}

/// The first process of the namespace: reaps until the command has ended, and takes what is left with it.
fn reap_until(command: libc::pid_t, tell: &OwnedFd) -> ! {
    sys::ignore_signals();
    sys::close_all_but(tell.as_raw_fd());
    let how = sys::reap_until(command);
    sys::write_ended(tell, how);
    sys::exit_now(0)
}
