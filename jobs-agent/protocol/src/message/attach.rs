//! How a connection begins, the first one and every later one: the agent says what it has in [`Ready`], the host says
//! what it wants to go on with in [`Attach`].

use crate::MAX_COMMANDS;
use crate::flow::Position;
use crate::wire::{DecodeError, Reader};

/// Why the agent dials, as far as it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// The machine has just started.
    #[default]
    Boot,
    /// The connection before this one is gone.
    Lost,
    /// The kernel has said that the machine was restored from a snapshot.
    Restored,
}

/// When the guest reached which point of its boot, by its CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// The agent's first instruction, near enough.
    pub agent_start_ns: u64,
    /// File systems are mounted and modules loaded.
    pub mounted_ns: u64,
    /// The first connection stood.
    pub connected_ns: u64,
}

/// The agent takes commands, and has these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Random, chosen by the agent at its start: another one means that the machine has started anew.
    pub boot_id: [u8; 16],
    /// Why this connection was made.
    pub reason: Reason,
    /// How the boot went.
    pub times: BootTimes,
    /// Every command whose id is not free, at most [`MAX_COMMANDS`].
    pub commands: Vec<CommandStatus>,
}

/// Where a command stands at the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandStatus {
    /// The command.
    pub id: u32,
    /// How far its stdin has come.
    pub stdin: Position,
    /// The last signal that it was sent; see [`HostMessage::Signal`](crate::HostMessage::Signal).
    pub signal: u32,
    /// Its stdout and stderr.
    pub outputs: [Kept; 2],
}

/// What of an output stream can still be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The first byte that is kept.
    pub from: u64,
    /// The stream's end so far.
    pub to: u64,
}

/// What became of the machine since the host's side of the session was last connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Nothing: it is the same machine, at its boot or after a lost connection.
    #[default]
    Same,
    /// It was restored from a snapshot.
    Restored,
    /// It is a clone of a machine that may go on as well.
    Forked,
    /// It has moved here from another host.
    Migrated,
}

/// What the host goes on with. The agent ends and forgets every command that is not named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// What became of the machine.
    pub role: Role,
    /// Counts the restores that led to this machine; zero for one that was booted.
    pub generation: u32,
    /// Tells the clones of one fork apart, from zero.
    pub clone_index: u32,
    /// How long the agent and its commands go on without a host, in milliseconds; [`LINGER_FOREVER`] is for ever.
    pub linger_ms: u32,
    /// How often the agent says [`AgentMessage::Heartbeat`](crate::AgentMessage::Heartbeat), in milliseconds; zero is never.
    pub heartbeat_ms: u32,
    /// The wall clock in nanoseconds since 1970, to be set in a machine that is not [`Role::Same`]; zero leaves it.
    pub wall_clock_ns: u64,
    /// Fresh randomness for the kernel of a machine that is not [`Role::Same`]; all zero for none.
    pub entropy: [u8; 32],
    /// The commands, at most [`MAX_COMMANDS`].
    pub commands: Vec<Attached>,
}

/// See [`Attach::linger_ms`].
pub const LINGER_FOREVER: u32 = u32::MAX;

/// Where a command stands at the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// The command.
    pub id: u32,
    /// How far its stdout and stderr have come.
    pub outputs: [Position; 2],
}

impl Default for Attach {
    fn default() -> Self {
        Self {
            role: Role::Same,
            generation: 0,
            clone_index: 0,
            linger_ms: LINGER_FOREVER,
            heartbeat_ms: 0,
            wall_clock_ns: 0,
            entropy: [0; 32],
            commands: Vec::new(),
        }
    }
}

impl Ready {
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let boot_id = reader.array()?;
        let reason = match reader.u8()? {
            1 => Reason::Boot,
            2 => Reason::Lost,
            3 => Reason::Restored,
            value => return Err(DecodeError::InvalidField { field: "reason", value: value.into() }),
        };
        let times = BootTimes {
            agent_start_ns: reader.u64()?,
            mounted_ns: reader.u64()?,
            connected_ns: reader.u64()?,
        };
        let commands = list(reader, |reader| {
            Ok(CommandStatus {
                id: reader.u32()?,
                stdin: position(reader)?,
                signal: reader.u32()?,
                outputs: [kept(reader)?, kept(reader)?],
            })
        })?;
        Ok(Self { boot_id, reason, times, commands })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.boot_id);
        out.push(match self.reason {
            Reason::Boot => 1,
            Reason::Lost => 2,
            Reason::Restored => 3,
        });
        for time in [self.times.agent_start_ns, self.times.mounted_ns, self.times.connected_ns] {
            out.extend_from_slice(&time.to_le_bytes());
        }
        put_list(out, &self.commands, |out, command| {
            out.extend_from_slice(&command.id.to_le_bytes());
            put_position(out, command.stdin);
            out.extend_from_slice(&command.signal.to_le_bytes());
            for Kept { from, to } in command.outputs {
                out.extend_from_slice(&from.to_le_bytes());
                out.extend_from_slice(&to.to_le_bytes());
            }
        });
    }
}

impl Attach {
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let role = match reader.u8()? {
            1 => Role::Same,
            2 => Role::Restored,
            3 => Role::Forked,
            4 => Role::Migrated,
            value => return Err(DecodeError::InvalidField { field: "role", value: value.into() }),
        };
        Ok(Self {
            role,
            generation: reader.u32()?,
            clone_index: reader.u32()?,
            linger_ms: reader.u32()?,
            heartbeat_ms: reader.u32()?,
            wall_clock_ns: reader.u64()?,
            entropy: reader.array()?,
            commands: list(reader, |reader| {
                Ok(Attached { id: reader.u32()?, outputs: [position(reader)?, position(reader)?] })
            })?,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(match self.role {
            Role::Same => 1,
            Role::Restored => 2,
            Role::Forked => 3,
            Role::Migrated => 4,
        });
        for value in [self.generation, self.clone_index, self.linger_ms, self.heartbeat_ms] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.wall_clock_ns.to_le_bytes());
        out.extend_from_slice(&self.entropy);
        put_list(out, &self.commands, |out, command| {
            out.extend_from_slice(&command.id.to_le_bytes());
            command.outputs.into_iter().for_each(|position| put_position(out, position));
        });
    }
}

/// At most [`MAX_COMMANDS`] entries with their number in front.
fn list<T>(
    reader: &mut Reader<'_>,
    entry: impl Fn(&mut Reader<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let count = reader.u8()?;
    if usize::from(count) > MAX_COMMANDS {
        return Err(DecodeError::InvalidField { field: "command count", value: count.into() });
    }
    (0..count).map(|_| entry(reader)).collect()
}

fn put_list<T>(out: &mut Vec<u8>, entries: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    let entries = entries.get(..MAX_COMMANDS).unwrap_or(entries);
    out.push(u8::try_from(entries.len()).unwrap_or(0));
    entries.iter().for_each(|entry| put(out, entry));
}

fn position(reader: &mut Reader<'_>) -> Result<Position, DecodeError> {
    let position = Position { received: reader.u64()?, disposed: reader.u64()? };
    if position.disposed > position.received {
        return Err(DecodeError::InvalidField { field: "position", value: position.disposed });
    }
    Ok(position)
}

fn put_position(out: &mut Vec<u8>, position: Position) {
    out.extend_from_slice(&position.received.to_le_bytes());
    out.extend_from_slice(&position.disposed.to_le_bytes());
}

fn kept(reader: &mut Reader<'_>) -> Result<Kept, DecodeError> {
    let kept = Kept { from: reader.u64()?, to: reader.u64()? };
    if kept.to < kept.from {
        return Err(DecodeError::InvalidField { field: "kept output", value: kept.to });
    }
    Ok(kept)
}
