//! A job's files on their way: from the queue to the machine before it starts, and back when its command has ended.

use std::path::{Path, PathBuf};

use super::monitor::{AttemptRecord, RunInput, RunResult, output_place};
use crate::queue::{Reason, StoredFile};
use crate::store::files::{download, upload};
use crate::store::{Ended, Store, StoreError};

/// The files that an attempt is given, on this host: those of the job, with those that it has saved in their places.
///
/// # Errors
/// How the attempt ends without them.
pub(super) fn bring(
    store: &dyn Store,
    record: &AttemptRecord,
    scratch: &Path,
) -> Result<Vec<RunInput>, Ended> {
    let given = record.job.spec.inputs.iter().filter_map(|file| {
        let is_saved = record.job.saved.iter().any(|saved| saved.guest == file.guest);
        Some((&file.guest, file.facts.filter(|_| !is_saved)?))
    });
    let saved = record.job.saved.iter().map(|file| (&file.guest, file.facts));
    let folder = scratch.join("inputs");
    let mut inputs = Vec::new();
    for (index, (guest, facts)) in given.chain(saved).enumerate() {
        let bring = || -> Result<PathBuf, StoreError> {
            if let Some(place) = store.local_file(&facts.sha256) {
                return match place.exists() {
                    true => Ok(place),
                    false => Err(StoreError::Invalid(format!("{} is gone", place.display()))),
                };
            }
            std::fs::create_dir_all(&folder)
                .map_err(|err| StoreError::Failed(folder.display().to_string(), err.to_string()))?;
            let place = folder.join(index.to_string());
            download(store, &facts, &place).map(|()| place)
        };
        let host = bring().map_err(|err| {
            let reason = if err.is_passing() { Reason::MachineFailed } else { Reason::BadInput };
            super::runner::ended(reason, Some(format!("input '{guest}' cannot be had: {err}")), None)
        })?;
        inputs.push(RunInput { host, guest: guest.clone(), mode: facts.mode });
    }
    Ok(inputs)
}

/// Puts the files that a command has left into the store; says which they are.
///
/// # Errors
/// The store's. What it has by then need not be sent again.
pub(super) fn send(
    store: &dyn Store,
    result: &RunResult,
    folder: &Path,
) -> Result<Vec<StoredFile>, StoreError> {
    let mut files = Vec::new();
    for (index, output) in result.outputs.iter().enumerate() {
        if let Some(facts) = output.facts {
            upload(store, &output_place(folder, index), &facts)?;
            files.push(StoredFile { guest: output.guest.clone(), facts });
        }
    }
    Ok(files)
}

/// What the end of a command means that came to one.
pub(super) fn command_end(record: &AttemptRecord, result: &RunResult) -> Option<Ended> {
    let ended = super::runner::ended;
    let missing: Vec<&str> = result
        .outputs
        .iter()
        .filter(|output| output.facts.is_none())
        .map(|output| output.guest.as_str())
        .collect();
    let code = result.exit_code;
    let is_saving = record.job.spec.checkpoint_exit == Some(code);
    match (result.status.as_deref()?, &result.error) {
        ("exited", Some(_)) if !missing.is_empty() => {
            let detail = format!("it ended without having written {}", missing.join(", "));
            Some(ended(Reason::MissingOutput, Some(detail), None))
        }
        ("exited", None) if is_saving && !missing.is_empty() => {
            let detail = format!("it wants to be started again, and has not written {}", missing.join(", "));
            Some(ended(Reason::MissingOutput, Some(detail), Some(code)))
        }
        ("exited", None) if is_saving => Some(ended(Reason::SelfCheckpointed, None, Some(code))),
        (status @ ("exited" | "signaled"), None) => {
            let (reason, detail) = match result.cause.as_deref() {
                Some("memory") => {
                    let limit = record.job.spec.limits.memory_bytes.unwrap_or(record.job.spec.memory_bytes);
                    (Reason::OutOfMemory, Some(format!("it needed more than the {limit} bytes that it has")))
                }
                Some("processes") => {
                    let limit = record.job.spec.limits.processes.unwrap_or_default();
                    (Reason::ProcessLimit, Some(format!("it made more than {limit} processes")))
                }
                _ if status == "exited" => (Reason::Exited, None),
                _ => (Reason::Signalled, Some(format!("signal {}", code.saturating_sub(128)))),
            };
            Some(ended(reason, detail, Some(code)))
        }
        ("not found" | "not executable", error) => Some(ended(Reason::Exited, error.clone(), Some(code))),
        _ => None,
    }
}
