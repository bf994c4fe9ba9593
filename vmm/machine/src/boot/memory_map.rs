//! Which guest physical addresses are usable memory, as boot protocols report it.

use harrier_engine::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{ACPI_START, BIOS_END, EBDA_START, KERNEL_START};

/// Address range types of the BIOS's function E820 (ACPI specification 6.5, table 15.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeKind {
    Usable = 1,
    Reserved = 2,
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapRange {
    pub(super) gpa: u64,
    pub(super) len_bytes: u64,
    pub(super) kind: RangeKind,
}

/// The map, sorted by address.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<MapRange> {
    let range = |start: u64, end: u64, kind| MapRange { gpa: start, len_bytes: end - start, kind };
    let mut map = vec![
        range(0, EBDA_START, RangeKind::Usable),
        range(EBDA_START, 0xa_0000, RangeKind::Reserved),
        range(ACPI_START, BIOS_END, RangeKind::Reserved),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(KERNEL_START);
        let end = region.start_addr().0.saturating_add(region.len());
        if end > start {
            map.push(range(start, end, RangeKind::Usable));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_map_leaves_out_the_holes() {
        let memory =
            GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20), (GuestAddress(0x1_0000_0000), 1 << 20)])
                .unwrap();
        let map = memory_map(&memory);
        let usable: Vec<_> =
            map.iter().filter(|r| r.kind == RangeKind::Usable).map(|r| (r.gpa, r.len_bytes)).collect();
        assert_eq!(usable, [(0, 0x9_fc00), (0x10_0000, 15 << 20), (0x1_0000_0000, 1 << 20)]);
        assert!(map.is_sorted_by_key(|r| r.gpa));
        assert!(map.contains(&MapRange { gpa: 0xe_0000, len_bytes: 0x2_0000, kind: RangeKind::Reserved }));
    }
}
