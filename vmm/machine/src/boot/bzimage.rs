//! bzImage kernels, by the Linux/x86 boot protocol 2.12 and newer (Linux documentation, `x86/boot.rst`).

use harrier_engine::GuestMemory;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::image::{self, Image};
use super::{KernelError, ram_run_end};
use crate::layout::KERNEL_START;
use crate::memory::{ByteSize, GuestRam};

/// Offset of the setup header in the file and in the boot parameters.
const SETUP_HEADER: usize = 0x1f1;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry follows the 32-bit one at this distance.
const ENTRY_64: u64 = 0x200;

/// A checked bzImage.
#[derive(Debug, Clone)]
pub(super) struct BzImagePlan {
    /// The file's setup header, still without the loader's fields.
    pub(super) header: setup_header,
    /// Where the protected-mode kernel begins in the file.
    pub(super) file_offset: u64,
    /// Its length.
    pub(super) file_bytes: u64,
    /// Where it is loaded.
    pub(super) load_gpa: u64,
    /// The 64-bit entry.
    pub(super) entry: u64,
    /// First address that the kernel does not need before it has looked at the memory map.
    pub(super) end: u64,
}

/// Whether the image has a setup header.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x202..0x206) == Some(b"HdrS")
}

/// Checks the file's header against its length and `memory`.
pub(super) fn plan(image: &dyn Image, memory: &GuestMemory) -> Result<BzImagePlan, KernelError> {
    let name = || image.name().to_owned();
    let not = |what| KernelError::NotAKernel { name: name(), what };
    let head: [u8; 0x400] = image::head(image)?;
    let mut header = setup_header::default();
    let raw = head.get(SETUP_HEADER..SETUP_HEADER + size_of::<setup_header>()).unwrap_or_default();
    header.as_mut_slice().copy_from_slice(raw);
    if { header.header } != MAGIC || { header.boot_flag } != 0xaa55 {
        return Err(not("a file whose Linux setup header is damaged"));
    }
    let version = { header.version };
    if version < 0x020c || header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::TooOld { name: name(), version });
    }
    if { header.xloadflags } & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Is32Bit { name: name() });
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let file_offset = (setup_sectors + 1) * 512;
    let file_bytes = u64::from(header.syssize) * 16;
    if file_offset + file_bytes > image.len_bytes() {
        return Err(KernelError::Truncated {
            name: name(),
            len: image.len_bytes(),
            needed: file_offset + file_bytes,
        });
    }
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if file_bytes <= ENTRY_64 || payload_end > file_bytes {
        return Err(not("a bzImage whose sizes contradict each other"));
    }
    let alignment = u64::from(header.kernel_alignment);
    let preferred = { header.pref_address };
    let start = if header.relocatable_kernel == 0 {
        preferred
    } else if alignment.is_power_of_two() {
        // The kernel decompresses itself to its preferred address or above where it was loaded.
        KERNEL_START.next_multiple_of(alignment).max(preferred)
    } else {
        return Err(not("a bzImage with an invalid alignment"));
    };
    let image_end = KERNEL_START + file_bytes;
    let end = start
        .checked_add(u64::from(header.init_size))
        .filter(|_| start >= KERNEL_START)
        .ok_or_else(|| not("a bzImage with an invalid preferred address"))?
        .max(image_end);
    let have = ram_run_end(memory, KERNEL_START);
    if end > have {
        return Err(KernelError::MemoryTooSmall {
            name: name(),
            needed: ByteSize(end.checked_next_multiple_of(1 << 20).unwrap_or(end)),
            have: ByteSize(have),
        });
    }
    Ok(BzImagePlan {
        header,
        file_offset,
        file_bytes,
        load_gpa: KERNEL_START,
        entry: KERNEL_START + ENTRY_64,
        end,
    })
}

/// Copies the protected-mode kernel of a checked file.
pub(super) fn load(image: &dyn Image, plan: &BzImagePlan, ram: &GuestRam) -> Result<(), KernelError> {
    Ok(image::copy(image, plan.file_offset, plan.file_bytes, ram, plan.load_gpa)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::image::BytesImage;
    use super::*;

    pub(crate) fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 0x100,
            boot_flag: 0xaa55,
            header: MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: 0x7f,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            payload_offset: 0x300,
            payload_length: 0x100,
            pref_address: 0x100_0000,
            init_size: 0x80_0000,
            ..Default::default()
        };
        change(&mut header);
        let mut file = vec![0; 1024 + 0x1000];
        file[SETUP_HEADER..SETUP_HEADER + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        file
    }

    fn plan_of(file: &[u8], memory_bytes: usize) -> Result<BzImagePlan, String> {
        let memory = GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), memory_bytes)]).unwrap();
        plan(&BytesImage::new("k", file), &memory).map_err(|err| err.to_string())
    }

    #[test]
    fn a_bzimage_is_loaded_at_1_mib_and_entered_in_64_bit_mode() {
        let plan = plan_of(&bzimage(|_| {}), 64 << 20).unwrap();
        assert_eq!((plan.load_gpa, plan.entry, plan.end), (0x10_0000, 0x10_0200, 0x180_0000));
        assert_eq!((plan.file_offset, plan.file_bytes), (1024, 0x1000));
    }

    #[test]
    fn what_cannot_boot_is_refused_with_its_reason() {
        type Change = fn(&mut setup_header);
        let cases: [(Change, &str); 9] = [
            (|h| h.xloadflags = 0, "is a 32-bit kernel"),
            (|h| h.version = 0x0206, "boot protocol 2.06"),
            (|h| h.loadflags = 0, "boot protocol"),
            (|h| h.boot_flag = 0, "damaged"),
            (|h| h.syssize = 0x101, "ends after 5120 of at least 5136 bytes"),
            (|h| h.payload_length = u32::MAX, "contradict"),
            (|h| h.kernel_alignment = 3, "invalid alignment"),
            (|h| h.pref_address = u64::MAX, "invalid preferred address"),
            (|h| h.init_size = 0x800_0000, "needs 144M of memory and the machine has 64M there"),
        ];
        for (change, text) in cases {
            let error = plan_of(&bzimage(change), 64 << 20).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }
}
