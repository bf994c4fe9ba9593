//! Delivery of exceptions and interrupts (Intel SDM volume 3, chapter 6), and what happens between two
//! instructions: traps, NMI, external interrupts, single steps.
//!
//! Nothing of a delivery is visible before all of it is known to succeed, except accessed bits of descriptors.
//! The local APIC decides which external interrupt comes ([`crate::lapic`]).

use harrier_engine::cpu_state::MpState;

use crate::cpu::{CS, Cpu, DS, ES, FS, GS, RSP, SS, rflags};
use crate::decode::op::{Op, SEG_FLAT_STACK, Stop};
use crate::descriptor::{Descriptor, Frame, is_null, system, unusable};
use crate::fault::{Fault, has_error_code, vector};
use crate::mmu::Intent;
use crate::task::Cause;

/// Bits of DR6.
pub(crate) mod dr6 {
    /// Access to a debug register while DR7.GD was set.
    pub(crate) const BD: u64 = 1 << 13;
    /// Single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// Switch to a task whose T bit is set.
    pub(crate) const BT: u64 = 1 << 15;
    /// Bits that always read as one.
    pub(crate) const FIXED: u64 = 0xffff_0ff0;
    /// Bits that software can set.
    pub(crate) const WRITABLE: u64 = 0xe00f;
}

/// DR7.GD: accesses to debug registers raise #DB.
pub(crate) const DR7_GD: u64 = 1 << 13;

/// Where an event comes from; decides about privilege checks and the EXT bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// An exception of the processor, INT1 included.
    Exception,
    /// An external interrupt or NMI.
    External,
    /// INT n, INT3, INTO: the gate's privilege counts.
    Software,
}

/// Something that goes through the interrupt table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub vector: u8,
    pub source: Source,
    /// Error code to push.
    pub error: Option<u32>,
    /// RF is set in the flags that are pushed: the event is a fault.
    pub resume: bool,
}

impl Event {
    /// Bit 0 of error codes of faults during the delivery.
    fn ext(self) -> u32 {
        u32::from(self.source != Source::Software)
    }

    fn from_fault(fault: &Fault) -> Event {
        Event {
            vector: fault.vector,
            source: Source::Exception,
            error: has_error_code(fault.vector).then_some(fault.error),
            resume: !fault.trap && !matches!(fault.vector, vector::DB | vector::DF),
        }
    }
}

/// Classes of exceptions for double faults (Intel SDM volume 3, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    Page,
    Double,
}

fn class(event: &Event) -> Class {
    if event.source != Source::Exception {
        return Class::Benign;
    }
    match event.vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::Page,
        vector::DF => Class::Double,
        _ => Class::Benign,
    }
}

impl Cpu {
    /// Delivers the fault that `op` raised.
    pub(crate) fn fault_at(&mut self, op: &Op) {
        self.rip = if self.fault.trap { self.next_rip(op) } else { self.op_rip(op) };
        if self.fault.non_canonical
            && matches!(usize::from(op.seg), s if s == SS || s == SEG_FLAT_STACK as usize)
        {
            self.fault.vector = vector::SS;
        }
        self.take_fault();
    }

    /// Delivers the fault in `self.fault`; RIP is what the handler shall return to.
    pub(crate) fn take_fault(&mut self) {
        self.step_trap = false;
        self.debug_trap = 0;
        if self.unsupported.is_some() {
            // The engine gives up on this instruction: the state stays as it was before it.
            self.attention = true;
            return;
        }
        let fault = self.fault;
        self.note_fault(&fault);
        self.deliver_event(Event::from_fault(&fault));
    }

    /// What a fault leaves in control and debug registers when it is recognised.
    fn note_fault(&mut self, fault: &Fault) {
        match fault.vector {
            vector::PF => self.cr2 = fault.address,
            vector::DB => {
                self.dr6 = (self.dr6 & !0xf) | fault.address | dr6::FIXED;
                self.dr7 &= !DR7_GD;
            }
            _ => {}
        }
    }

    /// Delivers an event, and what goes wrong on the way.
    pub(crate) fn deliver_event(&mut self, first: Event) {
        let mut event = first;
        event.resume |= std::mem::take(&mut self.unfinished);
        while self.deliver(event).is_err() {
            if self.unsupported.is_some() {
                self.attention = true;
                return;
            }
            let fault = self.fault;
            self.note_fault(&fault);
            let mut second = Event::from_fault(&fault);
            match (class(&event), class(&second)) {
                (Class::Double, Class::Contributory | Class::Page) => {
                    log::debug!("vcpu {}: triple fault at {:#x}", self.index, self.rip);
                    self.triple_fault = true;
                    self.attention = true;
                    return;
                }
                (Class::Contributory, Class::Contributory)
                | (Class::Page, Class::Contributory | Class::Page) => {
                    second = Event { vector: vector::DF, error: Some(0), resume: false, ..second };
                }
                _ => {}
            }
            event = second;
        }
    }

    /// Delivers one event through the interrupt table. On an error nothing has changed but `self.fault`.
    pub(crate) fn deliver(&mut self, event: Event) -> Result<(), Stop> {
        // The frame may hit the page of the code that ran: nothing of that code runs on.
        let alone = std::mem::replace(&mut self.alone, true);
        let done = if self.real_mode() { self.deliver_real(event) } else { self.deliver_protected(event) };
        self.alone = alone;
        if done.is_ok() {
            self.step_trap = false;
            self.sti_shadow = false;
            self.mov_ss_shadow = false;
            self.mp_state = MpState::Runnable;
            self.update_attention();
        }
        done
    }

    /// Through the vector table of real-address mode (20.1.4).
    fn deliver_real(&mut self, event: Event) -> Result<(), Stop> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return self.raise_with(vector::GP, u32::from(event.vector) * 8 | 2 | event.ext());
        }
        let target = self.load_system::<u32>(self.table_address(self.idtr.base, offset))?;
        let flags = self.rflags();
        let mut frame = Frame::current(self);
        for value in [flags, u64::from(self.seg[CS].selector), self.rip] {
            frame.push(self, value, 2)?;
        }
        frame.commit(self)?;
        self.set_stack_pointer(frame.sp);
        self.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let selector = (target >> 16) as u16;
        self.seg[CS].selector = selector;
        self.seg[CS].base = u64::from(selector) << 4;
        self.rip = u64::from(target & 0xffff);
        self.mode_changed();
        Ok(())
    }

    /// Through the interrupt descriptor table, in protected and long mode (6.10 to 6.14).
    fn deliver_protected(&mut self, event: Event) -> Result<(), Stop> {
        let (long, ext) = (self.long_mode(), event.ext());
        let index = u32::from(event.vector) * 8 | 2;
        let size = if long { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        if offset + size - 1 > u64::from(self.idtr.limit) {
            return self.raise_with(vector::GP, index | ext);
        }
        let gate = self.load_system::<u64>(self.table_address(self.idtr.base, offset))?;
        let high =
            if long { self.load_system::<u64>(self.table_address(self.idtr.base, offset + 8))? } else { 0 };
        let kind = (gate >> 40) as u8 & 0x1f;
        let valid = match kind {
            system::INTERRUPT_GATE | system::TRAP_GATE => true,
            system::TASK_GATE | system::INTERRUPT_GATE16 | system::TRAP_GATE16 => !long,
            _ => false,
        };
        if !valid {
            return self.raise_with(vector::GP, index | ext);
        }
        if event.source == Source::Software && ((gate >> 45) as u8 & 3) < self.cpl {
            return self.raise_with(vector::GP, index);
        }
        if gate & 1 << 47 == 0 {
            return self.raise_with(vector::NP, index | ext);
        }
        let selector = (gate >> 16) as u16;
        if kind == system::TASK_GATE {
            let next = self.rip;
            return self.switch_task(selector, Cause::Event, next, event.error, ext);
        }
        let wide = kind & 8 != 0;
        let mut target = (gate & 0xffff) | (gate >> 48 & 0xffff) << 16 | (high & 0xffff_ffff) << 32;
        if !wide {
            target &= 0xffff;
        }
        if is_null(selector) {
            return self.raise_with(vector::GP, ext);
        }
        let code = self.descriptor(selector, vector::GP, ext)?;
        let bad_size = long && (!code.long() || code.db());
        if !code.is_code() || code.dpl() > self.cpl || bad_size {
            return self.raise_with(vector::GP, code.error() | ext);
        }
        if !code.present() {
            return self.raise_with(vector::NP, code.error() | ext);
        }
        let cpl = if code.conforming() { self.cpl } else { code.dpl() };
        if self.v86() && cpl != 0 {
            return self.raise_with(vector::GP, code.error() | ext);
        }
        if long {
            let ist = gate >> 32 & 7;
            self.enter_long(event, &code, cpl, target, ist)?;
        } else {
            self.enter_legacy(event, &code, cpl, target, if wide { 4 } else { 2 })?;
        }
        let interrupt_gate = kind & 1 == 0;
        self.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if interrupt_gate {
            self.rflags &= !rflags::IF;
        }
        let mut segment = code.segment();
        segment.selector = (selector & !3) | u16::from(cpl);
        self.rip = target;
        self.enter_code(segment, cpl);
        Ok(())
    }

    /// Flags as they are pushed for an event.
    fn pushed_flags(&self, event: Event) -> u64 {
        self.rflags() | if event.resume { rflags::RF } else { 0 }
    }

    /// Switches stacks and pushes the frame in long mode (6.14.2).
    fn enter_long(
        &mut self,
        event: Event,
        code: &Descriptor,
        cpl: u8,
        target: u64,
        ist: u64,
    ) -> Result<(), Stop> {
        let ext = event.ext();
        let rsp = if ist != 0 {
            self.task_stack64(28 + 8 * ist, ext)?
        } else if cpl < self.cpl {
            self.task_stack64(4 + 8 * u64::from(cpl), ext)?
        } else if self.code64() {
            self.regs[RSP]
        } else {
            self.regs[RSP] & self.stack_mask()
        };
        if !self.canonical(target) {
            return self.raise_with(vector::GP, ext);
        }
        let mut frame = Frame::other(self, self.seg[SS], rsp & !0xf, cpl, true, ext);
        let flags = self.pushed_flags(event);
        let old = [
            u64::from(self.seg[SS].selector),
            self.regs[RSP],
            flags,
            u64::from(self.seg[CS].selector),
            self.rip,
        ];
        for value in old {
            frame.push(self, value, 8)?;
        }
        if let Some(error) = event.error {
            frame.push(self, u64::from(error), 8)?;
        }
        self.mark_accessed(code)?;
        frame.commit(self)?;
        self.regs[RSP] = frame.sp;
        if cpl < self.cpl {
            self.seg[SS] = unusable(u16::from(cpl));
        }
        Ok(())
    }

    /// Switches stacks and pushes the frame in 32-bit protected mode (6.12.1), from virtual-8086 mode too
    /// (20.3.1).
    fn enter_legacy(
        &mut self,
        event: Event,
        code: &Descriptor,
        cpl: u8,
        target: u64,
        size: u8,
    ) -> Result<(), Stop> {
        let ext = event.ext();
        let from_v86 = self.v86();
        let mut new_stack = None;
        let mut frame = if cpl < self.cpl {
            let (selector, sp) = self.task_stack(cpl, ext)?;
            let stack = self.stack_descriptor(selector, cpl, vector::TS, ext)?;
            new_stack = Some(stack);
            Frame::other(self, stack.segment(), sp, cpl, false, stack.error() | ext)
        } else {
            Frame::current(self).with_error(ext)
        };
        if from_v86 {
            for index in [GS, FS, DS, ES] {
                frame.push(self, u64::from(self.seg[index].selector), size)?;
            }
        }
        if new_stack.is_some() {
            frame.push(self, u64::from(self.seg[SS].selector), size)?;
            frame.push(self, self.regs[RSP], size)?;
        }
        let flags = self.pushed_flags(event);
        for value in [flags, u64::from(self.seg[CS].selector), self.rip] {
            frame.push(self, value, size)?;
        }
        if let Some(error) = event.error {
            frame.push(self, u64::from(error), size)?;
        }
        if target > u64::from(code.limit()) {
            return self.raise_with(vector::GP, ext);
        }
        self.mark_accessed(code)?;
        if let Some(stack) = &new_stack {
            self.mark_accessed(stack)?;
        }
        frame.commit(self)?;
        if let Some(stack) = new_stack {
            self.seg[SS] = stack.segment();
        }
        self.set_stack_pointer(frame.sp);
        if from_v86 {
            for index in [GS, FS, DS, ES] {
                self.seg[index] = unusable(0);
            }
        }
        Ok(())
    }

    // ---- between instructions ----

    /// After an instruction that ran by itself: traps and shadows.
    pub(crate) fn after_single(&mut self) {
        self.alone = false;
        self.attention = true;
        if std::mem::take(&mut self.step_trap) && !self.mov_ss_shadow {
            self.debug_trap |= dr6::BS;
        }
    }

    /// Whether the dispatcher has to look at events before the next instruction.
    #[inline]
    pub(crate) fn events_due(&self) -> bool {
        self.rflags & (rflags::TF | rflags::RF) != 0
            || self.sti_shadow
            || self.mov_ss_shadow
            || (self.nmi_pending && !self.nmi_masked)
            || (self.rflags & rflags::IF != 0 && self.interrupt_ready())
            || self.debug_trap != 0
            || self.dr7 & 0xff != 0
    }

    /// Whether an external interrupt waits that only IF or a shadow can hold back.
    #[inline]
    pub(crate) fn interrupt_ready(&self) -> bool {
        self.pending_interrupt.is_some() || self.lapic.ready()
    }

    /// Sends the dispatcher to [`Cpu::deliver_pending`] if something is due. To be called when IF, TF, the
    /// shadows or the APIC changed.
    #[inline]
    pub(crate) fn update_attention(&mut self) {
        if self.events_due() {
            self.attention = true;
        }
    }

    /// Delivers the most urgent event that may be delivered now (Intel SDM volume 3, table 6-2); true when
    /// there was one. Otherwise prepares the next instruction: one that runs by itself when a trap has to follow
    /// it or a shadow ends with it.
    pub(crate) fn deliver_pending(&mut self) -> bool {
        if self.mp_state == MpState::WaitForSipi {
            return false;
        }
        if let Some(pending) = self.pending_exception.take() {
            let resume = matches!(
                class(&Event::from_fault(&Fault { vector: pending.vector, ..Fault::default() })),
                Class::Contributory | Class::Page
            );
            self.deliver_event(Event {
                vector: pending.vector,
                source: Source::Exception,
                error: pending.error_code,
                resume,
            });
            return true;
        }
        if self.debug_trap != 0 && !self.mov_ss_shadow {
            let bits = std::mem::take(&mut self.debug_trap);
            self.fault = Fault { vector: vector::DB, address: bits, trap: true, ..Fault::default() };
            self.take_fault();
            return true;
        }
        let shadow = self.sti_shadow || self.mov_ss_shadow;
        if !shadow {
            if self.nmi_pending && !self.nmi_masked {
                self.nmi_pending = std::mem::take(&mut self.nmi_second);
                self.nmi_masked = true;
                self.deliver_external(vector::NMI);
                return true;
            }
            if self.rflags & rflags::IF != 0
                && let Some(vector) = self.pending_interrupt.take().or_else(|| self.lapic.acknowledge())
            {
                self.deliver_external(vector);
                return true;
            }
        }
        if self.mp_state != MpState::Runnable {
            // HLT ends a shadow.
            self.sti_shadow = false;
            self.mov_ss_shadow = false;
            return false;
        }
        let watching = self.dr7 & 0xff != 0;
        // The shadow of MOV SS holds data breakpoints and single steps back, on AMD's processors not these (APM volume 2,
        // 13.1.4).
        if watching && self.rflags & rflags::RF == 0 && !self.unfinished {
            let hits = self.code_breakpoints();
            if hits != 0 {
                self.fault = Fault { vector: vector::DB, address: hits, ..Fault::default() };
                self.take_fault();
                return true;
            }
        }
        self.step_trap = self.rflags & rflags::TF != 0;
        if shadow || self.step_trap || watching || self.rflags & rflags::RF != 0 {
            self.alone = true;
            self.sti_shadow = false;
            self.mov_ss_shadow = false;
            self.rflags &= !rflags::RF;
        }
        false
    }

    fn deliver_external(&mut self, vector: u8) {
        self.deliver_event(Event { vector, source: Source::External, error: None, resume: false });
    }

    /// Bits of DR6 for the execution breakpoints at RIP.
    fn code_breakpoints(&self) -> u64 {
        let va =
            if self.code64() { self.rip } else { self.rip.wrapping_add(self.seg[CS].base) & 0xffff_ffff };
        self.breakpoints(va, 1, |kind| kind == 0)
    }

    /// Bits of DR6 for the enabled breakpoints of some kinds (DR7.R/W) that touch a range.
    fn breakpoints(&self, va: u64, len: u64, wanted: impl Fn(u64) -> bool) -> u64 {
        let mut hits = 0;
        for index in 0..4 {
            let control = self.dr7 >> (16 + index * 4);
            if self.dr7 >> (index * 2) & 3 == 0 || !wanted(control & 3) {
                continue;
            }
            let size = match control >> 2 & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = self.dr[index] & !(size - 1);
            if va < start.wrapping_add(size) && start < va.wrapping_add(len) {
                hits |= 1 << index;
            }
        }
        hits
    }

    /// DR0 to DR3 or DR7 changed.
    pub(crate) fn breakpoints_changed(&mut self) {
        let data = |index: u64| self.dr7 >> (index * 2) & 3 != 0 && self.dr7 >> (16 + index * 4) & 1 != 0;
        self.mmu.watching = (0..4).any(data);
        self.mmu.set_access_mode(self.cpl, self.cr4, self.rflags);
        self.update_attention();
    }

    /// Notes a data access for the breakpoints of DR7: a trap after the instruction.
    pub(crate) fn watch_data(&mut self, va: u64, len: u64, intent: Intent) {
        if !self.mmu.watching {
            return;
        }
        let hits = self.breakpoints(va, len, |kind| kind == 3 || (kind == 1 && intent == Intent::Write));
        if hits != 0 {
            self.debug_trap |= hits;
            self.attention = true;
        }
    }
}
