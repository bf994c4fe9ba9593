//! The file through which a worker tells a monitor how long it may run its job.
//!
//! The worker writes two moments, in nanoseconds of the host's boot-time clock, which also counts while the host sleeps:
//! from the first on the machine stands still, and at the second, the end of the lease, its monitor ends. The monitor locks
//! the file for as long as it lives and reads it again and again, in threads that wait for nothing else: whatever keeps its
//! worker busy, and if it is killed, no job runs on for long. Whoever finds the file unlocked knows that no monitor is left.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Of each number.
const DIGITS: usize = 20;
/// Two numbers, a space and a newline; the line is there twice: a reader that meets a writer sees two that differ.
const LINE: usize = 2 * DIGITS + 2;
/// The last part of a lease, in which nothing runs any more.
const STAND_SHARE: u64 = 3;

/// Now, by the clock that leases are measured with.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// How long a job may run, by [`now_ns`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// From here on its machine stands still.
    pub stand_ns: u64,
    /// The lease's end.
    pub until_ns: u64,
}

impl Deadlines {
    /// Those of a lease that was asked for then.
    pub fn of(asked_ns: u64, lease: Duration) -> Self {
        let lease_ns = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
        let until_ns = asked_ns.saturating_add(lease_ns);
        Self { stand_ns: until_ns.saturating_sub(lease_ns / STAND_SHARE), until_ns }
    }

    /// Whether the machine has to stand still.
    pub fn is_late(self) -> bool {
        self.stand_ns <= now_ns()
    }

    /// Whether the lease is over.
    pub fn is_past(self) -> bool {
        self.until_ns <= now_ns()
    }
}

/// The deadlines on disk.
#[derive(Debug)]
pub struct LeaseFile {
    file: File,
    revoked: Mutex<bool>,
}

impl LeaseFile {
    /// Makes the file.
    pub fn create(path: &Path, deadlines: Deadlines) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let lease = Self { file, revoked: Mutex::new(false) };
        lease.set(deadlines)?;
        Ok(lease)
    }

    /// Opens a file that a worker has made.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file, revoked: Mutex::new(false) })
    }

    /// Moves the deadlines; those of a lease that was revoked here stay where they are.
    pub fn set(&self, deadlines: Deadlines) -> io::Result<()> {
        let revoked = self.revoked.lock().unwrap_or_else(PoisonError::into_inner);
        if *revoked {
            return Ok(());
        }
        self.write(deadlines)
    }

    /// Ends the lease at once.
    pub fn revoke(&self) -> io::Result<()> {
        let mut revoked = self.revoked.lock().unwrap_or_else(PoisonError::into_inner);
        *revoked = true;
        self.write(Deadlines { stand_ns: 0, until_ns: 0 })
    }

    fn write(&self, deadlines: Deadlines) -> io::Result<()> {
        let Deadlines { stand_ns, until_ns } = deadlines;
        let line = format!("{stand_ns:0width$} {until_ns:0width$}\n", width = DIGITS);
        self.file.write_all_at(format!("{line}{line}").as_bytes(), 0)
    }

    /// What the file says.
    pub fn deadlines(&self) -> io::Result<Deadlines> {
        for _ in 0..100 {
            let mut bytes = [0; 2 * LINE];
            self.file.read_exact_at(&mut bytes, 0)?;
            let text = String::from_utf8_lossy(&bytes);
            let mut lines = text.lines();
            if let (Some(first), Some(second)) = (lines.next(), lines.next())
                && first == second
                && let Some((stand, until)) = first.split_once(' ')
                && let (Ok(stand_ns), Ok(until_ns)) = (stand.parse(), until.parse())
            {
                return Ok(Deadlines { stand_ns, until_ns });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "not a lease"))
    }

    /// Marks a monitor as alive until this value is dropped or the process ends. False: another has the job.
    pub fn lock(&self) -> io::Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(err)) => Err(err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadlines_are_read_back_and_one_monitor_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lease");
        let worker = LeaseFile::create(&path, Deadlines::of(now_ns(), Duration::from_secs(5))).unwrap();
        let monitor = LeaseFile::open(&path).unwrap();
        assert!(monitor.lock().unwrap());
        assert!(!LeaseFile::open(&path).unwrap().lock().unwrap());
        let last = Deadlines { stand_ns: 7, until_ns: u64::MAX };
        worker.set(last).unwrap();
        assert_eq!(monitor.deadlines().unwrap(), last);
        worker.revoke().unwrap();
        worker.set(last).unwrap();
        assert!(monitor.deadlines().unwrap().is_past(), "what is revoked stays so");
        drop(monitor);
        assert!(LeaseFile::open(&path).unwrap().lock().unwrap());
        std::fs::write(&path, "rubbish").unwrap();
        assert!(worker.deadlines().is_err());
    }

    #[test]
    fn a_machine_stands_still_for_the_last_third_of_its_lease() {
        let deadlines = Deadlines::of(1_000, Duration::from_nanos(300));
        assert_eq!(deadlines, Deadlines { stand_ns: 1_200, until_ns: 1_300 });
        assert_eq!(Deadlines::of(u64::MAX - 1, Duration::MAX).until_ns, u64::MAX);
        assert!(deadlines.is_late() && deadlines.is_past());
        let fresh = Deadlines::of(now_ns(), Duration::from_secs(60));
        assert!(!fresh.is_late() && !fresh.is_past());
    }
}
