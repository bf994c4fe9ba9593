//! `harrier fetch`: the files that jobs have left.

use std::path::{Path, PathBuf};

use harrier_jobs::queue::{Job, JobId, StoredFile};
use harrier_jobs::store::Store;
use harrier_jobs::store::files::download;
use serde_json::json;

use super::flags::FetchFlags;
use super::{ids, place, print, print_json};
use crate::exit::Failure;

pub(super) fn run(flags: &FetchFlags) -> Result<u8, Failure> {
    let store = place::open(&flags.place)?;
    let ids = ids::parse(&flags.jobs)?;
    let base = flags.to.clone().unwrap_or_default();
    let mut lines = String::new();
    let mut found = Vec::new();
    for id in &ids {
        let job = store.job(*id)?;
        let folder = if ids.len() > 1 { base.join(id.to_string()) } else { base.clone() };
        for file in left(store.as_ref(), &job)? {
            let place = place_of(&job, &file, &folder);
            if !flags.list {
                copy(store.as_ref(), &file, &place)?;
            }
            let (shown, facts) = (place.display().to_string(), file.facts);
            lines.push_str(&format!("{shown}\n"));
            found.push(json!({
                "job": id, "guest": file.guest, "file": shown, "bytes": facts.bytes, "sha256": facts.sha256,
            }));
        }
    }
    if flags.json {
        print_json(&found)?;
    } else {
        print(&lines)?;
    }
    Ok(0)
}

/// The files of the attempt that counts: the last one.
fn left(store: &dyn Store, job: &Job) -> Result<Vec<StoredFile>, Failure> {
    let files = store.attempts(job.id)?.pop().map(|attempt| attempt.files).unwrap_or_default();
    if files.is_empty() {
        return Err(Failure::new(no_files(job, job.id)));
    }
    Ok(files)
}

fn no_files(job: &Job, id: JobId) -> String {
    if job.spec.outputs.is_empty() {
        format!("job {id} was not to leave any files: name them with --output when it is submitted")
    } else if job.state.is_final() {
        format!("job {id} has left no files: 'harrier status {id}' says how it ended")
    } else {
        format!("job {id} is {}: its files are there when it has ended", job.state)
    }
}

/// Where a file goes, by the name that the job's owner has given it.
fn place_of(job: &Job, file: &StoredFile, folder: &Path) -> PathBuf {
    let output = job.spec.outputs.iter().find(|output| output.guest == file.guest);
    let name = output.map(|output| output.name.as_str()).or_else(|| file.guest.rsplit('/').next());
    folder.join(name.unwrap_or("file"))
}

fn copy(store: &dyn Store, file: &StoredFile, place: &Path) -> Result<(), Failure> {
    if let Some(folder) = place.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|err| {
            Failure::new(format!("'{}' cannot be made ({err}): give another --to", folder.display()))
        })?;
    }
    Ok(download(store, &file.facts, place)?)
}
