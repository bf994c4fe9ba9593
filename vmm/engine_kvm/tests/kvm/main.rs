//! Guests of a few bytes on the host's KVM, through the seam. Without KVM each test says that it is skipped.

mod guests;
mod state;
mod support;
mod user_mode;
