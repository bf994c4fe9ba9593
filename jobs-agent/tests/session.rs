//! The real agent as an ordinary process, run by the real executor over a socket: what a user of `harrier run` sees,
//! without a machine.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use harrier_jobs::protocol::{
    AgentMessage, Attach, Attached, Hello, HostMessage, Inbox, LogLevel, Outbox, VERSION,
};
use harrier_jobs::{
    CommandSpec, Controller, ExecuteError, Options, Outcome, Root, Status, Stdin, Stdio, User, WindowSize,
    control, execute,
};

/// Collects output; lets a test wait for a text in it.
#[derive(Clone, Default)]
struct Capture(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Capture {
    fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().clone()
    }

    fn text(&self) -> String {
        String::from_utf8(self.bytes()).unwrap()
    }

    fn wait_for(&self, text: &str) {
        let contains = |bytes: &Vec<u8>| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        let (bytes, changed) = &*self.0;
        let (bytes, timeout) = changed
            .wait_timeout_while(bytes.lock().unwrap(), Duration::from_secs(60), |bytes| !contains(bytes))
            .unwrap();
        assert!(!timeout.timed_out(), "no {text:?} in {:?}", String::from_utf8_lossy(&bytes));
    }
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The agent's process and its connection.
fn start_agent() -> (Child, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = Command::new(env!("CARGO_BIN_EXE_harrier-jobs-agent"))
        .arg("--connect-unix")
        .arg(&path)
        .stdin(ProcessStdio::null())
        .stderr(ProcessStdio::null())
        .spawn()
        .unwrap();
    (agent, listener.accept().unwrap().0)
}

/// A command that runs.
struct Running {
    agent: Child,
    controller: Controller,
    stdout: Capture,
    stderr: Capture,
    executor: JoinHandle<Result<Outcome, ExecuteError>>,
}

struct Ended {
    result: Result<Outcome, ExecuteError>,
    stdout: Capture,
    stderr: Capture,
}

fn start(spec: CommandSpec, stdin: Stdin) -> Running {
    let (stdout, stderr) = (Capture::default(), Capture::default());
    let stdio = Stdio { stdin, stdout: Box::new(stdout.clone()), stderr: Box::new(stderr.clone()) };
    let (agent, controller, executor) = start_with(spec, stdio);
    Running { agent, controller, stdout, stderr, executor }
}

fn start_with(
    spec: CommandSpec,
    stdio: Stdio,
) -> (Child, Controller, JoinHandle<Result<Outcome, ExecuteError>>) {
    let (agent, connection) = start_agent();
    let (controller, receiver) = control().unwrap();
    let executor = thread::spawn(move || execute(connection, &spec, stdio, &Options::default(), receiver));
    (agent, controller, executor)
}

impl Running {
    fn end(mut self) -> Ended {
        let result = self.executor.join().unwrap();
        let code = self.agent.wait().unwrap();
        assert!(code.success() || result.is_err(), "the agent ended with {code}");
        Ended { result, stdout: self.stdout, stderr: self.stderr }
    }
}

impl Ended {
    fn status(&self) -> Status {
        self.result.as_ref().unwrap().status.clone()
    }
}

fn sh(script: &str) -> CommandSpec {
    CommandSpec::new(["sh", "-c", script])
}

fn run(spec: CommandSpec) -> Ended {
    start(spec, Stdin::Empty).end()
}

/// Bytes of all values without a short period.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

#[test]
fn exit_codes_and_signals_come_back() {
    assert_eq!(run(CommandSpec::new(["true"])).status(), Status::Exited(0));
    for code in [1, 3, 125, 255] {
        assert_eq!(run(sh(&format!("exit {code}"))).status(), Status::Exited(code));
    }
    for number in [9, 11, 15] {
        let status = run(sh(&format!("kill -{number} $$"))).status();
        assert_eq!((status.clone(), status.exit_code()), (Status::Signaled(number), 128 + number));
    }
}

#[test]
fn what_cannot_be_started_says_which_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8], mode| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        path.into_os_string().into_encoded_bytes()
    };
    let plain = file("plain", b"#!/bin/sh\n", 0o644);
    let garbage = file("garbage", b"\x7fELF nothing more", 0o755);
    let orphan = file("orphan", b"#!/no/such/interpreter\n", 0o755);
    let folder_path = folder.path().as_os_str().as_encoded_bytes().to_vec();
    let cases: [(Vec<u8>, u8, &str); 7] = [
        (
            b"no-such-program".to_vec(),
            127,
            "\"no-such-program\" is not found in the guest along PATH=/usr/local/sbin:",
        ),
        (b"/no/such/program".to_vec(), 127, "\"/no/such/program\" is not found in the guest"),
        (b"/etc/passwd/program".to_vec(), 127, "not found"),
        (orphan, 127, "the interpreter or loader that it names"),
        (plain, 126, "cannot be executed: Permission denied"),
        (folder_path, 126, "cannot be executed"),
        (garbage, 126, "is not a program for this machine"),
    ];
    for (program, code, text) in cases {
        let ended = run(CommandSpec::new([program.clone()]));
        let status = ended.status();
        assert_eq!(status.exit_code(), code, "{}: {status:?}", String::from_utf8_lossy(&program));
        assert!(status.message().unwrap().contains(text), "{status:?}");
        assert_eq!(ended.stdout.bytes(), b"");
    }
    let spec = CommandSpec { workdir: Some(b"/no/such/folder".to_vec()), ..CommandSpec::new(["true"]) };
    let status = run(spec).status();
    assert_eq!(status.exit_code(), 125);
    assert!(status.message().unwrap().contains("working directory \"/no/such/folder\""), "{status:?}");
    let spec = CommandSpec { root: Root::Disk { serial: b"x".to_vec() }, ..CommandSpec::new(["true"]) };
    assert_eq!(run(spec).status().exit_code(), 125);
}

#[test]
fn a_program_is_searched_along_the_commands_own_path() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("harrier-test-program");
    std::fs::write(&program, "#!/bin/sh\necho found\n").unwrap();
    let path = [b"/nowhere:".as_slice(), folder.path().as_os_str().as_encoded_bytes()].concat();
    let spec = |path: Vec<u8>| CommandSpec {
        env: vec![(b"PATH".to_vec(), path)],
        ..CommandSpec::new(["harrier-test-program"])
    };
    // There, but not executable: the search goes on and that is remembered.
    assert_eq!(run(spec(path.clone())).status().exit_code(), 126);
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ended = run(spec(path));
    assert_eq!((ended.status(), ended.stdout.text().as_str()), (Status::Exited(0), "found\n"));
    assert_eq!(run(spec(b"/nowhere".to_vec())).status().exit_code(), 127);
}

#[test]
fn environment_and_workdir_are_as_asked_and_nothing_else() {
    let spec = CommandSpec {
        env: vec![
            (b"A".to_vec(), b"1".to_vec()),
            (b"A".to_vec(), b"two words".to_vec()),
            (b"E".to_vec(), vec![]),
        ],
        workdir: Some(b"/usr".to_vec()),
        ..CommandSpec::new(["/usr/bin/env"])
    };
    let ended = run(spec.clone());
    let stdout = ended.stdout.text();
    let mut names: Vec<&str> = stdout.lines().collect();
    names.sort_unstable();
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(names[..2], ["A=two words", "E="]);
    assert!(names[2].starts_with("HOME=/") && names[3].starts_with("PATH=/usr/local/sbin:"), "{names:?}");
    let ended = run(CommandSpec { argv: vec![b"pwd".to_vec()], ..spec });
    assert_eq!(ended.stdout.text(), "/usr\n");
}

#[test]
fn long_arguments_and_a_large_environment_arrive_whole() {
    let argument = "x".repeat(100_000);
    let mut spec = CommandSpec::new(["sh", "-c", "printf %s \"$1$V9\" | wc -c", "sh", &argument]);
    spec.env = (0..10).map(|index| (format!("V{index}").into(), "y".repeat(50_000).into())).collect();
    let ended = run(spec);
    assert_eq!((ended.status(), ended.stdout.text().trim()), (Status::Exited(0), "150000"));
    let spec = CommandSpec::new(["true".to_owned(), "x".repeat(200_000)]);
    let status = run(spec).status();
    assert_eq!(status.exit_code(), 125, "one argument longer than Linux takes: {status:?}");
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let ended = run(sh("for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done"));
    assert_eq!(ended.stdout.text(), "out 1\nout 2\nout 3\nout 4\nout 5\n");
    assert_eq!(ended.stderr.text(), "err 1\nerr 2\nerr 3\nerr 4\nerr 5\n");
    let outcome = ended.result.unwrap();
    assert_eq!((outcome.stdout_bytes, outcome.stderr_bytes), (30, 30));
    assert!(outcome.timings.command_ended_ns >= outcome.timings.command_started_ns);
    assert!(outcome.usage.max_rss_kib > 0);
}

#[test]
fn megabytes_of_binary_output_on_both_streams_arrive_unchanged() {
    let data = pattern(8 << 20);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    std::fs::write(&path, &data).unwrap();
    let ended = run(CommandSpec::new([
        "sh",
        "-c",
        "cat \"$1\" & cat \"$1\" >&2; wait",
        "sh",
        path.to_str().unwrap(),
    ]));
    assert_eq!(ended.status(), Status::Exited(0));
    assert!(ended.stdout.bytes() == data, "stdout: {} bytes", ended.stdout.bytes().len());
    assert!(ended.stderr.bytes() == data, "stderr: {} bytes", ended.stderr.bytes().len());
}

#[test]
fn megabytes_of_stdin_come_back_through_cat() {
    let data = pattern(8 << 20);
    let reader = Stdin::Reader(Box::new(io::Cursor::new(data.clone())));
    let ended = start(CommandSpec::new(["cat"]), reader).end();
    assert_eq!(ended.status(), Status::Exited(0));
    assert!(ended.stdout.bytes() == data, "{} bytes", ended.stdout.bytes().len());
    assert_eq!(ended.result.unwrap().stdin_bytes, data.len() as u64);
}

#[test]
fn stdin_is_read_no_further_than_the_command_takes_it() {
    struct Counting(Arc<Mutex<u64>>);
    impl Read for Counting {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            room.fill(b'x');
            *self.0.lock().unwrap() += room.len() as u64;
            Ok(room.len())
        }
    }
    let count = Arc::new(Mutex::new(0));
    let reader = Stdin::Reader(Box::new(Counting(Arc::clone(&count))));
    let running = start(sh("echo ready; sleep 1; head -c 1000000 | wc -c"), reader);
    running.stdout.wait_for("ready");
    let ended = running.end();
    assert_eq!((ended.status(), ended.stdout.text().as_str()), (Status::Exited(0), "ready\n1000000\n"));
    let count = *count.lock().unwrap();
    // What the command took, a window, two pipes, and what was being read.
    assert!((1_000_000..1_000_000 + 3 * 256 * 1024).contains(&count), "{count} bytes read");
}

#[test]
fn a_blocked_stdout_holds_up_neither_stderr_nor_signals() {
    /// A reader that does not read until it is let go.
    struct Gate(Arc<(Mutex<bool>, Condvar)>);
    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (open, changed) = &*self.0;
            drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let stderr = Capture::default();
    let stdio = Stdio {
        stdin: Stdin::Empty,
        stdout: Box::new(Gate(Arc::clone(&gate))),
        stderr: Box::new(stderr.clone()),
    };
    let script =
        "trap 'echo trapped >&2; kill $!; exit 7' TERM; yes & echo begun >&2; while :; do sleep 0.05; done";
    let (mut agent, controller, executor) = start_with(sh(script), stdio);
    stderr.wait_for("begun");
    // Let the pipe and the window fill up.
    thread::sleep(Duration::from_millis(100));
    controller.signal(15);
    stderr.wait_for("trapped");
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(executor.join().unwrap().unwrap().status, Status::Exited(7));
    agent.wait().unwrap();
}

#[test]
fn a_closed_stdout_ends_the_command_like_a_closed_pipe() {
    let (reader, writer) = io::pipe().unwrap();
    let stdout = Box::new(harrier_jobs::FdOutput::new(OwnedFd::from(writer)));
    let stdio = Stdio { stdin: Stdin::Empty, stdout, stderr: Box::new(io::sink()) };
    let (mut agent, _, executor) = start_with(CommandSpec::new(["yes"]), stdio);
    let mut start = [0; 4];
    (&reader).read_exact(&mut start).unwrap();
    drop(reader);
    let outcome = executor.join().unwrap().unwrap();
    assert_eq!(outcome.status, Status::Signaled(13));
    assert!(outcome.stdout_error.is_none());
    agent.wait().unwrap();
}

#[test]
fn a_failing_stdout_is_reported_and_ends_the_command() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let stdout = Box::new(harrier_jobs::FdOutput::new(full.into()));
    let stdio = Stdio { stdin: Stdin::Empty, stdout, stderr: Box::new(io::sink()) };
    let (mut agent, _, executor) = start_with(CommandSpec::new(["yes"]), stdio);
    let outcome = executor.join().unwrap().unwrap();
    assert_eq!(outcome.status, Status::Signaled(13));
    assert_eq!(outcome.stdout_error.unwrap().kind(), io::ErrorKind::StorageFull);
    agent.wait().unwrap();
}

#[test]
fn a_signal_reaches_the_whole_process_group() {
    let running = start(sh("trap 'echo caught; exit 5' INT; sleep 100 & echo ready; wait"), Stdin::Empty);
    running.stdout.wait_for("ready");
    running.controller.signal(2);
    let ended = running.end();
    assert_eq!((ended.status(), ended.stdout.text().as_str()), (Status::Exited(5), "ready\ncaught\n"));
}

#[test]
fn a_command_starts_with_default_signals() {
    let ended = run(sh("grep -E '^Sig(Blk|Ign)' /proc/self/status"));
    let text = ended.stdout.text();
    let masks: Vec<u64> =
        text.lines().filter_map(|line| u64::from_str_radix(line.split('\t').nth(1)?, 16).ok()).collect();
    // 32 and 33 are the C library's own, which it lets nobody set; a test runner may leave them ignored.
    assert_eq!(masks.len(), 2, "{text}");
    assert!(masks.iter().all(|mask| mask & !(3 << 31) == 0), "{text}");
}

#[test]
fn a_background_child_that_holds_stdout_delays_the_end_only_shortly() {
    let ended = run(sh("yes | head -c 60000; sleep 1000 & echo $!"));
    assert_eq!(ended.status(), Status::Exited(0));
    let text = ended.stdout.text();
    assert!(text.len() > 60_000, "output before the end is lost: {} bytes", text.len());
    let Ok(outcome) = &ended.result else { unreachable!() };
    assert!(outcome.timings.host_ended - outcome.timings.host_started < Duration::from_secs(500));
    // The sleeper is the agent's orphan; end it, as the machine's end would.
    let pid = text.lines().last().unwrap();
    Command::new("kill").arg(pid).status().unwrap();
}

#[test]
fn a_terminal_has_its_size_and_follows_changes() {
    let spec = CommandSpec {
        tty: Some(WindowSize { rows: 33, cols: 101 }),
        ..sh("trap 'stty size; exit 4' WINCH; test -t 0 && test -t 1 && test -t 2 && echo $TERM; stty size; \
              while :; do sleep 0.05; done")
    };
    let running = start(spec, Stdin::Reader(Box::new(Blocked)));
    running.stdout.wait_for("33 101");
    running.controller.resize(WindowSize { rows: 10, cols: 20 });
    let ended = running.end();
    assert_eq!(
        (ended.status(), ended.stdout.text().as_str()),
        (Status::Exited(4), "linux\r\n33 101\r\n10 20\r\n")
    );
}

/// A reader that never gives anything, like a terminal that nobody types at.
struct Blocked;

impl Read for Blocked {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        loop {
            thread::park();
        }
    }
}

#[test]
fn a_terminal_turns_control_c_into_a_signal_and_ends_its_input() {
    let (reader, mut writer) = io::pipe().unwrap();
    let tty = Some(WindowSize { rows: 24, cols: 80 });
    let script = "trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.05; done";
    let running = start(CommandSpec { tty, ..sh(script) }, Stdin::Fd(reader.into()));
    running.stdout.wait_for("ready");
    writer.write_all(b"\x03").unwrap();
    assert_eq!(running.end().status(), Status::Exited(6));

    let input = Stdin::Reader(Box::new(io::Cursor::new(b"no newline".to_vec())));
    let ended = start(CommandSpec { tty, ..sh("stty -echo; cat | tr a-z A-Z") }, input).end();
    assert_eq!(ended.status(), Status::Exited(0));
    assert!(ended.stdout.text().ends_with("NO NEWLINE"), "{:?}", ended.stdout.text());
}

#[test]
fn a_user_is_taken_on_where_the_agent_may() {
    let id = Command::new("id").arg("-u").output().unwrap();
    let spec = CommandSpec {
        user: Some(User::Ids { uid: 1234, gid: 99 }),
        ..sh("id -u; id -g; id -G; echo $HOME >/proc/self/fd/1")
    };
    let ended = run(spec);
    if id.stdout == b"0\n" {
        assert_eq!(ended.stdout.text(), "1234\n99\n99\n/\n");
    } else {
        assert_eq!(ended.status().exit_code(), 125);
    }
}

#[test]
fn cancelling_returns_at_once_and_ends_the_agent() {
    let running = start(sh("echo ready; sleep 1000"), Stdin::Reader(Box::new(Blocked)));
    running.stdout.wait_for("ready");
    running.controller.cancel();
    let ended = running.end();
    assert!(matches!(ended.result, Err(ExecuteError::Cancelled)), "{:?}", ended.result);
}

#[test]
fn an_agent_that_is_killed_is_a_clear_error_and_no_hang() {
    let mut running = start(sh("echo $$ ready; sleep 1000"), Stdin::Empty);
    running.stdout.wait_for("ready");
    running.agent.kill().unwrap();
    let ended = running.end();
    let error = ended.result.as_ref().unwrap_err();
    assert_eq!(error.to_string(), "the guest ended while the command ran");
    let text = ended.stdout.text();
    Command::new("kill").args(["-9", text.split(' ').next().unwrap()]).status().unwrap();
}

/// Speaks to the agent frame by frame, as a host that is not the executor's.
struct RawHost {
    agent: Child,
    connection: UnixStream,
    outbox: Outbox,
}

impl RawHost {
    fn new() -> Self {
        let (agent, connection) = start_agent();
        Self { agent, connection, outbox: Outbox::default() }
    }

    /// A host that has no commands there.
    fn attached() -> Self {
        let mut host = Self::new();
        host.say(&HostMessage::Hello(Hello::OURS));
        host.say(&HostMessage::Attach(Attach::default()));
        host
    }

    fn say(&mut self, message: &HostMessage<'_>) {
        message.send(&mut self.outbox);
        self.outbox.flush(&mut self.connection).unwrap();
    }

    /// Gives each message to `look` until that says so, or the agent has gone.
    fn listen(&mut self, mut look: impl FnMut(AgentMessage<'_>) -> bool) {
        let mut inbox = Inbox::default();
        while inbox.fill(&mut self.connection).is_ok_and(|count| count > 0) {
            while let Some(frame) = inbox.next_frame().unwrap() {
                if look(AgentMessage::decode(frame).unwrap()) {
                    return;
                }
            }
        }
    }

    /// The agent must go by itself, and say why.
    fn refused(mut self) -> String {
        let mut reason = String::new();
        self.listen(|message| {
            if let AgentMessage::Log { level: LogLevel::Error, text } = message {
                reason = String::from_utf8_lossy(text).into_owned();
            }
            false
        });
        assert!(!self.agent.wait().unwrap().success());
        reason
    }
}

#[test]
fn an_agent_refuses_a_host_of_another_version_or_none_at_all() {
    let mut host = RawHost::new();
    host.say(&HostMessage::Hello(Hello { version: VERSION + 1, ..Hello::OURS }));
    assert!(host.refused().contains(&format!("speaks version {}", VERSION + 1)));
    let mut host = RawHost::new();
    host.connection.write_all(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n").unwrap();
    assert!(host.refused().contains("the host sent a frame of"));
    let mut host = RawHost::new();
    host.say(&HostMessage::Shutdown);
    assert!(host.refused().contains("hello"));
    let mut host = RawHost::new();
    host.say(&HostMessage::Hello(Hello::OURS));
    host.say(&HostMessage::Run { id: 1, bytes: &CommandSpec::new(["true"]).encode().unwrap() });
    assert!(host.refused().contains("with which commands it goes on"));
    let mut host = RawHost::new();
    host.say(&HostMessage::Hello(Hello::OURS));
    let commands = vec![Attached { id: 3, ..Attached::default() }];
    host.say(&HostMessage::Attach(Attach { commands, ..Attach::default() }));
    assert!(host.refused().contains("command 3, which is not there"));
}

#[test]
fn an_agent_refuses_a_host_that_breaks_a_streams_rules() {
    let mut host = RawHost::attached();
    host.say(&HostMessage::Run { id: 5, bytes: &CommandSpec::new(["sleep", "1000"]).encode().unwrap() });
    host.say(&HostMessage::Stdin { id: 5, offset: 1, bytes: b"x" });
    assert!(host.refused().contains("offset 1, expected 0"));
}

#[test]
fn several_commands_run_at_the_same_time_on_one_connection() {
    let mut host = RawHost::attached();
    // The first ends only when the second has written, through its stdin.
    host.say(&HostMessage::Run { id: 1, bytes: &CommandSpec::new(["head", "-n", "1"]).encode().unwrap() });
    host.say(&HostMessage::Run { id: 2, bytes: &CommandSpec::new(["echo", "from two"]).encode().unwrap() });
    let mut two = Vec::new();
    host.listen(|message| {
        match message {
            AgentMessage::Output { id: 2, bytes, .. } => two.extend_from_slice(bytes),
            AgentMessage::Exited { id, .. } => {
                assert_eq!(id, 2);
                return true;
            }
            _ => {}
        }
        false
    });
    assert_eq!(two, b"from two\n");
    host.say(&HostMessage::Release { id: 2 });
    host.say(&HostMessage::Stdin { id: 1, offset: 0, bytes: &two });
    let mut one = Vec::new();
    host.listen(|message| {
        match message {
            AgentMessage::Output { id: 1, bytes, .. } => one.extend_from_slice(bytes),
            AgentMessage::Exited { id: 1, .. } => return true,
            _ => {}
        }
        false
    });
    assert_eq!(one, b"from two\n");
    host.say(&HostMessage::Shutdown);
    host.listen(|message| message == AgentMessage::Synced);
    drop(host.connection);
    assert!(host.agent.wait().unwrap().success());
}

#[test]
fn a_host_that_hangs_up_takes_its_commands_along() {
    let mut host = RawHost::attached();
    host.say(&HostMessage::Run { id: 1, bytes: &CommandSpec::new(["sleep", "1000"]).encode().unwrap() });
    let mut sleeper = 0;
    host.listen(|message| {
        if let AgentMessage::Started { pid, .. } = message {
            sleeper = pid;
        }
        sleeper != 0
    });
    drop(host.connection);
    assert!(host.agent.wait().unwrap().success());
    // Killed, and reaped by whoever inherits it: at most a zombie is left, as soon as the signal has arrived.
    let is_gone = || {
        let state = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
        state.is_empty() || state.contains(") Z ") || state.contains(") X ")
    };
    assert!((0..1000).any(|_| is_gone() || {
        thread::sleep(Duration::from_millis(10));
        false
    }));
}

#[test]
fn noise_from_the_host_never_crashes_the_agent() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..40 {
        let mut host = RawHost::attached();
        host.say(&HostMessage::Run { id: 1, bytes: &CommandSpec::new(["cat"]).encode().unwrap() });
        for _ in 0..noise() % 30 {
            let length = (noise() % 16) as usize;
            let mut frame = Vec::from((length as u32).to_le_bytes());
            // Mostly messages that it knows; SHUTDOWN, the last kind, seldom.
            frame.extend_from_slice(
                &([2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 11, 10][(noise() % 14 + noise() % 2) as usize]
                    as u16)
                    .to_le_bytes(),
            );
            frame.extend_from_slice(&[0, 0, (noise() % 3) as u8, 0, 0, 0]);
            frame.extend((0..length).map(|_| (noise() % 3) as u8));
            if host.connection.write_all(&frame).is_err() {
                break;
            }
        }
        host.connection.shutdown(std::net::Shutdown::Write).unwrap();
        host.listen(|_| false);
        let code = host.agent.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 1)), "the agent ended with {code:?}");
    }
}

#[test]
fn a_quiet_of_which_nobody_says_the_end_ends_by_itself() {
    let mut host = RawHost::attached();
    host.say(&HostMessage::Quiesce { sequence: 9, deadline_ms: 300 });
    host.say(&HostMessage::Run { id: 1, bytes: &CommandSpec::new(["true"]).encode().unwrap() });
    let begin = std::time::Instant::now();
    let mut is_quiet = false;
    host.listen(|message| match message {
        AgentMessage::Quiesced { sequence: 9 } => {
            is_quiet = true;
            false
        }
        AgentMessage::Started { .. } => true,
        _ => false,
    });
    assert!(is_quiet && begin.elapsed() >= Duration::from_millis(250), "{:?}", begin.elapsed());
    let mut host = RawHost::attached();
    host.say(&HostMessage::Quiesce { sequence: 10, deadline_ms: 60_000 });
    host.say(&HostMessage::Run { id: 2, bytes: &CommandSpec::new(["true"]).encode().unwrap() });
    host.say(&HostMessage::Thaw);
    host.listen(|message| matches!(message, AgentMessage::Exited { id: 2, .. }));
}

/// What did not fit the agent's outbox was once forgotten when a host read everything and had nothing to acknowledge.
#[test]
fn a_host_that_reads_late_gets_everything_that_its_windows_allow() {
    let mut host = RawHost::attached();
    let (commands, window) = (4, 262_144);
    for id in 1..=commands {
        let spec = CommandSpec::new(["head", "-c", &window.to_string(), "/dev/zero"]);
        host.say(&HostMessage::Run { id, bytes: &spec.encode().unwrap() });
    }
    thread::sleep(Duration::from_millis(700));
    let (mut bytes_left, mut ends_left) = (commands as usize * window, commands);
    host.listen(|message| {
        match message {
            AgentMessage::Output { bytes, .. } => bytes_left -= bytes.len(),
            AgentMessage::Exited { .. } => ends_left -= 1,
            _ => {}
        }
        bytes_left == 0 && ends_left == 0
    });
    assert_eq!((bytes_left, ends_left), (0, 0));
}
