//! The one thread that serves descriptors for all devices.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::{OnThreadStart, ThreadRole};
use crate::run_control::{MachineEnd, RunControl};
use crate::vcpu::panic_text;

/// A device's part in the event loop.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The running thread; dropping it ends it.
pub(crate) struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the loop so that it sees that it has to end.
struct StopSignal {
    event: EventFd,
    stopped: Arc<AtomicBool>,
}

impl MutEventSubscriber for StopSignal {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.stopped.store(true, Ordering::Release);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(err) = ops.add(Events::new(&self.event, EventSet::IN)) {
            log::error!("event loop: cannot watch the stop event: {err}");
            self.stopped.store(true, Ordering::Release);
        }
    }
}

impl EventLoop {
    /// Starts the thread with all subscribers. If it fails later, the machine ends.
    pub(crate) fn start(
        subscribers: Vec<Subscriber>,
        control: Arc<RunControl>,
        on_start: OnThreadStart,
    ) -> io::Result<Self> {
        let mut manager =
            EventManager::<Subscriber>::new().map_err(|err| io::Error::other(err.to_string()))?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stopped = Arc::new(AtomicBool::new(false));
        manager.add_subscriber(Box::new(StopSignal { event: stop.try_clone()?, stopped: stopped.clone() }));
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        let thread = std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            let run = AssertUnwindSafe(|| {
                if let Err(err) = on_start(ThreadRole::Events) {
                    control.finish(MachineEnd::Failed(format!("event loop: {err}")));
                    return;
                }
                while !stopped.load(Ordering::Acquire) {
                    match manager.run() {
                        Ok(_) => {}
                        Err(event_manager::Error::Epoll(err)) if err.errno() == INTERRUPTED => {}
                        Err(err) => {
                            control.finish(MachineEnd::Failed(format!("event loop: {err}")));
                            return;
                        }
                    }
                }
            });
            if let Err(panic) = catch_unwind(run) {
                let text = panic_text(panic.as_ref());
                control.finish(MachineEnd::Failed(format!("event loop panicked: {text}")));
            }
        })?;
        Ok(EventLoop { stop, thread: Some(thread) })
    }
}

/// EINTR of Linux on x86-64.
const INTERRUPTED: i32 = 4;

impl Drop for EventLoop {
    fn drop(&mut self) {
        if let Err(err) = self.stop.write(1) {
            log::error!("event loop: cannot be stopped: {err}");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported as the machine's end.
            let _ = thread.join();
        }
    }
}
