//! The monitor of a machine that others can find: its place in the registry, its control socket, and the record of its
//! end. [`start_detached`] and [`detached`] are the two sides of `run --detach`.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use harrier_control::api::{
    ApiError, AttachRequest, ExecRequest, KillRequest, MachineInfo, MachineState, SnapshotInfo,
    SnapshotRequest, StopRequest, Usage,
};
use harrier_control::exec::{ExecStreams, Execution, FrameInput};
use harrier_control::output::{OutputLog, OutputWriter, Stream};
use harrier_control::stream::CommandEnd;
use harrier_control::{
    ExitRecord, Machine, MachineName, MachineRecord, NewMachine, Registry, Seat, Server, StartError, unix_ms,
};
use harrier_jobs::{CommandSpec, Controller, Session, Stdin, Stdio, WindowSize};
use harrier_machine::MachineHandle;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGKILL, SIGTERM};

use crate::config::{RunConfig, Workload};
use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::{Command, Flags, MonitorFlags, RunFlags};
use crate::signals::{Interrupter, Interruption};
use crate::snapshots::Snapshots;

/// How long clients may take to hear of the end.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// The registry's view of a run that is to be.
fn new_machine(flags: &RunFlags) -> Result<NewMachine, Failure> {
    // Before there is anything that would be left.
    crate::config::log_limit(flags.files.log_limit.as_deref())?;
    let name: Option<MachineName> = flags.name.as_deref().map(str::parse).transpose()?;
    let command = match &flags.restore {
        Some(folder) => crate::snapshots::command_words(&harrier_snapshot::Snapshot::open(folder)?),
        None => flags.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
    };
    Ok(NewMachine { name, command, detached: flags.detach, auto_remove: flags.rm || !flags.detach })
}

/// Starts this program again as the monitor of a machine and prints the machine's id once it runs.
pub(crate) fn start_detached(flags: RunFlags, registry: &Registry) -> Result<u8, Failure> {
    let new = new_machine(&flags)?;
    let json = flags.json;
    // What can be seen to be wrong from here is said at once.
    match flags.restore.clone() {
        Some(folder) => drop(crate::snapshots::restored_config(flags, &folder, false)?),
        None => drop(RunConfig::from_flags(flags, |name| std::env::var_os(name), false)?),
    }
    let program = std::env::current_exe().map_err(|err| {
        Failure::new(format!("the program's own file cannot be found ({err}): mount /proc"))
    })?;
    let claim = registry.create(new)?;
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let started = claim.start(&program, &args).map_err(|err| match err {
        StartError::Failed { exit_code, message } => Failure { code: exit_code, message },
        other => Failure::new(other),
    })?;
    let id = &started.record.id;
    let line =
        if json { json!({ "id": id, "name": started.record.name }).to_string() } else { id.to_string() };
    writeln!(std::io::stdout(), "{line}")
        .map_err(|err| Failure::new(format!("machine {id} runs, and stdout cannot be written ({err})")))?;
    Ok(0)
}

/// This process is the monitor of a detached machine: sorts its streams and runs what `start_detached` was asked for.
pub(crate) fn detached(flags: MonitorFlags, started: Instant) -> Result<u8, Failure> {
    let hand_over = |err: std::io::Error| {
        Failure::new(format!("a monitor is started by 'harrier run --detach' only ({err})"))
    };
    let stream = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let lock = stream(std::io::stdin().as_fd()).map_err(hand_over)?;
    let starter = stream(std::io::stdout().as_fd()).map_err(hand_over)?;
    let seat = Seat::take(&flags.folder, lock, starter).map_err(hand_over)?;
    leave_streams().map_err(hand_over)?;
    // Of no use to a process that leads its group already.
    let _ = rustix::process::setsid();
    let inner = Flags::try_parse_from(std::iter::once(OsString::from("harrier")).chain(flags.args))
        .map_err(|err| Failure::new(err.kind()))?;
    match inner.command {
        Command::Run(run_flags) => {
            crate::logging::init(run_flags.verbose);
            crate::run::run_seated(*run_flags, started, seat)
        }
        Command::Restore(flags) => {
            crate::logging::init(flags.verbose);
            let folder = crate::snapshots::find(&flags.snapshot)?;
            crate::run::run_seated(flags.into_run(folder), started, seat)
        }
        _ => Err(Failure::new("a monitor runs machines only: use 'harrier run --detach'")),
    }
}

/// Stdin and stdout have been handed over; from now on they are nowhere. Stderr stays the monitor's log.
fn leave_streams() -> std::io::Result<()> {
    let nowhere: OwnedFd = File::options().read(true).write(true).open("/dev/null")?.into();
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    Ok(())
}

/// Takes a place in the registry for a machine that runs in this process and has a name.
pub(crate) fn sit_down(flags: &RunFlags, registry: &Registry) -> Result<Seat, Failure> {
    let claim = registry.create(new_machine(flags)?)?;
    claim.sit_down().map_err(|err| {
        Failure::new(format!(
            "the machine's folder cannot be used ({err}): raise the limit of open files, or make room"
        ))
    })
}

/// The end of a machine that could not begin.
pub(crate) fn never_ran(failure: &Failure) -> ExitRecord {
    ExitRecord {
        exit_code: failure.code,
        error: Some(failure.message.clone()),
        started_ms: None,
        ended_ms: unix_ms(),
    }
}

/// What a machine is, for those who ask.
#[derive(Default)]
struct Description {
    engine: String,
    cpu_model: String,
    cpus: u32,
    memory_bytes: u64,
    has_command: bool,
    tty: bool,
}

/// The running machine as its control socket sees it.
struct Running {
    record: MachineRecord,
    interrupter: Interrupter,
    description: OnceLock<Description>,
    machine: OnceLock<MachineHandle>,
    snapshots: OnceLock<Snapshots>,
    /// Whether the machine is paused; held while that changes.
    paused: Mutex<bool>,
    is_paused: AtomicBool,
    /// Whether its lease makes it stand still, whoever else wants what.
    is_held: AtomicBool,
    is_stopping: AtomicBool,
    /// Milliseconds since 1970, or zero.
    started_ms: AtomicU64,
    /// Until when a machine that was asked to end may take.
    stop_deadline: Mutex<Option<Instant>>,
    output: Option<Arc<OutputLog>>,
    statm: Option<File>,
    /// Where input for the command or console is written, while it is open.
    input: Mutex<Option<Arc<File>>>,
    /// Runs further commands, like the machine's own.
    session: OnceLock<(Session, CommandSpec)>,
    /// Steers the command, once it is there.
    command: OnceLock<Controller>,
    ended: Mutex<Option<CommandEnd>>,
    has_ended: Condvar,
}

/// A run's place in the registry. Dropping it before [`Monitor::finish`] records a failure of the monitor itself.
pub(crate) struct Monitor {
    seat: Arc<Seat>,
    running: Arc<Running>,
    server: OnceLock<Server>,
    finished: bool,
}

impl Monitor {
    /// Of what a detached machine prints, `log_limit` bytes are kept. If it fails, the machine has ended, and nothing of it is
    /// left that would not be left of another.
    pub(crate) fn new(seat: Seat, interrupter: Interrupter, log_limit: u64) -> Result<Self, Failure> {
        let seat = Arc::new(seat);
        Self::in_seat(&seat, interrupter, log_limit).inspect_err(|failure| seat.finish(&never_ran(failure)))
    }

    fn in_seat(seat: &Arc<Seat>, interrupter: Interrupter, log_limit: u64) -> Result<Self, Failure> {
        let record = seat.record().clone();
        let output = if record.detached { Some(OutputLog::create(seat.folder(), log_limit)) } else { None };
        let output = output
            .transpose()
            .map_err(|err| Failure::new(format!("the machine's output cannot be kept ({err}): make room")))?;
        let watched = Arc::clone(seat);
        let told = interrupter.clone();
        let starter = std::thread::Builder::new().name("starter".to_owned()).spawn(move || {
            if watched.watch_starter().is_err() {
                told.end(Interruption::Signal(SIGHUP));
            }
        });
        starter.map_err(|err| {
            Failure::new(format!("no thread for the monitor ({err}): raise the limit of processes"))
        })?;
        let running = Running {
            record,
            interrupter,
            description: OnceLock::new(),
            machine: OnceLock::new(),
            snapshots: OnceLock::new(),
            paused: Mutex::new(false),
            is_paused: AtomicBool::new(false),
            is_held: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            started_ms: AtomicU64::new(0),
            stop_deadline: Mutex::new(None),
            output,
            statm: File::open("/proc/self/statm").ok(),
            input: Mutex::new(None),
            session: OnceLock::new(),
            command: OnceLock::new(),
            ended: Mutex::new(None),
            has_ended: Condvar::new(),
        };
        Ok(Monitor {
            seat: Arc::clone(seat),
            running: Arc::new(running),
            server: OnceLock::new(),
            finished: false,
        })
    }

    /// Whether somebody has asked the machine to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.running.is_stopping.load(Ordering::Acquire)
    }

    /// The machine's name.
    pub(crate) fn name(&self) -> &str {
        self.running.record.name.as_str()
    }

    /// Says at any time whether the machine stands still.
    pub(crate) fn is_paused(&self) -> impl Fn() -> bool + Send + use<> {
        let running = Arc::clone(&self.running);
        move || running.stands()
    }

    /// Lets the machine stand still, or go on, for the sake of its lease; false if there is none, or it ends. Each is said in
    /// turn, by one thread.
    pub(crate) fn holder(&self) -> impl Fn(bool) -> bool + Send + Sync + use<> {
        let running = Arc::clone(&self.running);
        move |hold| {
            let Some(machine) = running.machine.get() else { return false };
            if hold && !machine.pause() {
                return false;
            }
            running.is_held.store(hold, Ordering::Release);
            if !hold {
                machine.resume();
            }
            true
        }
    }

    /// Whether the machine has no terminal and no streams but the log.
    pub(crate) fn is_detached(&self) -> bool {
        self.running.record.detached
    }

    pub(crate) fn describe(&self, config: &RunConfig, engine: &str, cpu_model: &str) {
        // Called once.
        let _ = self.running.description.set(Description {
            engine: engine.to_owned(),
            cpu_model: cpu_model.to_owned(),
            cpus: config.vcpu_count,
            memory_bytes: config.memory_bytes,
            has_command: matches!(config.workload, Workload::Command(_)),
            tty: config.tty,
        });
    }

    /// Where a detached machine's output goes.
    pub(crate) fn output(&self, stream: Stream) -> Option<OutputWriter> {
        self.running.output.as_ref().map(|log| log.writer(stream))
    }

    /// The input of a detached machine: from whoever attaches, or empty.
    pub(crate) fn open_input(&self, config: &RunConfig) -> Result<Option<OwnedFd>, Failure> {
        if !config.interactive {
            return Ok(None);
        }
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|err| {
            Failure::new(format!("no pipe for the input ({err}): raise the limit of open files"))
        })?;
        *self.running.input.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(File::from(writer)));
        Ok(Some(reader))
    }

    /// The session that will run the machine's command, and that command.
    pub(crate) fn set_session(&self, session: Session, spec: CommandSpec) {
        // Called once.
        let _ = self.running.session.set((session, spec));
    }

    /// The command is there, and whoever attaches may steer it.
    pub(crate) fn set_command(&self, command: Controller) {
        // Called once.
        let _ = self.running.command.set(command);
    }

    /// Serves the control socket for a machine that has started.
    pub(crate) fn serve(
        &self,
        machine: MachineHandle,
        snapshots: Snapshots,
        seccomp: bool,
    ) -> Result<(), Failure> {
        let refused = |err| {
            Failure::new(format!(
                "the control socket cannot be served ({err}): raise the limits of processes and open files"
            ))
        };
        // Called once.
        let _ = self.running.snapshots.set(snapshots);
        // Called once.
        let _ = self.running.machine.set(machine);
        let listener = self.seat.listen().map_err(refused)?;
        let on_start: harrier_control::server::OnThreadStart =
            Arc::new(move || if seccomp { crate::sandbox::enter_control() } else { Ok(()) });
        let server = Server::start(listener, Arc::new(Controlled(Arc::clone(&self.running))), on_start)
            .map_err(refused)?;
        let _ = self.server.set(server);
        Ok(())
    }

    /// Something that, once called, tells everybody that the command or kernel runs. The first call counts.
    pub(crate) fn on_running(&self) -> impl Fn() + Send + use<> {
        let (seat, running) = (Arc::clone(&self.seat), Arc::clone(&self.running));
        move || {
            if running.started_ms.compare_exchange(0, unix_ms(), Ordering::AcqRel, Ordering::Acquire).is_ok()
                && seat.ready().is_err()
            {
                running.interrupter.end(Interruption::Signal(SIGHUP));
            }
        }
    }

    /// Records how the run has ended. `ran` says that the command did run, however short.
    pub(crate) fn finish(mut self, result: &Result<u8, Failure>, ran: bool) {
        if ran {
            self.on_running()();
        }
        let (exit_code, error) = match result {
            Ok(code) => (*code, None),
            Err(failure) => (failure.code, Some(failure.message.clone())),
        };
        self.record_end(exit_code, error);
    }

    fn record_end(&mut self, exit_code: u8, error: Option<String>) {
        self.finished = true;
        self.running.is_stopping.store(true, Ordering::Release);
        let started_ms = Some(self.running.started_ms.load(Ordering::Acquire)).filter(|ms| *ms > 0);
        self.seat.finish(&ExitRecord { exit_code, error: error.clone(), started_ms, ended_ms: unix_ms() });
        *self.running.ended.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(CommandEnd { exit_code, error });
        self.running.has_ended.notify_all();
        if let Some(server) = self.server.take() {
            server.drain(LAST_ANSWERS);
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.finished {
            let error = "internal error: the monitor panicked: this is a bug in harrier, please report it";
            self.record_end(HARRIER_FAILED, Some(error.to_owned()));
        }
    }
}

impl Running {
    fn stands(&self) -> bool {
        self.is_paused.load(Ordering::Acquire) || self.is_held.load(Ordering::Acquire)
    }

    fn state(&self) -> MachineState {
        if self.is_stopping.load(Ordering::Acquire) || self.interrupter.interruption().is_some() {
            MachineState::Stopping
        } else if self.stands() {
            MachineState::Paused
        } else if self.started_ms.load(Ordering::Acquire) == 0 {
            MachineState::Starting
        } else {
            MachineState::Running
        }
    }

    fn machine(&self) -> Result<&MachineHandle, ApiError> {
        self.machine.get().ok_or_else(|| ApiError::conflict("the machine has not started yet: try again"))
    }

    fn end(&self, signal: i32) {
        self.is_stopping.store(true, Ordering::Release);
        self.interrupter.end(Interruption::Signal(signal));
    }

    /// Ends the machine at the earliest of the times that were asked for.
    fn end_later(&self, machine: &MachineHandle, timeout: Duration) -> Result<(), ApiError> {
        let Some(deadline) = Instant::now().checked_add(timeout) else { return Ok(()) };
        let mut earliest = self.stop_deadline.lock().unwrap_or_else(PoisonError::into_inner);
        if earliest.is_some_and(|earliest| earliest <= deadline) {
            return Ok(());
        }
        let (machine, interrupter) = (machine.clone(), self.interrupter.clone());
        std::thread::Builder::new()
            .name("stop".to_owned())
            .spawn(move || {
                if machine.wait_for_end(Some(deadline)).is_none() {
                    interrupter.end(Interruption::Signal(SIGKILL));
                }
            })
            .map_err(|err| {
                ApiError::internal(format!("no thread for the timeout ({err}): kill the machine"))
            })?;
        *earliest = Some(deadline);
        Ok(())
    }
}

/// The control socket's view; a type of its own because clients that are attached keep the machine.
struct Controlled(Arc<Running>);

impl Machine for Controlled {
    fn info(&self) -> MachineInfo {
        self.0.info()
    }

    fn pause(&self) -> Result<MachineState, ApiError> {
        self.0.pause()
    }

    fn resume(&self) -> Result<MachineState, ApiError> {
        self.0.resume()
    }

    fn stop(&self, request: StopRequest) -> Result<MachineState, ApiError> {
        self.0.stop(request)
    }

    fn kill(&self, request: KillRequest) -> Result<MachineState, ApiError> {
        self.0.kill(request)
    }

    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotInfo, ApiError> {
        self.0.take_snapshot(request)
    }

    fn exec(&self, request: ExecRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        self.0.exec(request, streams)
    }

    fn attach(&self, request: AttachRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        if request.stdin {
            self.0.take_input(streams.stdin)?;
        }
        Ok(Arc::new(Attached(Arc::clone(&self.0))))
    }
}

impl Running {
    fn info(&self) -> MachineInfo {
        let unknown = Description::default();
        let description = self.description.get().unwrap_or(&unknown);
        MachineInfo {
            id: self.record.id.clone(),
            name: self.record.name.clone(),
            state: self.state(),
            pid: std::process::id(),
            created_ms: self.record.created_ms,
            started_ms: Some(self.started_ms.load(Ordering::Acquire)).filter(|ms| *ms > 0),
            command: self.record.command.clone(),
            tty: description.tty,
            interactive: self.input.lock().unwrap_or_else(PoisonError::into_inner).is_some(),
            engine: description.engine.clone(),
            cpu_model: description.cpu_model.clone(),
            cpus: description.cpus,
            memory_bytes: description.memory_bytes,
            usage: usage(self.statm.as_ref()),
            output: self.output.as_ref().map(|output| output.info()),
        }
    }

    fn pause(&self) -> Result<MachineState, ApiError> {
        let ends = || ApiError::conflict("the machine is ending: it cannot be paused");
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state() == MachineState::Stopping {
            return Err(ends());
        }
        if !*paused {
            if !self.machine()?.pause() {
                return Err(ends());
            }
            *paused = true;
            self.is_paused.store(true, Ordering::Release);
        }
        Ok(self.state())
    }

    fn resume(&self) -> Result<MachineState, ApiError> {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *paused) {
            self.machine()?.resume();
            self.is_paused.store(false, Ordering::Release);
        }
        Ok(self.state())
    }

    fn stop(&self, request: StopRequest) -> Result<MachineState, ApiError> {
        let machine = self.machine()?;
        self.end_later(machine, Duration::from_millis(request.timeout_ms))?;
        self.is_stopping.store(true, Ordering::Release);
        // A machine that stands still hears nothing.
        self.resume()?;
        let has_command = self.description.get().is_none_or(|description| description.has_command);
        if !has_command {
            machine.press_power_button();
        } else if !self.interrupter.signal_command(SIGTERM) {
            self.end(SIGTERM);
        }
        Ok(self.state())
    }

    fn exec(&self, request: ExecRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        let (session, own) = self.session.get().ok_or_else(|| {
            ApiError::conflict("no command runs in it, so there is no agent that could run another")
        })?;
        match self.state() {
            MachineState::Paused => return Err(ApiError::conflict("the machine is paused: resume it first")),
            MachineState::Stopping => return Err(ApiError::conflict("the machine is ending")),
            MachineState::Starting | MachineState::Running => {}
        }
        let spec = exec_spec(own, &request)?;
        let ExecStreams { stdin, stdout, stderr } = streams;
        let stdin = if request.stdin { Stdin::Reader(Box::new(stdin)) } else { Stdin::Empty };
        let stdio = Stdio { stdin, stdout: Box::new(stdout), stderr: Box::new(stderr) };
        let command = session.run(&spec, stdio).map_err(|err| ApiError::bad_request(err.to_string()))?;
        Ok(Arc::new(Executed { controller: command.controller(), command: Mutex::new(Some(command)) }))
    }

    /// Copies a client's input to the command or console until one of the two has had enough.
    fn take_input(self: &Arc<Self>, mut from: FrameInput) -> Result<(), ApiError> {
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let input = input.ok_or_else(|| {
            ApiError::conflict("it takes no input: start it with --interactive, or attach with --no-stdin")
        })?;
        let running = Arc::clone(self);
        let copy = move || {
            let copied = std::io::copy(&mut from, &mut &*input);
            if copied.is_err() || from.ended_by_client() {
                running.input.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
        };
        std::thread::Builder::new()
            .name("attached".to_owned())
            .spawn(copy)
            .map(drop)
            .map_err(|err| ApiError::internal(format!("no thread for the input ({err})")))
    }

    fn kill(&self, request: KillRequest) -> Result<MachineState, ApiError> {
        match request.signal.map(i32::from) {
            None | Some(SIGKILL) => self.end(SIGKILL),
            Some(signal) if !(1..=64).contains(&signal) => {
                return Err(ApiError::bad_request(format!("there is no signal {signal}: give 1 to 64")));
            }
            Some(signal) => {
                if !self.interrupter.signal_command(signal) {
                    let has_command =
                        self.description.get().is_none_or(|description| description.has_command);
                    let why = if has_command { "its command does not run yet" } else { "it has no command" };
                    return Err(ApiError::conflict(format!("the signal reaches nobody: {why}")));
                }
            }
        }
        Ok(self.state())
    }
}

impl Running {
    fn take_snapshot(&self, request: SnapshotRequest) -> Result<SnapshotInfo, ApiError> {
        let snapshots =
            self.snapshots.get().ok_or_else(|| ApiError::conflict("the machine has not started yet"))?;
        let resume = request.resume;
        let mut taken = snapshots.take(request)?;
        if resume {
            self.resume()?;
        }
        taken.state = self.state();
        Ok(taken)
    }
}

/// A further command: root file system, environment and directory are those of the machine's own, unless it says
/// otherwise.
fn exec_spec(own: &CommandSpec, request: &ExecRequest) -> Result<CommandSpec, ApiError> {
    if request.command.first().is_none_or(String::is_empty) {
        return Err(ApiError::bad_request("the command is empty: give a program"));
    }
    let mut spec = CommandSpec::new(request.command.iter().map(|word| word.as_bytes().to_vec()));
    spec.root = own.root.clone();
    spec.env.clone_from(&own.env);
    for text in &request.env {
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
            ApiError::bad_request(format!("'{text}' is no environment variable: write NAME=VALUE"))
        })?;
        spec.env.retain(|(known, _)| known != name.as_bytes());
        spec.env.push((name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    }
    spec.workdir = match &request.workdir {
        Some(folder) if !folder.starts_with('/') => {
            return Err(ApiError::bad_request(format!(
                "directory '{folder}' is not absolute: start it with /"
            )));
        }
        Some(folder) => Some(folder.clone().into_bytes()),
        None => own.workdir.clone(),
    };
    spec.tty = request.tty.map(|size| WindowSize { rows: size.rows, cols: size.cols });
    Ok(spec)
}

/// A further command and its client.
struct Executed {
    controller: Controller,
    command: Mutex<Option<harrier_jobs::Command>>,
}

impl Execution for Executed {
    fn signal(&self, number: u8) {
        self.controller.signal(number);
    }

    fn resize(&self, rows: u16, cols: u16) {
        self.controller.resize(WindowSize { rows, cols });
    }

    fn client_gone(&self) {
        self.controller.cancel();
    }

    fn wait(&self) -> CommandEnd {
        let command = self.command.lock().unwrap_or_else(PoisonError::into_inner).take();
        match command.map(harrier_jobs::Command::wait) {
            Some(Ok(outcome)) => CommandEnd {
                exit_code: outcome.status.exit_code(),
                error: outcome.status.message().map(str::to_owned),
            },
            Some(Err(err)) => CommandEnd { exit_code: HARRIER_FAILED, error: Some(err.to_string()) },
            None => CommandEnd { exit_code: HARRIER_FAILED, error: None },
        }
    }
}

/// A client that is attached to the machine's own command.
struct Attached(Arc<Running>);

impl Execution for Attached {
    fn signal(&self, number: u8) {
        // A machine without a command has nobody who could hear it.
        self.0.interrupter.signal_command(number.into());
    }

    fn resize(&self, rows: u16, cols: u16) {
        if let Some(command) = self.0.command.get() {
            command.resize(WindowSize { rows, cols });
        }
    }

    fn client_gone(&self) {}

    fn wait(&self) -> CommandEnd {
        let mut ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*ended {
                Some(end) => return end.clone(),
                None => ended = self.0.has_ended.wait(ended).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Of this process: `statm` (proc_pid_statm(5)) has the resident pages, a clock the processor time.
fn usage(statm: Option<&File>) -> Usage {
    let mut text = [0; 128];
    let read = statm.and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
    let text = String::from_utf8_lossy(text.get(..read).unwrap_or_default()).into_owned();
    let pages: u64 = text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    Usage {
        resident_bytes: pages * rustix::param::page_size() as u64,
        cpu_ms: seconds * 1000 + nanoseconds / 1_000_000,
    }
}
