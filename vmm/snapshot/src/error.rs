//! Why a snapshot cannot be written or used.

use std::io;
use std::path::PathBuf;

use crate::{FORMAT_VERSION, SnapshotId};

/// Why a snapshot cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The host refused something.
    #[error("snapshot: cannot {what} '{}': {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The folder that is to be written is there already.
    #[error("snapshot '{}' exists already: give another folder, or remove it first", .0.display())]
    Exists(PathBuf),
    /// The path names no place for a snapshot.
    #[error("snapshot '{}' names no folder: give a path that ends in a name", .0.display())]
    NoName(PathBuf),
    /// A difference is to be written to another folder than its parent's.
    #[error(
        "a difference has to stand beside its parent '{}': give a folder there, or take a full snapshot",
        .parent.display()
    )]
    NotBesideParent {
        /// Where the parent is.
        parent: PathBuf,
    },
    /// Nothing that looks like a snapshot.
    #[error("'{}' is no snapshot: {reason}", .path.display())]
    NotASnapshot {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// Written by a newer Harrier.
    #[error(
        "snapshot '{}' has format version {found}, this harrier knows up to {FORMAT_VERSION}: use a newer one",
        .path.display()
    )]
    Version {
        /// The folder.
        path: PathBuf,
        /// The version that it says.
        found: u64,
    },
    /// Something does not agree with its checksum or with the rest.
    #[error("snapshot '{}' is damaged: {part} at offset {offset}: {reason}", .path.display())]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// File or section.
        part: String,
        /// Byte offset in the file.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// A section that is needed is not there.
    #[error("snapshot '{}' has no section '{name}': it was made by another kind of machine", .path.display())]
    MissingSection {
        /// The folder.
        path: PathBuf,
        /// The section.
        name: String,
    },
    /// The parent of a difference is gone.
    #[error(
        "snapshot '{}' needs its parent {id} ('{name}'), which is not beside it: bring it back",
        .path.display()
    )]
    MissingParent {
        /// The folder.
        path: PathBuf,
        /// The parent.
        id: SnapshotId,
        /// The name that it had.
        name: String,
    },
    /// Others need what is to be removed.
    #[error(
        "snapshot '{}' is needed by {}: remove those first",
        .path.display(), .children.join(", ")
    )]
    Needed {
        /// The folder.
        path: PathBuf,
        /// Names of those that need it.
        children: Vec<String>,
    },
    /// What is to be stored is larger than the format allows.
    #[error("snapshot: {what} of {bytes} bytes is larger than {limit}")]
    TooLarge {
        /// What it is.
        what: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

/// Adds what was being done with which file to an error of the host.
pub(crate) fn host<'a>(
    what: &'static str,
    path: &'a std::path::Path,
) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::Io { what, path: path.to_owned(), source }
}
