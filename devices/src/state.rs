//! Saving and restoring devices.
//!
//! A device that belongs to snapshots implements [`Stateful`]: a plain `State`, apart from its running types, and two
//! ways between them. Whoever adds the device to a machine makes a [`StateUnit`] of it with [`unit`], once; the
//! machine saves and restores its units without knowing what they are.
//!
//! A state is JSON. A field that is new or gone is a new [`Stateful::VERSION`]; the states of older versions that a device
//! still takes have defaults for what they lack.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A state that its device cannot be in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadState(pub String);

impl BadState {
    /// Refuses unless `valid`.
    ///
    /// # Errors
    /// What `reason` says.
    pub fn unless(valid: bool, reason: impl FnOnce() -> String) -> Result<(), BadState> {
        if valid { Ok(()) } else { Err(BadState(reason())) }
    }
}

/// A device whose state can be kept and taken up again.
///
/// Both calls are made while no vCPU and no event loop runs.
pub trait Stateful {
    /// The state, in explicit types; its form belongs to [`Stateful::VERSION`].
    type State: Serialize + DeserializeOwned;
    /// The device's name in a snapshot: lower-case letters, digits and `-`.
    const NAME: &'static str;
    /// Version of the state's form.
    const VERSION: u32 = 1;
    /// The oldest version whose states it takes.
    const OLDEST_VERSION: u32 = Self::VERSION;

    /// What the device is now.
    fn save(&self) -> Self::State;
    /// Takes up a state; the device is as it was created. Interrupt lines are driven to the levels that follow.
    ///
    /// # Errors
    /// [`BadState`] if a device cannot be so.
    fn restore(&mut self, state: Self::State) -> Result<(), BadState>;
}

/// A device as its machine saves and restores it.
pub trait StateUnit: Send + Sync {
    /// Its name, which no other unit of the machine has.
    fn name(&self) -> &str;
    /// Version of the form in which it saves.
    fn version(&self) -> u32;
    /// The state, as JSON.
    ///
    /// # Errors
    /// It cannot be written down.
    fn save(&self) -> Result<Vec<u8>, BadState>;
    /// Takes up a state of a version.
    ///
    /// # Errors
    /// The version is unknown, the bytes are not of its form, or the device cannot be so.
    fn restore(&self, version: u32, state: &[u8]) -> Result<(), BadState>;
}

struct Unit<D> {
    name: String,
    device: Arc<Mutex<D>>,
}

/// The unit of `device`, with a name of its own.
pub fn unit<D: Stateful + Send + 'static>(name: &str, device: &Arc<Mutex<D>>) -> Arc<dyn StateUnit> {
    Arc::new(Unit { name: name.to_owned(), device: Arc::clone(device) })
}

impl<D: Stateful + Send> StateUnit for Unit<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        D::VERSION
    }

    fn save(&self) -> Result<Vec<u8>, BadState> {
        let state = self.device.lock().unwrap_or_else(PoisonError::into_inner).save();
        serde_json::to_vec(&state).map_err(|err| BadState(err.to_string()))
    }

    fn restore(&self, version: u32, state: &[u8]) -> Result<(), BadState> {
        BadState::unless((D::OLDEST_VERSION..=D::VERSION).contains(&version), || {
            format!("version {version} is unknown, this harrier has {}", D::VERSION)
        })?;
        let state = serde_json::from_slice(state).map_err(|err| BadState(err.to_string()))?;
        self.device.lock().unwrap_or_else(PoisonError::into_inner).restore(state)
    }
}

/// For a device that remembers nothing.
#[macro_export]
macro_rules! stateless {
    ($device:ty, $name:literal) => {
        impl $crate::state::Stateful for $device {
            type State = ();
            const NAME: &'static str = $name;

            fn save(&self) {}

            fn restore(&mut self, (): ()) -> Result<(), $crate::state::BadState> {
                Ok(())
            }
        }
    };
}
