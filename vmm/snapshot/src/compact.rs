//! Making a full snapshot of a difference and all its parents, in its place.

use std::path::Path;

use crate::error::SnapshotError;
use crate::verify::{Damage, verify};
use crate::{CHUNK_PAGES, Chain, PAGE_BYTES, Snapshot, SnapshotWriter, Source, layer};

/// Makes the snapshot in the folder `path` a full one: it has the same id and content as before, and needs no other one.
/// Differences to it stay valid, and its former parents are left alone. It is replaced in one step.
///
/// # Errors
/// It, or what it needs, is damaged or missing, or the host refuses; then nothing has changed.
pub fn compact(path: &Path) -> Result<Snapshot, SnapshotError> {
    let chain = Chain::open(path)?;
    if chain.is_full() {
        return Snapshot::open(path);
    }
    // New checksums over damaged pages would hide the damage.
    if let Some(Damage { snapshot, part, offset, reason, .. }) = verify(path)?.into_iter().next() {
        return Err(SnapshotError::Damaged { path: snapshot, part, offset, reason });
    }
    let mut writer = SnapshotWriter::replacing(chain.snapshot())?;
    copy(&chain, &mut writer)?;
    for entry in &chain.snapshot().manifest().files {
        match layer::disk_of(&entry.name) {
            None => writer.link_file(&entry.name)?,
            Some(disk) => copy_disk(&chain, disk, &mut writer)?,
        }
    }
    writer.commit()
}

/// Makes a full snapshot of its own, in the folder `target`, of one whose memory is compressed or that is a difference: for
/// machines that are to share its memory. It does not outlive the host.
///
/// # Errors
/// The chain is damaged, or the host refuses.
pub fn unpack(chain: &Chain, target: &Path, producer: &str) -> Result<Snapshot, SnapshotError> {
    let mut writer = SnapshotWriter::create(target, None, producer)?.fleeting().unchecked();
    copy(chain, &mut writer)?;
    for entry in &chain.snapshot().manifest().files {
        copy_disk(chain, layer::disk_of(&entry.name).unwrap_or(&entry.name), &mut writer)?;
    }
    writer.commit()
}

fn copy_disk(chain: &Chain, disk: &str, writer: &mut SnapshotWriter<'_>) -> Result<(), SnapshotError> {
    let file = writer.create_file(disk)?;
    chain.disk(disk)?.flatten(&file).map_err(crate::error::host("copy a disk of", chain.snapshot().path()))
}

/// Copies memory and sections.
fn copy(chain: &Chain, writer: &mut SnapshotWriter<'_>) -> Result<(), SnapshotError> {
    let mut memory = writer.memory(chain.pages())?;
    let mut buffer = Vec::new();
    for run in chain.runs()? {
        if matches!(run.source, Source::Zero) {
            continue;
        }
        let mut first = run.first;
        while first < run.first + run.count {
            let count = (run.first + run.count - first).min(CHUNK_PAGES);
            buffer.resize(count as usize * PAGE_BYTES, 0);
            chain.read(first, &mut buffer)?;
            memory.write(first, &buffer)?;
            first += count;
        }
    }
    writer.finish_memory(memory)?;
    for section in chain.snapshot().sections()? {
        writer.add_section(section);
    }
    Ok(())
}
