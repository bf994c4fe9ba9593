//! Guest memory: one memfd, mapped in one or two pieces around the hole for device registers.
//!
//! [`GuestRam::new`] checks the size against the host before anything is created. Pages are taken from the
//! host only when they are first used.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::{GuestMemory, GuestRegion, PageLog};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress};

use crate::layout::{HIGH_MEMORY_START, MMIO_HOLE_START};

/// Less memory than this holds no guest at all, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

// mmap(2) constants of Linux on x86-64.
const PROT_READ_WRITE: i32 = 1 | 2;
const MAP_SHARED: i32 = 1;
const MAP_NORESERVE: i32 = 0x4000;

/// A number of bytes for people: `512M`, `1536K`, `100 bytes`. From 10M on, parts of a mebibyte are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 >> shift != 0 && self.0.trailing_zeros() >= shift;
        match self.0 {
            _ if fits(30) => write!(f, "{}G", self.0 >> 30),
            _ if fits(20) || self.0 >= 10 << 20 => write!(f, "{}M", self.0 >> 20),
            _ if fits(10) => write!(f, "{}K", self.0 >> 10),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No guest fits.
    #[error("guest memory of {size} is too little: give at least {}", ByteSize(MIN_MEMORY_BYTES))]
    TooSmall {
        /// What was asked for.
        size: ByteSize,
    },
    /// Not a whole number of pages.
    #[error("guest memory of {} bytes is not a multiple of 4K: round it to one", .size.0)]
    Misaligned {
        /// What was asked for.
        size: ByteSize,
    },
    /// The host does not have that much.
    #[error("guest memory of {size} is more than the {host} that this host has: give less")]
    TooLarge {
        /// What was asked for.
        size: ByteSize,
        /// The host's memory.
        host: ByteSize,
    },
    /// The host refused.
    #[error("guest memory of {size}: the host refused ({reason}): give less, or free memory")]
    Refused {
        /// What was asked for.
        size: ByteSize,
        /// The host's answer.
        reason: String,
    },
}

/// All guest memory and the file that holds it.
pub struct GuestRam {
    /// The regions, mapped.
    pub memory: GuestMemory,
    /// The same regions one by one, as an engine takes them.
    pub regions: Vec<Arc<GuestRegion>>,
    /// The memfd behind all regions; they follow each other in it without gaps.
    pub file: Arc<File>,
}

impl GuestRam {
    /// Creates `size_bytes` of zeroed guest memory.
    ///
    /// # Errors
    /// [`MemoryError`] if the size is below [`MIN_MEMORY_BYTES`], not page aligned, more than the host's
    /// memory, or refused by the host.
    pub fn new(size_bytes: u64) -> Result<Self, MemoryError> {
        let size = ByteSize(size_bytes);
        check_size(size_bytes, host_memory_bytes())?;
        let refused = |reason: String| MemoryError::Refused { size, reason };
        let fd = memfd_create("harrier-guest-memory", MemfdFlags::CLOEXEC)
            .map_err(|err| refused(err.to_string()))?;
        let file = File::from(fd);
        file.set_len(size_bytes).map_err(|err| refused(err.to_string()))?;
        let file = Arc::new(file);
        let mut regions = Vec::new();
        for (gpa, offset, len) in pieces(size_bytes) {
            let len = usize::try_from(len).map_err(|err| refused(err.to_string()))?;
            let mapping = MmapRegionBuilder::new_with_bitmap(len, PageLog::with_len(len))
                .with_mmap_prot(PROT_READ_WRITE)
                .with_mmap_flags(MAP_SHARED | MAP_NORESERVE)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                .build()
                .map_err(|err| refused(err.to_string()))?;
            let region = GuestRegion::new(mapping, GuestAddress(gpa))
                .ok_or_else(|| refused("the addresses overflow".to_owned()))?;
            regions.push(Arc::new(region));
        }
        let memory =
            GuestMemory::from_arc_regions(regions.clone()).map_err(|err| refused(err.to_string()))?;
        Ok(GuestRam { memory, regions, file })
    }
}

/// The host's memory in bytes, swap not counted.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)))
}

fn check_size(size_bytes: u64, host_bytes: u64) -> Result<(), MemoryError> {
    let size = ByteSize(size_bytes);
    if size_bytes < MIN_MEMORY_BYTES {
        return Err(MemoryError::TooSmall { size });
    }
    if size_bytes > host_bytes {
        return Err(MemoryError::TooLarge { size, host: ByteSize(host_bytes) });
    }
    if !size_bytes.is_multiple_of(PAGE_SIZE as u64) {
        return Err(MemoryError::Misaligned { size });
    }
    Ok(())
}

/// Guest physical address, file offset and length of each region.
fn pieces(size_bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = size_bytes.min(MMIO_HOLE_START);
    let mut pieces = vec![(0, 0, low)];
    if size_bytes > low {
        pieces.push((HIGH_MEMORY_START, low, size_bytes - low));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn sizes_that_cannot_work_are_refused_with_the_value_and_a_remedy() {
        for (size, host, text) in [
            (0, 8 << 30, "guest memory of 0 bytes is too little: give at least 2M"),
            ((1 << 20) + 1, 8 << 30, "guest memory of 1048577 bytes is too little: give at least 2M"),
            (
                (4 << 20) + 1,
                8 << 30,
                "guest memory of 4194305 bytes is not a multiple of 4K: round it to one",
            ),
            (16 << 30, 8 << 30, "guest memory of 16G is more than the 8G that this host has: give less"),
            (
                u64::MAX,
                8 << 30,
                "guest memory of 17592186044415M is more than the 8G that this host has: give less",
            ),
        ] {
            assert_eq!(check_size(size, host).unwrap_err().to_string(), text);
        }
        check_size(2 << 20, 2 << 20).unwrap();
    }

    #[test]
    fn memory_above_3_gib_goes_on_at_4_gib() {
        assert_eq!(pieces(512 << 20), [(0, 0, 512 << 20)]);
        assert_eq!(pieces(0xc000_0000), [(0, 0, 0xc000_0000)]);
        assert_eq!(pieces(4 << 30), [(0, 0, 0xc000_0000), (0x1_0000_0000, 0xc000_0000, 0x4000_0000)]);
    }

    #[test]
    fn memory_is_zero_writable_and_logged() {
        let ram = GuestRam::new(4 << 20).unwrap();
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        ram.memory.write_obj(7u32, GuestAddress(0x2ffe)).unwrap();
        let region = ram.memory.iter().next().unwrap();
        assert_eq!(region.len(), 4 << 20);
        let dirty = [0x1000, 0x2fff, 0x3000, 0x4000].map(|at| region.bitmap().dirty_at(at));
        assert_eq!(dirty, [false, true, true, false]);
        assert_eq!(ram.file.metadata().unwrap().len(), 4 << 20);
    }

    #[test]
    fn byte_sizes_are_exact_up_to_10_mebibytes() {
        let texts =
            [0, 512 << 20, 1536 << 10, 3 << 30, 4097, (100 << 20) + 4096].map(|n| ByteSize(n).to_string());
        assert_eq!(texts, ["0 bytes", "512M", "1536K", "3G", "4097 bytes", "100M"]);
    }
}
