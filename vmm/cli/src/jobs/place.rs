//! Which queue, and who asks.

use std::path::PathBuf;
use std::sync::Arc;

use harrier_jobs::store::{SqliteStore, Store};

use super::flags::QueuePlace;
use crate::exit::Failure;

/// The folder below which Harrier keeps what lasts.
pub(super) fn state_dir() -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_STATE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/state")))
        .map(|folder| folder.join("harrier"))
        .ok_or_else(|| Failure::new("no place for the queue: set HARRIER_QUEUE to a folder"))
}

/// Opens the queue that a command works on.
pub(super) fn open(place: &QueuePlace) -> Result<Arc<dyn Store>, Failure> {
    let named =
        place.place.clone().map(PathBuf::from).or_else(|| {
            std::env::var_os("HARRIER_QUEUE").filter(|value| !value.is_empty()).map(PathBuf::from)
        });
    let folder = match named {
        Some(folder) => std::path::absolute(folder)?,
        None => state_dir()?.join("queue"),
    };
    Ok(Arc::new(SqliteStore::open(&folder)?))
}

/// The user who runs this program.
pub(super) fn user() -> String {
    let uid = rustix::process::getuid().as_raw();
    let name = std::fs::read_to_string("/etc/passwd").ok().and_then(|text| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        })
    });
    name.unwrap_or_else(|| format!("uid{uid}"))
}

/// This host's name.
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
