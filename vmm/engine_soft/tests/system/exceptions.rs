//! Exceptions: frames, error codes, stacks, and what happens when delivery fails.

use harrier_engine::Exit;
use harrier_engine::cpu_state::{DescriptorTable, PendingException};

use crate::machine::*;

const RSP: usize = 4;

/// The frame at RSP: error code if there is one, RIP, CS, RFLAGS, RSP, SS.
fn frame<const N: usize>(machine: &Machine, state: &harrier_engine::CpuState) -> [u64; N] {
    machine.read(state.regs.gpr[RSP])
}

#[test]
fn an_exception_pushes_its_frame_on_an_aligned_stack() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[0x0f, 0x0b]);
    edit(&mut *vcpu, |state| state.regs.gpr[RSP] = STACK - 5);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[RSP], STACK - 16 - 40);
    let rf = 1 << 16;
    let expected = [CODE, u64::from(KERNEL_CODE), 2 | rf, STACK - 5, u64::from(KERNEL_DATA)];
    assert_eq!(frame(&machine, &state), expected);
}

#[test]
fn a_page_fault_of_user_code_has_its_error_code_its_address_and_the_kernels_stack() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    // mov [HOLE + 8], eax
    machine.write(USER_PAGE, &[0x89, 0x04, 0x25, 0x08, 0xf0, 0x01, 0x00]);
    edit(&mut *vcpu, |state| {
        state.segments.cs.selector = USER_CODE;
        state.segments.cs.dpl = 3;
        state.segments.ss.selector = USER_DATA;
        state.segments.ss.dpl = 3;
        state.regs.rip = USER_PAGE;
        state.regs.gpr[RSP] = USER_PAGE + 0x800;
        state.regs.rflags = 0x202;
    });
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.control.cr2, HOLE + 8);
    assert_eq!(state.regs.gpr[RSP], RING0_STACK - 48);
    let user_ss = u64::from(USER_DATA);
    assert_eq!(
        frame(&machine, &state),
        [6, USER_PAGE, u64::from(USER_CODE), 0x1_0202, USER_PAGE + 0x800, user_ss]
    );
    assert!(state.segments.ss.unusable && state.segments.ss.selector == 0);
    assert_eq!(state.regs.rflags & 0x200, 0, "an interrupt gate clears IF");
}

#[test]
fn a_selector_beyond_its_table_is_named_in_the_error_code() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    // mov eax, 0x4b; mov ds, eax
    machine.write(CODE, &[0xb8, 0x4b, 0, 0, 0, 0x8e, 0xd8]);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(frame::<2>(&machine, &state), [0x48, CODE + 5]);
    assert_eq!(state.segments.ds.selector, KERNEL_DATA, "the register is as before");
}

#[test]
fn a_stack_table_entry_is_used_even_without_a_change_of_privilege() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.gate(3, HANDLER, 1, 3);
    machine.write(CODE, &[0xcc]);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[RSP], (IST1 & !15) - 40);
    assert_eq!(frame::<1>(&machine, &state), [CODE + 1], "INT3 is a trap");
}

#[test]
fn a_software_interrupt_below_the_gates_privilege_is_a_fault_of_the_instruction() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    // Return to user mode first: iretq to int 0x80.
    machine.write(USER_PAGE, &[0xcd, 0x80]);
    edit(&mut *vcpu, |state| {
        state.segments.cs.selector = USER_CODE;
        state.segments.cs.dpl = 3;
        state.segments.ss.selector = USER_DATA;
        state.segments.ss.dpl = 3;
        state.regs.rip = USER_PAGE;
    });
    let (state, _) = run(&mut *vcpu);
    assert_eq!(frame::<2>(&machine, &state), [0x80 * 8 + 2, USER_PAGE]);
}

#[test]
fn a_fault_while_delivering_a_page_fault_is_a_double_fault() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write_u64(IDT + 14 * 16, 0);
    machine.gate(8, HANDLER, 1, 0);
    // mov eax, [HOLE]
    machine.write(CODE, &[0x8b, 0x04, 0x25, 0x00, 0xf0, 0x01, 0x00]);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[RSP], (IST1 & !15) - 48);
    assert_eq!(frame::<2>(&machine, &state), [0, CODE]);
    assert_eq!(state.control.cr2, HOLE);
}

#[test]
fn a_fault_while_delivering_a_double_fault_stops_the_processor() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[0x0f, 0x0b]);
    edit(&mut *vcpu, |state| state.segments.idtr = DescriptorTable::default());
    assert_eq!(vcpu.run(&mut Devices::default()), Exit::TripleFault);
    assert_eq!(vcpu.state().unwrap().regs.rip, CODE);
}

#[test]
fn a_frame_that_cannot_be_written_changes_nothing() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    // The frame crosses into the page that is not mapped: #PF, then #DF on a good stack.
    machine.gate(8, HANDLER, 1, 0);
    machine.write(CODE, &[0x0f, 0x0b]);
    machine.write(HOLE + 0x1000, &[0x55; 64]);
    edit(&mut *vcpu, |state| state.regs.gpr[RSP] = HOLE + 0x1010);
    let (state, _) = run(&mut *vcpu);
    // #UD is benign and #PF after it is delivered by itself; that needs the stack too.
    assert_eq!(frame::<2>(&machine, &state), [0, CODE]);
    assert_eq!(state.control.cr2 & !0xfff, HOLE);
    assert_eq!(machine.read::<2>(HOLE + 0x1000), [0x5555_5555_5555_5555; 2]);
}

#[test]
fn an_exception_that_was_pending_is_delivered_after_restoring() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, LEAVE);
    edit(&mut *vcpu, |state| {
        state.events.exception = Some(PendingException { vector: 13, error_code: Some(0x30) });
    });
    let (state, _) = run(&mut *vcpu);
    assert_eq!(frame::<2>(&machine, &state), [0x30, CODE]);
    assert_eq!(state.events.exception, None);
}

#[test]
fn interrupts_wait_for_the_instruction_after_sti_and_after_loading_ss() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    edit(&mut *vcpu, |state| state.events.interrupt = Some(0x40));
    // sti; inc ebx; inc ebx
    machine.write(CODE, &[0xfb, 0xff, 0xc3, 0xff, 0xc3]);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[3], 1);
    assert_eq!(frame::<1>(&machine, &state), [CODE + 3]);

    let mut vcpu = machine.long_mode(0);
    edit(&mut *vcpu, |state| {
        state.events.interrupt = Some(0x40);
        state.events.mov_ss_shadow = true;
        state.regs.rflags |= 0x200;
    });
    machine.write(CODE, &[0xff, 0xc3, 0xff, 0xc3]);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[3], 1);
}

#[test]
fn an_unknown_register_and_a_reserved_bit_are_general_protection() {
    for code in [
        wrmsr(0x1234_5678, 0),
        vec![0xb9, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x32],
        wrmsr(0xc000_0080, 1 << 13),
        wrmsr(0xc000_0082, 1 << 50),
        wrmsr(0x277, 0x02),
    ] {
        let machine = Machine::new(1);
        let mut vcpu = machine.long_mode(0);
        machine.gate(13, HANDLER + 0x100, 0, 0);
        machine.write(HANDLER + 0x100, &[0xe6, 0x01, 0xe6, 0xf4]);
        machine.write(CODE, &code);
        let (state, devices) = run(&mut *vcpu);
        assert_eq!(devices.written.len(), 2, "{code:02x?}");
        assert_eq!(frame::<2>(&machine, &state), [0, CODE + code.len() as u64 - 2]);
    }
}

#[test]
fn in_real_mode_the_vector_table_is_used_and_no_error_code_pushed() {
    let machine = Machine::new(1);
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    // Vector 6 at 0000:9000.
    machine.write(6 * 4, &[0x00, 0x90, 0x00, 0x00]);
    machine.write(HANDLER, LEAVE);
    machine.write(0x18000, &[0x0f, 0x0b]);
    edit(&mut *vcpu, |state| {
        state.segments.cs.selector = 0x1800;
        state.segments.cs.base = 0x18000;
        state.regs.rip = 0;
        state.regs.gpr[RSP] = 0x7000;
        state.regs.rflags = 0x302 & !0x100;
    });
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[RSP], 0x7000 - 6);
    assert_eq!(machine.read::<1>(0x7000 - 6)[0] & 0xffff_ffff_ffff, 0x0202_1800_0000);
    assert_eq!(state.segments.cs.selector, 0);
    assert_eq!(state.regs.rflags & 0x200, 0);
}

#[test]
fn a_return_to_compatibility_mode_leaves_nothing_of_the_kernels_stack_pointer() {
    const HIGH: u64 = 0xffff_8000_0000_0000;
    const COMPATIBILITY: u64 = 0x33;
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write_u64(GDT + 0x30, 0x00cf_fb00_0000_ffff);
    let root = vcpu.state().unwrap().control.cr3;
    let [low] = machine.read(root);
    machine.write_u64(root + 256 * 8, low);
    for (slot, value) in
        [USER_PAGE, COMPATIBILITY, 0x3202, USER_PAGE + 0x800, u64::from(USER_DATA)].into_iter().enumerate()
    {
        machine.write_u64(STACK - 40 + 8 * slot as u64, value);
    }
    // iretq; then, in 32-bit code: push eax, and out.
    machine.write(CODE, &[0x48, 0xcf]);
    machine.write(USER_PAGE, &[&[0x50], LEAVE].concat());
    edit(&mut *vcpu, |state| state.regs.gpr[RSP] = HIGH + STACK - 40);
    let (state, _) = run(&mut *vcpu);
    assert_eq!(u64::from(state.segments.cs.selector), COMPATIBILITY);
    assert_eq!(state.regs.gpr[RSP], USER_PAGE + 0x7fc);
}

/// `rep stosb` of three bytes to [`USER_PAGE`], from `flags` on.
fn repeated(dr7: u64, flags: u64) -> (Machine, harrier_engine::CpuState) {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[0xf3, 0xaa, 0xe6, 0xf4]);
    edit(&mut *vcpu, |state| {
        state.regs.gpr[1] = 3;
        state.regs.gpr[7] = USER_PAGE;
        state.regs.rflags = flags;
        state.debug_addresses[0] = CODE;
        state.dr7 = dr7;
    });
    let (state, _) = run(&mut *vcpu);
    (machine, state)
}

#[test]
fn a_step_between_the_elements_of_a_string_pushes_the_resume_flag() {
    let (tf, rf) = (1 << 8, 1 << 16);
    let (machine, state) = repeated(0x400, 2 | tf);
    assert_eq!((state.regs.gpr[1], state.regs.gpr[7]), (2, USER_PAGE + 1), "one element, then the trap");
    assert_eq!(frame(&machine, &state), [CODE, u64::from(KERNEL_CODE), 2 | tf | rf]);
}

#[test]
fn a_breakpoint_on_a_repeated_string_comes_before_its_first_element_only() {
    let rf = 1 << 16;
    let (machine, state) = repeated(0x401, 2);
    assert_eq!(state.regs.gpr[1], 3);
    assert_eq!(frame::<1>(&machine, &state), [CODE]);
    // Resumed, it runs to its end.
    let (_, state) = repeated(0x401, 2 | rf);
    assert_eq!((state.regs.gpr[1], state.regs.rip), (0, CODE + 4), "dr6 {:#x}", state.dr6);
}

#[test]
fn a_comparison_and_its_branch_are_two_steps_and_two_instructions() {
    let tf = 1 << 8;
    // cmp eax, 5; je +2; out 0xf4, al; nop; nop; out 0xf4, al
    let code = [0x83, 0xf8, 5, 0x74, 4, 0xe6, 0xf4, 0x90, 0x90, 0xe6, 0xf4];
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &code);
    let start = |state: &mut harrier_engine::CpuState, rax: u64, flags: u64| {
        state.regs.gpr[0] = rax;
        state.regs.rip = CODE;
        state.regs.rflags = flags;
        state.regs.gpr[RSP] = STACK;
    };
    for (rax, end, instructions) in [(5, CODE + 11, 3), (6, CODE + 7, 3)] {
        let before = vcpu.counters().instructions.unwrap();
        edit(&mut *vcpu, |state| start(state, rax, 2));
        let (state, _) = run(&mut *vcpu);
        assert_eq!(state.regs.rip, end);
        assert_eq!(vcpu.counters().instructions.unwrap() - before, instructions, "rax {rax}");
        // A step ends behind the comparison, whichever way the branch goes.
        edit(&mut *vcpu, |state| start(state, rax, 2 | tf));
        let (state, _) = run(&mut *vcpu);
        assert_eq!(frame::<1>(&machine, &state), [CODE + 3], "rax {rax}");
    }
}
