//! Files without a name, which machines that are made of a snapshot write to: they go with whoever has them open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// A file without a name, on the snapshot's file system where that can be written, so that it may share blocks.
///
/// # Errors
/// The host's, of its folder for temporary files.
pub fn nameless_beside(snapshot: &Path) -> io::Result<File> {
    let beside = snapshot.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    nameless(beside).or_else(|_| nameless_elsewhere())
}

/// A file without a name, where temporary files are.
pub(crate) fn nameless_elsewhere() -> io::Result<File> {
    nameless(&std::env::temp_dir())
}

fn nameless(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE.bits() as i32;
    OpenOptions::new().read(true).write(true).custom_flags(flags).mode(0o600).open(folder)
}
