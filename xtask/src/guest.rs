//! `cargo xtask setup`: everything that `harrier run` needs, in one folder that it finds by itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use harrier_agent_protocol::VERSION_TAG;
use serde::Serialize;

use crate::cache::{self, Cache, Key};
use crate::guest_kernel::{self, Patches};
use crate::initramfs;

/// Raise when the folder's contents change. `guest-kernel/README.md` describes them.
const RECIPE: u32 = 1;

/// What is in the folder, for messages.
#[derive(Serialize)]
struct Manifest {
    kernel_release: String,
    kernel_hash: String,
    initramfs_hash: String,
}

/// Builds what is missing and points `<cache>/guest/<agent version>` at it.
pub(crate) fn set_up(cache: &Cache, root: &Path, kernel_source: Option<&Path>) -> Result<PathBuf> {
    let kernel = guest_kernel::build(cache, root, kernel_source, Patches::Applied)?;
    let initramfs = initramfs::build(cache, root, &[])?;
    let key =
        Key::new("guest", RECIPE).text("kernel", &kernel.key).text("initramfs", &initramfs.key).finish();
    cache.artifact("guest", &key, |dir| {
        for name in ["vmlinux", "bzImage", "System.map"] {
            link_or_copy(&kernel.dir.join(name), &dir.join(name))?;
        }
        link_or_copy(&initramfs.file, &dir.join("initramfs.cpio"))?;
        let manifest = Manifest {
            kernel_release: fs::read_to_string(kernel.dir.join("release"))?,
            kernel_hash: kernel.key.clone(),
            initramfs_hash: initramfs.key.clone(),
        };
        let path = dir.join("manifest.json");
        fs::write(&path, serde_json::to_vec_pretty(&manifest)?).map_err(|error| cache::explain(error, &path))
    })?;
    cache.set_link("guest", VERSION_TAG, &key)
}

/// Cache entries are never written to, so two of them may share a file.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to).map(drop).map_err(|error| cache::explain(error, to))
}

#[cfg(test)]
mod tests {
    /// Linux takes 2047 characters on x86 (COMMAND_LINE_SIZE); the monitor and the user append to ours.
    #[test]
    fn the_guests_command_line_is_one_short_line_of_words() {
        let line = include_str!("../../guest-kernel/cmdline");
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        assert_eq!(format!("{}\n", words.join(" ")), line);
        assert!(line.len() < 512 && line.is_ascii());
        assert!(!words.contains(&"--"), "what follows would go to the agent");
    }
}
