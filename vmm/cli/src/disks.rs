//! Disks of a run: the root file system, which is looked at first, and raw disks, which hold whatever they hold.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use harrier_devices::virtio::block::Block;
use harrier_machine::boot::{FileImage, Image, ImageError};
use thiserror::Error;

use crate::config::DiskConfig;

#[derive(Debug, Error)]
pub(crate) enum DiskError {
    #[error("--rootfs {0}")]
    RootFile(ImageError),
    #[error("--rootfs '{}' is neither an ext4 nor a squashfs image: make one with mke2fs or mksquashfs", .0.display())]
    RootFormat(PathBuf),
    #[error("--rootfs '{}' holds {len} of the {needed} bytes of its file system: it is truncated, get it again", .path.display())]
    RootTruncated { path: PathBuf, len: u64, needed: u64 },
    #[error("--rootfs '{}' is being written by another machine: use a copy", .0.display())]
    RootInUse(PathBuf),
    #[error("--rootfs '{}' cannot be read ({source}): check the file", .path.display())]
    RootRead { path: PathBuf, source: io::Error },
    #[error("--disk: {0}")]
    Disk(#[from] harrier_devices::virtio::block::OpenError),
}

/// Opens a further disk.
pub(crate) fn open(disk: &DiskConfig) -> Result<Block, DiskError> {
    Ok(Block::open(&disk.path, disk.read_only)?)
}

/// Opens the image of a root file system, read-only, under the name by which the agent knows it.
pub(crate) fn open_root(path: &Path, serial: &str) -> Result<Block, DiskError> {
    let image = FileImage::open(path).map_err(DiskError::RootFile)?;
    let read_error = |source| DiskError::RootRead { path: path.to_owned(), source };
    check_file_system(path, &image)?;
    let file = File::open(path).map_err(read_error)?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => return Err(DiskError::RootInUse(path.to_owned())),
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    Block::from_file(file, true, serial.as_bytes()).map_err(read_error)
}

/// Superblocks: Linux documentation, `filesystems/ext4/globals.rst` and `fs/squashfs`' on-disk format.
fn check_file_system(path: &Path, image: &FileImage) -> Result<(), DiskError> {
    const EXT_SUPERBLOCK: u64 = 1024;
    let read_error = |source| DiskError::RootRead { path: path.to_owned(), source };
    let len = image.len_bytes();
    let mut head = [0; 96];
    let mut ext = [0; 1024];
    if len >= head.len() as u64 {
        image.read_at(0, &mut head).map_err(read_error)?;
    }
    if len >= EXT_SUPERBLOCK + ext.len() as u64 {
        image.read_at(EXT_SUPERBLOCK, &mut ext).map_err(read_error)?;
    }
    let needed = if head.starts_with(b"hsqs") {
        word(&head, 40) | word(&head, 44) << 32
    } else if ext.get(0x38..0x3a) == Some(&[0x53, 0xef]) {
        const INCOMPAT_64BIT: u64 = 0x80;
        let block_shift = word(&ext, 0x18);
        if block_shift > 6 {
            return Err(DiskError::RootFormat(path.to_owned()));
        }
        let high = if word(&ext, 0x60) & INCOMPAT_64BIT != 0 { word(&ext, 0x150) << 32 } else { 0 };
        (word(&ext, 4) | high).saturating_mul(1024 << block_shift)
    } else {
        return Err(DiskError::RootFormat(path.to_owned()));
    };
    if needed > len { Err(DiskError::RootTruncated { path: path.to_owned(), len, needed }) } else { Ok(()) }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).and_then(|raw| raw.try_into().ok()).map_or(0, u32::from_le_bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8]) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        std::fs::write(&path, bytes).unwrap();
        let image = FileImage::open(&path).map_err(|err| err.to_string())?;
        check_file_system(&path, &image).map_err(|err| err.to_string())
    }

    fn ext4(blocks: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[1024 + 4..1024 + 8].copy_from_slice(&blocks.to_le_bytes());
        bytes[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes
    }

    fn squashfs(used: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[..4].copy_from_slice(b"hsqs");
        bytes[40..48].copy_from_slice(&used.to_le_bytes());
        bytes
    }

    #[test]
    fn whole_file_systems_pass_and_truncated_ones_do_not() {
        check(&ext4(8, 8192)).unwrap();
        check(&squashfs(4096, 4096)).unwrap();
        assert!(check(&ext4(9, 8192)).unwrap_err().contains("holds 8192 of the 9216 bytes"));
        assert!(check(&squashfs(4097, 4096)).unwrap_err().contains("truncated"));
        assert!(check(&squashfs(u64::MAX, 4096)).unwrap_err().contains("truncated"));
    }

    #[test]
    fn other_content_is_no_root_file_system() {
        for bytes in [&[0xa5; 4096][..], &[0; 4096], b"x", &[0xa5; 1500]] {
            assert!(check(bytes).unwrap_err().contains("neither an ext4 nor a squashfs image"));
        }
        let mut absurd = ext4(8, 8192);
        absurd[1024 + 0x18] = 60;
        assert!(check(&absurd).unwrap_err().contains("neither"));
    }
}
