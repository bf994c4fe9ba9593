//! Virtio devices (OASIS virtio 1.2) behind a memory-mapped transport.
//!
//! - [`mmio`]: [`mmio::VirtioMmio`], the registers, generic over what is behind them.
//! - [`queue`] and [`chain`]: virtqueues and requests, fully checked before a device sees them.
//! - [`block`], [`rng`], [`vsock`]: the devices, each a [`VirtioDevice`].
//!
//! A vCPU's write to QueueNotify only signals an event descriptor; the queues are worked on by the event loop.
//! A device holds no lock and no thread of its own, so tests and fuzzers drive it with plain calls.

pub mod block;
pub mod block_copy;
pub mod chain;
pub mod disk;
pub mod mmio;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod test_driver;
mod volatile_io;
pub mod vsock;

use std::os::fd::RawFd;

use harrier_engine::GuestMemory;

use crate::state::BadState;

pub use chain::{Buffers, Chain};
pub use mmio::VirtioMmio;
pub use queue::{DeviceQueue, QueueError};

/// What a device works on while the driver runs it.
pub struct Running<'a> {
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// The device's queues, in the order of its device type; those that the driver left out are not ready.
    pub queues: &'a mut [DeviceQueue],
}

/// How far a device came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Nothing is left until somebody notifies again.
    Done,
    /// There is more, and others should have their turn first: call again soon.
    More,
}

/// A device behind a transport. Every call is made with the transport's lock held, from one thread at a time.
pub trait VirtioDevice: Send {
    /// A word for log lines.
    fn name(&self) -> &'static str;
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// Feature bits of the device type that are offered; the transport adds its own.
    fn features(&self) -> u64;
    /// Maximum size of each queue: powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];
    /// Reads configuration space; `data` is zeroed beforehand and stays so past the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver set DRIVER_OK with these features.
    fn start(&mut self, features: u64);
    /// The driver reset the device: whatever belongs to its requests and connections is over.
    fn reset(&mut self);
    /// What a snapshot has to keep of the device itself. It is made between two requests, so that none is half done.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// Takes up what [`VirtioDevice::save`] gave; `features` are those that the driver accepted, if it runs the
    /// device. Every queue is notified afterwards.
    ///
    /// # Errors
    /// [`BadState`] if this device cannot go on from there.
    fn restore(&mut self, _state: &serde_json::Value, features: Option<u64>) -> Result<(), BadState> {
        if let Some(features) = features {
            self.start(features);
        }
        Ok(())
    }
    /// The driver notified `queue`.
    ///
    /// # Errors
    /// [`QueueError`] if the driver broke the rules; the transport then asks it for a reset.
    fn process_queue(&mut self, queue: usize, running: Running<'_>) -> Result<Progress, QueueError>;
    /// A descriptor that is readable when the host side has something for the device; level-triggered.
    fn host_fd(&self) -> Option<RawFd> {
        None
    }
    /// The host side has something; `running` is `None` while no driver runs the device. A device that leaves
    /// something for later keeps its descriptor readable.
    ///
    /// # Errors
    /// As for [`VirtioDevice::process_queue`].
    fn process_host(&mut self, _running: Option<Running<'_>>) -> Result<(), QueueError> {
        Ok(())
    }
}
