//! The processor's state after RESET, and its way to and from the seam's [`CpuState`].

use std::sync::Arc;

use harrier_engine::cpu_state::{
    ControlRegisters, DescriptorTable, Events, GeneralRegisters, MpState, PendingException, SAVED_MSRS,
    Segment, SegmentRegisters, Tsc, msr,
};
use harrier_engine::cpuid::Features;
use harrier_engine::{CpuState, EngineError};

use crate::cpu::{CS, Cpu, DS, ES, FS, GS, Msrs, SS, cr0, cr4, efer, rflags};
use crate::cpuid::FeatureRules as _;
use crate::decode::Mode;
use crate::decode::op::REG_ZERO;
use crate::exception::dr6;
use crate::fault::{Fault, has_error_code, vector};
use crate::fpu::Fpu;
use crate::io_slot::IoSlot;
use crate::lapic::{Lapic, base, reg};
use crate::lend::LentPages;
use crate::mmu::{Mmu, PHYSICAL_BITS};
use crate::msr::{canonical, pat_valid};
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
            nmi_second: false,
            nmi_masked: false,
            debug_trap: 0,
            step_trap: false,
            unfinished: false,
            pending_exception: None,
            pending_interrupt: None,
            triple_fault: false,
            unsupported: None,
            features: crate::native::host::features(shared.config.cpu_model),
            tsc_offset: 0,
            clock_seen: 0,
            lent: LentPages::default(),
            io: IoSlot::default(),
            shared,
            index,
            spins: 0,
            io_accesses: 0,
        };
        cpu.mmu.gigabyte_pages = cpu.features.has(Features::PDPE1GB);
        cpu.reset_registers();
        cpu.msrs.apic_base = 0xfee0_0800 | if index == 0 { 0x100 } else { 0 };
        cpu.msrs.pat = 0x0007_0406_0007_0406;
        cpu.msrs.misc_enable = 1;
        cpu.publish_apic();
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

    /// Forgets everything that was under way between two instructions.
    pub(crate) fn reset_events(&mut self) {
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.nmi_pending = false;
        self.nmi_second = false;
        self.nmi_masked = false;
        self.debug_trap = 0;
        self.step_trap = false;
        self.unfinished = false;
        self.alone = false;
        self.pending_exception = None;
        self.pending_interrupt = None;
        self.attention = true;
    }

    /// The state in the seam's terms. The vCPU does not run.
    pub(crate) fn save(&mut self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        let clock = &self.shared.clock;
        let now_ns = clock.host_ns();
        // A timer whose time has come and that was not looked at yet would be one that is not armed.
        self.lapic.expire(now_ns);
        let tsc = clock.ticks_at(now_ns).wrapping_add(self.tsc_offset);
        // A trap that waits has its cause in DR6 already.
        let trap =
            (self.debug_trap != 0).then_some(PendingException { vector: vector::DB, error_code: None });
        CpuState {
            regs: GeneralRegisters { gpr, rip: self.rip, rflags: self.rflags() },
            segments: SegmentRegisters {
                es: canonical_segment(&self.seg[ES]),
                cs: canonical_segment(&self.seg[CS]),
                ss: canonical_segment(&self.seg[SS]),
                ds: canonical_segment(&self.seg[DS]),
                fs: canonical_segment(&self.seg[FS]),
                gs: canonical_segment(&self.seg[GS]),
                ldtr: canonical_segment(&self.ldtr),
                tr: canonical_segment(&self.tr),
                gdtr: self.gdtr,
                idtr: self.idtr,
            },
            control: ControlRegisters {
                cr0: self.cr0,
                cr2: self.cr2,
                cr3: self.cr3,
                cr4: self.cr4,
                cr8: u64::from(self.lapic.task_priority() >> 4),
                efer: self.efer,
                xcr0: self.xcr0,
            },
            debug_addresses: self.dr,
            dr6: self.dr6 | self.debug_trap,
            dr7: self.dr7,
            xsave: self.fpu.to_xsave(self.xcr0),
            msrs: SAVED_MSRS
                .iter()
                .filter_map(|&index| self.saved_msr(index, now_ns).map(|value| (index, value)))
                .collect(),
            lapic: self.lapic.save(now_ns),
            events: Events {
                exception: self.pending_exception.or(trap),
                interrupt: self.pending_interrupt,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
                sti_shadow: self.sti_shadow,
                mov_ss_shadow: self.mov_ss_shadow,
            },
            tsc: Tsc { value: tsc, frequency_khz: clock.tsc_khz() },
            mp_state: self.mp_state,
        }
    }

    fn saved_msr(&self, index: u32, now_ns: u64) -> Option<u64> {
        let msrs = &self.msrs;
        Some(match index {
            msr::IA32_APIC_BASE => msrs.apic_base,
            msr::IA32_TSC_ADJUST => msrs.tsc_adjust,
            msr::IA32_SYSENTER_CS => msrs.sysenter_cs,
            msr::IA32_SYSENTER_ESP => msrs.sysenter_esp,
            msr::IA32_SYSENTER_EIP => msrs.sysenter_eip,
            msr::IA32_MISC_ENABLE => msrs.misc_enable,
            msr::IA32_PAT => msrs.pat,
            msr::IA32_MTRR_DEF_TYPE => msrs.mtrr_def_type,
            msr::IA32_TSC_DEADLINE => self.saved_tsc_deadline(now_ns),
            msr::KVM_WALL_CLOCK_NEW => msrs.kvm_wall_clock,
            msr::KVM_SYSTEM_TIME_NEW => msrs.kvm_system_time,
            msr::STAR => msrs.star,
            msr::LSTAR => msrs.lstar,
            msr::CSTAR => msrs.cstar,
            msr::SFMASK => msrs.sfmask,
            msr::KERNEL_GS_BASE => msrs.kernel_gs_base,
            msr::TSC_AUX => msrs.tsc_aux,
            _ => return None,
        })
    }

    /// Takes over a state, after checking all of it: on an error the processor is as it was.
    pub(crate) fn restore(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.check(state)?;
        let mut fpu = Fpu::default();
        fpu.from_xsave(&state.xsave, state.control.xcr0).map_err(|bad| refuse("xsave", bad.0))?;
        self.fpu = fpu;

        self.regs[..16].copy_from_slice(&state.regs.gpr);
        self.rip = state.regs.rip;
        let segments = &state.segments;
        self.seg = [segments.es, segments.cs, segments.ss, segments.ds, segments.fs, segments.gs];
        self.ldtr = segments.ldtr;
        self.tr = segments.tr;
        self.gdtr = segments.gdtr;
        self.idtr = segments.idtr;
        let control = &state.control;
        self.cr0 = control.cr0 | cr0::ET;
        self.cr2 = control.cr2;
        self.cr3 = control.cr3;
        self.cr4 = control.cr4;
        self.efer = control.efer;
        self.xcr0 = control.xcr0;
        self.dr = state.debug_addresses;
        self.dr6 = (state.dr6 & dr6::WRITABLE) | dr6::FIXED;
        self.dr7 = (state.dr7 & 0xffff_2bff) | 0x400;
        self.cpl = privilege(state);
        self.set_rflags(state.regs.rflags);

        self.reset_events();
        self.leave = false;
        self.triple_fault = false;
        self.unsupported = None;
        let events = &state.events;
        self.pending_exception = events.exception;
        self.pending_interrupt = events.interrupt;
        self.nmi_pending = events.nmi_pending;
        self.nmi_masked = events.nmi_masked;
        self.sti_shadow = events.sti_shadow;
        self.mov_ss_shadow = events.mov_ss_shadow;
        self.mp_state = state.mp_state;

        for &(index, value) in &state.msrs {
            self.put_saved_msr(index, value);
        }
        let clock = Arc::clone(&self.shared);
        let now_ns = clock.clock.host_ns();
        let offset = state.tsc.value.wrapping_sub(clock.clock.ticks_at(now_ns));
        // Without its own adjustment, every processor of a machine has the same offset.
        let adjust = self.msrs.tsc_adjust;
        let common = clock.clock.common_offset(offset.wrapping_sub(adjust));
        self.tsc_offset = if clock.clock.is_native() { 0 } else { common.wrapping_add(adjust) };

        // APIC_BASE, the registers, the TSC, then its deadline.
        let x2apic = self.msrs.apic_base & base::MODE == base::MODE;
        self.lapic.restore(&state.lapic, x2apic, now_ns);
        self.lapic.set_task_priority((state.control.cr8 as u8) << 4 | self.lapic.task_priority() & 0xf);
        if let Some(&(_, deadline)) = state.msrs.iter().find(|(index, _)| *index == msr::IA32_TSC_DEADLINE) {
            let deadline = if clock.clock.is_native() && deadline != 0 {
                // The counter jumps to the host's; the time that is left does not.
                let left = u128::from(deadline.saturating_sub(state.tsc.value));
                let khz = u128::from(state.tsc.frequency_khz.max(1));
                let left = (left * u128::from(clock.clock.tsc_khz()) / khz) as u64;
                clock.clock.ticks_at(now_ns).saturating_add(left)
            } else {
                deadline
            };
            self.set_tsc_deadline(deadline);
        }
        self.publish_apic();

        self.mmu.set_paging(self.cr0, self.cr3, self.cr4, self.efer);
        if self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && self.efer & efer::LMA == 0 {
            self.mmu.load_pdptes(self.cr3);
        }
        self.mmu.flush();
        self.mode_changed();
        self.breakpoints_changed();
        self.write_clock_page();
        Ok(())
    }

    fn put_saved_msr(&mut self, index: u32, value: u64) {
        let msrs = &mut self.msrs;
        match index {
            msr::IA32_APIC_BASE => msrs.apic_base = value,
            msr::IA32_TSC_ADJUST => msrs.tsc_adjust = value,
            msr::IA32_SYSENTER_CS => msrs.sysenter_cs = value & 0xffff_ffff,
            msr::IA32_SYSENTER_ESP => msrs.sysenter_esp = value,
            msr::IA32_SYSENTER_EIP => msrs.sysenter_eip = value,
            msr::IA32_MISC_ENABLE => msrs.misc_enable = value,
            msr::IA32_PAT => msrs.pat = value,
            msr::IA32_MTRR_DEF_TYPE => msrs.mtrr_def_type = value,
            msr::KVM_WALL_CLOCK_NEW => msrs.kvm_wall_clock = value,
            msr::KVM_SYSTEM_TIME_NEW => msrs.kvm_system_time = value,
            msr::STAR => msrs.star = value,
            msr::LSTAR => msrs.lstar = value,
            msr::CSTAR => msrs.cstar = value,
            msr::SFMASK => msrs.sfmask = value & 0xffff_ffff,
            msr::KERNEL_GS_BASE => msrs.kernel_gs_base = value,
            msr::TSC_AUX => msrs.tsc_aux = value & 0xffff_ffff,
            _ => {}
        }
    }

    /// Whether a state is one that a processor of this model can be in.
    fn check(&self, state: &CpuState) -> Result<(), EngineError> {
        let control = &state.control;
        let (cr0, cr4, efer) = (control.cr0, control.cr4, control.efer);
        let paging = cr0 & cr0::PG != 0;
        ensure(cr0 >> 32 == 0 && (!paging || cr0 & cr0::PE != 0), "cr0", || {
            format!("{cr0:#x} is no valid combination of bits")
        })?;
        ensure(control.cr3 >> PHYSICAL_BITS == 0, "cr3", || {
            format!("{:#x} is beyond the {PHYSICAL_BITS} bits of physical addresses", control.cr3)
        })?;
        let extra = cr4 & !self.features.cr4_bits();
        ensure(extra == 0, "cr4", || {
            format!("bits {extra:#x} are not in cpu model {}", self.shared.config.cpu_model)
        })?;
        let extra = efer & !(efer::SCE | efer::LME | efer::LMA | efer::NXE);
        ensure(extra == 0, "efer", || format!("bits {extra:#x} are not supported"))?;
        let active = paging && efer & efer::LME != 0;
        ensure((efer & efer::LMA != 0) == active, "efer", || {
            format!("{efer:#x}: long mode is active exactly when it is enabled and paging is on")
        })?;
        ensure(!active || cr4 & cr4::PAE != 0, "cr4", || "long mode needs PAE".to_owned())?;
        ensure(control.cr8 < 16, "cr8", || format!("{} is above 15", control.cr8))?;
        let xcr0 = control.xcr0;
        ensure(xcr0 & 1 != 0 && xcr0 & !7 == 0 && (xcr0 & 4 == 0 || xcr0 & 2 != 0), "xcr0", || {
            format!("{xcr0:#x} is no valid set of components")
        })?;
        ensure(state.regs.rflags & !RFLAGS_BITS == 0, "rflags", || {
            format!("{:#x} has reserved bits set", state.regs.rflags)
        })?;
        let v86 = state.regs.rflags & rflags::VM != 0;
        ensure(!v86 || (cr0 & cr0::PE != 0 && !active), "rflags", || {
            "VM is set outside protected mode".to_owned()
        })?;
        let cs = &state.segments.cs;
        ensure(!cs.unusable, "cs", || "the code segment is unusable".to_owned())?;
        let code64 = active && cs.long;
        ensure(!(active && cs.long && cs.db), "cs", || "both L and D are set".to_owned())?;
        let reach = if code64 { canonical(state.regs.rip) } else { state.regs.rip >> 32 == 0 };
        ensure(reach, "rip", || format!("{:#x} cannot be reached in this mode", state.regs.rip))?;
        for (segment, field) in [
            (&state.segments.fs, "fs"),
            (&state.segments.gs, "gs"),
            (&state.segments.ldtr, "ldtr"),
            (&state.segments.tr, "tr"),
        ] {
            ensure(canonical(segment.base), field, || format!("base {:#x} is not canonical", segment.base))?;
        }
        for (segment, field) in
            [(&state.segments.es, "es"), (cs, "cs"), (&state.segments.ss, "ss"), (&state.segments.ds, "ds")]
        {
            ensure(segment.base >> 32 == 0, field, || {
                format!("base {:#x} has more than 32 bits", segment.base)
            })?;
        }
        let all = &state.segments;
        for segment in [&all.es, cs, &all.ss, &all.ds, &all.fs, &all.gs, &all.ldtr, &all.tr] {
            ensure(segment.kind < 16 && segment.dpl < 4, "segments", || {
                format!("type {} or privilege {} does not fit its bits", segment.kind, segment.dpl)
            })?;
        }
        for (table, field) in [(&state.segments.gdtr, "gdtr"), (&state.segments.idtr, "idtr")] {
            ensure(canonical(table.base), field, || format!("base {:#x} is not canonical", table.base))?;
        }
        ensure(state.dr6 >> 32 == 0, "dr6", || format!("{:#x} has more than 32 bits", state.dr6))?;
        ensure(state.dr7 >> 32 == 0, "dr7", || format!("{:#x} has more than 32 bits", state.dr7))?;
        self.check_msrs(state)?;
        let khz = self.shared.clock.tsc_khz();
        let right = state.tsc.frequency_khz == khz || self.shared.clock.is_native();
        ensure(right, "tsc frequency", || {
            format!("{} kHz, this machine was created with {khz} kHz", state.tsc.frequency_khz)
        })?;
        let id = state.lapic.registers[reg::ID];
        ensure(id == self.index, "lapic", || format!("apic id {id}, this is vcpu {}", self.index))?;
        if let Some(exception) = &state.events.exception {
            ensure(exception.vector < 32, "events", || {
                format!("exception vector {} is above 31", exception.vector)
            })?;
            ensure(exception.error_code.is_some() == has_error_code(exception.vector), "events", || {
                format!("exception {} has an error code, or lacks it", exception.vector)
            })?;
        }
        if let Some(vector) = state.events.interrupt {
            ensure(vector >= 16, "events", || format!("interrupt vector {vector} is below 16"))?;
        }
        Ok(())
    }

    fn check_msrs(&self, state: &CpuState) -> Result<(), EngineError> {
        for &(index, value) in &state.msrs {
            ensure(SAVED_MSRS.contains(&index), "msrs", || format!("{index:#x} is not one that is saved"))?;
            let valid = match index {
                msr::IA32_APIC_BASE => {
                    let reserved = !(((1 << PHYSICAL_BITS) - 1) & !0xfff | base::BOOTSTRAP | base::MODE);
                    value & reserved == 0 && value & base::MODE != base::X2APIC
                }
                msr::IA32_PAT => pat_valid(value),
                msr::IA32_SYSENTER_ESP
                | msr::IA32_SYSENTER_EIP
                | msr::LSTAR
                | msr::CSTAR
                | msr::KERNEL_GS_BASE => canonical(value),
                _ => true,
            };
            ensure(valid, "msrs", || format!("{value:#x} is no value for {index:#x}"))?;
        }
        Ok(())
    }
}

/// Bits of RFLAGS that exist.
const RFLAGS_BITS: u64 = 0x3f_7fd7;

fn refuse(field: &'static str, reason: String) -> EngineError {
    EngineError::State { field, reason }
}

fn ensure(valid: bool, field: &'static str, reason: impl FnOnce() -> String) -> Result<(), EngineError> {
    if valid { Ok(()) } else { Err(refuse(field, reason())) }
}

/// Current privilege level of a state: that of the stack segment, where it is usable.
fn privilege(state: &CpuState) -> u8 {
    if state.control.cr0 & cr0::PE == 0 {
        0
    } else if state.regs.rflags & rflags::VM != 0 {
        3
    } else if state.segments.ss.unusable {
        (state.segments.cs.selector & 3) as u8
    } else {
        state.segments.ss.dpl & 3
    }
}

/// A segment register as snapshots hold it: unusable ones are empty but for selector and, where it counts, base.
fn canonical_segment(segment: &Segment) -> Segment {
    if segment.unusable {
        Segment { selector: segment.selector, base: segment.base, unusable: true, ..Segment::default() }
    } else {
        *segment
    }
}
