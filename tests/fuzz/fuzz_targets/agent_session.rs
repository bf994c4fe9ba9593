//! The host's half of the agent protocol against a hostile guest. The input is a list of steps: what the guest sends,
//! well formed or not, and what the host's own threads do meanwhile. The guest never gets the host to keep more than the
//! streams' windows, nor to say anything that is not a message.
#![no_main]

use harrier_agent_protocol::{
    AgentMessage, BootTimes, CommandSpec, FailureKind, Frame, HEADER_LEN, Hello, HostMessage, LogLevel,
    Outbox, Status, Stream, Usage, WINDOW, WindowSize,
};
use harrier_jobs::session::{Event, Phase, Session};
use libfuzzer_sys::fuzz_target;

/// The input, as far as it is not used up; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        u64::from(self.byte()) << 8 | u64::from(self.byte())
    }

    fn bytes(&mut self) -> &'a [u8] {
        let (head, rest) = self.0.split_at(usize::from(self.byte()).min(self.0.len()));
        self.0 = rest;
        head
    }

    fn stream(&mut self) -> Stream {
        Stream::BOTH[usize::from(self.byte() & 1)]
    }
}

static BLOCK: [u8; 64 * 1024 - 64] = [b'x'; 64 * 1024 - 64];

/// Gives a message to the session and plays the executor's part. False: the connection is over.
fn say(session: &mut Session, kept: &mut [u64; 2], message: &AgentMessage<'_>) -> bool {
    let mut outbox = Outbox::default();
    message.send(&mut outbox);
    let bytes = sent(&mut outbox);
    frames(&bytes).all(|frame| hear(session, kept, frame))
}

fn sent(outbox: &mut Outbox) -> Vec<u8> {
    let mut bytes = Vec::new();
    outbox.flush(&mut bytes).expect("a vector takes everything");
    assert!(outbox.is_empty());
    bytes
}

/// The frames of our own making; an `Inbox` for each step would take most of the time.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
        let [l0, l1, l2, l3, k0, k1, 0, 0, i0, i1, i2, i3] = *header else {
            panic!("reserved field in {header:?}")
        };
        let (payload, rest) = rest.split_at(u32::from_le_bytes([l0, l1, l2, l3]) as usize);
        bytes = rest;
        Some(Frame { kind: u16::from_le_bytes([k0, k1]), id: u32::from_le_bytes([i0, i1, i2, i3]), payload })
    })
}

fn hear(session: &mut Session, kept: &mut [u64; 2], frame: Frame<'_>) -> bool {
    let before = session.phase();
    match session.receive(frame) {
        Ok(Event::Output(stream, bytes)) => {
            assert_eq!(before, Phase::Running);
            kept[stream.index()] += bytes.len() as u64;
            assert!(kept[stream.index()] <= u64::from(WINDOW), "the guest sent more than its window");
        }
        Ok(Event::Ended { status, .. }) => {
            assert_eq!(session.phase(), Phase::Ended);
            assert!(status.message().is_none_or(|message| !message.contains(char::is_control)));
        }
        Ok(Event::Log(_, line)) => assert!(!line.contains(char::is_control)),
        Ok(_) => {}
        Err(violation) => {
            assert!(!violation.to_string().is_empty());
            return false;
        }
    }
    true
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut session = Session::new(CommandSpec::new(["true"]).encode().expect("a proper command"));
    let mut kept = [0_u64; 2];
    let mut offsets = [0_u64; 2];
    if input.byte() & 1 == 0 {
        for message in [
            AgentMessage::Hello(Hello::OURS),
            AgentMessage::Ready(BootTimes::default()),
            AgentMessage::Started { id: 1, pid: 1, at_ns: 1 },
        ] {
            assert!(say(&mut session, &mut kept, &message));
        }
    }
    while !input.0.is_empty() {
        let step = input.byte();
        let goes_on = match step % 20 {
            0 => {
                let frame =
                    Frame { kind: input.byte().into(), id: u32::from(input.byte()), payload: input.bytes() };
                hear(&mut session, &mut kept, frame)
            }
            1 | 2 => {
                let stream = input.stream();
                let bytes = if step % 20 == 1 {
                    input.bytes()
                } else {
                    &BLOCK[..input.word() as usize % BLOCK.len()]
                };
                let message = AgentMessage::Output { id: 1, stream, offset: offsets[stream.index()], bytes };
                offsets[stream.index()] += bytes.len() as u64;
                say(&mut session, &mut kept, &message)
            }
            3 => {
                say(&mut session, &mut kept, &AgentMessage::StdinCredit { id: 1, bytes: input.word() as u32 })
            }
            4 => say(&mut session, &mut kept, &AgentMessage::StdinClosed { id: 1 }),
            5 => say(
                &mut session,
                &mut kept,
                &AgentMessage::Log { level: LogLevel::Error, text: input.bytes() },
            ),
            6 => {
                let status = Status::Signal(input.byte());
                let message =
                    AgentMessage::Exited { id: 1, status, usage: Usage::default(), at_ns: input.word() };
                say(&mut session, &mut kept, &message)
            }
            7 => say(&mut session, &mut kept, &AgentMessage::Synced),
            8 => say(
                &mut session,
                &mut kept,
                &AgentMessage::Hello(Hello { version: input.word() as u16, features: 1 }),
            ),
            9 => {
                let kind = FailureKind::Other;
                say(
                    &mut session,
                    &mut kept,
                    &AgentMessage::StartFailed { id: 1, kind, message: input.bytes() },
                )
            }
            10 | 11 => {
                let stream = input.stream();
                let count = (input.word() * 16).min(kept[stream.index()]);
                kept[stream.index()] -= count;
                session.disposed(stream, count as usize);
                true
            }
            12 => {
                session.send_stdin(input.bytes());
                true
            }
            13 => {
                session.send_stdin(&BLOCK);
                true
            }
            14 => {
                session.end_stdin();
                true
            }
            15 => {
                session.signal(input.byte());
                true
            }
            16 => {
                session.resize(WindowSize { rows: input.byte().into(), cols: 1 });
                true
            }
            17 => {
                let stream = input.stream();
                session.close_output(stream);
                kept[stream.index()] = 0;
                true
            }
            18 => {
                session.shut_down();
                true
            }
            _ => {
                // The connection takes what there is; all of it are messages that the agent would understand.
                session.send_control();
                let bytes = sent(&mut session.outbox);
                for frame in frames(&bytes) {
                    HostMessage::decode(frame).expect("our own message");
                }
                true
            }
        };
        if !goes_on {
            break;
        }
        assert!(session.sent() < u64::MAX / 2 && session.received(Stream::Stdout) <= offsets[0]);
    }
});
