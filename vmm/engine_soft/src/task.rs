//! Hardware task switches, which exist outside long mode (Intel SDM volume 3, chapter 8).
//!
//! [`Cpu::switch_task`] is called for JMP, CALL and IRET by [`crate::exec::far`] and for task gates in the interrupt
//! table by [`crate::exception`]. Until the new task's registers are loaded a fault belongs to the old task and
//! nothing has changed; later ones are the new task's.

use harrier_engine::cpu_state::Segment;

use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, cr0, cr4, rflags};
use crate::decode::op::Step;
use crate::descriptor::{Descriptor, is_null, selector_error, system, unusable};
use crate::exception::dr6;
use crate::exec::far::v86_segment;
use crate::fault::vector;

/// Why a task is switched to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cause {
    Jump,
    Call,
    /// IRET with NT set.
    Return,
    /// An exception or interrupt.
    Event,
}

impl Cause {
    /// The new task returns to the old one.
    fn nests(self) -> bool {
        matches!(self, Cause::Call | Cause::Event)
    }
}

/// The order of segment registers in a task state segment.
const SEGMENTS: [usize; 6] = [ES, CS, SS, DS, FS, GS];

/// Offsets in the two formats.
struct Layout {
    /// Bytes of the whole.
    size: u64,
    /// Bytes of a register.
    width: u64,
    rip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    /// Segment registers that it has.
    segment_count: usize,
    ldt: u64,
}

const WIDE: Layout = Layout {
    size: 104,
    width: 4,
    rip: 32,
    flags: 36,
    registers: 40,
    segments: 72,
    segment_count: 6,
    ldt: 96,
};
const NARROW: Layout =
    Layout { size: 44, width: 2, rip: 14, flags: 16, registers: 18, segments: 34, segment_count: 4, ldt: 42 };

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &WIDE } else { &NARROW }
}

/// What a task state segment says.
struct Image {
    cr3: u64,
    rip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Image {
    fn parse(bytes: &[u8; 104], layout: &Layout) -> Image {
        let word = |at: u64| {
            let at = at as usize;
            u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
        };
        let value = |at: u64| if layout.width == 4 { word(at) | word(at + 2) << 16 } else { word(at) };
        let wide = layout.width == 4;
        Image {
            cr3: if wide { value(28) } else { 0 },
            rip: value(layout.rip),
            flags: value(layout.flags),
            // The manuals say nothing of the upper halves of registers that come from a 16-bit TSS. The 80386 set them, and
            // test386.asm holds its successors to it.
            registers: std::array::from_fn(|index| {
                let upper = if wide { 0 } else { 0xffff_0000 };
                upper | value(layout.registers + index as u64 * layout.width)
            }),
            selectors: std::array::from_fn(|index| {
                if index < layout.segment_count {
                    word(layout.segments + index as u64 * layout.width) as u16
                } else {
                    0
                }
            }),
            ldt: word(layout.ldt) as u16,
            trap: wide && bytes[100] & 1 != 0,
        }
    }
}

impl Cpu {
    /// Switches to the task of a TSS selector. `next` is where the old task goes on, `error` is pushed for the
    /// new one, `ext` marks error codes of faults on the way. On an error nothing has changed.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        cause: Cause,
        next: u64,
        error: Option<u32>,
        ext: u32,
    ) -> Step {
        let returns = cause == Cause::Return;
        let wrong = if returns { vector::TS } else { vector::GP };
        if selector & 4 != 0 || is_null(selector) {
            return self.raise_with(wrong, selector_error(selector) | ext);
        }
        let target = self.descriptor(selector, wrong, ext)?;
        let available = matches!(target.kind(), system::TSS_AVAILABLE | system::TSS16_AVAILABLE);
        let busy = matches!(target.kind(), system::TSS_BUSY | system::TSS16_BUSY);
        if target.code_or_data() || !(if returns { busy } else { available }) {
            return self.raise_with(wrong, target.error() | ext);
        }
        if !target.present() {
            return self.raise_with(vector::NP, target.error() | ext);
        }
        let new = layout(target.kind());
        if u64::from(target.limit()) < new.size - 1 || self.tr.unusable {
            return self.raise_with(vector::TS, target.error() | ext);
        }
        let mut bytes = [0; 104];
        self.read_system(target.base(), &mut bytes[..new.size as usize])?;
        let image = Image::parse(&bytes, new);

        self.save_task(next, returns)?;
        // From here on nothing of the old task is left to fault.
        if !cause.nests() {
            self.set_busy(self.tr.selector, false)?;
        }
        if !returns {
            self.set_busy(selector, true)?;
        }
        if cause.nests() {
            self.store_system::<u16>(target.base() & 0xffff_ffff, self.tr.selector)?;
        }
        self.load_task(&target, &image, cause);
        if self.load_task_segments(&image, ext).and_then(|()| self.finish_task(&image, new, error)).is_err() {
            // The new task's own fault, at its first instruction.
            self.take_fault();
        }
        Ok(())
    }

    /// Writes the old task's registers into its TSS, all or none.
    fn save_task(&mut self, next: u64, returns: bool) -> Step {
        let old = layout(self.tr.kind);
        let mut flags = self.rflags();
        if returns {
            flags &= !rflags::NT;
        }
        let mut values = vec![(old.rip, next), (old.flags, flags)];
        for index in 0..8 {
            values.push((old.registers + index as u64 * old.width, self.regs[index]));
        }
        for (index, &segment) in SEGMENTS.iter().enumerate().take(old.segment_count) {
            values.push((old.segments + index as u64 * old.width, u64::from(self.seg[segment].selector)));
        }
        let base = self.tr.base;
        let rights = self.system_rights();
        for &(at, _) in &values {
            self.probe_write_as(self.table_address(base, at), old.width as usize, rights)?;
        }
        for (at, value) in values {
            let va = self.table_address(base, at);
            if old.width == 4 {
                self.store_as(va, value as u32, rights)?;
            } else {
                self.store_as(va, value as u16, rights)?;
            }
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Step {
        let Some(found) = self.find_descriptor(selector, 8)? else { return Ok(()) };
        let access = (found.raw >> 40) as u8;
        let access = if busy { access | 2 } else { access & !2 };
        self.store_system::<u8>(self.table_address(found.va, 5), access)
    }

    /// Takes over TR and the registers that need no checks.
    fn load_task(&mut self, target: &Descriptor, image: &Image, cause: Cause) {
        self.tr = target.segment();
        self.tr.kind |= 2;
        self.cr0 |= cr0::TS;
        if self.cr0 & cr0::PG != 0 && target.kind() & 8 != 0 && image.cr3 != self.cr3 {
            self.cr3 = image.cr3;
            if self.cr4 & cr4::PAE != 0 && !self.mmu.load_pdptes(image.cr3) {
                log::debug!("vcpu {}: task switch to cr3 {:#x} with bad entries", self.index, image.cr3);
            }
            self.mmu.flush();
        }
        self.rip = image.rip;
        for (index, &value) in image.registers.iter().enumerate() {
            self.regs[index] = value;
        }
        let nested = if cause.nests() { rflags::NT } else { 0 };
        self.set_rflags(image.flags | nested);
        // Until they are checked the segments are not to be used; their selectors show already.
        self.ldtr = unusable(image.ldt);
        for (&index, &selector) in SEGMENTS.iter().zip(&image.selectors) {
            if index != CS {
                self.seg[index] = unusable(selector);
            }
        }
        self.seg[CS].selector = image.selectors[1];
        self.cpl = if self.v86() { 3 } else { (image.selectors[1] & 3) as u8 };
        // Local breakpoints were the old task's.
        self.dr7 &= !0x55;
        self.breakpoints_changed();
        self.mode_changed();
    }

    /// Loads LDTR and the segments, each fault with the selector.
    fn load_task_segments(&mut self, image: &Image, ext: u32) -> Step {
        if !is_null(image.ldt) {
            let wrong = selector_error(image.ldt) | ext;
            let found = self.descriptor(image.ldt, vector::TS, ext)?;
            let valid = image.ldt & 4 == 0 && !found.code_or_data() && found.kind() == system::LDT;
            if !valid || !found.present() {
                return self.raise_with(vector::TS, wrong);
            }
            self.ldtr = found.segment();
        }
        if self.v86() {
            for (&index, &selector) in SEGMENTS.iter().zip(&image.selectors) {
                self.seg[index] = v86_segment(selector);
            }
            self.mode_changed();
            return Ok(());
        }
        let [es, cs, ss, ds, fs, gs] = image.selectors;
        if is_null(cs) {
            return self.raise_with(vector::TS, ext);
        }
        let code = self.descriptor(cs, vector::TS, ext)?;
        let level = if code.conforming() { code.dpl() <= code.rpl() } else { code.dpl() == code.rpl() };
        if !code.is_code() || !level {
            return self.raise_with(vector::TS, code.error() | ext);
        }
        if !code.present() {
            return self.raise_with(vector::NP, code.error() | ext);
        }
        let stack = self.stack_descriptor(ss, self.cpl, vector::TS, ext)?;
        self.mark_accessed(&code)?;
        self.mark_accessed(&stack)?;
        self.seg[CS] = code.segment();
        self.seg[SS] = stack.segment();
        self.mode_changed();
        for (index, selector) in [(DS, ds), (ES, es), (FS, fs), (GS, gs)] {
            self.seg[index] = self.task_data_segment(selector, ext)?;
            self.seg_base[index] = self.seg[index].base;
        }
        Ok(())
    }

    fn task_data_segment(&mut self, selector: u16, ext: u32) -> Result<Segment, crate::decode::op::Stop> {
        if is_null(selector) {
            return Ok(unusable(selector));
        }
        let found = self.descriptor(selector, vector::TS, ext)?;
        let privileged = !found.conforming() && (found.rpl() > found.dpl() || self.cpl > found.dpl());
        if !found.readable() || privileged {
            return self.raise_with(vector::TS, found.error() | ext);
        }
        if !found.present() {
            return self.raise_with(vector::NP, found.error() | ext);
        }
        self.mark_accessed(&found)?;
        Ok(found.segment())
    }

    /// Pushes the error code of the event, and checks where the task begins.
    fn finish_task(&mut self, image: &Image, layout: &Layout, error: Option<u32>) -> Step {
        if let Some(error) = error {
            self.push_value(u64::from(error), layout.width as u8)?;
        }
        if image.rip > u64::from(self.seg[CS].limit) {
            return self.raise_gp();
        }
        if image.trap {
            self.debug_trap |= dr6::BT;
        }
        self.update_attention();
        Ok(())
    }
}
