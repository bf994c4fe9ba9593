//! Interrupting a vCPU's run from another thread.
//!
//! A kick sets a flag and `immediate_exit`, then sends a signal to the thread that is inside KVM_RUN, if one is.
//! The flag outlives a run that returned for another reason, so no kick is lost. The signal's handler sets
//! the flag once more, so that a signal of an [`Alarm`] just before KVM_RUN is not lost either.
#![expect(unsafe_code, reason = "sends a signal to a thread by its id")]

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use harrier_engine::{EngineError, Kicker};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::host::refused;
use crate::run_page::RunPage;

/// The first real-time signal after those that the C library and debuggers use.
const SIGNAL_OFFSET: libc::c_int = 3;

thread_local! {
    /// The page of the vCPU that this thread runs now.
    static RUNNING: Cell<*const RunPage> = const { Cell::new(std::ptr::null()) };
}

/// The signal may come just before KVM_RUN, which it would not interrupt then: the flag makes it return.
extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = RUNNING.try_with(Cell::get).unwrap_or(std::ptr::null());
    // SAFETY: `Running` sets the pointer to a page that its `Kick` keeps alive, and clears it on the same thread
    // before it ends; setting the flag is one atomic store.
    if let Some(page) = unsafe { page.as_ref() } {
        page.set_immediate_exit(true);
    }
}

/// Installs the handler, once a process.
pub(crate) fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(SIGRTMIN() + SIGNAL_OFFSET, interrupt).map_err(|err| err.errno())
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
        RUNNING.with(|running| running.set(Arc::as_ptr(&self.page)));
        // SAFETY: has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Running(self)
    }

    /// Takes a kick that has come in.
    pub(crate) fn take(&self) -> bool {
        self.page.set_immediate_exit(false);
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Whether a kick has come in and was not taken.
    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.runner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
        RUNNING.with(|running| running.set(std::ptr::null()));
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

/// A timer that sends the signal to the thread that set it.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    /// The timer and the thread that it belongs to.
    timer: Option<(libc::timer_t, libc::pid_t)>,
}

// SAFETY: a timer's id is a number for the whole process.
unsafe impl Send for Alarm {}

impl Alarm {
    /// Sends the signal to this thread after `after`.
    pub(crate) fn set(&mut self, after: Duration) -> io::Result<()> {
        let timer = self.timer_of_this_thread()?;
        // Zero would switch the timer off.
        let after = after.max(Duration::from_nanos(1));
        arm(timer, after)
    }

    /// Takes it back.
    pub(crate) fn clear(&mut self) {
        if let Some((timer, _)) = self.timer
            && let Err(err) = arm(timer, Duration::ZERO)
        {
            log::debug!("kvm: a timer could not be stopped: {err}");
        }
    }

    fn timer_of_this_thread(&mut self) -> io::Result<libc::timer_t> {
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::gettid() };
        if let Some((timer, owner)) = self.timer {
            if owner == thread {
                return Ok(timer);
            }
            self.delete();
        }
        // SAFETY: all fields of a sigevent may be zero.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN() + SIGNAL_OFFSET;
        event.sigev_notify_thread_id = thread;
        let mut timer = std::ptr::null_mut();
        // SAFETY: both pointers are to values of this frame.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.timer = Some((timer, thread));
        Ok(timer)
    }

    fn delete(&mut self) {
        if let Some((timer, _)) = self.timer.take() {
            // SAFETY: the timer is ours and is not used again.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.delete();
    }
}

fn arm(timer: libc::timer_t, after: Duration) -> io::Result<()> {
    let time = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec {
            tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: after.subsec_nanos().into(),
        },
    };
    // SAFETY: the timer exists, and the pointer is to a value of this frame.
    match unsafe { libc::timer_settime(timer, 0, &time, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
