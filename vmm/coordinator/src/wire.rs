//! The arguments of each method, as client and server write them.

use harrier_jobs::files::Sha256Digest;
use harrier_jobs::queue::{JobId, LeaseKey, NewJob};
use harrier_jobs::store::{Action, Report, StoreError};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Submit {
    pub(crate) user: String,
    #[serde(default)]
    pub(crate) key: Option<String>,
    pub(crate) jobs: Vec<NewJob>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OfJob {
    pub(crate) job: JobId,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Act {
    pub(crate) action: Action,
    pub(crate) jobs: Vec<JobId>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Renew {
    pub(crate) host: String,
    pub(crate) keys: Vec<LeaseKey>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reported {
    pub(crate) key: LeaseKey,
    pub(crate) report: Report,
}

/// The query of `write_output`; the body is the output.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OutputPlace {
    pub(crate) job: JobId,
    pub(crate) epoch: u64,
    pub(crate) token: String,
    pub(crate) stderr: bool,
    pub(crate) offset: u64,
}

/// The first line of the answer to `read_output`; the output follows it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OutputHead {
    pub(crate) epoch: u64,
    pub(crate) complete: bool,
}

/// The arguments of `checkpoint_files`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OfCheckpoint {
    pub(crate) key: LeaseKey,
    pub(crate) epoch: u64,
    pub(crate) number: u32,
}

/// The query of `write_checkpoint`; the body is the piece.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CheckpointPlace {
    pub(crate) job: JobId,
    pub(crate) epoch: u64,
    pub(crate) token: String,
    pub(crate) number: u32,
    pub(crate) file: String,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The first line of the answer to `read_checkpoint`; the piece follows it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CheckpointHead {
    pub(crate) offset: u64,
}

/// The arguments of `read_file`; the answer is the piece.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReadFile {
    pub(crate) sha256: Sha256Digest,
    pub(crate) offset: u64,
    pub(crate) limit: u64,
}

/// The status that goes with an error.
pub(crate) fn status(error: &StoreError) -> u16 {
    match error {
        StoreError::NoJob(_) | StoreError::NoHost(_) | StoreError::NoAttempt(..) => 404,
        StoreError::Fenced(_) => 409,
        StoreError::Invalid(_) => 400,
        StoreError::Unauthorized => 401,
        StoreError::Full(_) => 507,
        StoreError::Busy(_) | StoreError::Unreachable(..) | StoreError::Certificate(..) => 503,
        StoreError::Damaged(..) | StoreError::Newer(..) | StoreError::Failed(..) => 500,
    }
}
