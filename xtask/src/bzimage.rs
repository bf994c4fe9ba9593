//! Taking the vmlinux out of a bzImage (Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::cache;

/// Compressed formats by their first bytes, and the program that undoes them. The payload ends with four bytes more, the
/// unpacked size, so a complaint about what follows the stream is not a failure.
const FORMATS: &[(&[u8], &str, &[&str])] = &[
    (b"\xfd7zXZ\0", "xz", &["-dc", "--single-stream"]),
    (b"\x28\xb5\x2f\xfd", "zstd", &["-qdc"]),
    (b"\x1f\x8b", "gzip", &["-dc"]),
    (b"\x02\x21\x4c\x18", "lz4", &["-dc"]),
    (b"\x5d\0\0", "xz", &["-dc", "--format=lzma"]),
];

/// Writes the ELF kernel that is packed in the bzImage `image` to `vmlinux`.
pub(crate) fn extract(image: &Path, vmlinux: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{} is not a bzImage", image.display()))?;
    let Some((_, program, arguments)) = FORMATS.iter().find(|(magic, ..)| payload.starts_with(magic)) else {
        bail!("{} is packed in an unknown way", image.display());
    };
    let elf = unpack(payload, program, arguments)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("{} does not unpack to an ELF kernel", image.display());
    }
    fs::write(vmlinux, elf).map_err(|error| cache::explain(error, vmlinux))
}

/// The compressed kernel: at `payload_offset` of the protected-mode code, which follows the boot sector and the
/// `setup_sects` sectors after it. Boot protocol 2.08 and later.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| image.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let version = u16::from_le_bytes(image.get(0x206..0x208)?.try_into().ok()?);
    if image.get(0x202..0x206)? != b"HdrS" || version < 0x208 {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let start = (setup_sectors + 1) * 512 + usize::try_from(u32_at(0x248)?).ok()?;
    let length = usize::try_from(u32_at(0x24c)?).ok()?;
    image.get(start..start.checked_add(length)?)
}

fn unpack(payload: &[u8], program: &str, arguments: &[&str]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child.stdin.take().context("no input to write")?;
    std::thread::scope(|scope| {
        // The program may stop reading at the end of the stream, before the four bytes.
        scope.spawn(move || drop(stdin.write_all(payload)));
        Ok(child.wait_with_output()?.stdout)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with one setup sector, and `packed` at offset 16 of the code.
    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        image.extend_from_slice(packed);
        image
    }

    #[test]
    fn the_kernel_comes_out_of_an_image_with_the_size_after_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("bzImage"), dir.path().join("vmlinux"));
        let elf = [b"\x7fELF".as_slice(), &[7; 100_000]].concat();
        let mut packed = unpack(&elf, "xz", &["-zc"]).unwrap();
        packed.extend_from_slice(&100_004_u32.to_le_bytes());
        fs::write(&from, image(&packed)).unwrap();
        extract(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), elf);
    }

    #[test]
    fn a_damaged_image_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("bzImage"), dir.path().join("vmlinux"));
        for bytes in [Vec::new(), vec![0; 4096], image(b"no stream"), image(b"\xfd7zXZ\0 broken")] {
            fs::write(&from, bytes).unwrap();
            assert!(extract(&from, &to).is_err());
            assert!(!to.exists());
        }
        let mut too_long = image(b"\xfd7zXZ\0");
        too_long[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&too_long), None);
    }
}
