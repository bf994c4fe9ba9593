//! What is saved of a session: enough for another process to go on in a restored machine, as plain data.

use harrier_agent_protocol::flow::{ReceiveStream, SendStream};
use harrier_agent_protocol::{MAX_COMMANDS, MAX_SPEC, Role, Stream, VERSION, WINDOW};
use serde::{Deserialize, Serialize};

use super::core::{Command, Core, Phase, Request};

/// The version of [`SessionState`] that this crate writes and reads. It goes with the agent's: the one in the snapshot
/// speaks its own version for ever.
const STATE_VERSION: u32 = 2;

/// A session at one moment. Small: what is kept of streams is at most a window of input for each command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// The layout of this structure.
    pub version: u32,
    /// The agent, in hexadecimal; `None` before it has connected.
    pub boot_id: Option<String>,
    /// The number of the next command.
    pub next_id: u32,
    /// The commands that have not ended.
    pub commands: Vec<CommandState>,
}

/// One command of a [`SessionState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandState {
    /// Its number.
    pub id: u32,
    /// Whether the agent has been told of it, and whether it has said that it runs.
    pub phase: PhaseState,
    /// Its encoded specification in base64, until it runs.
    pub spec: String,
    /// Its input.
    pub stdin: StdinState,
    /// Its stdout, or what its terminal shows.
    pub stdout: OutputState,
    /// Its stderr.
    pub stderr: OutputState,
    /// Signals that were given and may not have been sent: pairs of sequence number and signal. Those that have no
    /// sequence number yet have zero.
    pub signals: Vec<(u32, u8)>,
    /// The last sequence number of a signal.
    pub signal_sequence: u32,
}

/// How far a command of a [`SessionState`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseState {
    /// The agent has not been told.
    Waiting,
    /// It has been told.
    Starting,
    /// It has said that the command runs.
    Running,
}

/// The input of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StdinState {
    /// Everything before this offset is in the command's pipe or beyond.
    pub acked: u64,
    /// What follows and was read from the host's input already, in base64.
    pub kept: String,
    /// The host's input has ended.
    pub ended: bool,
    /// The command still reads.
    pub open: bool,
}

/// An output of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputState {
    /// Everything before this offset is written to the host's output; what follows comes again.
    pub offset: u64,
    /// Nobody reads it any more.
    pub closed: bool,
}

/// What became of the machine whose session is resumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Restored, forked or migrated.
    pub role: Role,
    /// Counts the restores that led to this machine, from one.
    pub generation: u32,
    /// Tells the clones of one fork apart, from zero.
    pub clone_index: u32,
    /// Fresh randomness for the guest's kernel; all zero for none.
    pub entropy: [u8; 32],
}

/// Why a [`SessionState`] cannot be resumed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another version.
    #[error(
        "the saved session has version {0}, this program goes on with version {STATE_VERSION} (agent protocol {VERSION}): \
         restore it with the harrier that took it"
    )]
    Version(u32),
    /// A value that no session has.
    #[error("the saved session is damaged: {0}")]
    Damaged(&'static str),
}

impl StdinState {
    /// How many bytes were read from the host's input in all.
    #[must_use]
    pub fn end(&self) -> u64 {
        let kept = base64_decode(&self.kept).map_or(0, |kept| kept.len() as u64);
        self.acked.saturating_add(kept)
    }
}

impl SessionState {
    /// What is to be saved of a core. The caller fills in `next_id`.
    pub(super) fn of(core: &Core) -> Self {
        let commands = core.commands.iter().filter_map(|(id, command)| {
            let phase = match command.phase {
                Phase::Waiting => PhaseState::Waiting,
                Phase::Starting => PhaseState::Starting,
                Phase::Running => PhaseState::Running,
                Phase::Ended => return None,
            };
            let output = |stream: Stream| {
                let ([stdout, stderr], [stdout_closed, stderr_closed]) = (&command.outputs, command.closed);
                let (output, closed) = match stream {
                    Stream::Stdout => (stdout, stdout_closed),
                    Stream::Stderr => (stderr, stderr_closed),
                };
                OutputState { offset: output.position().disposed, closed }
            };
            let waiting = (1..=64_u8).filter(|number| command.signals >> (number - 1) & 1 == 1);
            Some(CommandState {
                id: *id,
                phase,
                spec: base64_encode(match &command.request {
                    Request::Run(encoded) => encoded,
                    Request::Put(_) | Request::Get(_) => return None,
                }),
                stdin: StdinState {
                    acked: command.stdin.acked(),
                    kept: base64_encode(&command.stdin.kept()),
                    ended: command.stdin_has_ended,
                    open: command.stdin_is_open,
                },
                stdout: output(Stream::Stdout),
                stderr: output(Stream::Stderr),
                signals: command.unacked.iter().copied().chain(waiting.map(|number| (0, number))).collect(),
                signal_sequence: command.sequence,
            })
        });
        Self {
            version: STATE_VERSION,
            boot_id: core.boot_id.map(|id| format!("{:032x}", u128::from_be_bytes(id))),
            next_id: 0,
            commands: commands.collect(),
        }
    }

    /// A core that goes on from here.
    pub(super) fn to_core(&self, restored: &Restored, linger_ms: u32) -> Result<Core, StateError> {
        if self.version != STATE_VERSION {
            return Err(StateError::Version(self.version));
        }
        let damaged = StateError::Damaged;
        let mut core = Core::new(linger_ms);
        core.attach.role = restored.role;
        core.attach.generation = restored.generation;
        core.attach.clone_index = restored.clone_index;
        core.attach.entropy = restored.entropy;
        core.boot_id = match &self.boot_id {
            None => None,
            Some(text) if text.len() == 32 => {
                Some(u128::from_str_radix(text, 16).map_err(|_| damaged("its boot id"))?.to_be_bytes())
            }
            Some(_) => return Err(damaged("its boot id")),
        };
        if self.commands.len() > MAX_COMMANDS {
            return Err(damaged("too many commands"));
        }
        for saved in &self.commands {
            if saved.id >= self.next_id {
                return Err(damaged("a command's number"));
            }
            let encoded = base64_decode(&saved.spec).ok_or(damaged("a specification"))?;
            let kept = base64_decode(&saved.stdin.kept).ok_or(damaged("input"))?;
            if kept.len() > WINDOW as usize || encoded.len() > MAX_SPEC {
                return Err(damaged("more input or a longer specification than fits"));
            }
            let mut command = Command::new(Request::Run(encoded));
            command.phase = match saved.phase {
                PhaseState::Waiting => Phase::Waiting,
                PhaseState::Starting => Phase::Starting,
                PhaseState::Running => Phase::Running,
            };
            command.stdin = SendStream::restore(saved.stdin.acked, kept);
            command.stdin_is_open = saved.stdin.open;
            command.stdin_has_ended = saved.stdin.ended;
            command.outputs = [saved.stdout.offset, saved.stderr.offset].map(ReceiveStream::restore);
            command.closed = [saved.stdout.closed, saved.stderr.closed];
            command.sequence = saved.signal_sequence;
            for (sequence, number) in saved.signals.iter().take(2 * 64).copied() {
                match (sequence, number) {
                    (_, 0 | 65..) => return Err(damaged("a signal's number")),
                    (0, number) => command.signals |= 1 << (number - 1),
                    (sequence, number) => command.unacked.push_back((sequence, number)),
                }
            }
            if core.commands.insert(saved.id, command).is_some() {
                return Err(damaged("two commands with the same number"));
            }
        }
        Ok(core)
    }
}

fn base64_encode(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn base64_decode(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}
