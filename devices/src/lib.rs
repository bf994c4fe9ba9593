//! The devices of a Harrier machine and the buses that they sit on.
//!
//! - [`bus`]: [`Bus`] finds the [`BusDevice`] for a port or an address.
//! - [`interrupt`] and [`power`]: the traits through which devices reach the rest of the machine.
//! - [`ioapic`]: the interrupt controller that turns lines into messages.
//! - [`serial`]: the 16550A; [`byte_output`] and [`serial_input`] are its two ends on the host.
//! - [`i8042`], [`rtc`], [`acpi_pm`], [`pvpanic`], [`debug_exit`]: what else a PC has at its ports.
//! - [`doorbell`]: hypercalls of the guest, and events for it.
//! - [`state`]: what of a device goes into a snapshot.
//! - [`virtio`]: block, entropy and socket devices behind the memory-mapped transport.
//!
//! Nothing here knows an engine or the machine: devices see guest memory, interrupt lines, files and sockets.

pub mod acpi_pm;
pub mod bus;
pub mod byte_output;
pub mod debug_exit;
pub mod doorbell;
mod guest_error;
pub mod i8042;
pub mod interrupt;
pub mod ioapic;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod serial_input;
pub mod state;
pub mod virtio;

pub use bus::{Bus, BusBuilder, BusDevice, SharedDevice};
pub use interrupt::{InterruptLine, MsiSink};
pub use power::{PowerEvent, PowerSink};
pub use state::{StateUnit, Stateful};
