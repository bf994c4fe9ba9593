//! Pending events, interrupt shadows and whether the processor executes.

use harrier_engine::cpu_state::{Events, MpState, PendingException};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_mp_state, kvm_vcpu_events,
};

pub(super) fn from_kvm(events: &kvm_vcpu_events) -> Events {
    let exception = &events.exception;
    let shadow = u32::from(events.interrupt.shadow);
    Events {
        exception: (exception.injected != 0 || exception.pending != 0).then(|| PendingException {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
        }),
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        // An NMI whose delivery had begun is one that waits: its delivery begins again.
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        nmi_masked: events.nmi.masked != 0 && events.nmi.injected == 0,
        sti_shadow: shadow & KVM_X86_SHADOW_INT_STI != 0,
        mov_ss_shadow: shadow & KVM_X86_SHADOW_INT_MOV_SS != 0,
    }
}

pub(super) fn to_kvm(events: &Events) -> kvm_vcpu_events {
    let mut kvm = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = &events.exception {
        kvm.exception.injected = 1;
        kvm.exception.nr = exception.vector;
        kvm.exception.has_error_code = exception.error_code.is_some().into();
        kvm.exception.error_code = exception.error_code.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        kvm.interrupt.injected = 1;
        kvm.interrupt.nr = vector;
    }
    kvm.nmi.pending = events.nmi_pending.into();
    kvm.nmi.masked = events.nmi_masked.into();
    if events.sti_shadow {
        kvm.interrupt.shadow |= KVM_X86_SHADOW_INT_STI as u8;
    }
    if events.mov_ss_shadow {
        kvm.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS as u8;
    }
    kvm
}

/// `None` for states that KVM has on other architectures only.
pub(super) fn mp_state_from_kvm(state: kvm_mp_state) -> Option<MpState> {
    match state.mp_state {
        KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_SIPI_RECEIVED => Some(MpState::Runnable),
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Some(MpState::WaitForSipi),
        KVM_MP_STATE_HALTED => Some(MpState::Halted),
        _ => None,
    }
}

pub(crate) fn mp_state_to_kvm(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // Not UNINITIALIZED: KVM would ignore a start-up message that no INIT precedes.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_way_to_kvm_and_back() {
        let all = Events {
            exception: Some(PendingException { vector: 14, error_code: Some(6) }),
            interrupt: Some(0x31),
            nmi_pending: true,
            nmi_masked: true,
            sti_shadow: true,
            mov_ss_shadow: true,
        };
        assert_eq!(from_kvm(&to_kvm(&all)), all);
        assert_eq!(from_kvm(&to_kvm(&Events::default())), Events::default());
    }

    #[test]
    fn an_nmi_in_delivery_waits_again() {
        let mut kvm = kvm_vcpu_events::default();
        kvm.nmi.injected = 1;
        kvm.nmi.masked = 1;
        let events = from_kvm(&kvm);
        assert!(events.nmi_pending && !events.nmi_masked);
    }

    #[test]
    fn every_processor_state_survives() {
        for state in [MpState::Runnable, MpState::Halted, MpState::WaitForSipi] {
            assert_eq!(mp_state_from_kvm(mp_state_to_kvm(state)), Some(state));
        }
    }
}
