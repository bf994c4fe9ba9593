//! The memory-mapped transport (virtio 1.2, section 4.2, version 2 registers).
//!
//! [`VirtioMmio`] is the bus side, [`VirtioMmio::events`] the event-loop side; both share one device behind a
//! lock. A notification never takes that lock, so a vCPU does not wait for a request under way. The order of
//! initialisation (section 3.1.1) is enforced: what comes out of turn is ignored and reported.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use harrier_engine::{Flow, GuestMemory};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{DeviceQueue, QueueError, QueueSetup};
use super::{Progress, Running, VirtioDevice};
use crate::bus::BusDevice;
use crate::guest_error::GuestErrors;
use crate::interrupt::InterruptLine;

/// Bytes of MMIO space that a device takes.
pub const SIZE: u64 = 0x1000;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"HARR");

mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub(super) const QUEUE_SELECT: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const DESCRIPTORS_LOW: u64 = 0x080;
    pub(super) const DESCRIPTORS_HIGH: u64 = 0x084;
    pub(super) const AVAILABLE_LOW: u64 = 0x090;
    pub(super) const AVAILABLE_HIGH: u64 = 0x094;
    pub(super) const USED_LOW: u64 = 0x0a0;
    pub(super) const USED_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LENGTH_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Offset of the register to which a driver stores the number of a queue that has something for the device.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// Bits of the device status (section 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// It is set up and drives.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u32 = 0x40;
    /// The guest has given up.
    pub const FAILED: u32 = 0x80;
}

/// Interrupt status: the device has used a buffer.
pub const INTERRUPT_USED: u32 = 1;
/// Interrupt status: the configuration or the status has changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// VIRTIO_F_INDIRECT_DESC.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

const TRANSPORT_FEATURES: u64 = FEATURE_INDIRECT | FEATURE_EVENT_IDX | FEATURE_VERSION_1;

/// Event data of the host side; queues have their own number.
const HOST_EVENT: u32 = u32::MAX;

/// Interrupt status and the line that follows it.
struct Interrupt {
    line: Arc<dyn InterruptLine>,
    status: Mutex<u32>,
}

impl Interrupt {
    fn lock(&self) -> MutexGuard<'_, u32> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, bits: u32) {
        let mut status = self.lock();
        *status |= bits;
        self.line.set_level(true);
    }

    fn acknowledge(&self, bits: u32) {
        let mut status = self.lock();
        *status &= !bits;
        // What is left rises again, for an edge-triggered pin; a level-triggered one does not mind.
        self.line.set_level(false);
        if *status != 0 {
            self.line.set_level(true);
        }
    }
}

/// What the driver and the event loop share.
struct Core {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemory,
    queues: Vec<DeviceQueue>,
    setups: Vec<QueueSetup>,
    status: u32,
    offered: u64,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    config_generation: u32,
    errors: GuestErrors,
}

struct Shared {
    core: Mutex<Core>,
    interrupt: Interrupt,
    /// One for each queue.
    notifications: Vec<EventFd>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, queue: usize) {
        // A full counter means that the notification is there already.
        if let Some(event) = self.notifications.get(queue)
            && let Err(error) = event.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::warn!("virtio: cannot signal a notification: {error}");
        }
    }
}

impl Core {
    fn running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    fn report(&mut self, message: std::fmt::Arguments<'_>) {
        let name = self.device.name();
        self.errors.report(name, message);
    }

    fn reset(&mut self, shared: &Shared) {
        self.device.reset();
        self.queues.iter_mut().for_each(DeviceQueue::reset);
        self.setups = initial_setups(&self.queues);
        self.status = 0;
        self.accepted = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        shared.interrupt.acknowledge(u32::MAX);
    }

    fn set_status(&mut self, shared: &Shared, value: u32) {
        if value == 0 {
            return self.reset(shared);
        }
        let driver_bits = self.status & !status::NEEDS_RESET;
        let value = value & 0xff & !status::NEEDS_RESET;
        if driver_bits & !value != 0 {
            return self.report(format_args!(
                "status {value:#x} takes back bits of {driver_bits:#x} without a reset"
            ));
        }
        if value & status::FAILED != 0 {
            self.report(format_args!("gave up on the device at status {driver_bits:#x}"));
        }
        let mut next = self.status | value & status::FAILED;
        let steps = [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ];
        for (bit, before) in steps {
            if value & bit == 0 || self.status & bit != 0 {
                continue;
            }
            if next & before != before {
                self.report(format_args!("status {value:#x} skips a step after {driver_bits:#x}"));
                break;
            }
            if bit == status::FEATURES_OK && !self.features_acceptable() {
                // Left clear: so the driver learns of it.
                continue;
            }
            next |= bit;
        }
        let starts = next & !self.status & status::DRIVER_OK != 0;
        self.status = next;
        if starts {
            self.start(shared);
        }
    }

    fn features_acceptable(&mut self) -> bool {
        let foreign = self.accepted & !self.offered;
        if foreign != 0 {
            self.report(format_args!("accepted features {foreign:#x} that were not offered"));
        } else if self.accepted & FEATURE_VERSION_1 == 0 {
            self.report(format_args!("did not accept VIRTIO_F_VERSION_1"));
        } else {
            return true;
        }
        false
    }

    fn start(&mut self, shared: &Shared) {
        for queue in &mut self.queues {
            queue.set_event_idx(self.accepted & FEATURE_EVENT_IDX != 0);
        }
        self.device.start(self.accepted);
        // What a driver in a hurry notified before it set DRIVER_OK is not lost.
        for queue in 0..self.queues.len() {
            shared.notify(queue);
        }
    }

    /// After a [`QueueError`]: nothing more is done for the driver until it resets the device.
    fn fail(&mut self, shared: &Shared, error: &QueueError) {
        self.report(format_args!("{error}; the device needs a reset"));
        self.status |= status::NEEDS_RESET;
        shared.interrupt.raise(INTERRUPT_CONFIG);
    }

    fn selected(&self) -> Option<&DeviceQueue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The part of the driver's queue set-up that a register belongs to, if it may be changed now.
    fn selected_setup(&mut self) -> Option<&mut QueueSetup> {
        let open = status::FEATURES_OK;
        let allowed = self.status & (open | status::DRIVER_OK) == open
            && self.selected().is_some_and(|queue| !queue.ready());
        if !allowed {
            let (queue, now) = (self.queue_select, self.status);
            self.report(format_args!("set up queue {queue} out of turn at status {now:#x}"));
            return None;
        }
        self.setups.get_mut(self.queue_select as usize)
    }

    fn set_queue_ready(&mut self, value: u32) {
        let index = self.queue_select as usize;
        if value & 1 == 0 {
            if let Some(queue) = self.queues.get_mut(index) {
                queue.reset();
            }
            return;
        }
        let Some(setup) = self.selected_setup().copied() else { return };
        let Some(queue) = self.queues.get_mut(index) else { return };
        if let Err(error) = queue.set_up(&self.mem, &setup) {
            queue.reset();
            self.report(format_args!("queue {index}: {error}; it stays unready"));
        }
    }

    fn read_register(&self, shared: &Shared, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => self.selected().map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => self.selected().map_or(0, |queue| queue.ready().into()),
            register::INTERRUPT_STATUS => *shared.interrupt.lock(),
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.config_generation,
            // No shared memory region: length and base of all ones.
            register::SHM_LENGTH_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, shared: &Shared, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_SIZE => {
                if let Some(setup) = self.selected_setup() {
                    setup.size = value;
                }
            }
            register::QUEUE_READY => self.set_queue_ready(value),
            register::STATUS => self.set_status(shared, value),
            register::DESCRIPTORS_LOW
            | register::DESCRIPTORS_HIGH
            | register::AVAILABLE_LOW
            | register::AVAILABLE_HIGH
            | register::USED_LOW
            | register::USED_HIGH => {
                if let Some(setup) = self.selected_setup() {
                    let address = match offset & !7 {
                        register::DESCRIPTORS_LOW => &mut setup.descriptors,
                        register::AVAILABLE_LOW => &mut setup.available,
                        _ => &mut setup.used,
                    };
                    *address = if offset & 4 == 0 {
                        *address & !0xffff_ffff | u64::from(value)
                    } else {
                        *address & 0xffff_ffff | u64::from(value) << 32
                    };
                }
            }
            _ => self.report(format_args!("write of {value:#x} to register {offset:#x}")),
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            let now = self.status;
            return self.report(format_args!("set features out of turn at status {now:#x}"));
        }
        match self.driver_features_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
            _ if value == 0 => {}
            select => self.report(format_args!("accepted features {value:#x} of unknown word {select}")),
        }
    }

    /// Lets the device work with the queues and takes care of what follows from it.
    fn process(
        &mut self,
        shared: &Shared,
        work: impl FnOnce(&mut dyn VirtioDevice, Option<Running<'_>>) -> Result<Progress, QueueError>,
    ) -> Progress {
        let running =
            self.running().then_some(()).map(|()| Running { mem: &self.mem, queues: &mut self.queues });
        let was_running = running.is_some();
        let outcome = work(&mut *self.device, running);
        if !was_running {
            return Progress::Done;
        }
        let notify = self.queues.iter_mut().try_fold(false, |notify, queue| {
            queue.take_notification(&self.mem).map(|wanted| notify | wanted)
        });
        if let Ok(true) = notify {
            shared.interrupt.raise(INTERRUPT_USED);
        }
        match (outcome, notify) {
            (Err(error), _) | (_, Err(error)) => {
                self.fail(shared, &error);
                Progress::Done
            }
            (Ok(progress), _) => progress,
        }
    }

    fn process_host(&mut self, shared: &Shared) {
        // The device keeps its descriptor readable as long as there is more.
        let _done =
            self.process(shared, |device, running| device.process_host(running).map(|()| Progress::Done));
    }

    fn process_queue(&mut self, shared: &Shared, queue: usize) {
        let progress = self.process(shared, |device, running| match running {
            Some(running) => device.process_queue(queue, running),
            None => Ok(Progress::Done),
        });
        if progress == Progress::More {
            shared.notify(queue);
        }
    }
}

fn initial_setups(queues: &[DeviceQueue]) -> Vec<QueueSetup> {
    queues.iter().map(|queue| QueueSetup { size: queue.max_size().into(), ..Default::default() }).collect()
}

/// Why a device cannot be put behind a transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The host has no event descriptor to give.
    #[error("virtio device '{device}': no event descriptor: {source}; raise the limit of open files")]
    EventFd {
        /// The device's name.
        device: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The device asks for a queue that cannot be.
    #[error("virtio device '{device}': {source}")]
    Queue {
        /// The device's name.
        device: &'static str,
        /// What is wrong with the queue.
        source: QueueError,
    },
}

/// The registers of a device, for the MMIO bus.
pub struct VirtioMmio {
    shared: Arc<Shared>,
}

impl VirtioMmio {
    /// Puts `device` behind registers; it works on `mem` and interrupts on `line`.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, TransportError> {
        let name = device.name();
        let queues = device
            .queue_sizes()
            .iter()
            .map(|&size| DeviceQueue::new(size))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| TransportError::Queue { device: name, source })?;
        let notifications = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| TransportError::EventFd { device: name, source })?;
        let core = Core {
            offered: device.features() | TRANSPORT_FEATURES,
            device,
            mem,
            setups: initial_setups(&queues),
            queues,
            status: 0,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            config_generation: 0,
            errors: GuestErrors::default(),
        };
        let interrupt = Interrupt { line, status: Mutex::new(0) };
        Ok(VirtioMmio { shared: Arc::new(Shared { core: Mutex::new(core), interrupt, notifications }) })
    }

    /// The side of the device that an event loop runs. Ask for it once.
    pub fn events(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(VirtioEvents { shared: self.shared.clone() })
    }

    /// What is signalled by a store of a queue's number to [`QUEUE_NOTIFY`], one for each queue.
    pub fn notifications(&self) -> &[EventFd] {
        &self.shared.notifications
    }

    /// Does what the event loop would do now, without one.
    pub fn process_pending(&self) {
        let mut core = self.shared.lock();
        for (queue, event) in self.shared.notifications.iter().enumerate() {
            if event.read().is_ok() {
                core.process_queue(&self.shared, queue);
            }
        }
        if core.device.host_fd().is_some() {
            core.process_host(&self.shared);
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(register::CONFIG) {
            self.shared.lock().device.read_config(config_offset, data);
            return Flow::Continue;
        }
        let value = match (offset, data.len()) {
            (register::INTERRUPT_STATUS, 4) => *self.shared.interrupt.lock(),
            (offset, 4) if offset & 3 == 0 => self.shared.lock().read_register(&self.shared, offset),
            (offset, width) => {
                self.shared.lock().report(format_args!("{width}-byte read of register {offset:#x}"));
                return Flow::Continue;
            }
        };
        data.copy_from_slice(&value.to_le_bytes());
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let shared = &*self.shared;
        let word = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        match (offset, word) {
            (register::QUEUE_NOTIFY, Ok(queue)) => shared.notify(queue as usize),
            (register::INTERRUPT_ACK, Ok(bits)) => shared.interrupt.acknowledge(bits),
            (register::CONFIG.., _) => {
                shared.lock().report(format_args!("write to configuration at {offset:#x}"));
            }
            (offset, Ok(value)) if offset & 3 == 0 => shared.lock().write_register(shared, offset, value),
            (offset, _) => {
                let width = data.len();
                shared.lock().report(format_args!("{width}-byte write to register {offset:#x}"));
            }
        }
        Flow::Continue
    }
}

#[path = "mmio_state.rs"]
pub mod state;

/// The event-loop side of a [`VirtioMmio`].
struct VirtioEvents {
    shared: Arc<Shared>,
}

impl MutEventSubscriber for VirtioEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let queues = (0..).zip(&self.shared.notifications);
        let mut watched: Vec<Events> =
            queues.map(|(index, event)| Events::with_data(event, index, EventSet::IN)).collect();
        if let Some(fd) = self.shared.lock().device.host_fd() {
            watched.push(Events::with_data_raw(fd, HOST_EVENT, EventSet::IN));
        }
        for events in watched {
            if let Err(error) = ops.add(events) {
                log::error!("virtio: cannot watch a descriptor, the device will not work: {error:?}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let shared = &*self.shared;
        if events.data() == HOST_EVENT {
            shared.lock().process_host(shared);
            return;
        }
        let queue = events.data() as usize;
        if let Some(event) = shared.notifications.get(queue) {
            // Only the signal matters, not its count.
            drop(event.read());
            shared.lock().process_queue(shared, queue);
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
