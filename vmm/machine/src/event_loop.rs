//! The one thread that serves descriptors for all devices.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use harrier_engine::Kicker;
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

/// Interrupts the loop's wait, so that it stands while the machine is paused.
struct LoopKicker(EventFd);

impl Kicker for LoopKicker {
    fn kick(&self) {
        // A full counter means that the kick is there already.
        if let Err(err) = self.0.write(1)
            && err.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("event loop: cannot be interrupted: {err}");
        }
    }
}

/// Stands in the loop's thread while the machine is paused: no other device has its turn, and none is half way.
struct PauseSignal {
    event: EventFd,
    control: Arc<RunControl>,
}

impl MutEventSubscriber for PauseSignal {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // Only the signal matters, not its count.
        drop(self.event.read());
        self.control.stand();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(err) = ops.add(Events::new(&self.event, EventSet::IN)) {
            let failure = format!("event loop: cannot watch the pause event: {err}");
            self.control.finish(MachineEnd::Failed(failure));
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
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        control.add_kicker(Arc::new(LoopKicker(event.try_clone()?)));
        manager.add_subscriber(Box::new(PauseSignal { event, control: Arc::clone(&control) }));
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        control.enter();
        let thread_control = Arc::clone(&control);
        let thread = std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            let control = thread_control;
            let run = AssertUnwindSafe(|| {
                control.stand();
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
            control.leave();
        });
        if thread.is_err() {
            control.leave();
        }
        Ok(EventLoop { stop, thread: Some(thread?) })
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
