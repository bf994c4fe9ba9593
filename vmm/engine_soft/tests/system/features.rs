//! What the `host` model has beyond the third baseline, and KVM's hypercalls.

use harrier_engine::CpuModel;

use crate::machine::*;

const AREA: u64 = 0x14000;
const PCIDE: u64 = 1 << 17;

/// Runs code on the `host` model with CR4 bits added; answers state, and the vector of the exception that came, which a
/// handler for each puts into R15.
fn run_host(
    cr4: u64,
    code: &[u8],
    prepare: impl FnOnce(&mut harrier_engine::CpuState),
) -> (Machine, harrier_engine::CpuState) {
    let machine = Machine::with_model(1, CpuModel::Host);
    let mut vcpu = machine.long_mode(0);
    for vector in 0..32u8 {
        // mov r15, vector; out 0xf4, al
        let handler = HANDLER + 0x100 + 16 * u64::from(vector);
        machine.write(handler, &[&[0x49, 0xc7, 0xc7, vector, 0, 0, 0], LEAVE].concat());
        machine.gate(vector, handler, 0, 0);
    }
    machine.write(CODE, &[code, LEAVE].concat());
    edit(&mut *vcpu, |state| {
        state.control.cr4 |= cr4;
        state.regs.gpr[15] = 0xff;
        prepare(state);
    });
    let (state, _) = run(&mut *vcpu);
    (machine, state)
}

fn exception(state: &harrier_engine::CpuState) -> Option<u64> {
    Some(state.regs.gpr[15]).filter(|&vector| vector != 0xff)
}

#[test]
fn hypercalls_answer_as_kvm_does() {
    // mov eax, 99; vmmcall; mov rbx, rax; mov eax, 1; vmcall
    let code = [0xb8, 99, 0, 0, 0, 0x0f, 0x01, 0xd9, 0x48, 0x89, 0xc3, 0xb8, 1, 0, 0, 0, 0x0f, 0x01, 0xc1];
    for model in [CpuModel::V1, CpuModel::Host] {
        let machine = Machine::with_model(1, model);
        let mut vcpu = machine.long_mode(0);
        machine.write(CODE, &[&code[..], LEAVE].concat());
        let (state, _) = run(&mut *vcpu);
        assert_eq!(
            (state.regs.gpr[3] as i64, state.regs.gpr[0]),
            (-1000, 0),
            "no such call; the polling one"
        );
    }
}

#[test]
fn process_context_identifiers_start_at_zero_and_in_paging() {
    let set_cr4: &[u8] = &[0x0f, 0x22, 0xe0]; // mov cr4, rax
    let set_cr3: &[u8] = &[0x0f, 0x22, 0xd9]; // mov cr3, rcx
    let set_cr0: &[u8] = &[0x0f, 0x22, 0xc2]; // mov cr0, rdx
    let root = 0x2000;
    let case = |code: &[&[u8]], cr3: u64| {
        let (_, state) = run_host(0, &code.concat(), |state| {
            state.regs.gpr[0] = state.control.cr4 | PCIDE;
            state.regs.gpr[1] = cr3;
            state.regs.gpr[2] = state.control.cr0 & !(1 << 31);
        });
        (exception(&state), state.control.cr3, state.control.cr4 & PCIDE != 0)
    };
    assert_eq!(case(&[set_cr4, set_cr3], 1 << 63 | root | 5), (None, root | 5, true));
    assert_eq!(case(&[set_cr3], 1 << 63 | root), (Some(13), root, false), "bit 63 without PCIDE");
    assert_eq!(case(&[set_cr3, set_cr4], root | 0x18), (Some(13), root | 0x18, false), "identifier not zero");
    assert_eq!(case(&[set_cr4, set_cr0], root), (Some(13), root, true), "paging off with PCIDE");
}

#[test]
fn invpcid_checks_its_descriptor() {
    let invpcid: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x01]; // invpcid rax, [rcx]
    let case = |cr4: u64, kind: u64, identifier: u64, address: u64| {
        // mov [rcx], rbx; mov [rcx + 8], rdx
        let store: &[u8] = &[0x48, 0x89, 0x19, 0x48, 0x89, 0x51, 0x08];
        let (_, state) = run_host(cr4, &[store, invpcid].concat(), |state| {
            (state.regs.gpr[0], state.regs.gpr[1]) = (kind, AREA);
            (state.regs.gpr[3], state.regs.gpr[2]) = (identifier, address);
        });
        exception(&state)
    };
    for kind in 0..4 {
        assert_eq!(case(0, kind, 0, 0x1000), None, "{kind}");
        assert_eq!(case(PCIDE, kind, 7, 0x1000), None, "{kind}");
    }
    assert_eq!(case(PCIDE, 4, 0, 0), Some(13), "no such kind");
    assert_eq!(case(0, 1, 7, 0), Some(13), "an identifier without PCIDE");
    assert_eq!(case(PCIDE, 0, 0x1000, 0), Some(13), "reserved bits");
    assert_eq!(case(PCIDE, 0, 0, 1 << 63), Some(13), "an address that is not canonical");
}

#[test]
fn a_page_of_a_gibibyte_is_one_where_the_model_has_them() {
    // mov rax, [rcx]
    let code = [&[0x48, 0x8b, 0x01], LEAVE].concat();
    for (model, works) in [(CpuModel::Host, true), (CpuModel::V3, false)] {
        if !harrier_engine::Engine::cpu_models(&harrier_engine_soft::SoftEngine).contains(&model) {
            continue;
        }
        let machine = Machine::with_model(1, model);
        let mut vcpu = machine.long_mode(0);
        machine.write(CODE, &code);
        machine.write_u64(AREA, 0x1234);
        // The second gibibyte is the first one again.
        machine.write_u64(0x3000 + 8, 0x83);
        edit(&mut *vcpu, |state| state.regs.gpr[1] = 0x4000_0000 + AREA);
        let (state, _) = run(&mut *vcpu);
        assert_eq!(state.regs.gpr[0] == 0x1234, works, "{model}");
        assert_eq!(state.control.cr2 == 0x4000_0000 + AREA, !works, "{model}");
    }
}

#[test]
fn the_compacted_area_brings_the_registers_back_and_leaves_out_what_is_not_in_use() {
    let restored = |save: &[u8], header: [u64; 2]| {
        // The instruction, with [rcx]; xorps xmm0, xmm0; xrstor64 [rcx]; movups [rbx], xmm0
        let rest: &[u8] = &[0x0f, 0x57, 0xc0, 0x48, 0x0f, 0xae, 0x29, 0x0f, 0x11, 0x03];
        let (machine, state) = run_host(1 << 18, &[save, rest].concat(), |state| {
            state.control.xcr0 = 7;
            state.xsave = vec![0; 832];
            state.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
            state.xsave[160..176].fill(0x5a);
            state.xsave[512] = 2;
            (state.regs.gpr[0], state.regs.gpr[2]) = (7, 0);
            (state.regs.gpr[1], state.regs.gpr[3]) = (AREA, AREA - 0x40);
        });
        assert_eq!(exception(&state), None);
        assert_eq!(machine.read::<2>(AREA + 512), header);
        for at in [AREA + 160, AREA - 0x40] {
            assert_eq!(machine.read::<2>(at), [0x5a5a_5a5a_5a5a_5a5a; 2]);
        }
    };
    restored(&[0x48, 0x0f, 0xae, 0x21], [2, 0]); // xsave64
    restored(&[0x48, 0x0f, 0xae, 0x31], [2, 0]); // xsaveopt64
    restored(&[0x48, 0x0f, 0xc7, 0x21], [2, 1 << 63 | 7]); // xsavec64
}

#[test]
fn random_numbers_come_with_carry() {
    // rdrand rax; setc bl; rdseed rcx (which may have none)
    let (_, state) = run_host(0, &[0x48, 0x0f, 0xc7, 0xf0, 0x0f, 0x92, 0xc3], |state| state.regs.gpr[3] = 0);
    match exception(&state) {
        None => assert!(state.regs.gpr[3] & 1 == 1 || state.regs.gpr[0] == 0),
        // The host has no such instruction.
        other => assert_eq!(other, Some(6)),
    }
}

#[test]
fn a_fault_in_a_repeated_comparison_leaves_the_flags_as_they_were() {
    // cmp al, al; repe cmpsb
    let (_, state) = run_host(0, &[0x38, 0xc0, 0xf3, 0xa6], |state| {
        state.regs.gpr[1] = 8;
        (state.regs.gpr[6], state.regs.gpr[7]) = (HOLE - 2, HOLE - 0x802);
    });
    assert_eq!(exception(&state), Some(14));
    assert_eq!((state.regs.gpr[1], state.regs.gpr[6], state.regs.gpr[7]), (6, HOLE, HOLE - 0x800));
    assert_eq!(state.regs.rflags & 0x8d5, 0x44);
}

#[test]
fn reserved_hints_are_nops_and_prefixes_of_flat_segments_say_nothing() {
    // 0f 0d /2, 0f 18 /7, 0f 1c /3: [rbx]; mov rax, ss:[rbx]
    let code = [0x0f, 0x0d, 0x13, 0x0f, 0x18, 0x3b, 0x0f, 0x1c, 0x1b, 0x36, 0x48, 0x8b, 0x03];
    let (_, state) = run_host(0, &code, |state| state.regs.gpr[3] = 1 << 63);
    assert_eq!(exception(&state), Some(13), "neither an invalid opcode nor a stack fault");
}

#[test]
fn a_code_breakpoint_comes_after_mov_ss_too() {
    // mov ss, eax; nop
    let (_, state) = run_host(0, &[0x8e, 0xd0, 0x90], |state| {
        state.regs.gpr[0] = u64::from(KERNEL_DATA);
        state.debug_addresses[0] = CODE + 2;
        state.dr7 = 0x402;
    });
    assert_eq!(exception(&state), Some(1));
}
