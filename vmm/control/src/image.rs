//! Images: snapshots that clones are made of, and that go away with the last of them.
//!
//! ```text
//! ROOT/images/<id>/
//!   lock        held, shared with the others, by whoever makes the image or clones of it, and by every clone
//!   snapshot/   the snapshot
//! ```
//!
//! The kernel gives locks back when processes end, however they end. An image that nobody holds is removed by the last who
//! held it, or at the next look at the registry.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::name::MachineId;
use crate::registry::{Registry, RegistryError};

/// Folder of all images.
const IMAGES: &str = "images";
const LOCK: &str = "lock";
const SNAPSHOT: &str = "snapshot";

/// An image that this process holds.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    lock: Option<File>,
}

impl Image {
    /// The image's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its snapshot is, or is to be.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        self.folder.join(SNAPSHOT)
    }

    /// Takes hold of the image in `folder`, which somebody else holds meanwhile.
    ///
    /// # Errors
    /// The host's; `NotFound` if it is gone.
    pub fn hold(folder: &Path) -> io::Result<Self> {
        let lock = File::open(folder.join(LOCK))?;
        lock.lock_shared()?;
        // Whoever removed it had it alone; what is opened then has no name any more.
        fs::metadata(folder.join(LOCK))?;
        Ok(Self { folder: folder.to_owned(), lock: Some(lock) })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take()
            && let Err(err) = remove_unheld(&self.folder, &lock)
        {
            log::warn!("image '{}' is left behind: {err}", self.folder.display());
        }
    }
}

/// Removes an image unless somebody else holds it.
fn remove_unheld(folder: &Path, lock: &File) -> io::Result<()> {
    match lock.try_lock() {
        Ok(()) => fs::remove_dir_all(folder),
        Err(TryLockError::WouldBlock) => Ok(()),
        Err(TryLockError::Error(err)) => Err(err),
    }
}

impl Registry {
    /// Makes the folder of a new image. Its snapshot is still to be taken.
    ///
    /// # Errors
    /// [`RegistryError::Root`] with the host's answer.
    pub fn create_image(&self) -> Result<Image, RegistryError> {
        let _guard = self.guard()?;
        let made = || {
            let folder = self.root().join(IMAGES).join(MachineId::generate().as_str());
            DirBuilder::new().mode(0o700).recursive(true).create(&folder)?;
            let lock = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(folder.join(LOCK))?;
            lock.lock_shared()?;
            Ok(Image { folder, lock: Some(lock) })
        };
        made().map_err(|source| RegistryError::Root { path: self.root().to_owned(), source })
    }

    /// Removes images that nobody holds: what processes that were killed have left. The caller holds the guard.
    pub(crate) fn sweep_images(&self) {
        for item in fs::read_dir(self.root().join(IMAGES)).into_iter().flatten().flatten() {
            let folder = item.path();
            let removed = match File::open(folder.join(LOCK)) {
                Ok(lock) => remove_unheld(&folder, &lock),
                // Made or removed half.
                Err(err) if err.kind() == io::ErrorKind::NotFound => fs::remove_dir_all(&folder),
                Err(err) => Err(err),
            };
            if let Err(err) = removed {
                log::debug!("image '{}': {err}", folder.display());
            }
        }
    }

    /// Whether there may be images.
    pub(crate) fn has_images(&self) -> bool {
        fs::read_dir(self.root().join(IMAGES)).is_ok_and(|mut images| images.next().is_some())
    }
}
