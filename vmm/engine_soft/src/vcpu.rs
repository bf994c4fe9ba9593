//! The dispatcher: finds blocks, runs them, and looks after everything else between them.

use std::sync::Arc;
use std::time::Duration;

use harrier_engine::cpu_state::MpState;
use harrier_engine::user_mode::UserProcessor;
use harrier_engine::{Counters, CpuState, EngineError, Exit, Io, Kicker, Vcpu};

use crate::cpu::Cpu;
use crate::decode::block::CodeCache;
use crate::decode::op::{REG_BLOCK, Stop};
use crate::lend::Lending;
use crate::vm::{Mailbox, Shared};

/// Instructions between two looks at the clock, for timers; some tenths of a millisecond.
const SLICE: i64 = 20_000;

/// A vCPU that has slept for so long gives its decoded code back: what wakes it needs little of it, and there may be many
/// machines that sleep.
const IDLE: Duration = Duration::from_millis(400);

/// A software vCPU.
pub(crate) struct SoftVcpu {
    cpu: Cpu,
    code: CodeCache,
    mailbox: Arc<Mailbox>,
    /// Instructions retired up to the last refill of the budget.
    retired: u64,
    kicked: bool,
    /// Who runs user code at times.
    lending: Option<Lending>,
}

struct SoftKicker(Arc<Mailbox>);

impl Kicker for SoftKicker {
    fn kick(&self) {
        self.0.post(|mail| mail.kicked = true);
    }
}

impl SoftVcpu {
    pub(crate) fn new(shared: Arc<Shared>, index: u32) -> SoftVcpu {
        let mailbox = Arc::clone(&shared.mailboxes[index as usize]);
        SoftVcpu {
            cpu: Cpu::new(shared, index),
            code: CodeCache::new(),
            mailbox,
            retired: 0,
            kicked: false,
            lending: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    #[cfg(test)]
    pub(crate) fn parts(&mut self) -> (&mut Cpu, &mut CodeCache) {
        (&mut self.cpu, &mut self.code)
    }

    /// A vCPU that executes single instructions, each in a state of its own.
    pub(crate) fn for_single_instructions(mut self) -> SoftVcpu {
        self.code.one_by_one();
        self
    }

    /// Lends user code to `processor` from now on.
    pub(crate) fn lend_to(&mut self, processor: Box<dyn UserProcessor>) {
        self.mailbox.set_borrower(processor.kicker());
        self.lending = Some(Lending::new(processor));
    }

    fn run_loop(&mut self) -> Exit {
        self.cpu.attention = true;
        loop {
            if self.cpu.attention || self.cpu.budget <= 0 || self.mailbox.has_mail() {
                if let Some(exit) = self.attend() {
                    return exit;
                }
                if self.cpu.alone {
                    self.step(true);
                    continue;
                }
            }
            self.step(false);
        }
    }

    /// Executes one instruction and delivers its fault, if it has one. Some(exit): it could not, or has to leave.
    pub(crate) fn run_one(&mut self, io: &mut dyn Io) -> Option<Exit> {
        self.lend_io(io, |vcpu| {
            vcpu.cpu.alone = true;
            vcpu.cpu.attention = true;
            if let Some(exit) = vcpu.attend() {
                return Some(exit);
            }
            vcpu.step(true);
            let cpu = &vcpu.cpu;
            (cpu.unsupported.is_some() || cpu.triple_fault || cpu.leave).then(|| vcpu.leave())
        })
    }

    /// Gives handlers the devices while `run` runs.
    fn lend_io<T>(&mut self, io: &mut dyn Io, run: impl FnOnce(&mut SoftVcpu) -> T) -> T {
        struct Loan<'a>(&'a mut SoftVcpu);
        impl Drop for Loan<'_> {
            fn drop(&mut self) {
                self.0.cpu.io.leave();
                self.0.cpu.fpu.settle();
            }
        }
        self.cpu.io.enter(io);
        let loan = Loan(self);
        let result = run(loan.0);
        // While nobody runs, every later write has to pass the log again.
        loan.0.cpu.mmu.forget_writable();
        loan.0.cpu.lent.forget();
        result
    }

    /// Runs one block, or one instruction when `single`.
    #[inline(always)]
    fn step(&mut self, single: bool) {
        let cpu = &mut self.cpu;
        let (block, ops) = match self.code.find(cpu) {
            Ok(found) => found,
            Err(_) => {
                cpu.alone = false;
                cpu.attention = true;
                if cpu.unsupported.is_none() {
                    cpu.take_fault();
                }
                return;
            }
        };
        let start = cpu.rip;
        cpu.regs[REG_BLOCK as usize] = start;
        cpu.mmu.running = block.pages;
        let ops = if single { &ops[..1] } else { ops };
        let mut rest = ops.iter();
        let stopped = loop {
            let Some(op) = rest.next() else { break None };
            if let Err(stop) = (op.exec)(cpu, op) {
                break Some((stop, op));
            }
        };
        cpu.budget -= (ops.len() - rest.len()) as i64;
        match stopped {
            None => {
                let len = if single { u64::from(ops[0].len) } else { u64::from(block.len) };
                cpu.rip = start.wrapping_add(len) & cpu.rip_mask;
            }
            Some((Stop::Block, _)) => {}
            Some((Stop::Fault, op)) => {
                cpu.budget += 1;
                cpu.fault_at(op);
            }
            Some((Stop::Alone, op)) => {
                cpu.budget += 1;
                cpu.rip = start.wrapping_add(u64::from(op.pc)) & cpu.rip_mask;
                cpu.alone = true;
                cpu.attention = true;
                return;
            }
        }
        if single {
            cpu.after_single();
        }
    }

    /// Everything between blocks: mail, timers, interrupts, traps. Some(exit) leaves run.
    #[cold]
    #[inline(never)]
    fn attend(&mut self) -> Option<Exit> {
        let mut slice_over = false;
        loop {
            self.cpu.attention = false;
            if self.cpu.budget <= 0 {
                slice_over = true;
                self.retired = self.retired.wrapping_add_signed(SLICE - self.cpu.budget);
                self.cpu.budget = SLICE;
            }
            if self.mailbox.has_mail() {
                self.read_mail();
            }
            let cpu = &mut self.cpu;
            if cpu.unsupported.is_some() || cpu.triple_fault || cpu.leave || self.kicked {
                return Some(self.leave());
            }
            cpu.expire_timers();
            if cpu.alone && cpu.mp_state == MpState::Runnable {
                // An instruction that writes its own page runs by itself, before anything else happens.
                return None;
            }
            if cpu.deliver_pending() {
                // An interrupt or trap was delivered: look again, something else may be due.
                continue;
            }
            if cpu.mp_state == MpState::Runnable {
                if self.lend(slice_over) {
                    slice_over = false;
                    continue;
                }
                return None;
            }
            let deadline = cpu.next_deadline_ns();
            let timeout =
                deadline.map(|at| Duration::from_nanos(at.saturating_sub(cpu.shared.clock.host_ns())));
            if self.code.is_large() && timeout.is_none_or(|timeout| timeout > IDLE) {
                self.mailbox.wait(Some(IDLE));
                if !self.mailbox.has_mail() {
                    self.code.release();
                    self.cpu.mmu.code_generation += 1;
                    if let Some(on_idle) = self.cpu.shared.on_idle.get() {
                        on_idle();
                    }
                }
            } else {
                self.mailbox.wait(timeout);
            }
        }
    }

    /// Lends user code if that is worth it; true if anything may have changed.
    #[inline]
    fn lend(&mut self, slice_over: bool) -> bool {
        let Some(lending) = &mut self.lending else { return false };
        if self.cpu.cpl != 3 || !lending.wants(&self.cpu, slice_over) {
            return false;
        }
        let mut done = Ok(());
        let cpu = &mut self.cpu;
        self.mailbox.while_lent(|| done = lending.lend(cpu));
        if let Err(reason) = done {
            log::warn!("vcpu {}: user code stays in software from now on: {reason}", self.cpu.index);
            self.lending = None;
        }
        true
    }

    fn leave(&mut self) -> Exit {
        let cpu = &mut self.cpu;
        cpu.attention = true;
        if let Some(reason) = cpu.unsupported.take() {
            let mut bytes = vec![0; 15];
            let va = cpu.rip.wrapping_add(cpu.seg_base[crate::cpu::CS]);
            if cpu.read_system(va, &mut bytes).is_err() {
                bytes.clear();
            }
            return Exit::Unsupported { rip: cpu.rip, bytes, reason };
        }
        if cpu.triple_fault {
            return Exit::TripleFault;
        }
        if std::mem::take(&mut cpu.leave) {
            return Exit::Left;
        }
        self.kicked = false;
        Exit::Kicked
    }

    fn read_mail(&mut self) {
        let mail = self.mailbox.take();
        let cpu = &mut self.cpu;
        self.kicked |= mail.kicked;
        if mail.new_map {
            cpu.mmu.forget_writable();
            cpu.mmu.map = cpu.shared.map();
            cpu.mmu.flush();
            self.code.clear();
        }
        for page in mail.new_code {
            let host = cpu.mmu.map.page(page).map(|page| page.host());
            let lent = cpu.lent.protect(page);
            if host.is_some_and(|host| cpu.mmu.tlb.protect_host_page(host)) || lent {
                // This vCPU could write there until now: whoever decoded the page must look again.
                cpu.shared.code_written(page, u64::MAX);
            }
        }
        if !mail.written_code.is_empty() {
            for (page, chunks) in mail.written_code {
                cpu.lent.written(page);
                self.code.invalidate(page, chunks);
            }
            cpu.mmu.code_generation += 1;
        }
        if mail.log_writes {
            cpu.mmu.forget_writable();
            cpu.lent.forget();
        }
        cpu.accept_mail(mail.interrupts);
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &mut dyn Io) -> Exit {
        self.lend_io(io, SoftVcpu::run_loop)
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(SoftKicker(Arc::clone(&self.mailbox)))
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.read_mail();
        Ok(self.cpu.save())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.read_mail();
        self.code.clear();
        self.cpu.mmu.flush();
        self.cpu.restore(state)
    }

    fn counters(&self) -> Counters {
        Counters {
            // Nobody counts what lent code executes.
            instructions: self
                .lending
                .is_none()
                .then(|| self.retired.wrapping_add_signed(SLICE - self.cpu.budget)),
            assists: 0,
            loans: self.lending.as_ref().map_or(0, Lending::loans),
            io_accesses: self.cpu.io_accesses,
            code_invalidations: self.code.invalidations,
        }
    }
}
