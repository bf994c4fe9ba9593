//! One engine's side: a machine with one processor, whose state and memory are set for each case.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use harrier_engine::cpu_state::{ControlRegisters, GeneralRegisters, MpState, SegmentRegisters, msr};
use harrier_engine::{
    CpuModel, CpuState, Engine, EngineError, Exit, Flow, GuestRegion, Kicker, PageLog, Vcpu, Vm, VmConfig,
};
use vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress, MmapRegion};

use super::layout::MEMORY;
use crate::devices::PortWrites;

/// A case that runs for so long does not end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a case sets of the processor; the rest is as after RESET.
#[derive(Debug, Clone, Default)]
pub(super) struct Registers {
    pub(super) regs: GeneralRegisters,
    pub(super) segments: SegmentRegisters,
    pub(super) control: ControlRegisters,
    pub(super) debug_addresses: [u64; 4],
    pub(super) dr6: u64,
    pub(super) dr7: u64,
    pub(super) msrs: Vec<(u32, u64)>,
}

/// How a case ended on one side.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Ending {
    /// At an `OUT`, with this state and memory.
    Out(Box<CpuState>, Vec<u8>),
    /// By a triple fault.
    TripleFault,
    /// It did not end.
    Endless,
    /// The engine does not take the state, or cannot execute the instruction.
    Unable(String),
}

pub(super) struct Side {
    vcpu: Box<dyn Vcpu>,
    region: Arc<GuestRegion>,
    start: CpuState,
    watchdog: Watchdog,
    vm: Box<dyn Vm>,
}

impl Side {
    pub(super) fn new(engine: &dyn Engine, cpu_model: CpuModel) -> Result<Side, EngineError> {
        let vm = engine.create_vm(&VmConfig { cpu_model, vcpu_count: 1, tsc_khz: None })?;
        let memory = |reason: String| EngineError::Memory { gpa: 0, size_bytes: MEMORY as u64, reason };
        let mapping = MmapRegion::<PageLog>::new(MEMORY).map_err(|err| memory(err.to_string()))?;
        let region = GuestRegion::new(mapping, GuestAddress(0))
            .ok_or_else(|| memory("it does not fit the address space".to_owned()))?;
        let region = Arc::new(region);
        vm.map_memory(Arc::clone(&region), false)?;
        let mut vcpu = vm.create_vcpu(0)?;
        let mut start = vcpu.state()?;
        // Its registers are no page of memory here, and nothing interrupts.
        start.msrs.retain(|&(index, _)| index != msr::IA32_TSC_DEADLINE);
        let watchdog = Watchdog::new(vcpu.kicker());
        Ok(Side { vcpu, region, start, watchdog, vm })
    }

    /// Whether the processor can be in this state.
    pub(super) fn takes(&mut self, registers: &Registers) -> bool {
        let state = self.state(registers);
        self.vcpu.set_state(&state).is_ok()
    }

    fn state(&self, registers: &Registers) -> CpuState {
        let mut state = self.start.clone();
        state.regs = registers.regs.clone();
        state.segments = registers.segments.clone();
        state.control = registers.control.clone();
        state.debug_addresses = registers.debug_addresses;
        state.dr6 = registers.dr6;
        state.dr7 = registers.dr7;
        for &(index, value) in &registers.msrs {
            if let Some((_, place)) = state.msrs.iter_mut().find(|(known, _)| *known == index) {
                *place = value;
            }
        }
        state.mp_state = MpState::Runnable;
        state
    }

    /// Forgets what was translated before: page tables change from case to case without the guest's doing.
    fn forget_translations(&self) -> Result<(), EngineError> {
        self.vm.unmap_memory(0)?;
        self.vm.map_memory(Arc::clone(&self.region), false)
    }

    /// Runs a case; `fresh` if its page tables are its own.
    pub(super) fn run(&mut self, registers: &Registers, memory: &[u8], fresh: bool) -> Ending {
        if fresh && let Err(err) = self.forget_translations() {
            return Ending::Unable(err.to_string());
        }
        let written = self.region.write_slice(memory, MemoryRegionAddress(0));
        assert!(written.is_ok(), "memory has the image's size");
        let state = self.state(registers);
        if let Err(err) = self.vcpu.set_state(&state) {
            return Ending::Unable(err.to_string());
        }
        let watch = self.watchdog.watch();
        let exit = self.vcpu.run(&mut PortWrites(|_, _: &[u8]| Flow::Leave));
        drop(watch);
        match exit {
            Exit::Left => {}
            Exit::TripleFault | Exit::Shutdown => return Ending::TripleFault,
            Exit::Kicked => return Ending::Endless,
            other => return Ending::Unable(format!("{other:?}")),
        }
        let mut after = match self.vcpu.state() {
            Ok(state) => state,
            Err(err) => return Ending::Unable(err.to_string()),
        };
        // Time goes on, and timers with it.
        after.tsc = Default::default();
        after.msrs.retain(|&(index, _)| index != msr::IA32_TSC_DEADLINE && index != msr::IA32_TSC_ADJUST);
        after.lapic = Default::default();
        let mut memory = vec![0; MEMORY];
        let read = self.region.read_slice(&mut memory, MemoryRegionAddress(0));
        assert!(read.is_ok(), "memory has the image's size");
        Ending::Out(Box::new(after), memory)
    }

    /// Instructions that another engine executed for this one.
    pub(super) fn assists(&self) -> u64 {
        self.vcpu.counters().assists
    }
}

/// Kicks a processor whose case does not end.
struct Watchdog {
    /// Cases begun, times two; odd while one runs.
    count: Arc<AtomicU64>,
    over: Arc<Mutex<bool>>,
}

impl Watchdog {
    fn new(kicker: Arc<dyn Kicker>) -> Watchdog {
        let (count, over) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(false)));
        let watched = (Arc::clone(&count), Arc::clone(&over));
        std::thread::spawn(move || {
            let mut seen = 0;
            loop {
                std::thread::sleep(PATIENCE);
                if *watched.1.lock().unwrap_or_else(PoisonError::into_inner) {
                    return;
                }
                let now = watched.0.load(Ordering::SeqCst);
                if now == seen && now & 1 != 0 {
                    kicker.kick();
                }
                seen = now;
            }
        });
        Watchdog { count, over }
    }

    fn watch(&self) -> impl Drop + use<> {
        struct Watch(Arc<AtomicU64>);
        impl Drop for Watch {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.count.fetch_add(1, Ordering::SeqCst);
        Watch(Arc::clone(&self.count))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}
