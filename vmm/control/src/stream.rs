//! What is spoken on a connection after its upgrade to [`PROTOCOL`]: frames in both directions, that carry a command's
//! streams.
//!
//! A frame is its kind (one byte), the length of its payload (four bytes, little-endian, at most [`PAYLOAD_MAX`]) and
//! the payload. The client sends [`ToMachine`], the machine [`FromMachine`]. The client may send [`INPUT_WINDOW`] bytes
//! of input and as much again as it is told; nothing else is counted: a client that does not read holds up the command's
//! output, and nothing but that.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name in the `Upgrade` header.
pub const PROTOCOL: &str = "harrier-stream/1";
/// Longest payload in bytes.
pub const PAYLOAD_MAX: usize = 64 << 10;
/// Input that may be on its way, in bytes.
pub const INPUT_WINDOW: usize = 256 << 10;

/// From the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToMachine {
    /// Kind 1: input.
    Input(Vec<u8>),
    /// Kind 2: no more input comes.
    InputEnd,
    /// Kind 3: the size of the terminal, rows and columns, two bytes each.
    Resize(u16, u16),
    /// Kind 4: a signal for the command, one byte.
    Signal(u8),
    /// Kind 5: the client goes, and the command goes on without it.
    Detach,
}

/// From the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromMachine {
    /// Kind 16: output.
    Stdout(Vec<u8>),
    /// Kind 17: output on the other stream.
    Stderr(Vec<u8>),
    /// Kind 18: so many more bytes of input may be sent, four bytes.
    InputCredit(u32),
    /// Kind 19: the command reads no more input.
    InputClosed,
    /// Kind 20: the last frame, a [`CommandEnd`] in JSON.
    Ended(CommandEnd),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// The command's code, 128+n after signal n, 127 or 126 if it could not be started, 125 if Harrier or the guest
    /// failed.
    pub exit_code: u8,
    /// One line, if there is more to say.
    pub error: Option<String>,
}

impl ToMachine {
    /// Writes the frame.
    ///
    /// # Errors
    /// The connection's.
    pub fn write(&self, output: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Input(bytes) => write_frame(output, 1, bytes),
            Self::InputEnd => write_frame(output, 2, &[]),
            Self::Resize(rows, cols) => {
                let ([a, b], [c, d]) = (rows.to_le_bytes(), cols.to_le_bytes());
                write_frame(output, 3, &[a, b, c, d])
            }
            Self::Signal(number) => write_frame(output, 4, &[*number]),
            Self::Detach => write_frame(output, 5, &[]),
        }
    }

    /// Reads a frame; `None` at the end of the connection.
    ///
    /// # Errors
    /// The connection's; `InvalidData` for what is no frame.
    pub fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let Some((kind, payload)) = read_frame(input)? else { return Ok(None) };
        Ok(Some(match (kind, payload.as_slice()) {
            (1, _) => Self::Input(payload),
            (2, []) => Self::InputEnd,
            (3, [a, b, c, d]) => Self::Resize(u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])),
            (4, [number]) => Self::Signal(*number),
            (5, []) => Self::Detach,
            _ => return Err(unknown(kind)),
        }))
    }
}

impl FromMachine {
    /// Writes the frame.
    ///
    /// # Errors
    /// The connection's.
    pub fn write(&self, output: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Stdout(bytes) => write_frame(output, 16, bytes),
            Self::Stderr(bytes) => write_frame(output, 17, bytes),
            Self::InputCredit(count) => write_frame(output, 18, &count.to_le_bytes()),
            Self::InputClosed => write_frame(output, 19, &[]),
            Self::Ended(end) => write_frame(output, 20, &serde_json::to_vec(end)?),
        }
    }

    /// Reads a frame; `None` at the end of the connection.
    ///
    /// # Errors
    /// The connection's; `InvalidData` for what is no frame.
    pub fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let Some((kind, payload)) = read_frame(input)? else { return Ok(None) };
        Ok(Some(match (kind, payload.as_slice()) {
            (16, _) => Self::Stdout(payload),
            (17, _) => Self::Stderr(payload),
            (18, [a, b, c, d]) => Self::InputCredit(u32::from_le_bytes([*a, *b, *c, *d])),
            (19, []) => Self::InputClosed,
            (20, json) => Self::Ended(serde_json::from_slice(json)?),
            _ => return Err(unknown(kind)),
        }))
    }
}

fn unknown(kind: u8) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a frame of kind {kind} that nobody knows"))
}

fn write_frame(output: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_MAX);
    let length =
        length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the payload is too long"))?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    output.write_all(&frame)
}

fn read_frame(input: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut kind = [0];
    while match input.read(&mut kind) {
        Ok(0) => return Ok(None),
        Ok(_) => false,
        Err(err) if err.kind() == io::ErrorKind::Interrupted => true,
        Err(err) => return Err(err),
    } {}
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).ok().filter(|length| *length <= PAYLOAD_MAX);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"))?;
    let mut payload = vec![0; length];
    input.read_exact(&mut payload)?;
    let [kind] = kind;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        let to = [
            ToMachine::Input(vec![7; PAYLOAD_MAX]),
            ToMachine::Input(vec![]),
            ToMachine::InputEnd,
            ToMachine::Resize(24, 80),
            ToMachine::Signal(15),
            ToMachine::Detach,
        ];
        let from = [
            FromMachine::Stdout(vec![1, 2]),
            FromMachine::Stderr(vec![3]),
            FromMachine::InputCredit(1 << 20),
            FromMachine::InputClosed,
            FromMachine::Ended(CommandEnd { exit_code: 3, error: Some("x".to_owned()) }),
        ];
        let (mut there, mut back) = (Vec::new(), Vec::new());
        to.iter().for_each(|frame| frame.write(&mut there).unwrap());
        from.iter().for_each(|frame| frame.write(&mut back).unwrap());
        let (mut there, mut back) = (there.as_slice(), back.as_slice());
        to.iter().for_each(|frame| assert_eq!(ToMachine::read(&mut there).unwrap().as_ref(), Some(frame)));
        from.iter().for_each(|frame| assert_eq!(FromMachine::read(&mut back).unwrap().as_ref(), Some(frame)));
        assert_eq!(ToMachine::read(&mut there).unwrap(), None);
        assert_eq!(FromMachine::read(&mut back).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        for bytes in
            [&[9, 0, 0, 0, 0][..], &[1, 0, 0, 2, 0], &[1, 5, 0, 0, 0, 1], &[3, 1, 0, 0, 0, 1], &[1, 1]]
        {
            assert!(ToMachine::read(&mut &*bytes).is_err(), "{bytes:?}");
            assert!(FromMachine::read(&mut &*bytes).is_err(), "{bytes:?}");
        }
        assert!(ToMachine::Input(vec![0; PAYLOAD_MAX + 1]).write(&mut Vec::new()).is_err());
    }
}
