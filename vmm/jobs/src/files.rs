//! Whole files between the host and a machine, over a [`Session`]: [`copy_in`], and [`Arrival`] for a file that comes out.
//!
//! Both sides take the SHA-256 of what they read or write, and both must agree. A file is never in memory as a whole: its
//! content goes through the windows of a command's streams. A file that comes out is written beside its place under another
//! name, and gets its own only with [`Arrival::commit`], once it is on the disk.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use harrier_agent_protocol::{GetSpec, PutSpec, Root, Transferred, User};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};

use crate::outcome::{ExecuteError, Status};
use crate::session::Session;
use crate::stdio::{Stdin, Stdio};

/// How much of a file is read at once to take its digest.
const PIECE: usize = 128 * 1024;

/// A SHA-256; in text 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256Digest(pub [u8; 32]);

impl Sha256Digest {
    /// Of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Sha256Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no SHA-256: it has 64 hexadecimal digits");
        if text.len() != 64 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let digits = text.get(2 * index..2 * index + 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Sha256Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Length, digest and permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// How long it is.
    pub bytes: u64,
    /// Its digest.
    pub sha256: Sha256Digest,
    /// Its permission bits, of the lowest nine.
    pub mode: u32,
}

/// Why a file is not copied. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The host's file.
    #[error("'{}' cannot be {what} ({error}): {remedy}", path.display())]
    Host {
        /// Which.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What came of it.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The guest has no such file.
    #[error("{0}: have the command write it")]
    Missing(String),
    /// The guest cannot write or read it.
    #[error("{0}")]
    Guest(String),
    /// What one side has written is not what the other has read.
    #[error("'{}' was damaged on its way ({there} in the guest, {here} here): copy it again", path.display())]
    Damaged {
        /// The host's file.
        path: PathBuf,
        /// The agent's digest.
        there: Sha256Digest,
        /// Ours.
        here: Sha256Digest,
    },
    /// The session.
    #[error(transparent)]
    Session(#[from] ExecuteError),
}

fn host(path: &Path, what: &'static str, remedy: &'static str) -> impl Fn(io::Error) -> CopyError {
    let path = path.to_owned();
    move |error| CopyError::Host { path: path.clone(), what, error, remedy }
}

/// Reads a regular file to its end for its digest.
///
/// # Errors
/// It is none, or cannot be read.
pub fn facts(path: &Path) -> Result<FileFacts, CopyError> {
    open(path).map(|(_, facts)| facts)
}

/// Opens a regular file and takes its digest; the file stands at its beginning.
fn open(path: &Path) -> Result<(File, FileFacts), CopyError> {
    let unreadable = host(path, "read", "check its name and rights");
    // A pipe must not be waited for.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut file = File::options().read(true).custom_flags(flags).open(path).map_err(&unreadable)?;
    let metadata = file.metadata().map_err(&unreadable)?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
        return Err(host(path, "copied", "name a regular file")(kind.into()));
    }
    let mut hash = Sha256::new();
    let mut bytes = 0_u64;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(piece.get(..count).unwrap_or_default());
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
    file.rewind().map_err(&unreadable)?;
    let facts =
        FileFacts { bytes, sha256: Sha256Digest(hash.finalize().into()), mode: metadata.mode() & 0o777 };
    Ok((file, facts))
}

/// Copies a file into the machine, and waits until it is there. The machine's file has
/// the permission bits of the host's, or `mode`.
///
/// # Errors
/// Everything that can go wrong on both sides.
pub fn copy_in(
    session: &Session,
    from: &Path,
    to: &[u8],
    mode: Option<u32>,
    owner: Option<User>,
    root: &Root,
) -> Result<FileFacts, CopyError> {
    let (file, facts) = open(from)?;
    let FileFacts { bytes, sha256, mode: own } = facts;
    let mode = mode.unwrap_or(own);
    let spec = PutSpec { path: to.to_owned(), mode, owner, root: root.clone(), bytes, sha256: sha256.0 };
    let stdio = Stdio {
        stdin: Stdin::Reader(Box::new(file.take(bytes))),
        stdout: Box::new(io::sink()),
        stderr: Box::new(io::sink()),
    };
    let outcome = session.put(spec, stdio)?.wait()?;
    if let Some(error) = outcome.stdin_error {
        return Err(host(from, "read", "check its disk")(error));
    }
    let copied = concluded(outcome.status)?;
    if copied.sha256 != sha256.0 || copied.bytes != bytes {
        let there = Sha256Digest(copied.sha256);
        return Err(CopyError::Damaged { path: from.to_owned(), there, here: sha256 });
    }
    Ok(facts)
}

fn concluded(status: Status) -> Result<Transferred, CopyError> {
    match status {
        Status::Transferred(file) => Ok(file),
        Status::NotFound(message) => Err(CopyError::Missing(message)),
        status => Err(CopyError::Guest(status.message().unwrap_or("the guest did not copy it").to_owned())),
    }
}

/// A file of the host that is to come from a machine. Without [`Arrival::commit`] nothing is left of it.
#[derive(Debug)]
pub struct Arrival {
    to: PathBuf,
    temporary: PathBuf,
    /// Gone once the file has its name.
    file: Option<File>,
    facts: Option<FileFacts>,
}

impl Arrival {
    /// Makes sure that there is a place for the file. What is there already stays until [`Arrival::commit`].
    ///
    /// # Errors
    /// The folder is not there or cannot be written.
    pub fn prepare(to: &Path) -> Result<Self, CopyError> {
        let unwritable = host(to, "written", "give another place");
        let name = to.file_name().filter(|_| !to.is_dir());
        let name = name.ok_or_else(|| unwritable(io::ErrorKind::IsADirectory.into()))?;
        let mut beside = std::ffi::OsString::from(".");
        beside.push(name);
        beside.push(format!(".{}", crate::store::random_word()));
        let temporary = to.with_file_name(beside);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(unwritable)?;
        Ok(Self { to: to.to_owned(), temporary, file: Some(file), facts: None })
    }

    /// Copies a file of the machine, and waits until it is on the disk, still without its name.
    ///
    /// # Errors
    /// [`CopyError::Missing`], and everything else that can go wrong on both sides.
    pub fn fetch(
        &mut self,
        session: &Session,
        from: &[u8],
        root: &Root,
        max_bytes: u64,
    ) -> Result<FileFacts, CopyError> {
        let unwritable = host(&self.to, "written", "make room, or give another place");
        let Some(file) = &self.file else { return Err(unwritable(io::ErrorKind::NotFound.into())) };
        let file = file.try_clone().map_err(&unwritable)?;
        let taken = Arc::new(Mutex::new(Taken { hash: Sha256::new(), bytes: 0, max_bytes }));
        let sink = Sink { file, taken: Arc::clone(&taken) };
        let stdio = Stdio { stdin: Stdin::Empty, stdout: Box::new(sink), stderr: Box::new(io::sink()) };
        let spec = GetSpec { path: from.to_owned(), root: root.clone(), max_bytes };
        let outcome = session.get(spec, stdio)?.wait()?;
        if let Some(error) = outcome.stdout_error {
            return Err(unwritable(error));
        }
        let copied = concluded(outcome.status)?;
        let taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let here = Sha256Digest(taken.hash.clone().finalize().into());
        if here.0 != copied.sha256 || taken.bytes != copied.bytes {
            let there = Sha256Digest(copied.sha256);
            return Err(CopyError::Damaged { path: self.to.clone(), there, here });
        }
        // Its own rights, but nobody becomes another user by it, and the owner can read it.
        let mode = copied.mode & 0o755 | 0o600;
        if let Some(file) = &self.file {
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(&unwritable)?;
            file.sync_all().map_err(&unwritable)?;
        }
        let facts = FileFacts { bytes: copied.bytes, sha256: here, mode };
        self.facts = Some(facts);
        Ok(facts)
    }

    /// Gives the file its name, in place of what is there. `None`: nothing was fetched, and what is there stays.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn commit(mut self) -> Result<Option<FileFacts>, CopyError> {
        let Some(facts) = self.facts else { return Ok(None) };
        let unwritable = host(&self.to, "written", "give another place");
        fs::rename(&self.temporary, &self.to).map_err(&unwritable)?;
        self.file = None;
        sync_folder(&self.to).map_err(&unwritable)?;
        Ok(Some(facts))
    }

    /// Where it comes to be.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.to
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // It has never had its name, and nobody looks for it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Makes the names in a file's folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// What has come of a file so far.
struct Taken {
    hash: Sha256,
    bytes: u64,
    max_bytes: u64,
}

struct Sink {
    file: File,
    taken: Arc<Mutex<Taken>>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // The agent was told so, and is not to be trusted.
        if taken.bytes.saturating_add(bytes.len() as u64) > taken.max_bytes {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the guest sends more than is taken"));
        }
        let count = self.file.write(bytes)?;
        taken.hash.update(bytes.get(..count).unwrap_or_default());
        taken.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_64_digits_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "abc").unwrap();
        let found = facts(&path).unwrap();
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((found.bytes, found.sha256.to_string().as_str()), (3, text));
        assert_eq!(text.parse::<Sha256Digest>(), Ok(found.sha256));
        for wrong in [&text[1..], &text.to_uppercase(), &text.replace('b', "é"), ""] {
            assert!(wrong.parse::<Sha256Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_file_or_has_no_place_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let said = |result: Result<FileFacts, CopyError>| result.unwrap_err().to_string();
        assert!(said(facts(folder.path())).contains("name a regular file"));
        assert!(said(facts(&folder.path().join("none"))).contains("check its name and rights"));
        let pipe = folder.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(said(facts(&pipe)).contains("name a regular file"));
        assert!(Arrival::prepare(&folder.path().join("no/such/place")).is_err());
        assert!(Arrival::prepare(folder.path()).is_err());
    }

    #[test]
    fn an_arrival_that_is_given_up_leaves_nothing_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "before").unwrap();
        drop(Arrival::prepare(&path).unwrap());
        assert_eq!(Arrival::prepare(&path).unwrap().commit().unwrap(), None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
