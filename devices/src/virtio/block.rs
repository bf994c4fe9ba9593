//! The block device (virtio 1.2, section 5.2) over a raw image file or a host block device.
//!
//! [`Block::open`] checks and locks the image; requests are served one after the other with scattered reads and
//! writes between the file and guest memory. What goes wrong on the host is an I/O error in the guest, and
//! nothing more.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::block_copy::DiskCopies;
use super::chain::{Buffers, Chain};
use super::disk::DiskFile;
use super::queue::{DeviceQueue, QueueError};
use super::{Progress, Running, VirtioDevice};
use crate::guest_error::GuestErrors;
use crate::state::BadState;
use harrier_engine::GuestMemory;

/// Bytes in a sector, the unit of every address and length.
pub const SECTOR: u64 = 512;

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Data segments of a request: what a chain holds besides header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of data in one request at most, far above what drivers ask for: memory may be named many times over.
const MAX_REQUEST: usize = 64 << 20;
/// Sectors in one discard or write-zeroes range.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
const MAX_RANGES: u32 = 16;
/// Requests served, and bytes moved for them, before others have their turn.
const BATCH: usize = 32;
const BATCH_BYTES: usize = 64 << 20;
/// Length of the identifier in bytes.
const ID_LEN: usize = 20;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

const REQUEST_READ: u32 = 0;
const REQUEST_WRITE: u32 = 1;
const REQUEST_FLUSH: u32 = 4;
const REQUEST_GET_ID: u32 = 8;
const REQUEST_DISCARD: u32 = 11;
const REQUEST_WRITE_ZEROES: u32 = 13;

const WRITE_ZEROES_UNMAP: u32 = 1;

/// Status bytes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("disk '{}' cannot be opened {}: {source}", .path.display(), if *.read_only { "for reading" } else { "for writing (append ':ro' to use it read-only)" })]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether it was to be read only.
        read_only: bool,
        /// The host's answer.
        source: io::Error,
    },
    /// It is a directory or the like.
    #[error("disk '{}' is no file and no block device", .0.display())]
    NotADisk(PathBuf),
    /// It holds no bytes.
    #[error("disk '{}' is empty: make it with its full size first, for example with truncate -s 1G", .0.display())]
    Empty(PathBuf),
    /// Somebody else writes it, or reads it while we want to write.
    #[error("disk '{}' is in use by another machine: use a copy, or ':ro' in all of them", .0.display())]
    InUse(PathBuf),
    /// It is larger than a disk that is written may be.
    #[error("disk '{}' has {bytes} bytes, more than {}: use it read-only (append ':ro')", .path.display(), super::disk::MAX_BYTES)]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Its length cannot be found.
    #[error("disk '{}': {source}", .path.display())]
    Length {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A disk.
pub struct Block {
    file: DiskFile,
    /// Copies of the disk that are being made; none of one that is not written.
    copies: Option<DiskCopies>,
    read_only: bool,
    sectors: u64,
    id: [u8; ID_LEN],
    errors: GuestErrors,
}

impl Block {
    /// Opens a raw image. It stays locked against writers (`read_only`) or against everybody else as long as
    /// the device lives, where the file system can lock.
    ///
    /// A length that is no multiple of 512 is rounded up: the last sector ends in zeros, and the file grows to
    /// whole sectors when the guest writes there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        use std::os::unix::fs::FileTypeExt;
        let failed = |source| OpenError::Open { path: path.to_owned(), read_only, source };
        // Before opening: a FIFO would block.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NotADisk(path.to_owned()));
        }
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => {
                log::debug!("disk '{}' is not locked: {error}", path.display())
            }
        }
        let name = path.file_name().map(|name| name.as_encoded_bytes().to_owned()).unwrap_or_default();
        let disk = Self::from_file(file, read_only, &name)
            .map_err(|source| OpenError::Length { path: path.to_owned(), source })?;
        if disk.sectors == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        let bytes = disk.file.len();
        if !read_only && bytes > super::disk::MAX_BYTES {
            return Err(OpenError::TooLarge { path: path.to_owned(), bytes });
        }
        Ok(disk)
    }

    /// A disk over an open file; the guest reads the first 20 bytes of `id` as its identifier.
    ///
    /// # Errors
    /// The file's length cannot be found.
    pub fn from_file(file: File, read_only: bool, id: &[u8]) -> io::Result<Self> {
        Ok(Self::from_disk(DiskFile::whole(file)?, read_only, id))
    }

    /// The same for a disk that lies over others.
    pub fn from_disk(file: DiskFile, read_only: bool, id: &[u8]) -> Self {
        let len = file.len();
        if !len.is_multiple_of(SECTOR) {
            log::info!(
                "a disk of {len} bytes is no multiple of {SECTOR}: its last sector is padded with zeros"
            );
        }
        let mut padded = [0; ID_LEN];
        for (to, from) in padded.iter_mut().zip(id) {
            *to = *from;
        }
        let copies = (!read_only).then(|| DiskCopies::new(file.clone()));
        let sectors = len.div_ceil(SECTOR);
        Block { file, copies, read_only, sectors, id: padded, errors: GuestErrors::default() }
    }

    /// Makes copies of the disk while the guest writes it; none of a disk that is read-only.
    pub fn copies(&self) -> Option<DiskCopies> {
        self.copies.clone()
    }

    fn before_change(&self, offset: u64, bytes: u64) {
        if let Some(copies) = &self.copies {
            copies.before_change(offset, bytes);
        }
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// struct virtio_blk_config.
    fn config(&self) -> [u8; 60] {
        let fields: [(usize, &[u8]); 10] = [
            (0, &self.sectors.to_le_bytes()),
            (12, &MAX_SEGMENTS.to_le_bytes()),
            (20, &(SECTOR as u32).to_le_bytes()),
            // One queue.
            (34, &1u16.to_le_bytes()),
            (36, &MAX_RANGE_SECTORS.to_le_bytes()),
            (40, &MAX_RANGES.to_le_bytes()),
            // Discards pay off in whole pages.
            (44, &8u32.to_le_bytes()),
            (48, &MAX_RANGE_SECTORS.to_le_bytes()),
            (52, &MAX_RANGES.to_le_bytes()),
            // Zeroes may unmap.
            (56, &[1]),
        ];
        let mut config = [0; 60];
        for (offset, bytes) in fields {
            for (to, from) in config.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        }
        config
    }

    /// Byte offset of a range that lies on the disk.
    fn offset_of(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes.div_ceil(SECTOR))?;
        if !bytes.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        sector.checked_mul(SECTOR)
    }

    fn host_result(&mut self, what: &str, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.errors.report("block", format_args!("{what}: host: {error}"));
                Status::IoError
            }
        }
    }

    /// Discards or zeroes the ranges in `data`.
    fn change_ranges(&mut self, zero: bool, mut data: Buffers<'_>) -> Status {
        if self.read_only
            || data.is_empty()
            || !data.len().is_multiple_of(16)
            || data.len() / 16 > MAX_RANGES as usize
        {
            return Status::IoError;
        }
        while let Some(range) = data.read_array::<16>() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let known = if zero { WRITE_ZEROES_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Status::Unsupported;
            }
            let bytes = u64::from(count) * SECTOR;
            let Some(offset) = self.offset_of(sector, bytes).filter(|_| count <= MAX_RANGE_SECTORS) else {
                return Status::IoError;
            };
            if bytes == 0 {
                continue;
            }
            self.before_change(offset, bytes);
            let status = if zero {
                let result = self.file.zero(offset, bytes, flags & WRITE_ZEROES_UNMAP != 0);
                self.host_result("write zeroes", result)
            } else {
                // Advice only: a file system that cannot punch holes keeps the blocks.
                if let Err(error) = self.file.discard(offset, bytes) {
                    log::debug!("block: discard: {error}");
                }
                Status::Ok
            };
            if status != Status::Ok {
                return status;
            }
        }
        Status::Ok
    }

    /// Serves the request and answers status and bytes of data given to the driver.
    fn serve(
        &mut self,
        kind: u32,
        sector: u64,
        data_out: Buffers<'_>,
        mut data_in: Buffers<'_>,
    ) -> (Status, usize) {
        match kind {
            REQUEST_READ => {
                let len = data_in.len();
                match self.offset_of(sector, len as u64) {
                    Some(offset) if len <= MAX_REQUEST => {
                        let result = self.file.read(data_in.split_front(len), offset);
                        match self.host_result("read", result) {
                            Status::Ok => (Status::Ok, len),
                            status => (status, 0),
                        }
                    }
                    _ => (Status::IoError, 0),
                }
            }
            REQUEST_WRITE => match self.offset_of(sector, data_out.len() as u64) {
                Some(offset) if !self.read_only && data_out.len() <= MAX_REQUEST => {
                    self.before_change(offset, data_out.len() as u64);
                    let result = self.file.write(data_out, offset);
                    (self.host_result("write", result), 0)
                }
                _ => (Status::IoError, 0),
            },
            REQUEST_FLUSH => {
                let result = if self.read_only { Ok(()) } else { self.file.sync() };
                (self.host_result("flush", result), 0)
            }
            REQUEST_GET_ID => (Status::Ok, data_in.write(&self.id)),
            REQUEST_DISCARD => (self.change_ranges(false, data_out), 0),
            REQUEST_WRITE_ZEROES => (self.change_ranges(true, data_out), 0),
            _ => (Status::Unsupported, 0),
        }
    }

    /// Answers how many bytes of the chain were written.
    fn serve_chain(&mut self, chain: Chain<'_>) -> usize {
        let Chain { mut readable, mut writable, .. } = chain;
        // The status is the last writable byte, however the driver cut its descriptors.
        let Some(data_len) = writable.len().checked_sub(1) else {
            self.errors.report("block", format_args!("a request without room for its status"));
            return 0;
        };
        let data_in = writable.split_front(data_len);
        let (status, given) = match readable.read_array::<16>() {
            Some([k0, k1, k2, k3, _, _, _, _, sector @ ..]) => {
                let kind = u32::from_le_bytes([k0, k1, k2, k3]);
                self.serve(kind, u64::from_le_bytes(sector), readable, data_in)
            }
            None => {
                self.errors.report("block", format_args!("a request without a whole header"));
                (Status::IoError, 0)
            }
        };
        writable.write(&[status as u8]);
        // Used length counts from the start: the status is written only if all before it is.
        if given == data_len { given + 1 } else { given }
    }

    /// Answers how many bytes the request named, or `None` if there was none.
    fn serve_one(&mut self, queue: &mut DeviceQueue, mem: &GuestMemory) -> Result<Option<usize>, QueueError> {
        let Some(chain) = queue.pop(mem)? else { return Ok(None) };
        let head = chain.head();
        let bytes = chain.readable.len() + chain.writable.len();
        let written = self.serve_chain(chain);
        queue.complete(mem, head, written)?;
        Ok(Some(bytes))
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let common = FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH;
        common | if self.read_only { FEATURE_READ_ONLY } else { FEATURE_DISCARD | FEATURE_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn start(&mut self, _features: u64) {}

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "sectors": self.sectors, "read_only": self.read_only })
    }

    fn restore(&mut self, state: &serde_json::Value, _features: Option<u64>) -> Result<(), BadState> {
        let (now, then) = (self.save(), state);
        BadState::unless(now == *then, || format!("the disk is {now}, and was {then} when it was saved"))
    }

    fn reset(&mut self) {}

    fn process_queue(&mut self, _queue: usize, running: Running<'_>) -> Result<Progress, QueueError> {
        let Some(queue) = running.queues.first_mut() else { return Ok(Progress::Done) };
        let mut moved = 0;
        for _ in 0..BATCH {
            match self.serve_one(queue, running.mem)? {
                Some(bytes) => moved += bytes,
                None => return Ok(Progress::Done),
            }
            if moved >= BATCH_BYTES {
                break;
            }
        }
        Ok(Progress::More)
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
