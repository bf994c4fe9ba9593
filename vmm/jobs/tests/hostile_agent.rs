//! The executor against agents that die, fall silent or say what they may not: always a clear error, never a hang.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use harrier_jobs::protocol::{
    AgentMessage, BootTimes, Cause, Hello, LogLevel, Outbox, Ready, Status as WireStatus, Stream, Usage,
    VERSION,
};
use harrier_jobs::{CommandSpec, ExecuteError, Options, Outcome, Status, Stdin, Stdio, control, execute};

type Execution = JoinHandle<(Result<Outcome, ExecuteError>, Vec<u8>)>;

/// Starts an execution against the returned end of a connection.
fn start(options: Options) -> (UnixStream, Execution) {
    let (agent, host) = UnixStream::pair().unwrap();
    let (stdout, collector) = std::io::pipe().map(|(reader, writer)| (writer, reader)).unwrap();
    let executor = thread::spawn(move || {
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            let mut collector = collector;
            collector.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let (_controller, receiver) = control().unwrap();
        let stdio =
            Stdio { stdin: Stdin::Empty, stdout: Box::new(stdout), stderr: Box::new(std::io::sink()) };
        let result = execute(host, &CommandSpec::new(["true"]), stdio, &options, receiver);
        (result, reader.join().unwrap())
    });
    (agent, executor)
}

fn bytes_of(messages: &[AgentMessage<'_>]) -> Vec<u8> {
    let mut outbox = Outbox::default();
    messages.iter().for_each(|message| message.send(&mut outbox));
    let mut bytes = Vec::new();
    outbox.flush(&mut bytes).unwrap();
    bytes
}

const EXITED: AgentMessage<'_> = AgentMessage::Exited {
    id: 1,
    status: WireStatus::Code(3),
    cause: Cause::Itself,
    usage: Usage { user_us: 1, system_us: 2, max_rss_kib: 3 },
    at_ns: 20,
};

/// A whole command, as a well-behaved agent reports it.
fn transcript() -> Vec<AgentMessage<'static>> {
    vec![
        AgentMessage::Hello(Hello::OURS),
        AgentMessage::Ready(Ready {
            times: BootTimes { agent_start_ns: 1, mounted_ns: 2, connected_ns: 3 },
            ..Ready::default()
        }),
        AgentMessage::Started { id: 1, pid: 9, at_ns: 10 },
        AgentMessage::Output { id: 1, stream: Stream::Stdout, offset: 0, bytes: b"some output" },
        EXITED,
    ]
}

/// What comes of an agent that says `bytes` and is gone.
fn result_of(bytes: &[u8]) -> (Result<Outcome, ExecuteError>, Vec<u8>) {
    let (mut agent, executor) = start(Options::default());
    // The host may have given up before it has heard everything.
    let _ = agent.write_all(bytes);
    agent.shutdown(Shutdown::Write).unwrap();
    executor.join().unwrap()
}

#[test]
fn an_agent_that_dies_at_any_byte_is_a_clear_error() {
    let bytes = bytes_of(&transcript());
    let output_is_whole = bytes.len() - bytes_of(&[EXITED]).len();
    let started = bytes_of(&transcript()[..3]).len();
    for length in 0..bytes.len() {
        let (result, stdout) = result_of(&bytes[..length]);
        let error = result.unwrap_err().to_string();
        let expected = if length < started { "before the command started" } else { "while the command ran" };
        assert_eq!(error, format!("the guest ended {expected}"), "after {length} bytes");
        // What had arrived is not lost.
        let expected: &[u8] = if length < output_is_whole { b"" } else { b"some output" };
        assert_eq!(stdout, expected, "after {length} bytes");
    }
    let (result, stdout) = result_of(&bytes);
    let outcome = result.unwrap();
    assert_eq!((outcome.status, stdout.as_slice()), (Status::Exited(3), b"some output".as_slice()));
    assert_eq!(outcome.timings.agent_start_ns, 1);
    assert_eq!((outcome.timings.command_started_ns, outcome.timings.command_ended_ns), (10, 20));
    assert_eq!(outcome.usage.max_rss_kib, 3);
}

#[test]
fn an_agent_that_says_why_it_goes_is_quoted() {
    let mut messages = transcript();
    messages.truncate(3);
    messages.push(AgentMessage::Log { level: LogLevel::Error, text: b"out of\x1b memory" });
    let (result, _) = result_of(&bytes_of(&messages));
    assert_eq!(result.unwrap_err().to_string(), "the guest's agent gave up: out of\u{fffd} memory");
}

#[test]
fn an_agent_of_another_version_is_named() {
    let hello = Hello { version: VERSION + 6, ..Hello::OURS };
    let (result, _) = result_of(&bytes_of(&[AgentMessage::Hello(hello)]));
    assert!(matches!(result, Err(ExecuteError::Version(version)) if version == VERSION + 6), "{result:?}");
}

#[test]
fn a_stranger_on_the_connection_is_refused_at_once() {
    let (mut agent, executor) = start(Options::default());
    agent.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n").unwrap();
    // The connection stays open: only what was said ends the execution.
    let (result, _) = executor.join().unwrap();
    assert!(matches!(result, Err(ExecuteError::Protocol(_))), "{result:?}");
    assert_eq!(agent.read(&mut [0; 64]).unwrap_or(0).min(1), 1, "our hello was sent");
}

#[test]
fn an_agent_that_is_silent_is_given_up() {
    let limit = Duration::from_millis(30);
    for said in [vec![], transcript()[..1].to_vec()] {
        let (mut agent, executor) = start(Options { handshake_timeout: limit, ..Options::default() });
        agent.write_all(&bytes_of(&said)).unwrap();
        let (result, _) = executor.join().unwrap();
        assert_eq!(result.unwrap_err().to_string(), "the guest's agent did not answer within 30ms");
    }
}

#[test]
fn an_agent_that_never_finishes_the_shutdown_does_not_cost_the_outcome() {
    let (mut agent, executor) = start(Options { shutdown: Duration::from_millis(30), ..Options::default() });
    agent.write_all(&bytes_of(&transcript())).unwrap();
    let (result, _) = executor.join().unwrap();
    assert_eq!(result.unwrap().status, Status::Exited(3));
}

#[test]
fn noise_after_the_start_is_an_error_and_nothing_worse() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut noise = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200 {
        let mut bytes = bytes_of(&transcript()[..3]);
        for _ in 0..1 + noise() % 4 {
            let length = (noise() % 40) as usize;
            bytes.extend_from_slice(&(length as u32).to_le_bytes());
            bytes.extend_from_slice(&((noise() % 42) as u16).to_le_bytes());
            bytes.extend_from_slice(&[0, 0, (noise() % 2) as u8, 0, 0, 0]);
            bytes.extend((0..length).map(|_| (noise() % 5) as u8));
        }
        let (result, _) = result_of(&bytes);
        // Noise can happen to spell the end of the command.
        if let Err(error) = result {
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
