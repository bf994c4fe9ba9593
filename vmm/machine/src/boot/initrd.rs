//! The initial ramdisk: recognised, checked as far as that is cheap, and placed as high as the kernel allows.
//!
//! Formats are those that the kernel itself accepts (Linux documentation, `driver-api/early-userspace/
//! buffer-format.rst`): cpio archives in the "newc" form, possibly several, possibly compressed.

use super::image::{self, Image, ImageError};
use super::ram_run_end;
use crate::layout::KERNEL_START;
use crate::memory::{ByteSize, GuestRam};

const PAGE: u64 = 4096;
const CPIO_HEADER: u64 = 110;
/// More archive members than this are not looked at.
const MAX_MEMBERS: u32 = 1_000_000;

/// Why an initial ramdisk cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum InitrdError {
    /// The file cannot be read.
    #[error("initrd {0}")]
    Image(#[from] ImageError),
    /// Not a ramdisk.
    #[error(
        "initrd '{name}' is neither a cpio archive nor a compressed one (at byte {offset}): give an initramfs in newc format"
    )]
    UnknownFormat { name: String, offset: u64 },
    /// An archive that ends too early.
    #[error(
        "initrd '{name}' ends within its archive (at byte {offset}): the file is truncated, get it again"
    )]
    Truncated { name: String, offset: u64 },
    /// It does not fit beside the kernel.
    #[error("initrd '{name}' of {len} does not fit beside the kernel in {have} of memory: give more memory")]
    TooLarge { name: String, len: ByteSize, have: ByteSize },
}

/// Where a ramdisk lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ramdisk {
    pub(super) gpa: u64,
    pub(super) len_bytes: u64,
}

/// Checks the file, finds a place between `kernel_end` and `limit` (inclusive) and copies it there.
pub(super) fn load(
    image: &dyn Image,
    kernel_end: u64,
    limit: u64,
    ram: &GuestRam,
) -> Result<Ramdisk, InitrdError> {
    check_format(image)?;
    place(image, kernel_end, limit, ram)
}

/// [`load`] for a file of any content.
pub(super) fn place(
    image: &dyn Image,
    kernel_end: u64,
    limit: u64,
    ram: &GuestRam,
) -> Result<Ramdisk, InitrdError> {
    let len_bytes = image.len_bytes();
    let top = ram_run_end(&ram.memory, KERNEL_START).min(limit.saturating_add(1));
    let gpa = top.checked_sub(len_bytes).map(|gpa| gpa & !(PAGE - 1)).filter(|gpa| *gpa >= kernel_end);
    let Some(gpa) = gpa else {
        return Err(InitrdError::TooLarge {
            name: image.name().to_owned(),
            len: ByteSize(len_bytes),
            have: ByteSize(top),
        });
    };
    image::copy(image, 0, len_bytes, ram, gpa)?;
    Ok(Ramdisk { gpa, len_bytes })
}

/// The compression that a file's first bytes announce.
pub(super) fn compression(head: &[u8]) -> Option<&'static str> {
    let magics: [(&[u8], &str); 9] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0x1f, 0x9e], "gzip"),
        (b"BZh", "bzip2"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x5d, 0, 0], "lzma"),
        (&[0x89, b'L', b'Z', b'O'], "lzo"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
        (&[0x04, 0x22, 0x4d, 0x18], "lz4"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    ];
    magics.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, name)| *name)
}

/// Whether the file is a filesystem image, which a kernel can use as an old-style ramdisk.
fn is_filesystem(head: &[u8]) -> bool {
    head.get(0x438..0x43a) == Some(&[0x53, 0xef])
        || head.starts_with(b"hsqs")
        || head.starts_with(b"-rom1fs-")
        || head.starts_with(&0x28cd_3d45_u32.to_le_bytes())
}

fn check_format(image: &dyn Image) -> Result<(), InitrdError> {
    let head: [u8; 0x440] = image::head(image)?;
    if is_filesystem(&head) {
        return Ok(());
    }
    let mut at = 0;
    let mut members = 0;
    let mut found = false;
    while at < image.len_bytes() {
        let mut magic = [0; 6];
        let len = usize::try_from(image.len_bytes() - at).unwrap_or(usize::MAX).min(magic.len());
        image::read(image, at, magic.get_mut(..len).unwrap_or_default())?;
        if matches!(&magic, b"070701" | b"070702") {
            at = check_archive(image, at, &mut members)?;
            found = true;
        } else if magic[0] == 0 {
            at = skip_zeros(image, at)?;
        } else if compression(&magic).is_some() {
            // What is behind the first compressed byte is the kernel's to judge.
            return Ok(());
        } else {
            return Err(InitrdError::UnknownFormat { name: image.name().to_owned(), offset: at });
        }
        if members > MAX_MEMBERS {
            return Ok(());
        }
    }
    if found { Ok(()) } else { Err(InitrdError::UnknownFormat { name: image.name().to_owned(), offset: 0 }) }
}

/// The offset of the first byte from `at` on that is not zero.
fn skip_zeros(image: &dyn Image, mut at: u64) -> Result<u64, InitrdError> {
    let mut buf = vec![0; 64 << 10];
    while at < image.len_bytes() {
        let want = usize::try_from(image.len_bytes() - at).unwrap_or(usize::MAX).min(buf.len());
        let chunk = buf.get_mut(..want).unwrap_or_default();
        image::read(image, at, chunk)?;
        match chunk.iter().position(|byte| *byte != 0) {
            Some(zeros) => return Ok(at + zeros as u64),
            None => at += want as u64,
        }
    }
    Ok(at)
}

/// Walks one archive from its first header to behind its trailer.
fn check_archive(image: &dyn Image, mut at: u64, members: &mut u32) -> Result<u64, InitrdError> {
    let truncated = |offset| InitrdError::Truncated { name: image.name().to_owned(), offset };
    loop {
        let mut header = [0; CPIO_HEADER as usize];
        if at.saturating_add(CPIO_HEADER) > image.len_bytes() {
            return Err(truncated(at));
        }
        image::read(image, at, &mut header)?;
        if !matches!(header.get(..6), Some(b"070701" | b"070702")) {
            return Err(InitrdError::UnknownFormat { name: image.name().to_owned(), offset: at });
        }
        let field = |index: usize| {
            let raw = header.get(6 + index * 8..14 + index * 8)?;
            u32::from_str_radix(std::str::from_utf8(raw).ok()?, 16).ok().map(u64::from)
        };
        let (Some(file_bytes), Some(name_bytes)) = (field(6), field(11)) else {
            return Err(InitrdError::UnknownFormat { name: image.name().to_owned(), offset: at });
        };
        let name_at = at + CPIO_HEADER;
        let data_at = (name_at + name_bytes).next_multiple_of(4);
        let next = (data_at + file_bytes).next_multiple_of(4);
        if data_at.saturating_add(file_bytes) > image.len_bytes().next_multiple_of(4) {
            return Err(truncated(at));
        }
        let mut name = [0; 11];
        if name_bytes == name.len() as u64 && file_bytes == 0 {
            image.read_at(name_at, &mut name).map_err(|_| truncated(at))?;
            if &name == b"TRAILER!!!\0" {
                return Ok(next);
            }
        }
        *members += 1;
        if *members > MAX_MEMBERS {
            return Ok(image.len_bytes());
        }
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::super::image::BytesImage;
    use super::*;

    fn member(name: &str, data: &[u8]) -> Vec<u8> {
        let mut out = b"070701".to_vec();
        for field in [1, 0o100755, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            out.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn archive() -> Vec<u8> {
        [member("init", b"#!/bin/sh\n"), member("TRAILER!!!", b"")].concat()
    }

    fn check(bytes: &[u8]) -> Result<(), String> {
        check_format(&BytesImage::new("i", bytes)).map_err(|err| err.to_string())
    }

    #[test]
    fn what_kernels_accept_is_accepted() {
        check(&archive()).unwrap();
        check(&[archive(), vec![0; 512], archive()].concat()).unwrap();
        check(&[archive(), vec![0; 4], vec![0x1f, 0x8b, 8, 0]].concat()).unwrap();
        check(&[0x28, 0xb5, 0x2f, 0xfd, 1]).unwrap();
        let mut ext = vec![0; 0x440];
        ext[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        check(&ext).unwrap();
    }

    #[test]
    fn random_zero_and_truncated_ramdisks_are_refused() {
        assert!(check(&[0xa5; 4096]).unwrap_err().contains("neither a cpio archive nor a compressed one"));
        assert!(check(&[0; 4096]).unwrap_err().contains("neither"));
        let whole = archive();
        for len in 7..whole.len() - 4 {
            check(&whole[..len]).unwrap_err();
        }
        assert!(check(&whole[..130]).unwrap_err().contains("truncated"));
        assert!(check(&[archive(), b"garbage".to_vec()].concat()).unwrap_err().contains("neither"));
        let mut bad_digits = archive();
        bad_digits[54..62].copy_from_slice(b"zzzzzzzz");
        assert!(check(&bad_digits).is_err());
        let mut huge = archive();
        huge[54..62].copy_from_slice(b"ffffffff");
        assert!(check(&huge).unwrap_err().contains("truncated"));
    }

    #[test]
    fn the_ramdisk_goes_as_high_as_allowed_and_never_over_the_kernel() {
        let memory = GuestRam::new(64 << 20).unwrap();
        let bytes = archive();
        let image = BytesImage::new("i", &bytes);
        let disk = load(&image, 0x200_0000, u64::MAX, &memory).unwrap();
        assert_eq!(disk, Ramdisk { gpa: (64 << 20) - 4096, len_bytes: bytes.len() as u64 });
        let disk = load(&image, 0x200_0000, 0x2ff_ffff, &memory).unwrap();
        assert_eq!(disk.gpa, 0x2ff_f000);
        let error = load(&image, (64 << 20) - 100, u64::MAX, &memory).unwrap_err();
        assert!(error.to_string().ends_with("in 64M of memory: give more memory"), "{error}");
    }
}
