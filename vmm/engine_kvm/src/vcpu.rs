//! The run loop: enters the guest, answers its accesses, and returns only at instruction boundaries.
//!
//! After a port or memory access KVM finishes the instruction when it is entered again; to leave after a device
//! said so, it is entered once more with `immediate_exit` set, which completes the instruction and no more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::assist::{AssistantVcpu, Assisted};
use harrier_engine::cpu_state::MpState;
use harrier_engine::{Counters, CpuState, EngineError, Exit, Flow, Io, Kicker, Vcpu};
use kvm_ioctls::VcpuFd;

use crate::exit::{self, PortAccess, RunExit};
use crate::kick::Kick;
use crate::run_page::RunPage;
use crate::state::mp_state_to_kvm;
use crate::vm::Shared;

/// A vCPU that did not run for so long tells its guest, whose watchdogs would bark otherwise.
const PAUSE_WORTH_TELLING: Duration = Duration::from_secs(1);
/// Longest instruction of the architecture, in bytes.
const LONGEST_INSTRUCTION: usize = 15;

/// A vCPU of the KVM engine.
pub(crate) struct KvmVcpu {
    shared: Arc<Shared>,
    fd: VcpuFd,
    page: Arc<RunPage>,
    kick: Arc<Kick>,
    assistant: Option<Box<dyn AssistantVcpu>>,
    assists: u64,
    io_accesses: u64,
    /// When run returned last.
    left_at: Option<Instant>,
}

impl KvmVcpu {
    pub(crate) fn new(
        shared: Arc<Shared>,
        fd: VcpuFd,
        index: u32,
        assistant: Option<Box<dyn AssistantVcpu>>,
    ) -> Result<KvmVcpu, EngineError> {
        let page = RunPage::map(&fd, shared.run_page_bytes)
            .map_err(|source| EngineError::Host { what: "map the shared page of a vCPU", source })?;
        shared.access.reset(&fd, index)?;
        let page = Arc::new(page);
        let kick = Arc::new(Kick::new(Arc::clone(&page)));
        Ok(KvmVcpu { shared, fd, page, kick, assistant, assists: 0, io_accesses: 0, left_at: None })
    }

    fn run_loop(&mut self, io: &mut dyn Io) -> Exit {
        // Set when run is to end: KVM is then entered only to complete the instruction.
        let mut leaving = false;
        loop {
            if let Err(err) = self.fd.run().map(drop) {
                match err.errno() {
                    libc::EINTR if leaving => {
                        self.page.set_immediate_exit(false);
                        return Exit::Left;
                    }
                    libc::EINTR if self.kick.take() => return Exit::Kicked,
                    // Another signal; or a processor that waits for its start-up message was woken.
                    libc::EINTR | libc::EAGAIN => continue,
                    libc::EFAULT | libc::EHWPOISON => {
                        return self.unsupported(
                            Vec::new(),
                            format!(
                                "the host could not give guest memory to KVM ({err}): free memory on the host"
                            ),
                        );
                    }
                    _ => return self.unsupported(Vec::new(), format!("KVM_RUN failed: {err}")),
                }
            }
            let flow = match exit::read(&self.page) {
                RunExit::Port(access) => match self.port(io, access) {
                    Ok(flow) => flow,
                    Err(reason) => return self.unsupported(Vec::new(), reason),
                },
                RunExit::Mmio { write: true, gpa, bytes, len } => {
                    self.io_accesses += 1;
                    io.mmio_write(gpa, &bytes[..len])
                }
                RunExit::Mmio { write: false, gpa, len, .. } => {
                    self.io_accesses += 1;
                    let mut bytes = [0xff; 8];
                    let flow = io.mmio_read(gpa, &mut bytes[..len]);
                    exit::answer_mmio(&self.page, &bytes[..len]);
                    flow
                }
                RunExit::Eoi(vector) => {
                    self.io_accesses += 1;
                    io.eoi(vector)
                }
                RunExit::Msr { index } => {
                    log::debug!("kvm: msr {index:#x} does not exist, the guest gets #GP");
                    exit::refuse_msr(&self.page);
                    Flow::Continue
                }
                RunExit::Hypercall => {
                    exit::refuse_hypercall(&self.page);
                    Flow::Continue
                }
                RunExit::Again => Flow::Continue,
                RunExit::Debug => return Exit::Breakpoint,
                RunExit::Shutdown => return Exit::TripleFault,
                RunExit::SystemEvent { kind } => {
                    log::info!("kvm: the guest ended by a {}", exit::system_event(kind));
                    return Exit::Shutdown;
                }
                RunExit::Halted => {
                    return self
                        .unsupported(Vec::new(), "KVM left the guest at HLT, without its own APIC".into());
                }
                RunExit::EmulationFailure { bytes } => match self.assist(io, bytes) {
                    Ok(flow) => flow,
                    Err(exit) => return exit,
                },
                RunExit::Broken(reason) => return self.unsupported(Vec::new(), reason),
            };
            match flow {
                Flow::Leave if !leaving => {
                    leaving = true;
                    self.page.set_immediate_exit(true);
                }
                // Entered again, KVM completes the instruction and then waits.
                Flow::Halt => {
                    if let Err(err) = self.fd.set_mp_state(mp_state_to_kvm(MpState::Halted)) {
                        return self.unsupported(Vec::new(), format!("KVM does not let a vCPU wait: {err}"));
                    }
                }
                _ => {}
            }
        }
    }

    /// Reports level-triggered interrupts that have ended and whose report KVM still owes.
    ///
    /// KVM reports them when it enters the guest the next time, so after a kick a report may be missing that the
    /// APIC's state already counts as done. One report too many does no harm: the I/O APIC finds nothing to end.
    fn report_ended_interrupts(&mut self, io: &mut dyn Io) {
        let routed = self.shared.level_vectors();
        if routed.is_empty() {
            return;
        }
        match self.shared.access.ended_level_interrupts(&self.fd) {
            Ok(ended) => {
                for vector in routed.into_iter().filter(|&vector| ended(vector)) {
                    self.io_accesses += 1;
                    let _ = io.eoi(vector);
                }
            }
            Err(err) => log::warn!("kvm: the ends of level interrupts are unknown: {err}"),
        }
    }

    /// Lets another engine execute the instruction that KVM cannot.
    fn assist(&mut self, io: &mut dyn Io, bytes: Vec<u8>) -> Result<Flow, Exit> {
        const CANNOT: &str = "KVM's emulator does not execute this instruction here";
        let Some(mut assistant) = self.assistant.take() else {
            return Err(self.unsupported(bytes, CANNOT.to_owned()));
        };
        let access = &self.shared.access;
        let executed = access.get(&self.fd).and_then(|before| {
            let mut after = before.clone();
            let done = assistant.execute(&mut after, io)?;
            if matches!(done, Assisted::Done { .. }) {
                access.set_changes(&self.fd, &before, &after)?;
            }
            log::debug!("kvm: assist at {:#x}: {bytes:02x?}", before.regs.rip);
            Ok(done)
        });
        self.assistant = Some(assistant);
        self.assists += 1;
        match executed {
            Ok(Assisted::Done { leave: true }) => Ok(Flow::Leave),
            Ok(Assisted::Done { leave: false }) => Ok(Flow::Continue),
            Ok(Assisted::TripleFault) => Err(Exit::TripleFault),
            Ok(Assisted::Unsupported(reason)) => {
                Err(self.unsupported(bytes, format!("{CANNOT}, nor does the software processor: {reason}")))
            }
            Err(err) => Err(self
                .unsupported(bytes, format!("{CANNOT}, and the software processor cannot take over: {err}"))),
        }
    }

    /// Lets a device answer a port access, element by element.
    fn port(&mut self, io: &mut dyn Io, access: PortAccess) -> Result<Flow, String> {
        let PortAccess { write, size, port, count, offset } = access;
        if !matches!(size, 1 | 2 | 4) {
            return Err(format!("KVM reports a port access of {size} bytes"));
        }
        let mut flow = Flow::Continue;
        for element in 0..count {
            self.io_accesses += 1;
            let at = element.checked_mul(size).and_then(|at| at.checked_add(offset)).unwrap_or(usize::MAX);
            let mut bytes = [0xff; 4];
            let bytes = &mut bytes[..size];
            let answer = if write {
                if !self.page.read_bytes(at, bytes) {
                    return Err("KVM reports port data beyond its page".to_owned());
                }
                io.pio_write(port, bytes)
            } else {
                let answer = io.pio_read(port, bytes);
                if !self.page.write_bytes(at, bytes) {
                    return Err("KVM reports port data beyond its page".to_owned());
                }
                answer
            };
            if flow != Flow::Leave && answer != Flow::Continue {
                flow = answer;
            }
        }
        Ok(flow)
    }

    /// Says where the guest stands and what it was about to execute.
    fn unsupported(&self, bytes: Vec<u8>, reason: String) -> Exit {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let bytes = if bytes.is_empty() { self.instruction_bytes().unwrap_or_default() } else { bytes };
        Exit::Unsupported { rip, bytes, reason }
    }

    /// The bytes at CS:RIP as far as they are in memory, up to the end of the page.
    fn instruction_bytes(&self) -> Option<Vec<u8>> {
        let regs = self.fd.get_regs().ok()?;
        let sregs = self.fd.get_sregs().ok()?;
        let address = regs.rip.wrapping_add(sregs.cs.base);
        let translation = self.fd.translate_gva(address).ok().filter(|found| found.valid != 0)?;
        let gpa = translation.physical_address;
        let len = LONGEST_INSTRUCTION.min(0x1000 - (gpa & 0xfff) as usize);
        let mut bytes = vec![0; len];
        self.shared.slots().read(gpa, &mut bytes).then_some(bytes)
    }

    /// Lets the guest know that time passed while it stood still, if it has a paravirtual clock.
    fn tell_of_pause(&self) {
        if self.left_at.is_some_and(|at| at.elapsed() > PAUSE_WORTH_TELLING)
            && let Err(err) = self.fd.kvmclock_ctrl()
            && err.errno() != libc::EINVAL
        {
            log::debug!("kvm: the guest was not told of a pause: {err}");
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &mut dyn Io) -> Exit {
        if self.kick.take() {
            return Exit::Kicked;
        }
        self.tell_of_pause();
        let kick = Arc::clone(&self.kick);
        let running = kick.enter();
        let exit = self.run_loop(io);
        drop(running);
        self.report_ended_interrupts(io);
        self.left_at = Some(Instant::now());
        exit
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kick) as Arc<dyn Kicker>
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.shared.access.get(&self.fd)
    }

    fn tsc(&mut self) -> Result<u64, EngineError> {
        self.shared.access.tsc(&self.fd)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.shared.access.set(&self.fd, state)
    }

    fn counters(&self) -> Counters {
        Counters {
            instructions: None,
            assists: self.assists,
            loans: 0,
            io_accesses: self.io_accesses,
            code_invalidations: 0,
        }
    }
}
