//! Which pages of a restored machine are used first: found out once, and got ahead of the guest the next time.
//!
//! [`MachineHandle::working_set`] asks the host's kernel which pages of the snapshot's private view are there by now, and
//! which of those the machine has made its own by writing. [`MachineBuilder::prefetch`] has a thread copy the latter ahead of
//! the guest and has the kernel read the former from the disk, while the machine is being built and when it runs already. The list stands beside the snapshot, belongs to nobody's
//! state, and may be missing or wrong at no worse cost than time.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use harrier_engine::GuestRegion;
use harrier_engine::memory::PAGE_SIZE;
use harrier_snapshot::{Snapshot, touched_file};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryRegion;

use crate::builder::MachineBuilder;
use crate::machine::MachineHandle;
use crate::memory::{self, Backing, GuestRam, Need};
use crate::pagemap;

/// Runs of pages that are kept at most.
const MAX_RUNS: usize = 65_536;
/// Longest file, in bytes.
const MAX_BYTES: u64 = 4 << 20;
/// Pages that are got in one piece.
const PIECE_PAGES: u64 = 512;

/// Pages by their numbers in the snapshot's memory: runs of first and count.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Only read.
    pub read: Vec<(u64, u64)>,
    /// Written.
    pub written: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// What was found out about a snapshot before.
    pub fn load(snapshot: &Snapshot) -> Option<Self> {
        let file = File::open(path(snapshot)?).ok()?;
        serde_json::from_reader(io::Read::take(io::BufReader::new(file), MAX_BYTES)).ok()
    }

    /// Keeps it beside the snapshot.
    ///
    /// # Errors
    /// The host's.
    pub fn store(&self, snapshot: &Snapshot) -> io::Result<()> {
        let path = path(snapshot).ok_or(io::ErrorKind::NotFound)?;
        let new = path.with_extension(std::process::id().to_string());
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.read.iter().chain(&self.written).map(|(_, count)| count).sum()
    }
}

fn path(snapshot: &Snapshot) -> Option<PathBuf> {
    let folder = snapshot.path().canonicalize().ok()?;
    Some(folder.parent()?.join(touched_file(snapshot.manifest().id)))
}

/// Appends a page to runs.
fn push(runs: &mut Vec<(u64, u64)>, page: u64) {
    match runs.last_mut() {
        Some((first, count)) if *first + *count == page => *count += 1,
        _ => runs.push((page, 1)),
    }
}

/// Which pages of memory that is a view of a snapshot are present.
pub(crate) fn present(ram: &GuestRam) -> io::Result<WorkingSet> {
    let mut set = WorkingSet::default();
    pagemap::visit(&ram.regions, |page, entry| {
        if entry.is_present() {
            push(if entry.is_of_file() { &mut set.read } else { &mut set.written }, page);
        }
    })?;
    set.read.truncate(MAX_RUNS);
    set.written.truncate(MAX_RUNS);
    Ok(set)
}

/// Gets runs of pages ahead of the guest; what does not exist is passed over.
pub(crate) fn get_ahead(regions: &[Arc<GuestRegion>], runs: &[(u64, u64)], need: Need) {
    for (first, count) in runs.iter().take(MAX_RUNS) {
        let mut region_first = 0;
        for region in regions {
            let pages = region.len() / PAGE_SIZE as u64;
            let end = first.saturating_add(*count).min(region_first + pages);
            let mut at = (*first).max(region_first);
            while at < end {
                let part = (end - at).min(PIECE_PAGES);
                let offset = (at - region_first) * PAGE_SIZE as u64;
                if let Err(err) = memory::get_ahead(region, offset, part as usize * PAGE_SIZE, need) {
                    log::debug!("prefetch: {err}");
                    return;
                }
                at += part;
            }
            region_first += pages;
        }
    }
}

impl MachineBuilder {
    /// Gets pages ahead of the guest, in a thread of its own. Only for a machine that is made of a snapshot.
    pub fn prefetch(&self, set: WorkingSet) {
        if !matches!(self.ram.backing, Backing::Image(_)) {
            return;
        }
        let regions = self.ram.regions.clone();
        let fetch = move || {
            get_ahead(&regions, &set.read, Need::InHostMemory);
            get_ahead(&regions, &set.written, Need::Own);
        };
        if let Err(err) = std::thread::Builder::new().name("prefetch".to_owned()).spawn(fetch) {
            log::debug!("prefetch: no thread: {err}");
        }
    }
}

impl MachineHandle {
    /// The pages that the machine has used since it was restored; `None` for one that was not, or has ended.
    ///
    /// # Errors
    /// The host's.
    pub fn working_set(&self) -> io::Result<Option<WorkingSet>> {
        let Some(parts) = self.parts.upgrade() else { return Ok(None) };
        match parts.ram.backing {
            Backing::Own(_) => Ok(None),
            Backing::Image(_) => present(&parts.ram).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use harrier_snapshot::{Chain, SnapshotWriter};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const PAGES: u64 = 1024;

    #[test]
    fn what_was_used_is_found_kept_and_present_before_it_is_used_again() {
        let folder = std::env::temp_dir().join(format!("harrier-touched-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let mut writer = SnapshotWriter::create(&folder.join("s"), None, "test").unwrap();
        let mut memory = writer.memory(PAGES).unwrap();
        (0..PAGES).for_each(|page| memory.write(page, &[page as u8 | 1; PAGE_SIZE]).unwrap());
        writer.finish_memory(memory).unwrap();
        let snapshot = writer.commit().unwrap();
        assert_eq!(WorkingSet::load(&snapshot), None);
        let chain = Arc::new(Chain::open(snapshot.path()).unwrap());
        let has = |runs: &[(u64, u64)], page: u64| {
            runs.iter().any(|(first, count)| (*first..first + count).contains(&page))
        };

        let ram = GuestRam::from_snapshot(&chain).unwrap();
        assert_eq!(present(&ram).unwrap(), WorkingSet::default());
        let gpa = |page: u64| GuestAddress(page * PAGE_SIZE as u64);
        ram.memory.write_obj(7u32, gpa(300)).unwrap();
        ram.memory.write_obj(7u32, gpa(301)).unwrap();
        assert_eq!(ram.memory.read_obj::<u8>(gpa(900)).unwrap(), 900u64 as u8 | 1);
        let set = present(&ram).unwrap();
        assert_eq!(set.written, [(300, 2)]);
        // The kernel maps some neighbours as well.
        assert!(has(&set.read, 900) && !has(&set.read, 500), "{set:?}");
        set.store(&snapshot).unwrap();
        assert_eq!(WorkingSet::load(&snapshot).unwrap(), set);

        let again = GuestRam::from_snapshot(&chain).unwrap();
        get_ahead(&again.regions, &set.read, Need::InHostMemory);
        get_ahead(&again.regions, &set.written, Need::Own);
        get_ahead(&again.regions, &[(PAGES - 1, 1), (PAGES, 5), (u64::MAX, u64::MAX)], Need::Own);
        let found = present(&again).unwrap();
        assert_eq!(found.written, [(300, 2), (PAGES - 1, 1)]);
        assert_eq!(
            again.memory.read_obj::<u8>(gpa(300)).unwrap(),
            300u64 as u8 | 1,
            "as the snapshot has it"
        );
        harrier_snapshot::remove(snapshot.path()).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "the list goes with its snapshot");
        fs::remove_dir(&folder).unwrap();
    }
}
