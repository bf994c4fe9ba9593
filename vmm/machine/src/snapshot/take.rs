//! Taking a snapshot of a machine that runs.
//!
//! Memory is copied in rounds while the guest runs: first all that the snapshot has to have, then what was written
//! meanwhile. When little is left, or it does not become less, the machine stands still for the rest, and for its state.
//! Checksums, fsync and the name come after it goes on.

use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use harrier_engine::memory::PAGE_SIZE;
use harrier_snapshot::{CHUNK_PAGES, MemoryWriter, Snapshot, SnapshotWriter, Step};
use vm_memory::{Bytes, GuestMemoryRegion as _, MemoryRegionAddress};

use super::pages::{PageSet, Written, present};
use super::{TakeError, sections};
use crate::hypercalls::Quiesced;
use crate::machine::{MachineHandle, Parts};
use crate::memory::GuestRam;
use crate::run_control::RunControl;

/// So few pages are left to the pause without another round.
const FEW_PAGES: u64 = 512;
/// Rounds before the pause at most.
const MAX_ROUNDS: usize = 8;

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All of the machine.
    Full,
    /// Only what was written since the machine's last snapshot.
    Difference,
    /// All of the machine, to be forked at once and not to be kept: it is not made durable, has no checksums of pages and
    /// disks, and later differences do not know of it.
    Image,
}

/// What is to be taken, and where to.
pub struct Request<'a> {
    /// The folder that the snapshot is to be.
    pub target: &'a Path,
    /// What it is for.
    pub kind: Kind,
    /// Memory is compressed: the snapshot is smaller, and a restore has to unpack it.
    pub compress: bool,
    /// The machine stands still afterwards: one pause is left to be taken back.
    pub stay_paused: bool,
    /// How long a guest that wants to be asked may take to come to rest.
    pub quiesce_limit: Duration,
    /// Whom to ask where the guest's kernel does not listen.
    pub rest: Option<&'a dyn GuestRest>,
    /// The program that writes it, for people.
    pub producer: &'a str,
    /// Called while the machine stands still, to add what the owner keeps beside the machine: sections whose names
    /// begin with [`super::HOST_PREFIX`], and files.
    pub owner: &'a mut OwnerPart<'a>,
    /// Called when the machine goes on again: for what of the owner's part can be completed later. An error is for people
    /// and ends the snapshot.
    pub settle: &'a mut dyn FnMut() -> Result<(), String>,
    /// Hears of the progress; false cancels.
    pub progress: &'a mut (dyn FnMut(Progress) -> bool + Send),
}

/// Somebody in the guest who can bring it to rest, other than its kernel.
pub trait GuestRest {
    /// Has file systems written back and nothing new begun; within `limit`, or not at all.
    fn begin(&self, limit: Duration) -> Quiesced;
    /// The guest need not be at rest any more. Called after [`GuestRest::begin`], whatever its answer.
    fn end(&self);
}

/// Adds the owner's part to a snapshot; an error is for people and ends it.
pub type OwnerPart<'a> = dyn FnMut(&mut SnapshotWriter<'_>) -> Result<(), String> + 'a;

/// How far a snapshot has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Pages copied of those known so far.
    Copied {
        /// Copied.
        pages: u64,
        /// Known.
        of: u64,
    },
    /// The machine stands still.
    Paused,
    /// It goes on.
    Resumed,
    /// The container's.
    Written(Step),
}

/// What a snapshot was.
#[derive(Debug)]
pub struct Report {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// How long the machine stood still for it. Zero if it was paused before.
    pub pause: Duration,
    /// From the request until it was durable.
    pub total: Duration,
    /// Rounds of copying before the pause.
    pub rounds: usize,
    /// Whether the guest had come to rest.
    pub quiesced: Quiesced,
    /// Pages that were copied, those copied more than once included.
    pub pages_copied: u64,
    /// Pages that were copied while the machine stood still.
    pub pages_in_pause: u64,
}

/// A guest that is asked to rest, and told that it need not when this goes out of scope.
struct Rest<'a> {
    parts: &'a Parts,
    control: &'a RunControl,
    other: Option<&'a dyn GuestRest>,
    /// It was asked.
    asked_other: bool,
    quiesced: Quiesced,
}

impl Rest<'_> {
    fn begin(&mut self, limit: Duration) {
        if !limit.is_zero() && !self.control.is_standing() {
            self.quiesced = self.parts.lives.quiesce.begin(limit, || self.control.is_standing());
            if let Some(other) = self.other.filter(|_| self.quiesced == Quiesced::NotAsked) {
                self.asked_other = true;
                self.quiesced = other.begin(limit);
            }
            if self.quiesced == Quiesced::TooLate {
                log::warn!(
                    "snapshot: the guest has not come to rest within {limit:?}, and is taken as it is"
                );
            }
        }
    }
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.parts.lives.quiesce.end();
        if let Some(other) = self.other.filter(|_| self.asked_other) {
            other.end();
        }
    }
}

/// A pause that is taken back when it goes out of scope.
struct Pause<'a> {
    control: &'a RunControl,
    begin: Instant,
}

impl<'a> Pause<'a> {
    fn begin(control: &'a RunControl) -> Result<Self, TakeError> {
        let pause = Pause { begin: Instant::now(), control };
        if control.pause() { Ok(pause) } else { Err(TakeError::Ended) }
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.control.resume();
    }
}

impl MachineHandle {
    /// Takes a snapshot. A machine that runs goes on running, with a short pause; one that is paused stays so.
    ///
    /// # Errors
    /// [`TakeError`]; the machine then goes on as it was, and nothing is left behind.
    pub fn snapshot(&self, request: Request<'_>) -> Result<Report, TakeError> {
        let parts = self.parts.upgrade().ok_or(TakeError::Ended)?;
        let mut written = match parts.written.try_lock() {
            Ok(written) => written,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return Err(TakeError::Busy),
        };
        take(&parts, &self.control, &mut written, request)
    }

    /// The snapshot that a difference would be one to.
    pub fn snapshot_parent(&self) -> Option<std::path::PathBuf> {
        let parts = self.parts.upgrade()?;
        let written = parts.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.parent.clone()
    }
}

fn take(
    parts: &Parts,
    control: &RunControl,
    written: &mut Written,
    request: Request<'_>,
) -> Result<Report, TakeError> {
    let Request {
        target,
        kind,
        compress,
        stay_paused,
        quiesce_limit,
        rest,
        producer,
        owner,
        settle,
        progress,
    } = request;
    let difference = kind == Kind::Difference;
    let begin = Instant::now();
    let parent = match (difference, &written.parent) {
        (false, _) => None,
        (true, None) => return Err(TakeError::NoParent),
        (true, Some(path)) => Some(Snapshot::open(path)?),
    };
    let mut writer = SnapshotWriter::create(target, parent.as_ref(), producer)?.compressed(compress);
    if kind == Kind::Image {
        writer = writer.fleeting().unchecked();
    }
    let pages = parts.config.memory_bytes / PAGE_SIZE as u64;
    let mut copy = Copy { ram: &parts.ram, memory: writer.memory(pages)?, copied: 0, buffer: Vec::new() };

    // The log begins anew: what is written from here on is copied in a later round.
    let pause = Pause::begin(control)?;
    let mut last = written.collect(parts)?;
    drop(pause);
    let mut todo = if difference { written.since_parent.clone() } else { present(&parts.ram, written)? };
    let mut rest = Rest { parts, control, other: rest, asked_other: false, quiesced: Quiesced::NotAsked };
    let mut rounds = 0;
    let mut known = 0;
    let pause = loop {
        known += todo.len();
        copy.pages(&todo, |copied| progress(Progress::Copied { pages: copied, of: known }))?;
        rounds += 1;
        // When most is copied: the guest is to rest no longer than needed.
        if rounds == 1 {
            rest.begin(quiesce_limit);
        }
        let pause = Pause::begin(control)?;
        todo = written.collect(parts)?;
        let becomes_less = rounds == 1 || todo.len() < last.len() * 3 / 4;
        if todo.len() <= FEW_PAGES || rounds >= MAX_ROUNDS || !becomes_less {
            break pause;
        }
        last = todo.clone();
    };
    if !progress(Progress::Paused) {
        return Err(TakeError::Cancelled);
    }
    let pages_before = copy.copied;
    copy.pages(&todo, |_| true)?;
    for section in sections::save(parts)? {
        writer.add_section(section);
    }
    owner(&mut writer).map_err(|reason| TakeError::Unit { unit: "host".to_owned(), reason })?;
    let stood = pause.begin.elapsed();
    if stay_paused {
        std::mem::forget(pause);
    } else {
        drop(pause);
    }
    let quiesced = rest.quiesced;
    drop(rest);
    let result = settle()
        .map_err(|reason| TakeError::Unit { unit: "host".to_owned(), reason })
        .and_then(|()| finish(writer, copy, progress));
    match result {
        Ok((snapshot, pages_copied)) => {
            if kind != Kind::Image {
                written.since_parent = PageSet::default();
                written.parent = Some(snapshot.path().to_owned());
            }
            Ok(Report {
                snapshot,
                pause: stood,
                total: begin.elapsed(),
                rounds,
                quiesced,
                pages_copied,
                pages_in_pause: pages_copied - pages_before,
            })
        }
        Err(error) => {
            if stay_paused {
                control.resume();
            }
            Err(error)
        }
    }
}

fn finish(
    mut writer: SnapshotWriter<'_>,
    copy: Copy<'_>,
    progress: &mut (dyn FnMut(Progress) -> bool + Send),
) -> Result<(Snapshot, u64), TakeError> {
    let pages = copy.copied;
    if !progress(Progress::Resumed) {
        return Err(TakeError::Cancelled);
    }
    let memory = copy.memory;
    writer.finish_memory(memory)?;
    if !progress(Progress::Written(Step::Memory)) {
        return Err(TakeError::Cancelled);
    }
    let writer = writer.watched_by(|step| {
        // From here on it is a matter of moments.
        let _ = progress(Progress::Written(step));
    });
    Ok((writer.commit()?, pages))
}

/// Copies pages of guest memory.
struct Copy<'a> {
    ram: &'a GuestRam,
    memory: MemoryWriter,
    copied: u64,
    buffer: Vec<u8>,
}

impl Copy<'_> {
    /// Copies all of `pages`; `progress` hears how many were copied so far, and cancels by false.
    fn pages(&mut self, pages: &PageSet, mut progress: impl FnMut(u64) -> bool) -> Result<(), TakeError> {
        for (first, count) in pages.runs(CHUNK_PAGES) {
            self.run(first, count)?;
            self.copied += count;
            if !progress(self.copied) {
                return Err(TakeError::Cancelled);
            }
        }
        Ok(())
    }

    /// Copies a run of pages, which may lie in two regions.
    fn run(&mut self, mut first: u64, mut count: u64) -> Result<(), TakeError> {
        let mut region_first = 0;
        for region in &self.ram.regions {
            let region_pages = region.len() / PAGE_SIZE as u64;
            if first < region_first + region_pages && count > 0 {
                let part = count.min(region_first + region_pages - first);
                self.buffer.resize(part as usize * PAGE_SIZE, 0);
                let at = MemoryRegionAddress((first - region_first) * PAGE_SIZE as u64);
                region.read_slice(&mut self.buffer, at).map_err(|err| TakeError::Memory(err.to_string()))?;
                self.memory.write(first, &self.buffer)?;
                first += part;
                count -= part;
            }
            region_first += region_pages;
        }
        Ok(())
    }
}
