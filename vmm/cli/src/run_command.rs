//! A command under the guest's agent: streams, terminal, signals, outcome.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use harrier_control::output::Stream;
use harrier_devices::virtio::vsock::VsockListener;
use harrier_engine::{CpuModel, Engine};
use harrier_jobs::session::{Restored, Role};
use harrier_jobs::{
    Command, CommandSpec, ExecuteError, FdOutput, Outcome, ROOT_DISK_SERIAL, Root, Session, SessionOptions,
    Status, Stdin, Stdio, WindowSize,
};
use harrier_machine::snapshot::{self, Identity};
use harrier_machine::{MachineEnd, MachineHandle, RunReport};
use harrier_snapshot::Snapshot;
use signal_hook::consts::SIGINT;

use crate::attempt;
use crate::config::{CommandConfig, RunConfig};
use crate::exit::{Failure, no_stream};
use crate::files::{self, FileTrouble, FilesConfig, Outputs};
use crate::monitor::Monitor;
use crate::report::CapturedOutput;
use crate::run::{Run, ended, guest_exit, interrupted, prepare, start};
use crate::signals::{Interrupter, Interruption};
use crate::terminal;

/// How often the wait for the agent looks whether the machine still runs.
const AGENT_POLL: Duration = Duration::from_millis(100);
/// How long a guest that has dropped its connection may take to end by itself.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the agent may take to write everything back.
const SHUTDOWN: Duration = Duration::from_secs(5);
/// A second Ctrl-C counts while the first is this young.
const SECOND_INTERRUPT: Duration = Duration::from_secs(2);
const CTRL_C: u8 = 3;
/// Rows and columns of a terminal that nobody looks at.
const DETACHED_SIZE: (u16, u16) = (24, 80);

/// Runs the command and answers its exit code.
pub(crate) fn run(
    config: &RunConfig,
    command: &CommandConfig,
    engine: &dyn Engine,
    model: CpuModel,
    run: &mut Run<'_>,
) -> Result<u8, Failure> {
    let mut prepared = prepare(config, engine, model, None, None)?;
    let detached = run.monitor.is_some_and(Monitor::is_detached);
    let tty = config.tty || (terminal::is_interactive() && !config.output.json && !detached);
    // The user's own terminal, as opposed to one that the command has anyway.
    let raw = tty && !detached && !config.output.json && terminal::is_interactive();
    let mut outputs = Outputs::prepare(&config.files)?;
    let stdio = open_streams(config, tty, run)?;
    let mut spec = spec(command, tty);
    config.limits.apply_to(&mut spec);
    let mark = config.attempt.clone().map(|folder| (folder, engine.name()));
    let tell_worker = move || {
        if let Some((folder, engine)) = &mark {
            attempt::mark_started(folder, engine);
        }
    };
    let heartbeat = config.attempt.as_ref().map(|_| attempt::HEARTBEAT);
    let (session, begun) = match &config.restore {
        None => (new_session(heartbeat)?, Begun::Not(stdio)),
        Some(restored) if config.is_warm => {
            let restored_session = restored_session(prepared.machine.identity())?;
            (
                crate::warm::session(restored.chain.snapshot(), &restored_session, heartbeat)?,
                Begun::Not(stdio),
            )
        }
        Some(restored) => {
            let (session, command) =
                resume_session(restored.chain.snapshot(), prepared.machine.identity(), heartbeat, stdio)?;
            (session, Begun::InSnapshot(command, Box::new(tell_worker.clone())))
        }
    };
    if let Some(kept) = prepared.kept.as_mut() {
        kept.keep_session(session.clone());
    }
    if let Some(monitor) = run.monitor {
        monitor.set_session(session.clone(), spec.clone());
    }
    start(config, &mut prepared, run)?;
    let interrupter = run.interrupter.clone();
    if raw {
        terminal::set_raw().map_err(|err| {
            Failure::new(format!("the terminal cannot be set to raw mode ({err}): redirect stdin"))
        })?;
    }
    let handle = prepared.machine.handle();
    let machine = prepared.machine;
    let waiter =
        std::thread::Builder::new().name("machine".to_owned()).spawn(move || machine.wait()).map_err(
            |err| Failure::new(format!("no thread for the machine ({err}): raise the limit of processes")),
        )?;
    let mut watch = None;
    if let (Some(folder), Some(monitor)) = (&config.attempt, run.monitor) {
        let (folder, limit, is_paused) = (folder.clone(), config.hang_limit, monitor.is_paused());
        let (machine, interrupter) = (handle.clone(), interrupter.clone());
        let watched = attempt::watch_guest(folder, limit, session.clone(), machine, is_paused, interrupter);
        watch = Some(watched.map_err(|err| {
            Failure::new(format!("no thread for the guest ({err}): raise the limit of processes"))
        })?);
    }
    let agent = prepared.agent.take();
    if let Some(target) = &config.template {
        let made = crate::warm::make(target, &session, agent, &handle);
        session.machine_ended();
        handle.stop();
        // A machine that fails now has done what it was for.
        drop(waiter.join());
        return made.map(|()| 0);
    }
    let result = connect(&session, begun, &spec, &config.files, agent, &handle, run).map(|command| {
        let command = command?;
        if let Some(monitor) = run.monitor {
            monitor.set_command(command.controller());
        }
        interrupter.set_command(command.controller());
        if config.restore.is_none() || config.is_warm {
            tell_worker();
        }
        let outcome = command.wait()?;
        if !outputs.is_empty() {
            session.set_busy(Some("the command has ended, and its files are being copied"));
            outputs.fetch(&config.files, &session, &spec.root)?;
        }
        // A guest that does not answer is switched off all the same.
        let _ = session.shut_down(SHUTDOWN);
        Ok(outcome)
    });
    session.machine_ended();
    if lost_guest(&result) {
        // A guest that switches itself off loses its connections first; its own end is the better answer.
        handle.wait_for_end(Some(Instant::now() + LAST_WORDS));
    }
    handle.stop();
    let report = waiter.join().map_err(|_| Failure::new("internal error: the machine's thread panicked"))?;
    if let Some(watch) = watch {
        // Nothing in it panics; without its last word the run is what it was.
        let _ = watch.join();
    }
    terminal::restore();
    run.record.ended(&report);
    conclude(config, run, &report, result, outputs, &prepared.console)
}

/// What is to become the machine's command.
enum Begun {
    /// It is to be started, with these streams.
    Not(Stdio),
    /// It runs in the snapshot that the machine is made of; to be called once its agent is there.
    InSnapshot(Command, Box<dyn Fn() + Send>),
}

fn no_session(err: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("no session with the guest's agent ({err}): raise the limit of threads"))
}

fn new_session(heartbeat: Option<Duration>) -> Result<Session, Failure> {
    Session::new(SessionOptions { reconnect: None, heartbeat, ..SessionOptions::default() })
        .map_err(|err| no_session(&err))
}

/// Goes on with the session of a snapshot. Its first command is the machine's; who executed others beside it is not there
/// any more.
fn resume_session(
    snapshot: &Snapshot,
    identity: Identity,
    heartbeat: Option<Duration>,
    stdio: Stdio,
) -> Result<(Session, Command), Failure> {
    let state = crate::snapshots::read_session(snapshot)?;
    let restored = restored_session(identity)?;
    let mut stdio = Some(stdio);
    let nowhere =
        || Stdio { stdin: Stdin::Empty, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let options = SessionOptions { heartbeat, ..SessionOptions::default() };
    let streams = |_: &harrier_jobs::session::CommandState| stdio.take().unwrap_or_else(nowhere);
    let (session, commands) =
        Session::resume(&state, &restored, options, streams).map_err(|err| match err {
            ExecuteError::State(err) => {
                Failure::new(format!("snapshot '{}': {err}", snapshot.path().display()))
            }
            err => no_session(&err),
        })?;
    let mut commands = commands.into_iter();
    let command = commands.next().ok_or_else(|| {
        Failure::new(format!("snapshot '{}': no command runs in it", snapshot.path().display()))
    })?;
    commands.for_each(|other| other.controller().cancel());
    Ok((session, command))
}

/// What the agent of a machine that is made of a snapshot is told.
fn restored_session(identity: Identity) -> Result<Restored, Failure> {
    let mut restored = Restored {
        role: match identity.role {
            snapshot::Role::Booted => Role::Same,
            snapshot::Role::Restored => Role::Restored,
            snapshot::Role::Clone => Role::Forked,
            snapshot::Role::Migrated => Role::Migrated,
        },
        generation: u32::try_from(identity.generation).unwrap_or(u32::MAX),
        clone_index: identity.clone_index,
        ..Restored::default()
    };
    rustix::rand::getrandom(&mut restored.entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(|err| Failure::new(format!("the host gives no random numbers ({err})")))?;
    Ok(restored)
}

/// Brings session and agent together and answers the machine's command; `None` if the machine ends before.
fn connect(
    session: &Session,
    begun: Begun,
    spec: &CommandSpec,
    files: &FilesConfig,
    agent: Option<VsockListener>,
    handle: &MachineHandle,
    run: &mut Run<'_>,
) -> Option<Result<Command, FileTrouble>> {
    let agent = agent?;
    match begun {
        Begun::Not(stdio) => {
            let connection = wait_for_agent(&agent, handle)?;
            run.record.agent_connected = Some(Instant::now());
            session.connect(connection);
            if !files.inputs.is_empty() {
                session.set_busy(Some("the command's files are being copied"));
                if let Err(trouble) = files::copy_inputs(files, session, spec.user.as_ref(), &spec.root) {
                    return Some(Err(trouble));
                }
                session.set_busy(None);
            }
            // Whoever started a detached machine hears of it when the command itself runs.
            if let Some(monitor) = run.monitor
                && !monitor.is_detached()
            {
                monitor.on_running()();
            }
            Some(session.run(spec, stdio).map_err(FileTrouble::Session))
        }
        Begun::InSnapshot(command, on_dial) => {
            // It ran long before anybody asks.
            if let Some(monitor) = run.monitor {
                monitor.on_running()();
            }
            let (session, handle) = (session.clone(), handle.clone());
            let dialled = std::thread::Builder::new().name("agent-dials".to_owned()).spawn(move || {
                while let Some(connection) = wait_for_agent(&agent, &handle) {
                    session.connect(connection);
                    on_dial();
                }
                session.machine_ended();
            });
            let setup = |err| FileTrouble::Session(ExecuteError::Setup(Arc::new(err)));
            Some(dialled.map(|_| command).map_err(setup))
        }
    }
}

fn conclude(
    config: &RunConfig,
    run: &mut Run<'_>,
    report: &RunReport,
    result: Option<Result<Outcome, FileTrouble>>,
    mut outputs: Outputs,
    console: &crate::console::ConsoleTail,
) -> Result<u8, Failure> {
    let error = match result {
        Some(Ok(outcome)) => {
            run.record.outcome(&outcome);
            for (name, error) in [("stdout", &outcome.stdout_error), ("stderr", &outcome.stderr_error)] {
                if let Some(error) = error {
                    return Err(Failure::new(format!(
                        "{name} cannot be written ({error}): give it another place"
                    )));
                }
            }
            let code = outcome.status.exit_code();
            let succeeded = outcome.status == Status::Exited(0);
            match outputs.commit(succeeded, config.output.remarks) {
                Ok(ends) => run.record.outputs(ends),
                Err((ends, failure)) => {
                    run.record.outputs(ends);
                    return Err(failure);
                }
            }
            return match outcome.status.message() {
                Some(message) => Err(Failure { code, message: message.to_owned() }),
                None => Ok(code),
            };
        }
        Some(Err(FileTrouble::Other(failure))) if run.interrupter.interruption().is_none() => {
            return Err(failure);
        }
        Some(Err(FileTrouble::Session(error))) => Some(error),
        Some(Err(FileTrouble::Other(_))) | None => None,
    };
    if let Some(why) = run.interrupter.interruption() {
        run.record.hung = why == Interruption::GuestHung;
        return interrupted(why, config);
    }
    // A job may end its machine itself.
    if let Some(exit) = guest_exit(report) {
        let code = exit?;
        run.record.ended_machine = true;
        outputs.give_up();
        return match outputs.commit(code == 0, config.output.remarks) {
            Ok(ends) => {
                run.record.outputs(ends);
                Ok(code)
            }
            Err((ends, failure)) => {
                run.record.outputs(ends);
                Err(failure)
            }
        };
    }
    match (error, &report.end) {
        // The guest went first, and the lost connection is only what follows.
        (None, end) if *end != MachineEnd::Stopped => Err(ended(report, console)),
        (Some(error), end) if is_lost_guest(&error) && *end != MachineEnd::Stopped => {
            Err(ended(report, console))
        }
        (Some(error), _) => Err(Failure::new(error)),
        (None, _) => Err(Failure::new("the guest's agent did not connect")),
    }
}

/// Whether the connection to the agent ended although nobody here ended it.
fn is_lost_guest(error: &ExecuteError) -> bool {
    matches!(error, ExecuteError::Disconnected(_) | ExecuteError::Connection(_))
}

fn lost_guest(result: &Option<Result<Outcome, FileTrouble>>) -> bool {
    matches!(result, Some(Err(FileTrouble::Session(error))) if is_lost_guest(error))
}

/// Waits until the agent has connected; `None` if the machine ends before.
fn wait_for_agent(agent: &VsockListener, machine: &MachineHandle) -> Option<std::os::unix::net::UnixStream> {
    loop {
        match agent.accept(AGENT_POLL) {
            Ok(connection) => return Some(connection),
            Err(err) if err.kind() == io::ErrorKind::TimedOut => {
                machine.wait_for_end(Some(Instant::now())).is_none().then_some(())?;
            }
            Err(_) => return None,
        }
    }
}

fn spec(command: &CommandConfig, tty: bool) -> CommandSpec {
    let mut spec = CommandSpec::new(command.argv.clone());
    spec.env = command.env.clone();
    spec.workdir = command.workdir.clone();
    if command.rootfs.is_some() {
        spec.root = Root::Disk { serial: ROOT_DISK_SERIAL.as_bytes().to_vec() };
    }
    if tty {
        let (rows, cols) = terminal::size();
        // A detached terminal has no size until somebody attaches.
        let (rows, cols) = if rows == 0 { DETACHED_SIZE } else { (rows, cols) };
        spec.tty = Some(WindowSize { rows, cols });
        if let Some(term) = std::env::var_os("TERM")
            && !spec.env.iter().any(|(name, _)| name == b"TERM")
        {
            spec.env.push((b"TERM".to_vec(), std::os::unix::ffi::OsStringExt::into_vec(term)));
        }
    }
    spec
}

fn open_streams(config: &RunConfig, tty: bool, run: &mut Run<'_>) -> Result<Stdio, Failure> {
    if let Some(monitor) = run.monitor
        && let (Some(stdout), Some(stderr)) = (monitor.output(Stream::Stdout), monitor.output(Stream::Stderr))
    {
        let input = monitor.open_input(config)?.map(std::fs::File::from);
        let stdin = Stdin::Reader(Box::new(StartedInput { started: Box::new(monitor.on_running()), input }));
        return Ok(Stdio { stdin, stdout: Box::new(stdout), stderr: Box::new(stderr) });
    }
    let mut stdio = Stdio::inherit()
        .map_err(|err| Failure::new(format!("the standard streams cannot be used ({err}): redirect them")))?;
    if config.output.json {
        let (stdout, stderr) = (CapturedOutput::default(), CapturedOutput::default());
        stdio.stdout = Box::new(stdout.clone());
        stdio.stderr = Box::new(stderr.clone());
        run.record.captured = Some((stdout, stderr));
    } else if let Some(path) = &config.stderr {
        let file = File::options().append(true).create(true).open(path).map_err(|err| {
            Failure::new(format!(
                "--stderr '{}' cannot be written ({err}): give another file",
                path.display()
            ))
        })?;
        stdio.stderr = Box::new(FdOutput::new(file.into()));
    } else if tty {
        let watch = InterruptWatch::default();
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(no_stream)?;
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(no_stream)?;
        stdio.stdin = Stdin::Reader(Box::new(WatchedInput {
            source: stdin.into(),
            watch: watch.clone(),
            interrupter: run.interrupter.clone(),
        }));
        stdio.stdout = Box::new(WatchedOutput { sink: FdOutput::new(stdout), watch });
    }
    Ok(stdio)
}

/// An input that notices when the command runs: nobody reads before that.
struct StartedInput {
    started: Box<dyn Fn() + Send>,
    /// `None` is empty.
    input: Option<std::fs::File>,
}

impl Read for StartedInput {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (self.started)();
        self.input.as_mut().map_or(Ok(0), |input| input.read(buf))
    }
}

/// Notices in a raw terminal's bytes that the first Ctrl-C did nothing and the second came.
#[derive(Clone, Default)]
struct InterruptWatch {
    /// When the last Ctrl-C was sent that the command has not answered.
    unanswered: Arc<Mutex<Option<Instant>>>,
}

impl InterruptWatch {
    /// True if this input makes the second Ctrl-C.
    fn input(&self, bytes: &[u8], now: Instant) -> bool {
        let mut unanswered = self.unanswered.lock().unwrap_or_else(PoisonError::into_inner);
        let mut second = false;
        for byte in bytes {
            if *byte == CTRL_C {
                second |= unanswered.is_some_and(|at| now.duration_since(at) <= SECOND_INTERRUPT);
                *unanswered = Some(now);
            } else {
                *unanswered = None;
            }
        }
        second
    }

    /// Output that is more than the terminal's echo of Ctrl-C is an answer: a shell shows its prompt.
    fn output(&self, bytes: &[u8]) {
        if bytes.iter().any(|byte| !b"^C\r\n".contains(byte)) {
            *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

struct WatchedInput {
    source: std::fs::File,
    watch: InterruptWatch,
    interrupter: Interrupter,
}

impl Read for WatchedInput {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buf)?;
        if self.watch.input(buf.get(..count).unwrap_or_default(), Instant::now()) {
            self.interrupter.end(Interruption::Signal(SIGINT));
        }
        Ok(count)
    }
}

struct WatchedOutput {
    sink: FdOutput,
    watch: InterruptWatch,
}

impl Write for WatchedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch.output(bytes);
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_interrupts_without_an_answer_end_the_machine() {
        let watch = InterruptWatch::default();
        let now = Instant::now();
        assert!(!watch.input(b"\x03", now));
        watch.output(b"^C");
        assert!(watch.input(b"\x03", now + Duration::from_secs(1)));
    }

    #[test]
    fn an_answer_other_input_or_time_makes_the_next_interrupt_the_first() {
        let watch = InterruptWatch::default();
        let now = Instant::now();
        assert!(!watch.input(b"\x03", now));
        watch.output(b"^C\r\n# ");
        assert!(!watch.input(b"\x03", now));
        assert!(!watch.input(b"x\x03", now));
        assert!(!watch.input(b"\x03", now + Duration::from_secs(3)));
        assert!(watch.input(b"\x03", now + Duration::from_secs(3)));
    }
}
