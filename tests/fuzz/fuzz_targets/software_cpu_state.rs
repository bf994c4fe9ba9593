#![no_main]
//! The software processor in any state: page tables, descriptors, segments, control registers and code from the input,
//! run as a machine runs them until a device, a fault or a kick ends it.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use harrier_engine::{CpuState, Engine as _, GuestRegion, Vcpu, Vm};
use harrier_engine_soft::SoftEngine;
use harrier_fuzz::cpu::{self, Devices, MEMORY_BYTES, MODELS};
use harrier_fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes as _, MemoryRegionAddress};

/// How often whoever runs without end is stopped.
const KICKS: Duration = Duration::from_micros(300);

struct Processor {
    vcpu: Box<dyn Vcpu>,
    start: CpuState,
    _vm: Box<dyn Vm>,
}

struct Machine {
    memory: [Arc<GuestRegion>; 4],
    processors: Vec<Processor>,
}

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new({
        let memory = [(); 4].map(|()| cpu::memory());
        let mut kickers = Vec::new();
        let processors = MODELS.iter().zip(&memory).map(|(&model, memory)| {
            let vm = SoftEngine.create_vm(&cpu::config(model)).expect("a machine");
            vm.map_memory(Arc::clone(memory), false).expect("memory");
            let mut vcpu = vm.create_vcpu(0).expect("a vcpu");
            let start = vcpu.state().expect("its state");
            kickers.push(vcpu.kicker());
            Processor { vcpu, start, _vm: vm }
        });
        let processors = processors.collect();
        std::thread::spawn(move || loop {
            std::thread::sleep(KICKS);
            kickers.iter().for_each(|kicker| kicker.kick());
        });
        Machine { memory, processors }
    });
}

fuzz_target!(|bytes: &[u8]| {
    MACHINE.with_borrow_mut(|machine| {
        let mut input = Input::new(bytes);
        let model = usize::from(input.u8() & 3);
        let Processor { vcpu, start, .. } = &mut machine.processors[model];
        let memory = &machine.memory[model];
        let state = cpu::state(&mut input, start.clone());
        // Page-table entries and descriptors that lead somewhere, then bytes.
        for _ in 0..input.u8() & 31 {
            let at = u64::from(input.u16() % 512) * 8 + (u64::from(input.u8()) & 0xf) * 0x1000;
            let entry = u64::from(input.u16() & 0xf) << 12
                | u64::from(input.u16() & 0x1ff)
                | u64::from(input.u8() & 1) << 63;
            let _ = memory.write_obj(entry, MemoryRegionAddress(at % MEMORY_BYTES as u64));
        }
        let at = u64::from(input.u16()) % MEMORY_BYTES as u64;
        let code = input.take(256);
        let room = MEMORY_BYTES - at as usize;
        let _ = memory.write_slice(&code[..code.len().min(room)], MemoryRegionAddress(at));
        if vcpu.set_state(&state).is_ok() {
            let _ = vcpu.run(&mut Devices(1));
            let _ = vcpu.state().expect("a state");
        }
    });
});
