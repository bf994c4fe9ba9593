//! Writing a job's machine down, and fetching what was written: a snapshot in the store's folder where that is on this
//! host, else one in the attempt's folder that is sent to the store and fetched from there in pieces.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use harrier_control::Client;
use harrier_control::api::SnapshotRequest;
use harrier_snapshot::{Snapshot, SnapshotError, verify};
use serde::{Deserialize, Serialize};

use crate::queue::{Checkpoint, LeaseKey};
use crate::session::{SECTION, SessionState};
use crate::store::checkpoints::{MAX_PIECE, check_name, next_data};
use crate::store::{CheckpointPiece, CheckpointQuery, Store, StoreError};

/// Where a snapshot says which processor its machine sees.
const MACHINE_SECTION: &str = "machine";
/// How long a monitor may take for a snapshot.
const TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The wait between two tries to reach the store.
const RETRY: Duration = Duration::from_millis(500);

/// Checkpoints that are written, sent and fetched at a time on this host.
#[derive(Debug)]
pub(super) struct Transfers {
    free: Mutex<u32>,
    freed: Condvar,
}

/// One of them, until it is dropped.
pub(super) struct Transfer(Arc<Transfers>);

impl Transfers {
    pub(super) fn new(count: u32) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(count.max(1)), freed: Condvar::new() })
    }

    /// Waits for its turn; `None` if it is given up before.
    pub(super) fn begin(self: &Arc<Self>, given_up: &dyn Fn() -> bool) -> Option<Transfer> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            if given_up() {
                return None;
            }
            free = self.freed.wait_timeout(free, RETRY).unwrap_or_else(PoisonError::into_inner).0;
        }
        *free -= 1;
        Some(Transfer(self.clone()))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// Where a checkpoint is, and where what is between this host and the store lies meanwhile.
pub(super) struct Way<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) key: &'a LeaseKey,
    /// A folder of the attempt's own.
    pub(super) scratch: &'a Path,
    /// It is of no use any more.
    pub(super) given_up: &'a dyn Fn() -> bool,
}

/// A checkpoint that is ready to be reported.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) checkpoint: Checkpoint,
    /// How long the machine stood still for it, had it not been paused before.
    pub(super) stood: Duration,
    /// How long it took to send it.
    pub(super) sent: Duration,
    pub(super) took: Duration,
}

impl Way<'_> {
    /// Writes the machine behind `client` down. `work_ms` is the work that is in it.
    pub(super) fn write(&self, client: &Client, number: u32, work_ms: u64) -> Result<Written, String> {
        let begin = Instant::now();
        let (job, epoch) = (self.key.job, self.key.epoch);
        let local = self.store.local_checkpoint(job, epoch, number);
        let target = local.clone().unwrap_or_else(|| self.scratch.join(format!("checkpoint-{number}")));
        let parent = target.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(|err| format!("'{}' cannot be made: {err}", parent.display()))?;
        let text = target.to_str().ok_or("its folder's name is not UTF-8")?.to_owned();
        let request =
            SnapshotRequest { target: text, diff: false, resume: false, image: false, compress: false };
        let taken = client.clone().with_timeout(TIMEOUT).snapshot(&request).map_err(|err| {
            // The job may have ended meanwhile, and its checkpoints be gone. Only if it is empty.
            let _ = fs::remove_dir(parent);
            err.to_string()
        })?;
        let snapshot = Snapshot::open(&target).map_err(|err| err.to_string())?;
        let output = command(&snapshot)?.output;
        let cpu_model = cpu_model(&snapshot)?;
        let size_bytes = stored_bytes(&target);
        let sending = Instant::now();
        if local.is_none() {
            let sent = self.send(&target, number);
            // The store has it, or it is of no use.
            let _ = fs::remove_dir_all(&target);
            sent?;
        }
        let checkpoint = Checkpoint {
            epoch,
            number,
            place: target.display().to_string(),
            host: None,
            size_bytes,
            output,
            work_ms,
            at_ms: 0,
            cpu_model: Some(cpu_model),
        };
        let sent = if local.is_none() { sending.elapsed() } else { Duration::ZERO };
        Ok(Written { checkpoint, stood: Duration::from_micros(taken.pause_us), sent, took: begin.elapsed() })
    }

    fn send(&self, folder: &Path, number: u32) -> Result<(), String> {
        let unreadable = |err: std::io::Error| format!("'{}' cannot be read: {err}", folder.display());
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().into_string().map_err(|_| "a name is not UTF-8".to_owned())?;
            let file = File::open(entry.path()).map_err(unreadable)?;
            let length = file.metadata().map_err(unreadable)?.len();
            let mut piece = CheckpointPiece { number, file: name, offset: 0, length };
            // An empty piece makes the file; its length makes the holes.
            self.patiently(|| self.store.write_checkpoint(self.key, &piece, &[]))?;
            while let Some((offset, count)) = next_data(&file, piece.offset, MAX_PIECE).map_err(unreadable)? {
                let mut bytes = vec![0; count];
                file.read_exact_at(&mut bytes, offset).map_err(unreadable)?;
                piece.offset = offset;
                self.patiently(|| self.store.write_checkpoint(self.key, &piece, &bytes))?;
                piece.offset = offset + count as u64;
            }
        }
        Ok(())
    }

    /// Asks the store until it answers, or nobody wants the answer any more.
    fn patiently<T>(&self, ask: impl Fn() -> Result<T, StoreError>) -> Result<T, String> {
        loop {
            match ask() {
                Err(err) if err.is_passing() && !(self.given_up)() => thread::sleep(RETRY),
                answer => return answer.map_err(|err| err.to_string()),
            }
        }
    }

    /// Brings a checkpoint to this host and checks every byte of it.
    pub(super) fn fetch(&self, checkpoint: &Checkpoint) -> Result<Fetched, String> {
        let (epoch, number) = (checkpoint.epoch, checkpoint.number);
        let (folder, gone) = match self.store.local_checkpoint(self.key.job, epoch, number) {
            Some(folder) => (folder, false),
            None => {
                let folder = self.scratch.join("restore");
                let came = self.download(checkpoint, &folder)?;
                (folder, !came)
            }
        };
        if gone {
            return Ok(Fetched::Damaged("it is gone".to_owned()));
        }
        match verify(&folder) {
            Ok(found) => {
                if let Some(damage) = found.first() {
                    let (part, offset, reason) = (&damage.part, damage.offset, &damage.reason);
                    return Ok(Fetched::Damaged(format!("{part} at offset {offset}: {reason}")));
                }
            }
            Err(err @ SnapshotError::Io { .. }) => return Err(err.to_string()),
            Err(err) => return Ok(Fetched::Damaged(err.to_string())),
        }
        let read = Snapshot::open(&folder).map_err(|err| err.to_string()).and_then(|it| command(&it));
        Ok(match read {
            Ok(command) => Fetched::Usable(Source {
                epoch,
                number,
                folder,
                stdin: command.stdin,
                output: command.output,
                work_ms: checkpoint.work_ms,
            }),
            Err(reason) => Fetched::Damaged(reason),
        })
    }

    /// False: the store does not have it.
    fn download(&self, checkpoint: &Checkpoint, folder: &Path) -> Result<bool, String> {
        let (epoch, number) = (checkpoint.epoch, checkpoint.number);
        let failed = |err: std::io::Error| format!("'{}' cannot be written: {err}", folder.display());
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(failed)?;
        }
        fs::create_dir_all(folder).map_err(failed)?;
        let files = self.patiently(|| self.store.checkpoint_files(self.key, epoch, number))?;
        for listed in &files {
            check_name(&listed.name).map_err(|err| err.to_string())?;
            let file = File::create(folder.join(&listed.name)).map_err(failed)?;
            file.set_len(listed.length).map_err(failed)?;
            let mut query = CheckpointQuery {
                key: self.key.clone(),
                epoch,
                number,
                file: listed.name.clone(),
                offset: 0,
                limit: MAX_PIECE,
            };
            loop {
                let data = self.patiently(|| self.store.read_checkpoint(&query))?;
                if data.bytes.is_empty() || data.offset < query.offset {
                    break;
                }
                file.write_all_at(&data.bytes, data.offset).map_err(failed)?;
                query.offset = data.offset + data.bytes.len() as u64;
            }
        }
        Ok(!files.is_empty())
    }
}

/// What became of fetching a checkpoint.
pub(super) enum Fetched {
    /// It is here and whole.
    Usable(Source),
    /// It will never be of use.
    Damaged(String),
}

/// A checkpoint on this host that a machine is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Source {
    pub(super) epoch: u64,
    pub(super) number: u32,
    pub(super) folder: PathBuf,
    /// How much of its stdin the command had been given.
    pub(super) stdin: u64,
    /// Where its streams stand: stdout, stderr.
    pub(super) output: [u64; 2],
    /// Work that is in it, over all attempts.
    pub(super) work_ms: u64,
}

/// Where a snapshot's command stands with its streams.
struct CommandPlace {
    stdin: u64,
    output: [u64; 2],
}

fn command(snapshot: &Snapshot) -> Result<CommandPlace, String> {
    let section = snapshot.section(SECTION).map_err(|err| err.to_string())?;
    let state: SessionState = serde_json::from_slice(&section.bytes)
        .map_err(|err| format!("section '{SECTION}' cannot be read: {err}"))?;
    let command = state.commands.first().ok_or("no command runs in it")?;
    Ok(CommandPlace { stdin: command.stdin.end(), output: [command.stdout.offset, command.stderr.offset] })
}

/// The processor that a snapshot's machine sees; the rest of that section is the machine's business.
#[derive(Deserialize)]
struct MachineModel {
    cpu_model: String,
}

fn cpu_model(snapshot: &Snapshot) -> Result<String, String> {
    let section = snapshot.section(MACHINE_SECTION).map_err(|err| err.to_string())?;
    let machine: MachineModel = serde_json::from_slice(&section.bytes)
        .map_err(|err| format!("section '{MACHINE_SECTION}' cannot be read: {err}"))?;
    Ok(machine.cpu_model)
}

/// What a folder's files take on the disk.
pub(super) fn stored_bytes(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}
