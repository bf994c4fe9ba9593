//! A folder of snapshots: what is in it, who needs whom, and removing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{SnapshotError, host};
use crate::manifest::ParentEntry;
use crate::{Snapshot, SnapshotId};

/// How names of snapshots in the making begin, and of those being removed.
pub(crate) const PARTIAL_PREFIX: &str = ".harrier-partial-";

/// Name of the file beside a snapshot that says which of its pages are used first. It is no part of the snapshot, and may be
/// removed at any time.
pub fn touched_file(id: SnapshotId) -> String {
    format!(".harrier-touched-{id}")
}

/// An entry of a folder of snapshots.
#[derive(Debug)]
pub struct Listed {
    /// Its folder.
    pub path: PathBuf,
    /// The snapshot, or why it is none that can be used.
    pub snapshot: Result<Snapshot, SnapshotError>,
}

/// The snapshots in `folder`, by name. What is no snapshot at all is left out.
///
/// # Errors
/// The folder cannot be read.
pub fn list(folder: &Path) -> Result<Vec<Listed>, SnapshotError> {
    let mut listed = Vec::new();
    for entry in fs::read_dir(folder).map_err(host("read", folder))? {
        let path = entry.map_err(host("read", folder))?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || !path.is_dir() {
            continue;
        }
        match Snapshot::open(&path) {
            Err(SnapshotError::NotASnapshot { .. }) => {}
            snapshot => listed.push(Listed { path, snapshot }),
        }
    }
    listed.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(listed)
}

/// The folder that a snapshot stands in.
fn folder_of(path: &Path) -> Result<PathBuf, SnapshotError> {
    let path = path.canonicalize().map_err(host("find", path))?;
    Ok(path.parent().unwrap_or(Path::new("/")).to_owned())
}

/// The parent of a difference: by its name, or by its id if it was renamed.
pub(crate) fn find_parent(child: &Snapshot, parent: &ParentEntry) -> Result<Snapshot, SnapshotError> {
    let folder = folder_of(child.path())?;
    let named = Snapshot::open(&folder.join(&parent.name));
    match named {
        Ok(snapshot) if snapshot.manifest().id == parent.id => return Ok(snapshot),
        Err(SnapshotError::NotASnapshot { .. }) | Ok(_) => {}
        Err(error) => return Err(error),
    }
    with_id(&folder, parent.id)?.ok_or_else(|| SnapshotError::MissingParent {
        path: child.path().to_owned(),
        id: parent.id,
        name: parent.name.clone(),
    })
}

fn with_id(folder: &Path, id: SnapshotId) -> Result<Option<Snapshot>, SnapshotError> {
    let mut snapshots = list(folder)?.into_iter().filter_map(|listed| listed.snapshot.ok());
    Ok(snapshots.find(|snapshot| snapshot.manifest().id == id))
}

/// Removes a snapshot that no other one needs. Afterwards it is gone completely, or it is there completely and the
/// answer is an error.
///
/// # Errors
/// Others need it, it is none, or the host refuses.
pub fn remove(path: &Path) -> Result<(), SnapshotError> {
    let folder = folder_of(path)?;
    // Damaged ones may go too; their id is unknown, and nobody can need them.
    match Snapshot::open(path) {
        Ok(snapshot) => {
            let id = snapshot.manifest().id;
            let children: Vec<String> = list(&folder)?
                .into_iter()
                .filter_map(|listed| listed.snapshot.ok())
                .filter(|other| other.manifest().parent.as_ref().is_some_and(|parent| parent.id == id))
                .filter_map(|other| Some(other.path().file_name()?.to_string_lossy().into_owned()))
                .collect();
            if !children.is_empty() {
                return Err(SnapshotError::Needed { path: path.to_owned(), children });
            }
            // It is usually not there.
            let _ = fs::remove_file(folder.join(touched_file(id)));
        }
        Err(error @ SnapshotError::NotASnapshot { .. }) => return Err(error),
        Err(_) => {}
    }
    let name = SnapshotId::random().map_err(host("name", path))?;
    let doomed = folder.join(format!("{PARTIAL_PREFIX}{name}"));
    fs::rename(path, &doomed).map_err(host("remove", path))?;
    File::open(&folder).and_then(|folder| folder.sync_all()).map_err(host("write", &folder))?;
    fs::remove_dir_all(&doomed).map_err(host("remove", &doomed))
}

/// Removes what writers that are dead left in `folder`.
///
/// # Errors
/// The folder cannot be read, or something in it not be removed.
pub fn sweep(folder: &Path) -> Result<(), SnapshotError> {
    let _guard = lock_folder(folder)?;
    for entry in fs::read_dir(folder).map_err(host("read", folder))? {
        let entry = entry.map_err(host("read", folder))?;
        if !entry.file_name().as_encoded_bytes().starts_with(PARTIAL_PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let Ok(dir) = File::open(&path) else { continue };
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
            log::debug!("snapshot: '{}' of a dead writer is removed", path.display());
            fs::remove_dir_all(&path).map_err(host("remove", &path))?;
        }
    }
    Ok(())
}

/// Creates a folder for a writer and locks it: as long as the lock is held, the writer lives.
pub(crate) fn create_partial(folder: &Path, id: SnapshotId) -> Result<(PathBuf, File), SnapshotError> {
    let path = folder.join(format!("{PARTIAL_PREFIX}{id}"));
    // Nobody sweeps between the two.
    let _guard = lock_folder(folder)?;
    fs::create_dir(&path).map_err(host("create", &path))?;
    let lock = File::open(&path)
        .and_then(|dir| {
            flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
            Ok(dir)
        })
        .map_err(host("lock", &path))?;
    Ok((path, lock))
}

fn lock_folder(folder: &Path) -> Result<File, SnapshotError> {
    File::open(folder)
        .and_then(|dir| {
            flock(&dir, FlockOperation::LockExclusive)?;
            Ok(dir)
        })
        .map_err(host("lock", folder))
}
