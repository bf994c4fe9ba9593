//! Loads and stores of the guest: the fast path through the look-aside buffer, and the slow one for misses,
//! page crossings, devices, the local APIC's page and pages that hold decoded code.

use super::map::chunk_mask;
use super::{Intent, PAGE, Paging, Rights};
use crate::cpu::{Cpu, FS};
use crate::decode::op::{ADDR_16, ADDR_32, ADDR_FLAT, ADDR_SEGMENTED, ADDR_SIZE_MASK, Op, Step, Stop};
use crate::fault::{Fault, vector};
use crate::native::alu::Flags;
use crate::native::mem::{self, HostPtr, Word};

/// Longest piece that the slow path handles at once, in bytes (an XSAVE area is moved in pieces).
const MAX_PIECE: usize = 4096;

/// A linear range in one page, translated.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Memory.
    Ram(HostPtr),
    /// Device space: guest physical address.
    Device(u64),
}

impl Cpu {
    /// Offset of the memory operand inside its segment, before the address size cuts it.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        let base = self.regs[(op.base & 31) as usize];
        let index = self.regs[(op.index & 31) as usize];
        base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp as i64 as u64)
    }

    /// Offset as LEA sees it: cut to the address size.
    #[inline(always)]
    pub(crate) fn effective(&self, op: &Op) -> u64 {
        let offset = self.offset(op);
        match op.addr & ADDR_SIZE_MASK {
            ADDR_16 => offset & 0xffff,
            ADDR_32 => offset & 0xffff_ffff,
            _ => offset,
        }
    }

    /// Linear address of the memory operand for an access of `size` bytes.
    #[inline(always)]
    pub(crate) fn addr(&mut self, op: &Op, size: u64, intent: Intent) -> Result<u64, Stop> {
        if op.addr == ADDR_FLAT {
            Ok(self.offset(op).wrapping_add(self.seg_base[(op.seg & 7) as usize]))
        } else {
            self.addr_slow(op, size, intent)
        }
    }

    fn addr_slow(&mut self, op: &Op, size: u64, intent: Intent) -> Result<u64, Stop> {
        let offset = self.effective(op);
        if op.addr & ADDR_SEGMENTED == 0 {
            return Ok(offset.wrapping_add(self.seg_base[(op.seg & 7) as usize]));
        }
        self.segmented(usize::from(op.seg), offset, size, intent)
    }

    /// Linear address of `offset` in a segment, checked against its type and limit outside 64-bit mode
    /// (Intel SDM volume 3, 5.3 to 5.5).
    pub(crate) fn segmented(
        &mut self,
        seg: usize,
        offset: u64,
        size: u64,
        intent: Intent,
    ) -> Result<u64, Stop> {
        let base = self.seg_base[seg & 7];
        if self.code64() {
            let va = offset.wrapping_add(base);
            if !self.canonical(va) || !self.canonical(va.wrapping_add(size.max(1) - 1)) {
                let stack = seg == crate::cpu::SS || seg == crate::decode::op::SEG_FLAT_STACK as usize;
                return self.raise_with(if stack { vector::SS } else { vector::GP }, 0);
            }
            return Ok(va);
        }
        let Some(segment) = self.seg.get(seg).copied() else { return self.raise_gp() };
        let fault = if seg == crate::cpu::SS { vector::SS } else { vector::GP };
        if !self.real_mode() && !self.v86() {
            let code = segment.kind & 8 != 0;
            let writable = !code && segment.kind & 2 != 0;
            let readable = !code || segment.kind & 2 != 0;
            let allowed = match intent {
                Intent::Write => writable,
                Intent::Read => readable,
                Intent::Fetch => true,
            };
            if segment.unusable || !allowed {
                return self.raise_with(fault, 0);
            }
        }
        let last = offset + size.max(1) - 1;
        let limit = u64::from(segment.limit);
        let expand_down = segment.kind & 0xc == 4 && segment.code_or_data;
        let inside = if expand_down {
            let top = if segment.db { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if !inside {
            return self.raise_with(fault, 0);
        }
        Ok(offset.wrapping_add(base) & 0xffff_ffff)
    }

    /// Whether an address is canonical for the paging mode: 48 bits in long mode, always outside it.
    #[inline(always)]
    pub(crate) fn canonical(&self, va: u64) -> bool {
        self.mmu.config.paging != Paging::Long || ((va as i64) << 16 >> 16) as u64 == va
    }

    // ---- by operand ----

    /// Loads the memory operand.
    #[inline(always)]
    pub(crate) fn load_op<W: Word>(&mut self, op: &Op) -> Result<W, Stop> {
        let va = self.addr(op, W::SIZE as u64, Intent::Read)?;
        self.load(va)
    }

    /// Stores to the memory operand.
    #[inline(always)]
    pub(crate) fn store_op<W: Word>(&mut self, op: &Op, value: W) -> Step {
        let va = self.addr(op, W::SIZE as u64, Intent::Write)?;
        self.store(va, value)
    }

    // ---- by operand, without a stack frame where it is at hand ----

    /// The memory operand's address, if no segment has to be looked at.
    #[inline(always)]
    fn flat_address(&self, op: &Op) -> Option<u64> {
        (op.addr == ADDR_FLAT).then(|| self.offset(op).wrapping_add(self.seg_base[(op.seg & 7) as usize]))
    }

    /// Where it is read, if it is in the look-aside buffer, too.
    #[inline(always)]
    fn readable<W: Word>(&self, op: &Op) -> Option<HostPtr> {
        self.mmu.tlb.read::<W>(self.mmu.rights, self.flat_address(op)?)
    }

    /// The same for writing.
    #[inline(always)]
    fn writable<W: Word>(&self, op: &Op) -> Option<HostPtr> {
        self.mmu.tlb.write::<W>(self.mmu.rights, self.flat_address(op)?)
    }

    /// Loads the memory operand for `then`. What is not at hand is another function's, which this one ends with: so a
    /// handler that does nothing else needs no frame.
    #[inline(always)]
    pub(crate) fn with_operand<W: Word>(
        &mut self,
        op: &Op,
        then: impl FnOnce(&mut Cpu, &Op, W) -> Step,
    ) -> Step {
        match self.readable::<W>(op) {
            Some(ptr) => then(self, op, W::load(ptr)),
            None => self.with_operand_slow(op, then),
        }
    }

    #[cold]
    #[inline(never)]
    fn with_operand_slow<W: Word>(&mut self, op: &Op, then: impl FnOnce(&mut Cpu, &Op, W) -> Step) -> Step {
        let value = self.load_op::<W>(op)?;
        then(self, op, value)
    }

    /// Stores what `value` gives to the memory operand.
    #[inline(always)]
    pub(crate) fn set_operand<W: Word>(&mut self, op: &Op, value: impl FnOnce(&Cpu, &Op) -> W) -> Step {
        match self.writable::<W>(op) {
            Some(ptr) => {
                W::store(ptr, value(self, op));
                Ok(())
            }
            None => self.set_operand_slow(op, value),
        }
    }

    #[cold]
    #[inline(never)]
    fn set_operand_slow<W: Word>(&mut self, op: &Op, value: impl FnOnce(&Cpu, &Op) -> W) -> Step {
        let value = value(self, op);
        self.store_op(op, value)
    }

    /// Changes the memory operand, without LOCK; the flags are `change`'s once it is stored.
    #[inline(always)]
    pub(crate) fn change_operand<W: Word>(
        &mut self,
        op: &Op,
        change: impl FnOnce(&Cpu, &Op, W) -> (W, Flags),
    ) -> Step {
        match self.writable::<W>(op) {
            Some(ptr) => {
                let (new, flags) = change(self, op, W::load(ptr));
                W::store(ptr, new);
                self.flags = flags;
                Ok(())
            }
            None => self.change_operand_slow(op, change),
        }
    }

    #[cold]
    #[inline(never)]
    fn change_operand_slow<W: Word>(
        &mut self,
        op: &Op,
        change: impl FnOnce(&Cpu, &Op, W) -> (W, Flags),
    ) -> Step {
        let va = self.addr(op, W::SIZE as u64, Intent::Write)?;
        let mut flags = self.flags;
        self.modify::<W>(va, |cpu, old| {
            let (new, after) = change(cpu, op, old);
            flags = after;
            Ok(new)
        })?;
        self.flags = flags;
        Ok(())
    }

    // ---- by linear address ----

    /// Loads from a linear address with the rights of the code that runs.
    #[inline(always)]
    pub(crate) fn load<W: Word>(&mut self, va: u64) -> Result<W, Stop> {
        match self.mmu.tlb.read::<W>(self.mmu.rights, va) {
            Some(ptr) => Ok(W::load(ptr)),
            None => self.load_slow(va, self.mmu.rights),
        }
    }

    /// Stores to a linear address with the rights of the code that runs.
    #[inline(always)]
    pub(crate) fn store<W: Word>(&mut self, va: u64, value: W) -> Step {
        match self.mmu.tlb.write::<W>(self.mmu.rights, va) {
            Some(ptr) => {
                W::store(ptr, value);
                Ok(())
            }
            None => self.store_slow(va, value, self.mmu.rights),
        }
    }

    /// Loads as the processor itself does: descriptor tables, task state (implicit supervisor access).
    pub(crate) fn load_system<W: Word>(&mut self, va: u64) -> Result<W, Stop> {
        let rights = self.system_rights();
        match self.mmu.tlb.read::<W>(rights, va) {
            Some(ptr) => Ok(W::load(ptr)),
            None => self.load_slow(va, rights),
        }
    }

    /// Stores as the processor itself does.
    pub(crate) fn store_system<W: Word>(&mut self, va: u64, value: W) -> Step {
        let rights = self.system_rights();
        match self.mmu.tlb.write::<W>(rights, va) {
            Some(ptr) => {
                W::store(ptr, value);
                Ok(())
            }
            None => self.store_slow(va, value, rights),
        }
    }

    /// Stores with the rights of a given kind of code: pushes on the stack of another privilege level.
    pub(crate) fn store_as<W: Word>(&mut self, va: u64, value: W, rights: Rights) -> Step {
        match self.mmu.tlb.write::<W>(rights, va) {
            Some(ptr) => {
                W::store(ptr, value);
                Ok(())
            }
            None => self.store_slow(va, value, rights),
        }
    }

    /// As [`Cpu::probe_write`], with the rights of a given kind of code.
    pub(crate) fn probe_write_as(&mut self, va: u64, len: usize, rights: Rights) -> Step {
        if self.mmu.tlb.write_len(rights, va, len as u64).is_some() {
            return Ok(());
        }
        self.before_write(va, len as u64, rights)
    }

    /// Rights of implicit supervisor accesses: SMAP applies whatever AC says.
    pub(crate) fn system_rights(&self) -> Rights {
        if self.mmu.config.smap { Rights::SupervisorSmap } else { Rights::Supervisor }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<W: Word>(&mut self, va: u64, rights: Rights) -> Result<W, Stop> {
        let mut bytes = [0u8; 8];
        self.read_slow(va, &mut bytes[..W::SIZE], rights)?;
        Ok(W::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<W: Word>(&mut self, va: u64, value: W, rights: Rights) -> Step {
        self.write_slow(va, &value.to_u64().to_le_bytes()[..W::SIZE], rights)
    }

    /// Read, change and write back one operand, without LOCK. Nothing is written when `change` fails.
    #[inline(always)]
    pub(crate) fn modify<W: Word>(
        &mut self,
        va: u64,
        change: impl FnOnce(&mut Cpu, W) -> Result<W, Stop>,
    ) -> Step {
        match self.mmu.tlb.write::<W>(self.mmu.rights, va) {
            Some(ptr) => {
                let new = change(self, W::load(ptr))?;
                W::store(ptr, new);
                Ok(())
            }
            None => {
                self.probe_write(va, W::SIZE)?;
                let old = self.load_slow(va, self.mmu.rights)?;
                let new = change(self, old)?;
                self.store_slow(va, new, self.mmu.rights)
            }
        }
    }

    /// The same with LOCK: atomic against other vCPUs, unless the operand crosses a page or is a device's.
    /// `change` may be called several times and must only compute: it gets the old value and answers the new one
    /// and whatever the caller wants to keep.
    #[inline(always)]
    pub(crate) fn modify_locked<W: Word, T>(
        &mut self,
        va: u64,
        mut change: impl FnMut(W) -> (W, T),
    ) -> Result<T, Stop> {
        if let Some(ptr) = self.mmu.tlb.write::<W>(self.mmu.rights, va) {
            return Ok(exchange_loop(ptr, &mut change));
        }
        self.probe_write(va, W::SIZE)?;
        if let Place::Ram(ptr) = self.place(va, self.mmu.rights, Intent::Write)?
            && (va & (PAGE - 1)) + W::SIZE as u64 <= PAGE
        {
            let kept = exchange_loop(ptr, &mut change);
            self.watch_data(va, W::SIZE as u64, Intent::Write);
            self.after_write(va, W::SIZE as u64, self.mmu.rights);
            return Ok(kept);
        }
        // Two mappings, or a device: atomic against the others that come this way.
        let shared = std::sync::Arc::clone(&self.shared);
        let _split = shared.split_lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let old = self.load_slow(va, self.mmu.rights)?;
        let (new, kept) = change(old);
        self.store_slow(va, new, self.mmu.rights)?;
        Ok(kept)
    }

    /// Faults now if any byte of the range cannot be written, or if the write would hit the code being run.
    pub(crate) fn probe_write(&mut self, va: u64, len: usize) -> Step {
        if self.mmu.tlb.write_len(self.mmu.rights, va, len as u64).is_some() {
            return Ok(());
        }
        self.before_write(va, len as u64, self.mmu.rights)
    }

    /// Reads `out.len()` bytes.
    pub(crate) fn read(&mut self, va: u64, out: &mut [u8]) -> Step {
        self.read_slow(va, out, self.mmu.rights)
    }

    /// Writes all bytes or, when it faults, none (devices excepted).
    pub(crate) fn write(&mut self, va: u64, data: &[u8]) -> Step {
        self.write_slow(va, data, self.mmu.rights)
    }

    /// Reads as the processor itself does.
    pub(crate) fn read_system(&mut self, va: u64, out: &mut [u8]) -> Step {
        self.read_slow(va, out, self.system_rights())
    }

    fn read_slow(&mut self, va: u64, out: &mut [u8], rights: Rights) -> Step {
        let mut done = 0;
        let watched = rights == Rights::Checked;
        let rights = self.checked(va, out.len(), rights)?;
        // Translate everything first: a fault in a later page must come before a device sees anything.
        if !same_page(va, out.len()) {
            self.check_end(va, out.len())?;
            let mut at = 0;
            while at < out.len() {
                self.place(va.wrapping_add(at as u64), rights, Intent::Read)?;
                at += piece(va.wrapping_add(at as u64), out.len() - at);
            }
        }
        while done < out.len() {
            let at = va.wrapping_add(done as u64);
            let len = piece(at, out.len() - done);
            let target = &mut out[done..done + len];
            match self.place(at, rights, Intent::Read)? {
                // One instruction for the usual sizes, so that a reader never sees half a write.
                Place::Ram(ptr) => match target.len() {
                    2 => target.copy_from_slice(&u16::load(ptr).to_le_bytes()),
                    4 => target.copy_from_slice(&u32::load(ptr).to_le_bytes()),
                    8 => target.copy_from_slice(&u64::load(ptr).to_le_bytes()),
                    _ => mem::read_bytes(ptr, target),
                },
                Place::Device(gpa) => self.device_read(gpa, target),
            }
            done += len;
        }
        if watched {
            self.watch_data(va, out.len() as u64, Intent::Read);
        }
        Ok(())
    }

    fn write_slow(&mut self, va: u64, data: &[u8], rights: Rights) -> Step {
        let watched = rights == Rights::Checked;
        let rights = self.checked(va, data.len(), rights)?;
        self.before_write(va, data.len() as u64, rights)?;
        if watched {
            self.watch_data(va, data.len() as u64, Intent::Write);
        }
        let mut done = 0;
        while done < data.len() {
            let at = va.wrapping_add(done as u64);
            let len = piece(at, data.len() - done);
            let source = &data[done..done + len];
            match self.place(at, rights, Intent::Write)? {
                Place::Ram(ptr) => match *source {
                    [a] => u8::store(ptr, a),
                    [a, b] => u16::store(ptr, u16::from_le_bytes([a, b])),
                    [a, b, c, d] => u32::store(ptr, u32::from_le_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => {
                        u64::store(ptr, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                    }
                    _ => mem::write_bytes(ptr, source),
                },
                Place::Device(gpa) => self.device_write(gpa, source),
            }
            done += len;
        }
        self.after_write(va, data.len() as u64, rights);
        Ok(())
    }

    /// The rights to use for an access that came with [`Rights::Checked`]: #AC where it is not aligned.
    fn checked(&mut self, va: u64, len: usize, rights: Rights) -> Result<Rights, Stop> {
        if rights == Rights::Checked
            && self.mmu.check_alignment
            && matches!(len, 2 | 4 | 8)
            && va & (len as u64 - 1) != 0
        {
            return self.raise_with(vector::AC, 0);
        }
        Ok(self.mmu.plain_rights(rights))
    }

    /// A range that crosses into the next page must end at a canonical address.
    fn check_end(&mut self, va: u64, len: usize) -> Step {
        if self.canonical(va.wrapping_add(len as u64 - 1)) {
            return Ok(());
        }
        self.fault = Fault { vector: vector::GP, non_canonical: true, ..Fault::default() };
        Err(Stop::Fault)
    }

    /// Translates every page of the range for writing, and stops when the write would hit the code being run.
    fn before_write(&mut self, va: u64, len: u64, rights: Rights) -> Step {
        let rights = self.checked(va, len as usize, rights)?;
        if !same_page(va, len as usize) {
            self.check_end(va, len as usize)?;
        }
        let mut at = 0;
        while at < len {
            self.place(va.wrapping_add(at), rights, Intent::Write)?;
            at += piece(va.wrapping_add(at), (len - at) as usize) as u64;
        }
        if self.alone {
            return Ok(());
        }
        let mut stop = false;
        self.for_code(va, len, rights, |cpu, page, _| stop |= cpu.mmu.running.contains(&page));
        if stop { Err(Stop::Alone) } else { Ok(()) }
    }

    /// Called after memory changed: decoded code there becomes invalid.
    pub(crate) fn after_write(&mut self, va: u64, len: u64, rights: Rights) {
        self.for_code(va, len, rights, |cpu, page, chunks| {
            if let Some(page) = cpu.mmu.map.page(page) {
                page.remove_code(chunks);
            }
            cpu.shared.code_written(page, chunks);
            cpu.attention = true;
        });
    }

    /// Calls `f` with each physical page of a writable range that holds decoded code in the range, and the
    /// chunks that do.
    fn for_code(&mut self, va: u64, len: u64, rights: Rights, mut f: impl FnMut(&mut Cpu, u64, u64)) {
        let mut at = 0;
        while at < len {
            let here = va.wrapping_add(at);
            let part = piece(here, (len - at) as usize) as u64;
            at += part;
            let rights = self.mmu.plain_rights(rights);
            let Ok(translation) = self.mmu.walk(here, rights, Intent::Write) else { continue };
            let gpa = translation.gpa;
            let chunks = chunk_mask(gpa & (PAGE - 1), part);
            let held = self.mmu.map.page(gpa).map_or(0, |page| page.code() & chunks);
            if held != 0 {
                f(self, gpa & !(PAGE - 1), held);
            }
        }
    }

    /// Translates one address; fills the look-aside buffer when the page is memory.
    pub(crate) fn place(&mut self, va: u64, rights: Rights, intent: Intent) -> Result<Place, Stop> {
        let gpa = self.translate(va, rights, intent)?;
        if self.lapic.claims(gpa, self.msrs.apic_base) {
            return Ok(Place::Device(gpa));
        }
        let map = std::sync::Arc::clone(&self.mmu.map);
        match map.page(gpa) {
            Some(page) if !(page.read_only() && intent == Intent::Write) => Ok(Place::Ram(page.ptr(gpa))),
            _ => Ok(Place::Device(gpa)),
        }
    }

    /// Guest physical address; page fault or general protection when there is none.
    pub(crate) fn translate(&mut self, va: u64, rights: Rights, intent: Intent) -> Result<u64, Stop> {
        if !self.canonical(va) {
            self.fault = Fault { vector: vector::GP, non_canonical: true, ..Fault::default() };
            return Err(Stop::Fault);
        }
        let rights = self.mmu.plain_rights(rights);
        match self.mmu.walk(va, rights, intent) {
            Ok(translation) => {
                if translation.page_size > PAGE {
                    self.mmu.tlb.note_large(va, translation.page_size);
                }
                let gpa = translation.gpa;
                if intent == Intent::Fetch {
                    self.mmu.tlb.fill_code(rights, va, gpa);
                    self.mmu.note_code_translation(va, translation.global);
                } else if !self.lapic.claims(gpa, self.msrs.apic_base)
                    && let Some(page) = std::sync::Arc::clone(&self.mmu.map).page(gpa)
                {
                    let writable = translation.writable && !page.read_only();
                    if intent == Intent::Write && writable {
                        page.mark_dirty();
                    }
                    // Writes pass only once the page is in the log and while it holds no code.
                    let pass = writable && intent == Intent::Write && page.code() == 0;
                    self.mmu.tlb.fill_data(rights, va, page.host(), pass);
                }
                Ok(gpa)
            }
            Err(fault) => {
                self.fault = Fault { vector: vector::PF, error: fault.0, address: va, ..Fault::default() };
                Err(Stop::Fault)
            }
        }
    }

    fn device_read(&mut self, gpa: u64, out: &mut [u8]) {
        if self.lapic.claims(gpa, self.msrs.apic_base) {
            let value = self.lapic_mmio_read((gpa & (PAGE - 1)) as u16);
            let bytes = value.to_le_bytes();
            for (index, byte) in out.iter_mut().enumerate() {
                *byte = bytes.get(index + (gpa & 3) as usize).copied().unwrap_or(0);
            }
            return;
        }
        self.fpu.settle();
        self.io_accesses += 1;
        out.fill(0xff);
        for part in device_pieces(gpa, out.len()) {
            let target = &mut out[part.0..part.0 + part.1];
            let flow = self.io.with(|io| io.mmio_read(gpa + part.0 as u64, target));
            self.follow(flow);
        }
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        if self.lapic.claims(gpa, self.msrs.apic_base) {
            if let &[a, b, c, d, ..] = data
                && gpa & 3 == 0
            {
                self.lapic_mmio_write((gpa & (PAGE - 1)) as u16, u32::from_le_bytes([a, b, c, d]));
            }
            return;
        }
        self.fpu.settle();
        self.io_accesses += 1;
        for part in device_pieces(gpa, data.len()) {
            let source = &data[part.0..part.0 + part.1];
            let flow = self.io.with(|io| io.mmio_write(gpa + part.0 as u64, source));
            self.follow(flow);
        }
    }

    /// Segment base of FS or GS as 64-bit mode uses it, zero for the others.
    pub(crate) fn flat_base(&self, seg: usize) -> u64 {
        if self.code64() && seg < FS { 0 } else { self.seg_base[seg & 7] }
    }
}

/// LOCK CMPXCHG until nobody interfered.
#[inline(always)]
fn exchange_loop<W: Word, T>(ptr: HostPtr, change: &mut impl FnMut(W) -> (W, T)) -> T {
    let mut old = W::load(ptr);
    loop {
        let (new, kept) = change(old);
        let seen = W::compare_exchange(ptr, old, new);
        if seen == old {
            return kept;
        }
        old = seen;
    }
}

/// Bytes from `va` to the end of its page, at most `len`.
#[inline]
pub(crate) fn piece(va: u64, len: usize) -> usize {
    len.min((PAGE - (va & (PAGE - 1))) as usize).min(MAX_PIECE)
}

#[inline]
fn same_page(va: u64, len: usize) -> bool {
    (va & (PAGE - 1)) + len as u64 <= PAGE
}

/// Splits a device access into widths of 1, 2, 4 and 8 bytes: (offset, length).
fn device_pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let left = len - at;
        let whole = [1, 2, 4, 8].contains(&len);
        let width = if whole {
            len
        } else {
            let aligned = 1usize << (gpa + at as u64).trailing_zeros().min(3);
            let fits = 1usize << left.ilog2().min(3);
            aligned.min(fits)
        };
        let part = (at, width);
        at += width;
        Some(part)
    })
}
