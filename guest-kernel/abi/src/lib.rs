//! The hypercalls of Harrier: what a guest and its host agree on.
//!
//! - [`port`]: the doorbell's registers in I/O space, and where discovery finds them.
//! - [`block`]: the argument block of a call, [`block::Block`], and what the host answers in it, [`Status`].
//! - [`calls`]: the table of calls, [`calls::CALLS`], with the layout of each call's arguments and results.
//! - [`shared_page`]: the page that the host writes and the guest reads without a call.
//! - [`reference`]: the C header and the reference in `docs/hypercalls.md`, both written from these tables.
//!
//! All numbers are little endian. Layouts have no padding, and bytes are converted field by field, so that neither
//! side trusts the other's memory to hold a valid value. The crate needs neither `std` nor an allocator.

#![no_std]

pub mod block;
pub mod calls;
pub mod layout;
pub mod port;
pub mod reference;
pub mod shared_page;

pub use block::{Block, Status};
pub use calls::{Call, features};

/// Changes when a guest of an older number would not be understood. The guest names it in every call.
pub const VERSION_MAJOR: u16 = 1;
/// Grows when calls, results or shared-page fields are added.
pub const VERSION_MINOR: u16 = 2;
/// Both, as [`port::REG_VERSION`] shows them: the major number in the upper half.
pub const VERSION: u32 = (VERSION_MAJOR as u32) << 16 | VERSION_MINOR as u32;
