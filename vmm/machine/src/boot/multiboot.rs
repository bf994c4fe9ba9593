//! Multiboot kernels (Multiboot specification 0.6.96), which bare-metal test guests use.

use super::elf::{self, Class};
use super::image::{self, Image};
use super::memory_map::{RangeKind, memory_map};
use super::{Entry, KernelError, initrd, ram_run_end, write, write_command_line};
use crate::layout::{BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_MAX, KERNEL_START, MMIO_HOLE_START, START_INFO};
use crate::memory::GuestRam;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
const SEARCH_BYTES: usize = 8192;
/// The header has load addresses of its own (bit 16).
const HAS_ADDRESSES: u32 = 1 << 16;
const INFO_MEMORY: u32 = 1;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_BYTES: u32 = 116;
/// Bits 0 to 15 ask for things that a loader must provide; it knows pages (0) and memory information (1).
const KNOWN_REQUIREMENTS: u32 = 0b11;

/// Conventional memory in which this loader puts nothing: programs for real mode may lie there.
const LOW_ROOM: std::ops::Range<u64> = BOOT_PARAMS..COMMAND_LINE;

/// A multiboot header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    offset: u64,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: [u32; 5],
}

/// Looks for a header in the first 8 KiB.
pub(super) fn find_header(image: &dyn Image) -> Option<Header> {
    let head: [u8; SEARCH_BYTES] = image::head(image).ok()?;
    let word = |at: usize| {
        head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    let at = (0..SEARCH_BYTES - 12).step_by(4).find(|at| {
        word(*at) == HEADER_MAGIC && word(*at).wrapping_add(word(at + 4)).wrapping_add(word(at + 8)) == 0
    })?;
    let addresses = [12, 16, 20, 24, 28].map(|field| word(at + field));
    Some(Header { offset: at as u64, flags: word(at + 4), addresses })
}

/// Loads the kernel, its module and the information structure.
pub(super) fn load(
    kernel: &dyn Image,
    header: &Header,
    module: Option<&dyn Image>,
    command_line: &str,
    ram: &GuestRam,
) -> Result<Entry, KernelError> {
    let memory = &ram.memory;
    let not = |what| KernelError::NotAKernel { name: kernel.name().to_owned(), what };
    if header.flags & 0xffff & !KNOWN_REQUIREMENTS != 0 {
        return Err(not("a multiboot kernel that wants a video mode or more"));
    }
    let (entry, end) = if header.flags & HAS_ADDRESSES != 0 {
        load_at_addresses(kernel, header, ram)?
    } else {
        let plan = elf::plan(kernel, Some(LOW_ROOM), memory)?;
        if plan.class != Class::Elf32 {
            return Err(not("a 64-bit ELF file with a multiboot header"));
        }
        elf::load(kernel, &plan, ram)?;
        (plan.entry, plan.end.max(KERNEL_START))
    };
    write_command_line(kernel, command_line, COMMAND_LINE_MAX - 1, memory)?;
    let module = module.map(|image| initrd::place(image, end, MMIO_HOLE_START, ram)).transpose()?;

    let low_end = ram_run_end(memory, KERNEL_START);
    let map = memory_map(memory);
    let modules_gpa = START_INFO as u32 + INFO_BYTES;
    let map_gpa = modules_gpa + 16;
    let mut info = vec![0u32; INFO_BYTES as usize / 4];
    let mut set = |index: usize, value: u32| {
        if let Some(word) = info.get_mut(index) {
            *word = value;
        }
    };
    let has_module = if module.is_some() { INFO_MODULES } else { 0 };
    set(0, INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | has_module);
    set(1, 639);
    set(2, u32::try_from((low_end - KERNEL_START) >> 10).unwrap_or(u32::MAX));
    set(4, COMMAND_LINE as u32);
    if module.is_some() {
        set(5, 1);
        set(6, modules_gpa);
    }
    set(11, map.len() as u32 * 24);
    set(12, map_gpa);
    let module_words = module.map_or([0; 4], |module| {
        // Without a string of its own; zero is the start of memory, which holds an empty one.
        [module.gpa as u32, (module.gpa + module.len_bytes) as u32, 0, 0]
    });
    let mut bytes: Vec<u8> = info.iter().chain(&module_words).flat_map(|word| word.to_le_bytes()).collect();
    for range in &map {
        bytes.extend_from_slice(&20u32.to_le_bytes());
        bytes.extend_from_slice(&range.gpa.to_le_bytes());
        bytes.extend_from_slice(&range.len_bytes.to_le_bytes());
        let kind: u32 = if range.kind == RangeKind::Usable { 1 } else { 2 };
        bytes.extend_from_slice(&kind.to_le_bytes());
    }
    write(memory, START_INFO, "the multiboot information", &bytes)?;
    Ok(Entry::Protected32 { eip: entry as u32, eax: LOADER_MAGIC, ebx: START_INFO as u32 })
}

/// The form with addresses in the header itself; returns entry and end.
fn load_at_addresses(kernel: &dyn Image, header: &Header, ram: &GuestRam) -> Result<(u64, u64), KernelError> {
    let bad = || KernelError::NotAKernel {
        name: kernel.name().to_owned(),
        what: "a multiboot kernel whose addresses contradict each other",
    };
    let [header_addr, load_addr, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let file_offset = header_addr
        .checked_sub(load_addr)
        .and_then(|distance| header.offset.checked_sub(distance))
        .ok_or_else(bad)?;
    let available = kernel.len_bytes().saturating_sub(file_offset);
    let file_bytes = match load_end {
        0 => available,
        end => end.checked_sub(load_addr).ok_or_else(bad)?,
    };
    if file_bytes > available {
        return Err(KernelError::Truncated {
            name: kernel.name().to_owned(),
            len: kernel.len_bytes(),
            needed: file_offset.saturating_add(file_bytes),
        });
    }
    let end = load_addr.saturating_add(file_bytes).max(bss_end);
    if load_addr < KERNEL_START || ram_run_end(&ram.memory, load_addr) < end {
        return Err(KernelError::SegmentOutside {
            name: kernel.name().to_owned(),
            gpa: load_addr,
            memory_bytes: end - load_addr,
        });
    }
    if !(load_addr..end).contains(&entry) {
        return Err(KernelError::EntryOutside { name: kernel.name().to_owned(), entry });
    }
    image::copy(kernel, file_offset, file_bytes, ram, load_addr)?;
    Ok((entry, end))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::image::BytesImage;
    use super::*;

    fn memory() -> GuestRam {
        GuestRam::new(16 << 20).unwrap()
    }

    fn flat_kernel(addresses: [u32; 5]) -> Vec<u8> {
        let mut file = vec![0x90; 64];
        let flags = HAS_ADDRESSES | 3;
        for word in [HEADER_MAGIC, flags, 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags)] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        for word in addresses {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.resize(4096, 0xf4);
        file
    }

    fn try_load(file: &[u8], ram: &GuestRam) -> Result<Entry, String> {
        let image = BytesImage::new("m", file);
        let header = find_header(&image).unwrap();
        let module = BytesImage::new("mod", b"NR_CPUS=2\n");
        load(&image, &header, Some(&module), "a b", ram).map_err(|err| err.to_string())
    }

    #[test]
    fn a_kernel_with_addresses_gets_the_state_and_information_of_the_specification() {
        let ram = memory();
        let memory = &ram.memory;
        let file = flat_kernel([0x10_0040, 0x10_0000, 0, 0x20_0000, 0x10_0060]);
        let entry = try_load(&file, &ram).unwrap();
        assert_eq!(entry, Entry::Protected32 { eip: 0x10_0060, eax: 0x2bad_b002, ebx: START_INFO as u32 });
        let word = |gpa: u64| memory.read_obj::<u32>(GuestAddress(gpa)).unwrap();
        assert_eq!(word(START_INFO), 0b100_1101);
        assert_eq!(word(START_INFO + 8), 15 << 10);
        let module = u64::from(word(START_INFO + 24));
        let mut text = [0; 10];
        memory.read_slice(&mut text, GuestAddress(word(module).into())).unwrap();
        assert_eq!(&text, b"NR_CPUS=2\n");
        assert_eq!(word(module + 4) - word(module), 10);
        let map = u64::from(word(START_INFO + 48));
        assert_eq!((word(START_INFO + 44), word(map)), (4 * 24, 20));
        assert_eq!(word(0x10_0000), 0x9090_9090);
    }

    #[test]
    fn an_elf_segment_may_lie_in_conventional_memory_beside_what_the_loader_writes() {
        for (gpa, fits) in [(0x8000, true), (0x6800, false), (0x1_fff0, false), (0x3000, false)] {
            let ram = memory();
            let mut file = vec![0; 0x1100];
            file[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
            // ET_EXEC for i386 with one program header behind this one.
            for (at, value) in [(16, 2u32 | 3 << 16), (24, gpa), (28, 52), (40, 52), (42, 32), (44, 1)] {
                file[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            let program_header = [1, 0x1000, gpa, gpa, 0x100, 0x100, 5, 4];
            for (word, place) in program_header.iter().zip(file[52..84].chunks_exact_mut(4)) {
                place.copy_from_slice(&u32::to_le_bytes(*word));
            }
            for (at, word) in [(96, HEADER_MAGIC), (100, 0), (104, 0u32.wrapping_sub(HEADER_MAGIC))] {
                file[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            let loaded = try_load(&file, &ram);
            assert_eq!(loaded.is_ok(), fits, "{gpa:#x}: {loaded:?}");
        }
    }

    #[test]
    fn contradictory_addresses_are_refused() {
        for addresses in [
            [0x10_0040, 0x10_0001, 0, 0, 0x10_0060],
            [0x0f_ffff, 0x10_0000, 0, 0, 0x10_0060],
            [0x10_0040, 0x10_0000, 0x0f_0000, 0, 0x10_0060],
            [0x10_0040, 0x10_0000, 0x11_0000, 0, 0x10_0060],
            [0x10_0040, 0x10_0000, 0, 0xffff_ffff, 0x10_0060],
            [0x10_0040, 0x10_0000, 0, 0, 0x30_0060],
            [0x40, 0, 0, 0, 0x60],
        ] {
            let result = try_load(&flat_kernel(addresses), &memory());
            assert_eq!(
                result.is_ok(),
                addresses == [0x10_0040, 0x10_0001, 0, 0, 0x10_0060],
                "{addresses:x?}"
            );
        }
    }
}
