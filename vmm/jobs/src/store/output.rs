//! Output of attempts, in files: one a stream and attempt, never shared between attempts, so that a worker that has
//! lost its lease can spoil nothing. What a user sees as a job's output is put together when it is read: an attempt
//! that began with a checkpoint goes on at the offset where that stood, and one whose command had saved its state itself at
//! the end of what was written before.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{OutputPiece, OutputQuery, Result, StoreError};
use crate::protocol::Stream;
use crate::queue::{Attempt, JobId, LeaseKey, Reason};

/// The longest piece that is read at once.
pub const MAX_PIECE: u64 = 1 << 20;

/// The files below one folder.
#[derive(Debug)]
pub struct OutputFiles {
    folder: PathBuf,
}

impl OutputFiles {
    /// Uses a folder, and makes it.
    pub fn create(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// An attempt's stdout and stderr. A thousand jobs share a folder.
    pub fn paths(&self, job: JobId, epoch: u64) -> [PathBuf; 2] {
        let folder = self.folder.join((job / 1000).to_string());
        ["stdout", "stderr"].map(|name| folder.join(format!("{job}.{epoch}.{name}")))
    }

    /// Brings what an attempt has written to the disk.
    pub(super) fn sync(&self, job: JobId, epoch: u64) -> Result<()> {
        for path in self.paths(job, epoch) {
            match File::open(&path).and_then(|file| file.sync_all()) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                synced => synced.map_err(|err| file_error(&path, &err))?,
            }
        }
        Ok(())
    }

    /// Writes at an offset of the attempt's own; a hole before it is an error, what is there is left as it is.
    pub(super) fn write(&self, key: &LeaseKey, stream: Stream, offset: u64, bytes: &[u8]) -> Result<()> {
        let [stdout, stderr] = self.paths(key.job, key.epoch);
        let path = if stream == Stream::Stdout { stdout } else { stderr };
        let write = || -> io::Result<bool> {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let mut file = File::options().write(true).create(true).truncate(false).open(&path)?;
            let length = file.metadata()?.len();
            let Some(known) = length.checked_sub(offset) else { return Ok(false) };
            let new = bytes.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
            file.seek(SeekFrom::Start(length))?;
            file.write_all(new)?;
            Ok(true)
        };
        match write() {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(StoreError::Invalid(format!("output at {offset} leaves a hole: send what is before it")))
            }
            Err(err) => Err(file_error(&path, &err)),
        }
    }

    /// Reads a piece of what the attempts in `attempts` have written.
    pub(super) fn read(&self, query: &OutputQuery, attempts: &[Attempt], over: bool) -> Result<OutputPiece> {
        let Some(last) = attempts.last() else {
            // Not started yet, or ended without a start.
            return Ok(OutputPiece { epoch: 0, bytes: Vec::new(), complete: over });
        };
        // One that has not begun has nothing to say yet, and nobody knows yet where it goes on.
        let begun = attempts.iter().rfind(|attempt| attempt.started_ms.is_some()).unwrap_or(last);
        let epoch = query.epoch.unwrap_or(begun.epoch);
        let find = |epoch: u64| attempts.iter().find(|attempt| attempt.epoch == epoch);
        let mut attempt = find(epoch).ok_or(StoreError::NoAttempt(query.job, epoch))?;
        let stream = usize::from(query.stderr);
        let wanted_ended = attempt.ended_ms.is_some();
        // Whether later attempts may add to the stream; then its end here is not the end.
        let final_attempt = epoch != last.epoch || over;
        // From the attempt asked for back to the one that wrote the offset asked for.
        let mut limit = query.limit.min(MAX_PIECE);
        let mut own = true;
        let starts = self.starts(query.job, attempts, stream);
        let base = |attempt: &Attempt| starts.get(&attempt.epoch).map_or(0, |(_, start)| *start);
        while query.offset < base(attempt) {
            limit = limit.min(base(attempt) - query.offset);
            let Some(parent) = attempt.parent.and_then(find) else { break };
            attempt = parent;
            own = false;
        }
        let [stdout, stderr] = self.paths(query.job, attempt.epoch);
        let path = if query.stderr { stderr } else { stdout };
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let mut file = match File::open(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(bytes),
                opened => opened?,
            };
            file.seek(SeekFrom::Start(query.offset.saturating_sub(base(attempt))))?;
            file.take(limit).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|err| file_error(&path, &err))?;
        let complete = own && bytes.is_empty() && wanted_ended && final_attempt;
        Ok(OutputPiece { epoch, bytes, complete })
    }

    /// Where in the job's stream each attempt's machine began, and where the attempt itself did.
    fn starts(&self, job: JobId, attempts: &[Attempt], stream: usize) -> HashMap<u64, (u64, u64)> {
        let mut starts = HashMap::new();
        for attempt in attempts {
            let parent = attempt.parent.and_then(|epoch| attempts.iter().find(|other| other.epoch == epoch));
            let (machine, begin) =
                parent.and_then(|parent| starts.get(&parent.epoch).copied()).unwrap_or((0, 0));
            let machine = match parent {
                // Its command began again, after all that was written before.
                Some(parent) if parent.reason == Some(Reason::SelfCheckpointed) => {
                    let [stdout, stderr] = self.paths(job, parent.epoch);
                    let path = if stream == 0 { stdout } else { stderr };
                    begin + fs::metadata(path).map_or(0, |metadata| metadata.len())
                }
                _ => machine,
            };
            let base = attempt.output_base.get(stream).copied().unwrap_or(0);
            starts.insert(attempt.epoch, (machine, machine + base));
        }
        starts
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
