//! What can go wrong with a store.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::queue::JobId;

/// A store's refusal or failure. It has a form for HTTP too.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "error", content = "detail", rename_all = "snake_case")]
pub enum StoreError {
    /// No such job.
    #[error("there is no job {0}: 'harrier history' lists them")]
    NoJob(JobId),
    /// No such host.
    #[error("there is no host '{0}': 'harrier hosts' lists them")]
    NoHost(String),
    /// The job has no attempt of this number.
    #[error("job {0} has no attempt {1}: 'harrier status {0}' lists them")]
    NoAttempt(JobId, u64),
    /// The lease is over or somebody else's.
    #[error("{0} no longer has its lease")]
    Fenced(String),
    /// What was asked makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The disk is full.
    #[error("no space left for the queue '{0}': free some; nothing of this was recorded")]
    Full(String),
    /// Somebody keeps the file locked.
    #[error("the queue '{0}' is locked by another program for too long: try again")]
    Busy(String),
    /// The file is damaged or no queue.
    #[error("'{0}' is damaged or not a queue ({1}): restore a copy, or give another --queue")]
    Damaged(String, String),
    /// The file was written by a later version.
    #[error("the queue '{0}' has version {1}, this harrier knows up to {2}: use a newer harrier")]
    Newer(String, i64, i64),
    /// Anything else with the file.
    #[error("the queue '{0}' cannot be used ({1}): check its place and permissions")]
    Failed(String, String),
    /// The coordinator does not answer.
    #[error("the coordinator '{0}' cannot be reached ({1}): is 'harrier coordinator' running there?")]
    Unreachable(String, String),
    /// A coordinator, and what is wrong with its certificate.
    #[error(
        "the coordinator '{0}' cannot be reached safely ({1}): give the certificates that its own is signed by with --ca-file or HARRIER_CA_FILE"
    )]
    Certificate(String, String),
    /// The coordinator does not know the token.
    #[error("the coordinator refuses the token: give the right one with --token-file or HARRIER_TOKEN_FILE")]
    Unauthorized,
}

impl StoreError {
    /// Trying again later may help.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Full(_) | Self::Busy(_) | Self::Failed(..) | Self::Unreachable(..) | Self::Certificate(..)
        )
    }
}
