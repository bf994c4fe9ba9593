//! The starter's side of a detached machine: a process of its own session, that holds the machine's lock from its first
//! instruction on and says one word when the machine runs.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::record::MachineRecord;
use crate::registry::{MachineFolder, Registry};
use crate::seat::{Seat, Word};

/// Longest word of a monitor, in bytes.
const WORD_MAX: u64 = 64 << 10;

/// Why a machine does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The monitor said so.
    #[error("{message}")]
    Failed {
        /// For whoever asked for the machine; see [`crate::ExitRecord::exit_code`].
        exit_code: u8,
        /// One line.
        message: String,
    },
    /// The monitor ended without a word.
    #[error("the machine's monitor ended before the machine ran ({0})")]
    Died(String),
    /// There is no monitor.
    #[error("the machine's monitor cannot be started ({0}): raise the limits of processes and open files")]
    Spawn(#[source] io::Error),
}

/// A new machine's folder and its lock. Dropping it without starting a monitor leaves a folder that the next look at the
/// registry removes.
#[derive(Debug)]
pub struct Claim {
    registry: Registry,
    folder: MachineFolder,
    record: MachineRecord,
    lock: File,
}

/// A machine that runs in a process of its own.
#[derive(Debug)]
pub struct Started {
    /// What is known about it.
    pub record: MachineRecord,
    /// Where its files are.
    pub folder: MachineFolder,
    /// Its monitor. A process that lives longer than the machine is to wait for it.
    pub monitor: Child,
}

impl Claim {
    pub(crate) fn new(registry: Registry, folder: MachineFolder, record: MachineRecord, lock: File) -> Self {
        Self { registry, folder, record, lock }
    }

    /// What is known about the machine.
    #[must_use]
    pub fn record(&self) -> &MachineRecord {
        &self.record
    }

    /// Makes this process the machine's monitor.
    ///
    /// # Errors
    /// The host's.
    pub fn sit_down(self) -> io::Result<Seat> {
        Seat::new(self.registry, self.folder, self.record, self.lock)
    }

    /// Starts `program` as the machine's monitor, as `PROGRAM monitor FOLDER ARGS...` with the lock as its stdin, a pipe
    /// for its word as its stdout and a file as its stderr, and waits until the machine runs.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left of the machine then.
    pub fn start(self, program: &Path, args: &[OsString]) -> Result<Started, StartError> {
        let result = self.try_start(program, args);
        if result.is_err()
            && let Err(err) = self.registry.remove_own(&self.folder)
        {
            log::warn!("{err}");
        }
        let monitor = result?;
        Ok(Started { record: self.record, folder: self.folder, monitor })
    }

    fn try_start(&self, program: &Path, args: &[OsString]) -> Result<Child, StartError> {
        let log = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.folder.monitor_log())
            .map_err(StartError::Spawn)?;
        let lock = self.lock.try_clone().map_err(StartError::Spawn)?;
        let mut monitor = Command::new(program)
            .arg("monitor")
            .arg(self.folder.path())
            .args(args)
            .stdin(Stdio::from(lock))
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .spawn()
            .map_err(StartError::Spawn)?;
        let mut word = Vec::new();
        if let Some(pipe) = monitor.stdout.take() {
            // A broken read is an empty word.
            let _ = BufReader::new(pipe.take(WORD_MAX)).read_until(b'\n', &mut word);
        }
        match serde_json::from_slice(&word) {
            Ok(Word::Ready) => Ok(monitor),
            Ok(Word::Failed { exit_code, message }) => {
                let _ = monitor.wait();
                Err(StartError::Failed { exit_code, message })
            }
            Err(_) => {
                let _ = monitor.kill();
                let status = monitor.wait().map_err(StartError::Spawn)?;
                Err(StartError::Died(self.last_words(status.signal(), status.code())))
            }
        }
    }

    fn last_words(&self, signal: Option<i32>, code: Option<i32>) -> String {
        let mut log = Vec::new();
        if let Ok(file) = File::open(self.folder.monitor_log()) {
            let _ = file.take(WORD_MAX).read_to_end(&mut log);
        }
        let text = String::from_utf8_lossy(&log);
        match (text.lines().rev().find(|line| !line.trim().is_empty()), signal, code) {
            (Some(line), _, _) => line.trim_start_matches("harrier: ").to_owned(),
            (None, Some(signal), _) => format!("signal {signal}"),
            (None, None, code) => format!("code {}", code.unwrap_or_default()),
        }
    }
}

/// The arguments of [`Claim::start`] as this process got them, without the program.
#[must_use]
pub fn own_arguments(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<OsString> {
    args.into_iter().skip(1).map(|arg| arg.as_ref().to_owned()).collect()
}
