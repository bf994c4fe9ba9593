//! What is kept about a machine on disk, and how: written to another name and renamed, so that a record is whole or not
//! there.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::name::{MachineId, MachineName};

/// The version of the records that this crate writes; others are not read.
pub const RECORD_VERSION: u32 = 1;
/// Longest record in bytes.
const RECORD_MAX: u64 = 1 << 20;

/// What is known about a machine from its beginning: `machine.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Its id.
    pub id: MachineId,
    /// Its name.
    pub name: MachineName,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// What runs in it, as the user wrote it: program and arguments, or empty for a plain boot.
    pub command: Vec<String>,
    /// It runs without its starter, and its output is kept.
    pub detached: bool,
    /// Everything about it goes away when it ends.
    pub auto_remove: bool,
}

/// How a machine ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// What `harrier run` would have given: the command's code, 128+n after signal n, 124 after a timeout, 125 if
    /// Harrier or the guest failed.
    pub exit_code: u8,
    /// One line, if there is more to say.
    pub error: Option<String>,
    /// When the command or the kernel began to run, in milliseconds since 1970.
    pub started_ms: Option<u64>,
    /// When it ended, in milliseconds since 1970.
    pub ended_ms: u64,
}

/// Reads a record.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    parse(File::open(path)?)
}

/// Reads a record from an open file.
pub(crate) fn parse<T: DeserializeOwned>(file: File) -> io::Result<T> {
    let limited = io::Read::take(file, RECORD_MAX);
    serde_json::from_reader(io::BufReader::new(limited))
        .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

/// Writes a record durably under its name in a folder.
pub(crate) fn write<T: Serialize>(folder: &Path, name: &str, record: &T) -> io::Result<()> {
    let temporary = folder.join(format!(".{name}"));
    let mut file = File::create(&temporary)?;
    file.write_all(&to_bytes(record)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, folder.join(name))?;
    sync_folder(folder)
}

pub(crate) fn to_bytes<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(record)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Makes names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
