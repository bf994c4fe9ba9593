//! KVM behind the engine seam: the only crate that knows `kvm_*` structures and ioctls.
//!
//! - [`probe`]: whether the host's KVM can run a machine, and if not, what would change that.
//! - [`engine`], [`vm`], [`vcpu`]: the three traits of the seam.
//! - [`slots`], [`dirty`]: guest memory and which of its pages the processors wrote.
//! - [`run_page`], [`exit`], [`kick`]: the page that KVM shares with us for each vCPU, what it says, and how another
//!   thread interrupts a run.
//! - [`state`]: KVM's structures from and to the canonical [`harrier_engine::CpuState`].
//! - [`cpuid`]: what each CPU model shows.
//! - [`user`]: user mode only, for the software engine on hosts whose KVM emulates kernel mode.
//! - [`calibrate`]: how fast kernel and user mode are here.
//!
//! `unsafe` is in [`run_page`], [`kick`], [`slots`] and `state::xsave` only.

mod calibrate;
mod cpuid;
mod dirty;
mod engine;
mod exit;
mod host;
mod kick;
mod probe;
mod run_page;
mod slots;
mod state;
mod user;
mod vcpu;
mod vm;

pub use calibrate::Calibration;
pub use engine::KvmEngine;
