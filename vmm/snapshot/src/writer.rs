//! Writing: everything goes to a folder with a temporary name, becomes durable, and only then gets its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use sha2::{Digest, Sha256};

use crate::error::{SnapshotError, host};
use crate::id::{Checksum, SnapshotId};
use crate::layer::next_data;
use crate::manifest::{self, FileEntry, Manifest, MemoryEntry, ParentEntry, SectionEntry};
use crate::memory::{self, MemoryWriter};
use crate::snapshot::{STATE_FILE, STATE_HEADER_BYTES, state_header};
use crate::{PageKind, Snapshot, store};

/// A part of a machine's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name: lower-case letters, digits, `-` and `.`.
    pub name: String,
    /// Version of its content.
    pub version: u32,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// How far a snapshot has come; each is told when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The temporary folder is there.
    Created,
    /// Memory and its checksums are written and durable.
    Memory,
    /// The sections are.
    State,
    /// All further files are.
    Files,
    /// The table of contents is.
    Manifest,
    /// The folder has its name.
    Renamed,
    /// The name is durable.
    Done,
}

type Watch<'a> = Box<dyn FnMut(Step) + Send + 'a>;

/// A snapshot in the making. Dropped before [`SnapshotWriter::commit`], it leaves nothing behind.
pub struct SnapshotWriter<'a> {
    target: PathBuf,
    folder: PathBuf,
    partial: PathBuf,
    /// Held as long as the temporary folder is somebody's.
    _lock: File,
    id: SnapshotId,
    parent: Option<ParentEntry>,
    memory: Option<MemoryEntry>,
    sections: Vec<Section>,
    /// Further files, by name.
    files: Vec<(String, File)>,
    producer: String,
    watch: Watch<'a>,
    durable: bool,
    /// Pages and further files get checksums.
    checked: bool,
    compressed: bool,
    /// When the snapshot that is replaced was taken.
    replaces: Option<u64>,
    finished: bool,
}

impl<'a> SnapshotWriter<'a> {
    /// Begins a snapshot that will be the folder `target`, a difference if there is a `parent`. What dead writers
    /// left in the same place is removed.
    ///
    /// # Errors
    /// The target exists, cannot be written, or does not stand beside the parent.
    pub fn create(target: &Path, parent: Option<&Snapshot>, producer: &str) -> Result<Self, SnapshotError> {
        let no_name = || SnapshotError::NoName(target.to_owned());
        let name = target.file_name().ok_or_else(no_name)?.to_str().ok_or_else(no_name)?;
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = folder.canonicalize().map_err(host("find the folder of", target))?;
        let target = folder.join(name);
        if target.symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists(target));
        }
        let parent = match parent {
            None => None,
            Some(parent) => {
                let at = parent.path().canonicalize().map_err(host("find", parent.path()))?;
                if at.parent() != Some(&folder) {
                    return Err(SnapshotError::NotBesideParent { parent: at });
                }
                let name = at.file_name().and_then(|name| name.to_str()).ok_or_else(no_name)?;
                Some(ParentEntry { id: parent.manifest().id, name: name.to_owned() })
            }
        };
        if let Err(error) = store::sweep(&folder) {
            log::debug!("snapshot: {error}");
        }
        let id = SnapshotId::random().map_err(host("name", &target))?;
        let (partial, lock) = store::create_partial(&folder, id)?;
        Ok(SnapshotWriter {
            target,
            folder,
            partial,
            _lock: lock,
            id,
            parent,
            memory: None,
            sections: Vec::new(),
            files: Vec::new(),
            producer: producer.to_owned(),
            watch: Box::new(|_| ()),
            durable: true,
            checked: true,
            compressed: false,
            replaces: None,
            finished: false,
        })
    }

    /// Begins a full snapshot that will take the place of `snapshot`, with its id. Its memory and sections are to be
    /// written anew; files that stay are linked.
    ///
    /// # Errors
    /// The folder that it is in cannot be written.
    pub(crate) fn replacing(snapshot: &Snapshot) -> Result<Self, SnapshotError> {
        let target = snapshot.path().canonicalize().map_err(host("find", snapshot.path()))?;
        let folder = target.parent().ok_or_else(|| SnapshotError::NoName(target.clone()))?.to_owned();
        let manifest = snapshot.manifest();
        let name = SnapshotId::random().map_err(host("name", &target))?;
        let (partial, lock) = store::create_partial(&folder, name)?;
        Ok(SnapshotWriter {
            target,
            folder,
            partial,
            _lock: lock,
            id: manifest.id,
            parent: None,
            memory: None,
            sections: Vec::new(),
            files: Vec::new(),
            producer: manifest.producer.clone(),
            watch: Box::new(|_| ()),
            durable: true,
            checked: true,
            compressed: snapshot.manifest().memory.compression.is_some(),
            replaces: Some(manifest.created_ms),
            finished: false,
        })
    }

    /// Takes over a file of the snapshot that is replaced.
    pub(crate) fn link_file(&mut self, name: &str) -> Result<(), SnapshotError> {
        let path = self.partial.join(name);
        fs::hard_link(self.target.join(name), &path).map_err(host("link", &path))?;
        let file = File::open(&path).map_err(host("open", &path))?;
        self.files.push((name.to_owned(), file));
        Ok(())
    }

    /// Has every step told to `watch`.
    #[must_use]
    pub fn watched_by(mut self, mut watch: impl FnMut(Step) + Send + 'a) -> Self {
        watch(Step::Created);
        self.watch = Box::new(watch);
        self
    }

    /// For a snapshot that does not outlive the host: nothing is made durable.
    #[must_use]
    pub fn fleeting(mut self) -> Self {
        self.durable = false;
        self
    }

    /// For a snapshot that machines of this host are made of at once and nobody keeps: what makes a checksum cost as much as
    /// there is of memory and disks has none, and would not pass [`verify`](crate::verify).
    #[must_use]
    pub fn unchecked(mut self) -> Self {
        self.checked = false;
        self
    }

    /// Has memory compressed; to be called before [`SnapshotWriter::memory`].
    #[must_use]
    pub fn compressed(mut self, compressed: bool) -> Self {
        self.compressed = compressed;
        self
    }

    /// The snapshot's id.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    fn file(&self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.partial.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        Ok((file.map_err(host("create", &path))?, path))
    }

    /// Begins the memory file, for so many pages. Those that are never written are zero, or the parent's.
    ///
    /// # Errors
    /// The host's, or there are too many pages.
    pub fn memory(&self, pages: u64) -> Result<MemoryWriter, SnapshotError> {
        if pages > manifest::MAX_PAGES {
            let bytes = pages.saturating_mul(crate::PAGE_BYTES as u64);
            let limit = manifest::MAX_PAGES * crate::PAGE_BYTES as u64;
            return Err(SnapshotError::TooLarge { what: "memory".to_owned(), bytes, limit });
        }
        let packed = if self.compressed { Some(self.file(memory::FILE)?.0) } else { None };
        let (file, path) = self.file(if packed.is_some() { memory::RAW_FILE } else { memory::FILE })?;
        let others = if self.parent.is_some() { PageKind::Parent } else { PageKind::Zero };
        MemoryWriter::new(file, path, pages, others, packed)
    }

    /// Finishes the memory file.
    ///
    /// # Errors
    /// The host's.
    pub fn finish_memory(&mut self, memory: MemoryWriter) -> Result<(), SnapshotError> {
        self.memory = Some(memory.finish(self.id, self.durable, self.checked)?);
        (self.watch)(Step::Memory);
        Ok(())
    }

    /// Adds a section.
    pub fn add_section(&mut self, section: Section) {
        self.sections.push(section);
    }

    /// Creates a further file of the snapshot, to be filled before [`SnapshotWriter::commit`].
    ///
    /// # Errors
    /// The host's.
    pub fn create_file(&mut self, name: &str) -> Result<File, SnapshotError> {
        let (file, path) = self.file(name)?;
        let handle = file.try_clone().map_err(host("create", &path))?;
        self.files.push((name.to_owned(), file));
        Ok(handle)
    }

    /// Makes the further files durable.
    fn finish_files(&mut self) -> Result<Vec<FileEntry>, SnapshotError> {
        let mut entries = Vec::new();
        for (name, file) in std::mem::take(&mut self.files) {
            let path = self.partial.join(&name);
            let (bytes, sha256) = if self.checked {
                file_checksum(&file).map_err(host("read", &path))?
            } else {
                (file.metadata().map_err(host("read", &path))?.len(), Checksum([0; 32]))
            };
            self.sync(&file).map_err(host("write", &path))?;
            entries.push(FileEntry { name, bytes, sha256 });
        }
        Ok(entries)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        if self.durable { file.sync_all() } else { Ok(()) }
    }

    fn write_state(&self) -> Result<(u64, Vec<SectionEntry>), SnapshotError> {
        let (mut file, path) = self.file(STATE_FILE)?;
        let mut bytes = state_header(self.id).to_vec();
        let mut entries = Vec::new();
        for section in &self.sections {
            entries.push(SectionEntry {
                name: section.name.clone(),
                version: section.version,
                offset: bytes.len() as u64,
                bytes: section.bytes.len() as u64,
                sha256: Checksum::of(&section.bytes),
            });
            bytes.extend_from_slice(&section.bytes);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        debug_assert!(bytes.len() as u64 >= STATE_HEADER_BYTES);
        file.write_all(&bytes).and_then(|()| self.sync(&file)).map_err(host("write", &path))?;
        Ok((bytes.len() as u64, entries))
    }

    /// Finishes the snapshot: when this returns, it is there and durable.
    ///
    /// # Errors
    /// The host's; then there is nothing.
    pub fn commit(mut self) -> Result<Snapshot, SnapshotError> {
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => self.memory(0)?.finish(self.id, self.durable, self.checked)?,
        };
        let (state_bytes, sections) = self.write_state()?;
        (self.watch)(Step::State);
        let files = self.finish_files()?;
        (self.watch)(Step::Files);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Manifest {
            id: self.id,
            parent: self.parent.take(),
            created_ms: self
                .replaces
                .unwrap_or_else(|| u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)),
            producer: std::mem::take(&mut self.producer),
            state_bytes,
            sections,
            memory,
            files,
        };
        let bytes = manifest.encode();
        // What cannot be read back must not be called a snapshot.
        Manifest::decode(&self.target, &bytes)?;
        let (mut file, path) = self.file(manifest::FILE)?;
        file.write_all(&bytes).and_then(|()| self.sync(&file)).map_err(host("write", &path))?;
        self.seal()?;
        (self.watch)(Step::Manifest);
        let how = if self.replaces.is_some() { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        renameat_with(CWD, &self.partial, CWD, &self.target, how).map_err(|errno| match errno {
            rustix::io::Errno::EXIST => SnapshotError::Exists(self.target.clone()),
            other => host("name", &self.target)(other.into()),
        })?;
        self.finished = true;
        (self.watch)(Step::Renamed);
        self.sync_folder(&self.folder)?;
        if self.replaces.is_some()
            && let Err(error) = fs::remove_dir_all(&self.partial)
        {
            // The name of a writer that is dead: the next one removes it.
            log::debug!("snapshot: '{}' is left behind: {error}", self.partial.display());
        }
        (self.watch)(Step::Done);
        Snapshot::open(&self.target)
    }

    /// Makes all files read-only and the folder durable.
    fn seal(&self) -> Result<(), SnapshotError> {
        for entry in fs::read_dir(&self.partial).map_err(host("read", &self.partial))? {
            let path = entry.map_err(host("read", &self.partial))?.path();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).map_err(host("seal", &path))?;
        }
        self.sync_folder(&self.partial)
    }

    fn sync_folder(&self, folder: &Path) -> Result<(), SnapshotError> {
        File::open(folder).and_then(|folder| self.sync(&folder)).map_err(host("write", folder))
    }
}

/// Length and checksum of a whole file, of which holes are not read.
pub(crate) fn file_checksum(file: &File) -> io::Result<(u64, Checksum)> {
    use std::os::unix::fs::FileExt as _;
    let len = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; len.clamp(1, 1 << 20) as usize];
    let mut at = 0;
    while at < len {
        let data = next_data(file, at, len)?.unwrap_or(len..len);
        if at < data.start {
            buffer.fill(0);
        }
        while at < data.start {
            let hole = (data.start - at).min(buffer.len() as u64);
            hash.update(buffer.get(..hole as usize).unwrap_or_default());
            at += hole;
        }
        while at < data.end {
            let part = (data.end - at).min(buffer.len() as u64);
            let part = buffer.get_mut(..part as usize).unwrap_or_default();
            file.read_exact_at(part, at)?;
            hash.update(&*part);
            at += part.len() as u64;
        }
    }
    Ok((len, Checksum(hash.finalize().into())))
}

impl Drop for SnapshotWriter<'_> {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(&self.partial)
        {
            log::warn!("snapshot: '{}' is left behind: {error}", self.partial.display());
        }
    }
}
