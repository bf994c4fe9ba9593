//! One job on this host, as the worker sees it: what it wants of it, and until when it may run. A thread of its own
//! ([`super::runner`]) brings it there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Say;
use super::checkpoint::Transfers;
use super::lease_file::{Deadlines, LeaseFile};
use super::monitor::{AttemptRecord, Monitor};
use super::reuse::{Machine, Machines};
use super::runner::Runner;
use super::warm::Warm;
use crate::queue::{LeaseKey, Reason, Wanted};
use crate::store::{Claim, Store};

/// After a checkpoint, how old an answer of the store may be that still asks for it.
const SETTLED: Duration = Duration::from_secs(2);

/// What is wanted of a job, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Desired {
    /// Let it run.
    Run,
    /// Let it stand still.
    Pause(Reason),
    /// End it and give it back, with a checkpoint if that is worth it.
    Return(Reason),
    /// End it and give it back as its last checkpoint has it.
    Drop(Reason),
    /// End it for good.
    Cancel,
    /// It is somebody else's: end it and say nothing.
    Abandon,
}

/// What worker and thread tell each other.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) desired: Desired,
    /// Somebody wants a checkpoint now.
    pub(super) checkpoint: bool,
    /// When the last one was reported.
    pub(super) checkpointed: Option<Instant>,
    /// Until when it may run, and how long its leases are.
    pub(super) deadlines: Deadlines,
    pub(super) lease: Duration,
    /// Where its monitor reads that.
    pub(super) file: Option<Arc<LeaseFile>>,
    /// The monitor's process.
    pub(super) pid: Option<u32>,
    /// Its machine waits for the next job already.
    pub(super) left_machine: bool,
    over: bool,
}

/// A job that this worker has.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) key: LeaseKey,
    pub(super) cpus: u32,
    pub(super) memory_bytes: u64,
    /// What users want of it, as the store last said.
    pub(super) wanted: Wanted,
    /// When the lease was last renewed.
    pub(super) renewed: Instant,
    control: Arc<Mutex<Control>>,
}

/// What every attempt of a worker shares.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) store: Arc<dyn Store>,
    pub(super) program: PathBuf,
    pub(super) attempts: PathBuf,
    /// The registry of this worker's machines.
    pub(super) machines: PathBuf,
    pub(super) run_flags: Vec<OsString>,
    /// What `host` is on this host, as a CPU model.
    pub(super) host_model: Option<String>,
    pub(super) transfers: Arc<Transfers>,
    pub(super) warm: Arc<Warm>,
    pub(super) reuse: Arc<Machines>,
    pub(super) die_at: Option<String>,
    pub(super) say: Say,
    /// Wakes the worker when an attempt is over.
    pub(super) wake: Sender<()>,
}

pub(super) fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attempt {
    /// Starts a job that has been claimed, in this machine if there is one for it.
    pub(super) fn start(
        around: &Surroundings,
        claim: Claim,
        machine: Option<Machine>,
        asked_ns: u64,
    ) -> std::io::Result<Self> {
        let lease = Duration::from_millis(claim.lease_ms);
        let output = around.store.local_output(&claim.key).unwrap_or_else(|| {
            let folder = around.folder(&claim.key);
            [folder.join("stdout"), folder.join("stderr")]
        });
        let (inputs, from, warm) = (Vec::new(), None, None);
        let record = AttemptRecord { key: claim.key, output, job: claim.job, inputs, from, warm };
        let control = Arc::new(Mutex::new(Control::new(asked_ns, lease)));
        let runner = Runner::new(around.clone(), record, claim.checkpoints, machine, control.clone());
        Self::spawn(around, runner, None, control)
    }

    /// Goes on with a monitor that an earlier worker has started.
    pub(super) fn adopt(
        around: &Surroundings,
        monitor: Monitor,
        record: AttemptRecord,
        asked_ns: u64,
        lease: Duration,
    ) -> std::io::Result<Self> {
        let mut known = Control::new(asked_ns, lease);
        known.set_file(monitor.lease().clone());
        let control = Arc::new(Mutex::new(known));
        let runner = Runner::new(around.clone(), record, Vec::new(), None, control.clone());
        Self::spawn(around, runner, Some(monitor), control)
    }

    fn spawn(
        around: &Surroundings,
        runner: Runner,
        monitor: Option<Monitor>,
        control: Arc<Mutex<Control>>,
    ) -> std::io::Result<Self> {
        let record = runner.record();
        let attempt = Self {
            key: record.key.clone(),
            cpus: record.job.spec.cpus,
            memory_bytes: record.job.spec.memory_bytes,
            wanted: Wanted::default(),
            renewed: Instant::now(),
            control: control.clone(),
        };
        let wake = around.wake.clone();
        thread::Builder::new().name("attempt".to_owned()).spawn(move || {
            runner.run(monitor);
            lock(&control).over = true;
            // A worker that is gone needs no waking.
            let _ = wake.send(());
        })?;
        Ok(attempt)
    }

    /// The lease has been renewed; its monitor knows that at once.
    pub(super) fn renew(&mut self, asked_ns: u64, lease: Duration, wanted: Wanted) {
        self.renewed = Instant::now();
        self.wanted = wanted;
        let mut control = lock(&self.control);
        control.renew(Deadlines::of(asked_ns, lease), lease);
        // An answer from before the last checkpoint asks for that one.
        let asked = wanted.has(Wanted::CHECKPOINT);
        control.checkpoint = asked && control.checkpointed.is_none_or(|at| at.elapsed() > SETTLED);
    }

    /// Whether its machine waits for the next job already.
    pub(super) fn has_left_machine(&self) -> bool {
        lock(&self.control).left_machine
    }

    /// How long its lease lasts.
    pub(super) fn lease(&self) -> Duration {
        lock(&self.control).lease
    }

    /// The monitor's process, while it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        lock(&self.control).pid
    }

    /// Whether its lease has ended by this host's clock.
    pub(super) fn is_past(&self) -> bool {
        lock(&self.control).deadlines.is_past()
    }

    /// Wants something of it.
    pub(super) fn want(&self, desired: Desired) {
        lock(&self.control).want(desired);
    }

    /// Nothing is left of it on this host.
    pub(super) fn is_over(&self) -> bool {
        lock(&self.control).over
    }
}

impl Control {
    fn new(asked_ns: u64, lease: Duration) -> Self {
        Self {
            desired: Desired::Run,
            checkpoint: false,
            checkpointed: None,
            deadlines: Deadlines::of(asked_ns, lease),
            lease,
            file: None,
            pid: None,
            left_machine: false,
            over: false,
        }
    }

    fn renew(&mut self, deadlines: Deadlines, lease: Duration) {
        (self.deadlines, self.lease) = (deadlines, lease);
        if let Some(file) = &self.file {
            // A file that cannot be written lets the monitor end with the old lease.
            let _ = file.set(deadlines);
        }
    }

    /// A monitor has been started, which reads this file.
    pub(super) fn set_file(&mut self, file: Arc<LeaseFile>) {
        self.file = Some(file);
        self.renew(self.deadlines, self.lease);
    }

    /// Wants something of the job. A pause is taken back; what ends it is not.
    pub(super) fn want(&mut self, desired: Desired) {
        let weight = |desired: Desired| match desired {
            Desired::Run | Desired::Pause(_) => 0,
            Desired::Return(_) => 1,
            Desired::Drop(_) => 2,
            Desired::Cancel => 3,
            Desired::Abandon => 4,
        };
        if weight(desired) > weight(self.desired) || weight(self.desired) == 0 {
            self.desired = desired;
        }
    }
}

impl Surroundings {
    /// A test may want the worker to die here.
    pub(super) fn point(&self, name: &str) {
        debug_assert!(super::POINTS.contains(&name));
        if self.die_at.as_deref() == Some(name) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }

    pub(super) fn folder(&self, key: &LeaseKey) -> PathBuf {
        let token: String = key.token.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        self.attempts.join(format!("{}.{}.{token}", key.job, key.epoch))
    }
}

/// Removes what monitors have left that nobody needs.
pub(super) fn remove_leftover(folder: &Path) {
    // It is looked at again at the next start.
    let _ = std::fs::remove_dir_all(folder);
}
