//! Which queue, and who asks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use harrier_coordinator::RemoteStore;
use harrier_jobs::store::{SqliteStore, Store};

use super::flags::QueuePlace;
use crate::exit::Failure;
use crate::units::parse_time;

/// A path in an environment variable that is set to something.
fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder below which Harrier keeps what lasts.
pub(super) fn state_dir() -> Result<PathBuf, Failure> {
    set("XDG_STATE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/state")))
        .map(|folder| folder.join("harrier"))
        .ok_or_else(|| Failure::new("no place for the queue: set HARRIER_QUEUE to a folder"))
}

/// Where a queue is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    Folder(PathBuf),
    /// A coordinator's address.
    Remote(String),
}

/// The leases that a store of this host hands out.
const LEASES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(24 * 3600));

fn place(named: Option<&str>) -> Result<Place, Failure> {
    let named = match named {
        Some(named) => Some(named.to_owned()),
        None => set("HARRIER_QUEUE")
            .map(PathBuf::into_os_string)
            .map(|value| {
                value
                    .into_string()
                    .map_err(|value| Failure::new(format!("HARRIER_QUEUE={value:?} is not text: use UTF-8")))
            })
            .transpose()?,
    };
    let Some(named) = named else { return Ok(Place::Folder(state_dir()?.join("queue"))) };
    match named.strip_prefix("unix:") {
        Some(path) => Ok(Place::Remote(format!("unix:{}", std::path::absolute(path)?.display()))),
        None if named.starts_with("http://") || named.starts_with("https://") => Ok(Place::Remote(named)),
        None if named.contains("://") => Err(Failure::new(format!(
            "--queue '{named}': its scheme is unknown: use http://, https://, unix: or a folder"
        ))),
        None => Ok(Place::Folder(std::path::absolute(named)?)),
    }
}

/// Opens the queue that a command works on.
pub(super) fn open(flags: &QueuePlace) -> Result<Arc<dyn Store>, Failure> {
    open_place(flags, |folder| Ok(SqliteStore::open(folder)?))
}

/// Opens the queue that a worker takes jobs from; `lease` is for those of this host.
pub(super) fn open_for_worker(flags: &QueuePlace, lease: Duration) -> Result<Arc<dyn Store>, Failure> {
    open_place(flags, |folder| Ok(SqliteStore::open_for_worker(folder, milliseconds(lease))?))
}

fn open_place(
    flags: &QueuePlace,
    open_folder: impl FnOnce(&Path) -> Result<SqliteStore, Failure>,
) -> Result<Arc<dyn Store>, Failure> {
    let token_file = flags.token_file.clone().or_else(|| set("HARRIER_TOKEN_FILE"));
    let ca_file = flags.ca_file.clone().or_else(|| set("HARRIER_CA_FILE"));
    match place(flags.place.as_deref())? {
        Place::Folder(folder) => {
            for (flag, given) in [("--token-file", &flags.token_file), ("--ca-file", &flags.ca_file)] {
                if given.is_some() {
                    return Err(Failure::new(format!(
                        "{flag} is for coordinators, and the queue '{}' is a folder: leave it out",
                        folder.display()
                    )));
                }
            }
            Ok(Arc::new(open_folder(&folder)?))
        }
        Place::Remote(url) => {
            let token = token_file.as_deref().map(read_token).transpose()?;
            let ca = ca_file
                .map(|file| {
                    std::fs::read(&file).map_err(|err| {
                        Failure::new(format!("--ca-file '{}' cannot be read ({err})", file.display()))
                    })
                })
                .transpose()?;
            Ok(Arc::new(RemoteStore::new(&url, token, ca.as_deref())?))
        }
    }
}

fn milliseconds(lease: Duration) -> u64 {
    u64::try_from(lease.as_millis()).unwrap_or(u64::MAX)
}

/// Opens the queue that a coordinator serves.
pub(super) fn open_to_serve(named: Option<&str>, lease: Duration) -> Result<Arc<dyn Store>, Failure> {
    match place(named)? {
        Place::Folder(folder) => Ok(Arc::new(SqliteStore::open_with_lease(&folder, milliseconds(lease))?)),
        Place::Remote(url) => Err(Failure::new(format!(
            "--queue '{url}' is served by a coordinator already: give the queue's folder"
        ))),
    }
}

/// Reads `--lease`.
pub(super) fn lease(text: &str) -> Result<Duration, Failure> {
    let lease = parse_time(text).map_err(|err| Failure::new(format!("--lease: {err}")))?;
    if lease < LEASES.0 || lease > LEASES.1 {
        return Err(Failure::new(format!("--lease {text} is no use: give 1s to 24h")));
    }
    Ok(lease)
}

/// The word in a token file: its first line.
pub(super) fn read_token(file: &Path) -> Result<String, Failure> {
    let name = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|err| Failure::new(format!("--token-file '{name}' cannot be read ({err})")))?;
    let token = text.lines().next().unwrap_or_default().trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::new(format!(
            "--token-file '{name}' has no token: write one word of visible characters into it"
        )));
    }
    Ok(token.to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_folders_and_coordinators() {
        let remote = |text: &str| place(Some(text)).unwrap();
        assert_eq!(remote("https://pool:7707"), Place::Remote("https://pool:7707".to_owned()));
        assert_eq!(remote("unix:/run/q"), Place::Remote("unix:/run/q".to_owned()));
        assert_eq!(remote("/q"), Place::Folder("/q".into()));
        assert!(place(Some("ftp://q")).unwrap_err().message.contains("'ftp://q'"));
        assert!(lease("5s").is_ok() && lease("0.1s").is_err() && lease("48h").is_err());
    }

    #[test]
    fn a_token_is_one_visible_word() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        for (text, token) in [("secret\n", Some("secret")), ("a b\n", None), ("", None), ("\n\n", None)] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(read_token(&file).ok().as_deref(), token, "{text:?}");
        }
    }
}
