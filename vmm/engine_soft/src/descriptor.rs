//! Segment descriptors in the GDT and LDT, stacks of task state segments, and frames pushed on a stack (Intel
//! SDM volume 3, chapter 3 and 6).
//!
//! Used by [`crate::exception`] and the handlers of [`crate::exec::segment`] and [`crate::exec::far`].

use harrier_engine::cpu_state::Segment;

use crate::cpu::{CS, Cpu, RSP, SS};
use crate::decode::op::{Step, Stop};
use crate::fault::vector;
use crate::mmu::{Intent, Rights};

/// Types of system descriptors.
pub(crate) mod system {
    pub(crate) const TSS16_AVAILABLE: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS_AVAILABLE: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 0xb;
    pub(crate) const CALL_GATE: u8 = 0xc;
    pub(crate) const INTERRUPT_GATE: u8 = 0xe;
    pub(crate) const TRAP_GATE: u8 = 0xf;
}

/// The part of a selector that error codes show: index and table.
pub(crate) fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// Whether a selector is null, whatever its RPL.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub selector: u16,
    /// The first eight bytes.
    pub raw: u64,
    /// Linear address of the descriptor.
    pub va: u64,
}

impl Descriptor {
    /// Type, bits 3:0 of the access byte.
    pub(crate) fn kind(&self) -> u8 {
        (self.raw >> 40) as u8 & 0xf
    }
    /// Code or data, not a system descriptor.
    pub(crate) fn code_or_data(&self) -> bool {
        self.raw & 1 << 44 != 0
    }
    pub(crate) fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    pub(crate) fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    pub(crate) fn present(&self) -> bool {
        self.raw & 1 << 47 != 0
    }
    pub(crate) fn long(&self) -> bool {
        self.raw & 1 << 53 != 0
    }
    pub(crate) fn db(&self) -> bool {
        self.raw & 1 << 54 != 0
    }
    pub(crate) fn is_code(&self) -> bool {
        self.code_or_data() && self.kind() & 8 != 0
    }
    pub(crate) fn conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub(crate) fn readable(&self) -> bool {
        self.code_or_data() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    pub(crate) fn writable_data(&self) -> bool {
        self.code_or_data() && self.kind() & 0xa == 2
    }
    pub(crate) fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 32 & 0xff00_0000)
    }
    /// Limit in bytes.
    pub(crate) fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | (self.raw >> 32) as u32 & 0xf_0000;
        if self.raw & 1 << 55 != 0 { limit << 12 | 0xfff } else { limit }
    }
    pub(crate) fn error(&self) -> u32 {
        selector_error(self.selector)
    }
    /// What a segment register holds after loading it. The accessed bit is set.
    pub(crate) fn segment(&self) -> Segment {
        Segment {
            selector: self.selector,
            base: self.base(),
            limit: self.limit(),
            kind: if self.code_or_data() { self.kind() | 1 } else { self.kind() },
            code_or_data: self.code_or_data(),
            dpl: self.dpl(),
            present: self.present(),
            avl: self.raw & 1 << 52 != 0,
            long: self.long(),
            db: self.db(),
            granularity: self.raw & 1 << 55 != 0,
            unusable: false,
        }
    }
}

/// A segment register that may not be used, because a null selector was loaded.
pub(crate) fn unusable(selector: u16) -> Segment {
    Segment { selector, unusable: true, ..Segment::default() }
}

/// A flat 4 GiB segment, as SYSCALL and its kin load it.
pub(crate) fn flat(selector: u16, dpl: u8, code: bool, long: bool) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        kind: if code { 0xb } else { 3 },
        code_or_data: true,
        dpl,
        present: true,
        avl: false,
        long,
        db: !long,
        granularity: true,
        unusable: false,
    }
}

impl Cpu {
    /// Linear address of something in a system table; 32 bits outside long mode.
    pub(crate) fn table_address(&self, base: u64, offset: u64) -> u64 {
        let va = base.wrapping_add(offset);
        if self.long_mode() { va } else { va & 0xffff_ffff }
    }

    /// Reads the descriptor of a selector. One outside its table raises `vector` with the selector and `ext`.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Result<Descriptor, Stop> {
        match self.find_descriptor(selector, 8)? {
            Some(found) => Ok(found),
            None => self.raise_with(vector, selector_error(selector) | ext),
        }
    }

    /// Reads the descriptor of a selector; `None` when its `size` bytes are outside the table.
    pub(crate) fn find_descriptor(&mut self, selector: u16, size: u64) -> Result<Option<Descriptor>, Stop> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.unusable || !self.ldtr.present {
            return Ok(None);
        } else {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        };
        if offset + size - 1 > limit {
            return Ok(None);
        }
        let va = self.table_address(base, offset);
        let raw = self.load_system::<u64>(va)?;
        Ok(Some(Descriptor { selector, raw, va }))
    }

    /// The upper half of a 16-byte system descriptor. Its type field must be zero.
    pub(crate) fn descriptor_high(&mut self, low: &Descriptor) -> Result<u64, Stop> {
        match self.find_descriptor(low.selector, 16)? {
            None => self.raise_with(vector::GP, low.error()),
            Some(_) => {
                let high = self.load_system::<u64>(self.table_address(low.va, 8))?;
                if high >> 40 & 0x1f != 0 {
                    return self.raise_with(vector::GP, low.error());
                }
                Ok(high)
            }
        }
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub(crate) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Step {
        if descriptor.raw & 1 << 40 != 0 {
            return Ok(());
        }
        let access = (descriptor.raw >> 40) as u8 | 1;
        self.store_system::<u8>(self.table_address(descriptor.va, 5), access)
    }

    /// Checks a stack segment for a privilege level (Intel SDM volume 3, 6.12.1): everything wrong raises
    /// `vector`, except a segment that is not present (#SS).
    pub(crate) fn stack_descriptor(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
        ext: u32,
    ) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return self.raise_with(vector, ext);
        }
        let found = self.descriptor(selector, vector, ext)?;
        if found.rpl() != cpl || found.dpl() != cpl || !found.writable_data() {
            return self.raise_with(vector, found.error() | ext);
        }
        if !found.present() {
            return self.raise_with(vector::SS, found.error() | ext);
        }
        Ok(found)
    }

    /// Stack pointer and selector for a privilege level from a 16- or 32-bit task state segment.
    pub(crate) fn task_stack(&mut self, cpl: u8, ext: u32) -> Result<(u16, u64), Stop> {
        let wide = self.tr.kind & 8 != 0;
        let offset = u64::from(cpl) * if wide { 8 } else { 4 } + if wide { 4 } else { 2 };
        let last = offset + if wide { 5 } else { 3 };
        if self.tr.unusable || last > u64::from(self.tr.limit) {
            return self.raise_with(vector::TS, selector_error(self.tr.selector) | ext);
        }
        let va = self.table_address(self.tr.base, offset);
        if wide {
            let sp = self.load_system::<u32>(va)?;
            let ss = self.load_system::<u16>(self.table_address(va, 4))?;
            Ok((ss, u64::from(sp)))
        } else {
            let sp = self.load_system::<u16>(va)?;
            let ss = self.load_system::<u16>(self.table_address(va, 2))?;
            Ok((ss, u64::from(sp)))
        }
    }

    /// A stack pointer at this offset of a 64-bit task state segment.
    pub(crate) fn task_stack64(&mut self, offset: u64, ext: u32) -> Result<u64, Stop> {
        if self.tr.unusable || offset + 7 > u64::from(self.tr.limit) {
            return self.raise_with(vector::TS, selector_error(self.tr.selector) | ext);
        }
        let rsp = self.load_system::<u64>(self.table_address(self.tr.base, offset))?;
        if !self.canonical(rsp) {
            return self.raise_with(vector::SS, ext);
        }
        Ok(rsp)
    }

    /// Rights of data accesses at a privilege level.
    pub(crate) fn rights_at(&self, cpl: u8) -> Rights {
        if cpl == 3 { Rights::User } else { self.system_rights() }
    }

    /// Pops from the current stack without moving it: reads `size` bytes `offset` above the stack pointer.
    pub(crate) fn peek_stack(&mut self, offset: u64, size: u8) -> Result<u64, Stop> {
        let mask = self.stack_mask();
        let sp = self.regs[RSP].wrapping_add(offset) & mask;
        let va = self.segmented(SS, sp, u64::from(size), Intent::Read)?;
        Ok(match size {
            2 => u64::from(self.load::<u16>(va)?),
            4 => u64::from(self.load::<u32>(va)?),
            _ => self.load::<u64>(va)?,
        })
    }

    /// Sets the stack pointer, at the stack's width.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        self.regs[RSP] = self.with_stack_width(self.regs[RSP], value);
    }

    /// Pushes one value on the current stack.
    pub(crate) fn push_value(&mut self, value: u64, size: u8) -> Step {
        let mut frame = Frame::current(self);
        frame.push(self, value, size)?;
        frame.commit(self)?;
        self.set_stack_pointer(frame.sp);
        Ok(())
    }

    /// Takes over a code segment and privilege level, and everything that depends on them.
    pub(crate) fn enter_code(&mut self, segment: Segment, cpl: u8) {
        let was64 = self.code64();
        self.seg[CS] = segment;
        self.cpl = cpl;
        if was64 && segment.long {
            // Bases, masks and paging stay as they are: the way of every system call and interrupt.
            self.mmu.set_access_mode(cpl, self.cr4, self.rflags);
        } else {
            self.mode_changed();
        }
    }
}

/// Values to be pushed together: all of them are checked before any is written.
pub(crate) struct Frame {
    stack: Segment,
    /// Stack pointer after the pushes so far.
    pub sp: u64,
    mask: u64,
    flat: bool,
    rights: Rights,
    /// Error code of #SS when the stack is too small.
    error: u32,
    items: [(u64, u64, u8); 42],
    count: usize,
}

impl Frame {
    /// On the stack in use.
    pub(crate) fn current(cpu: &Cpu) -> Frame {
        let mask = cpu.stack_mask();
        Frame {
            stack: cpu.seg[SS],
            sp: cpu.regs[RSP] & mask,
            mask,
            flat: cpu.code64(),
            rights: cpu.mmu.rights,
            error: 0,
            items: [(0, 0, 0); 42],
            count: 0,
        }
    }

    /// On the stack of another privilege level; `flat` when the code there is 64-bit.
    pub(crate) fn other(cpu: &Cpu, stack: Segment, sp: u64, cpl: u8, flat: bool, error: u32) -> Frame {
        let mask = if flat {
            u64::MAX
        } else if stack.db {
            0xffff_ffff
        } else {
            0xffff
        };
        Frame {
            stack,
            sp: sp & mask,
            mask,
            flat,
            rights: cpu.rights_at(cpl),
            error,
            items: [(0, 0, 0); 42],
            count: 0,
        }
    }

    /// The error code that a stack that is too small raises.
    pub(crate) fn with_error(self, error: u32) -> Frame {
        Frame { error, ..self }
    }

    /// Adds one value of 2, 4 or 8 bytes; #SS when it does not fit into the segment.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, value: u64, size: u8) -> Step {
        let bytes = u64::from(size);
        let sp = self.sp.wrapping_sub(bytes) & self.mask;
        let va = if self.flat {
            if !cpu.canonical(sp) || !cpu.canonical(sp.wrapping_add(bytes - 1)) {
                return cpu.raise_with(vector::SS, self.error);
            }
            sp
        } else {
            let last = sp.wrapping_add(bytes - 1);
            let limit = u64::from(self.stack.limit);
            let expand_down = self.stack.code_or_data && self.stack.kind & 0xc == 4;
            let inside = if expand_down { sp > limit && last <= self.mask } else { last <= limit };
            if self.stack.unusable || !inside {
                return cpu.raise_with(vector::SS, self.error);
            }
            sp.wrapping_add(self.stack.base) & 0xffff_ffff
        };
        let Some(place) = self.items.get_mut(self.count) else { return cpu.raise_gp() };
        *place = (va, value, size);
        self.count += 1;
        self.sp = sp;
        Ok(())
    }

    /// Writes everything, or nothing when a page cannot be written.
    pub(crate) fn commit(&self, cpu: &mut Cpu) -> Step {
        let items = &self.items[..self.count];
        for &(va, _, size) in items {
            cpu.probe_write_as(va, usize::from(size), self.rights)?;
        }
        for &(va, value, size) in items {
            match size {
                2 => cpu.store_as(va, value as u16, self.rights)?,
                4 => cpu.store_as(va, value as u32, self.rights)?,
                _ => cpu.store_as(va, value, self.rights)?,
            }
        }
        Ok(())
    }
}
