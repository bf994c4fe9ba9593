//! The MultiProcessor table (Intel MultiProcessor Specification 1.4, chapter 4), for kernels without ACPI.
//!
//! Kernels with ACPI look for it too, page by page through the BIOS area, before they read the ACPI tables: the
//! pointer stands where they look early.

use harrier_engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{DOORBELL_GSI, EBDA_START, IOAPIC_START, LAPIC_START, MP_TABLE_START, VIRTIO_GSIS};

const SPECIFICATION: u8 = 4;
const HEADER_BYTES: usize = 44;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x20;
const ISA_BUS: u8 = 0;
/// Pins of the I/O APIC.
const IOAPIC_PINS: u8 = 24;
/// Flags of an interrupt: an ISA one is an edge, active high.
const AS_THE_BUS: u8 = 0;
const ACTIVE_HIGH: u8 = 0b01;
const LEVEL: u8 = 0b11 << 2;

/// Whether the pin's interrupt is a level: those of virtio devices and the doorbell are.
fn is_level(pin: u8) -> bool {
    let gsi = pin.into();
    gsi == DOORBELL_GSI || VIRTIO_GSIS.contains(&gsi)
}

/// Writes pointer and table for `vcpu_count` processors, at most 255, and as many virtio devices as there are.
///
/// # Errors
/// The memory's, if it does not reach up to the table.
pub(crate) fn write(
    vcpu_count: u32,
    virtio_count: usize,
    memory: &GuestMemory,
) -> Result<(), GuestMemoryError> {
    let table = table(vcpu_count, virtio_count);
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE_START as u32).to_le_bytes());
    // Length in paragraphs.
    pointer[8] = 1;
    pointer[9] = SPECIFICATION;
    pointer[10] = checksum(&pointer);
    memory.write_slice(&table, GuestAddress(MP_TABLE_START))?;
    memory.write_slice(&pointer, GuestAddress(EBDA_START))
}

/// Whether something is behind the pin. There is no cascade of controllers, 2, and a kernel would give each interrupt of a
/// virtio device that is not there its files in sysfs and procfs.
fn is_there(pin: u8, virtio_count: usize) -> bool {
    let place = VIRTIO_GSIS.iter().position(|&gsi| gsi == u32::from(pin));
    pin != 2 && place.is_none_or(|place| place < virtio_count)
}

fn table(vcpu_count: u32, virtio_count: usize) -> Vec<u8> {
    let ioapic_id = vcpu_count as u8;
    let mut entries: Vec<Vec<u8>> = (0..vcpu_count as u8)
        .map(|id| {
            // Enabled; the first is the bootstrap processor.
            let flags = 1 | if id == 0 { 2 } else { 0 };
            let mut entry = vec![0, id, APIC_VERSION, flags];
            entry.resize(20, 0);
            entry
        })
        .collect();
    entries.push([&[1, ISA_BUS][..], b"ISA   "].concat());
    entries.push([&[2, ioapic_id, IOAPIC_VERSION, 1][..], &(IOAPIC_START as u32).to_le_bytes()].concat());
    // Each interrupt has the pin of its number.
    for irq in (0..IOAPIC_PINS).filter(|&irq| is_there(irq, virtio_count)) {
        let flags = if is_level(irq) { ACTIVE_HIGH | LEVEL } else { AS_THE_BUS };
        entries.push(vec![3, 0, flags, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    // NMI on LINT1 of all local APICs.
    entries.push(vec![4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let count = entries.len() as u16;
    let body = entries.concat();
    let mut table = Vec::with_capacity(HEADER_BYTES + body.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER_BYTES + body.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION, 0]);
    table.extend_from_slice(b"HARRIER MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&(LAPIC_START as u32).to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&body);
    table[7] = checksum(&table);
    table
}

/// What makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_leads_to_a_table_whose_bytes_add_up_to_zero() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write(255, VIRTIO_GSIS.len(), &memory).unwrap();
        let mut pointer = [0; 16];
        memory.read_slice(&mut pointer, GuestAddress(EBDA_START)).unwrap();
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(checksum(&pointer), 0);
        let at = u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap()));
        let mut header = [0; HEADER_BYTES];
        memory.read_slice(&mut header, GuestAddress(at)).unwrap();
        let mut table = vec![0; usize::from(u16::from_le_bytes([header[4], header[5]]))];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        assert_eq!(checksum(&table), 0);
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 255 + 2 + 23 + 1);
        assert_eq!(table.len(), HEADER_BYTES + 255 * 20 + 26 * 8);
    }

    #[test]
    fn the_interrupts_are_those_of_what_is_there() {
        let pins = |virtio_count| {
            let table = table(1, virtio_count);
            let interrupts = table[HEADER_BYTES + 20 + 16..].chunks(8).filter(|entry| entry[0] == 3);
            interrupts.map(|entry| (entry[7], entry[2])).collect::<Vec<_>>()
        };
        let (edge, level) = (AS_THE_BUS, ACTIVE_HIGH | LEVEL);
        let always = [(0, edge), (1, edge), (3, level), (4, edge), (8, edge), (12, edge)];
        assert_eq!(pins(0), always);
        assert_eq!(pins(2), [&always[..], &[(16, level), (17, level)]].concat());
        assert!(pins(9).contains(&(5, level)) && !pins(9).contains(&(6, level)));
        assert_eq!(pins(VIRTIO_GSIS.len()).len(), 23);
    }
}
