use super::*;
use crate::flow::Position;
use crate::{GetSpec, Inbox, MAX_COMMANDS, PutSpec, Root, Transferred, User, WindowSize};

fn host_messages() -> Vec<HostMessage<'static>> {
    vec![
        HostMessage::Hello(Hello { version: 7, features: 0x55 }),
        HostMessage::RunPart { id: 3, bytes: b"half" },
        HostMessage::Run { id: 3, bytes: b"rest" },
        HostMessage::Stdin { id: 3, offset: 1 << 40, bytes: b"\0\xff" },
        HostMessage::StdinClose { id: 3 },
        HostMessage::Attach(Attach::default()),
        HostMessage::Attach(Attach {
            role: Role::Forked,
            generation: 1,
            clone_index: 2,
            linger_ms: 3,
            heartbeat_ms: 9,
            wall_clock_ns: 4,
            entropy: [5; 32],
            commands: vec![Attached { id: 6, outputs: [Position { received: 8, disposed: 7 }; 2] }; 3],
        }),
        HostMessage::Ack { id: 3, stream: Stream::Stderr, offset: 99 },
        HostMessage::CloseOutput { id: 3, stream: Stream::Stdout },
        HostMessage::Signal { id: 3, sequence: 8, number: 15 },
        HostMessage::Release { id: 3 },
        HostMessage::Put {
            id: 3,
            spec: PutSpec {
                path: b"/in".to_vec(),
                mode: 0o640,
                owner: Some(User::Name(b"nobody".to_vec())),
                root: Root::Disk { serial: b"d".to_vec() },
                bytes: 1 << 40,
                sha256: [7; 32],
            },
        },
        HostMessage::Get {
            id: 3,
            spec: GetSpec { path: b"/out".to_vec(), root: Root::Initramfs, max_bytes: 9 },
        },
        HostMessage::Quiesce { sequence: 4, deadline_ms: 5 },
        HostMessage::Thaw,
        HostMessage::Resize { id: 3, size: WindowSize { rows: 1, cols: 2 } },
        HostMessage::Shutdown,
    ]
}

fn agent_messages() -> Vec<AgentMessage<'static>> {
    vec![
        AgentMessage::Hello(Hello::OURS),
        AgentMessage::Ready(Ready {
            boot_id: [1; 16],
            reason: Reason::Lost,
            times: BootTimes { agent_start_ns: 1, mounted_ns: 2, connected_ns: 3 },
            commands: vec![
                CommandStatus {
                    id: 9,
                    stdin: Position { received: 2, disposed: 1 },
                    signal: 3,
                    outputs: [Kept { from: 4, to: 5 }; 2],
                };
                MAX_COMMANDS
            ],
        }),
        AgentMessage::Started { id: 9, pid: 77, at_ns: 4 },
        AgentMessage::Failed { id: 9, kind: FailureKind::NotExecutable, message: b"no" },
        AgentMessage::Output { id: 9, stream: Stream::Stdout, offset: 5, bytes: b"out" },
        AgentMessage::StdinAck { id: 9, offset: 6 },
        AgentMessage::SignalAck { id: 9, sequence: 7 },
        AgentMessage::StdinClosed { id: 9 },
        AgentMessage::Exited {
            id: 9,
            status: Status::Signal(9),
            cause: Cause::Memory,
            usage: Usage { user_us: 1, system_us: 2, max_rss_kib: 3 },
            at_ns: 8,
        },
        AgentMessage::Exited {
            id: 9,
            status: Status::Code(255),
            cause: Cause::Processes,
            usage: Usage::default(),
            at_ns: 8,
        },
        AgentMessage::Transferred { id: 9, file: Transferred { bytes: 3, sha256: [1; 32], mode: 0o755 } },
        AgentMessage::Heartbeat { at_ns: 5 },
        AgentMessage::Progress { id: 9, text: b"half" },
        AgentMessage::Quiesced { sequence: 4 },
        AgentMessage::Log { level: LogLevel::Debug, text: b"line" },
        AgentMessage::Synced,
    ]
}

/// Gives each frame that `send` appends to `look`.
fn with_frame(send: impl FnOnce(&mut Outbox), mut look: impl FnMut(Frame<'_>)) {
    let mut outbox = Outbox::default();
    send(&mut outbox);
    let mut bytes = Vec::new();
    outbox.flush(&mut bytes).unwrap();
    let mut inbox = Inbox::default();
    let mut source = bytes.as_slice();
    while inbox.fill(&mut source).unwrap() > 0 {
        while let Some(frame) = inbox.next_frame().unwrap() {
            look(frame);
        }
    }
}

#[test]
fn every_message_comes_back_as_it_was_sent() {
    for message in host_messages() {
        with_frame(
            |outbox| message.send(outbox),
            |frame| assert_eq!(HostMessage::decode(frame), Ok(message.clone())),
        );
    }
    for message in agent_messages() {
        with_frame(
            |outbox| message.send(outbox),
            |frame| assert_eq!(AgentMessage::decode(frame), Ok(message.clone())),
        );
    }
}

#[test]
fn truncated_and_prolonged_messages_never_pass_for_the_original() {
    let check = |frame: Frame<'_>, same: &dyn Fn(Frame<'_>) -> bool| {
        let mut longer = frame.payload.to_vec();
        longer.push(0);
        // Later versions may append to a Hello.
        assert_eq!(same(Frame { payload: &longer, ..frame }), frame.kind == 1, "kind {}", frame.kind);
        for length in 0..frame.payload.len() {
            assert!(!same(Frame { payload: &frame.payload[..length], ..frame }), "kind {}", frame.kind);
        }
    };
    for message in host_messages() {
        with_frame(
            |outbox| message.send(outbox),
            |frame| check(frame, &|cut| HostMessage::decode(cut).is_ok_and(|found| found == message)),
        );
    }
    for message in agent_messages() {
        with_frame(
            |outbox| message.send(outbox),
            |frame| check(frame, &|cut| AgentMessage::decode(cut).is_ok_and(|found| found == message)),
        );
    }
}

#[test]
fn a_direction_does_not_take_the_other_ones_messages() {
    for message in agent_messages().iter().skip(1) {
        with_frame(
            |outbox| message.send(outbox),
            |frame| assert_eq!(HostMessage::decode(frame), Err(DecodeError::UnknownKind(frame.kind))),
        );
    }
    for message in host_messages().iter().skip(1) {
        with_frame(
            |outbox| message.send(outbox),
            |frame| assert_eq!(AgentMessage::decode(frame), Err(DecodeError::UnknownKind(frame.kind))),
        );
    }
}

#[test]
fn a_long_specification_travels_in_parts() {
    let encoded: Vec<u8> = (0..3 * MAX_PAYLOAD).map(|index| (index % 251) as u8).collect();
    for length in [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 3 * MAX_PAYLOAD] {
        let mut received = Vec::new();
        let mut ends = 0;
        with_frame(
            |outbox| HostMessage::send_run(4, &encoded[..length], outbox),
            |frame| match HostMessage::decode(frame) {
                Ok(HostMessage::RunPart { id: 4, bytes }) if ends == 0 => received.extend_from_slice(bytes),
                Ok(HostMessage::Run { id: 4, bytes }) if ends == 0 => {
                    received.extend_from_slice(bytes);
                    ends += 1;
                }
                other => panic!("{other:?}"),
            },
        );
        assert_eq!((received.as_slice(), ends), (&encoded[..length], 1));
    }
}

#[test]
fn the_longest_piece_of_output_fits_a_frame_and_a_long_text_is_cut() {
    let data = vec![7; DATA_MAX];
    let message = AgentMessage::Output { id: 1, stream: Stream::Stderr, offset: 0, bytes: &data };
    with_frame(
        |outbox| message.send(outbox),
        |frame| assert_eq!(AgentMessage::decode(frame), Ok(message.clone())),
    );
    let message = AgentMessage::Log { level: LogLevel::Error, text: &data };
    with_frame(
        |outbox| message.send(outbox),
        |frame| {
            let text = &data[..LOG_MAX];
            assert_eq!(AgentMessage::decode(frame), Ok(AgentMessage::Log { level: LogLevel::Error, text }));
        },
    );
}

#[test]
fn a_stranger_is_recognised() {
    let frame = Frame { kind: 1, id: 0, payload: b"HTTP/1.1 200 OK\r\n\r\n" };
    assert_eq!(AgentMessage::decode(frame), Err(DecodeError::WrongMagic));
}

/// Deterministic noise (xorshift64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn noise_decodes_to_an_error_or_to_exactly_itself() {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut understood = 0;
    for _ in 0..200_000 {
        let length = (noise.next() % 64) as usize;
        // Small values often, so that flags, counts and kinds are met.
        let payload: Vec<u8> =
            (0..length)
                .map(|_| {
                    if noise.next().is_multiple_of(3) { (noise.next() % 4) as u8 } else { noise.next() as u8 }
                })
                .collect();
        let frame = Frame { kind: (noise.next() % 48) as u16, id: noise.next() as u32, payload: &payload };
        assert!(decode_any(frame), "{frame:?}");
        understood += u32::from(HostMessage::decode(frame).is_ok() || AgentMessage::decode(frame).is_ok());
    }
    assert!(understood > 1000, "only {understood} frames were understood");
}

#[test]
fn damaged_specifications_decode_to_an_error_or_to_exactly_themselves() {
    let mut noise = Noise(42);
    let spec = CommandSpec {
        env: vec![(b"A".to_vec(), b"B".to_vec())],
        workdir: Some(b"/".to_vec()),
        tty: Some(WindowSize::default()),
        ..CommandSpec::new(["sh", "-c", "true"])
    };
    let original = spec.encode().unwrap();
    for _ in 0..100_000 {
        let mut bytes = original.clone();
        for _ in 0..1 + noise.next() % 3 {
            let at = (noise.next() % bytes.len() as u64) as usize;
            bytes[at] = noise.next() as u8;
        }
        if let Ok(decoded) = CommandSpec::decode(&bytes) {
            assert_eq!(decoded.encode().as_deref(), Ok(bytes.as_slice()));
        }
    }
}

#[test]
fn positions_and_lists_that_cannot_be_are_refused() {
    let damaged = |message: &HostMessage<'_>, at: usize, byte: u8| {
        let mut found = None;
        with_frame(
            |outbox| message.send(outbox),
            |frame| {
                let mut payload = frame.payload.to_vec();
                payload[at] = byte;
                found = HostMessage::decode(Frame { payload: &payload, ..frame }).err();
            },
        );
        found
    };
    let attach = HostMessage::Attach(Attach { commands: vec![Attached::default()], ..Attach::default() });
    let count_at = 1 + 16 + 8 + 32;
    let too_many = MAX_COMMANDS as u8 + 1;
    let refused = |field, value| Some(DecodeError::InvalidField { field, value });
    assert_eq!(damaged(&attach, count_at, too_many), refused("command count", too_many.into()));
    // The first output's `disposed`, beyond its `received`.
    assert_eq!(damaged(&attach, count_at + 1 + 4 + 8, 1), refused("position", 1));
    assert_eq!(damaged(&attach, 0, 9), refused("role", 9));
}
