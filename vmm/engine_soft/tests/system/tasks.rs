//! Hardware task switches in 32-bit protected mode without paging.

use harrier_engine::cpu_state::{DescriptorTable, MpState, Segment};
use harrier_engine::{Exit, Vcpu};

use crate::machine::*;

const CODE32: u16 = 0x08;
const DATA32: u16 = 0x10;
const FIRST: u16 = 0x18;
const SECOND: u16 = 0x20;
/// Task state segments, and the code and stack of the second task.
const FIRST_TSS: u64 = 0x6000;
const SECOND_TSS: u64 = 0x6100;
const SECOND_CODE: u64 = 0xa000;
const SECOND_STACK: u32 = 0xe000;
/// What the first task may read.
const DATA: u64 = 0xf000;

/// A processor at [`CODE`] in the first task; vector 13 leads to the second by a task gate.
fn protected_mode(machine: &Machine) -> Box<dyn Vcpu> {
    let tss = |base: u64, kind: u64| 0x0000_8000_0000_0067 | kind << 40 | base << 16;
    let gate = 0x0000_8500_0000_0000 | u64::from(SECOND) << 16;
    for (slot, descriptor) in
        [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, tss(FIRST_TSS, 0xb), tss(SECOND_TSS, 9)]
            .into_iter()
            .enumerate()
    {
        machine.write_u64(GDT + 8 * slot as u64, descriptor);
    }
    machine.write_u64(IDT + 13 * 8, gate);
    let put = |offset: u64, value: u32| machine.write(SECOND_TSS + offset, &value.to_le_bytes());
    put(0x20, SECOND_CODE as u32);
    put(0x24, 2);
    put(0x34, 0x1234_5678);
    put(0x38, SECOND_STACK);
    for offset in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        put(offset, DATA32.into());
    }
    put(0x4c, CODE32.into());
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    edit(&mut *vcpu, |state| {
        let data = Segment::flat(DATA32, 3, false);
        let segments = &mut state.segments;
        segments.cs = Segment::flat(CODE32, 0xb, false);
        (segments.ss, segments.ds, segments.es) = (data, data, data);
        (segments.fs, segments.gs) = (data, data);
        segments.tr = Segment {
            selector: FIRST,
            base: FIRST_TSS,
            limit: 0x67,
            kind: 0xb,
            present: true,
            ..Segment::default()
        };
        segments.gdtr = DescriptorTable { base: GDT, limit: 0x27 };
        segments.idtr = DescriptorTable { base: IDT, limit: 0x7ff };
        state.control.cr0 = 0x11;
        state.regs.rip = CODE;
        state.regs.gpr[4] = STACK;
        state.regs.gpr[3] = 7;
        state.mp_state = MpState::Runnable;
    });
    vcpu
}

fn kind_of(machine: &Machine, selector: u16) -> u64 {
    machine.read::<1>(GDT + u64::from(selector))[0] >> 40 & 0xf
}

/// `call far selector:0` or `jmp far selector:0`.
fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let [low, high] = selector.to_le_bytes();
    vec![opcode, 0, 0, 0, 0, low, high]
}

#[test]
fn a_called_task_runs_in_its_own_registers_and_returns_by_iret() {
    let machine = Machine::new(1);
    let mut vcpu = protected_mode(&machine);
    machine.write(CODE, &[&far(0x9a, SECOND)[..], LEAVE].concat());
    // out 0x11, al; out 0xf4, al; iret
    machine.write(SECOND_CODE, &[0xe6, 0x11, 0xe6, 0xf4, 0xcf]);
    let (state, devices) = run(&mut *vcpu);
    assert_eq!(devices.written[0].0, 0x11);
    assert_eq!((state.regs.gpr[3], state.regs.gpr[4]), (0x1234_5678, SECOND_STACK.into()));
    assert_eq!(state.segments.tr.selector, SECOND);
    assert_ne!(state.regs.rflags & 1 << 14, 0, "NT is set");
    assert_ne!(state.control.cr0 & 8, 0, "TS is set");
    assert_eq!((kind_of(&machine, FIRST), kind_of(&machine, SECOND)), (0xb, 0xb), "both are busy");
    assert_eq!(machine.read_u32(SECOND_TSS) & 0xffff, u32::from(FIRST), "the link back");
    let (state, _) = run(&mut *vcpu);
    assert_eq!((state.regs.rip, state.regs.gpr[3]), (CODE + 9, 7));
    assert_eq!(state.segments.tr.selector, FIRST);
    assert_eq!(state.regs.rflags & 1 << 14, 0);
    assert_eq!((kind_of(&machine, FIRST), kind_of(&machine, SECOND)), (0xb, 9));
}

#[test]
fn a_task_gate_in_the_interrupt_table_gets_the_error_code_on_the_new_stack() {
    let machine = Machine::new(1);
    let mut vcpu = protected_mode(&machine);
    // mov eax, 0x30; mov ds, eax: beyond the table.
    machine.write(CODE, &[0xb8, 0x30, 0, 0, 0, 0x8e, 0xd8]);
    machine.write(SECOND_CODE, LEAVE);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.segments.tr.selector, SECOND);
    assert_eq!(state.regs.gpr[4], u64::from(SECOND_STACK) - 4);
    assert_eq!(machine.read_u32(u64::from(SECOND_STACK) - 4), 0x30);
    assert_eq!(machine.read_u32(FIRST_TSS + 0x20), CODE as u32 + 5, "the fault's own address is saved");
}

#[test]
fn a_jump_to_a_busy_task_is_refused_and_changes_nothing() {
    let machine = Machine::new(1);
    let mut vcpu = protected_mode(&machine);
    machine.write(CODE, &far(0xea, FIRST));
    machine.write(SECOND_CODE, LEAVE);
    let (_, _) = run(&mut *vcpu);
    // #GP with the selector came through the gate.
    assert_eq!(machine.read_u32(u64::from(SECOND_STACK) - 4), u32::from(FIRST));
    assert_eq!(machine.read_u32(FIRST_TSS + 0x20), CODE as u32);
}

#[test]
fn a_bad_stack_segment_of_the_new_task_is_the_new_tasks_fault() {
    let machine = Machine::new(1);
    let mut vcpu = protected_mode(&machine);
    machine.write(CODE, &far(0xea, SECOND));
    machine.write(SECOND_TSS + 0x50, &u32::from(CODE32).to_le_bytes());
    // #TS has no gate that works: it ends in a triple fault, in the second task.
    assert_eq!(vcpu.run(&mut Devices::default()), Exit::TripleFault);
    let state = vcpu.state().unwrap();
    assert_eq!((state.segments.tr.selector, state.regs.rip), (SECOND, SECOND_CODE));
}

#[test]
fn a_16_bit_task_sets_the_upper_halves_of_its_registers() {
    let machine = Machine::new(1);
    let mut vcpu = protected_mode(&machine);
    machine.write_u64(GDT + u64::from(SECOND), 0x0000_8100_0000_002b | SECOND_TSS << 16);
    machine.write(SECOND_TSS, &[0; 44]);
    let put = |offset: u64, value: u16| machine.write(SECOND_TSS + offset, &value.to_le_bytes());
    put(14, SECOND_CODE as u16);
    put(16, 2);
    for (index, offset) in (18..34).step_by(2).enumerate() {
        put(offset, 0x1000 + index as u16);
    }
    for (offset, selector) in [(34, DATA32), (36, CODE32), (38, DATA32), (40, DATA32)] {
        put(offset, selector);
    }
    machine.write(CODE, &far(0xea, SECOND));
    machine.write(SECOND_CODE, LEAVE);
    let (state, _) = run(&mut *vcpu);
    let expected: Vec<u64> = (0..8).map(|index| 0xffff_1000 + index).collect();
    assert_eq!(state.regs.gpr[..8], expected);
}

#[test]
fn arpl_needs_the_right_to_write_only_if_it_writes() {
    // A processor does so, for segments and for pages.
    for (selector, vector) in [(0x10u16, 13), (0x13, 0)] {
        let machine = Machine::new(1);
        let mut vcpu = protected_mode(&machine);
        // The gate leads to a handler here: one that says that it was reached.
        machine.write_u64(IDT + 13 * 8, 0x0000_8e00_0008_0000 | SECOND_CODE);
        machine.write(SECOND_CODE, &[&[0xb2, 13][..], LEAVE].concat());
        machine.write(DATA, &selector.to_le_bytes());
        // arpl [DATA], cx
        let [a, b, c, d] = (DATA as u32).to_le_bytes();
        machine.write(CODE, &[&[0x63, 0x0d, a, b, c, d], LEAVE].concat());
        edit(&mut *vcpu, |state| {
            state.segments.ds.kind = 1;
            state.regs.gpr[1] = 3;
            state.regs.gpr[2] = 0;
        });
        let (state, _) = run(&mut *vcpu);
        assert_eq!(state.regs.gpr[2], vector, "{selector:#x}");
        assert_eq!(machine.read_u32(DATA) & 0xffff, u32::from(selector));
    }
}
