//! What a snapshot keeps of a virtio device and its registers.

use serde::{Deserialize, Serialize};

use super::{FEATURE_EVENT_IDX, INTERRUPT_CONFIG, INTERRUPT_USED, VirtioMmio, initial_setups, status};
use crate::state::{BadState, Stateful};
use crate::virtio::queue::QueueSetup;
pub use crate::virtio::queue::QueueState;

/// Registers, queues, and the device's own part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// Device type (virtio 1.2, section 5).
    pub device_type: u32,
    /// Device status.
    pub status: u32,
    /// Interrupt status.
    pub interrupt_status: u32,
    /// Features that the driver has accepted.
    pub accepted: u64,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// QueueSel.
    pub queue_select: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Queues in use.
    pub queues: Vec<QueueState>,
    /// What the driver wrote about queues that it has not declared ready.
    pub setups: Vec<SetupState>,
    /// The device's own part.
    pub device: serde_json::Value,
}

/// Registers of a queue that is being set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are the specification's registers")]
pub struct SetupState {
    pub size: u32,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

const STATUS_BITS: u32 = status::ACKNOWLEDGE
    | status::DRIVER
    | status::DRIVER_OK
    | status::FEATURES_OK
    | status::NEEDS_RESET
    | status::FAILED;

impl Stateful for VirtioMmio {
    type State = VirtioState;
    const NAME: &'static str = "virtio";

    fn save(&self) -> VirtioState {
        let core = self.shared.lock();
        VirtioState {
            device_type: core.device.device_type(),
            status: core.status,
            interrupt_status: *self.shared.interrupt.lock(),
            accepted: core.accepted,
            device_features_select: core.device_features_select,
            driver_features_select: core.driver_features_select,
            queue_select: core.queue_select,
            config_generation: core.config_generation,
            queues: core.queues.iter().map(|queue| queue.save()).collect(),
            setups: core
                .setups
                .iter()
                .map(|&QueueSetup { size, descriptors, available, used }| SetupState {
                    size,
                    descriptors,
                    available,
                    used,
                })
                .collect(),
            device: core.device.save(),
        }
    }

    /// Every queue is notified afterwards: a notification that was on its way when the state was saved is lost, and a
    /// driver that waits for an answer does not notify again.
    fn restore(&mut self, state: VirtioState) -> Result<(), BadState> {
        let shared = &*self.shared;
        let mut core = shared.lock();
        let core = &mut *core;
        let here = core.device.device_type();
        BadState::unless(state.device_type == here, || {
            format!("it was a device of type {}, and here is one of type {here}", state.device_type)
        })?;
        let foreign = state.accepted & !core.offered;
        BadState::unless(foreign == 0 || state.status & status::FEATURES_OK == 0, || {
            format!("the driver uses features {foreign:#x}, which are not offered here")
        })?;
        BadState::unless(state.status & !STATUS_BITS == 0, || format!("no status is {:#x}", state.status))?;
        let (queues, setups) = (state.queues.len(), state.setups.len());
        BadState::unless(queues == core.queues.len() && setups == queues, || {
            format!("{queues} queues with {setups} set-ups instead of {}", core.queues.len())
        })?;
        core.setups = initial_setups(&core.queues);
        for (setup, saved) in core.setups.iter_mut().zip(&state.setups) {
            let SetupState { size, descriptors, available, used } = *saved;
            *setup = QueueSetup { size, descriptors, available, used };
        }
        for (index, (queue, saved)) in core.queues.iter_mut().zip(&state.queues).enumerate() {
            queue.restore(&core.mem, saved).map_err(|error| BadState(format!("queue {index}: {error}")))?;
        }
        core.status = state.status;
        core.accepted = state.accepted;
        core.device_features_select = state.device_features_select;
        core.driver_features_select = state.driver_features_select;
        core.queue_select = state.queue_select;
        core.config_generation = state.config_generation;
        let running = core.running();
        if running {
            for queue in &mut core.queues {
                queue.set_event_idx(core.accepted & FEATURE_EVENT_IDX != 0);
            }
        }
        core.device.restore(&state.device, running.then_some(core.accepted))?;
        let pending = state.interrupt_status & (INTERRUPT_USED | INTERRUPT_CONFIG);
        *shared.interrupt.lock() = pending;
        shared.interrupt.line.set_level(pending != 0);
        if running {
            (0..core.queues.len()).for_each(|queue| shared.notify(queue));
        }
        Ok(())
    }
}
