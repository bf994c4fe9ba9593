//! A job, its attempts, its events and the hosts that run it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::spec::JobSpec;
use super::state::{Activity, Reason, State};
use crate::files::FileFacts;

/// A job's number, from 1 upwards.
pub type JobId = u64;

/// A file that a job has left; the queue has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Where it was in the guest.
    pub guest: String,
    /// What it is.
    #[serde(flatten)]
    pub facts: FileFacts,
}

/// The place of a job in an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrayPlace {
    /// The first job of the array.
    pub first: JobId,
    /// The job's own index, `HARRIER_ARRAY_INDEX`.
    pub index: u64,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// Who has submitted it.
    pub user: String,
    /// What was asked for. Its priority is the one at submission; `priority` is today's.
    pub spec: JobSpec,
    /// Where it stands.
    pub state: State,
    /// What its worker does to it.
    pub activity: Option<Activity>,
    /// Why it is there.
    pub reason: Reason,
    /// The reason in words, where there is more to say.
    pub detail: Option<String>,
    /// Higher goes first.
    pub priority: i64,
    /// When it was submitted.
    pub submitted_ms: u64,
    /// Not started before this time.
    pub not_before_ms: Option<u64>,
    /// How often a worker has taken it; the present attempt's number.
    pub epoch: u64,
    /// How many of its retries are used up.
    pub retries_used: u32,
    /// System failures since it last made progress.
    pub failures: u32,
    /// The processor that its latest checkpoint needs.
    #[serde(default)]
    pub checkpoint_cpu_model: Option<String>,
    /// How far its command says it has come.
    #[serde(default)]
    pub progress: Option<String>,
    /// Files that it has saved and is started with again.
    #[serde(default)]
    pub saved: Vec<StoredFile>,
    /// Its place in an array.
    pub array: Option<ArrayPlace>,
    /// Jobs that have to end before it.
    pub open_dependencies: u32,
    /// The host that has it.
    pub host: Option<String>,
    /// When the host's lease ends.
    pub lease_until_ms: Option<u64>,
    /// What its worker has been asked to do.
    pub wanted: Wanted,
    /// When its command first ran.
    pub started_ms: Option<u64>,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// The exit code of its command: 128 and the signal's number if a signal ended it, 124 after its timeout.
    pub exit_code: Option<u8>,
}

/// What users want of a job that a worker has: a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted(pub u32);

impl Wanted {
    /// End it.
    pub const CANCEL: Self = Self(1);
    /// Give it back and hold it.
    pub const HOLD: Self = Self(2);
    /// Stop it and start it anew.
    pub const REQUEUE: Self = Self(4);
    /// Let it stand still.
    pub const SUSPEND: Self = Self(8);
    /// Write a checkpoint.
    pub const CHECKPOINT: Self = Self(16);
    /// Give it back.
    pub const VACATE: Self = Self(32);
    const NAMES: [(Self, &'static str); 6] = [
        (Self::CANCEL, "cancel"),
        (Self::HOLD, "hold"),
        (Self::REQUEUE, "requeue"),
        (Self::SUSPEND, "suspend"),
        (Self::CHECKPOINT, "checkpoint"),
        (Self::VACATE, "vacate"),
    ];

    /// Whether all of `other` is wanted.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// This without the other.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Nothing is wanted.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> =
            Self::NAMES.iter().filter(|(bit, _)| self.has(*bit)).map(|(_, name)| *name).collect();
        f.write_str(&names.join(","))
    }
}

impl Serialize for Wanted {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(Self::NAMES.iter().filter(|(bit, _)| self.has(*bit)).map(|(_, name)| name))
    }
}

impl<'de> Deserialize<'de> for Wanted {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        names.iter().try_fold(Self::default(), |set, name| {
            let known = Self::NAMES.iter().find(|(_, known)| known == name);
            known
                .map(|(bit, _)| set.with(*bit))
                .ok_or_else(|| serde::de::Error::custom(format!("unknown wish '{name}'")))
        })
    }
}

/// The right to run a job. The epoch grows with every claim; the token tells two claims apart whose epochs are equal
/// because the store lost its last, unsynced commits in a power failure.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseKey {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub epoch: u64,
    /// Random, in hexadecimal.
    pub token: String,
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} attempt {}", self.job, self.epoch)
    }
}

/// What an attempt did with its time, in milliseconds. `allocated` is the time that the host gave; the others are
/// parts of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// From claim to end.
    pub allocated_ms: u64,
    /// Its machine stood still because somebody wanted that.
    pub suspended_ms: u64,
    /// Writing checkpoints, the machine standing still.
    pub checkpoint_ms: u64,
    /// Reading a checkpoint.
    pub restore_ms: u64,
    /// Moving files and checkpoints.
    pub transfer_ms: u64,
    /// Work that was kept: up to the end of the command, or up to the last checkpoint.
    pub committed_ms: u64,
    /// Work that has to be done again.
    pub lost_ms: u64,
}

/// One attempt to run a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The job.
    pub job: JobId,
    /// Its number.
    pub epoch: u64,
    /// The host that runs or ran it.
    pub host: String,
    /// When it was claimed.
    pub claimed_ms: u64,
    /// When its command ran.
    pub started_ms: Option<u64>,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// Why it ended.
    pub reason: Option<Reason>,
    /// The reason in words.
    pub detail: Option<String>,
    /// The exit code of the command, if it ended.
    pub exit_code: Option<u8>,
    /// The engine that ran it.
    pub engine: Option<String>,
    /// The attempt whose checkpoint it began with, and its output goes on where that one's stood; or the one whose command had
    /// saved its state itself, and it goes on where that one's ended.
    pub parent: Option<u64>,
    /// The offsets of its machine's streams at its beginning: stdout, stderr.
    pub output_base: [u64; 2],
    /// What it did with its time.
    pub times: Times,
    /// The files that its command has left.
    #[serde(default)]
    pub files: Vec<StoredFile>,
}

/// One line of a job's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows over all jobs.
    pub seq: u64,
    /// The job.
    pub job: JobId,
    /// The attempt, 0 before the first.
    pub epoch: u64,
    /// When.
    pub at_ms: u64,
    /// The state that it led to.
    pub state: State,
    /// Why.
    pub reason: Reason,
    /// The reason in words.
    pub detail: Option<String>,
}

/// A state that a job can go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The attempt that wrote it.
    pub epoch: u64,
    /// Its number within the attempt, from 1.
    pub number: u32,
    /// Where it lies: a folder on the host that wrote it, or in the store.
    pub place: String,
    /// The host on which `place` is, if it is not in the store.
    pub host: Option<String>,
    /// Its size on disk.
    pub size_bytes: u64,
    /// The streams' offsets in it: stdout, stderr.
    pub output: [u64; 2],
    /// Work done up to it, over all attempts.
    pub work_ms: u64,
    /// When it was written.
    pub at_ms: u64,
    /// The processor that its machine sees: only hosts that offer it can go on with it.
    #[serde(default)]
    pub cpu_model: Option<String>,
}

/// What a host offers, as requirements and rank see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostAd {
    /// The worker's name, unique in a pool.
    pub host: String,
    /// Tells one run of the worker from the next; random.
    pub instance: String,
    /// Jobs that it runs at a time.
    pub slots: u32,
    /// Processors for jobs.
    pub cpus: u32,
    /// Memory for jobs.
    pub memory_bytes: u64,
    /// Engines that can run jobs, best first.
    pub engines: Vec<String>,
    /// CPU models that every one of the engines offers.
    pub cpu_models: Vec<String>,
    /// What the owner says about it.
    pub labels: BTreeMap<String, String>,
    /// Harrier's version.
    pub version: String,
    /// Slots, processors and memory that are free.
    pub free: Free,
    /// Whether it takes jobs, and if not why not.
    pub closed: Option<String>,
}

/// What is free on a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Free {
    /// Slots.
    pub slots: u32,
    /// Processors.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
}

/// A host as the store knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// What it last said.
    #[serde(flatten)]
    pub ad: HostAd,
    /// When it last spoke.
    pub seen_ms: u64,
    /// It has spoken lately.
    pub alive: bool,
    /// Jobs that it has.
    pub jobs: u32,
}
