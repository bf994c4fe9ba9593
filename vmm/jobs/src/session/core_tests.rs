use harrier_agent_protocol::flow::Position;
use harrier_agent_protocol::{CommandSpec, Inbox, Kept, WINDOW};

use super::*;

fn frame_of(message: &AgentMessage<'_>) -> Vec<u8> {
    let mut outbox = Outbox::default();
    message.send(&mut outbox);
    let mut bytes = Vec::new();
    outbox.flush(&mut bytes).unwrap();
    bytes
}

/// Gives a message to a session; output is copied out of the event.
fn say(session: &mut Core, message: &AgentMessage<'_>) -> Result<String, Violation> {
    let bytes = frame_of(message);
    let mut inbox = Inbox::default();
    let mut source = bytes.as_slice();
    loop {
        if let Some(frame) = inbox.next_frame()? {
            return session.receive(frame).map(|event| format!("{event:?}"));
        }
        assert!(inbox.fill(&mut source).unwrap() > 0);
    }
}

fn new() -> Core {
    let mut session = Core::default();
    session.connect();
    session
}

fn greet(session: &mut Core, ready: Ready) -> Result<String, Violation> {
    say(session, &AgentMessage::Hello(Hello::OURS))?;
    say(session, &AgentMessage::Ready(ready))
}

/// With command 1 running.
fn running() -> Core {
    let mut session = new();
    session.run(1, CommandSpec::new(["true"]).encode().unwrap());
    greet(&mut session, Ready::default()).unwrap();
    say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).unwrap();
    assert_eq!(session.phase(1), Some(Phase::Running));
    session
}

/// What waits to be sent, without data.
fn sent(session: &mut Core) -> Vec<HostMessage<'static>> {
    session.pump();
    let mut bytes = Vec::new();
    session.outbox.flush(&mut bytes).unwrap();
    let mut inbox = Inbox::default();
    let mut source = bytes.as_slice();
    let mut messages = Vec::new();
    while inbox.fill(&mut source).unwrap() > 0 {
        while let Some(frame) = inbox.next_frame().unwrap() {
            messages.push(match HostMessage::decode(frame).unwrap() {
                HostMessage::Stdin { id, offset, .. } => HostMessage::Stdin { id, offset, bytes: b"" },
                HostMessage::Run { id, .. } => HostMessage::Run { id, bytes: b"" },
                HostMessage::RunPart { id, .. } => HostMessage::RunPart { id, bytes: b"" },
                HostMessage::Hello(hello) => HostMessage::Hello(hello),
                HostMessage::Attach(attach) => HostMessage::Attach(attach),
                HostMessage::Signal { id, sequence, number } => HostMessage::Signal { id, sequence, number },
                HostMessage::Resize { id, size } => HostMessage::Resize { id, size },
                HostMessage::CloseOutput { id, stream } => HostMessage::CloseOutput { id, stream },
                HostMessage::Ack { id, stream, offset } => HostMessage::Ack { id, stream, offset },
                HostMessage::StdinClose { id } => HostMessage::StdinClose { id },
                HostMessage::Release { id } => HostMessage::Release { id },
                HostMessage::Put { id, spec } => HostMessage::Put { id, spec },
                HostMessage::Get { id, spec } => HostMessage::Get { id, spec },
                HostMessage::Quiesce { sequence, deadline_ms } => {
                    HostMessage::Quiesce { sequence, deadline_ms }
                }
                HostMessage::Thaw => HostMessage::Thaw,
                HostMessage::Shutdown => HostMessage::Shutdown,
            });
        }
    }
    messages
}

fn attach(commands: Vec<Attached>) -> HostMessage<'static> {
    HostMessage::Attach(Attach { commands, ..Attach::default() })
}

#[test]
fn nothing_is_taken_before_the_hello_and_no_other_version() {
    let mut session = new();
    let found = say(&mut session, &AgentMessage::Synced);
    assert_eq!(found, Err(Violation::Unexpected { message: "first", link: Link::Silent, phase: None }));
    let hello = Hello { version: VERSION + 1, ..Hello::OURS };
    assert_eq!(say(&mut session, &AgentMessage::Hello(hello)), Err(Violation::Version(VERSION + 1)));
}

#[test]
fn a_message_of_another_command_or_at_the_wrong_time_is_a_violation() {
    let usage = Usage::default();
    let cause = Cause::Itself;
    let exited = |id| AgentMessage::Exited { id, status: WireStatus::Code(0), cause, usage, at_ns: 0 };
    let wrong: [AgentMessage<'_>; 7] = [
        AgentMessage::Hello(Hello::OURS),
        AgentMessage::Ready(Ready::default()),
        AgentMessage::Started { id: 1, pid: 1, at_ns: 0 },
        AgentMessage::Failed { id: 1, kind: FailureKind::Other, message: b"" },
        AgentMessage::Output { id: 2, stream: Stream::Stdout, offset: 0, bytes: b"x" },
        AgentMessage::Synced,
        exited(2),
    ];
    for message in wrong {
        let found = say(&mut running(), &message);
        assert!(matches!(found, Err(Violation::Unexpected { .. })), "{message:?}: {found:?}");
    }
    let mut session = running();
    say(&mut session, &exited(1)).unwrap();
    assert!(matches!(say(&mut session, &exited(1)), Err(Violation::Unexpected { .. })), "a second end");
}

#[test]
fn a_guest_cannot_send_more_than_the_window() {
    let mut session = running();
    let data = vec![0; DATA_MAX];
    let mut offset = 0;
    let refused = loop {
        let message = AgentMessage::Output { id: 1, stream: Stream::Stderr, offset, bytes: &data };
        match say(&mut session, &message) {
            Ok(_) => offset += data.len() as u64,
            Err(violation) => break violation,
        }
    };
    assert!(matches!(refused, Violation::Flow(FlowError::Overrun { .. })), "{refused:?}");
    assert!(offset <= u64::from(WINDOW));
}

#[test]
fn credit_for_stdin_that_was_never_sent_is_a_violation() {
    let mut session = running();
    session.give_stdin(1, b"abc");
    sent(&mut session);
    let found = say(&mut session, &AgentMessage::StdinAck { id: 1, offset: 4 });
    assert_eq!(found, Err(Violation::Flow(FlowError::Ack { found: 4, from: 0, to: 3 })));
}

#[test]
fn signals_and_sizes_wait_for_the_command_and_each_goes_once() {
    let mut session = new();
    session.run(1, CommandSpec::new(["true"]).encode().unwrap());
    for number in [2, 15, 2, 0, 65, 255] {
        session.signal(1, number);
    }
    session.resize(1, WindowSize { rows: 1, cols: 1 });
    session.resize(1, WindowSize { rows: 2, cols: 3 });
    greet(&mut session, Ready::default()).unwrap();
    assert_eq!(
        sent(&mut session),
        [HostMessage::Hello(Hello::OURS), attach(vec![]), HostMessage::Run { id: 1, bytes: b"" }]
    );
    say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).unwrap();
    let signals = [
        HostMessage::Signal { id: 1, sequence: 1, number: 2 },
        HostMessage::Signal { id: 1, sequence: 2, number: 15 },
    ];
    let size = HostMessage::Resize { id: 1, size: WindowSize { rows: 2, cols: 3 } };
    assert_eq!(sent(&mut session), [std::slice::from_ref(&size), &signals].concat());
    assert_eq!(sent(&mut session), []);
    // The second did not arrive.
    session.connect();
    let status = CommandStatus { id: 1, signal: 1, ..CommandStatus::default() };
    greet(&mut session, Ready { commands: vec![status], ..Ready::default() }).unwrap();
    let expected = [
        HostMessage::Hello(Hello::OURS),
        attach(vec![Attached { id: 1, ..Attached::default() }]),
        signals[1].clone(),
        size,
    ];
    assert_eq!(sent(&mut session), expected);
}

/// The agent's answer on a second connection, with command 1 and its stdout kept from one offset to another.
fn with_output(from: u64, to: u64) -> Ready {
    let outputs = [Kept { from, to }, Kept::default()];
    Ready { commands: vec![CommandStatus { id: 1, outputs, ..CommandStatus::default() }], ..Ready::default() }
}

#[test]
fn a_new_connection_goes_on_where_the_last_one_ended() {
    let mut session = running();
    session.give_stdin(1, b"abcdef");
    session.end_stdin(1);
    let output = |offset, bytes| AgentMessage::Output { id: 1, stream: Stream::Stdout, offset, bytes };
    say(&mut session, &output(0, b"0123")).unwrap();
    session.disposed(1, Stream::Stdout, 1);
    session.close_output(1, Stream::Stderr);
    sent(&mut session);
    session.disconnect();
    assert_eq!(sent(&mut session), []);
    session.disposed(1, Stream::Stdout, 1);
    session.connect();
    let mut ready = with_output(0, 9);
    ready.commands[0].stdin = Position { received: 4, disposed: 2 };
    greet(&mut session, ready).unwrap();
    let position = Position { received: 4, disposed: 2 };
    assert_eq!(
        sent(&mut session),
        [
            HostMessage::Hello(Hello::OURS),
            attach(vec![Attached { id: 1, outputs: [position, Position::default()] }]),
            HostMessage::CloseOutput { id: 1, stream: Stream::Stderr },
            HostMessage::Stdin { id: 1, offset: 4, bytes: b"" },
            HostMessage::StdinClose { id: 1 },
        ]
    );
    say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).unwrap();
    assert!(say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).is_err(), "once is enough");
    let expected = FlowError::Offset { found: 0, expected: 4 };
    assert_eq!(say(&mut session, &output(0, b"0123")), Err(Violation::Flow(expected)));
    assert!(say(&mut session, &output(4, b"45678")).unwrap().starts_with("Output"));
    assert_eq!(session.received(1, Stream::Stdout), 9);
}

#[test]
fn an_agent_that_no_longer_has_the_output_is_a_violation() {
    let mut session = running();
    for (from, to) in [(1, 9), (1, 1)] {
        session.connect();
        let found = greet(&mut session, with_output(from, to));
        assert_eq!(found, Err(Violation::Flow(FlowError::Resume { found: 0, from, to })));
    }
}

#[test]
fn a_command_that_the_agent_never_got_is_sent_again_and_one_of_an_earlier_boot_is_lost() {
    let spec = || CommandSpec::new(["true"]).encode().unwrap();
    let mut session = running();
    session.run(2, spec());
    session.disconnect();
    session.run(3, spec());
    session.connect();
    sent(&mut session);
    greet(&mut session, with_output(0, 0)).unwrap();
    let run = |id| HostMessage::Run { id, bytes: b"" as &[u8] };
    let resumed = || attach(vec![Attached { id: 1, ..Attached::default() }]);
    assert_eq!(sent(&mut session), [resumed(), run(2), run(3)]);
    // Another boot: what may have run is not run again; what has the same number is another command.
    session.run(4, spec());
    session.disconnect();
    session.run(5, spec());
    session.connect();
    sent(&mut session);
    let ready = Ready { boot_id: [1; 16], ..with_output(0, 0) };
    let event = greet(&mut session, ready).unwrap();
    assert!(event.contains("lost: [1, 2, 3, 4]"), "{event}");
    assert_eq!(sent(&mut session), [attach(vec![]), run(5)]);
}

#[test]
fn a_new_host_does_not_take_an_earlier_ones_command_for_its_own() {
    let mut session = new();
    session.run(1, CommandSpec::new(["true"]).encode().unwrap());
    greet(&mut session, with_output(5, 9)).unwrap();
    let expected = [HostMessage::Hello(Hello::OURS), attach(vec![]), HostMessage::Run { id: 1, bytes: b"" }];
    assert_eq!(sent(&mut session), expected);
}

#[test]
fn what_a_command_that_was_given_up_still_says_is_ignored() {
    let mut session = running();
    session.remove(1);
    let message = AgentMessage::Output { id: 1, stream: Stream::Stdout, offset: 7, bytes: b"x" };
    assert_eq!(say(&mut session, &message).as_deref(), Ok("Nothing"));
    session.connect();
    greet(&mut session, with_output(0, 8)).unwrap();
    assert!(matches!(say(&mut session, &message), Err(Violation::Unexpected { .. })), "it was not attached");
}

#[test]
fn output_that_nobody_reads_is_dropped_and_its_credit_given_back() {
    let mut session = running();
    sent(&mut session);
    session.close_output(1, Stream::Stdout);
    assert_eq!(sent(&mut session), [HostMessage::CloseOutput { id: 1, stream: Stream::Stdout }]);
    let data = vec![0; DATA_MAX];
    for index in 0..64 {
        let offset = index * DATA_MAX as u64;
        let message = AgentMessage::Output { id: 1, stream: Stream::Stdout, offset, bytes: &data };
        assert_eq!(say(&mut session, &message).as_deref(), Ok("Nothing"));
    }
}

#[test]
fn a_guests_text_cannot_steer_the_terminal() {
    let mut session = running();
    let found =
        say(&mut session, &AgentMessage::Log { level: LogLevel::Warn, text: b"a\x1b[2Jb\nc\xff\r\n" })
            .unwrap();
    assert_eq!(found, "Log(Warn, \"a\u{fffd}[2Jb\u{fffd}c\u{fffd}\")");
}
