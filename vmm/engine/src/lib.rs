//! The seam between a machine and whatever runs its processors.
//!
//! [`Engine`] creates a [`Vm`], which maps guest memory and creates [`Vcpu`]s. Both engines implement these
//! traits and nothing above them knows which one runs. Device accesses happen *inside* [`Vcpu::run`] through
//! [`Io`], so that every return from `run` is an instruction boundary with all state visible in [`CpuState`].
//!
//! This crate holds no unsafe code and nothing of KVM. Its neighbours are `engine_soft` and `engine_kvm`
//! below the seam, `machine` and `devices` above it.

pub mod assist;
pub mod calibrate;
mod clock;
pub mod cpu_model;
pub mod cpu_state;
pub mod cpuid;
pub mod memory;
mod seam;
pub mod user_mode;

pub use clock::clock_scale;
pub use cpu_model::CpuModel;
pub use cpu_state::CpuState;
pub use memory::{GuestMemory, GuestRegion, PageLog};
pub use seam::{
    Counters, Engine, EngineError, Exit, Flow, GsiRoute, Io, Kicker, Msi, Probe, Vcpu, Vm, VmConfig,
};
