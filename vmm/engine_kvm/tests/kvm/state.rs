//! The state of a vCPU: canonical form, into a fresh machine, and back again.

use crate::support::{Recorder, engine, machine};
use harrier_engine::cpu_state::{LapicState, MpState, PendingException, Segment, Tsc, msr};
use harrier_engine::{CpuState, EngineError, Exit};

/// Of the state, what does not go on by itself.
fn still(mut state: CpuState) -> CpuState {
    state.tsc = Tsc::default();
    state.lapic.registers[0x39] = 0;
    state
}

#[test]
fn the_state_after_reset_is_the_manuals() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 2);
    let state = machine.vcpus[0].state().unwrap();
    assert_eq!((state.regs.rip, state.regs.rflags), (0xfff0, 2));
    assert_eq!((state.segments.cs.selector, state.segments.cs.base), (0xf000, 0xffff_0000));
    assert_eq!((state.control.xcr0, state.control.efer, state.control.cr4), (1, 0, 0));
    assert_eq!((state.dr6, state.dr7), (0xffff_0ff0, 0x400));
    assert_eq!(state.xsave.len(), 576);
    assert_eq!(state.xsave.iter().filter(|&&byte| byte != 0).count(), 2, "only MXCSR");
    assert!(state.msrs.is_sorted() && state.msrs.contains(&(msr::IA32_APIC_BASE, 0xfee0_0900)));
    assert_eq!(state.lapic.registers[0x35], 0x1_0000, "LINT0 is masked");
    let second = machine.vcpus[1].state().unwrap();
    assert_eq!(second.mp_state, MpState::WaitForSipi);
    assert_eq!(second.lapic.registers[2], 1);
    assert!(second.msrs.contains(&(msr::IA32_APIC_BASE, 0xfee0_0800)));
}

#[test]
fn every_part_of_the_state_reads_back_as_it_was_set() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    machine.start_long(&[0x90]);
    let vcpu = machine.vcpus[0].as_mut();
    let mut state = vcpu.state().unwrap();
    state.regs.gpr = std::array::from_fn(|index| 0x1111_1111_1111_1111 * index as u64);
    state.regs.rflags = 0x246;
    state.control.cr2 = 0xdead_b000;
    state.control.cr8 = 5;
    state.lapic.registers[8] = 0x50;
    state.lapic.registers[0xf] = 0x1ff;
    state.lapic.registers[0xd] = 0x0100_0000;
    state.debug_addresses = [0x1000, 0x2000, 0x3000, 0x4000];
    state.dr7 = 0x401;
    state.segments.gs.base = 0xffff_8000_0000_0000;
    state.segments.es = Segment { unusable: true, ..Segment::default() };
    for byte in &mut state.xsave[160..416] {
        *byte = 0x5a;
    }
    state.xsave[0] = 0x7f;
    state.xsave[1] = 2;
    state.xsave[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    state.xsave[512] = 3;
    let set = |state: &mut CpuState, index, value| {
        for entry in &mut state.msrs {
            if entry.0 == index {
                entry.1 = value;
            }
        }
    };
    set(&mut state, msr::LSTAR, 0xffff_ffff_8000_0000);
    set(&mut state, msr::STAR, 0x0023_0010_0000_0000);
    set(&mut state, msr::KERNEL_GS_BASE, 0x7000);
    set(&mut state, msr::IA32_SYSENTER_EIP, 0x1234);
    state.events.nmi_masked = true;
    state.events.sti_shadow = true;
    state.events.exception = Some(PendingException { vector: 14, error_code: Some(2) });
    state.mp_state = MpState::Halted;
    vcpu.set_state(&state).unwrap();
    let got = vcpu.state().unwrap();
    let (got, state) = (still(got), still(state));
    assert_eq!(got.regs, state.regs);
    assert_eq!(got.segments, state.segments);
    assert_eq!(got.control, state.control);
    assert_eq!((got.debug_addresses, got.dr6, got.dr7), (state.debug_addresses, state.dr6, state.dr7));
    assert_eq!(got.xsave, state.xsave);
    assert_eq!(got.msrs, state.msrs);
    let mut expected_lapic = state.lapic.clone();
    // The processor priority follows from the task priority.
    expected_lapic.registers[0xa] = got.lapic.registers[0xa];
    assert_eq!(got.lapic, expected_lapic);
    assert_eq!(got.events, state.events);
    assert_eq!(got.mp_state, state.mp_state);
}

#[test]
fn a_guest_goes_on_in_a_fresh_machine_where_it_was_stopped() {
    let Some(engine) = engine() else { return };
    let mut first = machine(&engine, 1);
    // movups xmm1, [0x5000]; mov rax, 7; out 0xf4, al; movups [0x5010], xmm1; add [0x5010], rax; out 0xf4, al
    first.start_long(&[
        0x0f, 0x10, 0x0c, 0x25, 0, 0x50, 0, 0, 0x48, 0xc7, 0xc0, 7, 0, 0, 0, 0xe6, 0xf4, //
        0x0f, 0x11, 0x0c, 0x25, 0x10, 0x50, 0, 0, 0x48, 0x01, 0x04, 0x25, 0x10, 0x50, 0, 0, 0xe6, 0xf4,
    ]);
    first.write_u64(0x5000, 0x1_0000_0000);
    let mut io = Recorder::default();
    assert_eq!(first.run(&mut io), Exit::Left);
    let state = first.vcpus[0].state().unwrap();

    let mut second = machine(&engine, 1);
    second.copy_from(&first);
    drop(first);
    second.vcpus[0].set_state(&state).unwrap();
    assert_eq!(still(second.vcpus[0].state().unwrap()), still(state));
    assert_eq!(second.run(&mut io), Exit::Left);
    assert_eq!(u64::from_le_bytes(second.read(0x5010)), 0x1_0000_0007);
}

#[test]
fn a_deadline_that_was_set_in_one_machine_wakes_the_guest_in_another() {
    let Some(engine) = engine() else { return };
    let mut first = machine(&engine, 1);
    // sti; hlt; out 0xf4, al, with a handler at 0x3000: mov al, 9; out 0x80, al; iret
    let code = [0xfb, 0xf4, 0xe6, 0xf4];
    first.start_real(&code);
    let mut state = first.vcpus[0].state().unwrap();
    state.lapic.registers[0xf] = 0x1ff;
    // Vector 0x44, mode TSC deadline.
    state.lapic.registers[0x32] = 0x4_0044;
    state.tsc.value = 1 << 60;
    let khz = u64::from(state.tsc.frequency_khz);
    for entry in &mut state.msrs {
        if entry.0 == msr::IA32_TSC_DEADLINE {
            entry.1 = (1 << 60) + 5 * khz;
        }
    }
    let mut second = machine(&engine, 1);
    second.write(crate::support::CODE, &code);
    second.write(0x3000, &[0xb0, 9, 0xe6, 0x80, 0xcf]);
    second.write(0x44 * 4, &[0, 0x30, 0, 0]);
    second.vcpus[0].set_state(&state).unwrap();
    let mut io = Recorder::default();
    assert_eq!(second.run(&mut io), Exit::Left);
    assert_eq!(io.written(0x80), [9]);
}

#[test]
fn states_that_no_processor_has_are_refused_by_the_part() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    machine.start_long(&[0x90]);
    let good = machine.vcpus[0].state().unwrap();
    let field = |error: EngineError| match error {
        EngineError::State { field, .. } => field,
        other => panic!("{other}"),
    };
    let mut bad = good.clone();
    bad.xsave.truncate(100);
    assert_eq!(field(machine.vcpus[0].set_state(&bad).unwrap_err()), "xsave");
    let mut bad = good.clone();
    bad.xsave.resize(1 << 20, 0);
    assert_eq!(field(machine.vcpus[0].set_state(&bad).unwrap_err()), "xsave");
    let mut bad = good.clone();
    bad.control.cr0 = 0x8000_0000;
    assert_eq!(field(machine.vcpus[0].set_state(&bad).unwrap_err()), "segment and control registers");
    let mut bad = good.clone();
    bad.msrs.push((msr::EFER + 0x1000, 1));
    assert_eq!(field(machine.vcpus[0].set_state(&bad).unwrap_err()), "msrs");
    let mut odd = good.clone();
    odd.lapic = LapicState { registers: [u32::MAX; 64] };
    let _ = machine.vcpus[0].set_state(&odd);
    machine.vcpus[0].set_state(&good).unwrap();
    assert_eq!(still(machine.vcpus[0].state().unwrap()), still(good));
}
