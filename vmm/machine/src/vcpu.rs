//! One thread per vCPU: runs the guest, answers its exits and stands still when the machine is paused.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use harrier_devices::Bus;
use harrier_devices::ioapic::IoApic;
use harrier_engine::{Exit, Flow, Io, Vcpu};

use crate::machine::{OnThreadStart, ThreadRole};
use crate::run_control::{MachineEnd, RunControl};

/// A vCPU as its thread and, while the machine is paused, its owner share it.
pub(crate) type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// The two buses and the interrupt controller, as a processor sees them.
#[derive(Clone)]
pub(crate) struct MachineIo {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) ioapic: IoApic,
}

impl Io for MachineIo {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Flow {
        self.pio.read(port.into(), data)
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> Flow {
        self.pio.write(port.into(), data)
    }

    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Flow {
        self.mmio.read(gpa, data)
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Flow {
        self.mmio.write(gpa, data)
    }

    fn eoi(&mut self, vector: u8) -> Flow {
        self.ioapic.eoi(vector);
        Flow::Continue
    }
}

/// Starts the thread of vCPU `index`.
pub(crate) fn spawn(
    index: u32,
    vcpu: SharedVcpu,
    io: MachineIo,
    control: Arc<RunControl>,
    on_start: OnThreadStart,
) -> io::Result<JoinHandle<()>> {
    control.enter();
    let thread_control = Arc::clone(&control);
    let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
        let run = AssertUnwindSafe(|| match on_start(ThreadRole::Vcpu) {
            Ok(()) => run_until_end(index, &vcpu, io, &thread_control),
            Err(err) => thread_control.finish(MachineEnd::Failed(format!("vcpu {index}: {err}"))),
        });
        if let Err(panic) = catch_unwind(run) {
            let text = panic_text(panic.as_ref());
            thread_control.finish(MachineEnd::Failed(format!("vcpu {index} panicked: {text}")));
        }
        thread_control.leave();
    });
    if thread.is_err() {
        control.leave();
    }
    thread
}

fn run_until_end(index: u32, vcpu: &SharedVcpu, mut io: MachineIo, control: &RunControl) {
    while control.gate() {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        match vcpu.run(&mut io) {
            // Whoever asked has left word with the gate.
            Exit::Left | Exit::Kicked => {}
            Exit::Breakpoint => log::debug!("machine: vcpu {index} met a breakpoint that nobody set"),
            Exit::Shutdown => control.finish(MachineEnd::Shutdown { vcpu: index }),
            Exit::TripleFault => {
                let rip = vcpu.state().map_or(0, |state| state.regs.rip);
                control.finish(MachineEnd::TripleFault { vcpu: index, rip });
            }
            Exit::Unsupported { rip, bytes, reason } => {
                control.finish(MachineEnd::Unsupported { vcpu: index, rip, bytes, reason });
            }
        }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    }
}
