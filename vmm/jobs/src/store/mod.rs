//! Where jobs are kept. [`Store`] is all that clients and workers know of it; [`SqliteStore`] is one file on this
//! host.
//!
//! Every method is one transaction: what it says has happened has happened as a whole, its events included. Calls that
//! workers make carry a [`LeaseKey`]; one that is no longer the job's is answered with [`StoreError::Fenced`] and
//! changes nothing. A store decides by its own clock when a lease has ended.
//!
//! What is on the disk before a call returns: submissions, what users ask for, and the end of an attempt. Claims,
//! renewals and reports in between survive a killed process, but may be lost with the power: then the job is simply
//! claimed again, and the token in the key fences whoever still runs the claim that was lost.

pub mod checkpoints;
mod error;
pub mod files;
pub mod output;
mod sqlite;
mod why;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::files::Sha256Digest;
use crate::protocol::Stream;
use crate::queue::{
    Activity, Attempt, Checkpoint, Event, Host, HostAd, Job, JobId, LeaseKey, NewJob, Reason, State,
    StoredFile, Times, Wanted,
};

pub use error::StoreError;
pub use sqlite::{Clock, SqliteStore, SystemClock};
pub use why::{HostVerdict, Why, why};

/// What a store's methods answer.
pub type Result<T> = std::result::Result<T, StoreError>;

/// How long a lease lasts without renewal, unless a store was told otherwise.
pub const LEASE_MS: u64 = 30_000;

/// Which jobs are asked for; all that is given has to fit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobFilter {
    /// These jobs.
    pub ids: Option<Vec<JobId>>,
    /// In one of these states.
    pub states: Option<Vec<State>>,
    /// Of this user.
    pub user: Option<String>,
    /// On this host.
    pub host: Option<String>,
    /// With these labels.
    pub labels: Vec<(String, String)>,
    /// Last first; else in the order of their numbers.
    pub newest_first: bool,
    /// At most as many.
    pub limit: Option<u64>,
}

/// Which events are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventQuery {
    /// Of this job; else of all.
    pub job: Option<JobId>,
    /// Only those after this number.
    pub after_seq: u64,
    /// At most as many.
    pub limit: Option<u64>,
}

/// What a user wants done to jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// End them.
    Cancel,
    /// Do not start them; take back those that run.
    Hold,
    /// Undo a hold.
    Release,
    /// Run them anew from their beginning.
    Requeue,
    /// Let their machines stand still.
    Suspend,
    /// Undo a suspension.
    Resume,
    /// Write a checkpoint now.
    Checkpoint,
    /// Take them from their hosts; they go on elsewhere.
    Vacate,
    /// Give them another priority.
    Priority(i64),
}

/// What became of an [`Action`] on one job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionResult {
    /// The job.
    pub job: JobId,
    /// Something has changed, or its worker has been asked.
    pub changed: bool,
    /// The action has no meaning for a job in this state.
    pub refused: bool,
    /// Where the job stands now.
    pub state: State,
    /// For people: what was or was not done.
    pub message: String,
}

/// A worker asks for work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// The host, which has advertised itself before.
    pub host: String,
    /// Its instance.
    pub instance: String,
    /// At most so many jobs.
    pub count: u32,
    /// What is free for them.
    pub free: crate::queue::Free,
}

/// A job that a worker now has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// The right to run it.
    pub key: LeaseKey,
    /// The lease ends so long after the call was made, unless it is renewed.
    pub lease_ms: u64,
    /// The job.
    pub job: Job,
    /// What it goes on from, latest first.
    pub checkpoints: Vec<Checkpoint>,
}

/// A worker's lease after [`Store::renew`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The lease.
    pub key: LeaseKey,
    /// `None`: the job is no longer this worker's.
    pub lease: Option<RenewedLease>,
}

/// A lease that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewedLease {
    /// It ends so long after the call was made.
    pub lease_ms: u64,
    /// What users want of the job.
    pub wanted: Wanted,
}

/// What a worker says about a job that it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The command runs, on this engine.
    Started {
        /// The engine's name.
        engine: Option<String>,
        /// The checkpoint that it went on from: attempt and number.
        checkpoint: Option<(u64, u32)>,
    },
    /// A checkpoint cannot be restored: it is not offered again.
    BadCheckpoint {
        /// The attempt that wrote it.
        epoch: u64,
        /// Its number.
        number: u32,
        /// What is wrong with it.
        detail: String,
    },
    /// The machine stands still.
    Paused {
        /// Why.
        reason: Reason,
        /// In words.
        detail: Option<String>,
    },
    /// The machine runs again.
    Continued,
    /// The worker does something to the machine, or has done it.
    Activity(Option<Activity>),
    /// A checkpoint is complete and durable.
    Checkpointed(Checkpoint),
    /// The files that the command has left, all of which the store has. They count if this attempt's end does.
    Files(Vec<StoredFile>),
    /// How far the command says it has come.
    Progress(String),
    /// The machine is being ended.
    Stopping {
        /// Why.
        reason: Reason,
    },
    /// The attempt is over. The lease ends.
    Ended(Ended),
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// The command's end, or why it did not come to it.
    pub reason: Reason,
    /// In words.
    pub detail: Option<String>,
    /// The command's exit code, if it ended or its time was over.
    pub exit_code: Option<u8>,
    /// What the worker has measured; committed and lost are the store's to work out.
    pub times: Times,
}

/// How output is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputQuery {
    /// The job.
    pub job: JobId,
    /// The attempt; `None` is the latest.
    pub epoch: Option<u64>,
    /// stderr, not stdout.
    pub stderr: bool,
    /// From this byte on, over all attempts that go on from each other.
    pub offset: u64,
    /// At most so many bytes.
    pub limit: u64,
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputPiece {
    /// The attempt asked for.
    pub epoch: u64,
    /// The bytes; empty if there are none yet, or no more.
    pub bytes: Vec<u8>,
    /// Nothing comes after them.
    pub complete: bool,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFile {
    /// Its name within the checkpoint.
    pub name: String,
    /// Its length in bytes, holes included.
    pub length: u64,
}

/// Where a piece of a checkpoint belongs that an attempt sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointPiece {
    /// The checkpoint's number within the attempt.
    pub number: u32,
    /// The file.
    pub file: String,
    /// Where the piece begins in it.
    pub offset: u64,
    /// How long the whole file is; what is not sent is zero.
    pub length: u64,
}

/// What a worker wants to read of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointQuery {
    /// The worker's right to the job.
    pub key: LeaseKey,
    /// The attempt that wrote the checkpoint.
    pub epoch: u64,
    /// Its number.
    pub number: u32,
    /// The file.
    pub file: String,
    /// From this byte on.
    pub offset: u64,
    /// At most so many bytes.
    pub limit: u64,
}

/// Where a piece of a job's file belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePiece {
    /// The whole file's digest, which is its name.
    pub sha256: Sha256Digest,
    /// How long the whole file is.
    pub bytes: u64,
    /// Where the piece begins in it.
    pub offset: u64,
}

/// A piece of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointData {
    /// Where it begins: what lies between that and the offset asked for is zero.
    pub offset: u64,
    /// The bytes; empty at the file's end.
    pub bytes: Vec<u8>,
}

/// A user's account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UserStats {
    /// The user.
    pub user: String,
    /// Processor seconds used lately: half of it is forgotten every half-life.
    pub recent_cpu_seconds: f64,
    /// Jobs of the user that workers have.
    pub running: u64,
}

/// The whole queue in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Jobs in each state that has any.
    pub states: Vec<(State, u64)>,
    /// Attempts so far.
    pub attempts: u64,
    /// Ends of attempts by reason.
    pub ends: Vec<(Reason, u64)>,
    /// Times of all ended attempts.
    pub times: Times,
    /// Users with jobs, by use.
    pub users: Vec<UserStats>,
    /// Hosts that have spoken lately, and all.
    pub hosts: (u64, u64),
}

impl Stats {
    /// The share of the allocated time that was kept; `None` before anything ran.
    pub fn goodput(&self) -> Option<f64> {
        (self.times.allocated_ms > 0).then(|| self.times.committed_ms as f64 / self.times.allocated_ms as f64)
    }
}

/// A queue of jobs.
pub trait Store: Send + Sync {
    /// Adds jobs, all or none, and answers their numbers. The same `key` of the same user again adds nothing and
    /// answers the numbers of the first time.
    fn submit(&self, user: &str, key: Option<&str>, jobs: &[NewJob]) -> Result<Vec<JobId>>;
    /// The jobs that a filter lets through.
    fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>>;
    /// A job's attempts, in order.
    fn attempts(&self, job: JobId) -> Result<Vec<Attempt>>;
    /// Events, in order.
    fn events(&self, query: &EventQuery) -> Result<Vec<Event>>;
    /// The jobs that a job waits for, with what has to happen.
    fn dependencies(&self, job: JobId) -> Result<Vec<crate::queue::Dependency>>;
    /// Does something to jobs, or asks their workers to. All jobs have to exist.
    fn act(&self, action: &Action, jobs: &[JobId]) -> Result<Vec<ActionResult>>;
    /// The hosts that have ever advertised themselves.
    fn hosts(&self) -> Result<Vec<Host>>;
    /// Numbers over everything.
    fn stats(&self) -> Result<Stats>;
    /// A worker says what its host offers.
    fn advertise(&self, ad: &HostAd) -> Result<()>;
    /// A worker takes jobs: those whose requirements its advertisement meets, by priority, then fair share, then age.
    fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claim>>;
    /// A worker keeps its jobs and hears what users want of them.
    fn renew(&self, host: &str, keys: &[LeaseKey]) -> Result<Vec<Renewal>>;
    /// A worker says what has become of a job.
    fn report(&self, key: &LeaseKey, report: &Report) -> Result<()>;
    /// Reads output of a job.
    fn read_output(&self, query: &OutputQuery) -> Result<OutputPiece>;
    /// Adds output of an attempt at an offset of its own; what is there already is not written again.
    fn write_output(&self, key: &LeaseKey, stream: Stream, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Files of this host that the attempt's stdout and stderr may be written to directly; `None` if there are none.
    fn local_output(&self, key: &LeaseKey) -> Option<[PathBuf; 2]>;
    /// The folder of this host that a checkpoint of an attempt is to be, or is; `None` if the store is elsewhere.
    fn local_checkpoint(&self, job: JobId, epoch: u64, number: u32) -> Option<PathBuf>;
    /// Adds a piece of a checkpoint that a worker writes. It counts when all has come and it is reported.
    fn write_checkpoint(&self, key: &LeaseKey, piece: &CheckpointPiece, bytes: &[u8]) -> Result<()>;
    /// The files of a checkpoint of the job; none if it is not there.
    fn checkpoint_files(&self, key: &LeaseKey, epoch: u64, number: u32) -> Result<Vec<CheckpointFile>>;
    /// Reads the next data of a checkpoint's file.
    fn read_checkpoint(&self, query: &CheckpointQuery) -> Result<CheckpointData>;
    /// Adds a piece of a job's file; true once the whole file is there, also for an empty piece that only asks.
    fn write_file(&self, piece: &FilePiece, bytes: &[u8]) -> Result<bool>;
    /// Reads a piece of a file, at most so long; nothing at its end.
    fn read_file(&self, sha256: &Sha256Digest, offset: u64, limit: u64) -> Result<Vec<u8>>;
    /// The place of a file on this host; `None` if the store is elsewhere. It is there once [`Store::write_file`] says so,
    /// and is never to be changed.
    fn local_file(&self, sha256: &Sha256Digest) -> Option<PathBuf>;

    /// One job.
    fn job(&self, id: JobId) -> Result<Job> {
        let filter = JobFilter { ids: Some(vec![id]), ..JobFilter::default() };
        self.jobs(&filter)?.pop().ok_or(StoreError::NoJob(id))
    }
}

/// Sixteen random hexadecimal digits.
pub(crate) fn random_word() -> String {
    let mut bytes = [0u8; 8];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
