#![no_main]
//! The software processor's decoder and handlers: any bytes as code in any mode, an instruction at a time.

use std::cell::RefCell;
use std::sync::Arc;

use harrier_engine::assist::{AssistantVcpu, Assisted};
use harrier_engine::cpu_state::{MpState, Segment};
use harrier_engine::{CpuModel, CpuState, Engine as _, GuestRegion};
use harrier_engine_soft::SoftEngine;
use harrier_fuzz::cpu::{self, Devices, MEMORY_BYTES};
use harrier_fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes as _, MemoryRegionAddress};

const CODE: u64 = 0x8000;
const STEPS: usize = 6;

struct Machine {
    memory: Arc<GuestRegion>,
    vcpus: [Box<dyn AssistantVcpu>; 3],
    start: CpuState,
}

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new({
        let memory = cpu::memory();
        let vcpus = [CpuModel::V1, CpuModel::V2, CpuModel::V3]
            .map(|model| cpu::assistant(model, &memory).create_vcpu(0).expect("a vcpu"));
        let vm = SoftEngine.create_vm(&cpu::config(CpuModel::V1)).expect("a machine");
        let start = vm.create_vcpu(0).expect("a vcpu").state().expect("its state");
        Machine { memory, vcpus, start }
    });
}

fuzz_target!(|bytes: &[u8]| {
    MACHINE.with_borrow_mut(|machine| {
        let mut input = Input::new(bytes);
        let mode = input.u8();
        let mut state = machine.start.clone();
        let bits = mode & 3;
        let privilege = if mode & 4 != 0 { 3 } else { 0 };
        let flat = |kind: u8| Segment {
            selector: 0x10 | u16::from(privilege),
            limit: u32::MAX,
            kind,
            code_or_data: true,
            dpl: privilege,
            present: true,
            long: kind & 8 != 0 && bits == 2,
            db: bits == 1 || (bits == 2 && kind & 8 == 0),
            granularity: true,
            ..Segment::default()
        };
        let segments = &mut state.segments;
        segments.cs = flat(0xb);
        for segment in
            [&mut segments.ss, &mut segments.ds, &mut segments.es, &mut segments.fs, &mut segments.gs]
        {
            *segment = flat(3);
        }
        // Identity mapping of the first 2 MiB by one large page, for everybody.
        for (table, entry) in [(0x1000u64, 0x2007u64), (0x2000, 0x3007), (0x3000, 0xe7)] {
            let _ = machine.memory.write_obj(entry, MemoryRegionAddress(table));
        }
        state.control.cr0 = 0x31 | u64::from(bits == 2) << 31;
        state.control.cr3 = 0x1000;
        state.control.cr4 = 0x620;
        state.control.efer = if bits == 2 { 0xd01 } else { 0 };
        if mode & 0x30 == 0x30 {
            state.control.cr4 |= 0x4_0000;
            state.control.xcr0 = 7;
        }
        for register in &mut state.regs.gpr {
            *register = (u64::from(input.u16()) << 4 | 8) % MEMORY_BYTES as u64;
        }
        state.regs.rip = CODE;
        let code = input.take(90);
        let _ = machine.memory.write_slice(code, MemoryRegionAddress(CODE));
        let _ = machine.memory.write_slice(&[0x90; 16], MemoryRegionAddress(CODE + code.len() as u64));
        let vcpu = &mut machine.vcpus[usize::from(mode >> 4 & 3).min(2)];
        let mut devices = Devices(u64::from(mode));
        for _ in 0..STEPS {
            match vcpu.execute(&mut state, &mut devices) {
                // Who halts waits for an interrupt that nobody sends.
                Ok(Assisted::Done { leave: false }) if state.mp_state == MpState::Runnable => {}
                _ => break,
            }
        }
    });
});
