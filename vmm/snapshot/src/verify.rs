//! Looks at every byte of a snapshot.

use std::path::Path;

use crate::error::SnapshotError;
use crate::writer::file_checksum;
use crate::{Chain, Snapshot, layer};

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The snapshot's folder.
    pub snapshot: std::path::PathBuf,
    /// File or section.
    pub part: String,
    /// Where it begins in its file.
    pub offset: u64,
    /// How many bytes are not to be trusted.
    pub bytes: u64,
    /// What is wrong.
    pub reason: String,
}

fn damage(snapshot: &Path, error: SnapshotError) -> Result<Damage, SnapshotError> {
    match error {
        SnapshotError::Damaged { part, offset, reason, .. } => {
            Ok(Damage { snapshot: snapshot.to_owned(), part, offset, bytes: 0, reason })
        }
        SnapshotError::MissingParent { id, name, .. } => Ok(Damage {
            snapshot: snapshot.to_owned(),
            part: "manifest.json".to_owned(),
            offset: 0,
            bytes: 0,
            reason: format!("its parent {id} ('{name}') is not beside it"),
        }),
        other => Err(other),
    }
}

/// Checks every checksum of the snapshot in the folder `path`, and of its parents. An empty list means that all is
/// well.
///
/// # Errors
/// It cannot be looked at: it is no snapshot, of an unknown version, or the host refuses to read it.
pub fn verify(path: &Path) -> Result<Vec<Damage>, SnapshotError> {
    let snapshot = match Snapshot::open(path) {
        Ok(snapshot) => snapshot,
        Err(error) => return Ok(vec![damage(path, error)?]),
    };
    let mut found = verify_one(&snapshot)?;
    match Chain::from_snapshot(snapshot) {
        Ok(chain) => {
            for disk in chain.snapshot().manifest().files.iter().filter_map(|file| layer::disk_of(&file.name))
            {
                if let Err(error) = chain.disk(disk) {
                    let damage = damage(path, error)?;
                    if !found.iter().any(|known| known.part == damage.part) {
                        found.push(damage);
                    }
                }
            }
            for parent in chain.snapshots().skip(1) {
                found.extend(verify_one(parent)?);
            }
        }
        // The memory file's own damage is in the list already.
        Err(error) => {
            let damage = damage(path, error)?;
            if !found.contains(&damage) {
                found.push(damage);
            }
        }
    }
    Ok(found)
}

fn verify_one(snapshot: &Snapshot) -> Result<Vec<Damage>, SnapshotError> {
    let path = snapshot.path();
    let manifest = snapshot.manifest();
    let mut found = Vec::new();
    for entry in &manifest.sections {
        if let Err(error) = snapshot.read_section(entry) {
            found.push(Damage { bytes: entry.bytes, ..damage(path, error)? });
        }
    }
    if let Err(error) = snapshot.check_padding() {
        found.push(Damage { bytes: 1, ..damage(path, error)? });
    }
    match snapshot.memory() {
        Ok(memory) => {
            for chunk in 0..memory.chunks() {
                let reason = match memory.chunk_is_whole(chunk) {
                    Ok(true) => continue,
                    Ok(false) => "the pages' checksum is another one".to_owned(),
                    Err(error) => error.to_string(),
                };
                let (offset, bytes) = memory.place(chunk);
                found.push(Damage {
                    snapshot: path.to_owned(),
                    part: "memory".to_owned(),
                    offset,
                    bytes,
                    reason,
                });
            }
        }
        Err(error) => found.push(damage(path, error)?),
    }
    for entry in &manifest.files {
        let checked = snapshot.open_file(entry).and_then(|file| {
            let (bytes, sha256) =
                file_checksum(&file).map_err(crate::error::host("read", &path.join(&entry.name)))?;
            if (bytes, sha256) == (entry.bytes, entry.sha256) {
                return layer::disk_of(&entry.name).map_or(Ok(()), |disk| snapshot.layer(disk).map(drop));
            }
            Err(snapshot.damaged(&entry.name, 0, "its checksum is another one".to_owned()))
        });
        if let Err(error) = checked {
            found.push(Damage { bytes: entry.bytes, ..damage(path, error)? });
        }
    }
    Ok(found)
}
