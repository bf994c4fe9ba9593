//! Interrupting a vCPU's run from another thread.
//!
//! A kick sets a flag and `immediate_exit`, then sends a signal to the thread that is inside KVM_RUN, if one is.
//! The flag outlives a run that returned for another reason, so no kick is lost. The signal's handler does
//! nothing: that the system call is interrupted is all that is wanted.
#![expect(unsafe_code, reason = "sends a signal to a thread by its id")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use harrier_engine::{EngineError, Kicker};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::host::refused;
use crate::run_page::RunPage;

/// The first real-time signal after those that the C library and debuggers use.
const SIGNAL_OFFSET: libc::c_int = 3;

extern "C" fn interrupt_only(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, once a process.
pub(crate) fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(SIGRTMIN() + SIGNAL_OFFSET, interrupt_only).map_err(|err| err.errno())
        })
        .map_err(|errno| {
            refused("install the signal that interrupts vCPUs")(vmm_sys_util::errno::Error::new(errno))
        })
}

/// Where a vCPU is kicked.
#[derive(Debug)]
pub(crate) struct Kick {
    page: Arc<RunPage>,
    kicked: AtomicBool,
    /// The thread that runs the vCPU now.
    runner: Mutex<Option<libc::pthread_t>>,
}

/// While this lives, the calling thread is the one that gets the signal.
pub(crate) struct Running<'a>(&'a Kick);

impl Kick {
    pub(crate) fn new(page: Arc<RunPage>) -> Kick {
        Kick { page, kicked: AtomicBool::new(false), runner: Mutex::new(None) }
    }

    /// Says that this thread is about to call KVM_RUN.
    pub(crate) fn enter(&self) -> Running<'_> {
        // A thread that inherited a full signal mask would never be interrupted.
        if let Err(err) = unblock_signal(SIGRTMIN() + SIGNAL_OFFSET) {
            log::warn!("kvm: the signal that interrupts a vCPU stays blocked: {err}");
        }
        // SAFETY: has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Running(self)
    }

    /// Takes a kick that has come in.
    pub(crate) fn take(&self) -> bool {
        self.page.set_immediate_exit(false);
        self.kicked.swap(false, Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.runner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

impl Kicker for Kick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.page.set_immediate_exit(true);
        if let Some(thread) = *self.lock() {
            // SAFETY: the lock is held, so the thread is still between `enter` and the end of `Running` and has
            // not ended.
            unsafe { libc::pthread_kill(thread, SIGRTMIN() + SIGNAL_OFFSET) };
        }
    }
}
