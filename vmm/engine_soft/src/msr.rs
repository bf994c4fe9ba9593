//! Model-specific registers, and the pages of the paravirtual clock that two of them name.
//!
//! What is not listed here raises #GP, as on a processor that does not have it. The registers that are saved
//! stand in [`harrier_engine::cpu_state::SAVED_MSRS`].

use harrier_engine::cpu_state::msr;

use crate::cpu::{Cpu, FS, GS, cr0, efer};
use crate::decode::op::{Step, Stop};
use crate::native::mem::Word;
use harrier_engine::cpuid::Features;

/// Hardware configuration register of AMD processors; Linux wants bit 24 (the TSC counts at a constant rate).
const HWCR: u32 = 0xc001_0015;
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// What machine-check banks there are, and the state of a machine check: none.
const MACHINE_CHECK: std::ops::RangeInclusive<u32> = 0x179..=0x17a;
/// The four performance counters that every AMD processor has, and what they count: nothing here.
const COUNTERS: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_0007;
/// Northbridge configuration; Linux reads it and switches on extended configuration cycles, which nobody makes.
const NB_CFG: u32 = 0xc001_001f;
/// Debug control: last branches, branch trace. Nothing of it is there.
const DEBUGCTL: u32 = 0x1d9;

impl Cpu {
    /// RDMSR; #GP(0) for what is not there.
    pub(crate) fn read_msr(&mut self, index: u32) -> Result<u64, Stop> {
        Ok(match index {
            msr::IA32_TSC => self.tsc(),
            msr::IA32_APIC_BASE => self.msrs.apic_base,
            msr::IA32_TSC_ADJUST if self.features.has(Features::TSC_ADJUST) => self.msrs.tsc_adjust,
            msr::IA32_BIOS_SIGN_ID | DEBUGCTL | NB_CFG => 0,
            _ if COUNTERS.contains(&index) || MACHINE_CHECK.contains(&index) => 0,
            // No variable or fixed ranges: the default type is for everything.
            msr::IA32_MTRRCAP => 0,
            msr::IA32_SYSENTER_CS => self.msrs.sysenter_cs,
            msr::IA32_SYSENTER_ESP => self.msrs.sysenter_esp,
            msr::IA32_SYSENTER_EIP => self.msrs.sysenter_eip,
            msr::IA32_MISC_ENABLE => self.msrs.misc_enable,
            msr::IA32_PAT => self.msrs.pat,
            msr::IA32_MTRR_DEF_TYPE => self.msrs.mtrr_def_type,
            msr::IA32_TSC_DEADLINE => self.tsc_deadline(),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => self.read_x2apic(index - msr::X2APIC_FIRST)?,
            msr::EFER => self.efer,
            msr::STAR => self.msrs.star,
            msr::LSTAR => self.msrs.lstar,
            msr::CSTAR => self.msrs.cstar,
            msr::SFMASK => self.msrs.sfmask,
            msr::FS_BASE => self.seg[FS].base,
            msr::GS_BASE => self.seg[GS].base,
            msr::KERNEL_GS_BASE => self.msrs.kernel_gs_base,
            msr::TSC_AUX if self.features.has(Features::RDTSCP) => self.msrs.tsc_aux,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.msrs.kvm_wall_clock,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => self.msrs.kvm_system_time,
            HWCR => HWCR_TSC_FREQ_SEL,
            _ => {
                log::debug!("vcpu {}: rdmsr {index:#x} refused", self.index);
                return self.raise_gp();
            }
        })
    }

    /// WRMSR; #GP(0) for what is not there or cannot be set so. Nothing changes then.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Step {
        match index {
            // User code on the host's processor reads its counter, which nobody can move.
            msr::IA32_TSC | msr::IA32_TSC_ADJUST if self.shared.clock.is_native() => {}
            msr::IA32_TSC => {
                let by = value.wrapping_sub(self.tsc());
                self.tsc_offset = self.tsc_offset.wrapping_add(by);
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(by);
                self.tsc_moved();
            }
            msr::IA32_APIC_BASE => self.write_apic_base(value)?,
            msr::IA32_TSC_ADJUST if self.features.has(Features::TSC_ADJUST) => {
                let by = value.wrapping_sub(self.msrs.tsc_adjust);
                self.tsc_offset = self.tsc_offset.wrapping_add(by);
                self.msrs.tsc_adjust = value;
                self.tsc_moved();
            }
            // The revision is written before it is read; there is none.
            msr::IA32_BIOS_SIGN_ID | NB_CFG => {}
            _ if COUNTERS.contains(&index) => {}
            msr::IA32_SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            msr::IA32_SYSENTER_ESP => self.msrs.sysenter_esp = self.canonical_value(value)?,
            msr::IA32_SYSENTER_EIP => self.msrs.sysenter_eip = self.canonical_value(value)?,
            msr::IA32_MISC_ENABLE => self.msrs.misc_enable = value,
            msr::IA32_PAT if pat_valid(value) => self.msrs.pat = value,
            msr::IA32_MTRR_DEF_TYPE if value & !0xcff == 0 && memory_type(value as u8) => {
                self.msrs.mtrr_def_type = value;
            }
            msr::IA32_TSC_DEADLINE => self.set_tsc_deadline(value),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => self.write_x2apic(index - msr::X2APIC_FIRST, value)?,
            msr::EFER => self.write_efer(value)?,
            msr::STAR => self.msrs.star = value,
            msr::LSTAR => self.msrs.lstar = self.canonical_value(value)?,
            msr::CSTAR => self.msrs.cstar = self.canonical_value(value)?,
            msr::SFMASK => self.msrs.sfmask = value & 0xffff_ffff,
            msr::FS_BASE | msr::GS_BASE => {
                let base = self.canonical_value(value)?;
                let segment = if index == msr::FS_BASE { FS } else { GS };
                self.seg[segment].base = base;
                self.seg_base[segment] = base;
            }
            msr::KERNEL_GS_BASE => self.msrs.kernel_gs_base = self.canonical_value(value)?,
            msr::TSC_AUX if self.features.has(Features::RDTSCP) && value >> 32 == 0 => {
                self.msrs.tsc_aux = value;
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.msrs.kvm_wall_clock = value;
                self.write_wall_clock(value);
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.msrs.kvm_system_time = value;
                self.write_clock_page();
            }
            HWCR if value == HWCR_TSC_FREQ_SEL => {}
            DEBUGCTL if value == 0 => {}
            _ => {
                log::debug!("vcpu {}: wrmsr {index:#x} = {value:#x} refused", self.index);
                return self.raise_gp();
            }
        }
        Ok(())
    }

    fn canonical_value(&mut self, value: u64) -> Result<u64, Stop> {
        if canonical(value) { Ok(value) } else { self.raise_gp() }
    }

    /// EFER: LMA is the processor's, LME is fixed while paging is on.
    fn write_efer(&mut self, value: u64) -> Step {
        let known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        let paging = self.cr0 & cr0::PG != 0;
        if value & !known != 0 || (paging && (value ^ self.efer) & efer::LME != 0) {
            return self.raise_gp();
        }
        self.efer = (value & !efer::LMA) | (self.efer & efer::LMA);
        self.mode_changed();
        Ok(())
    }

    fn tsc_moved(&mut self) {
        self.rearm_tsc_deadline();
        self.write_clock_page();
    }

    /// Writes this processor's clock page, if the guest has named one: how TSC ticks become nanoseconds of the
    /// paravirtual clock (struct pvclock_vcpu_time_info, Linux Documentation/virt/kvm/x86/msr.rst).
    pub(crate) fn write_clock_page(&mut self) {
        self.clock_seen = self.shared.clock.generation();
        let at = self.msrs.kvm_system_time;
        if at & 1 == 0 {
            return;
        }
        let gpa = at & !1;
        let clock = &self.shared.clock;
        let now_ns = clock.host_ns();
        let tsc = clock.ticks_at(now_ns).wrapping_add(self.tsc_offset);
        let system = clock.guest_ns_at(now_ns);
        let (multiplier, shift) = harrier_engine::clock_scale(clock.tsc_khz());
        /// The pages of all processors agree, because all TSCs do.
        const STABLE: u32 = 1;
        let words = [
            tsc as u32,
            (tsc >> 32) as u32,
            system as u32,
            (system >> 32) as u32,
            multiplier,
            u32::from(shift as u8) | STABLE << 8,
        ];
        // While the version is odd the reader waits.
        let version = self.read_physical(gpa) | 1;
        self.write_physical(gpa, version);
        for (index, word) in words.into_iter().enumerate() {
            self.write_physical(gpa.wrapping_add(8 + 4 * index as u64), word);
        }
        self.write_physical(gpa, version.wrapping_add(1));
    }

    /// Writes the wall clock at the paravirtual clock's zero (struct pvclock_wall_clock).
    fn write_wall_clock(&mut self, gpa: u64) {
        let epoch = self.shared.clock.guest_epoch();
        let version = self.read_physical(gpa) | 1;
        self.write_physical(gpa, version);
        self.write_physical(gpa.wrapping_add(4), epoch.as_secs() as u32);
        self.write_physical(gpa.wrapping_add(8), epoch.subsec_nanos());
        self.write_physical(gpa, version.wrapping_add(1));
    }

    /// A word of memory by guest physical address; zero where there is none.
    fn read_physical(&self, gpa: u64) -> u32 {
        let inside = gpa & 0xfff <= 0xffc;
        self.mmu.map.page(gpa).filter(|_| inside).map_or(0, |page| u32::load(page.ptr(gpa)))
    }

    /// Writes a word of memory by guest physical address, logged like every write; nothing where there is none.
    fn write_physical(&mut self, gpa: u64, value: u32) {
        let map = std::sync::Arc::clone(&self.mmu.map);
        let Some(page) = map.page(gpa).filter(|page| !page.read_only() && gpa & 0xfff <= 0xffc) else {
            return;
        };
        page.mark_dirty();
        u32::store(page.ptr(gpa), value);
        let chunks = crate::mmu::map::chunk_mask(gpa & 0xfff, 4) & page.code();
        if chunks != 0 {
            page.remove_code(chunks);
            self.shared.code_written(gpa & !0xfff, chunks);
        }
    }
}

/// Whether an address has equal bits 63 to 47, whatever the paging mode.
pub(crate) fn canonical(value: u64) -> bool {
    ((value as i64) << 16 >> 16) as u64 == value
}

/// Memory types that MTRRs and the PAT know (Intel SDM volume 3, table 13-10).
fn memory_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

/// Whether all eight entries of a PAT are memory types; UC- is one there.
pub(crate) fn pat_valid(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|entry| memory_type(entry) || entry == 7)
}
