//! The devices, reachable from handlers while a run is under way.
#![expect(unsafe_code, reason = "a borrowed trait object is kept in the processor for the time of one run")]

use std::ptr::NonNull;

use harrier_engine::{Flow, Io};

/// Holds the `Io` of the current run. Outside a run there is none, and accesses find no device.
#[derive(Default)]
pub(crate) struct IoSlot(Option<NonNull<dyn Io>>);

// SAFETY: the pointer is set only between `enter` and `leave`, during which the processor stays on the thread
// that borrowed the Io.
unsafe impl Send for IoSlot {}

impl IoSlot {
    /// Lends `io` to the slot; [`IoSlot::leave`] must be called before the borrow ends.
    pub(crate) fn enter(&mut self, io: &mut dyn Io) {
        let ptr: NonNull<dyn Io + '_> = NonNull::from(io);
        // SAFETY: only the lifetime changes. The run loop that calls enter holds the borrow of `io` and calls
        // leave on every way out, a panic included (its guard).
        let ptr: NonNull<dyn Io> = unsafe { std::mem::transmute(ptr) };
        self.0 = Some(ptr);
    }

    /// Ends the loan.
    pub(crate) fn leave(&mut self) {
        self.0 = None;
    }

    /// Calls `f` with the devices; answers `Flow::Continue` when there are none.
    pub(crate) fn with(&mut self, f: impl FnOnce(&mut dyn Io) -> Flow) -> Flow {
        match self.0 {
            // SAFETY: between enter and leave the pointee is borrowed mutably for us alone, and `&mut self`
            // makes the access exclusive.
            Some(mut io) => f(unsafe { io.as_mut() }),
            None => Flow::Continue,
        }
    }
}
