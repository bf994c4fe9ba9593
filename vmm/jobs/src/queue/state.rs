//! Where a job stands, and why.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Makes an enum of plain words: one spelling for the database, JSON and tables.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word for it, as in JSON.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL
                    .iter()
                    .copied()
                    .find(|value| value.as_str() == text)
                    .ok_or_else(|| {
                        let words: Vec<&str> = Self::ALL.iter().map(|value| value.as_str()).collect();
                        format!("'{text}' is unknown: use one of {}", words.join(", "))
                    })
            }
        }
    };
}

words! {
    /// Where a job stands.
    State {
        /// Waits for a host, for other jobs or for the end of a back-off.
        Queued = "queued",
        /// Waits until a person releases it.
        Held = "held",
        /// A worker has it and prepares its machine.
        Starting = "starting",
        /// Its command runs.
        Running = "running",
        /// Its machine stands still, in memory.
        Paused = "paused",
        /// Its machine is being ended.
        Stopping = "stopping",
        /// Its command has ended with exit code 0.
        Succeeded = "succeeded",
        /// Its command has ended otherwise.
        Failed = "failed",
        /// Somebody has ended it.
        Cancelled = "cancelled",
    }
}

impl State {
    /// Nothing more happens to the job unless it is queued again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// A worker has the job.
    pub fn is_leased(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused | Self::Stopping)
    }
}

words! {
    /// What a worker does to a job's machine beside running it.
    Activity {
        /// Its state is being written.
        Checkpointing = "checkpointing",
        /// Its state is being read.
        Restoring = "restoring",
        /// It moves to another host.
        Migrating = "migrating",
    }
}

/// What follows from a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasonKind {
    /// Part of a job's ordinary way.
    Ordinary,
    /// The system failed the job: it is tried again.
    System,
    /// Somebody has to look: the job is held.
    Person,
}

words! {
    /// Why a job is where it is: codes that scripts may rely on.
    Reason {
        /// Waits for a host that suits it.
        Waiting = "waiting",
        /// Waits for other jobs.
        Dependency = "dependency",
        /// Its command failed and is run again after a while.
        Retry = "retry",
        /// Somebody has queued it again.
        Requeued = "requeued",
        /// Somebody has released it.
        Released = "released",
        /// A worker has taken it.
        Claimed = "claimed",
        /// Its command runs.
        Started = "started",
        /// It goes on after a pause.
        Continued = "continued",
        /// The owner of the host wants it.
        Owner = "owner",
        /// Somebody has suspended it.
        SuspendedByUser = "suspended_by_user",
        /// The worker cannot reach the store, and the lease nears its end.
        StoreUnreachable = "store_unreachable",
        /// Its host was wanted by its owner for too long.
        Evicted = "evicted",
        /// Somebody has asked its host to give it back.
        Vacated = "vacated",
        /// Its worker goes down.
        WorkerStopped = "worker_stopped",
        /// Its worker has not renewed the lease.
        WorkerLost = "worker_lost",
        /// Its machine could not be started or ended by itself.
        MachineFailed = "machine_failed",
        /// Its checkpoint could not be restored.
        RestoreFailed = "restore_failed",
        /// Somebody holds it.
        HeldByUser = "held_by_user",
        /// A job that it waits for has not succeeded.
        DependencyFailed = "dependency_failed",
        /// The system failed it too often.
        SystemFailures = "system_failures",
        /// A file that it names is not there or not usable.
        BadInput = "bad_input",
        /// Its command has ended by itself.
        Exited = "exited",
        /// A signal has ended its command.
        Signalled = "signalled",
        /// It was ended for want of memory.
        OutOfMemory = "out_of_memory",
        /// It reached its limit of processes.
        ProcessLimit = "process_limit",
        /// It succeeded without having written a file that it was to leave.
        MissingOutput = "missing_output",
        /// It has saved its state and wants to be started again.
        SelfCheckpointed = "self_checkpointed",
        /// Its guest gave no sign of life any more.
        GuestHung = "guest_hung",
        /// Its time was over.
        TimedOut = "timed_out",
        /// Somebody has cancelled it.
        Cancelled = "cancelled",
    }
}

impl Reason {
    /// What follows from it.
    pub fn kind(self) -> ReasonKind {
        match self {
            Self::WorkerLost | Self::MachineFailed | Self::RestoreFailed | Self::GuestHung => {
                ReasonKind::System
            }
            Self::HeldByUser | Self::DependencyFailed | Self::SystemFailures | Self::BadInput => {
                ReasonKind::Person
            }
            _ => ReasonKind::Ordinary,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_back_and_is_the_one_in_json() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(*state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
        assert!("runing".parse::<State>().unwrap_err().contains("use one of queued, held"));
    }
}
