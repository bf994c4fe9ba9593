//! One job on this host: a thread that starts its monitor, brings it to what is wanted of it and tells the store.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Say;
use super::lease_file::now_ns;
use super::monitor::{AttemptRecord, Monitor, RunResult};
use crate::protocol::Stream;
use crate::queue::{Job, LeaseKey, Reason, State, Times, Wanted};
use crate::store::{Ended, Report, Store, StoreError};

/// How often the thread looks around.
const TICK: Duration = Duration::from_millis(50);
/// How long a monitor may take to end in good order.
const TERMINATION: Duration = Duration::from_secs(3);
/// Output that is sent to a store elsewhere before the thread looks around again, and in one piece.
const SEND_AT_ONCE: u64 = 8 << 20;
const SEND_PIECE: u64 = 1 << 20;
/// The wait between two tries to tell the store of an end.
const RETRY: Duration = Duration::from_millis(500);

/// What is wanted of a job, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Desired {
    /// Let it run.
    Run,
    /// Let it stand still.
    Pause(Reason),
    /// End it and give it back.
    Return(Reason),
    /// End it for good.
    Cancel,
    /// It is somebody else's: end it and say nothing.
    Abandon,
}

#[derive(Debug)]
struct Control {
    desired: Desired,
    /// The lease's end, by [`now_ns`].
    until_ns: u64,
    /// The monitor's process.
    pid: Option<u32>,
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
    lease: Duration,
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
    pub(super) say: Say,
    /// Wakes the worker when an attempt is over.
    pub(super) wake: Sender<()>,
}

fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attempt {
    /// Starts a job that has been claimed.
    pub(super) fn start(
        around: &Surroundings,
        key: LeaseKey,
        job: Job,
        until_ns: u64,
    ) -> std::io::Result<Self> {
        let output = around.store.local_output(&key).unwrap_or_else(|| {
            let folder = around.folder(&key);
            [folder.join("stdout"), folder.join("stderr")]
        });
        Self::spawn(around, AttemptRecord { key, output, job }, None, until_ns)
    }

    /// Goes on with a monitor that an earlier worker has started.
    pub(super) fn adopt(
        around: &Surroundings,
        monitor: Monitor,
        record: AttemptRecord,
        until_ns: u64,
    ) -> std::io::Result<Self> {
        Self::spawn(around, record, Some(monitor), until_ns)
    }

    fn spawn(
        around: &Surroundings,
        record: AttemptRecord,
        monitor: Option<Monitor>,
        until_ns: u64,
    ) -> std::io::Result<Self> {
        let control =
            Arc::new(Mutex::new(Control { desired: Desired::Run, until_ns, pid: None, over: false }));
        let attempt = Self {
            key: record.key.clone(),
            cpus: record.job.spec.cpus,
            memory_bytes: record.job.spec.memory_bytes,
            wanted: Wanted::default(),
            renewed: Instant::now(),
            lease: Duration::from_nanos(until_ns.saturating_sub(now_ns())),
            control: control.clone(),
        };
        let sent = around.store.local_output(&record.key).is_none().then_some([0; 2]);
        let runner = Runner {
            sent,
            around: around.clone(),
            record,
            control: control.clone(),
            lease_written: until_ns,
            started: None,
            running: Duration::ZERO,
            suspended: Duration::ZERO,
            paused: None,
            told: None,
            retry_at: Instant::now(),
            looked: Instant::now(),
            timed_out: false,
            stopping_since: None,
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

    /// The lease has been renewed until then.
    pub(super) fn renew(&mut self, until_ns: u64, wanted: Wanted) {
        self.renewed = Instant::now();
        self.lease = Duration::from_nanos(until_ns.saturating_sub(now_ns()));
        self.wanted = wanted;
        lock(&self.control).until_ns = until_ns;
    }

    /// Whether the lease nears its end without having been renewed.
    pub(super) fn is_endangered(&self) -> bool {
        self.renewed.elapsed() > self.lease * 2 / 3
    }

    /// How long its lease lasts.
    pub(super) fn lease(&self) -> Duration {
        self.lease
    }

    /// The monitor's process, while it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        lock(&self.control).pid
    }

    /// Whether its lease has ended by this host's clock.
    pub(super) fn is_past(&self) -> bool {
        lock(&self.control).until_ns <= now_ns()
    }

    /// Wants something of it. A pause is taken back; what ends it is not.
    pub(super) fn want(&self, desired: Desired) {
        let mut control = lock(&self.control);
        let weight = |desired: Desired| match desired {
            Desired::Run | Desired::Pause(_) => 0,
            Desired::Return(_) => 1,
            Desired::Cancel => 2,
            Desired::Abandon => 3,
        };
        if weight(desired) > weight(control.desired) || weight(control.desired) == 0 {
            control.desired = desired;
        }
    }

    /// Nothing is left of it on this host.
    pub(super) fn is_over(&self) -> bool {
        lock(&self.control).over
    }
}

impl Surroundings {
    pub(super) fn folder(&self, key: &LeaseKey) -> PathBuf {
        let token: String = key.token.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        self.attempts.join(format!("{}.{}.{token}", key.job, key.epoch))
    }
}

struct Runner {
    around: Surroundings,
    record: AttemptRecord,
    control: Arc<Mutex<Control>>,
    lease_written: u64,
    /// The engine, once the store knows that the job runs.
    started: Option<String>,
    /// Running time so far, and up to when it is counted.
    running: Duration,
    /// Time that the machine stood still.
    suspended: Duration,
    /// The machine stands still, and why.
    paused: Option<Reason>,
    /// The pause that the store knows of.
    told: Option<Reason>,
    /// When the store or the machine is tried again after a refusal.
    retry_at: Instant,
    looked: Instant,
    /// How much of stdout and stderr a store elsewhere has; `None` if the files are the store's own.
    sent: Option<[u64; 2]>,
    timed_out: bool,
    stopping_since: Option<Instant>,
}

impl Runner {
    fn run(mut self, monitor: Option<Monitor>) {
        let mut monitor = match monitor {
            Some(monitor) => {
                let known = self.around.store.job(self.record.key.job);
                if known.is_ok_and(|job| job.state != State::Starting) {
                    self.started = monitor.started();
                }
                monitor
            }
            None => match self.start() {
                Ok(monitor) => monitor,
                Err(ended) => {
                    self.say(&format!("cannot start: {}", ended.detail.clone().unwrap_or_default()));
                    self.report_end(ended);
                    // Whatever there is of it.
                    let _ = std::fs::remove_dir_all(self.around.folder(&self.record.key));
                    return;
                }
            },
        };
        self.looked = Instant::now();
        lock(&self.control).pid = monitor.pid();
        loop {
            monitor.wait(TICK);
            let ended = monitor.has_ended();
            self.see_start(&monitor);
            self.send_output(SEND_AT_ONCE);
            if ended {
                break;
            }
            let now = Instant::now();
            if self.paused.is_some() {
                self.suspended += now - self.looked;
            } else if self.started.is_some() {
                self.running += now - self.looked;
            }
            self.looked = now;
            self.steer(&monitor);
        }
        let desired = {
            let mut control = lock(&self.control);
            control.pid = None;
            control.desired
        };
        if desired == Desired::Abandon {
            self.say("given up: its lease is over");
        } else {
            let ended = self.classify(&monitor, desired);
            self.report_end(ended);
        }
        if let Err(err) = monitor.remove() {
            self.say(&format!("its folder cannot be removed: {err}"));
        }
    }

    fn start(&mut self) -> Result<Monitor, Ended> {
        let spec = &self.record.job.spec;
        for (what, path) in [("rootfs", &spec.rootfs), ("stdin", &spec.stdin)] {
            if let Some(path) = path
                && let Err(err) = File::open(path)
            {
                let detail = format!("{what} '{path}' cannot be read on this host: {err}");
                return Err(ended(Reason::BadInput, Some(detail), None));
            }
        }
        let folder = self.around.folder(&self.record.key);
        let until_ns = lock(&self.control).until_ns;
        self.lease_written = until_ns;
        let around = &self.around;
        Monitor::start(&around.program, &folder, &around.machines, &self.record, until_ns, &around.run_flags)
            .map_err(|err| {
                ended(Reason::MachineFailed, Some(format!("the monitor cannot be started: {err}")), None)
            })
    }

    /// Tells the store when the guest is up.
    fn see_start(&mut self, monitor: &Monitor) {
        if self.started.is_some() {
            return;
        }
        let Some(engine) = monitor.started() else { return };
        let report = Report::Started { engine: Some(engine.clone()), checkpoint: None };
        if self.around.store.report(&self.record.key, &report).is_ok() {
            self.say(&format!("runs on engine {engine}"));
            self.started = Some(engine);
        }
    }

    fn steer(&mut self, monitor: &Monitor) {
        let (desired, until_ns) = {
            let control = lock(&self.control);
            (control.desired, control.until_ns)
        };
        if desired == Desired::Abandon {
            return monitor.kill();
        }
        if until_ns != self.lease_written {
            // A file that cannot be written lets the monitor end with the old lease.
            if monitor.set_lease(until_ns).is_ok() {
                self.lease_written = until_ns;
            }
        }
        if let Some(limit) = self.record.job.spec.timeout_ms
            && self.running >= Duration::from_millis(limit)
        {
            self.timed_out = true;
        }
        let wish = match desired {
            Desired::Pause(reason) => Some(reason),
            _ => None,
        };
        if !self.timed_out && matches!(desired, Desired::Run | Desired::Pause(_)) {
            return self.pause(monitor, wish);
        }
        match self.stopping_since {
            None => {
                self.stopping_since = Some(Instant::now());
                let reason = match desired {
                    Desired::Run | Desired::Pause(_) => Reason::TimedOut,
                    Desired::Return(reason) => reason,
                    Desired::Cancel | Desired::Abandon => Reason::Cancelled,
                };
                // The end that follows says the same.
                let _ = self.around.store.report(&self.record.key, &Report::Stopping { reason });
                monitor.terminate();
            }
            Some(since) if since.elapsed() > TERMINATION => monitor.kill(),
            Some(_) => {}
        }
    }

    /// Brings the machine to stand still or to go on, then tells the store.
    fn pause(&mut self, monitor: &Monitor, wish: Option<Reason>) {
        let now = Instant::now();
        if now < self.retry_at {
            return;
        }
        if self.paused.is_some() != wish.is_some() {
            match monitor.pause(wish.is_some()) {
                Ok(()) => {
                    self.paused = wish;
                    self.say(wish.map_or("goes on", |_| "stands still"));
                }
                // It has no control socket yet, or ends.
                Err(_) => self.retry_at = now + TICK,
            }
        } else {
            self.paused = wish;
        }
        if self.told != self.paused && self.started.is_some() {
            let report = match self.paused {
                Some(reason) => Report::Paused { reason, detail: None },
                None => Report::Continued,
            };
            match self.around.store.report(&self.record.key, &report) {
                Ok(()) => self.told = self.paused,
                Err(_) => self.retry_at = now + RETRY,
            }
        }
    }

    /// What the end of the process means for the job.
    fn classify(&self, monitor: &Monitor, desired: Desired) -> Ended {
        let result = monitor.result();
        if let Some(ended) = result.as_ref().and_then(command_end) {
            return ended;
        }
        match desired {
            Desired::Cancel => return ended(Reason::Cancelled, None, None),
            Desired::Return(reason) => return ended(reason, None, None),
            Desired::Run | Desired::Pause(_) | Desired::Abandon => {}
        }
        if self.timed_out {
            let limit = Duration::from_millis(self.record.job.spec.timeout_ms.unwrap_or_default());
            return ended(Reason::TimedOut, Some(format!("it ran for {limit:?}")), Some(124));
        }
        let detail = result
            .and_then(|result| result.error)
            .or_else(|| monitor.last_words())
            .unwrap_or_else(|| "the monitor ended without a word".to_owned());
        ended(Reason::MachineFailed, Some(detail), None)
    }

    /// Tells the store of the end, for as long as that takes and the lease is ours.
    fn report_end(&mut self, mut ended: Ended) {
        ended.times.suspended_ms = u64::try_from(self.suspended.as_millis()).unwrap_or(u64::MAX);
        for path in &self.record.output {
            // A stream that was never opened has nothing to keep.
            if let Ok(file) = File::open(path)
                && let Err(err) = file.sync_all()
            {
                self.say(&format!("its output is not on the disk: {err}"));
            }
        }
        self.send_all_output();
        let what = match ended.exit_code {
            Some(code) => format!("{}, exit code {code}", ended.reason),
            None => ended.reason.to_string(),
        };
        loop {
            match self.around.store.report(&self.record.key, &Report::Ended(ended.clone())) {
                Ok(()) => return self.say(&format!("ended: {what}")),
                Err(StoreError::Fenced(_)) => {
                    return self.say(&format!("ended, but its lease is over: {what}"));
                }
                Err(err) if err.is_passing() && !self.is_abandoned() => thread::sleep(RETRY),
                Err(err) => return self.say(&format!("ended ({what}), which cannot be recorded: {err}")),
            }
        }
    }

    /// Sends what a store elsewhere does not have yet, up to so many bytes. False: there may be more.
    fn send_output(&mut self, mut budget: u64) -> bool {
        let Some(sent) = &mut self.sent else { return true };
        let now = Instant::now();
        if now < self.retry_at {
            return false;
        }
        for ((path, sent), stream) in
            self.record.output.iter().zip(sent.iter_mut()).zip([Stream::Stdout, Stream::Stderr])
        {
            // Not there before the machine starts.
            let Ok(file) = File::open(path) else { continue };
            loop {
                let mut piece = vec![0; usize::try_from(budget.min(SEND_PIECE)).unwrap_or(0)];
                let count = file.read_at(&mut piece, *sent).unwrap_or(0);
                piece.truncate(count);
                if piece.is_empty() {
                    break;
                }
                if self.around.store.write_output(&self.record.key, stream, *sent, &piece).is_err() {
                    self.retry_at = now + RETRY;
                    return false;
                }
                *sent += count as u64;
                budget = budget.saturating_sub(count as u64);
            }
        }
        budget > 0
    }

    /// Sends the rest of the output, for as long as that takes and the lease is ours.
    fn send_all_output(&mut self) {
        while !self.send_output(SEND_AT_ONCE) && !self.is_abandoned() {
            if self.retry_at > Instant::now() {
                thread::sleep(RETRY);
            }
        }
    }

    fn is_abandoned(&self) -> bool {
        lock(&self.control).desired == Desired::Abandon
    }

    fn say(&self, what: &str) {
        (self.around.say)(&format!("{}: {what}", self.record.key));
    }
}

fn ended(reason: Reason, detail: Option<String>, exit_code: Option<u8>) -> Ended {
    Ended { reason, detail, exit_code, times: Times::default() }
}

/// The end of the command, if it came to one.
fn command_end(result: &RunResult) -> Option<Ended> {
    match (result.status.as_deref()?, &result.error) {
        ("exited", None) => Some(ended(Reason::Exited, None, Some(result.exit_code))),
        ("signaled", None) => {
            let signal = result.exit_code.saturating_sub(128);
            Some(ended(Reason::Signalled, Some(format!("signal {signal}")), Some(result.exit_code)))
        }
        ("not found" | "not executable", error) => {
            Some(ended(Reason::Exited, error.clone(), Some(result.exit_code)))
        }
        _ => None,
    }
}

/// Removes what monitors have left that nobody needs.
pub(super) fn remove_leftover(folder: &Path) {
    // It is looked at again at the next start.
    let _ = std::fs::remove_dir_all(folder);
}
