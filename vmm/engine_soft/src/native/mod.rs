//! The host's own instructions, wrapped: arithmetic with its flags, plain and atomic memory accesses.
//!
//! These modules hold the crate's `unsafe`: inline assembly that computes what the guest's instruction
//! computes, and raw accesses to guest memory that the [`crate::mmu`] has checked.

pub(crate) mod alu;
pub(crate) mod host;
pub(crate) mod mem;
pub(crate) mod mxcsr;
pub(crate) mod random;
pub(crate) mod thread_time;
pub(crate) mod thunk;
pub(crate) mod tsc;
pub(crate) mod wide;
pub(crate) mod x87;
