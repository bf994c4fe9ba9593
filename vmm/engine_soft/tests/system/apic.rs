//! The local APIC: interrupts from outside, priorities, end of interrupt, timers, other processors.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harrier_engine::cpu_state::MpState;
use harrier_engine::{Exit, Msi, Vcpu};

use crate::machine::*;

const RSP: usize = 4;
const RBX: usize = 3;
/// APIC_BASE with the APIC and its x2APIC mode switched on.
const X2APIC_ON: u64 = 0xfee0_0d00;

/// Switches to x2APIC mode and enables the APIC.
fn enable() -> Vec<u8> {
    [wrmsr(0x1b, X2APIC_ON), wrmsr(0x80f, 0x1ff)].concat()
}

fn msi(vector: u8, level: bool) -> Msi {
    Msi { address: 0xfee0_0000, data: u32::from(vector) | if level { 0xc000 } else { 0 } }
}

/// Waits in HLT with interrupts on, then leaves.
const WAIT: &[u8] = &[0xfb, 0xf4, 0xe6, 0xf4];

#[test]
fn a_message_from_another_thread_wakes_a_halted_processor() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[&enable(), &[0xe6, 0x10][..], WAIT].concat());
    let halted = CODE + enable().len() as u64 + 4;
    let woken = AtomicBool::new(false);
    thread::scope(|scope| {
        let (vm, woken) = (&machine.vm, &woken);
        scope.spawn(move || {
            // Sent before the APIC is on, a message is lost: then the next one arrives.
            while !woken.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(5));
                vm.send_msi(msi(0x41, false)).unwrap();
            }
        });
        let exit = vcpu.run(&mut Devices::default());
        woken.store(true, Ordering::SeqCst);
        assert_eq!(exit, Exit::Left);
    });
    let state = vcpu.state().unwrap();
    assert_eq!(machine.read::<1>(state.regs.gpr[RSP]), [halted]);
    assert_eq!(state.lapic.registers[0x12], 2, "vector 0x41 is in service");
}

#[test]
fn the_task_priority_holds_interrupts_back_until_it_is_lowered() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    // mov eax, 4; mov cr8, rax; sti; nop; inc ebx; xor eax, eax; mov cr8, rax; inc ebx
    let code: &[u8] = &[
        0xb8, 4, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0, 0xfb, 0x90, 0xff, 0xc3, 0x31, 0xc0, 0x44, 0x0f, 0x22, 0xc0,
        0xff, 0xc3,
    ];
    machine.write(CODE, &[&enable()[..], &wrmsr(0x83f, 0x41), code].concat());
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[RBX], 1);
    assert_eq!(state.control.cr8, 0);
}

#[test]
fn only_the_end_of_a_level_interrupt_is_reported() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[&enable()[..], LEAVE, WAIT].concat());
    run(&mut *vcpu);
    // The handler ends the interrupt, then leaves.
    machine.write(HANDLER + 0x200, &[&wrmsr(0x80b, 0)[..], LEAVE, &[0x48, 0xcf]].concat());
    for (vector, level) in [(0x51, true), (0x52, false)] {
        machine.gate(vector, HANDLER + 0x200, 0, 0);
        machine.vm.send_msi(msi(vector, level)).unwrap();
        let (_, devices) = run(&mut *vcpu);
        let expected: &[u8] = if level { &[vector] } else { &[] };
        assert_eq!(devices.ended, expected);
        edit(&mut *vcpu, |state| {
            assert_eq!(state.lapic.registers[0x10..0x18], [0; 8], "nothing is in service");
            state.regs.rip = CODE + enable().len() as u64 + 2;
        });
    }
}

#[test]
fn both_kinds_of_timer_wake_a_halted_processor() {
    // One-shot: divide by 1, a millisecond. Deadline: a millisecond after now (rdtsc; add; adc; mov ecx; wrmsr).
    let one_shot = [wrmsr(0x832, 0x60), wrmsr(0x83e, 0xb), wrmsr(0x838, 1_000_000)].concat();
    let deadline = [
        &wrmsr(0x832, 0x4_0060)[..],
        &[0x0f, 0x31, 0x05, 0x40, 0x42, 0x0f, 0x00, 0x83, 0xd2, 0x00, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30],
    ]
    .concat();
    for timer in [one_shot, deadline] {
        let machine = Machine::new(1);
        let mut vcpu = machine.long_mode(0);
        machine.write(CODE, &[&enable()[..], &timer, WAIT].concat());
        let (state, _) = run(&mut *vcpu);
        assert_eq!(state.lapic.registers[0x13], 1, "vector 0x60 is in service");
        assert_eq!(state.lapic.registers[0x39], 0);
        assert_eq!(state.msrs.iter().find(|(msr, _)| *msr == 0x6e0), Some(&(0x6e0, 0)));
    }
}

#[test]
fn a_started_processor_begins_in_real_mode_at_its_vector() {
    let machine = Machine::new(2);
    let mut first = machine.long_mode(0);
    let mut second = machine.vm.create_vcpu(1).unwrap();
    assert_eq!(second.state().unwrap().mp_state, MpState::WaitForSipi);
    // inc word [0x7000]; mov ax, cs; mov [0x7002], ax; out 0xf4, al
    machine.write(0x13000, &[0xff, 0x06, 0, 0x70, 0x8c, 0xc8, 0xa3, 0x02, 0x70, 0xe6, 0xf4]);
    let start = [
        &enable()[..],
        &wrmsr(0x830, 1 << 32 | 0x4500),
        &wrmsr(0x830, 1 << 32 | 0x4613),
        &wrmsr(0x830, 1 << 32 | 0x4613),
        LEAVE,
    ]
    .concat();
    machine.write(CODE, &start);
    thread::scope(|scope| {
        let other = scope.spawn(|| second.run(&mut Devices::default()));
        run(&mut *first);
        assert_eq!(other.join().unwrap(), Exit::Left);
    });
    assert_eq!(machine.read_u32(0x7000), 0x1300_0001, "started once, at 1300:0000");
    assert_eq!(second.state().unwrap().mp_state, MpState::Runnable);
}

#[test]
fn a_kick_ends_the_wait_of_a_processor_that_nothing_will_wake() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[0xfa, 0xf4, 0xe6, 0xf4]);
    let kicker = vcpu.kicker();
    kicker.kick();
    assert_eq!(vcpu.run(&mut Devices::default()), Exit::Kicked);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(vcpu.run(&mut Devices::default()), Exit::Kicked);
    });
    let state = vcpu.state().unwrap();
    assert_eq!((state.mp_state, state.regs.rip), (MpState::Halted, CODE + 2));
}

#[test]
fn interrupts_between_two_processors_arrive_while_both_run() {
    const ROUNDS: u32 = 500;
    let machine = Machine::new(2);
    let mut first = machine.long_mode(0);
    let mut second = machine.long_mode(1);
    // Each side: wait in HLT for vector 0x70; the handler counts in memory by processor, ends it and answers.
    // Processor 0 begins. r8 = counter's address, r9d = ICR's high half; leaves at ROUNDS.
    let handler = [
        // inc dword [r8]; cmp dword [r8], ROUNDS
        &[0x41, 0xff, 0x00, 0x41, 0x81, 0x38][..],
        &ROUNDS.to_le_bytes(),
        &wrmsr(0x80b, 0),
        // mov ecx, 0x830; mov eax, 0x4070; mov edx, r9d; wrmsr
        &[0xb9, 0x30, 0x08, 0, 0, 0xb8, 0x70, 0x40, 0, 0, 0x44, 0x89, 0xca, 0x0f, 0x30],
        // cmp dword [r8], ROUNDS; jb +2; out 0xf4; iretq
        &[0x41, 0x81, 0x38],
        &ROUNDS.to_le_bytes(),
        &[0x72, 0x02, 0xe6, 0xf4, 0x48, 0xcf],
    ]
    .concat();
    machine.write(HANDLER + 0x300, &handler);
    machine.gate(0x70, HANDLER + 0x300, 0, 0);
    // sti; hlt; jmp hlt
    let wait: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfd];
    let begin = wrmsr(0x830, 1 << 32 | 0x4070);
    machine.write(CODE, &[&enable()[..], LEAVE, &begin, wait].concat());
    let enable_other = [wrmsr(0x1b, X2APIC_ON & !0x100), wrmsr(0x80f, 0x1ff)].concat();
    machine.write(CODE + 0x400, &[&enable_other[..], LEAVE, wait].concat());
    let set = |vcpu: &mut dyn Vcpu, rip: u64, counter: u64, other: u64, stack: u64| {
        edit(vcpu, |state| {
            state.regs.rip = rip;
            state.regs.gpr[8] = counter;
            state.regs.gpr[9] = other;
            state.regs.gpr[RSP] = stack;
        });
    };
    set(&mut *first, CODE, 0x7100, 1, STACK);
    set(&mut *second, CODE + 0x400, 0x7200, 0, STACK - 0x800);
    run(&mut *first);
    run(&mut *second);
    thread::scope(|scope| {
        scope.spawn(|| run(&mut *second));
        run(&mut *first);
    });
    assert_eq!((machine.read_u32(0x7100), machine.read_u32(0x7200)), (ROUNDS, ROUNDS));
}
