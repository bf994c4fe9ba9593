//! Checkpoints in files: a folder a job, in it a folder a checkpoint, which is a snapshot as `harrier-snapshot` writes it.
//! A worker of this host writes there directly; what comes from elsewhere comes in pieces into a hidden folder, which gets
//! its name when the checkpoint is reported.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};

use super::{CheckpointData, CheckpointFile, CheckpointPiece, CheckpointQuery, Result, StoreError};
use crate::queue::{JobId, LeaseKey};

/// The longest piece that is read at once.
pub const MAX_PIECE: u64 = 4 << 20;
/// No file is longer.
const MAX_FILE: u64 = 1 << 44;
/// How the names of those begin that are not complete.
const INCOMING: &str = ".incoming-";

/// The folders below one folder.
#[derive(Debug)]
pub struct CheckpointFiles {
    folder: PathBuf,
}

impl CheckpointFiles {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The jobs that something lies here for.
    pub(super) fn jobs(&self) -> Vec<JobId> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    fn of_job(&self, job: JobId) -> PathBuf {
        self.folder.join(job.to_string())
    }

    /// Where a checkpoint of an attempt lies, or is to lie.
    pub fn path(&self, job: JobId, epoch: u64, number: u32) -> PathBuf {
        self.of_job(job).join(format!("{epoch}.{number}"))
    }

    fn incoming(&self, job: JobId, epoch: u64, number: u32) -> PathBuf {
        self.of_job(job).join(format!("{INCOMING}{epoch}.{number}"))
    }

    /// Adds a piece of a checkpoint that an attempt sends.
    pub(super) fn write(&self, key: &LeaseKey, piece: &CheckpointPiece, bytes: &[u8]) -> Result<()> {
        check_name(&piece.file)?;
        let end = piece.offset.checked_add(bytes.len() as u64);
        if piece.length > MAX_FILE || end.is_none_or(|end| end > piece.length) {
            return Err(StoreError::Invalid(format!("'{}' ends before this piece", piece.file)));
        }
        let folder = self.incoming(key.job, key.epoch, piece.number);
        let path = folder.join(&piece.file);
        let write = || -> io::Result<()> {
            fs::create_dir_all(&folder)?;
            let file = File::options().write(true).create(true).truncate(false).open(&path)?;
            if file.metadata()?.len() != piece.length {
                file.set_len(piece.length)?;
            }
            file.write_all_at(bytes, piece.offset)
        };
        write().map_err(|err| file_error(&path, &err))
    }

    /// Gives a checkpoint that has come in pieces its name, durably. One that lies there already is left as it is; none at
    /// all is an error.
    pub(super) fn complete(&self, job: JobId, epoch: u64, number: u32) -> Result<()> {
        let (incoming, path) = (self.incoming(job, epoch, number), self.path(job, epoch, number));
        let complete = || -> io::Result<()> {
            if !incoming.exists() {
                // Written by a worker of this host, which has done the rest.
                return fs::metadata(&path).map(drop);
            }
            for entry in fs::read_dir(&incoming)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&incoming)?.sync_all()?;
            if path.exists() {
                fs::remove_dir_all(&path)?;
            }
            fs::rename(&incoming, &path)?;
            File::open(self.of_job(job))?.sync_all()
        };
        complete().map_err(|err| file_error(&path, &err))
    }

    /// The files of a checkpoint.
    pub(super) fn files(&self, job: JobId, epoch: u64, number: u32) -> Result<Vec<CheckpointFile>> {
        let path = self.path(job, epoch, number);
        let read = || -> io::Result<Vec<CheckpointFile>> {
            let mut files = Vec::new();
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                if check_name(&name).is_ok() && entry.file_type()?.is_file() {
                    files.push(CheckpointFile { name, length: entry.metadata()?.len() });
                }
            }
            files.sort_by(|left, right| left.name.cmp(&right.name));
            Ok(files)
        };
        match read() {
            // Gone, which the worker has to know from an answer that says so.
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            files => files.map_err(|err| file_error(&path, &err)),
        }
    }

    /// The next data of a file at or after an offset; holes are passed over.
    pub(super) fn read(&self, query: &CheckpointQuery) -> Result<CheckpointData> {
        check_name(&query.file)?;
        let path = self.path(query.key.job, query.epoch, query.number).join(&query.file);
        let read = || -> io::Result<CheckpointData> {
            let file = File::open(&path)?;
            let Some((offset, count)) = next_data(&file, query.offset, query.limit.min(MAX_PIECE))? else {
                return Ok(CheckpointData { offset: file.metadata()?.len(), bytes: Vec::new() });
            };
            let mut bytes = vec![0; count];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(CheckpointData { offset, bytes })
        };
        read().map_err(|err| file_error(&path, &err))
    }

    /// Removes what a job does not need: everything but the checkpoints in `keep`, and what the present attempt is at. That
    /// is its attempt's number and the last checkpoint it has reported.
    pub(super) fn tidy(&self, job: JobId, keep: &[(u64, u32)], present: Option<(u64, u32)>) {
        let folder = self.of_job(job);
        if keep.is_empty() && present.is_none() {
            // Nobody goes on from anything here: not from what somebody has put beside the checkpoints either.
            match fs::remove_dir_all(&folder) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => {
                    log::warn!("checkpoints '{}' cannot be removed: {err}", folder.display());
                }
                _ => {}
            }
            return;
        }
        let Ok(entries) = fs::read_dir(&folder) else { return };
        // What dead writers have left; those that write still are not touched.
        let _ = harrier_snapshot::sweep(&folder);
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let complete = name.strip_prefix(INCOMING).unwrap_or(&name);
            let place = complete
                .split_once('.')
                .and_then(|(epoch, number)| epoch.parse::<u64>().ok().zip(number.parse::<u32>().ok()));
            let Some((epoch, number)) = place else { continue };
            let in_work = present.is_some_and(|(now, last)| epoch == now && number > last);
            if !in_work && !keep.contains(&(epoch, number)) {
                // What cannot be removed now is tried again at the job's next turn.
                if let Err(err) = fs::remove_dir_all(entry.path()) {
                    log::warn!("checkpoint '{}' cannot be removed: {err}", entry.path().display());
                }
            }
        }
        // Only if it is empty.
        let _ = fs::remove_dir(&folder);
    }
}

/// The next run of data at or after an offset, at most so long.
pub fn next_data(file: &File, offset: u64, limit: u64) -> io::Result<Option<(u64, usize)>> {
    let length = file.metadata()?.len();
    if offset >= length {
        return Ok(None);
    }
    let (begin, end) = match seek(file, SeekFrom::Data(offset)) {
        Ok(begin) => (begin, seek(file, SeekFrom::Hole(begin))?),
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        // A file system that does not say where its holes are.
        Err(_) => (offset, length),
    };
    let count = end.saturating_sub(begin).min(limit).max(1);
    Ok(Some((begin, usize::try_from(count).unwrap_or(usize::MAX))))
}

/// Names of a snapshot's files: nothing that could lead elsewhere.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(StoreError::Invalid(format!("'{name}' is no file of a checkpoint")));
    }
    Ok(())
}

fn file_error(path: &Path, err: &io::Error) -> StoreError {
    match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::Full(path.display().to_string())
        }
        _ => StoreError::Failed(path.display().to_string(), err.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for good in ["memory", "manifest.json", "disk-0", "state"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "a\0b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
