//! The state in which the boot processor starts.

use harrier_engine::GuestMemory;
use harrier_engine::cpu_state::{CpuState, DescriptorTable, MpState, Segment};

use super::{KernelError, write};
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// The selectors that Linux's 64-bit boot protocol wants; the protected-mode ones use the same table.
const CODE_64: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const CODE_32: u16 = 0x28;

/// Where and in which mode the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 16-bit real mode.
    Real {
        /// Code segment; its base is 16 times that.
        cs: u16,
        /// Offset in it.
        ip: u16,
    },
    /// 32-bit protected mode without paging, flat segments.
    Protected32 {
        /// First instruction.
        eip: u32,
        /// EAX.
        eax: u32,
        /// EBX.
        ebx: u32,
    },
    /// 64-bit mode; the first 4 GiB are mapped to themselves.
    Long64 {
        /// First instruction.
        rip: u64,
        /// RSI.
        rsi: u64,
    },
}

impl Entry {
    /// Changes the state after RESET to this entry, and writes the descriptors that it uses (and for a flat
    /// image in 64-bit mode the page tables) to guest memory.
    ///
    /// # Errors
    /// [`KernelError::NoRoom`] if low memory is missing.
    pub fn apply(&self, state: &mut CpuState, memory: &GuestMemory) -> Result<(), KernelError> {
        state.regs = Default::default();
        state.regs.rflags = 2;
        state.mp_state = MpState::Runnable;
        match *self {
            Entry::Real { cs, ip } => {
                state.segments.cs.selector = cs;
                state.segments.cs.base = u64::from(cs) << 4;
                state.regs.rip = ip.into();
            }
            Entry::Protected32 { eip, eax, ebx } => {
                self.enter_flat(state, memory)?;
                state.segments.cs = Segment::flat(CODE_32, 0xb, false);
                state.control.cr0 = CR0_PE | CR0_ET;
                state.control.cr4 = 0;
                state.control.efer = 0;
                state.regs.rip = eip.into();
                let [rax, _, _, rbx, ..] = &mut state.regs.gpr;
                *rax = eax.into();
                *rbx = ebx.into();
            }
            Entry::Long64 { rip, rsi } => {
                super::linux::write_identity_page_tables(memory)?;
                self.enter_flat(state, memory)?;
                state.segments.cs = Segment::flat(CODE_64, 0xb, true);
                state.control.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
                state.control.cr3 = BOOT_PAGE_TABLES;
                state.control.cr4 = CR4_PAE;
                state.control.efer = EFER_LME | EFER_LMA;
                state.regs.rip = rip;
                let [_, _, _, _, rsp, _, source, ..] = &mut state.regs.gpr;
                *rsp = BOOT_STACK;
                *source = rsi;
            }
        }
        Ok(())
    }

    fn enter_flat(&self, state: &mut CpuState, memory: &GuestMemory) -> Result<(), KernelError> {
        let table: [u64; 6] = [
            0,
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x0000_8b00_0000_0067,
            0x00cf_9b00_0000_ffff,
        ];
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
        write(memory, BOOT_GDT, "the segment descriptors", &bytes)?;
        let segments = &mut state.segments;
        let data = Segment::flat(DATA, 3, false);
        for segment in
            [&mut segments.ds, &mut segments.es, &mut segments.fs, &mut segments.gs, &mut segments.ss]
        {
            *segment = data;
        }
        segments.tr = Segment { selector: TASK, limit: 0x67, kind: 0xb, present: true, ..Default::default() };
        segments.ldtr = Segment { unusable: true, ..Default::default() };
        segments.gdtr = DescriptorTable { base: BOOT_GDT, limit: bytes.len() as u16 - 1 };
        segments.idtr = DescriptorTable::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    /// The segment that loading `selector` from the table in memory would give.
    fn descriptor(memory: &GuestMemory, selector: u16) -> (u64, u32, u8, u8) {
        let raw: u64 = memory.read_obj(GuestAddress(BOOT_GDT + u64::from(selector))).unwrap();
        let base = (raw >> 16 & 0xff_ffff) | (raw >> 56) << 24;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        let limit = if raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit };
        (base, limit, (raw >> 40) as u8, (raw >> 52) as u8 & 0xf)
    }

    #[test]
    fn loaded_segments_agree_with_the_descriptors_in_memory() {
        for entry in [Entry::Long64 { rip: 1, rsi: 2 }, Entry::Protected32 { eip: 1, eax: 2, ebx: 3 }] {
            let memory = memory();
            let mut state = CpuState::default();
            entry.apply(&mut state, &memory).unwrap();
            let s = &state.segments;
            for segment in [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr] {
                let access = segment.kind | u8::from(segment.code_or_data) << 4 | 0x80;
                let flags = u8::from(segment.long) << 1
                    | u8::from(segment.db) << 2
                    | u8::from(segment.granularity) << 3;
                assert_eq!(
                    (segment.base, segment.limit, access, flags),
                    descriptor(&memory, segment.selector),
                    "{segment:?}"
                );
            }
        }
    }

    #[test]
    fn each_mode_has_its_control_registers() {
        let memory = memory();
        let mut state = CpuState::default();
        Entry::Long64 { rip: 0x10_0200, rsi: 0x7000 }.apply(&mut state, &memory).unwrap();
        assert_eq!((state.regs.rip, state.regs.gpr[6], state.regs.rflags), (0x10_0200, 0x7000, 2));
        assert_eq!((state.control.cr0, state.control.efer), (0x8000_0031, 0x500));
        Entry::Protected32 { eip: 5, eax: 6, ebx: 7 }.apply(&mut state, &memory).unwrap();
        assert_eq!((state.regs.rip, state.regs.gpr[0], state.regs.gpr[3]), (5, 6, 7));
        assert_eq!((state.control.cr0, state.control.cr4, state.control.efer), (0x11, 0, 0));
        let mut state = CpuState::default();
        Entry::Real { cs: 0xf000, ip: 0xfff0 }.apply(&mut state, &memory).unwrap();
        assert_eq!((state.segments.cs.base, state.regs.rip), (0xf_0000, 0xfff0));
    }
}
