//! The software processor as its users see it: small programs in machine code, run through the engine seam.
//!
//! [`machine`] makes machines and programs; the other modules are the tests, one a topic.

mod apic;
mod clock;
mod exceptions;
mod features;
mod machine;
mod paging;
mod state;
mod tasks;
