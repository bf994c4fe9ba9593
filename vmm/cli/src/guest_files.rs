//! Where the default guest's kernel and initial ramdisk are, and the guests of the selftest: in the cache that
//! `cargo xtask setup` fills.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use harrier_jobs::protocol::VERSION_TAG;
use thiserror::Error;

/// The default guest's kernel command line.
pub(crate) const COMMAND_LINE: &str = include_str!("../../../guest-kernel/cmdline");

/// The files of one build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestFiles {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

#[derive(Debug, Error)]
pub(crate) enum GuestFilesError {
    #[error("no place for the cache: set HARRIER_CACHE to a directory")]
    NoCache,
    #[error("guest kernel not built ('{0}' is missing): run `cargo xtask setup`")]
    NotBuilt(String),
    #[error(
        "the guests of the selftest are not built ('{0}' is missing): run `cargo xtask setup`, or try Linux alone with \
         `--only linux`"
    )]
    NoBareMetal(String),
    #[error(
        "the cache '{0}' cannot be read ({1}): check its permissions, or set HARRIER_CACHE to another directory"
    )]
    Unreadable(String, std::io::Error),
}

/// The cache directory by the environment, whether it exists or not.
pub(crate) fn cache_dir() -> Result<PathBuf, GuestFilesError> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HARRIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("harrier")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/harrier")))
        .ok_or(GuestFilesError::NoCache)
}

/// The current build. The link is resolved once, so that kernel and ramdisk are of one build even while another
/// replaces it.
pub(crate) fn find() -> Result<GuestFiles, GuestFilesError> {
    find_in(&cache_dir()?)
}

fn find_in(cache: &Path) -> Result<GuestFiles, GuestFilesError> {
    let link = cache.join("guest").join(VERSION_TAG);
    let dir = link.canonicalize().map_err(|err| match err.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            GuestFilesError::NotBuilt(link.display().to_string())
        }
        _ => GuestFilesError::Unreadable(link.display().to_string(), err),
    })?;
    let files = GuestFiles { kernel: dir.join("vmlinux"), initramfs: dir.join("initramfs.cpio") };
    for file in [&files.kernel, &files.initramfs] {
        match file.metadata() {
            Ok(_) => {}
            Err(err) if err.kind() == ErrorKind::NotFound => {
                return Err(GuestFilesError::NotBuilt(file.display().to_string()));
            }
            Err(err) => return Err(GuestFilesError::Unreadable(file.display().to_string(), err)),
        }
    }
    Ok(files)
}

/// The folder of the bare-metal guests that `harrier selftest` runs.
pub(crate) fn find_bare_metal() -> Result<PathBuf, GuestFilesError> {
    find_bare_metal_in(&cache_dir()?)
}

fn find_bare_metal_in(cache: &Path) -> Result<PathBuf, GuestFilesError> {
    let link = cache.join("bare-metal/current");
    link.canonicalize().map_err(|err| match err.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            GuestFilesError::NoBareMetal(link.display().to_string())
        }
        _ => GuestFilesError::Unreadable(link.display().to_string(), err),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_partial_build_names_the_command_that_makes_one() {
        let cache = tempfile::tempdir().unwrap();
        let text = || find_in(cache.path()).unwrap_err().to_string();
        assert!(text().ends_with("is missing): run `cargo xtask setup`"), "{}", text());
        let bare_metal = find_bare_metal_in(cache.path()).unwrap_err().to_string();
        assert!(
            bare_metal.contains("bare-metal/current' is missing): run `cargo xtask setup`"),
            "{bare_metal}"
        );
        let build = cache.path().join("guest").join("abc");
        std::fs::create_dir_all(&build).unwrap();
        std::os::unix::fs::symlink("abc", cache.path().join("guest").join(VERSION_TAG)).unwrap();
        assert!(text().contains("vmlinux' is missing"), "{}", text());
        std::fs::write(build.join("vmlinux"), "k").unwrap();
        std::fs::write(build.join("initramfs.cpio"), "i").unwrap();
        let files = find_in(cache.path()).unwrap();
        assert_eq!(files.kernel, build.canonicalize().unwrap().join("vmlinux"));
    }
}
