//! Jobs as the queue knows them: what was asked for ([`JobSpec`]), where a job stands ([`State`], [`Reason`]) and what
//! has happened to it ([`Attempt`], [`Event`]). Plain data that a store keeps and HTTP carries; no I/O here.
//!
//! Times are milliseconds since the Unix epoch by the store's clock, spans are milliseconds.

pub mod expr;
mod files;
mod job;
mod job_file;
mod matching;
mod spec;
mod state;

pub use files::{DEFAULT_PROCESSES, InputFile, JobLimits, OutputFile};
pub use job::{
    ArrayPlace, Attempt, Checkpoint, Event, Free, Host, HostAd, Job, JobId, LeaseKey, StoredFile, Times,
    Wanted,
};
pub use job_file::{JobFile, JobFileError, parse_interval, parse_range};
pub use matching::{AdScope, Needs, unsuitable, unsuitable_for};
pub use spec::{Dependency, DependencyKind, JobSpec, MAX_ARRAY, NewJob, SpecProblem};
pub use state::{Activity, Reason, ReasonKind, State};
