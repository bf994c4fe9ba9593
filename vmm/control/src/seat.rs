//! The monitor's side of its machine's folder.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::record::{self, ExitRecord, MachineRecord};
use crate::registry::{MachineFolder, Registry};
use crate::socket;

/// Longest error in an exit record, in bytes: the record has to fit the room that is reserved for it.
const ERROR_MAX: usize = 1024;

/// What the monitor tells its starter, once, as one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Word {
    /// The machine runs.
    Ready,
    /// It does not, and why.
    Failed {
        /// For whoever asked for the machine.
        exit_code: u8,
        /// One line.
        message: String,
    },
}

/// The starter has gone away and nobody waits for the machine any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("whoever started the machine is gone")]
pub struct Abandoned;

/// A monitor in its machine's folder. Holds the lock until it is dropped, at best by the end of the process.
#[derive(Debug)]
pub struct Seat {
    registry: Registry,
    folder: MachineFolder,
    record: MachineRecord,
    _lock: File,
    exit: File,
    /// Until the word is said.
    starter: Mutex<Option<File>>,
}

impl Seat {
    /// For a machine whose monitor is this process, and nobody waits for its word.
    ///
    /// # Errors
    /// The host's, if the exit record cannot be opened.
    pub(crate) fn new(
        registry: Registry,
        folder: MachineFolder,
        record: MachineRecord,
        lock: File,
    ) -> io::Result<Self> {
        let exit = File::options().write(true).open(folder.exit())?;
        Ok(Self { registry, folder, record, _lock: lock, exit, starter: Mutex::new(None) })
    }

    /// For a process that [`crate::Claim::start`] has started: `lock` is its stdin, `starter` its stdout.
    ///
    /// # Errors
    /// `InvalidInput` if it was not started so.
    pub fn take(folder: &Path, lock: OwnedFd, starter: OwnedFd) -> io::Result<Self> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
        let root = folder.parent().ok_or_else(|| invalid("it is not the folder of a machine"))?;
        let registry = Registry::open(root).map_err(io::Error::other)?;
        let folder = MachineFolder::new(folder.to_owned());
        let lock = File::from(lock);
        let (held, named) = (lock.metadata()?, std::fs::metadata(folder.lock())?);
        if (held.dev(), held.ino()) != (named.dev(), named.ino()) {
            return Err(invalid("its lock was not handed over"));
        }
        // It is ours already; this only says so if it is not.
        lock.try_lock().map_err(|_| invalid("its lock is held by another process"))?;
        let record = folder.record()?;
        let seat = Self::new(registry, folder, record, lock)?;
        *seat.starter.lock().unwrap_or_else(PoisonError::into_inner) = Some(File::from(starter));
        Ok(seat)
    }

    /// What is known about the machine.
    #[must_use]
    pub fn record(&self) -> &MachineRecord {
        &self.record
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &MachineFolder {
        &self.folder
    }

    /// The control socket, to be called once.
    ///
    /// # Errors
    /// The host's.
    pub fn listen(&self) -> io::Result<UnixListener> {
        socket::listen(&self.folder.socket())
    }

    /// Says that the machine runs. True only the first time; without a starter that is all that happens.
    ///
    /// # Errors
    /// [`Abandoned`] if the starter is gone: nobody knows of the machine then, and it had better end.
    pub fn ready(&self) -> Result<(), Abandoned> {
        let started = self.folder.mark_started();
        match (self.say(&Word::Ready), started) {
            (Ok(()), Ok(())) => Ok(()),
            (Ok(()), Err(err)) => {
                log::error!(
                    "machine '{}': its start cannot be noted ({err}), it runs all the same",
                    self.record.name
                );
                Ok(())
            }
            (Err(_), _) => Err(Abandoned),
        }
    }

    /// Waits until the starter has gone away without having heard, or has heard. For a thread of its own.
    ///
    /// # Errors
    /// [`Abandoned`] if it has gone away.
    pub fn watch_starter(&self) -> Result<(), Abandoned> {
        loop {
            let starter = self.starter.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(pipe) = starter.as_ref().map(File::try_clone) else { return Ok(()) };
            drop(starter);
            let Ok(pipe) = pipe else { return Ok(()) };
            // A pipe that nobody reads any more is in error, whatever is asked for. The timeout lets go of the copy.
            let mut entries = [PollFd::new(&pipe, PollFlags::empty())];
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let gone = poll(&mut entries, Some(&timeout)).is_ok_and(|count| count > 0);
            // A starter that has heard closes its end as well.
            if gone && !self.is_ready() {
                return Err(Abandoned);
            }
        }
    }

    /// Whether the machine has been said to run.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.starter.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn say(&self, word: &Word) -> io::Result<()> {
        let pipe = self.starter.lock().unwrap_or_else(PoisonError::into_inner).take();
        pipe.map_or(Ok(()), |mut pipe| pipe.write_all(&record::to_bytes(word)?))
    }

    /// Records the end. If the starter still waits, the machine has failed to start: the starter hears why, and nothing
    /// is kept. A machine that is to be removed at its end is removed.
    pub fn finish(&self, exit: &ExitRecord) {
        let mut exit = exit.clone();
        if let Some(error) = &mut exit.error {
            error.truncate(error.floor_char_boundary(ERROR_MAX));
        }
        let failed = !self.is_ready();
        if let Err(err) = self.write_exit(&exit) {
            log::error!("machine '{}': its end cannot be recorded: {err}", self.record.name);
        }
        let _ = std::fs::remove_file(self.folder.socket());
        if (failed || self.record.auto_remove)
            && let Err(err) = self.registry.remove_own(&self.folder)
        {
            log::error!("machine '{}': its folder cannot be removed: {err}", self.record.name);
        }
        if failed {
            let message =
                exit.error.unwrap_or_else(|| format!("the machine ended with code {}", exit.exit_code));
            // A starter that is gone does not care.
            let _ = self.say(&Word::Failed { exit_code: exit.exit_code, message });
        }
    }

    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()> {
        // One write in the room that is reserved: whole or not there, also when the disk is full.
        self.exit.write_all_at(&record::to_bytes(exit)?, 0)?;
        self.exit.sync_all()
    }
}
