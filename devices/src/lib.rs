//! The devices of a Harrier machine and the buses that they sit on.
//!
//! - [`bus`]: [`Bus`] finds the [`BusDevice`] for a port or an address.
//! - [`interrupt`] and [`power`]: the traits through which devices reach the rest of the machine.
//!
//! Nothing here knows an engine or the machine: devices see guest memory, interrupt lines, files and sockets.

pub mod bus;
pub mod interrupt;
pub mod power;

pub use bus::{Bus, BusBuilder, BusDevice, SharedDevice};
pub use interrupt::{InterruptLine, MsiSink};
pub use power::{PowerEvent, PowerSink};
