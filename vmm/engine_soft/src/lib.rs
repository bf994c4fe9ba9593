//! A software x86-64 processor behind the engine seam.
//!
//! - [`decode`]: guest bytes to blocks of decoded operations, and the cache that holds them.
//! - [`exec`]: what the operations do, one file a topic.
//! - [`mmu`]: paging, look-aside buffers, the way to guest memory.
//! - [`exception`], [`interrupt`], [`lapic`]: what interrupts the straight line.
//! - [`assist`]: single instructions for another engine.
//! - [`lend`]: user code on the host's processor, where somebody offers that.
//! - [`vcpu`]: the dispatcher, and the engine seam's [`harrier_engine::Vcpu`].
//! - [`native`], [`io_slot`], parts of [`mmu`] and [`fpu`]: the modules with `unsafe`.
//!
//! Guest instructions compute through the host's own ([`native`]), so results and flags are the processor's.
//! Several vCPUs run on a thread each: guest and host have the same memory model, LOCK is the host's LOCK, and
//! both cores of a host can work for one guest.

mod assist;
mod clock;
mod cpu;
mod cpuid;
mod decode;
mod descriptor;
mod engine;
mod exception;
mod exec;
mod fault;
mod fpu;
mod interrupt;
mod io_slot;
mod lapic;
mod lend;
mod mmu;
mod msr;
mod native;
mod state;
mod task;
#[cfg(test)]
mod testing;
mod vcpu;
mod vm;

pub use engine::SoftEngine;
pub use native::thunk::prepare_tables;
