//! Where things are in the guest's physical address space and I/O space.
//!
//! Everything below 1 MiB follows the PC's conventions, because kernels rely on them; device registers sit in
//! the hole below 4 GiB that guest memory leaves free.

/// Where low guest memory ends at the latest and the hole for device registers begins.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Where guest memory goes on above the hole.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO_START: u32 = 0xd000_0000;
/// Length of one virtio-mmio register window in bytes.
pub const VIRTIO_MMIO_LEN: u32 = 0x1000;
/// Registers of the I/O APIC (its traditional place).
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Registers of the local APICs (Intel SDM volume 3, 12.4.1).
pub const LAPIC_START: u64 = 0xfee0_0000;

/// Descriptor table for the boot processor's first segments.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info or multiboot information, with the tables that it points to right behind.
pub const START_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// First stack pointer; the stack grows down towards the boot parameters.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit entry: one PML4, one PDPT and four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The seed for Linux's random numbers, behind the page tables.
pub const RNG_SEED: u64 = 0xf000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes that the command line may take, terminating zero included.
pub const COMMAND_LINE_MAX: u64 = 0x1_0000;
/// End of conventional memory and start of the extended BIOS data area, with the pointer to the MP table.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables; the root pointer is at the start, where firmware-less kernels look for it.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the space for ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// The MP table.
pub const MP_TABLE_START: u64 = 0xf_0000;
/// The VM generation id, in a page of its own, reserved like the rest of the BIOS area.
pub const GENERATION_ID: u64 = 0xf_e000;
/// The page that host and guest share for hypercalls, reserved like the rest of the BIOS area.
pub const SHARED_PAGE: u64 = 0xf_f000;
/// End of the space that firmware would take.
pub const BIOS_END: u64 = 0x10_0000;
/// First address at which a kernel may be loaded.
pub const KERNEL_START: u64 = 0x10_0000;

/// First serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// Global system interrupt of the first serial port.
pub const COM1_GSI: u32 = 4;
/// Global system interrupt of the doorbell: where a PC has its second serial port.
pub const DOORBELL_GSI: u32 = 3;
/// Global system interrupt that tells of another generation id: where a PC has its keyboard.
pub const GENERATION_ID_GSI: u32 = 1;
/// Global system interrupt of the real-time clock.
pub const RTC_GSI: u32 = 8;
/// Global system interrupt of the power button.
pub const POWER_BUTTON_GSI: u32 = 12;
/// Global system interrupts that virtio devices take, in this order: those beyond the ISA ones first.
pub const VIRTIO_GSIS: [u32; 17] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 13, 14, 15];
