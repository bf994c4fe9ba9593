//! Taking a processor's state out and putting it in, also when it is hostile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harrier_engine::cpu_state::{CpuState, MpState, PendingException, SAVED_MSRS};
use harrier_engine::{EngineError, Exit};

use crate::machine::*;

/// A state in which nearly everything differs from RESET.
fn busy(machine: &Machine) -> CpuState {
    let mut vcpu = machine.long_mode(0);
    let mut state = vcpu.state().unwrap();
    for (index, value) in state.regs.gpr.iter_mut().enumerate() {
        *value = 0x1111_1111_1111_1111 * index as u64;
    }
    state.regs.rflags = 0x246;
    state.segments.fs.base = 0x7fff_1234_5000;
    state.segments.gs.base = 0xffff_8880_0000_1000;
    state.control.cr2 = 0xdead_b000;
    state.control.cr8 = 3;
    state.debug_addresses = [1, 2, 3, 4];
    state.dr7 = 0x455;
    state.dr6 = 0xffff_4ff1;
    for (msr, value) in &mut state.msrs {
        match *msr {
            0x1b => *value = 0xfee0_0d00,
            0x3b => *value = 77,
            0x174 => *value = 0x10,
            0x175 | 0x176 | 0xc000_0082 | 0xc000_0083 | 0xc000_0102 => *value = 0xffff_ffff_8100_0000,
            0x4b56_4d00 => *value = 0x7000,
            0x4b56_4d01 => *value = 0x7801,
            0xc000_0081 => *value = 0x0023_0010_0000_0000,
            0xc000_0084 => *value = 0x4_7700,
            _ => {}
        }
    }
    let apic = &mut state.lapic.registers;
    apic[0xf] = 0x1ff;
    apic[0x8] = 0x35;
    apic[0xd] = 1;
    apic[0xe] = 0;
    apic[0x12] = 1 << 7;
    apic[0x1a] = 1 << 9;
    apic[0x22] = 1 << 9;
    apic[0x32] = 0x1_00ec;
    apic[0x38] = 5_000_000;
    apic[0x3e] = 0xb;
    state.events.nmi_pending = true;
    state.events.nmi_masked = true;
    state.events.interrupt = Some(0x33);
    state.mp_state = MpState::Halted;
    state
}

/// What does not depend on when the state was taken.
fn timeless(mut state: CpuState) -> CpuState {
    state.tsc.value = 0;
    state.lapic.registers[0x39] = 0;
    // The processor priority is computed.
    state.lapic.registers[0xa] = 0;
    state
}

#[test]
fn a_state_comes_out_as_it_went_in() {
    let machine = Machine::new(1);
    let state = busy(&machine);
    let other = Machine::new(1);
    let mut vcpu = other.vm.create_vcpu(0).unwrap();
    vcpu.set_state(&state).unwrap();
    let out = vcpu.state().unwrap();
    assert_eq!(timeless(out.clone()), timeless(state));
    vcpu.set_state(&out).unwrap();
    assert_eq!(timeless(vcpu.state().unwrap()), timeless(out));
}

#[test]
fn msrs_are_sorted_and_only_those_that_are_saved() {
    let state = Machine::new(1).vm.create_vcpu(0).unwrap().state().unwrap();
    assert!(state.msrs.is_sorted_by_key(|(msr, _)| *msr));
    assert!(state.msrs.iter().all(|(msr, _)| SAVED_MSRS.contains(msr)));
    assert_eq!(state.tsc.frequency_khz, 1_000_000);
    assert_eq!((state.regs.rip, state.segments.cs.base), (0xfff0, 0xffff_0000));
}

#[test]
fn a_running_timer_goes_on_after_restoring() {
    let machine = Machine::new(1);
    let mut state = busy(&machine);
    state.events = Default::default();
    state.mp_state = MpState::Runnable;
    state.control.cr8 = 0;
    let apic = &mut state.lapic.registers;
    for index in [0x8, 0x12, 0x1a, 0x22] {
        apic[index] = 0;
    }
    // One-shot, vector 0x61, a millisecond left of an hour.
    apic[0x32] = 0x61;
    apic[0x38] = 3_600_000_000;
    apic[0x39] = 1_000_000;
    state.dr7 = 0x400;
    state.regs.gpr[4] = STACK;
    state.regs.rflags = 0x202;
    machine.write(CODE, &[0xf4]);
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    vcpu.set_state(&state).unwrap();
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.lapic.registers[0x13], 2);
}

#[test]
fn states_that_no_processor_can_be_in_are_refused_by_name() {
    type Change = fn(&mut CpuState);
    let hostile: &[(&str, Change)] = &[
        ("cr0", |s| s.control.cr0 = 0x8000_0000),
        ("cr0", |s| s.control.cr0 |= 1 << 40),
        ("cr3", |s| s.control.cr3 = 1 << 60),
        ("cr4", |s| s.control.cr4 |= 1 << 20),
        ("cr4", |s| s.control.cr4 &= !0x20),
        ("efer", |s| s.control.efer |= 1 << 12),
        ("efer", |s| s.control.efer &= !(1 << 10)),
        ("cr8", |s| s.control.cr8 = 16),
        ("xcr0", |s| s.control.xcr0 = 0),
        ("xcr0", |s| s.control.xcr0 = 5),
        ("rflags", |s| s.regs.rflags |= 1 << 30),
        ("rflags", |s| s.regs.rflags |= 1 << 17),
        ("cs", |s| s.segments.cs.unusable = true),
        ("cs", |s| s.segments.cs.db = true),
        ("rip", |s| s.regs.rip = 1 << 50),
        ("gs", |s| s.segments.gs.base = 1 << 55),
        ("tr", |s| s.segments.tr.base = 1 << 55),
        ("ds", |s| s.segments.ds.base = 1 << 40),
        ("segments", |s| s.segments.ds.dpl = 9),
        ("idtr", |s| s.segments.idtr.base = 1 << 55),
        ("dr7", |s| s.dr7 = 1 << 40),
        ("dr6", |s| s.dr6 = 1 << 40),
        ("msrs", |s| s.msrs.push((0x1234, 0))),
        ("msrs", |s| s.msrs.push((0xc000_0082, 1 << 50))),
        ("msrs", |s| s.msrs.push((0x1b, 1 << 10))),
        ("msrs", |s| s.msrs.push((0x277, 2))),
        ("lapic", |s| s.lapic.registers[2] = 7),
        ("xsave", |s| s.xsave.truncate(100)),
        ("xsave", |s| s.xsave.clear()),
        ("xsave", |s| s.xsave[512] = 0xff),
        ("tsc frequency", |s| s.tsc.frequency_khz = 12),
        ("events", |s| s.events.interrupt = Some(3)),
        ("events", |s| s.events.exception = Some(PendingException { vector: 40, error_code: None })),
        ("events", |s| s.events.exception = Some(PendingException { vector: 13, error_code: None })),
    ];
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    let good = timeless(vcpu.state().unwrap());
    for (index, (field, change)) in hostile.iter().enumerate() {
        let mut state = vcpu.state().unwrap();
        change(&mut state);
        match vcpu.set_state(&state) {
            Err(EngineError::State { field: named, .. }) => assert_eq!(named, *field, "case {index}"),
            other => panic!("case {index} ({field}): {other:?}"),
        }
        assert_eq!(timeless(vcpu.state().unwrap()), good, "case {index} changed something");
    }
}

/// A small generator of numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Changes a few things at random; often to something that is refused.
fn disturb(state: &mut CpuState, numbers: &mut Numbers) {
    for _ in 0..numbers.next() % 6 {
        let value = numbers.next();
        let narrow = value >> (value & 63);
        match numbers.next() % 22 {
            0 => state.regs.gpr[value as usize & 15] = narrow,
            1 => state.regs.rip = narrow & 0xf_ffff,
            2 => state.regs.rflags = narrow & 0x3f_7fd7 | 2,
            3 => state.control.cr0 = 0x10 | value & 0x8005_000f,
            4 => state.control.cr4 = value & 0x6ff,
            5 => state.control.cr3 = narrow & 0x3fff_ffff_ffff,
            6 => state.control.efer = value & 0xd01,
            7 => state.segments.cs.long ^= true,
            8 => state.segments.cs.db ^= true,
            9 => state.segments.ss.db ^= true,
            10 => state.segments.cs.limit = narrow as u32,
            11 => state.segments.ss.limit = narrow as u32,
            12 => state.segments.ds.kind = value as u8 & 15,
            13 => state.segments.gdtr.limit = value as u16,
            14 => state.segments.tr.kind = value as u8 & 15,
            15 => state.segments.tr.limit = narrow as u32,
            16 => state.dr7 = value & 0xffff_ffff,
            17 => state.lapic.registers[value as usize >> 8 & 63] = narrow as u32,
            18 => state.events.interrupt = Some(value as u8),
            19 => {
                state.events.exception = Some(PendingException { vector: value as u8 & 31, error_code: None })
            }
            20 => state.segments.ss.dpl = value as u8 & 3,
            _ => state.segments.idtr.base = narrow & 0xf_ffff,
        }
    }
}

#[test]
fn no_state_and_no_code_make_the_monitor_panic() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    let good = vcpu.state().unwrap();
    let memory: [u64; 0x2000] = machine.read(0);
    let kicker = vcpu.kicker();
    let done = AtomicBool::new(false);
    let mut taken = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                kicker.kick();
                thread::sleep(Duration::from_micros(300));
            }
        });
        for _ in 0..2000 {
            for (index, word) in memory.iter().enumerate() {
                machine.write_u64(8 * index as u64, *word);
            }
            // Faults are survived: the handler skips two bytes.
            let skip = [0x48, 0x83, 0x04, 0x24, 0x02, 0x48, 0xcf];
            machine.write(HANDLER, &skip);
            machine.write(HANDLER + 0x100, &[&[0x48, 0x83, 0xc4, 0x08][..], &skip].concat());
            for vector in [8, 10, 11, 12, 13, 14, 17] {
                machine.gate(vector, HANDLER + 0x100, 0, 0);
            }
            for block in 0..8 {
                let code: Vec<u8> = (0..16).flat_map(|_| snippet(&mut numbers)).collect();
                machine.write(CODE + block * 0x200, &code);
            }
            let mut state = good.clone();
            disturb(&mut state, &mut numbers);
            if vcpu.set_state(&state).is_ok() {
                taken += 1;
                // Twice: what is left behind has to be bearable, too.
                for _ in 0..2 {
                    let exit = vcpu.run(&mut Devices::default());
                    assert_ne!(exit, Exit::Shutdown);
                }
                let left = vcpu.state().unwrap();
                vcpu.set_state(&left).unwrap_or_else(|error| panic!("{error} of {state:?}"));
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(taken > 500, "{taken}");
    let instructions = vcpu.counters().instructions.unwrap();
    assert!(instructions > 100_000, "the programs did not get far: {instructions}");
}

/// Instructions that change how the processor works, with random operands, or random bytes.
fn snippet(numbers: &mut Numbers) -> Vec<u8> {
    const SYSTEM: &[&[u8]] = &[
        &[0x0f, 0x22, 0xc0],       // mov cr0, rax
        &[0x0f, 0x22, 0xe0],       // mov cr4, rax
        &[0x0f, 0x20, 0xc0],       // mov rax, cr0
        &[0x0f, 0x23, 0xf8],       // mov dr7, rax
        &[0x0f, 0x23, 0xc3],       // mov dr0, rbx
        &[0x8e, 0xd8],             // mov ds, eax
        &[0x8e, 0xd0],             // mov ss, eax
        &[0x8e, 0xe3],             // mov fs, ebx
        &[0x9c],                   // pushf
        &[0x9d],                   // popf
        &[0xfb],                   // sti
        &[0xfa],                   // cli
        &[0xcc],                   // int3
        &[0xcd, 0x80],             // int 0x80
        &[0x0f, 0x05],             // syscall
        &[0x48, 0x0f, 0x07],       // sysretq
        &[0x0f, 0x34],             // sysenter
        &[0x0f, 0x35],             // sysexit
        &[0x48, 0xcf],             // iretq
        &[0xcf],                   // iret
        &[0x48, 0xcb],             // retfq
        &[0x0f, 0x30],             // wrmsr
        &[0x0f, 0x32],             // rdmsr
        &[0x0f, 0x01, 0xf8],       // swapgs
        &[0x0f, 0x01, 0x14, 0x24], // lgdt [rsp]
        &[0x0f, 0x00, 0xd8],       // ltr ax
        &[0x0f, 0x00, 0xd0],       // lldt ax
        &[0x0f, 0x02, 0xc3],       // lar eax, ebx
        &[0x0f, 0x01, 0x38],       // invlpg [rax]
        &[0xf3, 0x6c],             // rep insb
        &[0xf3, 0x6e],             // rep outsb
        &[0xec],                   // in al, dx
        &[0xef],                   // out dx, eax
        &[0xff, 0x2c, 0x24],       // jmp far [rsp]
        &[0xff, 0x1c, 0x24],       // call far [rsp]
        &[0x0f, 0xb2, 0x04, 0x24], // lss eax, [rsp]
        &[0xf3, 0xa4],             // rep movsb
        &[0xf0, 0x48, 0x01, 0x03], // lock add [rbx], rax
    ];
    let value = numbers.next();
    match value % 4 {
        0 => value.to_le_bytes().to_vec(),
        1 => {
            // mov rax, rbx, rcx or rdx, something likely
            let likely = [
                0x8,
                0x10,
                0x1b,
                0x23,
                0x28,
                0x33,
                0x80b,
                0x830,
                0x838,
                0x6e0,
                0x10,
                0x1b,
                0x2b,
                CODE,
                STACK,
                HOLE,
                USER_PAGE,
                0x620,
                0x8001_0031,
                0xc000_0080,
                0xc000_0082,
                0x4b56_4d01,
                0xfee0_0d00,
                0x4500,
                0xf_fff8,
            ];
            let chosen = likely[(value >> 8) as usize % likely.len()]
                ^ if value >> 40 & 7 == 0 { value >> 50 } else { 0 };
            let mut code = vec![0x48, 0xb8 + (value >> 16) as u8 % 4];
            code.extend(chosen.to_le_bytes());
            code
        }
        _ => SYSTEM[(value >> 8) as usize % SYSTEM.len()].to_vec(),
    }
}
