//! Lending user code to the host's processor ([`harrier_engine::user_mode`]): when, with what, and until when.
//!
//! A loan costs some forty microseconds, in which the software processor executes ten thousand instructions.
//! Each page that is new to the borrower costs a fault besides. So code is lent after some slices of instructions have ended
//! in user mode, and at once while loans turn out long; where they turn out short, the next tries come ever later.

mod lens;
mod spaces;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use harrier_engine::cpu_state::MpState;
use harrier_engine::user_mode::{UserCode, UserExit, UserProcessor, UserRegisters};

use crate::cpu::{Cpu, DS, ES, FS, GS, SS, cr4, rflags};
use crate::exception::dr6;
use crate::mmu::{Intent, PAGE, PagingConfig, Rights};
use crate::native::thread_time;
use lens::Lens;
use spaces::{Spaces, Stale};

/// A loan that took this long, without the faults of pages that are new to the borrower, was worth it.
const LONG: Duration = Duration::from_micros(70);
/// What such a fault takes: seven to ten microseconds were measured.
const FAULT: Duration = Duration::from_micros(8);
/// Short loans in a row after which code is lent only once a slice again.
const SHORT_IN_A_ROW: u32 = 3;
/// Slices that end in user mode and are sat out at first: the user code of a boot and of short commands, all of it new to the
/// borrower, is over by then, and a program that runs for long has lost a millisecond or two.
const FIRST_REST: u32 = 8;
/// Most slices between two tries.
const LONGEST_REST: u32 = 64;
/// Longest loan: the run loop shall look around now and then.
const LIMIT: Duration = Duration::from_millis(100);

/// Most pages of code that are remembered; a guest could have them all over its memory.
const MOST_CODE_PAGES: usize = 1 << 16;

/// What user mode on the processor may do with pages of memory, in whichever address space they are.
#[derive(Debug, Default)]
pub(crate) struct LentPages {
    /// Grows whenever less may be done.
    age: u64,
    /// Pages that could be written unseen at some time since they were protected last.
    writable: HashSet<u64>,
    /// Versions of the pages of code that were not written since.
    code: HashMap<u64, u64>,
    last_version: u64,
    /// Pages of which an instruction was executed that user mode must not execute itself, and which were not written since.
    trapped: HashSet<u64>,
}

impl LentPages {
    fn age(&self) -> u64 {
        self.age
    }

    /// What may be written unseen has to be looked at again.
    pub(crate) fn forget(&mut self) {
        self.age += 1;
    }

    /// A page that held code was written.
    pub(crate) fn written(&mut self, page: u64) {
        if self.code.remove(&page).is_some() | self.trapped.remove(&page) {
            self.age += 1;
        }
    }

    /// The page at this guest physical address is no longer to be written unseen; true if it could be.
    pub(crate) fn protect(&mut self, gpa: u64) -> bool {
        let could = self.writable.remove(&(gpa & !(PAGE - 1)));
        self.age += u64::from(could);
        could
    }

    fn lend_writable(&mut self, gpa: u64) {
        self.writable.insert(gpa);
    }

    fn lend_code(&mut self, gpa: u64) -> UserCode {
        if self.code.len() >= MOST_CODE_PAGES {
            self.code.clear();
            self.age += 1;
        }
        let version = *self.code.entry(gpa).or_insert_with(|| {
            self.last_version += 1;
            self.last_version
        });
        UserCode { version, trapped: self.trapped.contains(&gpa) }
    }

    fn has_version(&self, gpa: u64, version: u64) -> bool {
        self.code.get(&gpa) == Some(&version)
    }

    fn trapped(&mut self, gpa: u64) {
        if self.trapped.len() < MOST_CODE_PAGES
            && self.trapped.insert(gpa)
            && self.code.remove(&gpa).is_some()
        {
            self.age += 1;
        }
    }
}

/// The borrower of one vCPU, and its history.
pub(crate) struct Lending {
    processor: Box<dyn UserProcessor>,
    registers: UserRegisters,
    /// What the borrower has.
    spaces: Spaces,
    /// How page tables looked then, but for their root.
    paging: PagingConfig,
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
            spaces: Spaces::default(),
            paging: PagingConfig::default(),
            hot: false,
            short_in_a_row: 0,
            rest: FIRST_REST,
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
        !std::mem::take(&mut self.refused) && can_be_lent(cpu) && self.is_due(slice_over)
    }

    /// Whether code that can be lent should be.
    fn is_due(&mut self, slice_over: bool) -> bool {
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
        let root = self.space(cpu);
        self.take_from(cpu);
        let now_ns = cpu.shared.clock.host_ns();
        let left = cpu.next_deadline_ns().map(|at| Duration::from_nanos(at.saturating_sub(now_ns)));
        let limit = left.unwrap_or(LIMIT).min(LIMIT);
        self.loans += 1;
        let begin = thread_time::now();
        let mut lens = Lens { cpu, spaces: &mut self.spaces, root, faults: 0 };
        let exit = self.processor.run(root, &mut self.registers, &mut lens, Some(limit));
        let faults = lens.faults;
        self.learn(thread_time::now().saturating_sub(begin), faults, &exit);
        if let UserExit::Failed(reason) = exit {
            return Err(reason);
        }
        self.give_to(cpu)?;
        if exit == UserExit::Stepped {
            cpu.debug_trap |= dr6::BS;
        }
        Ok(())
    }

    /// The address space that is lent now, without what does not hold any longer.
    fn space(&mut self, cpu: &mut Cpu) -> u64 {
        let root = cpu.mmu.config.cr3 & !(PAGE - 1);
        let paging = PagingConfig { cr3: 0, ..cpu.mmu.config };
        if paging != self.paging {
            self.paging = paging;
            self.spaces.clear();
            self.processor.forget_translations();
        }
        if let Some(other) = self.spaces.make_room(root) {
            self.processor.forget_space(other);
        }
        match self.spaces.compare(root, &mut cpu.mmu, &cpu.lent) {
            Stale::Nothing => {}
            Stale::Pages(vas) => {
                if self.processor.forget_pages(root, &vas) {
                    self.spaces.remove(root);
                    self.spaces.make_room(root);
                }
            }
            Stale::Everything => self.processor.forget_space(root),
        }
        root
    }

    /// What to do the next time, after a loan with so many faults of pages that were new.
    fn learn(&mut self, lasted: Duration, faults: u32, exit: &UserExit) {
        self.refused = *exit == UserExit::Software;
        if lasted.saturating_sub(FAULT * faults) >= LONG {
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

/// Remembers that the code at this address is an instruction that user mode must not execute itself, such as CPUID.
pub(crate) fn note_trapped(cpu: &mut Cpu, rip: u64) {
    if cpu.shared.user_mode.is_some()
        && cpu.cpl == 3
        && cpu.code64()
        && let Ok(translation) = cpu.mmu.walk(rip, Rights::User, Intent::Fetch)
    {
        cpu.lent.trapped(translation.gpa & !(PAGE - 1));
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use harrier_engine::Kicker;
    use harrier_engine::user_mode::UserMemory;

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
            _space: u64,
            registers: &mut UserRegisters,
            _memory: &mut dyn UserMemory,
            _limit: Option<Duration>,
        ) -> UserExit {
            registers.gpr[0] += 1;
            registers.xsave[160] = 0x77;
            registers.xsave[512] = 2;
            UserExit::Software
        }
        fn forget_pages(&mut self, _space: u64, _vas: &[u64]) -> bool {
            false
        }
        fn forget_space(&mut self, _space: u64) {}
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
        lending.rest = 0;
        for round in 1..=SHORT_IN_A_ROW {
            lending.learn(Duration::from_micros(10), 0, &UserExit::Software);
            assert_eq!(lending.rest > 0, round == SHORT_IN_A_ROW);
        }
        let first = lending.rest;
        lending.learn(Duration::from_micros(10), 0, &UserExit::Software);
        assert_eq!(lending.rest, first * 2);
        for _ in 0..20 {
            lending.learn(Duration::from_micros(10), 0, &UserExit::Software);
        }
        assert_eq!(lending.rest, LONGEST_REST);
        assert!(!lending.hot);
        lending.learn(LONG, 0, &UserExit::Interrupted);
        assert!(lending.hot && !lending.refused);
    }

    #[test]
    fn the_first_slices_of_user_code_are_not_lent() {
        let mut lending = lending();
        for _ in 0..FIRST_REST {
            assert!(!lending.is_due(false));
            assert!(!lending.is_due(true));
        }
        assert!(!lending.is_due(false));
        assert!(lending.is_due(true));
    }

    #[test]
    fn a_loan_that_was_long_for_its_faults_alone_was_not_worth_it() {
        let mut lending = lending();
        lending.learn(2 * LONG, 1000, &UserExit::Software);
        assert!(!lending.hot);
        assert_eq!(lending.short_in_a_row, 1);
        lending.learn(2 * LONG, 1, &UserExit::Software);
        assert!(lending.hot);
    }

    #[test]
    fn a_page_that_gets_code_or_whose_code_changes_makes_the_borrower_look_again() {
        let mut lent = LentPages::default();
        lent.lend_writable(0x5000);
        assert!(!lent.protect(0x6000));
        assert_eq!(lent.age(), 0);
        assert!(lent.protect(0x5123));
        assert_eq!(lent.age(), 1);
        assert!(!lent.protect(0x5000));
        let first = lent.lend_code(0x7000);
        assert_eq!(lent.lend_code(0x7000), first);
        assert!(!first.trapped && lent.has_version(0x7000, first.version));
        lent.trapped(0x7000);
        assert_eq!(lent.age(), 2);
        let second = lent.lend_code(0x7000);
        assert!(second.trapped && second.version != first.version);
        lent.written(0x7000);
        assert_eq!(lent.age(), 3);
        assert!(!lent.has_version(0x7000, second.version) && !lent.lend_code(0x7000).trapped);
        lent.written(0x8000);
        assert_eq!(lent.age(), 3);
    }
}
