//! The whole state of a vCPU, between KVM's structures and the canonical [`CpuState`].
//!
//! [`StateAccess`] knows what this host's KVM has and in which order its parts must be written.

mod events;
mod lapic;
mod msrs;
mod segments;
mod xsave;

use harrier_engine::cpu_state::{MpState, Tsc, msr};
use harrier_engine::{CpuState, EngineError};
use kvm_bindings::{CpuId, kvm_debugregs, kvm_xcrs};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::cpuid;
use crate::host::refused;
pub(crate) use events::mp_state_to_kvm;
pub(crate) use segments::{regs_from_kvm, regs_to_kvm, segment_to_kvm};
pub(crate) use xsave::{Component, XsaveLayout};

/// A TSC that reads further than this from what was written was not taken over by KVM, in milliseconds.
const TSC_TOLERANCE_MS: u64 = 1000;

/// How the state of a vCPU is read and written on this host.
#[derive(Debug)]
pub(crate) struct StateAccess {
    msrs: Vec<u32>,
    xsave: XsaveLayout,
    has_xcrs: bool,
    tsc_khz: u32,
}

fn invalid(field: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> EngineError {
    move |err| EngineError::State { field, reason: format!("KVM refused it ({err})") }
}

impl StateAccess {
    pub(crate) fn new(
        supported: &CpuId,
        vm: &VmFd,
        vcpu: &VcpuFd,
        tsc_khz: u32,
    ) -> Result<Self, EngineError> {
        Ok(StateAccess {
            msrs: msrs::available(vcpu)?,
            xsave: XsaveLayout::new(vm, cpuid::xsave_components(supported)),
            has_xcrs: vm.check_extension(Cap::Xcrs),
            tsc_khz,
        })
    }

    /// Brings a new vCPU into the state after RESET, where KVM's own differs from the manual's.
    pub(crate) fn reset(&self, vcpu: &VcpuFd, index: u32) -> Result<(), EngineError> {
        let mp_state = if index == 0 { MpState::Runnable } else { MpState::WaitForSipi };
        vcpu.set_mp_state(events::mp_state_to_kvm(mp_state))
            .map_err(refused("set whether a vCPU executes"))?;
        // Fast string operations, and no performance monitoring to declare unavailable.
        msrs::write(vcpu, &[(msr::IA32_MISC_ENABLE, 1)])?;
        Ok(())
    }

    /// Reads everything.
    pub(crate) fn get(&self, vcpu: &VcpuFd) -> Result<CpuState, EngineError> {
        // First, because reading it lets KVM act on INIT and start-up messages that have come in.
        let mp_state = vcpu.get_mp_state().map_err(refused("read whether a vCPU executes"))?;
        let mp_state = events::mp_state_from_kvm(mp_state).ok_or_else(|| EngineError::State {
            field: "mp_state",
            reason: format!("KVM's {} is not one of x86", mp_state.mp_state),
        })?;
        let regs = vcpu.get_regs().map_err(refused("read the general registers"))?;
        let sregs = vcpu.get_sregs().map_err(refused("read the segment and control registers"))?;
        let debug = vcpu.get_debug_regs().map_err(refused("read the debug registers"))?;
        let xcr0 = self.xcr0(vcpu)?;
        let kvm_events = vcpu.get_vcpu_events().map_err(refused("read the pending events"))?;
        let lapic = vcpu.get_lapic().map_err(refused("read the local APIC"))?;
        let mut found = msrs::read(vcpu, &self.msrs)?;
        found.sort_unstable_by_key(|&(index, _)| index);
        Ok(CpuState {
            regs: segments::regs_from_kvm(&regs),
            segments: segments::segments_from_kvm(&sregs),
            control: segments::control_from_kvm(&sregs, xcr0),
            debug_addresses: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
            xsave: self.xsave.get(vcpu, xcr0)?,
            msrs: found,
            lapic: lapic::from_kvm(&lapic),
            events: events::from_kvm(&kvm_events),
            tsc: Tsc { value: self.tsc(vcpu)?, frequency_khz: self.tsc_khz },
            mp_state,
        })
    }

    /// Says of a vector whether it was level triggered when it was accepted last, and is neither requested nor
    /// in service.
    pub(crate) fn ended_level_interrupts(&self, vcpu: &VcpuFd) -> Result<impl Fn(u8) -> bool, EngineError> {
        let lapic = vcpu.get_lapic().map_err(refused("read the local APIC"))?;
        let lapic = lapic::from_kvm(&lapic);
        // Registers of 32 vectors each: in service, trigger mode, requested (Intel SDM volume 3, 12.8.4).
        Ok(move |vector: u8| {
            let bit =
                |first: usize| lapic.registers[first + usize::from(vector / 32)] >> (vector % 32) & 1 != 0;
            bit(0x18) && !bit(0x10) && !bit(0x20)
        })
    }

    fn xcr0(&self, vcpu: &VcpuFd) -> Result<u64, EngineError> {
        if !self.has_xcrs {
            return Ok(1);
        }
        let xcrs = vcpu.get_xcrs().map_err(refused("read XCR0"))?;
        let used = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
        Ok(used.filter(|xcr| xcr.xcr == 0).map(|xcr| xcr.value).next().unwrap_or(1))
    }

    /// The time-stamp counter.
    pub(crate) fn tsc(&self, vcpu: &VcpuFd) -> Result<u64, EngineError> {
        Ok(msrs::read(vcpu, &[msr::IA32_TSC])?.first().map_or(0, |&(_, value)| value))
    }

    /// Writes everything.
    pub(crate) fn set(&self, vcpu: &VcpuFd, state: &CpuState) -> Result<(), EngineError> {
        let value_of = |index| state.msrs.iter().find(|(i, _)| *i == index).map(|&(_, value)| value);
        let apic_base = match value_of(msr::IA32_APIC_BASE) {
            Some(base) => base,
            None => vcpu.get_sregs().map_err(refused("read the APIC's base"))?.apic_base,
        };
        // Executing, until all is in place: KVM refuses some of it for a processor that waits.
        vcpu.set_mp_state(events::mp_state_to_kvm(MpState::Runnable)).map_err(invalid("mp_state"))?;
        vcpu.set_regs(&segments::regs_to_kvm(&state.regs)).map_err(invalid("general registers"))?;
        let sregs = segments::sregs_to_kvm(&state.segments, &state.control, apic_base);
        vcpu.set_sregs(&sregs).map_err(invalid("segment and control registers"))?;
        if self.has_xcrs {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = state.control.xcr0;
            vcpu.set_xcrs(&xcrs).map_err(invalid("xcr0"))?;
        } else if state.control.xcr0 != 1 {
            return Err(EngineError::State {
                field: "xcr0",
                reason: "this KVM has no XCR0 (XCRS)".to_owned(),
            });
        }
        self.xsave.set(vcpu, &state.xsave)?;
        let plain: Vec<_> = state
            .msrs
            .iter()
            .copied()
            .filter(|(index, _)| {
                !matches!(*index, msr::IA32_APIC_BASE | msr::IA32_TSC_DEADLINE | msr::IA32_TSC)
            })
            .collect();
        for index in msrs::write(vcpu, &plain)? {
            if plain.iter().any(|&(i, value)| i == index && value != 0) {
                return Err(EngineError::State { field: "msrs", reason: format!("KVM refused {index:#x}") });
            }
        }
        // APIC_BASE (above), the page, the TSC, the deadline: each needs those before it.
        vcpu.set_lapic(&lapic::to_kvm(&state.lapic)).map_err(invalid("lapic"))?;
        self.set_time(vcpu, state, value_of(msr::IA32_TSC_DEADLINE).unwrap_or(0))?;
        let debug =
            kvm_debugregs { db: state.debug_addresses, dr6: state.dr6, dr7: state.dr7, ..Default::default() };
        vcpu.set_debug_regs(&debug).map_err(invalid("debug registers"))?;
        vcpu.set_vcpu_events(&events::to_kvm(&state.events)).map_err(invalid("events"))?;
        vcpu.set_mp_state(events::mp_state_to_kvm(state.mp_state)).map_err(invalid("mp_state"))?;
        #[cfg(debug_assertions)]
        for difference in self.read_back(vcpu, state)? {
            log::warn!("kvm: of the state that was set, {difference} reads back differently on this host");
        }
        Ok(())
    }

    /// Writes what differs between two states of a processor that stands still; its time goes on.
    pub(crate) fn set_changes(
        &self,
        vcpu: &VcpuFd,
        before: &CpuState,
        after: &CpuState,
    ) -> Result<(), EngineError> {
        vcpu.set_regs(&segments::regs_to_kvm(&after.regs)).map_err(invalid("general registers"))?;
        let changed: Vec<_> = after.msrs.iter().copied().filter(|msr| !before.msrs.contains(msr)).collect();
        let apic_base = after.msrs.iter().find(|(index, _)| *index == msr::IA32_APIC_BASE);
        if (&before.segments, &before.control) != (&after.segments, &after.control)
            || changed.iter().any(|(index, _)| *index == msr::IA32_APIC_BASE)
        {
            let apic_base = apic_base.map_or(0, |&(_, value)| value);
            let sregs = segments::sregs_to_kvm(&after.segments, &after.control, apic_base);
            vcpu.set_sregs(&sregs).map_err(invalid("segment and control registers"))?;
        }
        if before.control.xcr0 != after.control.xcr0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = after.control.xcr0;
            vcpu.set_xcrs(&xcrs).map_err(invalid("xcr0"))?;
        }
        if before.xsave != after.xsave {
            self.xsave.set(vcpu, &after.xsave)?;
        }
        // The count of a timer that runs differs always.
        let still = |state: &CpuState| {
            let mut registers = state.lapic.registers;
            registers[0x39] = 0;
            registers
        };
        if still(before) != still(after) {
            vcpu.set_lapic(&lapic::to_kvm(&after.lapic)).map_err(invalid("lapic"))?;
        }
        msrs::write(vcpu, &changed)?;
        if (before.debug_addresses, before.dr6, before.dr7) != (after.debug_addresses, after.dr6, after.dr7) {
            self.set_debug(vcpu, after)?;
        }
        vcpu.set_vcpu_events(&events::to_kvm(&after.events)).map_err(invalid("events"))?;
        if before.mp_state != after.mp_state {
            vcpu.set_mp_state(events::mp_state_to_kvm(after.mp_state)).map_err(invalid("mp_state"))?;
        }
        Ok(())
    }

    fn set_debug(&self, vcpu: &VcpuFd, state: &CpuState) -> Result<(), EngineError> {
        let debug =
            kvm_debugregs { db: state.debug_addresses, dr6: state.dr6, dr7: state.dr7, ..Default::default() };
        vcpu.set_debug_regs(&debug).map_err(invalid("debug registers"))
    }

    /// Sets the TSC where KVM lets us, and the deadline in whatever TSC there is then.
    fn set_time(&self, vcpu: &VcpuFd, state: &CpuState, deadline: u64) -> Result<(), EngineError> {
        let wanted = state.tsc.value;
        msrs::write(vcpu, &[(msr::IA32_TSC, wanted)])?;
        let now = self.tsc(vcpu)?;
        let same_frequency = state.tsc.frequency_khz == self.tsc_khz;
        let taken = same_frequency && now.wrapping_sub(wanted) <= u64::from(self.tsc_khz) * TSC_TOLERANCE_MS;
        let deadline = match deadline {
            0 => 0,
            _ if taken => deadline,
            _ => {
                let left = u128::from(deadline.saturating_sub(wanted));
                let rescaled = left * u128::from(self.tsc_khz) / u128::from(state.tsc.frequency_khz.max(1));
                now.saturating_add(u64::try_from(rescaled).unwrap_or(u64::MAX)).max(1)
            }
        };
        msrs::write(vcpu, &[(msr::IA32_TSC_DEADLINE, deadline)])?;
        Ok(())
    }

    /// The parts of the state that KVM does not show as they were set. Time is not compared: it goes on.
    #[cfg(any(test, debug_assertions))]
    fn read_back(&self, vcpu: &VcpuFd, state: &CpuState) -> Result<Vec<&'static str>, EngineError> {
        let mut set = state.clone();
        let mut got = self.get(vcpu)?;
        for each in [&mut set, &mut got] {
            each.tsc = Tsc::default();
            each.msrs.retain(|(index, value)| *index != msr::IA32_TSC_DEADLINE && *value != 0);
            // The timer's current count.
            each.lapic.registers[0x39] = 0;
        }
        let parts = [
            ("general registers", set.regs == got.regs),
            ("segments", set.segments == got.segments),
            ("control registers", set.control == got.control),
            ("debug registers", {
                (set.debug_addresses, set.dr6, set.dr7) == (got.debug_addresses, got.dr6, got.dr7)
            }),
            ("vector registers", set.xsave == got.xsave),
            ("msrs", set.msrs == got.msrs),
            ("local apic", set.lapic == got.lapic),
            ("events", set.events == got.events),
            ("mp_state", set.mp_state == got.mp_state),
        ];
        Ok(parts.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect())
    }
}
