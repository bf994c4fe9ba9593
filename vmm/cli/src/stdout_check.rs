//! Whether stdout was open when the program began. The Rust runtime puts /dev/null in the place of a closed one before
//! `main`, so the look has to come earlier: from the list of functions that the loader calls first.

#![expect(unsafe_code, reason = "a function in .init_array, and fcntl on a descriptor that may be closed")]

use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: F_GETFD takes no further argument and changes nothing; a closed descriptor is an error, which is asked for.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    CLOSED.store(flags < 0, Ordering::Relaxed);
}

// SAFETY: the section holds pointers to functions of the C calling convention, and this is one. `look` needs nothing of
// the runtime, which has not begun yet.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether the caller closed stdout.
pub(crate) fn stdout_was_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}
