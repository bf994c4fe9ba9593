//! Files of jobs, by their SHA-256: what jobs are given and what they leave. A file is there completely or not at all, and never
//! changes; two jobs with the same file share it. What comes from elsewhere comes in pieces into a hidden folder, and gets its
//! name once its digest is right.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{FilePiece, Result, Store, StoreError};
use crate::files::{self, FileFacts, Sha256Digest};

/// The longest piece that is read at once.
pub const MAX_PIECE: u64 = 1 << 20;
/// No file is longer.
const MAX_FILE: u64 = 1 << 44;
/// Where files are that are not complete.
const INCOMING: &str = ".incoming";
/// What has not grown for so long is nobody's any more.
const FORGOTTEN: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// The files below one folder.
#[derive(Debug)]
pub struct JobFiles {
    folder: PathBuf,
}

impl JobFiles {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where a file lies, or is to lie.
    pub fn path(&self, sha256: &Sha256Digest) -> PathBuf {
        let name = sha256.to_string();
        self.folder.join(name.get(..2).unwrap_or_default()).join(name)
    }

    /// Adds a piece; true once the whole file is there.
    pub(super) fn write(&self, piece: &FilePiece, bytes: &[u8]) -> Result<bool> {
        let path = self.path(&piece.sha256);
        if path.exists() {
            return Ok(true);
        }
        let end = piece.offset.checked_add(bytes.len() as u64).filter(|end| *end <= piece.bytes);
        let Some(end) = end.filter(|_| piece.bytes <= MAX_FILE) else {
            return Err(StoreError::Invalid(format!("file {} ends before this piece", piece.sha256)));
        };
        if bytes.is_empty() && piece.bytes > 0 {
            return Ok(false);
        }
        let incoming = self.folder.join(INCOMING).join(piece.sha256.to_string());
        let write = || -> io::Result<()> {
            if let Some(folder) = incoming.parent() {
                fs::create_dir_all(folder)?;
                sweep(folder);
            }
            let file = File::options().write(true).create(true).truncate(false).open(&incoming)?;
            file.write_all_at(bytes, piece.offset)
        };
        write().map_err(|err| file_error(&incoming, &err))?;
        if end < piece.bytes {
            return Ok(false);
        }
        // Another sender of the same file may have been quicker.
        let found = match files::facts(&incoming) {
            Err(_) if path.exists() => return Ok(true),
            found => found.map_err(|err| StoreError::Invalid(err.to_string()))?,
        };
        if found.bytes != piece.bytes || found.sha256 != piece.sha256 {
            // Whoever sends it begins anew.
            let _ = fs::remove_file(&incoming);
            return Err(StoreError::Invalid(format!(
                "file {} did not arrive as it was sent: send it again",
                piece.sha256
            )));
        }
        self.adopt(&incoming, &path).map_err(|err| file_error(&path, &err))?;
        Ok(true)
    }

    /// Gives a complete file its name, durably.
    fn adopt(&self, from: &Path, to: &Path) -> io::Result<()> {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        File::open(from)?.sync_all()?;
        fs::rename(from, to)?;
        files::sync_folder(to)
    }

    /// Reads a piece; nothing at the end of the file.
    pub(super) fn read(&self, sha256: &Sha256Digest, offset: u64, limit: u64) -> Result<Vec<u8>> {
        let path = self.path(sha256);
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(limit.min(MAX_PIECE)).unwrap_or(0)];
            let count = File::open(&path)?.read_at(&mut bytes, offset)?;
            bytes.truncate(count);
            Ok(bytes)
        };
        match read() {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::Invalid(format!("file {sha256} is not in the queue")))
            }
            bytes => bytes.map_err(|err| file_error(&path, &err)),
        }
    }
}

/// Removes what senders have left long ago.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|at| at.elapsed());
        if matches!(age, Ok(Ok(age)) if age > FORGOTTEN) {
            // Tried again with the next file.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn file_error(path: &Path, err: &io::Error) -> StoreError {
    match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::Full(path.display().to_string())
        }
        _ => StoreError::Failed(path.display().to_string(), err.to_string()),
    }
}

/// Puts a file of this host into a store, wherever that is. `facts` says what it has to be.
///
/// # Errors
/// The file cannot be read or is another one by now, or the store refuses it.
pub fn upload(store: &dyn Store, path: &Path, facts: &FileFacts) -> Result<()> {
    let FileFacts { bytes, sha256, .. } = *facts;
    let unreadable = |err: io::Error| StoreError::Failed(path.display().to_string(), err.to_string());
    let mut piece = FilePiece { sha256, bytes, offset: 0 };
    if store.write_file(&piece, &[])? {
        return Ok(());
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let mut buffer = vec![0; MAX_PIECE as usize];
    loop {
        let mut count = 0;
        while let Some(room) = buffer.get_mut(count..).filter(|room| !room.is_empty()) {
            match file.read(room) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(unreadable(err)),
            }
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        if count == 0 {
            return Err(StoreError::Invalid(format!(
                "'{}' has changed while it was copied: try again",
                path.display()
            )));
        }
        if store.write_file(&piece, bytes)? {
            return Ok(());
        }
        piece.offset += count as u64;
    }
}

/// Copies a file out of a store to `to`, which is there completely or not at all.
///
/// # Errors
/// The store has it not, or `to` cannot be written.
pub fn download(store: &dyn Store, facts: &FileFacts, to: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let unwritable = |err: io::Error| file_error(to, &err);
    let mut name = std::ffi::OsString::from(".");
    name.push(to.file_name().ok_or_else(|| unwritable(io::ErrorKind::InvalidInput.into()))?);
    name.push(format!(".{}", super::random_word()));
    let temporary = to.with_file_name(name);
    let copy = || -> Result<()> {
        let mut file = File::create(&temporary).map_err(unwritable)?;
        let mut hash = Sha256::new();
        let mut offset = 0;
        while offset < facts.bytes {
            let bytes = store.read_file(&facts.sha256, offset, MAX_PIECE)?;
            if bytes.is_empty() {
                break;
            }
            hash.update(&bytes);
            file.write_all(&bytes).map_err(unwritable)?;
            offset += bytes.len() as u64;
        }
        if Sha256Digest(hash.finalize().into()) != facts.sha256 {
            return Err(StoreError::Invalid(format!(
                "file {} is damaged in the queue: run the job again",
                facts.sha256
            )));
        }
        file.set_permissions(fs::Permissions::from_mode(facts.mode)).map_err(unwritable)?;
        file.sync_all().map_err(unwritable)?;
        fs::rename(&temporary, to).and_then(|()| files::sync_folder(to)).map_err(unwritable)
    };
    copy().inspect_err(|_| {
        // It has never had its name.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_in_pieces_and_is_there_once_its_digest_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let files = JobFiles::new(folder.path().join("files"));
        let source = folder.path().join("source");
        fs::write(&source, "0123456789").unwrap();
        let FileFacts { sha256, bytes, .. } = files::facts(&source).unwrap();
        let piece = |offset| FilePiece { sha256, bytes, offset };
        assert_eq!(files.write(&piece(0), b""), Ok(false));
        assert_eq!(files.write(&piece(0), b"01234"), Ok(false));
        assert!(files.read(&sha256, 0, 5).is_err(), "it is not complete");
        assert!(files.write(&piece(5), b"wrong").is_err());
        assert_eq!(files.write(&piece(0), b"01234"), Ok(false));
        assert_eq!(files.write(&piece(5), b"56789"), Ok(true));
        assert_eq!(files.write(&piece(0), b"anything"), Ok(true));
        assert_eq!(files.read(&sha256, 3, 4).as_deref(), Ok(b"3456".as_slice()));
        assert_eq!(files.read(&sha256, 10, 4).as_deref(), Ok(b"".as_slice()));
        assert!(
            files.write(&FilePiece { sha256: Sha256Digest([1; 32]), bytes: 4, offset: 2 }, b"abc").is_err()
        );
        assert_eq!(fs::read_dir(folder.path().join("files").join(INCOMING)).unwrap().count(), 0);
        // Nothing is a file as well.
        fs::write(&source, "").unwrap();
        let FileFacts { sha256, bytes, .. } = files::facts(&source).unwrap();
        assert_eq!(files.write(&FilePiece { sha256, bytes, offset: 0 }, b""), Ok(true));
    }
}
