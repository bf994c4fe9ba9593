//! The session against agents that this test plays by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use harrier_agent_protocol::{
    AgentMessage, Attach, Cause, CommandStatus, Hello, HostMessage, Inbox, Kept, Outbox, Ready, Role, Status,
    Stream, Usage,
};

use super::*;
use crate::stdio::Stdin;

/// The agent's end of a connection.
struct Agent {
    connection: UnixStream,
    inbox: Inbox,
}

impl Agent {
    fn new(session: &Session) -> Self {
        let (agent, host) = UnixStream::pair().unwrap();
        session.connect(host);
        let mut agent = Self { connection: agent, inbox: Inbox::default() };
        agent.say(&AgentMessage::Hello(Hello::OURS));
        agent
    }

    fn attached(session: &Session, ready: Ready) -> (Self, Attach) {
        let mut agent = Self::new(session);
        agent.say(&AgentMessage::Ready(ready));
        let attach = agent.listen(|message| match message {
            HostMessage::Attach(attach) => Some(attach.clone()),
            _ => None,
        });
        (agent, attach)
    }

    fn say(&mut self, message: &AgentMessage<'_>) {
        let mut outbox = Outbox::default();
        message.send(&mut outbox);
        outbox.flush(&mut self.connection).unwrap();
    }

    /// What `look` finds in the host's messages.
    fn listen<T>(&mut self, mut look: impl FnMut(&HostMessage<'_>) -> Option<T>) -> T {
        loop {
            while let Some(frame) = self.inbox.next_frame().unwrap() {
                if let Some(found) = look(&HostMessage::decode(frame).unwrap()) {
                    return found;
                }
            }
            assert!(self.inbox.fill(&mut self.connection).unwrap() > 0, "the host has hung up");
        }
    }

    fn started(&mut self, id: u32) {
        self.say(&AgentMessage::Started { id, pid: 7, at_ns: 1 });
    }

    fn output(&mut self, id: u32, offset: u64, bytes: &[u8]) {
        self.say(&AgentMessage::Output { id, stream: Stream::Stdout, offset, bytes });
    }

    fn exited(&mut self, id: u32, code: u8) {
        let (status, usage) = (Status::Code(code), Usage::default());
        self.say(&AgentMessage::Exited { id, status, cause: Cause::Itself, usage, at_ns: 2 });
    }
}

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Capture {
    fn wait_for(&self, text: &str) {
        while self.0.lock().unwrap().as_slice() != text.as_bytes() {
            thread::yield_now();
        }
    }
}

fn stdio(stdout: &Capture, stdin: Stdin) -> Stdio {
    Stdio { stdin, stdout: Box::new(stdout.clone()), stderr: Box::new(io::sink()) }
}

fn spec() -> CommandSpec {
    CommandSpec::new(["true"])
}

fn session() -> Session {
    Session::new(SessionOptions::default()).unwrap()
}

/// A command that stands at the agent with its stdout kept from the beginning.
fn status(id: u32, stdout: u64) -> CommandStatus {
    CommandStatus { id, outputs: [Kept { from: 0, to: stdout }, Kept::default()], ..CommandStatus::default() }
}

#[test]
fn commands_share_a_connection_and_each_has_its_own_outcome() {
    let session = session();
    let (one, two) = (Capture::default(), Capture::default());
    let first = session.run(&spec(), stdio(&one, Stdin::Empty)).unwrap();
    let (mut agent, _) = Agent::attached(&session, Ready::default());
    let second = session.run(&spec(), stdio(&two, Stdin::Empty)).unwrap();
    for id in [first.id(), second.id()] {
        agent.listen(|message| {
            matches!(message, HostMessage::Run { id: run, .. } if *run == id).then_some(())
        });
        agent.started(id);
    }
    agent.output(2, 0, b"two");
    agent.output(1, 0, b"one");
    agent.exited(2, 5);
    assert_eq!(second.wait().unwrap().status, crate::Status::Exited(5));
    assert!(first.wait_for(Duration::from_millis(1)).is_none());
    first.controller().signal(15);
    let found = agent.listen(|message| match message {
        HostMessage::Signal { id, number, .. } => Some((*id, *number)),
        _ => None,
    });
    assert_eq!(found, (1, 15));
    agent.exited(1, 0);
    assert_eq!(first.wait().unwrap().stdout_bytes, 3);
    assert_eq!((&*one.0.lock().unwrap(), &*two.0.lock().unwrap()), (&b"one".to_vec(), &b"two".to_vec()));
}

#[test]
fn a_cancelled_command_is_released_and_the_others_go_on() {
    let session = session();
    let first = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let second = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let (mut agent, _) = Agent::attached(&session, Ready::default());
    agent.started(1);
    agent.started(2);
    first.controller().cancel();
    agent.listen(|message| (*message == HostMessage::Release { id: 1 }).then_some(()));
    assert!(matches!(first.wait(), Err(ExecuteError::Cancelled)));
    agent.output(1, 0, b"too late");
    agent.exited(2, 0);
    assert!(second.wait().is_ok());
}

#[test]
fn shutting_down_waits_for_the_agent_and_ends_what_still_runs() {
    let session = session();
    let command = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let (mut agent, _) = Agent::attached(&session, Ready::default());
    agent.started(1);
    let waiter = {
        let session = session.clone();
        thread::spawn(move || session.shut_down(Duration::from_secs(60)))
    };
    agent.listen(|message| (*message == HostMessage::Shutdown).then_some(()));
    agent.say(&AgentMessage::Synced);
    waiter.join().unwrap().unwrap();
    assert!(matches!(command.wait(), Err(ExecuteError::Disconnected("while the command ran"))));
    let late = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    assert!(late.wait().is_err());
    assert!(session.shut_down(Duration::from_secs(60)).is_err());
}

#[test]
fn a_machine_that_has_ended_or_does_not_come_back_fails_its_commands() {
    let session = session();
    let command = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    session.machine_ended();
    assert!(matches!(command.wait(), Err(ExecuteError::Disconnected("before the command started"))));

    let options = SessionOptions { reconnect: Some(Duration::from_millis(20)), ..SessionOptions::default() };
    let session = Session::new(options).unwrap();
    let command = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let (mut agent, _) = Agent::attached(&session, Ready::default());
    agent.started(1);
    // Heard before the connection is gone.
    agent.output(1, 0, b"x");
    drop(agent);
    assert!(matches!(command.wait(), Err(ExecuteError::Disconnected(_))));
}

#[test]
fn a_dropped_session_cancels_its_commands_and_hangs_up() {
    let session = session();
    let command = session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let (mut agent, _) = Agent::attached(&session, Ready::default());
    drop(session);
    assert!(matches!(command.wait(), Err(ExecuteError::Cancelled)));
    let mut rest = Vec::new();
    // What was unread makes the hang-up a reset.
    let _ = agent.connection.read_to_end(&mut rest);
}

#[test]
fn no_more_commands_than_the_agent_takes() {
    let session = session();
    let run = || session.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let commands: Vec<Command> = (0..harrier_agent_protocol::MAX_COMMANDS).map(|_| run()).collect();
    assert!(matches!(run().wait(), Err(ExecuteError::TooMany)));
    drop(session);
    commands.into_iter().for_each(|command| assert!(command.wait().is_err()));
}

#[test]
fn a_saved_session_goes_on_in_another_process_where_its_output_was_written() {
    let original = session();
    let before = Capture::default();
    let (input, mut typist) = UnixStream::pair().unwrap();
    let command = original.run(&spec(), stdio(&before, Stdin::Reader(Box::new(input)))).unwrap();
    let (mut agent, attach) = Agent::attached(&original, Ready { boot_id: [3; 16], ..Ready::default() });
    assert_eq!(attach.role, Role::Same);
    agent.started(1);
    agent.output(1, 0, b"hello ");
    before.wait_for("hello ");
    typist.write_all(b"typed").unwrap();
    agent.listen(|message| matches!(message, HostMessage::Stdin { bytes: b"typed", .. }).then_some(()));
    // The thread may not have told the session yet that it has written.
    let state = loop {
        let state = original.state().unwrap();
        if state.commands[0].stdout.offset == 6 {
            break state;
        }
    };
    let text = serde_json::to_string(&state).unwrap();
    let state: SessionState = serde_json::from_str(&text).unwrap();
    assert_eq!((state.commands[0].stdin.end(), state.next_id), (5, 2));
    drop((original, command, agent));

    let restored = Restored { role: Role::Forked, generation: 1, clone_index: 4, entropy: [9; 32] };
    let after = Capture::default();
    let (session, mut commands) = Session::resume(&state, &restored, SessionOptions::default(), |command| {
        assert_eq!(command.id, 1);
        stdio(&after, Stdin::Empty)
    })
    .unwrap();
    let ready = Ready { boot_id: [3; 16], commands: vec![status(1, 11)], ..Ready::default() };
    let (mut agent, attach) = Agent::attached(&session, ready.clone());
    assert_eq!((attach.role, attach.generation, attach.clone_index), (Role::Forked, 1, 4));
    assert!(attach.wall_clock_ns > 0 && attach.entropy == [9; 32]);
    assert_eq!(attach.commands[0].outputs[0].received, 6);
    agent.started(1);
    // The agent in the snapshot had not got the input yet.
    agent.listen(|message| {
        matches!(message, HostMessage::Stdin { offset: 0, bytes: b"typed", .. }).then_some(())
    });
    agent.listen(|message| (*message == HostMessage::StdinClose { id: 1 }).then_some(()));
    // Lost once more: from here on it is a machine like any other.
    let (mut agent, attach) = Agent::attached(&session, ready);
    assert_eq!((attach.role, attach.entropy, attach.clone_index), (Role::Same, [0; 32], 4));
    agent.started(1);
    agent.output(1, 6, b"world");
    agent.exited(1, 0);
    let outcome = commands.remove(0).wait().unwrap();
    assert_eq!((outcome.stdout_bytes, after.0.lock().unwrap().as_slice()), (11, b"world".as_slice()));
    let next = session.run(&spec(), stdio(&after, Stdin::Empty)).unwrap();
    assert_eq!(next.id(), 2);
}

/// As a harrier with agent protocol 2 wrote it: the agent in that snapshot would not understand this one.
#[test]
fn the_state_of_an_earlier_protocol_is_refused_by_name() {
    let state: SessionState = serde_json::from_str(include_str!("fixtures/session-1.json")).unwrap();
    let stdio = |_: &CommandState| stdio(&Capture::default(), Stdin::Empty);
    let result = Session::resume(&state, &Restored::default(), SessionOptions::default(), stdio);
    let refused = result.map(drop).unwrap_err().to_string();
    assert_eq!(
        refused,
        "the saved session has version 1, this program goes on with version 2 (agent protocol 3): restore it with the \
         harrier that took it"
    );
}

#[test]
fn a_damaged_state_is_refused() {
    let original = session();
    let command = original.run(&spec(), stdio(&Capture::default(), Stdin::Empty)).unwrap();
    let good = original.state().unwrap();
    assert_eq!(good.commands.len(), 1);
    let refused = |change: &dyn Fn(&mut SessionState)| {
        let mut state = good.clone();
        change(&mut state);
        let stdio = |_: &CommandState| stdio(&Capture::default(), Stdin::Empty);
        let result = Session::resume(&state, &Restored::default(), SessionOptions::default(), stdio);
        matches!(result, Err(ExecuteError::State(_)))
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|state| state.version = 9));
    assert!(refused(&|state| state.boot_id = Some("+".repeat(32))));
    assert!(refused(&|state| state.commands.push(state.commands[0].clone())));
    assert!(refused(&|state| state.next_id = 1));
    assert!(refused(&|state| state.commands[0].spec = "%".into()));
    assert!(refused(&|state| state.commands[0].stdin.kept = "A".repeat(1 << 20)));
    assert!(refused(&|state| state.commands[0].signals.push((0, 65))));
    drop((original, command));
}
