//! The thread of one job: starts its monitor, brings it to what is wanted of it, writes checkpoints, and tells the store.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::attempt::{Control, Desired, Surroundings, lock};
use super::checkpoint::{Fetched, Source, Way, Written};
use super::files;
use super::monitor::{AttemptRecord, Monitor};
use super::progress::Progress;
use super::reuse::Machine;
use crate::protocol::Stream;
use crate::queue::{Activity, Checkpoint, Reason, State, Times};
use crate::store::{Ended, Report, StoreError};

/// How often the thread looks around.
const TICK: Duration = Duration::from_millis(50);
/// How often the times are written down.
const NOTE: Duration = Duration::from_secs(2);
/// How often the command's progress is looked at.
const SAID: Duration = Duration::from_secs(1);
/// The part of a lease for which a monitor may take to let its machine stand or go on.
const PAUSE_SHARE: u32 = 12;
/// How long a monitor may take to end in good order.
const TERMINATION: Duration = Duration::from_secs(3);
/// Output that is sent to a store elsewhere before the thread looks around again, in one piece, and how long that may take.
const SEND_AT_ONCE: u64 = 8 << 20;
const SEND_PIECE: u64 = 1 << 20;
const SEND_TIME: Duration = Duration::from_millis(500);
/// The wait between two tries to tell the store of an end.
const RETRY: Duration = Duration::from_millis(500);
/// The wait after a checkpoint that could not be written, and how many of them an eviction tries.
const CHECKPOINT_RETRY: Duration = Duration::from_secs(2);
const CHECKPOINT_TRIES: u32 = 3;
/// After so many system failures in a row the checkpoint that was tried is passed over for the one before.
const FAILURES_PER_CHECKPOINT: u32 = 2;

/// A checkpoint that is being written, sent, or told of.
struct Writing {
    /// The machine stands still for it, and ends afterwards.
    evicting: bool,
    /// The running time that is in it.
    running: Duration,
    result: Receiver<Result<Written, String>>,
    written: Option<Written>,
}

pub(super) struct Runner {
    around: Surroundings,
    record: AttemptRecord,
    /// What the store offered to go on from, latest first.
    checkpoints: Vec<Checkpoint>,
    /// The machine that it shares with those before and after it.
    machine: Option<Machine>,
    used_before: bool,
    control: Arc<Mutex<Control>>,
    /// When the monitor was started.
    begun: Instant,
    /// The engine, once the store knows that the job runs.
    started: Option<String>,
    progress: Progress,
    noted: Instant,
    /// What the store knows of how far the command has come, and when that was looked at.
    said: Option<String>,
    said_at: Instant,
    /// The machine stands still, and why.
    paused: Option<Reason>,
    /// The pause that the store knows of.
    told: Option<Reason>,
    /// When the machine, the store and the way for output are tried again after a refusal: none keeps the others waiting.
    pause_at: Instant,
    tell_at: Instant,
    send_at: Instant,
    looked: Instant,
    /// How much of stdout and stderr a store elsewhere has; `None` if the files are the store's own.
    sent: Option<[u64; 2]>,
    timed_out: bool,
    stopping_since: Option<Instant>,
    writing: Option<Writing>,
    /// Checkpoints in a row that could not be written, and when the next is tried.
    unwritten: u32,
    checkpoint_at: Instant,
    /// Why the last could not be written.
    unwritten_reason: Option<String>,
    /// What the job is given back for is saved.
    saved: bool,
}

impl Runner {
    pub(super) fn new(
        around: Surroundings,
        record: AttemptRecord,
        checkpoints: Vec<Checkpoint>,
        machine: Option<Machine>,
        control: Arc<Mutex<Control>>,
    ) -> Self {
        let now = Instant::now();
        let sent = around.store.local_output(&record.key).is_none().then_some([0; 2]);
        Self {
            around,
            record,
            checkpoints,
            used_before: machine.is_some(),
            machine,
            control,
            begun: now,
            started: None,
            progress: Progress::default(),
            noted: now,
            said: None,
            said_at: now,
            paused: None,
            told: None,
            pause_at: now,
            tell_at: now,
            send_at: now,
            looked: now,
            sent,
            timed_out: false,
            stopping_since: None,
            writing: None,
            unwritten: 0,
            checkpoint_at: now,
            unwritten_reason: None,
            saved: false,
        }
    }

    pub(super) fn record(&self) -> &AttemptRecord {
        &self.record
    }

    pub(super) fn run(mut self, monitor: Option<Monitor>) {
        let mut monitor = match monitor {
            Some(monitor) => self.take_over(monitor),
            None => match self.start() {
                Ok(monitor) => monitor,
                Err(failed) => {
                    self.say(&format!("cannot start: {}", failed.detail.clone().unwrap_or_default()));
                    // What was given up while it started has not failed.
                    let desired = lock(&self.control).desired;
                    self.report_end(match desired {
                        Desired::Cancel => ended(Reason::Cancelled, None, None),
                        Desired::Return(reason) | Desired::Drop(reason) => ended(reason, None, None),
                        Desired::Run | Desired::Pause(_) | Desired::Abandon => failed,
                    });
                    // Whatever there is of it.
                    let _ = std::fs::remove_dir_all(self.around.folder(&self.record.key));
                    return;
                }
            },
        };
        self.around.point("monitor started");
        self.looked = Instant::now();
        // What its machine does is this worker's work.
        let pid = self.machine.as_ref().map(Machine::pid).or(monitor.pid());
        lock(&self.control).pid = pid;
        loop {
            monitor.wait(TICK);
            let ended = monitor.has_ended();
            self.see_start(&monitor);
            self.see_said(&monitor, ended);
            self.send_output(SEND_AT_ONCE);
            if ended {
                break;
            }
            self.count_time();
            self.steer(&monitor);
        }
        let desired = {
            let mut control = lock(&self.control);
            control.pid = None;
            control.desired
        };
        if let Some(machine) = self.machine.take() {
            // After anything but the command's own end nobody knows what still runs in it.
            let came_to_its_end = monitor.result().is_some_and(|result| result.status.is_some());
            if came_to_its_end && self.paused.is_none() {
                lock(&self.control).left_machine = true;
                self.around.reuse.put(machine);
            }
        }
        if desired == Desired::Abandon {
            self.say("given up: its lease is over");
        } else {
            self.around.point("monitor ended");
            self.finish_writing();
            let ended = self.classify(&monitor, desired);
            let ended = self.send_files(&monitor, ended);
            self.report_end(ended);
            self.around.point("end told");
        }
        if let Err(err) = monitor.remove() {
            self.say(&format!("its folder cannot be removed: {err}"));
        }
    }

    /// Goes on with a monitor that an earlier worker has started.
    fn take_over(&mut self, monitor: Monitor) -> Monitor {
        let known = self.around.store.job(self.record.key.job);
        if known.is_ok_and(|job| job.state != State::Starting) {
            self.started = monitor.started();
        }
        self.progress = Progress::read(monitor.folder());
        if monitor.is_paused() {
            // Whatever it was for: it is let go, or told anew.
            self.paused = Some(Reason::Owner);
        }
        monitor
    }

    fn count_time(&mut self) {
        let now = Instant::now();
        let passed = now - self.looked;
        self.looked = now;
        if self.writing.as_ref().is_some_and(|writing| writing.evicting) {
            self.progress.checkpoint += passed;
        } else if self.paused.is_some() {
            self.progress.suspended += passed;
        } else if self.started.is_some() {
            self.progress.running += passed;
        }
        if self.noted.elapsed() > NOTE {
            self.note();
        }
    }

    fn note(&mut self) {
        self.noted = Instant::now();
        self.progress.write(&self.around.folder(&self.record.key));
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
        if spec.reuse {
            return self.start_in_machine(&folder);
        }
        self.record.from = self.find_checkpoint()?;
        if self.record.from.is_none() {
            // A machine that goes on has them.
            self.record.inputs = files::bring(self.around.store.as_ref(), &self.record, &folder)?;
            self.record.warm = self.around.warm.template(&self.record.job.spec);
        }
        let deadlines = lock(&self.control).deadlines;
        let around = &self.around;
        let monitor = Monitor::start(
            &around.program,
            &folder,
            &around.machines,
            &self.record,
            deadlines,
            &around.run_flags,
        )
        .map_err(|err| {
            ended(Reason::MachineFailed, Some(format!("the monitor cannot be started: {err}")), None)
        })?;
        lock(&self.control).set_file(monitor.lease().clone());
        Ok(monitor)
    }

    /// Starts the command in a machine that may have had others before.
    fn start_in_machine(&mut self, folder: &Path) -> Result<Monitor, Ended> {
        let failed = |err: String| ended(Reason::MachineFailed, Some(err), None);
        let machine = match self.machine.take() {
            Some(machine) => machine,
            None => {
                let given_up = || !matches!(lock(&self.control).desired, Desired::Run | Desired::Pause(_));
                self.around.reuse.start(&self.record.job, &given_up).map_err(failed)?
            }
        };
        let deadlines = lock(&self.control).deadlines;
        let around = &self.around;
        let registry = &around.machines;
        let monitor =
            Monitor::start_in(machine.name(), &around.program, folder, registry, &self.record, deadlines)
                .map_err(|err| failed(format!("its command cannot be started: {err}")))?;
        self.machine = Some(machine);
        lock(&self.control).set_file(monitor.lease().clone());
        Ok(monitor)
    }

    /// The latest checkpoint that can be used, brought to this host; `None` to begin anew.
    fn find_checkpoint(&mut self) -> Result<Option<Source>, Ended> {
        if self.checkpoints.is_empty() {
            return Ok(None);
        }
        // One from which the job has failed again and again is passed over, though it is whole.
        let passed_over = self.record.job.failures / FAILURES_PER_CHECKPOINT;
        let offered = std::mem::take(&mut self.checkpoints);
        let key = self.record.key.clone();
        let store = self.around.store.clone();
        // The job's people may know; it goes on without their knowing, too.
        let _ = store.report(&key, &Report::Activity(Some(Activity::Restoring)));
        let scratch = self.around.folder(&key);
        let given_up = || !matches!(lock(&self.control).desired, Desired::Run | Desired::Pause(_));
        let way = Way { store: store.as_ref(), key: &key, scratch: &scratch, given_up: &given_up };
        let failed = |err: String| ended(Reason::RestoreFailed, Some(err), None);
        for checkpoint in offered.iter().skip(passed_over as usize) {
            let (epoch, number) = (checkpoint.epoch, checkpoint.number);
            let _turn = self
                .around
                .transfers
                .begin(&given_up)
                .ok_or_else(|| failed("it was given up before its checkpoint was fetched".to_owned()))?;
            match way.fetch(checkpoint).map_err(failed)? {
                Fetched::Usable(source) => return Ok(Some(source)),
                Fetched::Damaged(reason) => {
                    self.say(&format!("checkpoint {number} of attempt {epoch} is of no use: {reason}"));
                    let bad = Report::BadCheckpoint { epoch, number, detail: reason };
                    store.report(&key, &bad).map_err(|err| failed(err.to_string()))?;
                }
            }
        }
        Ok(None)
    }

    /// Tells the store when the guest is up.
    fn see_start(&mut self, monitor: &Monitor) {
        if self.started.is_some() {
            return;
        }
        let Some(engine) = monitor.started() else { return };
        self.around.point("guest up");
        let checkpoint = self.record.from.as_ref().map(|from| (from.epoch, from.number));
        let report = Report::Started { engine: Some(engine.clone()), checkpoint };
        if self.around.store.report(&self.record.key, &report).is_ok() {
            match checkpoint {
                None if self.used_before => {
                    self.say(&format!("runs on engine {engine}, in a machine that had jobs before"));
                }
                None if self.record.warm.is_some() => {
                    self.say(&format!("runs on engine {engine}, from a template"));
                }
                None => self.say(&format!("runs on engine {engine}")),
                Some((epoch, number)) => {
                    self.progress.restore = self.begun.elapsed();
                    self.say(&format!(
                        "goes on from checkpoint {number} of attempt {epoch} on engine {engine}"
                    ));
                }
            }
            self.started = Some(engine);
            self.around.point("start told");
        }
    }

    /// Tells the store how far the command says it has come.
    fn see_said(&mut self, monitor: &Monitor, now: bool) {
        if self.started.is_none() || !(now || self.said_at.elapsed() > SAID) {
            return;
        }
        self.said_at = Instant::now();
        let Some(text) = monitor.said().filter(|text| self.said.as_ref() != Some(text)) else { return };
        if self.around.store.report(&self.record.key, &Report::Progress(text.clone())).is_ok() {
            self.said = Some(text);
        }
    }

    fn steer(&mut self, monitor: &Monitor) {
        if self.is_abandoned() {
            return monitor.kill();
        }
        // Before it is looked what is asked for: one that is done now is not to be written again.
        self.see_checkpoint();
        let (mut desired, deadlines, mut asked) = {
            let control = lock(&self.control);
            (control.desired, control.deadlines, control.checkpoint)
        };
        // What is in a machine that others had before is not this job's alone.
        asked &= !self.record.job.spec.reuse;
        if desired == Desired::Run && deadlines.is_late() {
            // The store is out of reach. The monitor lets its machine stand by itself; here others hear of it.
            desired = Desired::Pause(Reason::StoreUnreachable);
        }
        if let Some(limit) = self.record.job.spec.timeout_ms
            && self.progress.running >= Duration::from_millis(limit)
        {
            self.timed_out = true;
        }
        match desired {
            _ if self.timed_out && !matches!(desired, Desired::Cancel) => {
                self.stop(monitor, Reason::TimedOut);
            }
            Desired::Run => {
                self.pause(monitor, None);
                if asked || self.progress.is_due(&self.record.job.spec) {
                    self.write_checkpoint(monitor, false);
                }
            }
            Desired::Pause(reason) => {
                self.pause(monitor, Some(reason));
                if asked {
                    self.write_checkpoint(monitor, false);
                }
            }
            Desired::Return(reason) => self.give_back(monitor, reason),
            Desired::Drop(reason) => self.stop(monitor, reason),
            Desired::Cancel | Desired::Abandon => self.stop(monitor, Reason::Cancelled),
        }
    }

    /// Ends the machine, with a checkpoint before if that is worth it.
    fn give_back(&mut self, monitor: &Monitor, reason: Reason) {
        if self.writing.is_some() {
            return;
        }
        let worth = self.started.is_some()
            && !self.record.job.spec.reuse
            && reason != Reason::Requeued
            && self.unwritten < CHECKPOINT_TRIES
            && self.progress.is_worth_saving();
        if self.stopping_since.is_some() || self.saved || !worth {
            return self.stop(monitor, reason);
        }
        // What it would do from here on would be done again.
        self.pause(monitor, Some(reason));
        if self.paused.is_some() {
            self.write_checkpoint(monitor, true);
        }
    }

    fn stop(&mut self, monitor: &Monitor, reason: Reason) {
        match self.stopping_since {
            None => {
                self.stopping_since = Some(Instant::now());
                // The end that follows says the same.
                let _ = self.around.store.report(&self.record.key, &Report::Stopping { reason });
                self.around.point("stop told");
                monitor.terminate();
            }
            Some(since) if since.elapsed() > TERMINATION => monitor.kill(),
            Some(_) => {}
        }
    }

    /// Brings the machine to stand still or to go on, then tells the store.
    fn pause(&mut self, monitor: &Monitor, wish: Option<Reason>) {
        let now = Instant::now();
        if self.paused.is_some() != wish.is_some() {
            if now < self.pause_at {
                return;
            }
            let patience = lock(&self.control).lease / PAUSE_SHARE;
            match monitor.pause(wish.is_some(), patience) {
                Ok(()) => {
                    self.around.point("paused");
                    self.paused = wish;
                    self.say(wish.map_or("goes on", |_| "stands still"));
                }
                // It has no control socket yet, or ends.
                Err(_) => self.pause_at = now + TICK,
            }
        } else {
            self.paused = wish;
        }
        if self.told != self.paused && self.started.is_some() && now >= self.tell_at {
            let report = match self.paused {
                Some(reason) => Report::Paused { reason, detail: None },
                None => Report::Continued,
            };
            match self.around.store.report(&self.record.key, &report) {
                Ok(()) => {
                    self.around.point("pause told");
                    self.told = self.paused;
                }
                Err(_) => self.tell_at = now + RETRY,
            }
        }
    }

    /// Begins a checkpoint, in a thread of its own.
    fn write_checkpoint(&mut self, monitor: &Monitor, evicting: bool) {
        if self.writing.is_some() || self.started.is_none() || Instant::now() < self.checkpoint_at {
            return;
        }
        let Ok(client) = monitor.control() else { return };
        self.progress.number += 1;
        self.note();
        let number = self.progress.number;
        let running = self.progress.running;
        let before = self.record.from.as_ref().map_or(0, |from| from.work_ms);
        let work_ms = before + u64::try_from(running.as_millis()).unwrap_or(u64::MAX);
        let (sender, result) = channel();
        let (around, key, control) = (self.around.clone(), self.record.key.clone(), self.control.clone());
        // For people only.
        let _ = around.store.report(&key, &Report::Activity(Some(Activity::Checkpointing)));
        let write = move || {
            let given_up = || lock(&control).desired == Desired::Abandon;
            let scratch = around.folder(&key);
            let way = Way { store: around.store.as_ref(), key: &key, scratch: &scratch, given_up: &given_up };
            if let Some(_turn) = around.transfers.begin(&given_up) {
                let mut result = way.write(&client, number, work_ms);
                if let Ok(written) = &mut result
                    && written.checkpoint.cpu_model.as_deref() == Some("host")
                {
                    written.checkpoint.cpu_model.clone_from(&around.host_model);
                }
                // Nobody listens any more when the monitor has ended.
                let _ = sender.send(result);
            }
        };
        match thread::Builder::new().name("checkpoint".to_owned()).spawn(write) {
            Ok(_) => self.writing = Some(Writing { evicting, running, result, written: None }),
            Err(err) => self.checkpoint_failed(format!("no thread for it: {err}")),
        }
    }

    /// Looks after a checkpoint that is being written; tells the store once it and the output up to it are safe.
    fn see_checkpoint(&mut self) {
        let Some(writing) = &mut self.writing else { return };
        if writing.written.is_none() {
            match writing.result.try_recv() {
                Err(TryRecvError::Empty) => return,
                Ok(Ok(written)) => {
                    if writing.evicting {
                        self.progress.checkpoint = self.progress.checkpoint.saturating_sub(written.sent);
                        self.progress.transfer += written.sent;
                    } else {
                        self.progress.checkpoint += written.stood;
                    }
                    writing.written = Some(written);
                }
                Ok(Err(reason)) => return self.checkpoint_failed(reason),
                Err(TryRecvError::Disconnected) => {
                    return self.checkpoint_failed("it was given up".to_owned());
                }
            }
        }
        let Some(written) = &writing.written else { return };
        let (checkpoint, took, running) = (written.checkpoint.clone(), written.took, writing.running);
        if Instant::now() < self.tell_at || !self.output_is_safe(checkpoint.output) {
            return;
        }
        self.around.point("checkpoint written");
        match self.around.store.report(&self.record.key, &Report::Checkpointed(checkpoint.clone())) {
            Ok(()) => {
                self.around.point("checkpoint told");
                self.say(&format!("checkpoint {} written in {took:.1?}", checkpoint.number));
                self.saved |= self.writing.take().is_some_and(|writing| writing.evicting);
                self.progress.saved = running;
                self.progress.took = Some(took);
                self.unwritten = 0;
                self.note();
                let mut control = lock(&self.control);
                control.checkpoint = false;
                control.checkpointed = Some(Instant::now());
            }
            Err(err) if err.is_passing() => self.tell_at = Instant::now() + RETRY,
            Err(err) => self.checkpoint_failed(err.to_string()),
        }
    }

    /// The machine has ended while a checkpoint was written: what is whole is told all the same, for as long as it takes.
    fn finish_writing(&mut self) {
        // Whoever writes it has to be done before the store tidies up after the job.
        if let Some(writing) = &mut self.writing
            && writing.written.is_none()
            && let Ok(Ok(written)) = writing.result.recv_timeout(TERMINATION)
        {
            writing.written = Some(written);
        }
        while self.writing.as_ref().is_some_and(|writing| writing.written.is_some()) && !self.is_abandoned() {
            self.send_output(SEND_AT_ONCE);
            self.see_checkpoint();
            if self.writing.is_some() {
                thread::sleep(TICK);
            }
        }
        self.writing = None;
    }

    fn checkpoint_failed(&mut self, reason: String) {
        self.say(&format!("checkpoint {} could not be written: {reason}", self.progress.number));
        // For people only.
        let _ = self.around.store.report(&self.record.key, &Report::Activity(None));
        self.writing = None;
        self.unwritten += 1;
        self.unwritten_reason = Some(reason);
        self.checkpoint_at = Instant::now() + CHECKPOINT_RETRY * self.unwritten.min(30);
    }

    /// Whether the store has the output up to these offsets, which count over all attempts.
    fn output_is_safe(&self, upto: [u64; 2]) -> bool {
        let Some(sent) = self.sent else { return true };
        let base = self.record.from.as_ref().map_or([0; 2], |from| from.output);
        upto.iter().zip(base).zip(sent).all(|((upto, base), sent)| base + sent >= *upto)
    }

    /// What the end of the process means for the job.
    fn classify(&self, monitor: &Monitor, desired: Desired) -> Ended {
        let result = monitor.result();
        if let Some(ended) = result.as_ref().and_then(|result| files::command_end(&self.record, result)) {
            return ended;
        }
        match desired {
            Desired::Cancel => return ended(Reason::Cancelled, None, None),
            Desired::Return(reason) | Desired::Drop(reason) => {
                let unsaved = self.unwritten_reason.as_ref().filter(|_| self.unwritten > 0);
                let detail = unsaved.map(|why| format!("its state could not be saved: {why}"));
                return ended(reason, detail, None);
            }
            Desired::Run | Desired::Pause(_) | Desired::Abandon => {}
        }
        if let Some(hung) = result.as_ref().filter(|result| result.cause.as_deref() == Some("hung")) {
            return ended(Reason::GuestHung, hung.error.clone(), None);
        }
        if self.timed_out {
            let limit = Duration::from_millis(self.record.job.spec.timeout_ms.unwrap_or_default());
            return ended(Reason::TimedOut, Some(format!("it ran for {limit:?}")), Some(124));
        }
        let detail = result
            .and_then(|result| result.error)
            .or_else(|| monitor.last_words())
            .unwrap_or_else(|| "the monitor ended without a word".to_owned());
        if let Some(template) = self.record.warm.as_ref().filter(|_| self.started.is_none()) {
            self.around.warm.spoil(template);
        }
        let restoring = self.record.from.is_some() && self.started.is_none();
        let reason = if restoring { Reason::RestoreFailed } else { Reason::MachineFailed };
        ended(reason, Some(detail), None)
    }

    /// Gives the store the files that a command has left, for as long as that takes and the lease is ours.
    fn send_files(&mut self, monitor: &Monitor, end: Ended) -> Ended {
        let Some(result) = monitor.result().filter(|result| !result.outputs.is_empty()) else { return end };
        loop {
            let store = self.around.store.as_ref();
            let sent = files::send(store, &result, monitor.folder()).and_then(|files| {
                if files.is_empty() { Ok(()) } else { store.report(&self.record.key, &Report::Files(files)) }
            });
            match sent {
                Ok(()) => return end,
                // Said again with the end.
                Err(StoreError::Fenced(_)) => return end,
                Err(err) if err.is_passing() && !self.is_abandoned() => thread::sleep(RETRY),
                Err(err) => {
                    let detail = format!("its files cannot be put into the queue: {err}");
                    return ended(Reason::MachineFailed, Some(detail), None);
                }
            }
        }
    }

    /// Tells the store of the end, for as long as that takes and the lease is ours.
    fn report_end(&mut self, mut ended: Ended) {
        ended.times = self.progress.times();
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
                Err(err) if err.is_passing() && !self.is_abandoned() => thread::sleep(RETRY),
                // The store says so, or cannot be asked and it was found out here.
                Err(err) if matches!(err, StoreError::Fenced(_)) || self.is_abandoned() => {
                    return self.say(&format!("ended, but its lease is over: {what}"));
                }
                Err(err) => return self.say(&format!("ended ({what}), which cannot be recorded: {err}")),
            }
        }
    }

    /// Sends what a store elsewhere does not have yet, up to so many bytes. False: there may be more.
    fn send_output(&mut self, mut budget: u64) -> bool {
        let Some(sent) = &mut self.sent else { return true };
        let begin = Instant::now();
        if begin < self.send_at {
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
                // Others wait for this thread, and it has a lease to look after.
                if begin.elapsed() > SEND_TIME {
                    return false;
                }
                if self.around.store.write_output(&self.record.key, stream, *sent, &piece).is_err() {
                    self.send_at = Instant::now() + RETRY;
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
            if self.send_at > Instant::now() {
                thread::sleep(RETRY);
            }
        }
    }

    /// Whether the job is somebody else's. A lease that is over by this host's clock is noticed here, too: what keeps the
    /// leases may wait for the store.
    fn is_abandoned(&self) -> bool {
        let mut control = lock(&self.control);
        if control.deadlines.is_past() {
            control.want(Desired::Abandon);
        }
        control.desired == Desired::Abandon
    }

    fn say(&self, what: &str) {
        (self.around.say)(&format!("{}: {what}", self.record.key));
    }
}

pub(super) fn ended(reason: Reason, detail: Option<String>, exit_code: Option<u8>) -> Ended {
    Ended { reason, detail, exit_code, times: Times::default() }
}
