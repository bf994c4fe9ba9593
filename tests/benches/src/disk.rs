//! Reads and writes of the guest's first disk, past the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use crate::numbers;

const DISK: &str = "/dev/vda";
/// How much of the disk is used.
const SIZE: u64 = 64 << 20;
const LARGE: usize = 256 << 10;
const SMALL: usize = 4 << 10;
const RANDOM_REQUESTS: usize = 2_000;

/// Bytes at an address that is a multiple of 4 KiB, as direct access wants them.
#[repr(align(4096))]
struct Aligned([u8; LARGE]);

fn open() -> io::Result<File> {
    // O_DIRECT of Linux on x86-64.
    OpenOptions::new().read(true).write(true).custom_flags(0o40000).open(DISK)
}

/// Megabytes one after the other; the work is bytes.
pub(crate) fn sequential_read() -> io::Result<u64> {
    let disk = open()?;
    let mut block = Box::new(Aligned([0; LARGE]));
    for at in (0..SIZE).step_by(LARGE) {
        disk.read_exact_at(&mut block.0, at)?;
    }
    Ok(SIZE)
}

/// The work is bytes.
pub(crate) fn sequential_write() -> io::Result<u64> {
    let disk = open()?;
    let block = Box::new(Aligned([7; LARGE]));
    for at in (0..SIZE).step_by(LARGE) {
        disk.write_all_at(&block.0, at)?;
    }
    disk.sync_all()?;
    Ok(SIZE)
}

/// The work is requests.
pub(crate) fn random_read() -> io::Result<u64> {
    let disk = open()?;
    let mut block = Box::new(Aligned([0; LARGE]));
    let small = block.0.get_mut(..SMALL).unwrap_or_default();
    for at in places() {
        disk.read_exact_at(small, at)?;
    }
    Ok(RANDOM_REQUESTS as u64)
}

/// The work is requests.
pub(crate) fn random_write() -> io::Result<u64> {
    let disk = open()?;
    let block = Box::new(Aligned([7; LARGE]));
    let small = block.0.get(..SMALL).unwrap_or_default();
    for at in places() {
        disk.write_all_at(small, at)?;
    }
    disk.sync_all()?;
    Ok(RANDOM_REQUESTS as u64)
}

fn places() -> impl Iterator<Item = u64> {
    numbers(RANDOM_REQUESTS).into_iter().map(|number| u64::from(number) % (SIZE / 4096) * 4096)
}
