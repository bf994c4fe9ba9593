//! The local APIC (Intel SDM volume 3, chapter 12): registers by page and by MSR, priorities, the timer.
//!
//! Messages come in through [`crate::interrupt`], which also knows the others' destinations. Time is the
//! clock's host time in nanoseconds; the timer's own clock is [`APIC_BUS_KHZ`], so a count is a nanosecond.

use harrier_engine::cpu_state::LapicState;

use crate::cpu::Cpu;
use crate::decode::op::Stop;
use crate::interrupt::{Destination, Identity, Message, send};
use crate::mmu::PHYSICAL_BITS;
use harrier_engine::cpuid::APIC_BUS_KHZ;

/// Indices of registers: their offset in the page divided by 16, their MSR number minus 0x800.
pub(crate) mod reg {
    pub(crate) const ID: usize = 2;
    pub(crate) const VERSION: usize = 3;
    pub(crate) const TPR: usize = 8;
    pub(crate) const APR: usize = 9;
    pub(crate) const PPR: usize = 0xa;
    pub(crate) const EOI: usize = 0xb;
    pub(crate) const LDR: usize = 0xd;
    pub(crate) const DFR: usize = 0xe;
    pub(crate) const SVR: usize = 0xf;
    pub(crate) const ISR: usize = 0x10;
    pub(crate) const TMR: usize = 0x18;
    pub(crate) const IRR: usize = 0x20;
    pub(crate) const ESR: usize = 0x28;
    pub(crate) const ICR: usize = 0x30;
    pub(crate) const ICR_HIGH: usize = 0x31;
    pub(crate) const LVT_TIMER: usize = 0x32;
    pub(crate) const LVT_THERMAL: usize = 0x33;
    pub(crate) const LVT_PERF: usize = 0x34;
    pub(crate) const LVT_LINT0: usize = 0x35;
    pub(crate) const LVT_LINT1: usize = 0x36;
    pub(crate) const LVT_ERROR: usize = 0x37;
    pub(crate) const TIMER_INITIAL: usize = 0x38;
    pub(crate) const TIMER_CURRENT: usize = 0x39;
    pub(crate) const TIMER_DIVIDE: usize = 0x3e;
    pub(crate) const SELF_IPI: usize = 0x3f;
}

/// Bits of APIC_BASE.
pub(crate) mod base {
    pub(crate) const BOOTSTRAP: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLE: u64 = 1 << 11;
    pub(crate) const MODE: u64 = X2APIC | ENABLE;
}

/// Version 0x14, six local vectors, EOI broadcasts can be suppressed.
const VERSION: u32 = 0x0105_0014;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_NO_BROADCAST: u32 = 1 << 12;
const LVT_MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const TIMER_PERIODIC: u32 = 1 << 17;
const TIMER_DEADLINE: u32 = 2 << 17;
/// Shortest period of the timer: a guest that asks for less gets this, so that it gets on at all.
const MIN_PERIOD_NS: u64 = 20_000;

/// Bits of the error status register.
mod error {
    pub(super) const SEND_VECTOR: u32 = 1 << 5;
    pub(super) const RECEIVE_VECTOR: u32 = 1 << 6;
    pub(super) const REGISTER: u32 = 1 << 7;
}

/// The registers and timer of one local APIC.
pub(crate) struct Lapic {
    /// In the layout of [`LapicState`]; the id as a plain number, the current count when it was last read.
    regs: [u32; 64],
    x2apic: bool,
    /// Errors since ESR was last written.
    errors: u32,
    /// When the timer fires, in host nanoseconds.
    deadline_ns: Option<u64>,
    /// IA32_TSC_DEADLINE; zero when it is not armed.
    tsc_deadline: u64,
    /// The most urgent vector that TPR and ISR let through, or zero.
    deliverable: u8,
}

impl Lapic {
    pub(crate) fn new(index: u32) -> Lapic {
        let mut lapic = Lapic {
            regs: [0; 64],
            x2apic: false,
            errors: 0,
            deadline_ns: None,
            tsc_deadline: 0,
            deliverable: 0,
        };
        lapic.regs[reg::ID] = index;
        lapic.reset();
        lapic
    }

    /// After RESET and INIT: everything but the id (12.4.7).
    pub(crate) fn reset(&mut self) {
        let id = self.regs[reg::ID];
        self.regs = [0; 64];
        self.regs[reg::ID] = id;
        self.regs[reg::VERSION] = VERSION;
        self.regs[reg::SVR] = 0xff;
        for index in reg::LVT_TIMER..=reg::LVT_ERROR {
            self.regs[index] = LVT_MASKED;
        }
        self.set_mode(self.x2apic);
        self.errors = 0;
        self.deadline_ns = None;
        self.tsc_deadline = 0;
        self.deliverable = 0;
    }

    fn set_mode(&mut self, x2apic: bool) {
        self.x2apic = x2apic;
        let id = self.regs[reg::ID];
        (self.regs[reg::LDR], self.regs[reg::DFR]) =
            if x2apic { ((id >> 4) << 16 | 1 << (id & 0xf), 0) } else { (0, u32::MAX) };
    }

    /// Whether the APIC's register page is at this guest physical address (enabled and not in x2APIC mode).
    #[inline]
    pub(crate) fn claims(&self, gpa: u64, apic_base: u64) -> bool {
        gpa & !0xfff == apic_base & ((1 << PHYSICAL_BITS) - 1) & !0xfff
            && apic_base & base::MODE == base::ENABLE
    }

    fn enabled(&self) -> bool {
        self.regs[reg::SVR] & SVR_ENABLE != 0
    }

    // ---- priorities ----

    /// Whether an interrupt waits that only IF or a shadow can hold back.
    #[inline]
    pub(crate) fn ready(&self) -> bool {
        self.deliverable != 0
    }

    /// TPR; CR8 is its upper half.
    pub(crate) fn task_priority(&self) -> u8 {
        self.regs[reg::TPR] as u8
    }

    pub(crate) fn set_task_priority(&mut self, value: u8) {
        self.regs[reg::TPR] = u32::from(value);
        self.prioritise();
    }

    fn highest(&self, first: usize) -> u8 {
        for word in (0..8).rev() {
            let bits = self.regs[first + word];
            if bits != 0 {
                return (word as u32 * 32 + 31 - bits.leading_zeros()) as u8;
            }
        }
        0
    }

    fn processor_priority(&self) -> u8 {
        let (task, service) = (self.task_priority(), self.highest(reg::ISR));
        if task >> 4 >= service >> 4 { task } else { service & 0xf0 }
    }

    fn prioritise(&mut self) {
        let requested = self.highest(reg::IRR);
        let through = self.enabled() && requested >> 4 > self.processor_priority() >> 4;
        self.deliverable = if through { requested } else { 0 };
    }

    fn bit(&mut self, first: usize, vector: u8, on: bool) {
        let word = &mut self.regs[first + usize::from(vector >> 5)];
        let bit = 1 << (vector & 31);
        *word = if on { *word | bit } else { *word & !bit };
    }

    fn is_set(&self, first: usize, vector: u8) -> bool {
        self.regs[first + usize::from(vector >> 5)] & 1 << (vector & 31) != 0
    }

    /// Takes a fixed interrupt from a message or a local source.
    pub(crate) fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.report(error::RECEIVE_VECTOR);
            return;
        }
        if self.enabled() {
            self.bit(reg::IRR, vector, true);
            self.bit(reg::TMR, vector, level);
            self.prioritise();
        }
    }

    /// Hands the most urgent interrupt to the processor.
    pub(crate) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable;
        if vector == 0 {
            return None;
        }
        self.bit(reg::IRR, vector, false);
        self.bit(reg::ISR, vector, true);
        self.prioritise();
        Some(vector)
    }

    /// Ends the interrupt in service; the vector, when the IOAPIC has to hear of it.
    fn end(&mut self) -> Option<u8> {
        let vector = self.highest(reg::ISR);
        if vector == 0 {
            return None;
        }
        self.bit(reg::ISR, vector, false);
        self.prioritise();
        let tell = self.is_set(reg::TMR, vector) && self.regs[reg::SVR] & SVR_NO_BROADCAST == 0;
        tell.then_some(vector)
    }

    /// Notes an error and raises the error interrupt.
    fn report(&mut self, bits: u32) {
        let new = self.errors & bits != bits;
        self.errors |= bits;
        let entry = self.regs[reg::LVT_ERROR];
        // A vector that is illegal itself would report for ever.
        if new && entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.accept(entry as u8, false);
        }
    }

    // ---- timer ----

    fn timer_mode(&self) -> u32 {
        self.regs[reg::LVT_TIMER] & TIMER_MODE
    }

    /// Nanoseconds of one count.
    fn count_ns(&self) -> u64 {
        let code = self.regs[reg::TIMER_DIVIDE];
        let shift = ((code & 3) | (code >> 1 & 4)) + 1 & 7;
        (1_000_000 << shift) / u64::from(APIC_BUS_KHZ)
    }

    /// Nanoseconds from the initial count to zero.
    fn period_ns(&self) -> u64 {
        u64::from(self.regs[reg::TIMER_INITIAL]) * self.count_ns()
    }

    fn start_timer(&mut self, now_ns: u64) {
        self.deadline_ns = (self.timer_mode() != TIMER_DEADLINE && self.regs[reg::TIMER_INITIAL] != 0)
            .then(|| now_ns.saturating_add(self.first_period()));
    }

    fn first_period(&self) -> u64 {
        let period = self.period_ns();
        if self.timer_mode() == TIMER_PERIODIC { period.max(MIN_PERIOD_NS) } else { period }
    }

    fn current_count(&self, now_ns: u64) -> u32 {
        match self.deadline_ns {
            Some(deadline) if self.timer_mode() != TIMER_DEADLINE => {
                let left = deadline.saturating_sub(now_ns).div_ceil(self.count_ns());
                u32::try_from(left).unwrap_or(u32::MAX).min(self.regs[reg::TIMER_INITIAL])
            }
            _ => 0,
        }
    }

    /// Fires the timer if its time has come.
    pub(crate) fn expire(&mut self, now_ns: u64) {
        let Some(deadline) = self.deadline_ns.filter(|&deadline| deadline <= now_ns) else { return };
        self.deadline_ns = None;
        match self.timer_mode() {
            TIMER_PERIODIC => {
                let period = self.period_ns().max(MIN_PERIOD_NS);
                // Periods that were missed are lost, the phase stays.
                let missed = (now_ns - deadline) / period;
                self.deadline_ns = Some(deadline.saturating_add((missed + 1).saturating_mul(period)));
            }
            TIMER_DEADLINE => self.tsc_deadline = 0,
            _ => {}
        }
        let entry = self.regs[reg::LVT_TIMER];
        if entry & LVT_MASKED == 0 {
            self.accept(entry as u8, false);
        }
    }

    // ---- state ----

    /// The registers in canonical form.
    pub(crate) fn save(&self, now_ns: u64) -> LapicState {
        let mut registers = self.regs;
        registers[reg::PPR] = u32::from(self.processor_priority());
        registers[reg::TIMER_CURRENT] = self.current_count(now_ns);
        LapicState { registers }
    }

    /// Takes over registers. APIC_BASE has been restored; the TSC deadline comes after.
    pub(crate) fn restore(&mut self, state: &LapicState, x2apic: bool, now_ns: u64) {
        let id = self.regs[reg::ID];
        self.set_mode(x2apic);
        let (ldr, dfr) = (self.regs[reg::LDR], self.regs[reg::DFR]);
        self.regs = state.registers;
        self.regs[reg::ID] = id;
        self.regs[reg::VERSION] = VERSION;
        self.regs[reg::TPR] &= 0xff;
        if x2apic {
            self.regs[reg::LDR] = ldr;
            self.regs[reg::DFR] = dfr;
        }
        // Vectors below 16 cannot be in service or requested.
        for first in [reg::ISR, reg::IRR, reg::TMR] {
            self.regs[first] &= 0xffff_0000;
        }
        self.errors = 0;
        self.tsc_deadline = 0;
        self.deadline_ns = None;
        let left = self.regs[reg::TIMER_CURRENT];
        if left != 0 && self.timer_mode() != TIMER_DEADLINE && self.regs[reg::TIMER_INITIAL] != 0 {
            self.deadline_ns = Some(now_ns.saturating_add(u64::from(left) * self.count_ns()));
        } else if self.timer_mode() == TIMER_PERIODIC {
            self.start_timer(now_ns);
        }
        self.regs[reg::TIMER_CURRENT] = 0;
        self.prioritise();
    }
}

impl Cpu {
    /// Tells the others what this APIC answers to.
    pub(crate) fn publish_apic(&self) {
        self.shared.destinations.set(
            self.index,
            Identity {
                logical: self.lapic.regs[reg::LDR],
                present: self.msrs.apic_base & base::ENABLE != 0,
                enabled: self.lapic.enabled(),
                x2apic: self.lapic.x2apic,
                cluster: self.lapic.regs[reg::DFR] >> 28 == 0 && !self.lapic.x2apic,
            },
        );
    }

    /// WRMSR to IA32_APIC_BASE (12.4.4, 12.12.1).
    pub(crate) fn write_apic_base(&mut self, value: u64) -> Result<(), Stop> {
        let reserved = !(((1 << PHYSICAL_BITS) - 1) & !0xfff | base::BOOTSTRAP | base::MODE);
        let (old_mode, mode) = (self.msrs.apic_base & base::MODE, value & base::MODE);
        let possible = match mode {
            base::X2APIC => false,
            // Into x2APIC mode only from xAPIC mode, out of it only by switching off.
            base::MODE => old_mode != 0,
            base::ENABLE => old_mode != base::MODE,
            _ => true,
        };
        if value & reserved != 0 || !possible {
            return self.raise_gp();
        }
        self.msrs.apic_base = value;
        if mode != old_mode {
            if mode == 0 {
                self.lapic.x2apic = false;
                self.lapic.reset();
            }
            self.lapic.set_mode(mode == base::MODE);
        }
        self.mmu.flush();
        self.publish_apic();
        self.update_attention();
        Ok(())
    }

    // ---- access by page ----

    pub(crate) fn lapic_mmio_read(&mut self, offset: u16) -> u32 {
        // Only the first four of each sixteen bytes are the register.
        if offset & 0xc != 0 {
            return 0;
        }
        let index = usize::from(offset >> 4);
        match index {
            reg::ID => self.lapic.regs[reg::ID] << 24,
            _ if readable(index) => self.read_apic(index),
            _ => {
                self.lapic.report(error::REGISTER);
                self.update_attention();
                0
            }
        }
    }

    pub(crate) fn lapic_mmio_write(&mut self, offset: u16, value: u32) {
        if offset & 0xf != 0 {
            return;
        }
        let index = usize::from(offset >> 4);
        match index {
            reg::ICR => {
                let number = self.lapic.regs[reg::ICR_HIGH] >> 24;
                self.lapic.regs[reg::ICR] = value & !(1 << 12);
                self.send_ipi(value, number, 0xff);
            }
            reg::ICR_HIGH => self.lapic.regs[index] = value & 0xff00_0000,
            reg::LDR => {
                self.lapic.regs[index] = value & 0xff00_0000;
                self.publish_apic();
            }
            reg::DFR => {
                self.lapic.regs[index] = value | 0x0fff_ffff;
                self.publish_apic();
            }
            // The id is fixed; these only read.
            reg::ID | reg::VERSION | reg::APR | reg::PPR | reg::TIMER_CURRENT => {}
            reg::ISR..=0x27 => {}
            _ if writable(index) => self.write_apic(index, value),
            _ => {
                self.lapic.report(error::REGISTER);
                self.update_attention();
            }
        }
    }

    // ---- access by MSR ----

    /// RDMSR of 0x800 to 0x8ff.
    pub(crate) fn read_x2apic(&mut self, index: u32) -> Result<u64, Stop> {
        let index = index as usize;
        if !self.lapic.x2apic {
            return self.raise_gp();
        }
        match index {
            reg::ICR => {
                let high = u64::from(self.lapic.regs[reg::ICR_HIGH]);
                Ok(high << 32 | u64::from(self.lapic.regs[reg::ICR]))
            }
            reg::DFR | reg::APR | reg::ICR_HIGH | reg::EOI => self.raise_gp(),
            _ if readable(index) => Ok(u64::from(self.read_apic(index))),
            _ => self.raise_gp(),
        }
    }

    /// WRMSR to 0x800 to 0x8ff.
    pub(crate) fn write_x2apic(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        let index = index as usize;
        if !self.lapic.x2apic {
            return self.raise_gp();
        }
        if index == reg::ICR {
            if value & 0xfff3_2000 != 0 {
                return self.raise_gp();
            }
            let number = (value >> 32) as u32;
            self.lapic.regs[reg::ICR] = value as u32 & !(1 << 12);
            self.lapic.regs[reg::ICR_HIGH] = number;
            self.send_ipi(value as u32, number, u32::MAX);
            return Ok(());
        }
        let allowed: u64 = match index {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x13ff,
            reg::LVT_TIMER => 0x7_10ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_f7ff,
            reg::LVT_THERMAL | reg::LVT_PERF => 0x1_17ff,
            reg::LVT_ERROR => 0x1_10ff,
            reg::TIMER_INITIAL => 0xffff_ffff,
            reg::TIMER_DIVIDE => 0xb,
            _ => return self.raise_gp(),
        };
        if value & !allowed != 0 {
            return self.raise_gp();
        }
        if index == reg::SELF_IPI {
            self.self_interrupt(value as u8);
        } else {
            self.write_apic(index, value as u32);
        }
        Ok(())
    }

    // ---- registers of both kinds of access ----

    fn read_apic(&mut self, index: usize) -> u32 {
        match index {
            reg::PPR => u32::from(self.lapic.processor_priority()),
            reg::TIMER_CURRENT => {
                let now = self.shared.clock.host_ns();
                self.lapic.current_count(now)
            }
            reg::EOI => 0,
            _ => self.lapic.regs.get(index).copied().unwrap_or(0),
        }
    }

    fn write_apic(&mut self, index: usize, value: u32) {
        match index {
            reg::TPR => self.lapic.set_task_priority(value as u8),
            reg::EOI => {
                if let Some(vector) = self.lapic.end() {
                    self.io_accesses += 1;
                    let flow = self.io.with(|io| io.eoi(vector));
                    self.follow(flow);
                }
            }
            reg::SVR => {
                self.lapic.regs[index] = value & 0x13ff;
                if value & SVR_ENABLE == 0 {
                    for entry in reg::LVT_TIMER..=reg::LVT_ERROR {
                        self.lapic.regs[entry] |= LVT_MASKED;
                    }
                }
                self.lapic.prioritise();
                self.publish_apic();
            }
            reg::ESR => self.lapic.regs[index] = std::mem::take(&mut self.lapic.errors),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_local_vector(index, value),
            // In deadline mode the initial count cannot be written.
            reg::TIMER_INITIAL if self.lapic.timer_mode() == TIMER_DEADLINE => {}
            reg::TIMER_INITIAL => {
                self.lapic.regs[index] = value;
                let now = self.shared.clock.host_ns();
                self.lapic.start_timer(now);
            }
            reg::TIMER_DIVIDE => {
                let now = self.shared.clock.host_ns();
                let left = self.lapic.current_count(now);
                self.lapic.regs[index] = value & 0xb;
                if self.lapic.deadline_ns.is_some() && self.lapic.timer_mode() != TIMER_DEADLINE {
                    self.lapic.deadline_ns =
                        Some(now.saturating_add(u64::from(left) * self.lapic.count_ns()));
                }
            }
            _ => {}
        }
        self.update_attention();
    }

    fn write_local_vector(&mut self, index: usize, value: u32) {
        let allowed = match index {
            reg::LVT_TIMER => 0x7_00ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff,
            reg::LVT_ERROR => 0x1_00ff,
            _ => 0x1_07ff,
        };
        let mut new = value & allowed;
        if !self.lapic.enabled() {
            new |= LVT_MASKED;
        }
        let old = std::mem::replace(&mut self.lapic.regs[index], new);
        if index == reg::LVT_TIMER && (old ^ new) & TIMER_MODE != 0 {
            let involves_deadline = [old, new].iter().any(|entry| entry & TIMER_MODE == TIMER_DEADLINE);
            if involves_deadline {
                self.lapic.deadline_ns = None;
                self.lapic.tsc_deadline = 0;
                self.lapic.regs[reg::TIMER_INITIAL] = 0;
            }
        }
    }

    // ---- messages ----

    fn self_interrupt(&mut self, vector: u8) {
        if vector < 16 {
            self.lapic.report(error::SEND_VECTOR);
        }
        self.lapic.accept(vector, false);
        self.update_attention();
    }

    /// Sends what an ICR says (12.6.1).
    fn send_ipi(&mut self, icr: u32, number: u32, all: u32) {
        const INIT: u32 = 5;
        let message = Message { level: false, ..Message::of(icr) };
        if message.mode == INIT && icr & (1 << 15 | 1 << 14) == 1 << 15 {
            // INIT level de-assert does nothing since the Pentium 4.
            return;
        }
        if message.mode <= 1 && message.vector < 16 {
            self.lapic.report(error::SEND_VECTOR);
            self.update_attention();
        }
        let own = self.index;
        match icr >> 18 & 3 {
            0 => {
                let destination = Destination::of(icr & 1 << 11 != 0, number, all);
                if destination == Destination::Physical(own) && message.mode == 0 {
                    // To itself without the mailbox: it is pending before the next instruction.
                    self.lapic.accept(message.vector, false);
                    self.update_attention();
                } else {
                    send(&self.shared, destination, message, None);
                }
            }
            1 => self.self_interrupt(message.vector),
            2 => send(&self.shared, Destination::Broadcast, message, None),
            _ => send(&self.shared, Destination::Broadcast, message, Some(own)),
        }
    }

    // ---- time ----

    /// The time-stamp counter now.
    pub(crate) fn tsc(&self) -> u64 {
        let clock = &self.shared.clock;
        clock.ticks_at(clock.host_ns()).wrapping_add(self.tsc_offset)
    }

    /// IA32_TSC_DEADLINE: what is armed, or zero.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.lapic.tsc_deadline
    }

    /// The deadline as a snapshot keeps it: as far from the TSC as the timer is from firing, even where the TSC ran on
    /// while guest time stood still.
    pub(crate) fn saved_tsc_deadline(&self, now_ns: u64) -> u64 {
        let clock = &self.shared.clock;
        match self.lapic.deadline_ns {
            Some(at) if clock.is_native() && self.lapic.tsc_deadline != 0 => {
                let left = u128::from(at.saturating_sub(now_ns)) * u128::from(clock.tsc_khz()) / 1_000_000;
                clock.ticks_at(now_ns).saturating_add(left as u64)
            }
            _ => self.lapic.tsc_deadline,
        }
    }

    /// Arms or stops the timer in TSC-deadline mode; ignored in the others (12.5.4.1).
    pub(crate) fn set_tsc_deadline(&mut self, value: u64) {
        if self.lapic.timer_mode() != TIMER_DEADLINE {
            return;
        }
        self.lapic.tsc_deadline = value;
        self.rearm_tsc_deadline();
    }

    /// Works out the deadline's host time again: the TSC was moved, or the deadline is new.
    pub(crate) fn rearm_tsc_deadline(&mut self) {
        if self.lapic.timer_mode() != TIMER_DEADLINE {
            return;
        }
        let wanted = self.lapic.tsc_deadline;
        self.lapic.deadline_ns = (wanted != 0).then(|| {
            let clock = &self.shared.clock;
            let now_ns = clock.host_ns();
            let now = clock.ticks_at(now_ns).wrapping_add(self.tsc_offset);
            now_ns.saturating_add(clock.ticks_to_ns(wanted.saturating_sub(now)))
        });
        // A deadline that is over fires before the next instruction.
        self.attention = true;
    }

    /// Fires the timer if its time has come, and keeps the clock page true.
    pub(crate) fn expire_timers(&mut self) {
        if self.clock_seen != self.shared.clock.generation() {
            self.write_clock_page();
        }
        if self.lapic.deadline_ns.is_some() {
            let now = self.shared.clock.host_ns();
            self.lapic.expire(now);
        }
    }

    /// When the timer fires next, in the clock's host nanoseconds.
    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        self.lapic.deadline_ns
    }
}

fn readable(index: usize) -> bool {
    matches!(
        index,
        reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::APR
            | reg::PPR
            | reg::EOI
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | reg::ISR..=reg::ESR
            | reg::ICR..=reg::TIMER_CURRENT
            | reg::TIMER_DIVIDE
    ) && index != 0x2f
}

fn writable(index: usize) -> bool {
    matches!(
        index,
        reg::TPR | reg::EOI | reg::SVR | reg::ESR | reg::LVT_TIMER
            ..=reg::LVT_ERROR | reg::TIMER_INITIAL | reg::TIMER_DIVIDE
    )
}
