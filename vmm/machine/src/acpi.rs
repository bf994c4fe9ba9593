//! The ACPI tables through which a guest finds its processors, interrupt controller and devices.
//!
//! The machine is a hardware-reduced one (ACPI specification 6.5, section 4.1): no fixed hardware, no SCI; power
//! and reset go through the registers of [`harrier_devices::acpi_pm`]. Devices are namespace objects; whoever
//! adds a device to the machine adds its object, made by one of the functions here, as bytes of AML.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use harrier_devices::{acpi_pm, pvpanic, rtc, serial};
use harrier_engine::GuestMemory;
use harrier_hypercall_abi::{port, shared_page};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{
    ACPI_END, ACPI_START, COM1_GSI, DOORBELL_GSI, GENERATION_ID, GENERATION_ID_GSI, IOAPIC_START,
    LAPIC_START, POWER_BUTTON_GSI, SHARED_PAGE,
};

const OEM: [u8; 6] = *b"HARRIE";
const OEM_TABLE: [u8; 8] = *b"HARRIER ";
const OEM_REVISION: u32 = 1;
const HEADER_BYTES: u32 = 36;
/// IAPC_BOOT_ARCH: there is no VGA adapter; probing for one is not safe. The other bits stay clear: no legacy
/// devices beyond those in the namespace, no keyboard controller to look for, a CMOS clock.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// MADT revision of ACPI 6.5, table 5.19.
const MADT_REVISION: u8 = 6;

/// The tables do not fit between their place and 1 MiB.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables of {len} bytes do not fit in {max}: use fewer devices or processors")]
pub struct TablesTooLarge {
    /// What they take.
    pub len: u64,
    /// What there is.
    pub max: u64,
}

/// Writes all tables for `vcpu_count` processors (at most 255) and the namespace objects in `devices`.
///
/// # Errors
/// [`TablesTooLarge`] if there are too many of them.
pub fn write_tables(
    vcpu_count: u32,
    devices: &[Vec<u8>],
    memory: &GuestMemory,
) -> Result<(), TablesTooLarge> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = tables.add(&dsdt(vcpu_count, devices));
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(vcpu_count));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes.splice(..rsdp.len(), rsdp);
    let too_large = TablesTooLarge { len: tables.bytes.len() as u64, max: ACPI_END - ACPI_START };
    if too_large.len > too_large.max {
        return Err(too_large);
    }
    memory.write_slice(&tables.bytes, GuestAddress(ACPI_START)).map_err(|_| too_large)
}

/// Tables one behind the other, from [`ACPI_START`] on.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and answers its guest physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let gpa = ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        gpa
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |offset: u64| {
        let address = u64::from(acpi_pm::PORT) + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    // A set button flag means that the button, if any, is not fixed hardware.
    let mut builder = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    builder.reset_reg = register(acpi_pm::OFFSET_RESET);
    builder.reset_value = acpi_pm::RESET_VALUE;
    builder.sleep_control_reg = register(acpi_pm::OFFSET_SLEEP_CONTROL);
    builder.sleep_status_reg = register(acpi_pm::OFFSET_SLEEP_STATUS);
    builder.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    builder.century = rtc::CENTURY_INDEX;
    builder.finalize()
}

/// Without the PCAT_COMPAT flag: there is no pair of 8259 controllers.
fn madt(vcpu_count: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&(LAPIC_START as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    for id in 0..vcpu_count.min(255) as u8 {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, IOAPIC_START as u32, 0).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"APIC", HEADER_BYTES, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

fn dsdt(vcpu_count: u32, devices: &[Vec<u8>]) -> Sdt {
    let mut objects: Vec<u8> = (0..vcpu_count).flat_map(processor).collect();
    for device in devices {
        objects.extend_from_slice(device);
    }
    let mut body = Scope::raw(Path::new("\\_SB_"), objects);
    let sleep_type = acpi_pm::S5_SLEEP_TYPE;
    Name::new(Path::new("_S5_"), &Package::new(vec![&sleep_type, &aml::ZERO, &aml::ZERO, &aml::ZERO]))
        .to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

fn processor(id: u32) -> Vec<u8> {
    object(&format!("C{id:03X}"), &"ACPI0007", id, &[])
}

/// The first serial port.
pub fn serial_object() -> Vec<u8> {
    let ports = IO::new(serial::COM1_PORT, serial::COM1_PORT, 1, serial::SIZE as u8);
    let interrupt = Interrupt::new(true, true, false, false, COM1_GSI);
    object("COM1", &EISAName::new("PNP0501"), 0, &[&ports, &interrupt])
}

/// The real-time clock, which has no interrupt.
pub fn rtc_object() -> Vec<u8> {
    object("RTC0", &EISAName::new("PNP0B00"), 0, &[&IO::new(rtc::PORT, rtc::PORT, 1, rtc::SIZE as u8)])
}

/// The port for crash reports.
pub fn pvpanic_object() -> Vec<u8> {
    let ports = IO::new(pvpanic::PORT, pvpanic::PORT, 1, pvpanic::SIZE as u8);
    object("PEVT", &"QEMU0001", 0, &[&ports])
}

/// The power button (ACPI specification 6.5, section 4.8.2.2.1.2) and the generic event device (section 5.6.9) that
/// tells the guest of it: a press is one edge of its interrupt.
pub fn power_button_objects() -> Vec<u8> {
    const PRESSED: u8 = 0x80;
    let mut objects = object("PWRB", &EISAName::new("PNP0C0C"), 0, &[]);
    let button = Path::new("PWRB");
    event_device("GED0", 0, POWER_BUTTON_GSI, &Notify::new(&button, &PRESSED), &mut objects);
    objects
}

/// The VM generation id (Microsoft, "Virtual Machine Generation ID", 2018): where it is, and a generic event device that
/// tells of its change. Systems find it by the compatible id.
pub fn generation_id_objects() -> Vec<u8> {
    const CHANGED: u8 = 0x80;
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    let (hid, cid) =
        (Name::new(Path::new("_HID"), &"HARV0002"), Name::new(Path::new("_CID"), &"VM_Gen_Counter"));
    let name = Name::new(Path::new("_DDN"), &"VM_Gen_Counter");
    let address = Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high]));
    let mut objects = Vec::new();
    Device::new(Path::new("VGEN"), vec![&hid, &cid, &name, &address]).to_aml_bytes(&mut objects);
    let counter = Path::new("VGEN");
    event_device("GED1", 1, GENERATION_ID_GSI, &Notify::new(&counter, &CHANGED), &mut objects);
    objects
}

/// A generic event device with one interrupt, an edge, for which `event` is done.
fn event_device(name: &str, uid: u32, gsi: u32, event: &dyn Aml, objects: &mut Vec<u8>) {
    let event = Method::new(Path::new("_EVT"), 1, true, vec![event]);
    let (hid, uid) = (Name::new(Path::new("_HID"), &"ACPI0013"), Name::new(Path::new("_UID"), &uid));
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let settings = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt]));
    Device::new(Path::new(name), vec![&hid, &uid, &settings, &event]).to_aml_bytes(objects);
}

/// A virtio-mmio device: its register window and its level-triggered interrupt.
pub fn virtio_mmio_object(index: u32, gpa: u32, len_bytes: u32, gsi: u32) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, gpa, len_bytes);
    let interrupt = Interrupt::new(true, false, false, false, gsi);
    object(&format!("V{:03X}", index & 0xfff), &"LNRO0005", index, &[&registers, &interrupt])
}

/// The doorbell: its ports, its level-triggered interrupt and the shared page.
pub fn doorbell_object() -> Vec<u8> {
    let ports = IO::new(port::BASE, port::BASE, 1, port::LEN as u8);
    let interrupt = Interrupt::new(true, false, false, false, DOORBELL_GSI);
    let page = Memory32Fixed::new(true, SHARED_PAGE as u32, shared_page::SIZE as u32);
    object("HRVR", &port::ACPI_ID, 0, &[&ports, &interrupt, &page])
}

fn object(name: &str, hid: &dyn Aml, uid: u32, resources: &[&dyn Aml]) -> Vec<u8> {
    let hid = Name::new(Path::new("_HID"), hid);
    let uid = Name::new(Path::new("_UID"), &uid);
    let present_and_working = 0xfu8;
    let status = Name::new(Path::new("_STA"), &present_and_working);
    let settings = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources.to_vec()));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &status];
    if !resources.is_empty() {
        children.push(&settings);
    }
    let mut bytes = Vec::new();
    Device::new(Path::new(name), children).to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn read(memory: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemory, gpa: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(gpa + 4)).unwrap();
        let bytes = read(memory, gpa, len as usize);
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        bytes
    }

    fn word64(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn devices() -> Vec<Vec<u8>> {
        vec![
            serial_object(),
            rtc_object(),
            pvpanic_object(),
            doorbell_object(),
            power_button_objects(),
            generation_id_objects(),
            virtio_mmio_object(0, 0xd000_0000, 0x1000, 16),
        ]
    }

    #[test]
    fn the_root_pointer_leads_to_every_table() {
        let memory = memory();
        write_tables(3, &devices(), &memory).unwrap();
        let rsdp = read(&memory, ACPI_START, 36);
        assert!(rsdp.starts_with(b"RSD PTR "));
        let xsdt = table(&memory, word64(&rsdp, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
        let fadt = table(&memory, word64(&xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & 1 << 20, 0, "hardware reduced");
        assert_eq!((fadt[116], word64(&fadt, 120), fadt[128]), (1, 0x602, 1), "reset register");
        assert_eq!((word64(&fadt, 248), word64(&fadt, 260)), (0x600, 0x601), "sleep registers");
        let dsdt = table(&memory, word64(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for id in [&b"LNRO0005"[..], b"QEMU0001", b"HARV0001", b"ACPI0007", b"_S5_", b"VM_Gen_Counter"] {
            assert!(dsdt.windows(id.len()).any(|window| window == id), "{id:?}");
        }
        let madt = table(&memory, word64(&xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
    }

    #[test]
    fn the_largest_machine_fits_and_a_larger_one_is_refused() {
        let objects = |count: u32| -> Vec<_> {
            (0..count).map(|n| virtio_mmio_object(n, 0xd000_0000 + n * 0x1000, 0x1000, 16)).collect()
        };
        write_tables(255, &objects(32), &memory()).unwrap();
        assert!(write_tables(255, &objects(4000), &memory()).is_err());
    }

    /// Writes the tables to the directory for temporary files, for a look with iasl.
    #[test]
    #[ignore = "for looking at the tables by hand"]
    fn dump() {
        let memory = memory();
        write_tables(3, &devices(), &memory).unwrap();
        let rsdp = read(&memory, ACPI_START, 36);
        let xsdt = table(&memory, word64(&rsdp, 24));
        let fadt = table(&memory, word64(&xsdt, 36));
        let dir = std::env::temp_dir();
        std::fs::write(dir.join("dsdt.aml"), table(&memory, word64(&fadt, 140))).unwrap();
        std::fs::write(dir.join("apic.aml"), table(&memory, word64(&xsdt, 44))).unwrap();
        std::fs::write(dir.join("facp.aml"), fadt).unwrap();
        std::fs::write(dir.join("xsdt.aml"), xsdt).unwrap();
    }
}
