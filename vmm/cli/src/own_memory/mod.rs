//! The monitor's own memory, and what of it goes back to the host while the guest needs little.

mod heap;
mod program_pages;

pub(crate) use heap::share_between_threads;

/// Gives back what is free or can be had again.
pub(crate) fn give_back() {
    heap::give_back();
    program_pages::give_back();
}
