//! The PVH entry (Xen's x86/HVM direct boot ABI, `docs/misc/pvh.pandoc`, and `arch-x86/hvm/start_info.h`).

use harrier_engine::GuestMemory;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::initrd::Ramdisk;
use super::memory_map::memory_map;
use super::{Entry, KernelError, write};
use crate::layout::{ACPI_START, COMMAND_LINE, START_INFO};

/// Writes the start info, its module list and memory map, and returns the state for the entry.
pub(super) fn prepare(
    entry: u64,
    ramdisk: Option<Ramdisk>,
    memory: &GuestMemory,
) -> Result<Entry, KernelError> {
    let map = memory_map(memory);
    let modules: Vec<hvm_modlist_entry> = ramdisk
        .iter()
        .map(|disk| hvm_modlist_entry { paddr: disk.gpa, size: disk.len_bytes, ..Default::default() })
        .collect();
    let modules_gpa = START_INFO + size_of::<hvm_start_info>() as u64;
    let map_gpa = modules_gpa + (modules.len() * size_of::<hvm_modlist_entry>()) as u64;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { modules_gpa },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_START,
        memmap_paddr: map_gpa,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    // The structures are little endian and without padding; they are written word by word.
    let mut bytes = Vec::new();
    for word in [info.magic, info.version, info.flags, info.nr_modules] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for word in [info.modlist_paddr, info.cmdline_paddr, info.rsdp_paddr, info.memmap_paddr] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for word in [info.memmap_entries, info.reserved] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for module in &modules {
        for word in [module.paddr, module.size, module.cmdline_paddr, module.reserved] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    for range in &map {
        let entry = hvm_memmap_table_entry {
            addr: range.gpa,
            size: range.len_bytes,
            type_: range.kind as u32,
            reserved: 0,
        };
        bytes.extend_from_slice(&entry.addr.to_le_bytes());
        bytes.extend_from_slice(&entry.size.to_le_bytes());
        bytes.extend_from_slice(&entry.type_.to_le_bytes());
        bytes.extend_from_slice(&entry.reserved.to_le_bytes());
    }
    write(memory, START_INFO, "the PVH start info", &bytes)?;
    Ok(Entry::Protected32 { eip: entry as u32, eax: 0, ebx: START_INFO as u32 })
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn the_start_info_points_to_module_and_map() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        prepare(0x100_0000, Some(Ramdisk { gpa: 0xf0_0000, len_bytes: 77 }), &memory).unwrap();
        let word32 = |gpa: u64| memory.read_obj::<u32>(GuestAddress(gpa)).unwrap();
        let word64 = |gpa: u64| memory.read_obj::<u64>(GuestAddress(gpa)).unwrap();
        assert_eq!((word32(START_INFO), word32(START_INFO + 4)), (0x336e_c578, 1));
        assert_eq!(word32(START_INFO + 12), 1);
        let module = word64(START_INFO + 16);
        assert_eq!((word64(module), word64(module + 8)), (0xf0_0000, 77));
        assert_eq!((word64(START_INFO + 24), word64(START_INFO + 32)), (COMMAND_LINE, ACPI_START));
        let map = word64(START_INFO + 40);
        assert_eq!(word32(START_INFO + 48), 4);
        let last = map + 3 * 24;
        assert_eq!((word64(last), word64(last + 8), word32(last + 16)), (0x10_0000, 15 << 20, 1));
    }
}
