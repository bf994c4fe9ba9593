//! A machine: memory, processors, two buses, and the threads that drive them.
//!
//! [`MachineBuilder`] creates guest memory and the engine's VM, takes devices and a [`boot::Boot`], and turns
//! into a [`Machine`], whose [`Machine::wait`] says how the run ended. Everything about how a machine begins is
//! in [`boot`], [`acpi`] and [`layout`]; nothing here prints, reads the environment or keeps state for the whole
//! process, so that the crate can be embedded.
//!
//! Neighbours: `harrier-engine` is the seam to the processors, `harrier-devices` has the devices and buses.

pub mod acpi;
pub mod boot;
mod builder;
mod cpu_words;
mod event_loop;
mod generation_id;
mod guest_time;
mod hypercalls;
pub mod layout;
mod machine;
pub mod memory;
mod mp_table;
mod pagemap;
mod run_control;
pub mod snapshot;
mod vcpu;
mod working_set;

pub use builder::{BuildError, MAX_VCPUS, MAX_VIRTIO_DEVICES, MachineBuilder, MachineConfig};
pub use event_loop::Subscriber;
pub use hypercalls::{HypercallReport, Mark, OnCheckpoint, Quiesced};
pub use machine::{Machine, MachineHandle, OnThreadStart, RunReport, StartError, ThreadRole};
pub use run_control::{EXIT_DONE, MachineEnd};
pub use working_set::WorkingSet;
