//! The machines of one user: a directory with a folder for each.
//!
//! ```text
//! ROOT/               mode 0700, owned by the user
//!   lock              held while a folder is made, removed or cleaned
//!   <id>/             one machine; other names are folders in the making or on their way out
//!     lock            held by the monitor for as long as it lives
//!     machine.json    MachineRecord
//!     started         there from when the machine really runs
//!     exit.json       ExitRecord; empty until the end, with its room reserved
//!     control.sock    the control socket
//!     monitor.log     what the monitor itself says
//!     stdout.log, stderr.log, times.log    what the command prints (see crate::output)
//!   images/             what clones are made of (see crate::image)
//! ```
//!
//! A folder whose lock is free and whose exit record is empty belonged to a monitor that was killed. Such a machine is
//! [`Life::Lost`] if it has run, and is removed if it never did or was to be removed at its end.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FallocateFlags;

use crate::name::{MachineId, MachineName, is_id_prefix};
use crate::record::{self, ExitRecord, MachineRecord, RECORD_VERSION};
use crate::start::Claim;
use crate::time::unix_ms;

pub(crate) const LOCK: &str = "lock";
const MACHINE: &str = "machine.json";
const STARTED: &str = "started";
const EXIT: &str = "exit.json";
const SOCKET: &str = "control.sock";
const MONITOR_LOG: &str = "monitor.log";
/// Bytes that are kept free for an exit record, also when the disk is full.
pub(crate) const EXIT_ROOM: u64 = 4096;
/// Folders in the making, and on their way out.
const NEW_PREFIX: &str = ".new-";
const OLD_PREFIX: &str = ".old-";

/// Why a registry, or a machine in it, is not to be had. Each is one line for people.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The directory.
    #[error("the directory of machines '{}' cannot be used ({source}): give another with HARRIER_RUNTIME_DIR", .path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Somebody else could write to it.
    #[error("the directory of machines '{}' is not private ({why}): give another with HARRIER_RUNTIME_DIR", .path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The name is taken.
    #[error("there is a machine '{0}' already: give another name, or remove it with 'harrier rm {0}'")]
    NameTaken(MachineName),
    /// No such machine.
    #[error("there is no machine '{0}': 'harrier ps -a' lists them")]
    NotFound(String),
    /// Several ids begin so.
    #[error("'{0}' begins the ids of {1} machines: give more of it")]
    Ambiguous(String, usize),
    /// It runs.
    #[error("machine '{0}' runs: stop it first, or remove it with --force")]
    Alive(MachineName),
    /// A file in a machine's folder.
    #[error("machine '{name}': '{file}' cannot be {action} ({source})")]
    File {
        /// The machine.
        name: String,
        /// The file.
        file: &'static str,
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

/// What a new machine is to be.
#[derive(Debug, Clone, Default)]
pub struct NewMachine {
    /// `None` makes one up.
    pub name: Option<MachineName>,
    /// See [`MachineRecord::command`].
    pub command: Vec<String>,
    /// See [`MachineRecord::detached`].
    pub detached: bool,
    /// See [`MachineRecord::auto_remove`].
    pub auto_remove: bool,
}

/// The paths in a machine's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFolder(PathBuf);

impl MachineFolder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join(SOCKET)
    }

    /// What the monitor itself has said.
    #[must_use]
    pub fn monitor_log(&self) -> PathBuf {
        self.0.join(MONITOR_LOG)
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.0.join(LOCK)
    }

    pub(crate) fn exit(&self) -> PathBuf {
        self.0.join(EXIT)
    }

    pub(crate) fn record(&self) -> io::Result<MachineRecord> {
        let record: MachineRecord = record::read(&self.0.join(MACHINE))?;
        if record.version == RECORD_VERSION {
            Ok(record)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("its version is {}", record.version)))
        }
    }

    pub(crate) fn mark_started(&self) -> io::Result<()> {
        File::create(self.0.join(STARTED)).map(drop)
    }

    fn has_started(&self) -> bool {
        self.0.join(STARTED).exists()
    }

    /// Whether the monitor holds the lock.
    fn is_locked(&self) -> io::Result<bool> {
        let file = File::open(self.lock())?;
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(err)) => Err(err),
        }
    }

    fn life(&self) -> io::Result<Life> {
        // The lock first: what a monitor writes at its end is there before it lets go.
        if self.is_locked()? {
            return Ok(Life::Alive);
        }
        Ok(record::read(&self.exit()).map_or(Life::Lost, Life::Ended))
    }
}

/// How it stands with a machine's monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// It lives; the control socket knows more.
    Alive,
    /// It has ended, and said how.
    Ended(ExitRecord),
    /// It was killed, or the host went down under it.
    Lost,
}

/// A machine of the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What is known from its beginning.
    pub record: MachineRecord,
    /// Where its files are.
    pub folder: MachineFolder,
    /// As of the moment when it was looked up.
    pub life: Life,
}

impl Entry {
    fn read(folder: MachineFolder) -> io::Result<Self> {
        let record = folder.record()?;
        let life = folder.life()?;
        Ok(Self { record, folder, life })
    }

    /// Whether nothing about it is to be kept: it never ran, or was to be removed at its end.
    fn is_debris(&self) -> bool {
        match self.life {
            Life::Alive => false,
            Life::Ended(_) => self.record.auto_remove,
            Life::Lost => self.record.auto_remove || !self.folder.has_started(),
        }
    }

    /// Whether the monitor lives at this moment.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.folder.is_locked().unwrap_or(false)
    }

    /// Whether the command prints no more: the end is recorded, or the monitor is gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        record::read::<ExitRecord>(&self.folder.exit()).is_ok() || !self.folder.is_locked().unwrap_or(false)
    }

    /// Waits until the monitor has ended, and says how; for ever if that is how long it lives. Also right for a machine
    /// that is removed at its end.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] if it has been removed meanwhile, [`RegistryError::File`] otherwise.
    pub fn wait(&self) -> Result<Life, RegistryError> {
        self.wait_within(None)?.ok_or_else(|| RegistryError::NotFound(self.record.name.to_string()))
    }

    /// The same, but no longer than `limit`; `None` if the monitor still lives then.
    ///
    /// # Errors
    /// As [`Entry::wait`].
    pub fn wait_within(&self, limit: Option<Duration>) -> Result<Option<Life>, RegistryError> {
        let error = |file: &'static str| {
            move |source: io::Error| match source.kind() {
                io::ErrorKind::NotFound => RegistryError::NotFound(self.record.name.to_string()),
                _ => RegistryError::File { name: self.record.name.to_string(), file, action: "read", source },
            }
        };
        // Opened before the end: an open file outlives its removal.
        let exit = File::open(self.folder.exit()).map_err(error(EXIT))?;
        let lock = File::open(self.folder.lock()).map_err(error(LOCK))?;
        match limit {
            None => lock.lock_shared().map_err(error(LOCK))?,
            Some(limit) => {
                let (done, ended) = std::sync::mpsc::channel();
                // A lock has no timeout. The thread that waits for it ends with the monitor or with this process.
                let thread = std::thread::Builder::new().name("wait".to_owned()).spawn(move || {
                    let _ = done.send(lock.lock_shared());
                });
                thread.map_err(error(LOCK))?;
                match ended.recv_timeout(limit) {
                    Ok(result) => result.map_err(error(LOCK))?,
                    Err(_) => return Ok(None),
                }
            }
        }
        Ok(Some(record::parse(exit).map_or(Life::Lost, Life::Ended)))
    }
}

/// The directory of one user's machines.
#[derive(Debug, Clone)]
pub struct Registry {
    root: PathBuf,
}

impl Registry {
    /// Opens the directory and makes it if it is not there, with the folders above it.
    ///
    /// # Errors
    /// [`RegistryError::Root`] if it cannot be made, [`RegistryError::NotPrivate`] if others may write to it.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, RegistryError> {
        let root = root.into();
        let error = |source| RegistryError::Root { path: root.clone(), source };
        let root =
            if root.is_absolute() { root } else { std::env::current_dir().map_err(error)?.join(&root) };
        let error = |source| RegistryError::Root { path: root.clone(), source };
        match DirBuilder::new().mode(0o700).recursive(true).create(&root) {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            Err(err) => return Err(error(err)),
        }
        let metadata = fs::symlink_metadata(&root).map_err(error)?;
        let why = if !metadata.is_dir() {
            Some("it is not a directory")
        } else if metadata.uid() != rustix::process::geteuid().as_raw() {
            Some("it belongs to another user")
        } else if metadata.mode() & 0o077 != 0 {
            Some("its mode lets others in: chmod 700 it")
        } else {
            None
        };
        match why {
            Some(why) => Err(RegistryError::NotPrivate { path: root, why }),
            None => Ok(Self { root }),
        }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the folder of a new machine, whose lock the answer holds.
    ///
    /// # Errors
    /// [`RegistryError::NameTaken`], or what the host said.
    pub fn create(&self, new: NewMachine) -> Result<Claim, RegistryError> {
        let _guard = self.guard()?;
        let entries = self.entries()?;
        let taken = |name: &str| entries.iter().any(|entry| entry.record.name.as_str() == name);
        let name = match new.name {
            Some(name) if taken(name.as_str()) => return Err(RegistryError::NameTaken(name)),
            Some(name) => name,
            None => MachineName::generate(taken),
        };
        let id = loop {
            let id = MachineId::generate();
            if !self.root.join(id.as_str()).exists() {
                break id;
            }
        };
        let record = MachineRecord {
            version: RECORD_VERSION,
            id: id.clone(),
            name,
            created_ms: unix_ms(),
            command: new.command,
            detached: new.detached,
            auto_remove: new.auto_remove,
        };
        let making = self.root.join(format!("{NEW_PREFIX}{id}"));
        let made = make_folder(&making, &record).and_then(|lock| {
            let folder = self.root.join(id.as_str());
            fs::rename(&making, &folder)?;
            Ok((MachineFolder(folder), lock))
        });
        match made {
            Ok((folder, lock)) => Ok(Claim::new(self.clone(), folder, record, lock)),
            Err(source) => {
                // What could not be made is not kept; the next look cleans up what cannot be removed now.
                let _ = fs::remove_dir_all(&making);
                Err(RegistryError::Root { path: self.root.clone(), source })
            }
        }
    }

    /// All machines, the newest first. What killed monitors have left is cleaned up.
    ///
    /// # Errors
    /// [`RegistryError::Root`] if the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, RegistryError> {
        let mut entries = self.entries()?;
        if entries.iter().any(Entry::is_debris) || self.has_hidden()? || self.has_images() {
            let _guard = self.guard()?;
            self.sweep_images();
            entries = self.entries()?;
            for entry in entries.iter().filter(|entry| entry.is_debris()) {
                log::debug!("machine '{}': its monitor is gone and left its files", entry.record.name);
                if let Err(err) = self.delete(&entry.folder) {
                    log::debug!("machine '{}': {err}", entry.record.name);
                }
            }
            entries.retain(|entry| !entry.is_debris());
        }
        for entry in entries.iter().filter(|entry| entry.life == Life::Lost) {
            // Nobody answers there.
            let _ = fs::remove_file(entry.folder.socket());
        }
        entries.sort_by(|a, b| (b.record.created_ms, &b.record.id).cmp(&(a.record.created_ms, &a.record.id)));
        Ok(entries)
    }

    /// The machine of this id or name, or else the one whose id begins so.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::Ambiguous`].
    pub fn find(&self, text: &str) -> Result<Entry, RegistryError> {
        let entries = self.list()?;
        let not_found = || RegistryError::NotFound(text.to_owned());
        let exact = entries.iter().find(|entry| entry.record.id.as_str() == text);
        let named = || entries.iter().find(|entry| entry.record.name.as_str() == text);
        if let Some(entry) = exact.or_else(named) {
            return Ok(entry.clone());
        }
        if !is_id_prefix(text) {
            return Err(not_found());
        }
        let mut begun = entries.iter().filter(|entry| entry.record.id.as_str().starts_with(text));
        match (begun.next(), begun.count()) {
            (None, _) => Err(not_found()),
            (Some(entry), 0) => Ok(entry.clone()),
            (Some(_), more) => Err(RegistryError::Ambiguous(text.to_owned(), more + 1)),
        }
    }

    /// Removes what is left of a machine that has ended.
    ///
    /// # Errors
    /// [`RegistryError::Alive`] if its monitor lives; [`RegistryError::NotFound`] if somebody else was faster.
    pub fn remove(&self, entry: &Entry) -> Result<(), RegistryError> {
        let _guard = self.guard()?;
        match entry.folder.is_locked() {
            Ok(false) => {}
            Ok(true) => return Err(RegistryError::Alive(entry.record.name.clone())),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::NotFound(entry.record.name.to_string()));
            }
            // Its lock cannot be looked at, so nobody holds it who could still write the rest.
            Err(err) => log::debug!("machine '{}': {err}", entry.record.name),
        }
        self.delete(&entry.folder).map_err(|source| RegistryError::File {
            name: entry.record.name.to_string(),
            file: "its folder",
            action: "removed",
            source,
        })
    }

    /// Removes a folder whose lock the caller holds: the monitor at its own end.
    pub(crate) fn remove_own(&self, folder: &MachineFolder) -> Result<(), RegistryError> {
        let _guard = self.guard()?;
        self.delete(folder).map_err(|source| RegistryError::Root { path: folder.0.clone(), source })
    }

    /// Out of sight in one step, then away.
    fn delete(&self, folder: &MachineFolder) -> io::Result<()> {
        let Some(name) = folder.0.file_name().and_then(|name| name.to_str()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let hidden = self.root.join(format!("{OLD_PREFIX}{name}"));
        match fs::rename(&folder.0, &hidden) {
            Ok(()) => fs::remove_dir_all(&hidden),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// Everything that is there, dead or alive. Folders of others, and ones that are just made or removed, are left out.
    fn entries(&self) -> Result<Vec<Entry>, RegistryError> {
        let error = |source| RegistryError::Root { path: self.root.clone(), source };
        let mut entries = Vec::new();
        for item in fs::read_dir(&self.root).map_err(error)? {
            let item = item.map_err(error)?;
            if item.file_name().to_str().is_none_or(|name| MachineId::parse(name).is_none()) {
                continue;
            }
            match Entry::read(MachineFolder(item.path())) {
                Ok(entry) => entries.push(entry),
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                Err(err) => log::warn!("'{}' is not the folder of a machine ({err})", item.path().display()),
            }
        }
        Ok(entries)
    }

    /// Whether something is half made or half removed, by somebody who works or was killed.
    fn has_hidden(&self) -> Result<bool, RegistryError> {
        let error = |source| RegistryError::Root { path: self.root.clone(), source };
        Ok(fs::read_dir(&self.root).map_err(error)?.flatten().any(|item| is_hidden(&item.file_name())))
    }

    /// Holds the registry's lock, and removes what others had to leave half made or half removed.
    pub(crate) fn guard(&self) -> Result<File, RegistryError> {
        let error = |source| RegistryError::Root { path: self.root.clone(), source };
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.root.join(LOCK))
            .map_err(error)?;
        lock.lock().map_err(error)?;
        for item in fs::read_dir(&self.root).map_err(error)?.flatten() {
            if is_hidden(&item.file_name()) {
                // If it cannot go now, it stays hidden.
                let _ = fs::remove_dir_all(item.path());
            }
        }
        Ok(lock)
    }
}

fn is_hidden(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with(NEW_PREFIX) || name.starts_with(OLD_PREFIX)
}

fn make_folder(path: &Path, record: &MachineRecord) -> io::Result<File> {
    DirBuilder::new().mode(0o700).create(path)?;
    let create = |name: &str| {
        File::options().read(true).write(true).create_new(true).mode(0o600).open(path.join(name))
    };
    let lock = create(LOCK)?;
    lock.try_lock()?;
    let exit = create(EXIT)?;
    match rustix::fs::fallocate(&exit, FallocateFlags::KEEP_SIZE, 0, EXIT_ROOM) {
        // Some file systems cannot reserve.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    record::write(path, MACHINE, record)?;
    Ok(lock)
}
