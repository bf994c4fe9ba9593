//! How fast an engine runs plain instructions, at privilege level 0 and at level 3.
//!
//! A loop in registers whose length is known, in 64-bit mode; it takes a few milliseconds at most, whatever the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::cpu_state::Segment;
use crate::{
    CpuModel, CpuState, Engine, EngineError, Exit, Flow, GuestRegion, Io, PageLog, Vcpu, Vm, VmConfig,
};

/// Rounds of two instructions of the first try: at 2 million instructions a second half a millisecond.
const FEW_ROUNDS: u32 = 500;
/// The same where it is only asked whether it is fast: a tenth of a millisecond and more for what is slow.
const FEWER_ROUNDS: u32 = 150;
/// On a processor so many take some tenths of a millisecond, far more than entering and leaving the guest.
const MOST_ROUNDS: u32 = 5_000_000;
/// A try that took this long says enough.
const ENOUGH: Duration = Duration::from_micros(400);
/// The same where it is only asked whether it is fast: on a processor the first rounds take a tenth of it.
const ENOUGH_TO_TELL: Duration = Duration::from_micros(100);
/// So often another program may have the processor meanwhile, before a slow run is believed.
const TRIES: u32 = 4;

// mmap(2) constants of Linux on x86-64.
const PROT_READ_WRITE: i32 = 1 | 2;
const MAP_PRIVATE_ANONYMOUS: i32 = 2 | 0x20;

const MEMORY_BYTES: usize = 64 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x9000;
/// loop: dec ecx; jnz loop; out 0xf4, al; jmp back to the loop
const LOOP: [u8; 8] = [0xff, 0xc9, 0x75, 0xfc, 0xe6, 0xf4, 0xeb, 0xf8];

/// A machine that runs nothing but the loop.
pub struct Loop {
    vcpu: Box<dyn Vcpu>,
    _vm: Box<dyn Vm>,
}

impl Loop {
    /// Creates the machine.
    ///
    /// # Errors
    /// [`EngineError`] if the engine does not run here.
    pub fn new(engine: &dyn Engine) -> Result<Self, EngineError> {
        let cpu_model = engine.cpu_models().into_iter().next().unwrap_or(CpuModel::V1);
        let vm = engine.create_vm(&VmConfig { cpu_model, vcpu_count: 1, tsc_khz: None })?;
        vm.map_memory(memory()?, false)?;
        Ok(Loop { vcpu: vm.create_vcpu(0)?, _vm: vm })
    }

    /// Million instructions a second at privilege level `level`, 0 or 3.
    ///
    /// # Errors
    /// [`EngineError`] if the engine cannot run the loop, which is a fault of the engine or of its host.
    pub fn mips(&mut self, level: u8) -> Result<f64, EngineError> {
        let mut rounds = FEW_ROUNDS;
        // The first run pays for page tables, caches and translations.
        self.run(level, rounds)?;
        loop {
            let took = self.run(level, rounds)?;
            if took >= ENOUGH || rounds >= MOST_ROUNDS {
                // Another program may have had the processor meanwhile.
                let took = took.min(self.run(level, rounds)?);
                return Ok(f64::from(rounds) * 2.0 / took.as_secs_f64().max(1e-9) / 1e6);
            }
            rounds *= 10;
        }
    }

    /// Whether privilege level `level` runs at `mips` million instructions a second or more. Takes less time than to find out how
    /// many they are.
    ///
    /// # Errors
    /// [`EngineError`] if the engine cannot run the loop, which is a fault of the engine or of its host.
    pub fn reaches(&mut self, level: u8, mips: f64) -> Result<bool, EngineError> {
        let mut rounds = FEWER_ROUNDS;
        loop {
            let mut took = self.run(level, rounds)?;
            for _ in 0..TRIES {
                if took < ENOUGH_TO_TELL {
                    break;
                }
                // Page tables, caches and translations were made, or another program had the processor.
                took = took.min(self.run(level, rounds)?);
            }
            if f64::from(rounds) * 2.0 / took.as_secs_f64().max(1e-9) / 1e6 >= mips {
                return Ok(true);
            }
            // Less says more about entering and leaving the guest than about its speed, and where that is slow, so does more.
            if rounds >= MOST_ROUNDS || took >= ENOUGH_TO_TELL && took >= self.run(level, 1)? * 2 {
                return Ok(false);
            }
            rounds *= 10;
        }
    }

    fn run(&mut self, level: u8, rounds: u32) -> Result<Duration, EngineError> {
        let mut state = self.vcpu.state()?;
        long_mode(&mut state, level);
        state.regs.gpr[1] = rounds.into();
        self.vcpu.set_state(&state)?;
        let start = Instant::now();
        match self.vcpu.run(&mut LeaveOnWrite) {
            Exit::Left => Ok(start.elapsed()),
            other => Err(EngineError::State {
                field: "calibration",
                reason: format!(
                    "a loop at privilege level {level} ended by {other:x?}: this host's engine is faulty"
                ),
            }),
        }
    }
}

/// Leaves on the first port write.
struct LeaveOnWrite;

impl Io for LeaveOnWrite {
    fn pio_read(&mut self, _port: u16, _data: &mut [u8]) -> Flow {
        Flow::Leave
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) -> Flow {
        Flow::Leave
    }
    fn mmio_read(&mut self, _gpa: u64, _data: &mut [u8]) -> Flow {
        Flow::Leave
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Flow {
        Flow::Leave
    }
    fn eoi(&mut self, _vector: u8) -> Flow {
        Flow::Continue
    }
}

/// Memory with the loop, and page tables that map its first 2 MiB one to one for user mode too.
fn memory() -> Result<Arc<GuestRegion>, EngineError> {
    let refused = |source| EngineError::Host { what: "map memory for the calibration", source };
    let mapping = MmapRegionBuilder::new_with_bitmap(MEMORY_BYTES, PageLog::with_len(MEMORY_BYTES))
        .with_mmap_prot(PROT_READ_WRITE)
        .with_mmap_flags(MAP_PRIVATE_ANONYMOUS)
        .build()
        .map_err(|err| refused(std::io::Error::other(err.to_string())))?;
    let region = GuestRegion::new(mapping, GuestAddress(0))
        .ok_or_else(|| refused(std::io::Error::other("the addresses overflow")))?;
    // Present, writable, user; the last one a large page.
    let tables = [(PML4, PDPT | 7), (PDPT, PAGE_DIRECTORY | 7), (PAGE_DIRECTORY, 0x87)];
    let written = tables
        .iter()
        .try_for_each(|&(at, entry)| region.write_obj(entry, MemoryRegionAddress(at)))
        .and_then(|()| region.write_slice(&LOOP, MemoryRegionAddress(CODE)));
    written.map_err(|err| refused(std::io::Error::other(err.to_string())))?;
    Ok(Arc::new(region))
}

fn long_mode(state: &mut CpuState, level: u8) {
    let segment = |selector: u16, kind, long| Segment::flat(selector | u16::from(level), kind, long);
    let data = segment(0x10, 3, false);
    let segments = &mut state.segments;
    segments.cs = segment(0x8, 0xb, true);
    (segments.ds, segments.es, segments.ss, segments.fs, segments.gs) = (data, data, data, data, data);
    // PG, ET, PE; PAE; LMA, LME.
    state.control.cr0 = 0x8000_0011;
    state.control.cr3 = PML4;
    state.control.cr4 = 0x20;
    state.control.efer = 0x500;
    state.regs.gpr[4] = STACK;
    state.regs.rip = CODE;
    // I/O privilege for user mode.
    state.regs.rflags = 0x3002;
}
