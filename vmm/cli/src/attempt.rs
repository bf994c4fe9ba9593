//! The monitor of a job: what it tells its worker, and the end of its lease.
//!
//! A worker starts `harrier run --attempt FOLDER`; `harrier_jobs::worker` describes the folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harrier_jobs::Session;
use harrier_jobs::worker::lease_file::{Deadlines, LeaseFile, now_ns};
use harrier_jobs::worker::{RunOutput, RunResult, names, write_durably};
use harrier_machine::MachineHandle;

use crate::exit::{Failure, HARRIER_FAILED};
use crate::report::RunRecord;
use crate::signals::{Interrupter, Interruption};

/// The codes of commands that cannot be started, as shells have them.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// How often the guest of an attempt says that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long it may say nothing, unless a flag says otherwise.
pub(crate) const HANG_LIMIT: Duration = Duration::from_secs(120);
/// How often the lease is read; and how often by a machine that has to stand still.
const LOOK: Duration = Duration::from_secs(1);
const SHORT_LOOK: Duration = Duration::from_millis(50);

/// Lets the machine stand still, or go on; false while there is none.
type Hold = Box<dyn Fn(bool) -> bool + Send + Sync>;

/// An attempt whose lease this process holds.
pub(crate) struct Attempt {
    folder: PathBuf,
    hold: Arc<OnceLock<Hold>>,
}

impl Attempt {
    /// Takes the lease, and ends the process when it ends. The lock on it is kept until then.
    ///
    /// Of the two threads for its two deadlines neither waits for anything else than time, but for the machine that is to
    /// stand still: so that one ends the process whatever becomes of the other.
    pub(crate) fn enter(folder: &Path) -> Result<Self, Failure> {
        let unusable = |err: io::Error| {
            Failure::new(format!("--attempt '{}' cannot be used ({err}): workers make it", folder.display()))
        };
        let lease = LeaseFile::open(&folder.join(names::LEASE)).map_err(unusable)?;
        if !lease.lock().map_err(unusable)? {
            return Err(Failure::new(format!("another process runs the attempt '{}'", folder.display())));
        }
        if lease.deadlines().map_err(unusable)?.is_past() {
            return Err(Failure::new("the lease is over"));
        }
        let lease = Arc::new(lease);
        let hold = Arc::new(OnceLock::new());
        let (ending, standing, machine) = (Arc::clone(&lease), lease, Arc::clone(&hold));
        let name = |name: &str| thread::Builder::new().name(name.to_owned());
        name("lease").spawn(move || watch_end(&ending)).map_err(unusable)?;
        name("stand").spawn(move || watch_stand(&standing, &machine)).map_err(unusable)?;
        Ok(Attempt { folder: folder.to_owned(), hold })
    }

    /// How the machine is made to stand still when the first deadline comes.
    pub(crate) fn stand_by(&self, hold: impl Fn(bool) -> bool + Send + Sync + 'static) {
        // Called once.
        let _ = self.hold.set(Box::new(hold));
    }

    /// Writes down how the run ended.
    pub(crate) fn finish(&self, record: &RunRecord, result: &Result<u8, Failure>) {
        let (exit_code, error) = match result {
            Ok(code) => (*code, None),
            Err(failure) => (failure.code, Some(failure.message.clone())),
        };
        let outputs = record.output_files.iter().map(|file| RunOutput {
            guest: String::from_utf8_lossy(&file.guest).into_owned(),
            facts: file.facts,
        });
        let result = RunResult {
            // A command that ends its machine has come to its end.
            status: record.status().or(record.ended_machine.then_some("exited")).map(str::to_owned),
            exit_code,
            error,
            cause: record.cause().map(str::to_owned),
            outputs: outputs.collect(),
        };
        self.write(&result);
    }

    /// The command runs.
    pub(crate) fn mark_started(&self, engine: &str) {
        mark_started(&self.folder, engine);
    }

    /// Writes down how a command ended in a machine that goes on.
    pub(crate) fn finish_command(&self, result: &Result<u8, Failure>) {
        let (exit_code, error) = match result {
            Ok(code) => (*code, None),
            Err(failure) => (failure.code, Some(failure.message.clone())),
        };
        let status = match (exit_code, &error) {
            (_, None) => Some("exited"),
            (NOT_FOUND, _) => Some("not found"),
            (NOT_EXECUTABLE, _) => Some("not executable"),
            _ => None,
        };
        let status = status.map(str::to_owned);
        self.write(&RunResult { status, exit_code, error, ..RunResult::default() });
    }

    fn write(&self, result: &RunResult) {
        let written = serde_json::to_vec(result)
            .map_err(io::Error::from)
            .and_then(|text| write_durably(&self.folder.join(names::RESULT), &text));
        if let Err(err) = written {
            // The worker then finds no result and says that the monitor failed; this is its last word.
            crate::print_failure(&Failure::new(format!(
                "the result cannot be written ({err}): free some space"
            )));
        }
    }
}

/// Tells the worker that the guest is up.
pub(crate) fn mark_started(folder: &Path, engine: &str) {
    let path = folder.join(names::STARTED);
    let temporary = path.with_extension("tmp");
    if let Err(err) = std::fs::write(&temporary, engine).and_then(|()| std::fs::rename(&temporary, &path)) {
        log::warn!("the start cannot be written down: {err}");
    }
}

/// Looks after the guest: passes on how far its command has come, and ends a machine whose agent has fallen silent.
///
/// Silence counts only while the machine runs, in looks of a second each: a host that sleeps or stands still makes none. The
/// thread ends with the machine, and then has written down the command's last word.
pub(crate) fn watch_guest(
    folder: PathBuf,
    limit: Duration,
    session: Session,
    machine: MachineHandle,
    is_paused: impl Fn() -> bool + Send + 'static,
    interrupter: Interrupter,
) -> io::Result<JoinHandle<()>> {
    let looks = limit.as_secs().max(1);
    thread::Builder::new().name("guest".to_owned()).spawn(move || {
        let mut known = session.health();
        let mut silent = 0;
        loop {
            let is_over = machine.wait_for_end(Instant::now().checked_add(LOOK)).is_some();
            let health = session.health();
            if health.progress != known.progress
                && let Some((_, text)) = &health.progress
            {
                let path = folder.join(names::SAID);
                let temporary = path.with_extension("tmp");
                // A line for people: the next one comes.
                let _ = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &path));
            }
            // An agent that never was there is missed by others.
            let speaks = health.heartbeats != known.heartbeats || health.heartbeats == 0;
            silent = if speaks || is_paused() { 0 } else { silent + 1 };
            known = health;
            if is_over {
                return;
            }
            if silent >= looks {
                interrupter.end(Interruption::GuestHung);
                return;
            }
        }
    })
}

/// Reads a lease again and again. A file that cannot be read is as good as one that is not renewed.
struct Reader<'a> {
    lease: &'a LeaseFile,
    last: Deadlines,
}

impl<'a> Reader<'a> {
    fn new(lease: &'a LeaseFile) -> Self {
        Self { lease, last: Deadlines { stand_ns: 0, until_ns: 0 } }
    }

    fn read(&mut self) -> Deadlines {
        self.last = self.lease.deadlines().unwrap_or(self.last);
        self.last
    }
}

fn until(deadline_ns: u64) -> Duration {
    Duration::from_nanos(deadline_ns.saturating_sub(now_ns()))
}

/// Waits for the lease's end, which the worker moves on again and again.
fn watch_end(lease: &LeaseFile) {
    let mut reader = Reader::new(lease);
    loop {
        let deadlines = reader.read();
        if deadlines.is_past() {
            crate::print_failure(&Failure::new("the lease is over: the machine ends"));
            std::process::exit(HARRIER_FAILED.into());
        }
        thread::sleep(until(deadlines.until_ns).min(LOOK));
    }
}

/// Lets the machine stand still from the first deadline on, until the worker has moved it.
fn watch_stand(lease: &LeaseFile, hold: &OnceLock<Hold>) {
    let mut reader = Reader::new(lease);
    let mut stands = false;
    loop {
        let deadlines = reader.read();
        let late = deadlines.is_late();
        if late != stands && hold.get().is_some_and(|hold| hold(late)) {
            stands = late;
        }
        thread::sleep(if late || stands { SHORT_LOOK } else { until(deadlines.stand_ns).min(LOOK) });
    }
}
