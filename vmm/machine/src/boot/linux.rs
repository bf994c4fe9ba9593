//! The 64-bit Linux boot protocol: boot parameters and page tables (Linux documentation, `x86/boot.rst`,
//! "64-bit boot protocol", and `x86/zero-page.rst`).

use std::ops::Range;

use harrier_engine::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryRegion};

use super::initrd::Ramdisk;
use super::memory_map::memory_map;
use super::{Entry, KernelError, write};
use crate::layout::{ACPI_START, BOOT_PAGE_TABLES, BOOT_PARAMS, COMMAND_LINE, RNG_SEED};

/// Longest command line of an x86 kernel whose file does not say (COMMAND_LINE_SIZE without the zero).
pub(super) const COMMAND_LINE_BYTES: u64 = 2047;
/// Highest address of a ramdisk's last byte, for a kernel whose file does not say.
pub(super) const INITRD_LIMIT: u64 = 0x7fff_ffff;

const LOADER_UNDEFINED: u8 = 0xff;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
/// Boot protocol version that has `setup_data`.
const SETUP_DATA_VERSION: u16 = 0x0209;
/// `SETUP_RNG_SEED` of Linux's `asm/bootparam.h`, since 6.0. Earlier kernels skip what they do not know.
const SETUP_RNG_SEED: u32 = 9;
/// As many bits as the kernel's generator wants before it is ready.
const SEED_BYTES: usize = 32;

/// Writes the zero page; `header` is the kernel file's own setup header, where it has one.
pub(super) fn write_boot_params(
    header: Option<&setup_header>,
    ramdisk: Option<Ramdisk>,
    command_line: &str,
    memory: &GuestMemory,
) -> Result<(), KernelError> {
    let mut params = boot_params { acpi_rsdp_addr: ACPI_START, ..Default::default() };
    params.hdr = header.copied().unwrap_or(setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        kernel_alignment: 0x100_0000,
        initrd_addr_max: INITRD_LIMIT as u32,
        ..Default::default()
    });
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = u32::try_from(command_line.len()).unwrap_or(u32::MAX);
    // Pointers that only a loader may set; a file's own would send the kernel anywhere.
    params.hdr.setup_data = 0;
    if params.hdr.version >= SETUP_DATA_VERSION && write_seed(memory)? {
        params.hdr.setup_data = RNG_SEED;
    }
    if let Some(ramdisk) = ramdisk {
        params.hdr.ramdisk_image = ramdisk.gpa as u32;
        params.hdr.ramdisk_size = ramdisk.len_bytes as u32;
        params.ext_ramdisk_image = (ramdisk.gpa >> 32) as u32;
        params.ext_ramdisk_size = (ramdisk.len_bytes >> 32) as u32;
    } else {
        params.hdr.ramdisk_image = 0;
        params.hdr.ramdisk_size = 0;
    }
    let map = memory_map(memory);
    let mut table = params.e820_table;
    for (slot, range) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: range.gpa, size: range.len_bytes, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len().min(table.len()) as u8;
    write(memory, BOOT_PARAMS, "the boot parameters", params.as_slice())
}

/// Where Linux will put what it has of every page: it allocates downwards from the end of memory, or from the ramdisk there,
/// and writes all of it before its first process. A `struct page` has 64 bytes; some tables come before them.
pub(super) fn page_structs(memory: &GuestMemory, ramdisk: Option<Ramdisk>) -> Range<u64> {
    const TABLES: u64 = 2 << 20;
    const PAGES_PER_STRUCT_PAGE: u64 = 64;
    let size: u64 = memory.iter().map(|region| region.len()).sum();
    let last =
        memory.iter().map(|region| (region.start_addr().0, region.start_addr().0 + region.len())).max();
    let (start, memory_end) = last.unwrap_or_default();
    let end = match ramdisk {
        Some(ramdisk) if (ramdisk.gpa + ramdisk.len_bytes).next_multiple_of(4096) == memory_end => {
            ramdisk.gpa
        }
        _ => memory_end,
    };
    end.saturating_sub(size / PAGES_PER_STRUCT_PAGE + TABLES).max(start)..end
}

/// Writes a seed for the kernel's random numbers: a `struct setup_data`, the last of its list. Without one a kernel on a
/// processor without RDRAND hashes what little it has anew for each number. False if the host has none to give.
fn write_seed(memory: &GuestMemory) -> Result<bool, KernelError> {
    let mut seed = [0; SEED_BYTES];
    if !matches!(getrandom(&mut seed, GetRandomFlags::NONBLOCK), Ok(SEED_BYTES)) {
        return Ok(false);
    }
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&0u64.to_le_bytes());
    bytes.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    bytes.extend_from_slice(&(SEED_BYTES as u32).to_le_bytes());
    bytes.extend_from_slice(&seed);
    write(memory, RNG_SEED, "the seed for random numbers", &bytes)?;
    Ok(true)
}

/// Writes page tables that map the first 4 GiB to themselves and returns the state for the 64-bit entry.
pub(super) fn entry(rip: u64, memory: &GuestMemory) -> Result<Entry, KernelError> {
    write_identity_page_tables(memory)?;
    Ok(Entry::Long64 { rip, rsi: BOOT_PARAMS })
}

/// One PML4, one PDPT and four page directories of 2 MiB pages, from [`BOOT_PAGE_TABLES`] on.
pub(super) fn write_identity_page_tables(memory: &GuestMemory) -> Result<(), KernelError> {
    let table = |index: u64| BOOT_PAGE_TABLES + index * 4096;
    let mut words = vec![0u64; 6 * ENTRIES as usize];
    let mut set = |at: u64, value: u64| {
        if let Some(word) = words.get_mut(at as usize) {
            *word = value;
        }
    };
    set(0, table(1) | PAGE_PRESENT_WRITABLE);
    for directory in 0..4 {
        set(ENTRIES + directory, table(2 + directory) | PAGE_PRESENT_WRITABLE);
        for page in 0..ENTRIES {
            let gpa = (directory * ENTRIES + page) << 21;
            set((2 + directory) * ENTRIES + page, gpa | PAGE_LARGE | PAGE_PRESENT_WRITABLE);
        }
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(memory, BOOT_PAGE_TABLES, "the page tables", &bytes)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    #[test]
    fn boot_parameters_carry_the_command_line_the_ramdisk_and_the_memory_map() {
        let memory = memory();
        let ramdisk = Ramdisk { gpa: 0x300_0000, len_bytes: 0x1234 };
        let own = setup_header { setup_data: 0x1000, version: 0x020d, ..Default::default() };
        write_boot_params(Some(&own), Some(ramdisk), "quiet", &memory).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
        assert_eq!({ params.hdr.version }, 0x020d);
        assert_eq!({ params.hdr.setup_data }, RNG_SEED, "not the file's own");
        assert_eq!(({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }), (0x300_0000, 0x1234));
        assert_eq!(({ params.hdr.cmd_line_ptr }, { params.hdr.cmdline_size }), (0x2_0000, 5));
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(params.e820_entries, 4);
    }

    #[test]
    fn the_page_structs_end_where_free_memory_ends() {
        let small = GuestMemory::from_ranges(&[(GuestAddress(0), 512 << 20)]).unwrap();
        let disk = |gpa, len_bytes| Some(Ramdisk { gpa, len_bytes });
        assert_eq!(page_structs(&small, None), 502 << 20..512 << 20);
        assert_eq!(page_structs(&small, disk(510 << 20, (2 << 20) - 5)), 500 << 20..510 << 20);
        assert_eq!(page_structs(&small, disk(400 << 20, 1 << 20)), 502 << 20..512 << 20);
        let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(4 << 30), 64 << 20)];
        let split = GuestMemory::from_ranges(&ranges).unwrap();
        assert_eq!(
            page_structs(&split, disk(60 << 20, 4 << 20)),
            (4 << 30) + (60 << 20)..(4 << 30) + (64 << 20)
        );
        let tiny = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert_eq!(page_structs(&tiny, None), 0..2 << 20);
    }

    #[test]
    fn each_machine_gets_a_seed_of_its_own() {
        let seed = |version| {
            let memory = memory();
            write_boot_params(Some(&setup_header { version, ..Default::default() }), None, "", &memory)
                .unwrap();
            let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
            let mut bytes = vec![0; 16 + SEED_BYTES];
            memory.read_slice(&mut bytes, GuestAddress(RNG_SEED)).unwrap();
            (params.hdr.setup_data != 0).then_some(bytes)
        };
        let (first, second) = (seed(0x020f).unwrap(), seed(0x0209).unwrap());
        assert_eq!(first[..16], [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]);
        assert_ne!(first[16..], second[16..]);
        assert_eq!(seed(0x0208), None, "the protocol has no place for it");
    }

    #[test]
    fn the_page_tables_map_each_address_below_4_gib_to_itself() {
        let memory = memory();
        write_identity_page_tables(&memory).unwrap();
        let word = |gpa: u64| memory.read_obj::<u64>(GuestAddress(gpa)).unwrap();
        for gpa in [0u64, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            let pml4e = word(BOOT_PAGE_TABLES + (gpa >> 39) * 8);
            let pdpte = word((pml4e & !0xfff) + (gpa >> 30 & 511) * 8);
            let pde = word((pdpte & !0xfff) + (gpa >> 21 & 511) * 8);
            assert_eq!(pde, (gpa & !0x1f_ffff) | 0x83, "{gpa:#x}");
        }
    }
}
