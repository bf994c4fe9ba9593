//! A snapshot that is there.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{SnapshotError, host};
use crate::id::{Checksum, SnapshotId};
use crate::manifest::{self, FileEntry, Manifest, SectionEntry};
use crate::memory::MemoryImage;
use crate::writer::Section;

/// Name of the file with the sections.
pub(crate) const STATE_FILE: &str = "state";
/// Where the first section begins at the earliest.
pub(crate) const STATE_HEADER_BYTES: u64 = 32;
const STATE_MAGIC: [u8; 8] = *b"HARRSTA\n";
const STATE_VERSION: u32 = 1;
/// Sections are not longer than this in all, in bytes.
pub(crate) const MAX_STATE_BYTES: u64 = 256 << 20;

/// Magic, version, four zero bytes, id.
pub(crate) fn state_header(id: SnapshotId) -> [u8; STATE_HEADER_BYTES as usize] {
    let mut bytes = [0; STATE_HEADER_BYTES as usize];
    let fields: [(usize, &[u8]); 3] = [(0, &STATE_MAGIC), (8, &STATE_VERSION.to_le_bytes()), (16, &id.0)];
    for (offset, field) in fields {
        for (to, from) in bytes.iter_mut().skip(offset).zip(field) {
            *to = *from;
        }
    }
    bytes
}

/// An open snapshot: its table of contents is read and checked, the rest is when it is asked for.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    manifest: Manifest,
    state: File,
}

impl Snapshot {
    /// Opens the snapshot in the folder `path`.
    ///
    /// # Errors
    /// It is none, of an unknown version, or its table of contents or a file's length is wrong.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let manifest_path = path.join(manifest::FILE);
        let none = |reason: String| SnapshotError::NotASnapshot { path: path.to_owned(), reason };
        let file = match File::open(&manifest_path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(none(if path.is_dir() {
                    format!("it has no {}", manifest::FILE)
                } else {
                    "there is no such folder".to_owned()
                }));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
                return Err(none("it is no folder".to_owned()));
            }
            Err(error) => return Err(host("open", &manifest_path)(error)),
        };
        // One more than there is, so that the end is seen by the first read.
        let len = file.metadata().map_err(host("read", &manifest_path))?.len().min(manifest::MAX_BYTES) + 1;
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(manifest::MAX_BYTES + 1).read_to_end(&mut bytes).map_err(host("read", &manifest_path))?;
        if bytes.len() as u64 > manifest::MAX_BYTES {
            return Err(none(format!("{} is longer than {} bytes", manifest::FILE, manifest::MAX_BYTES)));
        }
        let manifest = Manifest::decode(path, &bytes)?;
        let state_path = path.join(STATE_FILE);
        let state = File::open(&state_path).map_err(host("open", &state_path))?;
        let snapshot = Snapshot { path: path.to_owned(), manifest, state };
        snapshot.check_state(&state_path)?;
        Ok(snapshot)
    }

    fn check_state(&self, path: &Path) -> Result<(), SnapshotError> {
        let len = self.state.metadata().map_err(host("read", path))?.len();
        if len != self.manifest.state_bytes || len > MAX_STATE_BYTES {
            let wanted = self.manifest.state_bytes;
            return Err(self.damaged(STATE_FILE, len, format!("it has {len} bytes instead of {wanted}")));
        }
        let mut header = [0; STATE_HEADER_BYTES as usize];
        self.state
            .read_exact_at(&mut header, 0)
            .map_err(|_| self.damaged(STATE_FILE, len, "it is shorter than its header".to_owned()))?;
        if header != state_header(self.manifest.id) {
            return Err(self.damaged(STATE_FILE, 0, "it belongs to another snapshot".to_owned()));
        }
        Ok(())
    }

    pub(crate) fn damaged(&self, part: &str, offset: u64, reason: String) -> SnapshotError {
        SnapshotError::Damaged { path: self.path.clone(), part: part.to_owned(), offset, reason }
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its table of contents.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// All sections, checked.
    ///
    /// # Errors
    /// One is damaged.
    pub fn sections(&self) -> Result<Vec<Section>, SnapshotError> {
        self.manifest.sections.iter().map(|entry| self.read_section(entry)).collect()
    }

    /// The section with this name, checked.
    ///
    /// # Errors
    /// It is not there, or damaged.
    pub fn section(&self, name: &str) -> Result<Section, SnapshotError> {
        let entry = self.manifest.sections.iter().find(|entry| entry.name == name).ok_or_else(|| {
            SnapshotError::MissingSection { path: self.path.clone(), name: name.to_owned() }
        })?;
        self.read_section(entry)
    }

    pub(crate) fn read_section(&self, entry: &SectionEntry) -> Result<Section, SnapshotError> {
        let part = || format!("section '{}'", entry.name);
        // The table was checked against the file's length, which is bounded.
        let mut bytes = vec![0; entry.bytes as usize];
        self.state
            .read_exact_at(&mut bytes, entry.offset)
            .map_err(|error| self.damaged(&part(), entry.offset, error.to_string()))?;
        if Checksum::of(&bytes) != entry.sha256 {
            return Err(self.damaged(&part(), entry.offset, "its checksum is another one".to_owned()));
        }
        Ok(Section { name: entry.name.clone(), version: entry.version, bytes })
    }

    /// Checks what lies between the sections and behind them: zeros, and nothing else.
    pub(crate) fn check_padding(&self) -> Result<(), SnapshotError> {
        let mut from = STATE_HEADER_BYTES;
        let ends = self.manifest.sections.iter().map(|entry| (entry.offset, entry.bytes));
        let mut buffer = [0; 4096];
        for (offset, bytes) in ends.chain([(self.manifest.state_bytes, 0)]) {
            while from < offset {
                let len = (offset - from).min(buffer.len() as u64);
                let part = buffer.get_mut(..len as usize).unwrap_or_default();
                self.state
                    .read_exact_at(part, from)
                    .map_err(|error| self.damaged(STATE_FILE, from, error.to_string()))?;
                if let Some(at) = part.iter().position(|byte| *byte != 0) {
                    let reason = "there is something between the sections".to_owned();
                    return Err(self.damaged(STATE_FILE, from + at as u64, reason));
                }
                from += len;
            }
            // The table was checked: it does not overflow.
            from = offset.saturating_add(bytes);
        }
        Ok(())
    }

    /// Guest memory: everything but the pages themselves is checked.
    ///
    /// # Errors
    /// The file is damaged, truncated, or another snapshot's.
    pub fn memory(&self) -> Result<MemoryImage, SnapshotError> {
        MemoryImage::open(&self.path, self.manifest.id, &self.manifest.memory)
    }

    /// Opens a further file, whose length is checked.
    ///
    /// # Errors
    /// It is not in the table of contents, not there, or has another length.
    pub fn file(&self, name: &str) -> Result<File, SnapshotError> {
        let entry = self.manifest.files.iter().find(|entry| entry.name == name).ok_or_else(|| {
            SnapshotError::MissingSection { path: self.path.clone(), name: name.to_owned() }
        })?;
        self.open_file(entry)
    }

    pub(crate) fn open_file(&self, entry: &FileEntry) -> Result<File, SnapshotError> {
        let path = self.path.join(&entry.name);
        let file = File::open(&path).map_err(host("open", &path))?;
        let len = file.metadata().map_err(host("read", &path))?.len();
        if len != entry.bytes {
            let wanted = entry.bytes;
            return Err(self.damaged(&entry.name, len, format!("it has {len} bytes instead of {wanted}")));
        }
        Ok(file)
    }
}
