use harrier_agent_protocol::{CommandSpec, Inbox, WINDOW};

use super::*;

fn frame_of(message: &AgentMessage<'_>) -> Vec<u8> {
    let mut outbox = Outbox::default();
    message.send(&mut outbox);
    let mut bytes = Vec::new();
    outbox.flush(&mut bytes).unwrap();
    bytes
}

/// Gives a message to a session; output is copied out of the event.
fn say(session: &mut Session, message: &AgentMessage<'_>) -> Result<String, Violation> {
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

fn running() -> Session {
    let mut session = Session::new(CommandSpec::new(["true"]).encode().unwrap());
    say(&mut session, &AgentMessage::Hello(Hello::OURS)).unwrap();
    say(&mut session, &AgentMessage::Ready(BootTimes::default())).unwrap();
    say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).unwrap();
    assert_eq!(session.phase(), Phase::Running);
    session
}

fn sent(session: &mut Session) -> Vec<HostMessage<'static>> {
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
                HostMessage::Hello(hello) => HostMessage::Hello(hello),
                HostMessage::Signal { id, number } => HostMessage::Signal { id, number },
                HostMessage::Resize { id, size } => HostMessage::Resize { id, size },
                HostMessage::CloseOutput { id, stream } => HostMessage::CloseOutput { id, stream },
                HostMessage::Credit { id, stream, bytes } => HostMessage::Credit { id, stream, bytes },
                HostMessage::StdinClose { id } => HostMessage::StdinClose { id },
                HostMessage::Shutdown => HostMessage::Shutdown,
                HostMessage::RunPart { id, .. } => HostMessage::RunPart { id, bytes: b"" },
            });
        }
    }
    messages
}

#[test]
fn nothing_is_taken_before_the_hello_and_no_other_version() {
    let mut session = Session::new(Vec::new());
    let found = say(&mut session, &AgentMessage::Synced);
    assert_eq!(found, Err(Violation::Unexpected { message: "first", phase: Phase::Silent }));
    let hello = Hello { version: VERSION + 1, ..Hello::OURS };
    assert_eq!(say(&mut session, &AgentMessage::Hello(hello)), Err(Violation::Version(VERSION + 1)));
}

#[test]
fn a_message_of_another_command_or_at_the_wrong_time_is_a_violation() {
    let usage = Usage::default();
    let exited = |id| AgentMessage::Exited { id, status: WireStatus::Code(0), usage, at_ns: 0 };
    let wrong: [AgentMessage<'_>; 7] = [
        AgentMessage::Hello(Hello::OURS),
        AgentMessage::Ready(BootTimes::default()),
        AgentMessage::Started { id: 1, pid: 1, at_ns: 0 },
        AgentMessage::StartFailed { id: 1, kind: FailureKind::Other, message: b"" },
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
    session.send_stdin(b"abc");
    let found = say(&mut session, &AgentMessage::StdinCredit { id: 1, bytes: 4 });
    assert_eq!(found, Err(Violation::Flow(FlowError::Credit { given: 4, used: 3 })));
}

#[test]
fn signals_and_sizes_wait_for_the_command_and_each_goes_once() {
    let mut session = Session::new(CommandSpec::new(["true"]).encode().unwrap());
    for number in [2, 15, 2, 0, 65, 255] {
        session.signal(number);
    }
    session.resize(WindowSize { rows: 1, cols: 1 });
    session.resize(WindowSize { rows: 2, cols: 3 });
    say(&mut session, &AgentMessage::Hello(Hello::OURS)).unwrap();
    say(&mut session, &AgentMessage::Ready(BootTimes::default())).unwrap();
    assert_eq!(sent(&mut session), [HostMessage::Hello(Hello::OURS), HostMessage::Run { id: 1, bytes: b"" }]);
    say(&mut session, &AgentMessage::Started { id: 1, pid: 2, at_ns: 3 }).unwrap();
    assert_eq!(
        sent(&mut session),
        [
            HostMessage::Resize { id: 1, size: WindowSize { rows: 2, cols: 3 } },
            HostMessage::Signal { id: 1, number: 2 },
            HostMessage::Signal { id: 1, number: 15 },
        ]
    );
}

#[test]
fn output_that_nobody_reads_is_dropped_and_its_credit_given_back() {
    let mut session = running();
    sent(&mut session);
    session.close_output(Stream::Stdout);
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
