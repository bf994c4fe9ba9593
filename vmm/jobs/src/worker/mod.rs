//! A worker: takes jobs from a store for one host and runs each in a monitor process of its own.
//!
//! One loop keeps the leases and decides what is wanted of each job; a thread per job ([`attempt`]) brings its monitor
//! there. Every monitor knows by a file ([`lease_file`]) until when its lease lasts: it stands still before that and ends
//! itself then, so nothing of a worker that hangs or is killed runs on for long; one that comes back in time goes on with
//! what it finds.

mod attempt;
mod checkpoint;
mod files;
pub mod lease_file;
mod monitor;
mod owner;
pub mod policy;
mod progress;
mod reuse;
mod runner;
mod warm;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use thiserror::Error;

use self::attempt::{Attempt, Desired, Surroundings};
use self::checkpoint::Transfers;
use self::lease_file::now_ns;
use self::monitor::Monitor;
use self::owner::OwnerWatch;
use self::reuse::Machines;
use self::warm::Warm;
use crate::queue::{Free, HostAd, LeaseKey, Reason, Wanted};
use crate::store::{ClaimRequest, Store, StoreError, random_word};

pub use owner::busy_flag;
pub use policy::Policy;

pub use monitor::{RunOutput, RunResult, names, write_durably};

/// How long the loop sleeps when nothing happens.
const TICK: Duration = Duration::from_millis(100);
/// How often leases are renewed, which also tells what users want; and at least so often within one lease.
const RENEWAL: Duration = Duration::from_secs(1);
const RENEWALS: u32 = 6;
/// How often the host says what it offers.
const ADVERTISEMENT: Duration = Duration::from_secs(10);
/// How long a worker that finds attempts of its own at its start waits for a store that does not answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an idle worker waits between two looks at the queue: at first and at most.
const LOOKS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(200));

/// Where a worker can be made to die, for tests: right before or after something that others see.
pub const POINTS: &[&str] = &[
    "claimed",
    "monitor started",
    "guest up",
    "start told",
    "paused",
    "pause told",
    "checkpoint written",
    "checkpoint told",
    "stop told",
    "monitor ended",
    "end told",
];

/// Takes lines that say what a worker does.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// What a worker is and may use.
pub struct Config {
    /// Its name, unique among the workers of a queue.
    pub name: String,
    /// A folder of its own for what runs.
    pub state: PathBuf,
    /// The `harrier` program.
    pub program: PathBuf,
    /// Further flags for every `harrier run`.
    pub run_flags: Vec<OsString>,
    /// Jobs at a time.
    pub slots: u32,
    /// Processors for jobs.
    pub cpus: u32,
    /// Memory for jobs.
    pub memory_bytes: u64,
    /// Engines that can run here, best first.
    pub engines: Vec<String>,
    /// CPU models that they offer; `host` also as `host:DIGEST`, which tells unlike hosts apart.
    pub cpu_models: Vec<String>,
    /// Words that requirements can ask for.
    pub labels: BTreeMap<String, String>,
    /// Checkpoints that are written, sent or fetched at a time.
    pub transfers: u32,
    /// What templates for warm starts may take on the disk, and in the page cache; 0 boots every machine.
    pub warm_bytes: u64,
    /// What the host's owner allows.
    pub policy: Policy,
    /// End when nothing is left that can run here.
    pub drain: bool,
    /// End after so many jobs.
    pub jobs: Option<u64>,
    /// One of [`POINTS`], at which the worker kills itself: for tests.
    pub die_at: Option<String>,
}

/// How a worker is told to end: 0 not, 1 give the jobs back first, 2 at once.
pub type Stop = Arc<AtomicU32>;

/// Why a worker cannot go on.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// Its folder.
    #[error("the worker's folder '{0}' cannot be used ({1}): give another --state")]
    State(String, io::Error),
    /// Another process.
    #[error("another worker uses the folder '{0}': give another --state")]
    InUse(String),
    /// The queue.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Runs a worker until it is told to end. Answers how many jobs it has run.
pub fn run(store: Arc<dyn Store>, config: &Config, say: Say, stop: &Stop) -> Result<u64, WorkerError> {
    let state_error = |err| WorkerError::State(config.state.display().to_string(), err);
    let attempts = config.state.join("attempts");
    fs::create_dir_all(&attempts).map_err(state_error)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(config.state.join("worker.lock"))
        .map_err(state_error)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(WorkerError::InUse(config.state.display().to_string()));
        }
        Err(fs::TryLockError::Error(err)) => return Err(state_error(err)),
    }
    let (wake, woken) = channel();
    let machines = config.state.join("machines");
    let warm = Warm::new(&config.program, &config.state, &machines, &config.run_flags, config.warm_bytes)
        .map_err(state_error)?;
    let reuse = Machines::new(&config.program, &config.state, &machines, &config.run_flags, &warm)
        .map_err(state_error)?;
    let around = Surroundings {
        store,
        program: config.program.clone(),
        attempts,
        machines,
        warm,
        reuse,
        run_flags: config.run_flags.clone(),
        host_model: config.cpu_models.iter().find(|model| model.starts_with("host:")).cloned(),
        transfers: Transfers::new(config.transfers),
        die_at: config.die_at.clone(),
        say,
        wake,
    };
    let mut worker = Worker {
        config,
        around,
        woken,
        instance: random_word(),
        running: Vec::new(),
        ended: 0,
        claimed: 0,
        renewed: Instant::now(),
        advertised: None,
        next_look: Instant::now(),
        pause: LOOKS.0,
        silent: false,
        owner: OwnerWatch::new(&config.state),
        suspended: None,
        evicting: None,
        killing: false,
        closed: None,
    };
    let ran = worker.run(stop);
    worker.around.reuse.shrink(0, 0);
    ran
}

struct Worker<'a> {
    config: &'a Config,
    around: Surroundings,
    woken: Receiver<()>,
    instance: String,
    running: Vec<Attempt>,
    ended: u64,
    claimed: u64,
    renewed: Instant,
    advertised: Option<Instant>,
    next_look: Instant,
    /// Until the next look, when the queue has nothing.
    pause: Duration,
    /// The store does not answer, and that has been said.
    silent: bool,
    owner: OwnerWatch,
    /// Since when the owner wants the host.
    suspended: Option<Instant>,
    /// Since when jobs are given back for the owner.
    evicting: Option<Instant>,
    /// They are not even given the time to be saved.
    killing: bool,
    /// Why no jobs are taken.
    closed: Option<String>,
}

impl Worker<'_> {
    fn run(&mut self, stop: &Stop) -> Result<u64, WorkerError> {
        let has_attempts =
            fs::read_dir(&self.around.attempts).is_ok_and(|mut entries| entries.next().is_some());
        // Who has nothing yet learns at once that the address is wrong.
        let patience = if has_attempts { PATIENCE } else { Duration::ZERO };
        let until = Instant::now() + patience;
        self.patiently(until, stop, Self::advertise)?;
        self.adopt(until, stop)?;
        self.say(&format!("worker {} takes up to {} jobs at a time", self.config.name, self.config.slots));
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if stopping > 1 {
                break;
            }
            self.renew();
            self.reap();
            self.obey();
            self.tend_machines(stopping > 0);
            let mut idle = false;
            if stopping == 1 {
                for attempt in &self.running {
                    attempt.want(Desired::Return(Reason::WorkerStopped));
                }
                idle = true;
            } else if self.config.jobs.is_some_and(|jobs| self.claimed >= jobs) {
                idle = true;
            } else if self.closed.is_none() && Instant::now() >= self.next_look {
                idle = !self.claim() && self.config.drain && !self.silent;
            }
            if idle && self.running.is_empty() {
                break;
            }
            if self.advertised.is_none_or(|at| at.elapsed() > ADVERTISEMENT) {
                let advertised = self.advertise();
                self.heard(&advertised);
            }
            let now = Instant::now();
            let sleep = self.next_look.saturating_duration_since(now).clamp(Duration::from_millis(1), TICK);
            // Woken or not, the loop looks at everything.
            if self.woken.recv_timeout(sleep).is_ok() {
                self.next_look = Instant::now();
            }
        }
        self.say(&format!("worker {} has run {} jobs", self.config.name, self.ended));
        Ok(self.ended)
    }

    /// Asks the store again and again until it answers, at most until then.
    fn patiently<T>(
        &mut self,
        until: Instant,
        stop: &Stop,
        ask: impl Fn(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            let answer = ask(self);
            let again = answer.as_ref().is_err_and(StoreError::is_passing)
                && Instant::now() < until
                && stop.load(Ordering::Relaxed) == 0;
            if !again {
                return answer;
            }
            self.heard(&answer);
            std::thread::sleep(LOOKS.1);
        }
    }

    /// Notes whether the store answers, and says so when that changes.
    fn heard<T>(&mut self, answer: &Result<T, StoreError>) {
        match answer {
            Err(err) if !self.silent => {
                self.silent = true;
                self.say(&format!("the queue does not answer: {err}"));
            }
            Ok(_) if self.silent => {
                self.silent = false;
                self.say("the queue answers again");
            }
            _ => {}
        }
    }

    fn advertise(&mut self) -> Result<(), StoreError> {
        let config = self.config;
        let ad = HostAd {
            host: config.name.clone(),
            instance: self.instance.clone(),
            slots: config.slots,
            cpus: config.cpus,
            memory_bytes: config.memory_bytes,
            engines: config.engines.clone(),
            cpu_models: config.cpu_models.clone(),
            labels: config.labels.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            free: self.free(),
            closed: self.closed.clone(),
        };
        self.around.store.advertise(&ad)?;
        self.advertised = Some(Instant::now());
        Ok(())
    }

    fn free(&self) -> Free {
        let used_cpus: u32 = self.running.iter().map(|attempt| attempt.cpus).sum();
        let used_bytes: u64 = self.running.iter().map(|attempt| attempt.memory_bytes).sum();
        let running = u32::try_from(self.running.len()).unwrap_or(u32::MAX);
        Free {
            slots: self.config.slots.saturating_sub(running),
            cpus: self.config.cpus.saturating_sub(used_cpus),
            memory_bytes: self.config.memory_bytes.saturating_sub(used_bytes),
        }
    }

    /// Goes on with what an earlier worker has left, or ends it.
    fn adopt(&mut self, until: Instant, stop: &Stop) -> Result<(), WorkerError> {
        let state_error = |err| WorkerError::State(self.config.state.display().to_string(), err);
        for entry in fs::read_dir(&self.around.attempts).map_err(state_error)? {
            let folder = entry.map_err(state_error)?.path();
            let Some((mut monitor, record)) = Monitor::adopt(&folder, &self.around.machines) else {
                attempt::remove_leftover(&folder);
                continue;
            };
            let (asked, renewals) = self.patiently(until, stop, |worker| {
                let asked = now_ns();
                let keys = std::slice::from_ref(&record.key);
                worker.around.store.renew(&worker.config.name, keys).map(|renewals| (asked, renewals))
            })?;
            match renewals.first().and_then(|renewal| renewal.lease) {
                Some(lease) => {
                    self.say(&format!("{}: found again", record.key));
                    self.claimed += 1;
                    let lease = Duration::from_millis(lease.lease_ms);
                    let attempt = Attempt::adopt(&self.around, monitor, record, asked, lease);
                    self.running.push(attempt.map_err(state_error)?);
                }
                None => {
                    self.say(&format!("{}: left over, its lease is gone", record.key));
                    monitor.kill();
                    while !monitor.has_ended() {
                        monitor.wait(TICK);
                    }
                    monitor.remove().map_err(state_error)?;
                }
            }
        }
        Ok(())
    }

    /// Keeps the leases and passes on what users want.
    fn renew(&mut self) {
        let shortest = self.running.iter().map(Attempt::lease).min().unwrap_or(RENEWAL);
        if self.renewed.elapsed() < RENEWAL.min(shortest / RENEWALS) {
            return;
        }
        let keys: Vec<LeaseKey> = self
            .running
            .iter()
            .filter(|attempt| !attempt.is_over())
            .map(|attempt| attempt.key.clone())
            .collect();
        self.renewed = Instant::now();
        if keys.is_empty() {
            return;
        }
        let asked = now_ns();
        let answer = self.around.store.renew(&self.config.name, &keys);
        self.heard(&answer);
        for renewal in answer.unwrap_or_default() {
            let Some(attempt) = self.running.iter_mut().find(|attempt| attempt.key == renewal.key) else {
                continue;
            };
            match renewal.lease {
                None if attempt.is_over() => {}
                None => attempt.want(Desired::Abandon),
                Some(lease) => {
                    attempt.renew(asked, Duration::from_millis(lease.lease_ms), lease.wanted);
                }
            }
        }
    }

    /// Tells every attempt what users, the owner and the state of its lease want of it.
    fn obey(&mut self) {
        self.follow_owner();
        for attempt in &self.running {
            let evicted = match self.evicting {
                Some(_) if self.killing => Some(Desired::Drop(Reason::Evicted)),
                Some(_) => Some(Desired::Return(Reason::Evicted)),
                None => None,
            };
            let pause = if attempt.wanted.has(Wanted::SUSPEND) {
                Some(Reason::SuspendedByUser)
            } else if self.suspended.is_some() {
                Some(Reason::Owner)
            } else {
                None
            };
            let past = attempt.is_past().then_some(Desired::Abandon);
            let wish = past.or_else(|| desired(attempt.wanted)).or(evicted);
            attempt.want(wish.or(pause.map(Desired::Pause)).unwrap_or(Desired::Run));
        }
    }

    /// Looks at the host and follows its owner's rules.
    fn follow_owner(&mut self) {
        let pids: Vec<u32> = self.running.iter().filter_map(Attempt::pid).collect();
        let mut owner = self.owner.look(&pids);
        let seconds = |since: Option<Instant>| since.map(|since| since.elapsed().as_secs_f64());
        owner.suspended_for = seconds(self.suspended);
        owner.evicting_for = seconds(self.evicting);
        let policy = &self.config.policy;
        if self.suspended.is_none() && policy.suspend.is_true(&owner) {
            self.suspended = Some(Instant::now());
            self.say(&format!("the owner wants the host: {}", policy.suspend.text()));
        } else if self.suspended.is_some() && self.evicting.is_none() && policy.resume.is_true(&owner) {
            self.suspended = None;
            self.say(&format!("the owner leaves the host to jobs: {}", policy.resume.text()));
        } else if self.suspended.is_some() && self.evicting.is_none() && policy.evict.is_true(&owner) {
            self.evicting = Some(Instant::now());
            if !self.running.is_empty() {
                self.say(&format!("the jobs are given back: {}", policy.evict.text()));
            }
        }
        if self.evicting.is_some() && self.running.is_empty() {
            self.evicting = None;
            self.killing = false;
        }
        if self.evicting.is_some() && !self.killing && policy.kill.is_true(&owner) {
            self.killing = true;
            self.say(&format!("what is left of them is ended without its state: {}", policy.kill.text()));
        }
        let closed = if self.suspended.is_some() {
            Some("its owner wants it".to_owned())
        } else if policy.start.is_true(&owner) {
            None
        } else {
            Some(format!("start is not true: {}", policy.start.unmet(&owner).join(", ")))
        };
        if closed.is_some() != self.closed.is_some() {
            // The pool hears of it at once.
            self.advertised = None;
            match &closed {
                Some(why) => self.say(&format!("takes no jobs: {why}")),
                None => self.say("takes jobs"),
            }
        }
        self.closed = closed;
    }

    fn reap(&mut self) {
        let before = self.running.len();
        self.running.retain(|attempt| !attempt.is_over());
        self.ended += (before - self.running.len()) as u64;
    }

    /// Takes jobs for what is free. False: there were none.
    fn claim(&mut self) -> bool {
        let free = self.free();
        if free.slots == 0 || free.cpus == 0 {
            self.next_look = Instant::now() + self.pause;
            return true;
        }
        let left = self.config.jobs.map_or(u64::MAX, |jobs| jobs.saturating_sub(self.claimed));
        let request = ClaimRequest {
            host: self.config.name.clone(),
            instance: self.instance.clone(),
            count: free.slots.min(u32::try_from(left).unwrap_or(u32::MAX)),
            free,
        };
        let asked = now_ns();
        let answer = self.around.store.claim(&request);
        self.heard(&answer);
        let claims = answer.unwrap_or_default();
        if claims.is_empty() {
            self.next_look = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(LOOKS.1);
            return false;
        }
        self.pause = LOOKS.0;
        self.around.point("claimed");
        for claim in claims {
            self.claimed += 1;
            let what = claim.job.spec.command.first().cloned().unwrap_or_default();
            self.say(&format!("{}: starting {what}", claim.key));
            let key = claim.key.clone();
            let machine = claim.job.spec.reuse.then(|| self.around.reuse.take(&claim.job)).flatten();
            match Attempt::start(&self.around, claim, machine, asked) {
                Ok(attempt) => self.running.push(attempt),
                // The lease ends by itself.
                Err(err) => self.say(&format!("{key}: no thread for it: {err}")),
            }
        }
        self.tend_machines(false);
        true
    }

    /// Keeps the machines that wait for a job, as long as nobody else needs their room.
    fn tend_machines(&self, stopping: bool) {
        self.around.reuse.keep();
        let Free { mut slots, mut memory_bytes, .. } = self.free();
        for attempt in self.running.iter().filter(|attempt| attempt.has_left_machine()) {
            slots += 1;
            memory_bytes += attempt.memory_bytes;
        }
        let wanted = self.closed.is_none() && !stopping;
        let (slots, memory_bytes) = if wanted { (slots, memory_bytes) } else { (0, 0) };
        self.around.reuse.shrink(slots, memory_bytes);
    }

    fn say(&self, what: &str) {
        (self.around.say)(what);
    }
}

/// How long a new worker waits for machines of an earlier one to write nothing any more into what it removes.
const LEFT_BEHIND: Duration = Duration::from_secs(10);

/// An empty folder: whatever an earlier worker left there is gone.
fn empty_folder(folder: PathBuf) -> io::Result<PathBuf> {
    let until = Instant::now() + LEFT_BEHIND;
    loop {
        match fs::remove_dir_all(&folder) {
            Ok(()) => break,
            Err(err) if err.kind() == io::ErrorKind::NotFound && !folder.exists() => break,
            // A machine of the earlier worker, which is about to end, has made something meanwhile.
            Err(err)
                if matches!(err.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound)
                    && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(err) => return Err(err),
        }
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// What users' wishes mean for a job here.
fn desired(wanted: Wanted) -> Option<Desired> {
    if wanted.has(Wanted::CANCEL) {
        return Some(Desired::Cancel);
    }
    let returns = [
        (Wanted::REQUEUE, Reason::Requeued),
        (Wanted::HOLD, Reason::HeldByUser),
        (Wanted::VACATE, Reason::Vacated),
    ];
    returns.iter().find(|(wish, _)| wanted.has(*wish)).map(|(_, reason)| Desired::Return(*reason))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_folder_into_which_somebody_still_writes_becomes_empty() {
        let state = tempfile::tempdir().unwrap();
        let (folder, is_over) = (state.path().join("warm"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let until = Instant::now() + Duration::from_millis(300);
                let mut number = 0;
                while Instant::now() < until {
                    number += 1;
                    let _ = fs::create_dir_all(folder.join("0"));
                    let _ = fs::write(folder.join("0").join(number.to_string()), "state");
                }
                is_over.store(true, Ordering::SeqCst);
            });
            while !folder.join("0/9").exists() {
                std::thread::yield_now();
            }
            // Again and again, so that one of them meets a write in the middle.
            while !is_over.load(Ordering::SeqCst) {
                empty_folder(folder.clone()).unwrap();
            }
        });
        empty_folder(folder.clone()).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        empty_folder(state.path().join("new")).unwrap();
    }
}
