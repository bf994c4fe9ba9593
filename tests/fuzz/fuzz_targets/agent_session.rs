//! The host's half of the agent protocol against a hostile guest. The input is a list of steps: what the guest sends,
//! well formed or not, connections that are lost and come back, and what the host's own threads do meanwhile. The guest never
//! gets the host to keep more than the streams' windows, nor to say anything that is not a message.
#![no_main]

use harrier_agent_protocol::flow::Position;
use harrier_agent_protocol::{
    AgentMessage, Cause, CommandSpec, CommandStatus, FailureKind, Frame, GetSpec, HEADER_LEN, Hello,
    HostMessage, Kept, LINGER_FOREVER, LogLevel, Outbox, PutSpec, Ready, Reason, Status, Stream, Transferred,
    Usage, WINDOW, WindowSize,
};
use harrier_jobs::session::core::{Core, Event, Link, Phase};
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

/// What the host has of each command's output and has not disposed of.
#[derive(Default)]
struct Held([[u64; 2]; 3]);

impl Held {
    fn of(&mut self, id: u32, stream: Stream) -> &mut u64 {
        &mut self.0[id as usize % 3][stream.index()]
    }
}

/// Gives a message to the session and plays the driver's part. False: the connection is over.
fn say(core: &mut Core, kept: &mut Held, message: &AgentMessage<'_>) -> bool {
    let mut outbox = Outbox::default();
    message.send(&mut outbox);
    let bytes = sent(&mut outbox);
    frames(&bytes).all(|frame| hear(core, kept, frame))
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

fn hear(core: &mut Core, kept: &mut Held, frame: Frame<'_>) -> bool {
    match core.receive(frame) {
        Ok(Event::Output { id, stream, bytes }) => {
            assert_eq!(core.phase(id), Some(Phase::Running));
            *kept.of(id, stream) += bytes.len() as u64;
            assert!(*kept.of(id, stream) <= u64::from(WINDOW), "the guest sent more than its window");
        }
        Ok(Event::Ended { id, status, .. }) => {
            assert_eq!(core.phase(id), Some(Phase::Ended));
            assert!(status.message().is_none_or(|message| !message.contains(char::is_control)));
        }
        Ok(Event::Ready { lost, .. }) => {
            for id in lost {
                assert_eq!(core.phase(id), None);
                kept.0[id as usize % 3] = [0; 2];
            }
        }
        Ok(Event::StdinRoom { bytes, .. }) => assert!(bytes <= WINDOW as usize),
        Ok(Event::Progress { id, text }) => {
            assert_eq!(core.phase(id), Some(Phase::Running));
            assert!(!text.contains(char::is_control));
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

/// A new connection whose agent says what it has; the bytes that it claims may be right or wrong.
fn connect(core: &mut Core, kept: &mut Held, input: &mut Input<'_>) -> bool {
    core.connect();
    let commands = (1..=input.byte() as u32 % 3)
        .map(|id| {
            let received = u64::from(input.byte()) * 97;
            let outputs = Stream::BOTH.map(|stream| {
                let to = core.received(id, stream) + u64::from(input.byte() & 3);
                Kept { from: to.saturating_sub(u64::from(input.byte()) * 1024), to }
            });
            let stdin = if input.byte() & 1 == 0 {
                Position { received: core.given(id), disposed: core.given(id) }
            } else {
                Position { received, disposed: received / 2 }
            };
            CommandStatus { id, stdin, signal: input.byte().into(), outputs }
        })
        .collect();
    let boot_id = [input.byte() & 1; 16];
    let ready = Ready { boot_id, reason: Reason::Lost, commands, ..Ready::default() };
    say(core, kept, &AgentMessage::Hello(Hello::OURS)) && say(core, kept, &AgentMessage::Ready(ready))
}

/// The connection takes what there is; all of it are messages that the agent would understand.
fn take(core: &mut Core) {
    core.pump();
    let bytes = sent(&mut core.outbox);
    for frame in frames(&bytes) {
        HostMessage::decode(frame).expect("our own message");
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut core = Core::new(LINGER_FOREVER);
    let mut kept = Held::default();
    let mut offsets = [[0_u64; 2]; 3];
    let spec = CommandSpec::new(["true"]).encode().expect("a proper command");
    core.run(1, spec.clone());
    core.connect();
    if input.byte() & 1 == 0 {
        for message in [
            AgentMessage::Hello(Hello::OURS),
            AgentMessage::Ready(Ready::default()),
            AgentMessage::Started { id: 1, pid: 1, at_ns: 1 },
        ] {
            assert!(say(&mut core, &mut kept, &message));
        }
    }
    while !input.0.is_empty() {
        let step = input.byte();
        let id = 1 + u32::from(step >> 7);
        let goes_on = match step & 0x7f {
            0 => {
                let frame =
                    Frame { kind: input.byte().into(), id: u32::from(input.byte()), payload: input.bytes() };
                hear(&mut core, &mut kept, frame)
            }
            kind @ (1 | 2) => {
                let stream = input.stream();
                let bytes =
                    if kind == 1 { input.bytes() } else { &BLOCK[..input.word() as usize % BLOCK.len()] };
                let offset = core.received(id, stream);
                offsets[id as usize][stream.index()] += bytes.len() as u64;
                say(&mut core, &mut kept, &AgentMessage::Output { id, stream, offset, bytes })
            }
            3 => {
                let offset = core.given(id).saturating_sub(u64::from(input.byte()));
                say(&mut core, &mut kept, &AgentMessage::StdinAck { id, offset })
            }
            4 => say(&mut core, &mut kept, &AgentMessage::StdinClosed { id }),
            5 => {
                say(&mut core, &mut kept, &AgentMessage::Log { level: LogLevel::Error, text: input.bytes() })
            }
            6 => {
                let status = Status::Signal(1 + input.byte() % 64);
                let cause = [Cause::Itself, Cause::Memory, Cause::Processes][usize::from(input.byte() % 3)];
                let message =
                    AgentMessage::Exited { id, status, cause, usage: Usage::default(), at_ns: input.word() };
                say(&mut core, &mut kept, &message)
            }
            7 => say(&mut core, &mut kept, &AgentMessage::Synced),
            8 => {
                let hello = Hello { version: input.word() as u16, features: 1 };
                say(&mut core, &mut kept, &AgentMessage::Hello(hello))
            }
            9 => {
                let message = AgentMessage::Failed { id, kind: FailureKind::Other, message: input.bytes() };
                say(&mut core, &mut kept, &message)
            }
            10 | 11 => {
                let stream = input.stream();
                let count = (input.word() * 16).min(*kept.of(id, stream));
                *kept.of(id, stream) -= count;
                core.disposed(id, stream, count as usize);
                true
            }
            12 => {
                core.give_stdin(id, input.bytes());
                true
            }
            13 => {
                core.give_stdin(id, &BLOCK);
                true
            }
            14 => {
                core.end_stdin(id);
                true
            }
            15 => {
                core.signal(id, input.byte());
                true
            }
            16 => {
                core.resize(id, WindowSize { rows: input.byte().into(), cols: 1 });
                true
            }
            17 => {
                let stream = input.stream();
                core.close_output(id, stream);
                *kept.of(id, stream) = 0;
                true
            }
            18 => {
                core.shut_down();
                true
            }
            19 => {
                core.disconnect();
                true
            }
            20 | 21 => connect(&mut core, &mut kept, &mut input),
            22 => say(&mut core, &mut kept, &AgentMessage::Started { id, pid: 1, at_ns: 1 }),
            23 => say(&mut core, &mut kept, &AgentMessage::SignalAck { id, sequence: input.byte().into() }),
            24 => {
                if core.phase(2).is_none() {
                    // A command, or a file into the guest or out of it.
                    match input.byte() % 3 {
                        0 => core.run(2, spec.clone()),
                        1 => core.put(2, PutSpec { path: b"/in".to_vec(), ..PutSpec::default() }),
                        _ => core.get(2, GetSpec { path: b"/out".to_vec(), ..GetSpec::default() }),
                    }
                }
                true
            }
            25 => {
                core.remove(2);
                kept.0[2] = [0; 2];
                true
            }
            26 => {
                let file = Transferred { bytes: input.word(), ..Transferred::default() };
                say(&mut core, &mut kept, &AgentMessage::Transferred { id, file })
            }
            27 => say(&mut core, &mut kept, &AgentMessage::Heartbeat { at_ns: input.word() }),
            28 => say(&mut core, &mut kept, &AgentMessage::Progress { id, text: input.bytes() }),
            29 => {
                let sequence = input.byte().into();
                say(&mut core, &mut kept, &AgentMessage::Quiesced { sequence })
            }
            30 => {
                core.quiesce(input.word() as u32);
                true
            }
            31 => {
                core.thaw();
                true
            }
            _ => {
                take(&mut core);
                true
            }
        };
        if !goes_on {
            if core.link() == Link::Down {
                break;
            }
            // As the driver does.
            core.disconnect();
        }
        for (id, stream) in [(1, Stream::Stdout), (2, Stream::Stderr)] {
            assert!(core.received(id, stream) <= offsets[id as usize][stream.index()]);
            assert!(core.stdin_room(id) <= WINDOW as usize);
        }
    }
});
