//! Lending user code to the host's processor ([`harrier_engine::user_mode`]): when, with what, and until when.
//!
//! A loan costs some tens of microseconds, in which the software processor executes thousands of instructions.
//! So code is lent after it has stayed in user mode for a whole slice, and at once while loans turn out long;
//! where they turn out short, the next tries come ever later.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::cpu_state::MpState;
use harrier_engine::user_mode::{UserAccess, UserExit, UserMemory, UserPage, UserProcessor, UserRegisters};

use crate::cpu::{Cpu, DS, ES, FS, GS, SS, cr4, rflags};
use crate::decode::block::note_code;
use crate::mmu::{Intent, PAGE, Rights};

/// A loan that lasted this long was worth it.
const LONG: Duration = Duration::from_micros(150);
/// Short loans in a row after which code is lent only once a slice again.
const SHORT_IN_A_ROW: u32 = 3;
/// Most slices between two tries.
const LONGEST_REST: u32 = 64;
/// Longest loan: the run loop shall look around now and then.
const LIMIT: Duration = Duration::from_millis(100);

/// Most pages with CPUID that are remembered; a guest could have them all over its memory.
const MOST_CPUID_PAGES: usize = 4096;

/// Pages that user mode on the processor may write, and whether it has to forget what it knows.
#[derive(Debug, Default)]
pub(crate) struct LentPages {
    writable: HashSet<u64>,
    stale: bool,
    /// Pages of which CPUID was executed, and which were not written since.
    cpuid: HashSet<u64>,
}

impl LentPages {
    /// User mode has to forget its translations before the next loan.
    pub(crate) fn forget(&mut self) {
        self.stale = true;
    }

    /// User mode forgets its translations now.
    fn forgotten(&mut self) {
        self.writable.clear();
        self.stale = false;
    }

    /// A page that held code was written.
    pub(crate) fn written(&mut self, page: u64) {
        self.cpuid.remove(&page);
    }

    /// The page at this guest physical address is no longer to be written unseen; true if it could be.
    pub(crate) fn protect(&mut self, gpa: u64) -> bool {
        let could = self.writable.contains(&(gpa & !(PAGE - 1)));
        self.stale |= could;
        could
    }
}

/// The borrower of one vCPU, and its history.
pub(crate) struct Lending {
    processor: Box<dyn UserProcessor>,
    registers: UserRegisters,
    /// Generation of the translations that the borrower has.
    generation: u64,
    /// Loans are long at present: lend whenever user mode begins.
    hot: bool,
    short_in_a_row: u32,
    /// Slices to sit out, now and after the next short loan.
    rest: u32,
    next_rest: u32,
    /// The next instruction is software's.
    refused: bool,
    loans: u64,
}

impl Lending {
    pub(crate) fn new(processor: Box<dyn UserProcessor>) -> Lending {
        Lending {
            processor,
            registers: UserRegisters::default(),
            generation: 0,
            hot: false,
            short_in_a_row: 0,
            rest: 0,
            next_rest: 1,
            refused: false,
            loans: 0,
        }
    }

    /// Times that code was lent.
    pub(crate) fn loans(&self) -> u64 {
        self.loans
    }

    /// Whether to lend now. `slice_over`: the last slice of instructions has ended.
    pub(crate) fn wants(&mut self, cpu: &Cpu, slice_over: bool) -> bool {
        if std::mem::take(&mut self.refused) || !can_be_lent(cpu) {
            return false;
        }
        if self.hot {
            return true;
        }
        if slice_over && self.rest > 0 {
            self.rest -= 1;
            return false;
        }
        slice_over
    }

    /// Lends the processor's user mode until something else is to be done. An error ends lending for good.
    pub(crate) fn lend(&mut self, cpu: &mut Cpu) -> Result<(), String> {
        if cpu.lent.stale || self.generation != cpu.mmu.generation() {
            self.processor.forget_translations();
            cpu.lent.forgotten();
            self.generation = cpu.mmu.generation();
        }
        self.take_from(cpu);
        let now_ns = cpu.shared.clock.host_ns();
        let left = cpu.next_deadline_ns().map(|at| Duration::from_nanos(at.saturating_sub(now_ns)));
        let limit = left.unwrap_or(LIMIT).min(LIMIT);
        self.loans += 1;
        let begin = Instant::now();
        let exit = self.processor.run(&mut self.registers, &mut Lens(cpu), Some(limit));
        self.learn(begin.elapsed(), &exit);
        if let UserExit::Failed(reason) = exit {
            return Err(reason);
        }
        self.give_to(cpu)
    }

    fn learn(&mut self, lasted: Duration, exit: &UserExit) {
        self.refused = *exit == UserExit::Software;
        if lasted >= LONG {
            (self.hot, self.short_in_a_row, self.next_rest) = (true, 0, 1);
        } else if *exit == UserExit::Software {
            self.short_in_a_row += 1;
            if self.short_in_a_row >= SHORT_IN_A_ROW {
                self.hot = false;
                self.rest = self.next_rest;
                self.next_rest = (self.next_rest * 2).min(LONGEST_REST);
            }
        }
    }

    fn take_from(&mut self, cpu: &mut Cpu) {
        let registers = &mut self.registers;
        registers.gpr.copy_from_slice(&cpu.regs[..16]);
        registers.rip = cpu.rip;
        registers.rflags = cpu.rflags() & !rflags::RF;
        let seg = &cpu.seg;
        registers.segments = [seg[ES], seg[crate::cpu::CS], seg[SS], seg[DS], seg[FS], seg[GS]];
        registers.xcr0 = cpu.xcr0;
        registers.xsave = cpu.fpu.to_xsave(cpu.xcr0);
    }

    fn give_to(&mut self, cpu: &mut Cpu) -> Result<(), String> {
        let registers = &self.registers;
        cpu.regs[..16].copy_from_slice(&registers.gpr);
        cpu.rip = registers.rip;
        cpu.set_rflags(registers.rflags);
        cpu.fpu.from_xsave(&registers.xsave, cpu.xcr0).map_err(|bad| bad.0)
    }
}

/// Remembers that the code at this address is CPUID, if it is user mode's.
pub(crate) fn note_cpuid(cpu: &mut Cpu, rip: u64) {
    if cpu.cpl == 3
        && cpu.code64()
        && let Ok(translation) = cpu.mmu.walk(rip, Rights::User, Intent::Fetch)
        && cpu.lent.cpuid.len() < MOST_CPUID_PAGES
    {
        cpu.lent.cpuid.insert(translation.gpa & !(PAGE - 1));
    }
}

/// Plain 64-bit user code, with nothing that has to be watched instruction by instruction.
fn can_be_lent(cpu: &Cpu) -> bool {
    cpu.cpl == 3
        && cpu.code64()
        && cpu.mp_state == MpState::Runnable
        && cpu.rflags & rflags::TF == 0
        && cpu.iopl() < 3
        && cpu.dr7 & 0xff == 0
        && cpu.debug_trap == 0
        && !cpu.sti_shadow
        && !cpu.mov_ss_shadow
        && !cpu.mmu.check_alignment
        && !cpu.alone
        && cpu.fpu.usable.x87
        && cpu.fpu.usable.sse
        && cpu.cr4 & cr4::TSD == 0
        && cpu.tsc_offset == 0
}

/// The guest's page tables as the borrower may see them.
struct Lens<'a>(&'a mut Cpu);

impl UserMemory for Lens<'_> {
    fn translate(&mut self, va: u64, access: UserAccess) -> Option<UserPage> {
        let cpu = &mut *self.0;
        if !cpu.canonical(va) {
            return None;
        }
        let intent = match access {
            UserAccess::Read => Intent::Read,
            UserAccess::Write => Intent::Write,
            UserAccess::Fetch => Intent::Fetch,
        };
        let translation = cpu.mmu.walk(va, Rights::User, intent).ok()?;
        let gpa = translation.gpa & !(PAGE - 1);
        if cpu.lapic.claims(gpa, cpu.msrs.apic_base) {
            return None;
        }
        let map = Arc::clone(&cpu.mmu.map);
        let page = map.page(gpa)?;
        let possible = translation.writable && !page.read_only() && page.code() == 0;
        let writable = match access {
            UserAccess::Write if !possible => return None,
            UserAccess::Write => {
                page.mark_dirty();
                true
            }
            // A page that is in the log already needs no fault to get there.
            UserAccess::Read | UserAccess::Fetch => possible && page.is_dirty(),
        };
        let executable = access == UserAccess::Fetch;
        let writable = writable && !executable;
        if writable {
            cpu.lent.writable.insert(gpa);
        }
        if executable {
            // Whoever writes there has to say so.
            note_code(cpu, gpa, PAGE as usize);
        }
        Some(UserPage { gpa, writable, executable, cpuid: cpu.lent.cpuid.contains(&gpa) })
    }
}

#[cfg(test)]
mod tests {
    use harrier_engine::Kicker;

    use super::*;
    use crate::testing::{flat_vcpu, memory};

    /// Adds 1 to RAX and meets a system call.
    struct Borrower;

    struct Nobody;

    impl Kicker for Nobody {
        fn kick(&self) {}
    }

    impl UserProcessor for Borrower {
        fn run(
            &mut self,
            registers: &mut UserRegisters,
            _memory: &mut dyn UserMemory,
            _limit: Option<Duration>,
        ) -> UserExit {
            registers.gpr[0] += 1;
            registers.xsave[160] = 0x77;
            registers.xsave[512] = 2;
            UserExit::Software
        }
        fn forget_translations(&mut self) {}
        fn kicker(&self) -> Arc<dyn Kicker> {
            Arc::new(Nobody)
        }
    }

    fn lending() -> Lending {
        Lending::new(Box::new(Borrower))
    }

    #[test]
    fn a_loan_takes_the_registers_there_and_back() {
        let mut vcpu = flat_vcpu(memory(0x10_0000, 1 << 20));
        let cpu = vcpu.cpu();
        cpu.regs[0] = 41;
        cpu.rip = 0x10_0000;
        let mut lending = lending();
        lending.lend(cpu).unwrap();
        assert_eq!((cpu.regs[0], cpu.rip, lending.loans()), (42, 0x10_0000, 1));
        assert_eq!(cpu.fpu.xmm(0)[0], 0x77);
    }

    #[test]
    fn kernel_mode_is_never_lent() {
        let mut vcpu = flat_vcpu(memory(0x10_0000, 1 << 20));
        assert!(!lending().wants(vcpu.cpu(), true));
    }

    #[test]
    fn short_loans_are_tried_ever_more_rarely_and_a_long_one_makes_up_for_it() {
        let mut lending = lending();
        for round in 1..=SHORT_IN_A_ROW {
            lending.learn(Duration::from_micros(10), &UserExit::Software);
            assert_eq!(lending.rest > 0, round == SHORT_IN_A_ROW);
        }
        let first = lending.rest;
        lending.learn(Duration::from_micros(10), &UserExit::Software);
        assert_eq!(lending.rest, first * 2);
        for _ in 0..20 {
            lending.learn(Duration::from_micros(10), &UserExit::Software);
        }
        assert_eq!(lending.rest, LONGEST_REST);
        assert!(!lending.hot);
        lending.learn(LONG, &UserExit::Interrupted);
        assert!(lending.hot && !lending.refused);
    }

    #[test]
    fn a_page_that_gets_code_is_taken_from_the_borrower() {
        let mut lent = LentPages::default();
        lent.writable.insert(0x5000);
        assert!(!lent.protect(0x6000) && !lent.stale);
        assert!(lent.protect(0x5123) && lent.stale);
        lent.forgotten();
        assert!(!lent.protect(0x5000) && !lent.stale);
    }
}
