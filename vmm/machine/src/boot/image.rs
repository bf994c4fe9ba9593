//! Files that are loaded into a guest: kernels, initial ramdisks, modules.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use harrier_engine::GuestMemory;
use harrier_engine::memory::PAGE_SIZE;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

/// Bytes that are copied at a time: few enough to stay in the processor's cache and in memory that the allocator has already.
const CHUNK: u64 = 64 << 10;
/// Less than this is copied: a mapping costs more than a few pages.
const MAPPED_BYTES: u64 = 256 << 10;

/// Why a file cannot be loaded at all.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("'{name}' does not exist: check the path")]
    NotFound {
        /// The file's name.
        name: String,
    },
    /// A directory, a device or the like.
    #[error("'{name}' is a {kind}: give a regular file")]
    NotAFile {
        /// The file's name.
        name: String,
        /// What it is instead.
        kind: &'static str,
    },
    /// No bytes.
    #[error("'{name}' is empty: give a complete file")]
    Empty {
        /// The file's name.
        name: String,
    },
    /// The host refused to open or read it.
    #[error("'{name}' cannot be read ({source}): check the file and its permissions")]
    Unreadable {
        /// The file's name.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
}

/// A source of bytes with a name for messages.
pub trait Image {
    /// What messages call it.
    fn name(&self) -> &str;
    /// Length in bytes.
    fn len_bytes(&self) -> u64;
    /// Fills `buf` from `offset`; an error if the image ends before.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// The file with these bytes, if it stays as it is for as long as a machine may live: then its pages are mapped.
    fn unchanging_file(&self) -> Option<&File> {
        None
    }
}

/// A regular file.
#[derive(Debug)]
pub struct FileImage {
    name: String,
    file: File,
    len_bytes: u64,
    unchanging: bool,
}

impl FileImage {
    /// Opens `path` and notes its length.
    ///
    /// # Errors
    /// [`ImageError`] if it is missing, not a regular file, empty or not readable.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let name = path.display().to_string();
        // Looked at before opening: opening a named pipe would wait for its writer.
        check_kind(&name, std::fs::metadata(path))?;
        let file = File::open(path).map_err(|source| unreadable(&name, source))?;
        let len_bytes = check_kind(&name, file.metadata())?;
        if len_bytes == 0 {
            return Err(ImageError::Empty { name });
        }
        Ok(FileImage { name, file, len_bytes, unchanging: false })
    }

    /// As [`FileImage::open`], of a file that nobody ever writes to: guest memory then shows its pages instead of copies. If
    /// it were cut off all the same, the host would end the process.
    ///
    /// # Errors
    /// The same.
    pub fn open_unchanging(path: &Path) -> Result<Self, ImageError> {
        Ok(FileImage { unchanging: true, ..Self::open(path)? })
    }
}

fn unreadable(name: &str, source: io::Error) -> ImageError {
    let name = name.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => ImageError::NotFound { name },
        _ => ImageError::Unreadable { name, source },
    }
}

fn check_kind(name: &str, metadata: io::Result<std::fs::Metadata>) -> Result<u64, ImageError> {
    let metadata = metadata.map_err(|source| unreadable(name, source))?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    let kind = if metadata.is_dir() { "directory" } else { "device, pipe or socket" };
    Err(ImageError::NotAFile { name: name.to_owned(), kind })
}

impl Image for FileImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn unchanging_file(&self) -> Option<&File> {
        self.unchanging.then_some(&self.file)
    }
}

/// Bytes in memory.
#[derive(Debug, Clone)]
pub struct BytesImage<'a> {
    name: &'a str,
    bytes: &'a [u8],
}

impl<'a> BytesImage<'a> {
    /// Names `bytes`.
    pub fn new(name: &'a str, bytes: &'a [u8]) -> Self {
        BytesImage { name, bytes }
    }
}

impl Image for BytesImage<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let source = start
            .checked_add(buf.len())
            .and_then(|end| self.bytes.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(source);
        Ok(())
    }
}

/// The first bytes of an image, at most `N`; shorter images are padded with zeros.
pub(super) fn head<const N: usize>(image: &dyn Image) -> Result<[u8; N], ImageError> {
    let mut buf = [0; N];
    let len = usize::try_from(image.len_bytes()).unwrap_or(usize::MAX).min(N);
    if let Some(part) = buf.get_mut(..len) {
        read(image, 0, part)?;
    }
    Ok(buf)
}

/// [`Image::read_at`] with this module's error.
pub(super) fn read(image: &dyn Image, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
    image.read_at(offset, buf).map_err(|source| unreadable(image.name(), source))
}

/// Puts a part of the image into guest memory. The caller has checked both ranges.
pub(super) fn copy(
    image: &dyn Image,
    offset: u64,
    len: u64,
    ram: &GuestRam,
    gpa: u64,
) -> Result<(), ImageError> {
    let page = PAGE_SIZE as u64;
    // Whole pages; what follows the last one in the file is not part of it.
    let laid = len - len % page;
    let mut done = 0;
    if laid >= MAPPED_BYTES
        && let Some(file) = image.unchanging_file()
        && ram.lay(file, offset, gpa, laid).map_err(|err| unreadable(image.name(), err))?
    {
        done = laid;
    }
    let mut buf = vec![0; usize::try_from((len - done).min(CHUNK)).unwrap_or(0)];
    while done < len {
        let want = usize::try_from((len - done).min(CHUNK)).unwrap_or(0);
        let chunk = buf.get_mut(..want).unwrap_or_default();
        read(image, offset.saturating_add(done), chunk)?;
        write_but_zeros(&ram.memory, gpa.saturating_add(done), chunk)
            .map_err(|err| unreadable(image.name(), err))?;
        done += want as u64;
    }
    Ok(())
}

/// Writes to guest memory. Zeros are left out where memory has not been written yet: a kernel is a fifth of pages without
/// anything, which the host then need not allocate.
fn write_but_zeros(memory: &GuestMemory, gpa: u64, bytes: &[u8]) -> io::Result<()> {
    let is_written = |gpa: u64| match memory.to_region_addr(GuestAddress(gpa)) {
        Some((region, offset)) => region.bitmap().dirty_at(usize::try_from(offset.0).unwrap_or(usize::MAX)),
        None => true,
    };
    let mut rest = bytes;
    let mut at = gpa;
    while !rest.is_empty() {
        let run = run_of_pages(rest, at, is_written);
        let (pages, behind) = rest.split_at_checked(run.len).unwrap_or((rest, &[]));
        if run.is_needed {
            memory.write_slice(pages, GuestAddress(at)).map_err(io::Error::other)?;
        }
        at = at.saturating_add(pages.len() as u64);
        rest = behind;
    }
    Ok(())
}

/// Pages in a row that have to be written, or that need not be.
struct PageRun {
    len: usize,
    is_needed: bool,
}

/// The run that `bytes`, which are not empty, begin with; they go to `at`.
fn run_of_pages(bytes: &[u8], at: u64, is_written: impl Fn(u64) -> bool) -> PageRun {
    let mut run = PageRun { len: 0, is_needed: false };
    while let Some(rest) = bytes.get(run.len..).filter(|rest| !rest.is_empty()) {
        let to = at.saturating_add(run.len as u64);
        let in_page = usize::try_from(to).unwrap_or(0) % PAGE_SIZE;
        let page = rest.get(..PAGE_SIZE - in_page).unwrap_or(rest);
        let is_needed = page.iter().any(|byte| *byte != 0) || is_written(to);
        if run.len > 0 && is_needed != run.is_needed {
            break;
        }
        run = PageRun { len: run.len + page.len(), is_needed };
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_readable_regular_file_is_named() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let empty = dir.as_path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        let text = |path: &Path| FileImage::open(path).unwrap_err().to_string();
        assert!(text(dir.as_path()).ends_with("is a directory: give a regular file"));
        assert!(text(Path::new("/dev/null")).ends_with("is a device, pipe or socket: give a regular file"));
        assert!(text(&empty).ends_with("is empty: give a complete file"));
        assert!(text(&dir.as_path().join("none")).ends_with("does not exist: check the path"));
    }

    #[test]
    fn a_copy_arrives_in_mapped_memory_and_in_the_page_log() {
        let ram = crate::memory::GuestRam::new(4 << 20).unwrap();
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
        copy(&BytesImage::new("x", &bytes), 10, 4990, &ram, 0x20_0ff0).unwrap();
        let mut seen = vec![0; 4990];
        ram.memory.read_slice(&mut seen, GuestAddress(0x20_0ff0)).unwrap();
        assert!(seen == bytes[10..]);
        let log = ram.regions[0].bitmap();
        let dirty = [0x1f_ffff, 0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000].map(|at| log.dirty_at(at));
        assert_eq!(dirty, [false, true, true, true, false]);
    }

    #[test]
    fn zeros_are_copied_only_over_what_was_written() {
        let ram = crate::memory::GuestRam::new(4 << 20).unwrap();
        let log = ram.regions[0].bitmap();
        ram.memory.write_slice(&[7; 0x800], GuestAddress(0x10_2000)).unwrap();
        // Something, nothing, nothing over something, nothing, something: five pages from the middle of a page on.
        let mut bytes = vec![0; 0x5000];
        bytes[0x400] = 1;
        bytes[0x4fff] = 2;
        copy(&BytesImage::new("x", &bytes), 0, 0x5000, &ram, 0x10_0800).unwrap();
        let mut seen = vec![9; 0x5000];
        ram.memory.read_slice(&mut seen, GuestAddress(0x10_0800)).unwrap();
        assert!(seen == bytes);
        let dirty: Vec<bool> = (0x100..0x107).map(|page| log.dirty_at(page << 12)).collect();
        assert_eq!(dirty, [true, false, true, false, false, true, false]);
    }

    #[test]
    fn a_kernel_of_zeros_takes_no_pages_of_the_host() {
        let ram = crate::memory::GuestRam::new(64 << 20).unwrap();
        let mut bytes = vec![0; 40 << 20];
        bytes[20 << 20] = 1;
        copy(&BytesImage::new("x", &bytes), 0, 40 << 20, &ram, 1 << 20).unwrap();
        let mut used = Vec::new();
        crate::pagemap::visit(&ram.regions, |page, _| used.push(page)).unwrap();
        assert_eq!(used, [0x1500]);
        let mut one = [0];
        ram.memory.read_slice(&mut one, GuestAddress(21 << 20)).unwrap();
        assert_eq!(one, [1]);
    }

    #[test]
    fn a_file_that_stays_as_it_is_is_mapped_and_the_rest_of_its_page_is_zero() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("file");
        let bytes: Vec<u8> = (0..800_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let len = 700_000;
        for (image, laid) in
            [(FileImage::open_unchanging(&path).unwrap(), true), (FileImage::open(&path).unwrap(), false)]
        {
            let ram = GuestRam::new(8 << 20).unwrap();
            copy(&image, 4096, len, &ram, 0x20_0000).unwrap();
            let crate::memory::Backing::Own(list) = &ram.backing else { panic!("not its own") };
            let whole_pages = 0x20_0000 + len / 4096 * 4096;
            assert_eq!(list.ranges(), laid.then_some(0x20_0000..whole_pages).into_iter().collect::<Vec<_>>());
            let mut seen = vec![9; 720_000];
            ram.memory.read_slice(&mut seen, GuestAddress(0x20_0000)).unwrap();
            assert!(seen[..700_000] == bytes[4096..704_096]);
            assert!(seen[700_000..].iter().all(|byte| *byte == 0), "what follows in the file");
            // Written and released, it is memory as any other, and the file is as it was.
            ram.memory.write_slice(&[1; 8192], GuestAddress(0x20_0000)).unwrap();
            ram.release(0x20_0000, 0x2_0000).unwrap();
            ram.memory.read_slice(&mut seen, GuestAddress(0x20_0000)).unwrap();
            assert!(seen[..0x2_0000].iter().all(|byte| *byte == 0), "released");
            assert!(seen[0x2_0000..700_000] == bytes[4096 + 0x2_0000..704_096]);
            assert!(std::fs::read(&path).unwrap() == bytes);
        }
        // Not in whole pages: copied.
        let ram = GuestRam::new(8 << 20).unwrap();
        copy(&FileImage::open_unchanging(&path).unwrap(), 100, len, &ram, 0x20_0000).unwrap();
        let crate::memory::Backing::Own(list) = &ram.backing else { panic!("not its own") };
        assert_eq!(list.ranges(), []);
        assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(0x20_0000)).unwrap(), 100);
    }

    #[test]
    fn reading_past_the_end_of_bytes_is_an_error() {
        let image = BytesImage::new("x", &[1, 2, 3]);
        let mut two = [0; 2];
        image.read_at(1, &mut two).unwrap();
        assert_eq!(two, [2, 3]);
        assert!(image.read_at(2, &mut two).is_err());
        assert!(image.read_at(u64::MAX, &mut two).is_err());
    }
}
