//! [`CommandSpec`]: everything the agent has to know to run one command.

use crate::wire::{DecodeError, Reader, put_bytes};

/// The longest encoded [`CommandSpec`] in bytes: about what Linux takes as arguments and environment of one program.
pub const MAX_SPEC: usize = 2 * 1024 * 1024;

/// The longest serial number of a virtio-blk device in bytes (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;

/// The longest name of a user in bytes.
const USER_MAX: usize = 256;

/// What stands for no limit.
const NO_LIMIT: u64 = u64::MAX;

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Height in lines.
    pub rows: u16,
    /// Width in characters.
    pub cols: u16,
}

/// Who runs a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// Numeric ids, no further groups.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// A name in the /etc/passwd of the command's root file system, with that user's groups.
    Name(Vec<u8>),
}

/// What a command and its descendants may use; `None` is what the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processor time in percent of one processor.
    pub cpu_percent: Option<u32>,
    /// Memory in bytes, with files in memory. Who needs more is ended: [`Cause::Memory`](crate::Cause::Memory).
    pub memory_bytes: Option<u64>,
    /// Processes and threads. Who makes more is ended: [`Cause::Processes`](crate::Cause::Processes).
    pub processes: Option<u32>,
    /// Bytes in each of the machine's writable file systems: `/`, `/tmp`, `/dev/shm`, `/run`. More cannot be written.
    pub disk_bytes: Option<u64>,
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
    /// What it may use.
    pub limits: Limits,
    /// Run it in namespaces of its own: it sees and reaches no process, mount, host name or IPC object of the machine.
    pub isolate: bool,
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
    /// Not a path in the guest.
    #[error("{0:?} is not a path in the guest: it has to begin with / and have at most 4095 bytes")]
    Path(String),
    /// An empty or too long name of a user.
    #[error("a user's name has 1 to {USER_MAX} bytes")]
    User,
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
        put_user(&mut out, self.user.as_ref());
        put_root(&mut out, &self.root);
        put_optional(&mut out, self.hostname.as_deref());
        let Limits { cpu_percent, memory_bytes, processes, disk_bytes } = self.limits;
        for limit in [cpu_percent.map(u64::from), memory_bytes, processes.map(u64::from), disk_bytes] {
            out.extend_from_slice(&limit.unwrap_or(NO_LIMIT).to_le_bytes());
        }
        out.push(self.isolate.into());
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
        spec.user = user(&mut reader)?;
        spec.root = root(&mut reader)?;
        spec.hostname = optional(&mut reader, "hostname")?;
        spec.limits = Limits {
            cpu_percent: small_limit(&mut reader, "cpu limit")?,
            memory_bytes: limit(&mut reader)?,
            processes: small_limit(&mut reader, "process limit")?,
            disk_bytes: limit(&mut reader)?,
        };
        spec.isolate = flag(&mut reader, "isolate")?;
        reader.finish()?;
        let field = match spec.check() {
            Ok(()) => return Ok(spec),
            Err(SpecError::NoCommand) => "argv",
            Err(SpecError::Nul(field)) => field,
            Err(SpecError::VariableName(_)) => "env",
            Err(SpecError::TooLong(_)) => "length",
            Err(SpecError::Serial) => "root",
            Err(SpecError::User) => "user",
            Err(SpecError::Path(_)) => "path",
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
        check_user(self.user.as_ref())?;
        check_root(&self.root)
    }
}

pub(crate) fn check_root(root: &Root) -> Result<(), SpecError> {
    match root {
        Root::Disk { serial } if serial.len() > SERIAL_MAX => Err(SpecError::Serial),
        Root::Disk { .. } | Root::Initramfs => Ok(()),
    }
}

pub(crate) fn check_user(user: Option<&User>) -> Result<(), SpecError> {
    match user {
        Some(User::Name(name)) if name.is_empty() || name.len() > USER_MAX => Err(SpecError::User),
        Some(User::Name(name)) if name.contains(&0) => Err(SpecError::Nul("user")),
        Some(User::Name(_) | User::Ids { .. }) | None => Ok(()),
    }
}

pub(crate) fn put_user(out: &mut Vec<u8>, user: Option<&User>) {
    match user {
        None => out.push(0),
        Some(User::Ids { uid, gid }) => {
            out.push(1);
            out.extend_from_slice(&uid.to_le_bytes());
            out.extend_from_slice(&gid.to_le_bytes());
        }
        Some(User::Name(name)) => {
            out.push(2);
            put_bytes(out, name);
        }
    }
}

pub(crate) fn user(reader: &mut Reader<'_>) -> Result<Option<User>, DecodeError> {
    Ok(match reader.u8()? {
        0 => None,
        1 => Some(User::Ids { uid: reader.u32()?, gid: reader.u32()? }),
        2 => Some(User::Name(reader.bytes()?.to_vec())),
        value => return Err(DecodeError::InvalidField { field: "user", value: value.into() }),
    })
}

pub(crate) fn put_root(out: &mut Vec<u8>, root: &Root) {
    match root {
        Root::Initramfs => out.push(0),
        Root::Disk { serial } => {
            out.push(1);
            put_bytes(out, serial);
        }
    }
}

pub(crate) fn root(reader: &mut Reader<'_>) -> Result<Root, DecodeError> {
    Ok(if flag(reader, "root")? { Root::Disk { serial: reader.bytes()?.to_vec() } } else { Root::Initramfs })
}

fn limit(reader: &mut Reader<'_>) -> Result<Option<u64>, DecodeError> {
    Ok(Some(reader.u64()?).filter(|value| *value != NO_LIMIT))
}

fn small_limit(reader: &mut Reader<'_>, field: &'static str) -> Result<Option<u32>, DecodeError> {
    let small = |value| u32::try_from(value).map_err(|_| DecodeError::InvalidField { field, value });
    limit(reader)?.map(small).transpose()
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
            user: Some(User::Ids { uid: 1000, gid: 100 }),
            root: Root::Disk { serial: b"harrier-root".to_vec() },
            hostname: Some(b"box".to_vec()),
            limits: Limits {
                cpu_percent: Some(50),
                memory_bytes: Some(1 << 33),
                processes: Some(7),
                disk_bytes: Some(0),
            },
            isolate: true,
        }
    }

    #[test]
    fn a_specification_comes_back_as_it_was_sent() {
        let named = CommandSpec { user: Some(User::Name(b"nobody".to_vec())), ..full() };
        for spec in [full(), named, CommandSpec::new(["true"])] {
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
