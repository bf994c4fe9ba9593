//! A queue in one SQLite file, with its output beside it. Any number of processes of one host may use it at once.
//!
//! The file is in WAL mode. A commit of [`Durability::Synced`] is on the disk, and with it all before it; others are in
//! the log, which the kernel keeps when a process dies.

mod act;
mod claim;
mod ends;
mod lease;
mod read;
mod rows;
mod schema;
mod submit;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};

use super::checkpoints::CheckpointFiles;
use super::files::JobFiles;
use super::output::OutputFiles;
use super::{
    Action, ActionResult, CheckpointData, CheckpointFile, CheckpointPiece, CheckpointQuery, Claim,
    ClaimRequest, EventQuery, FilePiece, JobFilter, LEASE_MS, OutputPiece, OutputQuery, Renewal, Report,
    Result, Stats, Store, StoreError,
};
use crate::files::Sha256Digest;
use crate::protocol::Stream;
use crate::queue::{Attempt, Dependency, Event, Host, HostAd, Job, JobId, LeaseKey, NewJob};

/// How long a call waits for other processes; a worker's no longer than this part of a lease.
const BUSY_TIMEOUT: Duration = Duration::from_secs(20);
const LEASE_SHARE: u64 = 6;

/// Where a store takes the time from.
pub trait Clock: Send + Sync {
    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// When a commit is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    /// Before the call returns.
    Synced,
    /// With the next synced one, or when the kernel writes it.
    Logged,
}

/// A queue in a folder: `queue.db` and `output/`.
pub struct SqliteStore {
    path: String,
    writer: Mutex<Connection>,
    reader: Mutex<Connection>,
    output: OutputFiles,
    checkpoints: CheckpointFiles,
    files: JobFiles,
    clock: Arc<dyn Clock>,
    lease_ms: u64,
}

/// Time and settings of one call.
#[derive(Clone, Copy)]
struct Moment {
    now_ms: u64,
    lease_ms: u64,
}

impl SqliteStore {
    /// Opens the queue in a folder, and makes it if there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, Arc::new(SystemClock), LEASE_MS)
    }

    /// Opens a queue whose leases last so long, to serve it.
    pub fn open_with_lease(folder: &Path, lease_ms: u64) -> Result<Self> {
        let store = Self::open_with(folder, Arc::new(SystemClock), lease_ms)?;
        store.sweep()?;
        Ok(store)
    }

    /// The same for a worker, which has its leases to look after while the file is another process's.
    pub fn open_for_worker(folder: &Path, lease_ms: u64) -> Result<Self> {
        let patience = BUSY_TIMEOUT.min(Duration::from_millis(lease_ms / LEASE_SHARE));
        let store = Self::open_patiently(folder, Arc::new(SystemClock), lease_ms, patience)?;
        store.sweep()?;
        Ok(store)
    }

    /// Opens a queue with a clock and a lease time of one's own.
    pub fn open_with(folder: &Path, clock: Arc<dyn Clock>, lease_ms: u64) -> Result<Self> {
        Self::open_patiently(folder, clock, lease_ms, BUSY_TIMEOUT)
    }

    fn open_patiently(
        folder: &Path,
        clock: Arc<dyn Clock>,
        lease_ms: u64,
        patience: Duration,
    ) -> Result<Self> {
        let file = folder.join("queue.db");
        let path = file.display().to_string();
        let failed = |err: std::io::Error| StoreError::Failed(path.clone(), err.to_string());
        let checkpoints = CheckpointFiles::new(folder.join("checkpoints"));
        let files = JobFiles::new(folder.join("files"));
        let output = OutputFiles::create(&folder.join("output")).map_err(failed)?;
        let connect = || -> rusqlite::Result<Connection> {
            let connection = Connection::open_with_flags(
                &file,
                OpenFlags::SQLITE_OPEN_READ_WRITE
                    | OpenFlags::SQLITE_OPEN_CREATE
                    | OpenFlags::SQLITE_OPEN_NO_MUTEX,
            )?;
            connection.busy_timeout(patience)?;
            connection.set_prepared_statement_cache_capacity(64);
            Ok(connection)
        };
        let error = |err| sql_error(&path, err);
        let mut writer = connect().map_err(error)?;
        // Two processes that both make the file meet here; the busy handler does not cover this change.
        retry_busy(|| writer.pragma_update(None, "journal_mode", "WAL")).map_err(error)?;
        writer.pragma_update(None, "synchronous", "NORMAL").map_err(error)?;
        schema::migrate(&mut writer, &path)?;
        let reader = connect().map_err(error)?;
        reader.pragma_update(None, "query_only", true).map_err(error)?;
        let (writer, reader) = (Mutex::new(writer), Mutex::new(reader));
        Ok(Self { path, writer, reader, output, checkpoints, files, clock, lease_ms })
    }

    fn moment(&self) -> Moment {
        Moment { now_ms: self.clock.now_ms(), lease_ms: self.lease_ms }
    }

    /// Runs one writing transaction.
    fn write<T>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Transaction<'_>, Moment) -> std::result::Result<T, Refusal>,
    ) -> Result<T> {
        let mut connection = lock(&self.writer);
        let level = match durability {
            Durability::Synced => "FULL",
            Durability::Logged => "NORMAL",
        };
        let run = |connection: &mut Connection| {
            connection.pragma_update(None, "synchronous", level)?;
            let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&tx, self.moment())?;
            tx.commit()?;
            Ok(value)
        };
        run(&mut connection).map_err(|refusal: Refusal| refusal.into_error(&self.path))
    }

    /// Runs one reading transaction.
    fn read<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>, Moment) -> std::result::Result<T, Refusal>,
    ) -> Result<T> {
        let mut connection = lock(&self.reader);
        let run = |connection: &mut Connection| {
            let tx = connection.transaction()?;
            work(&tx, self.moment())
        };
        run(&mut connection).map_err(|refusal: Refusal| refusal.into_error(&self.path))
    }

    /// Ends leases that nobody has renewed. Every look at the queue does, so that it shows how things are.
    fn expire(&self) -> Result<()> {
        if self.read(|tx, moment| Ok(lease::any_due(tx, moment)?))? {
            for job in self.write(Durability::Synced, |tx, moment| Ok(lease::expire(tx, moment)?))? {
                self.tidy(job)?;
            }
        }
        Ok(())
    }

    /// What a job is given has to be in the queue before the job is.
    fn check_inputs(&self, job: &NewJob) -> Result<()> {
        for file in &job.spec.inputs {
            let there = file.facts.is_some_and(|facts| self.files.path(&facts.sha256).exists());
            if !there {
                return Err(StoreError::Invalid(format!(
                    "input '{}' is not in the queue: submit it with the job",
                    file.host
                )));
            }
        }
        Ok(())
    }

    /// Removes the checkpoints of jobs that have ended: who recorded an end may have died before it did so.
    fn sweep(&self) -> Result<()> {
        for job in self.checkpoints.jobs() {
            if self.read(|tx, _| Ok(read::is_known_over(tx, job)?))? {
                self.tidy(job)?;
            }
        }
        Ok(())
    }

    /// Removes the checkpoints of a job that nobody needs any more.
    fn tidy(&self, job: JobId) -> Result<()> {
        let (keep, present) = self.read(|tx, _| Ok(read::needed_checkpoints(tx, job)?))?;
        self.checkpoints.tidy(job, &keep, present);
        Ok(())
    }
}

fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    // A transaction that a panic has left is rolled back when it is dropped.
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

fn retry_busy<T>(mut work: impl FnMut() -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    let mut tries = 0;
    loop {
        match work() {
            Err(err) if err.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && tries < 200 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Why a transaction was not made: the file, or the rules.
enum Refusal {
    Sql(rusqlite::Error),
    Rule(StoreError),
}

impl From<rusqlite::Error> for Refusal {
    fn from(err: rusqlite::Error) -> Self {
        Self::Sql(err)
    }
}

impl From<StoreError> for Refusal {
    fn from(err: StoreError) -> Self {
        Self::Rule(err)
    }
}

impl Refusal {
    fn into_error(self, path: &str) -> StoreError {
        match self {
            Self::Sql(err) => sql_error(path, err),
            Self::Rule(err) => err,
        }
    }
}

fn sql_error(path: &str, err: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    // The shared index of the log cannot grow: SQLite calls that an I/O error.
    if err.sqlite_error().is_some_and(|err| err.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE) {
        return StoreError::Full(path);
    }
    match err.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full(path),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy(path),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Damaged(path, err.to_string())
        }
        _ => StoreError::Failed(path, err.to_string()),
    }
}

impl Store for SqliteStore {
    fn submit(&self, user: &str, key: Option<&str>, jobs: &[NewJob]) -> Result<Vec<JobId>> {
        for job in jobs {
            job.check().map_err(|problem| StoreError::Invalid(problem.to_string()))?;
            self.check_inputs(job)?;
        }
        self.write(Durability::Synced, |tx, moment| submit::submit(tx, moment, user, key, jobs))
    }

    fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>> {
        self.expire()?;
        self.read(|tx, _| Ok(read::jobs(tx, filter)?))
    }

    fn attempts(&self, job: JobId) -> Result<Vec<Attempt>> {
        self.read(|tx, _| {
            read::exists(tx, job)?;
            Ok(read::attempts(tx, job)?)
        })
    }

    fn events(&self, query: &EventQuery) -> Result<Vec<Event>> {
        self.expire()?;
        self.read(|tx, _| {
            if let Some(job) = query.job {
                read::exists(tx, job)?;
            }
            Ok(read::events(tx, query)?)
        })
    }

    fn dependencies(&self, job: JobId) -> Result<Vec<Dependency>> {
        self.read(|tx, _| Ok(read::dependencies(tx, job)?))
    }

    fn act(&self, action: &Action, jobs: &[JobId]) -> Result<Vec<ActionResult>> {
        self.expire()?;
        let results: Vec<ActionResult> = self.write(Durability::Synced, |tx, moment| {
            lease::expire(tx, moment)?;
            jobs.iter().map(|job| act::act(tx, moment, action, *job)).collect()
        })?;
        if matches!(action, Action::Cancel | Action::Requeue) {
            for result in results.iter().filter(|result| result.changed) {
                self.tidy(result.job)?;
            }
        }
        Ok(results)
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        self.read(|tx, moment| Ok(read::hosts(tx, moment)?))
    }

    fn stats(&self) -> Result<Stats> {
        self.expire()?;
        self.read(|tx, moment| Ok(read::stats(tx, moment)?))
    }

    fn advertise(&self, ad: &HostAd) -> Result<()> {
        self.write(Durability::Logged, |tx, moment| Ok(lease::advertise(tx, moment, ad)?))
    }

    fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claim>> {
        self.expire()?;
        // A look first: an idle worker that asks again and again writes nothing.
        if !self.read(|tx, _| Ok(claim::any_ready(tx)?))? {
            return Ok(Vec::new());
        }
        self.write(Durability::Logged, |tx, moment| claim::claim(tx, moment, request))
    }

    fn renew(&self, host: &str, keys: &[LeaseKey]) -> Result<Vec<Renewal>> {
        self.write(Durability::Logged, |tx, moment| Ok(lease::renew(tx, moment, host, keys)?))
    }

    fn report(&self, key: &LeaseKey, report: &Report) -> Result<()> {
        let durability = match report {
            Report::Ended(_) | Report::Checkpointed(_) => Durability::Synced,
            _ => Durability::Logged,
        };
        if durability == Durability::Synced {
            // What is recorded relies on the output and the checkpoint.
            let checked = self.read(|tx, _| lease::check(tx, key).map(|_| ()));
            if let (Err(StoreError::Fenced(_)), Report::Ended(_)) = (&checked, report) {
                // Whoever recorded this very end may have died before it tidied up.
                self.tidy(key.job)?;
            }
            checked?;
            self.output.sync(key.job, key.epoch)?;
        }
        if let Report::Checkpointed(checkpoint) = report
            && checkpoint.host.is_none()
        {
            self.checkpoints.complete(key.job, key.epoch, checkpoint.number)?;
        }
        self.write(durability, |tx, moment| lease::report(tx, moment, key, report))?;
        if matches!(report, Report::Ended(_) | Report::Checkpointed(_) | Report::BadCheckpoint { .. }) {
            self.tidy(key.job)?;
        }
        Ok(())
    }

    fn read_output(&self, query: &OutputQuery) -> Result<OutputPiece> {
        let (attempts, over) = self.read(|tx, _| {
            read::exists(tx, query.job)?;
            Ok((read::attempts(tx, query.job)?, read::is_over(tx, query.job)?))
        })?;
        self.output.read(query, &attempts, over)
    }

    fn write_output(&self, key: &LeaseKey, stream: Stream, offset: u64, bytes: &[u8]) -> Result<()> {
        self.read(|tx, _| lease::check(tx, key).map(|_| ()))?;
        self.output.write(key, stream, offset, bytes)
    }

    fn local_output(&self, key: &LeaseKey) -> Option<[PathBuf; 2]> {
        Some(self.output.paths(key.job, key.epoch))
    }

    fn local_checkpoint(&self, job: JobId, epoch: u64, number: u32) -> Option<PathBuf> {
        Some(self.checkpoints.path(job, epoch, number))
    }

    fn write_checkpoint(&self, key: &LeaseKey, piece: &CheckpointPiece, bytes: &[u8]) -> Result<()> {
        self.read(|tx, _| lease::check(tx, key).map(|_| ()))?;
        self.checkpoints.write(key, piece, bytes)
    }

    fn checkpoint_files(&self, key: &LeaseKey, epoch: u64, number: u32) -> Result<Vec<CheckpointFile>> {
        self.read(|tx, _| lease::check(tx, key).map(|_| ()))?;
        self.checkpoints.files(key.job, epoch, number)
    }

    fn write_file(&self, piece: &FilePiece, bytes: &[u8]) -> Result<bool> {
        self.files.write(piece, bytes)
    }

    fn read_file(&self, sha256: &Sha256Digest, offset: u64, limit: u64) -> Result<Vec<u8>> {
        self.files.read(sha256, offset, limit)
    }

    fn local_file(&self, sha256: &Sha256Digest) -> Option<PathBuf> {
        Some(self.files.path(sha256))
    }

    fn read_checkpoint(&self, query: &CheckpointQuery) -> Result<CheckpointData> {
        self.read(|tx, _| lease::check(tx, &query.key).map(|_| ()))?;
        self.checkpoints.read(query)
    }
}
