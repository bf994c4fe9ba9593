//! Putting a kernel into guest memory and the boot processor in front of it.
//!
//! [`load`] recognises the format, checks the whole file against guest memory, copies or maps it there, writes what the
//! boot protocol wants beside it and returns the [`Entry`] at which the processor starts. Formats: ELF vmlinux
//! (through its PVH note or the 64-bit Linux entry), bzImage (64-bit entry), multiboot 1, and flat images for
//! test guests. Files are hostile: nothing is put there before all of a file's numbers have been checked.

mod bzimage;
mod elf;
mod entry;
mod image;
mod initrd;
mod linux;
mod memory_map;
mod multiboot;
mod pvh;

use harrier_engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub use entry::Entry;
pub use image::{BytesImage, FileImage, Image, ImageError};
pub use initrd::InitrdError;

use crate::layout;
use crate::memory::{ByteSize, GuestRam};

/// ELF header: the class of 64-bit files.
const ELF_CLASS_64: u8 = 2;

/// Which entry of an ELF kernel is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ElfEntry {
    /// The 64-bit Linux entry, but PVH where the kernel has its note and none that says it is Linux: Linux takes a seed
    /// for its random numbers by its own protocol only.
    #[default]
    Auto,
    /// The entry that the PVH note names, in 32-bit protected mode.
    Pvh,
    /// The ELF header's entry, in 64-bit mode with Linux boot parameters.
    Linux64,
}

/// How a machine begins.
pub enum Boot<'a> {
    /// A kernel in one of the known formats.
    Kernel {
        /// The kernel file.
        kernel: &'a dyn Image,
        /// The initial ramdisk; for a multiboot kernel, its module.
        initrd: Option<&'a dyn Image>,
        /// Kernel command line.
        command_line: &'a str,
        /// For an ELF kernel with both entries.
        elf_entry: ElfEntry,
    },
    /// Bytes without a format.
    Flat {
        /// The bytes.
        image: &'a dyn Image,
        /// Guest physical address of the first one.
        gpa: u64,
        /// Where and in which mode the processor starts.
        entry: Entry,
    },
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum KernelError {
    /// The file cannot be read.
    #[error("kernel {0}")]
    Image(#[from] ImageError),
    /// A format that is no kernel.
    #[error("'{name}' is {what}, not a kernel: give a Linux vmlinux or bzImage for x86-64")]
    NotAKernel { name: String, what: &'static str },
    /// A kernel in a compressed file.
    #[error("kernel '{name}' is compressed with {format}: unpack it first")]
    Compressed { name: String, format: &'static str },
    /// A kernel for another processor.
    #[error("kernel '{name}' is for {machine}: give one for x86-64")]
    ForeignArchitecture { name: String, machine: String },
    /// A kernel for 32-bit x86.
    #[error("'{name}' is a 32-bit kernel: give one for x86-64")]
    Is32Bit { name: String },
    /// An old bzImage.
    #[error(
        "kernel '{name}' has boot protocol {}.{:02}, too old to boot: give Linux 3.8 or newer",
        version >> 8, version & 0xff
    )]
    TooOld { name: String, version: u16 },
    /// The file ends too early.
    #[error(
        "kernel '{name}' ends after {len} of at least {needed} bytes: the file is truncated, get it again"
    )]
    Truncated { name: String, len: u64, needed: u64 },
    /// Two segments share memory.
    #[error(
        "kernel '{name}': its segments at {first:#x} and {second:#x} overlap: the file is damaged, build it again"
    )]
    SegmentsOverlap { name: String, first: u64, second: u64 },
    /// A segment where no memory can be.
    #[error(
        "kernel '{name}': its segment at {gpa:#x} ({memory_bytes} bytes) is outside the memory that a kernel may use: \
         the file is damaged or not for this machine"
    )]
    SegmentOutside { name: String, gpa: u64, memory_bytes: u64 },
    /// It fits, but not this machine.
    #[error("kernel '{name}' needs {needed} of memory and the machine has {have} there: give more memory")]
    MemoryTooSmall { name: String, needed: ByteSize, have: ByteSize },
    /// The entry address is in no segment.
    #[error(
        "kernel '{name}': its entry {entry:#x} is outside its segments: the file is damaged, build it again"
    )]
    EntryOutside { name: String, entry: u64 },
    /// PVH was asked for.
    #[error("kernel '{name}' has no PVH note: build it with CONFIG_PVH, or use another entry")]
    NoPvhNote { name: String },
    /// The command line cannot be passed.
    #[error("the kernel command line is {len} bytes long and kernel '{name}' takes {max}: shorten it")]
    CommandLineTooLong { name: String, len: usize, max: u64 },
    /// The command line has a byte that would end it.
    #[error("the kernel command line has a zero byte: remove it")]
    CommandLineZero,
    /// Something of the loader's does not fit.
    #[error("no room for {what} of {len} bytes at {gpa:#x}: give more memory")]
    NoRoom { what: &'static str, len: u64, gpa: u64 },
    /// The ramdisk is wrong.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
}

/// Loads `boot` into `ram` and says where the processor starts.
///
/// # Errors
/// [`KernelError`] names the file, what is wrong with it and what to do. Memory may have been written.
pub fn load(boot: &Boot<'_>, ram: &GuestRam) -> Result<Entry, KernelError> {
    match *boot {
        Boot::Kernel { kernel, initrd, command_line, elf_entry } => {
            load_kernel(kernel, initrd, command_line, elf_entry, ram)
        }
        Boot::Flat { image, gpa, entry } => {
            let len = image.len_bytes();
            if gpa.checked_add(len).is_none_or(|end| ram_run_end(&ram.memory, gpa) < end) {
                return Err(KernelError::NoRoom { what: "the flat image", len, gpa });
            }
            image::copy(image, 0, len, ram, gpa)?;
            Ok(entry)
        }
    }
}

fn load_kernel(
    kernel: &dyn Image,
    initrd: Option<&dyn Image>,
    command_line: &str,
    elf_entry: ElfEntry,
    ram: &GuestRam,
) -> Result<Entry, KernelError> {
    let memory = &ram.memory;
    let name = || kernel.name().to_owned();
    let head: [u8; 0x400] = image::head(kernel)?;
    let elf_class = head.get(4).copied().filter(|_| elf::is_elf(&head));
    if bzimage::is_bzimage(&head) {
        let plan = bzimage::plan(kernel, memory)?;
        let max = u64::from(plan.header.cmdline_size);
        write_command_line(kernel, command_line, max, memory)?;
        bzimage::load(kernel, &plan, ram)?;
        let limit = u64::from(plan.header.initrd_addr_max);
        let ramdisk = initrd.map(|image| initrd::load(image, plan.end, limit, ram)).transpose()?;
        linux::write_boot_params(Some(&plan.header), ramdisk, command_line, memory)?;
        ram.advise_large(linux::page_structs(memory, ramdisk));
        return linux::entry(plan.entry, memory);
    }
    if let Some(header) = multiboot::find_header(kernel).filter(|_| elf_class != Some(ELF_CLASS_64)) {
        return multiboot::load(kernel, &header, initrd, command_line, ram);
    }
    if elf_class.is_none() {
        return Err(describe_stranger(kernel, &head));
    }
    let plan = elf::plan(kernel, None, memory)?;
    if plan.class == elf::Class::Elf32 {
        return Err(KernelError::Is32Bit { name: name() });
    }
    write_command_line(kernel, command_line, linux::COMMAND_LINE_BYTES, memory)?;
    elf::load(kernel, &plan, ram)?;
    let ramdisk = initrd.map(|image| initrd::load(image, plan.end, linux::INITRD_LIMIT, ram)).transpose()?;
    match (elf_entry, plan.pvh_entry) {
        (ElfEntry::Pvh, None) => Err(KernelError::NoPvhNote { name: name() }),
        (ElfEntry::Auto, Some(entry)) if !plan.is_linux => pvh::prepare(entry, ramdisk, memory),
        (ElfEntry::Pvh, Some(entry)) => pvh::prepare(entry, ramdisk, memory),
        (ElfEntry::Linux64 | ElfEntry::Auto, _) => {
            linux::write_boot_params(None, ramdisk, command_line, memory)?;
            if plan.is_linux {
                ram.advise_large(linux::page_structs(memory, ramdisk));
            }
            linux::entry(plan.entry, memory)
        }
    }
}

/// Whether `kernel` takes the command line of Linux: a multiboot program takes arguments of its own.
///
/// # Errors
/// [`ImageError`] if the file cannot be read.
pub(crate) fn is_linux(kernel: &dyn Image) -> Result<bool, ImageError> {
    let head: [u8; 0x400] = image::head(kernel)?;
    Ok(bzimage::is_bzimage(&head) || elf::is_elf(&head) && head.get(4) == Some(&ELF_CLASS_64))
}

/// Says what a file without a known format is.
fn describe_stranger(kernel: &dyn Image, head: &[u8; 0x400]) -> KernelError {
    let name = kernel.name().to_owned();
    if let Some(format) = initrd::compression(head) {
        return KernelError::Compressed { name, format };
    }
    // Linux's own headers of other architectures: Documentation/arch/{arm64,riscv}/boot*.rst.
    match head.get(0x38..0x3c) {
        Some(b"ARM\x64") => return KernelError::ForeignArchitecture { name, machine: "ARM64".to_owned() },
        Some(b"RSC\x05") => return KernelError::ForeignArchitecture { name, machine: "RISC-V".to_owned() },
        _ => {}
    }
    if kernel.len_bytes() < 0x400 && (head.starts_with(b"\x7fE") || head.starts_with(b"MZ")) {
        return KernelError::Truncated { name, len: kernel.len_bytes(), needed: 0x400 };
    }
    let what = if head.starts_with(b"#!") { "a script" } else { "a file in no known kernel format" };
    KernelError::NotAKernel { name, what }
}

fn write_command_line(
    kernel: &dyn Image,
    command_line: &str,
    max: u64,
    memory: &GuestMemory,
) -> Result<(), KernelError> {
    if command_line.contains('\0') {
        return Err(KernelError::CommandLineZero);
    }
    let max = max.min(layout::COMMAND_LINE_MAX - 1);
    if command_line.len() as u64 > max {
        return Err(KernelError::CommandLineTooLong {
            name: kernel.name().to_owned(),
            len: command_line.len(),
            max,
        });
    }
    let bytes = [command_line.as_bytes(), &[0]].concat();
    write(memory, layout::COMMAND_LINE, "the command line", &bytes)
}

/// Writes one of the loader's own structures.
fn write(memory: &GuestMemory, gpa: u64, what: &'static str, bytes: &[u8]) -> Result<(), KernelError> {
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(|_| KernelError::NoRoom {
        what,
        len: bytes.len() as u64,
        gpa,
    })
}

/// Where the run of memory that contains `gpa` ends; `gpa` itself if there is no memory.
fn ram_run_end(memory: &GuestMemory, gpa: u64) -> u64 {
    match memory.find_region(GuestAddress(gpa)) {
        Some(region) => region.start_addr().0.saturating_add(region.len()),
        None => gpa,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 64 << 20;

    fn memory() -> GuestRam {
        GuestRam::new(RAM).unwrap()
    }

    fn try_load(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> Result<Entry, String> {
        let kernel = BytesImage::new("k", kernel);
        let initrd = initrd.map(|bytes| BytesImage::new("i", bytes));
        let boot = Boot::Kernel {
            kernel: &kernel,
            initrd: initrd.as_ref().map(|image| image as &dyn Image),
            command_line,
            elf_entry: ElfEntry::Auto,
        };
        load(&boot, &memory()).map_err(|err| err.to_string())
    }

    #[test]
    fn strangers_are_described() {
        let arm = {
            let mut bytes = vec![0; 0x1000];
            bytes[0x38..0x3c].copy_from_slice(b"ARM\x64");
            bytes
        };
        let cases: [(&[u8], &str); 6] = [
            (&[0xa5; 4096], "no known kernel format"),
            (b"#!/bin/sh\n", "a script"),
            (&[0x1f, 0x8b, 8, 0], "compressed with gzip"),
            (&arm, "is for ARM64"),
            (b"\x7fEL", "truncated"),
            (b"x", "no known kernel format"),
        ];
        for (bytes, text) in cases {
            let error = try_load(bytes, None, "").unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused_and_one_that_does_is_written() {
        let kernel = bzimage::tests::bzimage(|_| {});
        let error = try_load(&kernel, None, &"x".repeat(2048)).unwrap_err();
        assert_eq!(error, "the kernel command line is 2048 bytes long and kernel 'k' takes 2047: shorten it");
        try_load(&kernel, None, &"x".repeat(2047)).unwrap();
        assert_eq!(
            try_load(&kernel, None, "a\0b").unwrap_err(),
            "the kernel command line has a zero byte: remove it"
        );
        let huge = bzimage::tests::bzimage(|h| h.cmdline_size = u32::MAX);
        let error = try_load(&huge, None, &"x".repeat(0x1_0000)).unwrap_err();
        assert!(error.contains("takes 65535"), "{error}");
    }

    #[test]
    fn the_entry_follows_the_format() {
        let note = elf::tests::pvh_note(0x100_0010);
        let elf = elf::tests::elf64(0x100_0000, &[(4, 0, &note, 0), (1, 0x100_0000, &[0xf4; 32], 32)]);
        assert_eq!(
            try_load(&elf, None, "").unwrap(),
            Entry::Protected32 { eip: 0x100_0010, eax: 0, ebx: layout::START_INFO as u32 }
        );
        let linux = [note, elf::tests::linux_note()].concat();
        let linux = elf::tests::elf64(0x100_0000, &[(4, 0, &linux, 0), (1, 0x100_0000, &[0xf4; 32], 32)]);
        let elf = elf::tests::elf64(0x100_0000, &[(1, 0x100_0000, &[0xf4; 32], 32)]);
        let long = |rip| Entry::Long64 { rip, rsi: layout::BOOT_PARAMS };
        assert_eq!(try_load(&elf, None, "").unwrap(), long(0x100_0000));
        assert_eq!(try_load(&linux, None, "").unwrap(), long(0x100_0000));
        assert_eq!(try_load(&bzimage::tests::bzimage(|_| {}), None, "").unwrap(), long(0x10_0200));
    }

    #[test]
    fn flat_images_must_fit_memory() {
        let bytes = [0xf4; 16];
        let image = BytesImage::new("f", &bytes);
        let entry = Entry::Real { cs: 0, ip: 0x7c00 };
        let mut boot = Boot::Flat { image: &image, gpa: 0x7c00, entry };
        assert_eq!(load(&boot, &memory()).unwrap(), entry);
        for outside in [RAM - 15, RAM, u64::MAX] {
            boot = Boot::Flat { image: &image, gpa: outside, entry };
            assert!(load(&boot, &memory()).is_err(), "{outside:#x}");
        }
    }
}
