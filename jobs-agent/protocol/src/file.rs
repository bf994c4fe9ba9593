//! Files that are copied into the machine and out of it: [`PutSpec`], [`GetSpec`] and how it ended, [`Transferred`].

use crate::spec::{self, Root, SpecError, User};
use crate::wire::{DecodeError, Reader, put_bytes};

/// The longest path of a file in bytes, as in Linux.
pub const PATH_MAX: usize = 4095;

/// The permission bits that a file is given or has.
const MODE_MASK: u32 = 0o7777;

/// A file to write. Missing folders are made; a file of that name is replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutSpec {
    /// Where it is to be, absolute.
    pub path: Vec<u8>,
    /// Its permission bits.
    pub mode: u32,
    /// Who owns it; root by default.
    pub owner: Option<User>,
    /// The root file system that it is written to; see [`CommandSpec::root`](crate::CommandSpec::root).
    pub root: Root,
    /// How long it is.
    pub bytes: u64,
    /// Its SHA-256: a file with another one does not get its name.
    pub sha256: [u8; 32],
}

/// A file to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GetSpec {
    /// Where it is, absolute; links are followed.
    pub path: Vec<u8>,
    /// The root file system that it is read from.
    pub root: Root,
    /// The longest file that is wanted.
    pub max_bytes: u64,
}

/// A file that was copied, as the agent saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// How long it is.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: [u8; 32],
    /// Its permission bits.
    pub mode: u32,
}

impl PutSpec {
    /// Whether it can be sent.
    ///
    /// # Errors
    /// A string is too long or holds a NUL byte.
    pub fn check(&self) -> Result<(), SpecError> {
        check_path(&self.path)?;
        spec::check_user(self.owner.as_ref())?;
        spec::check_root(&self.root)
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let spec = Self {
            path: reader.bytes()?.to_vec(),
            mode: mode(reader)?,
            owner: spec::user(reader)?,
            root: spec::root(reader)?,
            bytes: reader.u64()?,
            sha256: reader.array()?,
        };
        spec.check().map_err(|_| INVALID)?;
        Ok(spec)
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, &self.path);
        out.extend_from_slice(&(self.mode & MODE_MASK).to_le_bytes());
        spec::put_user(out, self.owner.as_ref());
        spec::put_root(out, &self.root);
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.sha256);
    }
}

impl GetSpec {
    /// Whether it can be sent.
    ///
    /// # Errors
    /// A string is too long or holds a NUL byte.
    pub fn check(&self) -> Result<(), SpecError> {
        check_path(&self.path)?;
        spec::check_root(&self.root)
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let spec =
            Self { path: reader.bytes()?.to_vec(), root: spec::root(reader)?, max_bytes: reader.u64()? };
        spec.check().map_err(|_| INVALID)?;
        Ok(spec)
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, &self.path);
        spec::put_root(out, &self.root);
        out.extend_from_slice(&self.max_bytes.to_le_bytes());
    }
}

impl Transferred {
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { bytes: reader.u64()?, sha256: reader.array()?, mode: mode(reader)? })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.sha256);
        out.extend_from_slice(&(self.mode & MODE_MASK).to_le_bytes());
    }
}

const INVALID: DecodeError = DecodeError::InvalidField { field: "file", value: 0 };

fn check_path(path: &[u8]) -> Result<(), SpecError> {
    if !path.starts_with(b"/") || path.len() > PATH_MAX {
        Err(SpecError::Path(String::from_utf8_lossy(path.get(..80).unwrap_or(path)).into_owned()))
    } else if path.contains(&0) {
        Err(SpecError::Nul("path"))
    } else {
        Ok(())
    }
}

fn mode(reader: &mut Reader<'_>) -> Result<u32, DecodeError> {
    match reader.u32()? {
        mode if mode & !MODE_MASK == 0 => Ok(mode),
        value => Err(DecodeError::InvalidField { field: "mode", value: value.into() }),
    }
}
