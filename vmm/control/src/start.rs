//! The starter's side of a detached machine: a process of its own session, that holds the machine's lock from its first
//! instruction on and says one word when the machine runs.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

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
    pub monitor: Box<dyn MonitorProcess>,
}

/// The process of a monitor, as its starter knows it.
pub trait MonitorProcess: std::fmt::Debug + Send {
    /// Ends it at once.
    ///
    /// # Errors
    /// The host's.
    fn kill(&mut self) -> io::Result<()>;

    /// Waits for its end.
    ///
    /// # Errors
    /// The host's.
    fn wait(&mut self) -> io::Result<ExitStatus>;
}

impl MonitorProcess for Child {
    fn kill(&mut self) -> io::Result<()> {
        Child::kill(self)
    }

    fn wait(&mut self) -> io::Result<ExitStatus> {
        Child::wait(self)
    }
}

/// What a monitor is given: see [`Seat::take`].
#[derive(Debug)]
pub struct Handover {
    /// The machine's folder.
    pub folder: PathBuf,
    /// Becomes its stdin.
    pub lock: OwnedFd,
    /// Becomes its stdout.
    pub word: OwnedFd,
    /// Becomes its stderr.
    pub log: OwnedFd,
}

/// A monitor that has been started and has not said its word.
#[derive(Debug)]
pub struct Starting {
    claim: Claim,
    monitor: Box<dyn MonitorProcess>,
    word: io::PipeReader,
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
        let starting = self.begin(|handover| {
            let mut monitor = Command::new(program);
            monitor.arg("monitor").arg(handover.folder).args(args);
            monitor.stdin(handover.lock).stdout(handover.word).stderr(handover.log);
            monitor.spawn().map(|monitor| Box::new(monitor) as Box<dyn MonitorProcess>)
        })?;
        starting.wait()
    }

    /// Has `start` make a monitor of what it is given.
    ///
    /// # Errors
    /// [`StartError::Spawn`]; nothing is left of the machine then.
    pub fn begin(
        self,
        start: impl FnOnce(Handover) -> io::Result<Box<dyn MonitorProcess>>,
    ) -> Result<Starting, StartError> {
        let begin = || {
            let log =
                File::options().append(true).create(true).mode(0o600).open(self.folder.monitor_log())?;
            let (word, said) = io::pipe()?;
            let handover = Handover {
                folder: self.folder.path().to_owned(),
                lock: self.lock.try_clone()?.into(),
                word: said.into(),
                log: log.into(),
            };
            Ok((start(handover)?, word))
        };
        match begin() {
            Ok((monitor, word)) => Ok(Starting { claim: self, monitor, word }),
            Err(err) => {
                self.remove();
                Err(StartError::Spawn(err))
            }
        }
    }

    fn remove(&self) {
        if let Err(err) = self.registry.remove_own(&self.folder) {
            log::warn!("{err}");
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

impl Starting {
    /// Waits until the machine runs.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left of the machine then.
    pub fn wait(self) -> Result<Started, StartError> {
        let Self { claim, mut monitor, word } = self;
        match hear(&claim, monitor.as_mut(), word) {
            Ok(()) => Ok(Started { record: claim.record, folder: claim.folder, monitor }),
            Err(err) => {
                claim.remove();
                Err(err)
            }
        }
    }
}

fn hear(claim: &Claim, monitor: &mut dyn MonitorProcess, pipe: io::PipeReader) -> Result<(), StartError> {
    let mut word = Vec::new();
    // A broken read is an empty word.
    let _ = BufReader::new(pipe.take(WORD_MAX)).read_until(b'\n', &mut word);
    match serde_json::from_slice(&word) {
        Ok(Word::Ready) => Ok(()),
        Ok(Word::Failed { exit_code, message }) => {
            let _ = monitor.wait();
            Err(StartError::Failed { exit_code, message })
        }
        Err(_) => {
            let _ = monitor.kill();
            let status = monitor.wait().map_err(StartError::Spawn)?;
            Err(StartError::Died(claim.last_words(status.signal(), status.code())))
        }
    }
}

/// The arguments of [`Claim::start`] as this process got them, without the program.
#[must_use]
pub fn own_arguments(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<OsString> {
    args.into_iter().skip(1).map(|arg| arg.as_ref().to_owned()).collect()
}
