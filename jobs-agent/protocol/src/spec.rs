//! [`CommandSpec`]: everything the agent has to know to run one command.

use crate::wire::{DecodeError, Reader, put_bytes};

/// The longest encoded [`CommandSpec`] in bytes: about what Linux takes as arguments and environment of one program.
pub const MAX_SPEC: usize = 2 * 1024 * 1024;

/// The longest serial number of a virtio-blk device in bytes (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Height in lines.
    pub rows: u16,
    /// Width in characters.
    pub cols: u16,
}

/// Who runs a command: numeric ids, no further groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What a command sees as `/`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Root {
    /// The initramfs that the agent itself came in.
    #[default]
    Initramfs,
    /// The file system on a disk, read-only below an overlay in memory. The first command decides for the machine.
    Disk {
        /// The disk's serial number; see [`ROOT_DISK_SERIAL`](crate::ROOT_DISK_SERIAL).
        serial: Vec<u8>,
    },
}

/// One command to run. All strings are bytes as the guest will see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandSpec {
    /// The program, looked up along PATH unless it holds a slash, and its arguments. Never empty.
    pub argv: Vec<Vec<u8>>,
    /// Environment. The agent adds PATH, HOME and, with a terminal, TERM where they are missing.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the command starts; `/` by default.
    pub workdir: Option<Vec<u8>>,
    /// Run on a pseudo-terminal of this size, with stdout and stderr in one stream.
    pub tty: Option<WindowSize>,
    /// Run as this user; as root by default.
    pub user: Option<User>,
    /// The root file system.
    pub root: Root,
    /// The machine's host name, if it is to be set.
    pub hostname: Option<Vec<u8>>,
}

/// Why a [`CommandSpec`] cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// There is no program.
    #[error("there is no command to run")]
    NoCommand,
    /// A string holds a NUL byte.
    #[error("{0} holds a NUL byte")]
    Nul(&'static str),
    /// The name of a variable is empty or holds `=`.
    #[error("{0:?} cannot be the name of an environment variable")]
    VariableName(String),
    /// Too long in all.
    #[error(
        "arguments and environment take {0} bytes, at most {MAX_SPEC} fit; pass the data in a file or on stdin"
    )]
    TooLong(usize),
    /// Too long a disk serial number.
    #[error("a disk's serial number has at most {SERIAL_MAX} bytes")]
    Serial,
}

impl CommandSpec {
    /// A command with this program and arguments, everything else at its default.
    pub fn new<A: Into<Vec<u8>>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Checks the specification and encodes it; the host sends the result in [`HostMessage::RunPart`] and
    /// [`HostMessage::Run`] frames.
    ///
    /// [`HostMessage::RunPart`]: crate::HostMessage::RunPart
    /// [`HostMessage::Run`]: crate::HostMessage::Run
    pub fn encode(&self) -> Result<Vec<u8>, SpecError> {
        self.check()?;
        let mut out = Vec::new();
        out.extend_from_slice(&(self.argv.len() as u32).to_le_bytes());
        for argument in &self.argv {
            put_bytes(&mut out, argument);
        }
        out.extend_from_slice(&(self.env.len() as u32).to_le_bytes());
        for (name, value) in &self.env {
            put_bytes(&mut out, name);
            put_bytes(&mut out, value);
        }
        put_optional(&mut out, self.workdir.as_deref());
        match self.tty {
            None => out.push(0),
            Some(size) => {
                out.push(1);
                out.extend_from_slice(&size.rows.to_le_bytes());
                out.extend_from_slice(&size.cols.to_le_bytes());
            }
        }
        match self.user {
            None => out.push(0),
            Some(user) => {
                out.push(1);
                out.extend_from_slice(&user.uid.to_le_bytes());
                out.extend_from_slice(&user.gid.to_le_bytes());
            }
        }
        match &self.root {
            Root::Initramfs => out.push(0),
            Root::Disk { serial } => {
                out.push(1);
                put_bytes(&mut out, serial);
            }
        }
        put_optional(&mut out, self.hostname.as_deref());
        if out.len() > MAX_SPEC {
            return Err(SpecError::TooLong(out.len()));
        }
        Ok(out)
    }

    /// Decodes what [`CommandSpec::encode`] wrote; only specifications that it would have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let mut spec = Self::default();
        for _ in 0..reader.u32()? {
            spec.argv.push(reader.bytes()?.to_vec());
        }
        for _ in 0..reader.u32()? {
            let name = reader.bytes()?.to_vec();
            spec.env.push((name, reader.bytes()?.to_vec()));
        }
        spec.workdir = optional(&mut reader, "workdir")?;
        if flag(&mut reader, "tty")? {
            spec.tty = Some(WindowSize { rows: reader.u16()?, cols: reader.u16()? });
        }
        if flag(&mut reader, "user")? {
            spec.user = Some(User { uid: reader.u32()?, gid: reader.u32()? });
        }
        if flag(&mut reader, "root")? {
            spec.root = Root::Disk { serial: reader.bytes()?.to_vec() };
        }
        spec.hostname = optional(&mut reader, "hostname")?;
        reader.finish()?;
        let field = match spec.check() {
            Ok(()) => return Ok(spec),
            Err(SpecError::NoCommand) => "argv",
            Err(SpecError::Nul(field)) => field,
            Err(SpecError::VariableName(_)) => "env",
            Err(SpecError::TooLong(_)) => "length",
            Err(SpecError::Serial) => "root",
        };
        Err(DecodeError::InvalidField { field, value: 0 })
    }

    fn check(&self) -> Result<(), SpecError> {
        if self.argv.first().is_none_or(Vec::is_empty) {
            return Err(SpecError::NoCommand);
        }
        let strings = (self.argv.iter().map(|argument| ("argv", argument)))
            .chain(self.env.iter().flat_map(|(name, value)| [("env", name), ("env", value)]))
            .chain(self.workdir.iter().map(|path| ("workdir", path)))
            .chain(self.hostname.iter().map(|name| ("hostname", name)));
        for (field, string) in strings {
            if string.contains(&0) {
                return Err(SpecError::Nul(field));
            }
        }
        if let Some((name, _)) = self.env.iter().find(|(name, _)| name.is_empty() || name.contains(&b'=')) {
            return Err(SpecError::VariableName(String::from_utf8_lossy(name).into_owned()));
        }
        match &self.root {
            Root::Disk { serial } if serial.len() > SERIAL_MAX => Err(SpecError::Serial),
            _ => Ok(()),
        }
    }
}

fn put_optional(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        None => out.push(0),
        Some(bytes) => {
            out.push(1);
            put_bytes(out, bytes);
        }
    }
}

fn flag(reader: &mut Reader<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(DecodeError::InvalidField { field, value: value.into() }),
    }
}

fn optional(reader: &mut Reader<'_>, field: &'static str) -> Result<Option<Vec<u8>>, DecodeError> {
    Ok(if flag(reader, field)? { Some(reader.bytes()?.to_vec()) } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> CommandSpec {
        CommandSpec {
            argv: vec![b"sh".to_vec(), b"-c".to_vec(), vec![0xff, 0xfe], Vec::new()],
            env: vec![(b"A".to_vec(), b"b=c".to_vec()), (b"EMPTY".to_vec(), Vec::new())],
            workdir: Some(b"/srv".to_vec()),
            tty: Some(WindowSize { rows: 24, cols: 80 }),
            user: Some(User { uid: 1000, gid: 100 }),
            root: Root::Disk { serial: b"harrier-root".to_vec() },
            hostname: Some(b"box".to_vec()),
        }
    }

    #[test]
    fn a_specification_comes_back_as_it_was_sent() {
        for spec in [full(), CommandSpec::new(["true"])] {
            assert_eq!(CommandSpec::decode(&spec.encode().unwrap()), Ok(spec));
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = full().encode().unwrap();
        for length in 0..bytes.len() {
            assert_eq!(CommandSpec::decode(&bytes[..length]), Err(DecodeError::Truncated), "{length} bytes");
        }
    }

    #[test]
    fn a_count_is_never_allocated_from() {
        let mut bytes = Vec::from(u32::MAX.to_le_bytes());
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(CommandSpec::decode(&bytes), Err(DecodeError::Truncated));
    }

    #[test]
    fn what_no_program_can_be_given_is_refused_on_both_sides() {
        assert_eq!(CommandSpec::new::<&str>([]).encode(), Err(SpecError::NoCommand));
        assert_eq!(CommandSpec::new(["a\0b"]).encode(), Err(SpecError::Nul("argv")));
        for name in ["", "a=b"] {
            let spec = CommandSpec { env: vec![(name.into(), Vec::new())], ..CommandSpec::new(["true"]) };
            assert_eq!(spec.encode(), Err(SpecError::VariableName(name.into())));
        }
        let mut bytes = CommandSpec::new(["true"]).encode().unwrap();
        let at = bytes.windows(4).position(|window| window == b"true").unwrap();
        bytes[at] = 0;
        assert_eq!(CommandSpec::decode(&bytes), Err(DecodeError::InvalidField { field: "argv", value: 0 }));
        let long = CommandSpec::new([vec![b'x'; MAX_SPEC]]);
        assert!(matches!(long.encode(), Err(SpecError::TooLong(_))));
    }
}
