//! The file through which a worker tells a monitor how long it may run its job.
//!
//! The worker writes the end of the lease, in nanoseconds of the host's boot-time clock, which also counts while the
//! host sleeps. The monitor locks the file for as long as it lives, reads it again and again, and ends itself when the
//! time has come: a worker that is killed leaves no job running past its lease, and whoever finds the file unlocked
//! knows that no monitor is left.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Two numbers of so many digits, and their newlines: a reader that meets a writer sees two that differ.
const DIGITS: usize = 20;

/// Now, by the clock that leases are measured with.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// A lease's end on disk.
#[derive(Debug)]
pub struct LeaseFile {
    file: File,
}

impl LeaseFile {
    /// Makes the file.
    pub fn create(path: &Path, until_ns: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let lease = Self { file };
        lease.set(until_ns)?;
        Ok(lease)
    }

    /// Opens a file that a worker has made.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::options().read(true).write(true).open(path)? })
    }

    /// Moves the end; 0 revokes the lease.
    pub fn set(&self, until_ns: u64) -> io::Result<()> {
        let line = format!("{until_ns:0width$}\n", width = DIGITS);
        self.file.write_all_at(format!("{line}{line}").as_bytes(), 0)
    }

    /// The end, in nanoseconds of [`now_ns`]'s clock.
    pub fn until_ns(&self) -> io::Result<u64> {
        for _ in 0..100 {
            let mut bytes = [0; 2 * (DIGITS + 1)];
            self.file.read_exact_at(&mut bytes, 0)?;
            let text = String::from_utf8_lossy(&bytes);
            let mut lines = text.lines();
            if let (Some(first), Some(second)) = (lines.next(), lines.next())
                && first == second
                && let Ok(until) = first.parse()
            {
                return Ok(until);
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
    fn the_end_is_read_back_and_one_monitor_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lease");
        let worker = LeaseFile::create(&path, now_ns() + 5).unwrap();
        let monitor = LeaseFile::open(&path).unwrap();
        assert!(monitor.lock().unwrap());
        assert!(!LeaseFile::open(&path).unwrap().lock().unwrap());
        worker.set(u64::MAX).unwrap();
        assert_eq!(monitor.until_ns().unwrap(), u64::MAX);
        worker.set(0).unwrap();
        assert_eq!(monitor.until_ns().unwrap(), 0);
        drop(monitor);
        assert!(LeaseFile::open(&path).unwrap().lock().unwrap());
        std::fs::write(&path, "rubbish").unwrap();
        assert!(worker.until_ns().is_err());
    }
}
