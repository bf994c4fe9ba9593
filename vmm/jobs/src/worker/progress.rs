//! What an attempt has done with its time, and when the next checkpoint is worth its cost. Kept in the attempt's folder for
//! a worker that finds it after a crash.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::queue::{JobSpec, Times};

/// Its name in the folder.
const FILE: &str = "progress.json";
/// What checkpoint and restore are taken to cost before either has been seen.
const COST: Duration = Duration::from_secs(1);
/// How long a host is taken to last without a failure.
const MEAN_LIFE: Duration = Duration::from_secs(6 * 3600);
/// No automatic interval is shorter.
const SHORTEST: Duration = Duration::from_secs(60);

/// One attempt's clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Progress {
    /// Running time.
    pub(super) running: Duration,
    /// The machine stood still because somebody wanted that.
    pub(super) suspended: Duration,
    /// It stood still for checkpoints.
    pub(super) checkpoint: Duration,
    /// It stood still while a checkpoint was sent.
    pub(super) transfer: Duration,
    /// Fetching and restoring the checkpoint that it began with.
    pub(super) restore: Duration,
    /// Checkpoints begun; the last one's number.
    pub(super) number: u32,
    /// The running time at the last checkpoint.
    pub(super) saved: Duration,
    /// What the last checkpoint took, from the request until the store had it.
    pub(super) took: Option<Duration>,
}

impl Progress {
    pub(super) fn read(folder: &Path) -> Self {
        let text = fs::read(folder.join(FILE)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Without it the times of an attempt that is found again are too short, which is not worth an error.
    pub(super) fn write(&self, folder: &Path) {
        let temporary = folder.join("progress.tmp");
        if let Ok(text) = serde_json::to_vec(self)
            && fs::write(&temporary, text).is_ok()
        {
            let _ = fs::rename(&temporary, folder.join(FILE));
        }
    }

    /// Work that would be lost now.
    pub(super) fn unsaved(&self) -> Duration {
        self.running.saturating_sub(self.saved)
    }

    /// Whether that is more than a checkpoint and going on from it cost.
    pub(super) fn is_worth_saving(&self) -> bool {
        let cost = match self.took {
            Some(took) => took + self.restore,
            None => COST,
        };
        self.unsaved() > cost
    }

    /// Whether it is time for a checkpoint.
    pub(super) fn is_due(&self, spec: &JobSpec) -> bool {
        let interval = match spec.checkpoint_interval_ms {
            Some(0) => return false,
            Some(ms) => Duration::from_millis(ms),
            None => self.best_interval(),
        };
        self.unsaved() >= interval
    }

    /// Young's interval: the root of twice the cost and the time between failures loses least.
    fn best_interval(&self) -> Duration {
        let cost = self.took.unwrap_or(COST).as_secs_f64();
        Duration::from_secs_f64((2.0 * cost * MEAN_LIFE.as_secs_f64()).sqrt()).max(SHORTEST)
    }

    pub(super) fn times(&self) -> Times {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Times {
            suspended_ms: ms(self.suspended),
            checkpoint_ms: ms(self.checkpoint),
            transfer_ms: ms(self.transfer),
            restore_ms: ms(self.restore),
            ..Times::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_written_when_it_saves_more_than_it_costs() {
        let spec = JobSpec::default();
        let mut progress = Progress { running: Duration::from_millis(900), ..Progress::default() };
        assert!(!progress.is_worth_saving() && !progress.is_due(&spec));
        progress.running = Duration::from_secs(250);
        assert!(progress.is_worth_saving() && progress.is_due(&spec), "the root of 2 * 1 s * 6 h is 208 s");
        progress.saved = Duration::from_secs(249);
        assert!(!progress.is_worth_saving() && !progress.is_due(&spec));
        progress.took = Some(Duration::from_millis(300));
        assert!(progress.is_worth_saving(), "what it costs has been seen");
        let every = |ms| JobSpec { checkpoint_interval_ms: Some(ms), ..JobSpec::default() };
        assert!(progress.is_due(&every(1000)) && !progress.is_due(&every(2000)));
        progress.saved = Duration::ZERO;
        assert!(!progress.is_due(&every(0)), "never");
    }

    #[test]
    fn it_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Progress::read(folder.path()), Progress::default());
        let progress = Progress { running: Duration::from_millis(1500), number: 3, ..Progress::default() };
        progress.write(folder.path());
        assert_eq!(Progress::read(folder.path()), progress);
    }
}
