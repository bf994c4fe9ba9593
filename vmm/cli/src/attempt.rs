//! The monitor of a job: what it tells its worker, and the end of its lease.
//!
//! A worker starts `harrier run --attempt FOLDER`; `harrier_jobs::worker` describes the folder.

use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use harrier_jobs::Session;
use harrier_jobs::worker::lease_file::{LeaseFile, now_ns};
use harrier_jobs::worker::{RunOutput, RunResult, names, write_durably};
use harrier_machine::MachineHandle;

use crate::exit::{Failure, HARRIER_FAILED};
use crate::report::RunRecord;
use crate::signals::{Interrupter, Interruption};

/// How often the guest of an attempt says that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long it may say nothing, unless a flag says otherwise.
pub(crate) const HANG_LIMIT: Duration = Duration::from_secs(120);
/// How often the lease is read.
const LOOK: Duration = Duration::from_secs(1);

/// An attempt whose lease this process holds.
pub(crate) struct Attempt {
    folder: PathBuf,
}

impl Attempt {
    /// Takes the lease and ends the process when it ends. The lock on it is kept until then.
    pub(crate) fn enter(folder: &Path) -> Result<Self, Failure> {
        let unusable = |err: io::Error| {
            Failure::new(format!("--attempt '{}' cannot be used ({err}): workers make it", folder.display()))
        };
        let lease = LeaseFile::open(&folder.join(names::LEASE)).map_err(unusable)?;
        if !lease.lock().map_err(unusable)? {
            return Err(Failure::new(format!("another process runs the attempt '{}'", folder.display())));
        }
        let left = left(&lease).map_err(unusable)?;
        if left.is_zero() {
            return Err(Failure::new("the lease is over"));
        }
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || watch(&lease))
            .map_err(unusable)?;
        Ok(Attempt { folder: folder.to_owned() })
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
            status: record.status().map(str::to_owned),
            exit_code,
            error,
            cause: record.cause().map(str::to_owned),
            outputs: outputs.collect(),
        };
        let written = serde_json::to_vec(&result)
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
    std::thread::Builder::new().name("guest".to_owned()).spawn(move || {
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

fn left(lease: &LeaseFile) -> io::Result<Duration> {
    lease.until_ns().map(|until| Duration::from_nanos(until.saturating_sub(now_ns())))
}

/// Waits for the lease's end, which the worker moves on again and again.
fn watch(lease: &LeaseFile) {
    let mut last_known = now_ns();
    loop {
        // A file that cannot be read is as good as one that is not renewed.
        if let Ok(until) = lease.until_ns() {
            last_known = until;
        }
        let left = Duration::from_nanos(last_known.saturating_sub(now_ns()));
        if left.is_zero() {
            crate::print_failure(&Failure::new("the lease is over: the machine ends"));
            std::process::exit(HARRIER_FAILED.into());
        }
        std::thread::sleep(left.min(LOOK));
    }
}
