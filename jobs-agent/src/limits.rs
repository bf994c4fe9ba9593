//! What a command may use: a control group of its own for processor, memory and processes, and the size of the file systems
//! in memory. A command without limits costs nothing of this.
//!
//! A command that needs more memory than it may is ended by the kernel, whole; one that makes more processes than it may is
//! ended here: a program that forks without end never ends by itself.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use harrier_agent_protocol::{Cause, Limits};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

const ROOT: &str = "/sys/fs/cgroup";

/// `cpu.max` counts in so many microseconds.
const PERIOD_US: u64 = 100_000;

/// The file systems in memory beside the root, with the flags that they have (init.rs).
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const WRITABLE: [&str; 3] = ["/tmp", "/dev/shm", "/run"];

/// A command's control group.
pub(crate) struct Group {
    path: PathBuf,
    /// Where a process says that it belongs here.
    members: File,
    /// Tells of processes that could not be made.
    process_events: Option<File>,
    was_full: bool,
}

impl Group {
    /// Makes the group that these limits need; `None` if they need none.
    ///
    /// # Errors
    /// One line: the guest's kernel has not what is needed, or a value is no limit.
    pub(crate) fn new(id: u32, limits: &Limits) -> Result<Option<Self>, String> {
        let quota_us =
            limits.cpu_percent.map(|percent| u64::from(percent).saturating_mul(PERIOD_US / 100).max(1000));
        let values = [
            ("cpu", "cpu.max", quota_us.map(|quota| format!("{quota} {PERIOD_US}"))),
            ("memory", "memory.max", limits.memory_bytes.map(|bytes| bytes.to_string())),
            ("pids", "pids.max", limits.processes.map(|count| count.to_string())),
        ];
        if values.iter().all(|(_, _, value)| value.is_none()) {
            return Ok(None);
        }
        let there = fs::read_to_string(format!("{ROOT}/cgroup.controllers")).unwrap_or_default();
        let has = |controller: &str| there.split_whitespace().any(|name| name == controller);
        for (controller, _, value) in &values {
            if value.is_some() && !has(controller) {
                return Err(format!(
                    "the guest's kernel cannot limit this: it has no {controller} controller for control groups"
                ));
            }
        }
        // The memory controller also counts what the kernel ends for want of memory in the whole machine.
        let is_needed = |controller: &str, is_limited| is_limited || controller == "memory";
        for (controller, _, value) in &values {
            if !is_needed(controller, value.is_some()) || !has(controller) {
                continue;
            }
            set(format!("{ROOT}/cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        let path = Path::new(ROOT).join(format!("command-{id}"));
        fs::create_dir(&path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        let mut group = Self {
            members: open(&path.join("cgroup.procs"), true)?,
            process_events: None,
            was_full: false,
            path,
        };
        for (_, name, value) in &values {
            if let Some(value) = value {
                set(group.file(name), value)?;
            }
        }
        if limits.memory_bytes.is_some() {
            // Half a job is no use to anybody.
            set(group.file("memory.oom.group"), "1")?;
        }
        if limits.processes.is_some() {
            let mut events = open(&group.path.join("pids.events"), false)?;
            // Poll tells of changes after the last reading.
            events
                .read_to_end(&mut Vec::new())
                .map_err(|error| format!("cannot read pids.events: {error}"))?;
            group.process_events = Some(events);
        }
        Ok(Some(group))
    }

    fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.path.display())
    }

    /// What a process writes "0" to in order to be in the group.
    pub(crate) fn members(&self) -> &File {
        &self.members
    }

    /// To be polled for POLLPRI: the group may be full.
    pub(crate) fn process_events(&self) -> Option<BorrowedFd<'_>> {
        self.process_events.as_ref().map(AsFd::as_fd)
    }

    /// Looks whether a process could not be made, and ends the group then.
    pub(crate) fn see_process_events(&mut self) {
        let Some(events) = &mut self.process_events else { return };
        let mut text = String::new();
        let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
        if read.is_err() || value_of(&text, "max").is_some_and(|count| count > 0) {
            self.was_full = read.is_ok();
            self.process_events = None;
            self.kill();
        }
    }

    /// Ends every process of the group at once.
    pub(crate) fn kill(&self) {
        // Kernels before 5.14 cannot; there the command itself is ended by who calls.
        let _ = set(self.file("cgroup.kill"), "1");
    }

    /// Why the command has ended, as far as the group knows.
    pub(crate) fn cause(&self) -> Cause {
        if self.was_full {
            return Cause::Processes;
        }
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        match value_of(&events, "oom_kill") {
            Some(1..) => Cause::Memory,
            Some(0) | None => Cause::Itself,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It stays while processes are in it, and goes with the machine.
        let _ = fs::remove_dir(&self.path);
    }
}

/// How many processes the kernel has ended for want of memory since its start.
pub(crate) fn oom_kills() -> u64 {
    value_of(&fs::read_to_string("/proc/vmstat").unwrap_or_default(), "oom_kill").unwrap_or(0)
}

/// Lets each writable file system grow to so many bytes only. `root` is the file system in memory below the root's.
///
/// # Errors
/// One line: the root is none in memory, or holds more already.
pub(crate) fn limit_disk(bytes: u64, root: &Path) -> Result<(), String> {
    let failed = |path: &Path, reason: &str| {
        format!("the guest's {} cannot be limited to {bytes} bytes: {reason}", path.display())
    };
    // Nothing is no limit for tmpfs.
    let size = format!("size={}", bytes.max(4096));
    let beside = WRITABLE.map(|path| (Path::new(path), NO_DEVICES));
    for (path, flags) in std::iter::once((root, MsFlags::empty())).chain(beside) {
        let is_in_memory = statfs(path).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        if !is_in_memory && path == root {
            return Err(failed(path, "it is no file system in memory"));
        }
        // A disk's file system may have a /tmp of its own, which is in the root then.
        if is_in_memory {
            let remount = MsFlags::MS_REMOUNT | flags;
            mount(None::<&str>, path, None::<&str>, remount, Some(size.as_str()))
                .map_err(|errno| failed(path, errno.desc()))?;
        }
    }
    Ok(())
}

fn open(path: &Path, write: bool) -> Result<File, String> {
    OpenOptions::new()
        .read(!write)
        .write(write)
        .open(path)
        .map_err(|error| format!("cannot open {}: {error}", path.display()))
}

fn set(path: impl AsRef<Path>, value: &str) -> Result<(), String> {
    let write =
        || -> io::Result<()> { OpenOptions::new().write(true).open(&path)?.write_all(value.as_bytes()) };
    write().map_err(|error| format!("cannot set {} to {value}: {error}", path.as_ref().display()))
}

/// The number behind a name, in lines of both.
fn value_of(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value_of(text, "oom_kill"), Some(2));
        assert_eq!(value_of(text, "oom"), Some(3));
        assert_eq!(value_of(text, "oo"), None);
        assert_eq!(value_of("max no\n", "max"), None);
    }

    #[test]
    fn no_limits_need_no_group() {
        let disk_only = Limits { disk_bytes: Some(1), ..Limits::default() };
        for limits in [Limits::default(), disk_only] {
            assert!(matches!(Group::new(1, &limits), Ok(None)));
        }
    }
}
