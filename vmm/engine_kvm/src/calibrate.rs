//! How fast this host's KVM runs kernel mode and user mode.
//!
//! There are hosts whose KVM runs only user mode on the processor and emulates kernel mode instruction by
//! instruction. A loop of known length at privilege level 0, and the same at level 3, tell within milliseconds.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::cpu_state::Segment;
use harrier_engine::{
    CpuModel, CpuState, Engine, EngineError, Exit, Flow, GuestRegion, Io, PageLog, Vcpu, VmConfig,
};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::KvmEngine;

/// Speeds in million instructions a second, of a loop in registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// At privilege level 0.
    pub kernel_mips: f64,
    /// At privilege level 3.
    pub user_mips: f64,
    /// Whether kernel mode runs on the processor. Where it does not, it is emulated in software, and Harrier's own
    /// software processor does that faster.
    pub kernel_mode_in_hardware: bool,
}

/// No emulator of single instructions comes near this, and no processor falls below it.
const SLOWEST_HARDWARE_MIPS: f64 = 100.0;
/// Loop rounds of two instructions: at 2 million instructions a second some milliseconds.
const FEW_ROUNDS: u32 = 2_000;
/// On hardware so many take some tenths of a millisecond, far more than entering and leaving the guest.
const MANY_ROUNDS: u32 = 1_000_000;
/// A few rounds that take longer than this are not on the processor.
const SLOW: Duration = Duration::from_millis(1);

const MEMORY_BYTES: usize = 64 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x9000;
/// loop: dec ecx; jnz loop; out 0xf4, al; jmp back to the loop
const LOOP: [u8; 8] = [0xff, 0xc9, 0x75, 0xfc, 0xe6, 0xf4, 0xeb, 0xf8];

/// Measures `/dev/kvm`.
///
/// # Errors
/// [`EngineError`] if KVM is not usable.
pub fn calibrate() -> Result<Calibration, EngineError> {
    calibrate_device(&crate::probe::default_path())
}

fn calibrate_device(path: &Path) -> Result<Calibration, EngineError> {
    let kernel_mips = measure(path, 0)?;
    let user_mips = measure(path, 3)?;
    Ok(Calibration { kernel_mips, user_mips, kernel_mode_in_hardware: kernel_mips >= SLOWEST_HARDWARE_MIPS })
}

/// Whether this KVM runs kernel mode on the processor, found out by a loop of a millisecond or two.
pub(crate) fn kernel_mode_in_hardware(path: &Path) -> Result<bool, EngineError> {
    let mut vcpu = vcpu(path)?;
    Ok(run_loop(vcpu.as_mut(), 0, FEW_ROUNDS)? < SLOW)
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

fn vcpu(path: &Path) -> Result<Box<dyn Vcpu>, EngineError> {
    let engine = KvmEngine::with_device(path.to_owned());
    let config = VmConfig { cpu_model: CpuModel::Host, vcpu_count: 1, tsc_khz: None };
    let vm = engine.create_vm(&config)?;
    vm.map_memory(memory()?, false)?;
    vm.create_vcpu(0)
}

/// Million instructions a second of the loop at this privilege level.
fn measure(path: &Path, level: u8) -> Result<f64, EngineError> {
    let mut vcpu = vcpu(path)?;
    let mut best: f64 = 0.0;
    // The first run of each pays for page tables and caches.
    let mut rounds = FEW_ROUNDS;
    for _ in 0..3 {
        let took = run_loop(vcpu.as_mut(), level, rounds)?;
        best = best.max(f64::from(rounds) * 2.0 / took.as_secs_f64().max(1e-9) / 1e6);
        if took < SLOW {
            rounds = MANY_ROUNDS;
        }
    }
    Ok(best)
}

fn run_loop(vcpu: &mut dyn Vcpu, level: u8, rounds: u32) -> Result<Duration, EngineError> {
    let mut state = vcpu.state()?;
    long_mode(&mut state, level);
    state.regs.gpr[1] = rounds.into();
    vcpu.set_state(&state)?;
    let start = Instant::now();
    match vcpu.run(&mut LeaveOnWrite) {
        Exit::Left => Ok(start.elapsed()),
        other => Err(EngineError::State {
            field: "calibration",
            reason: format!("a loop at privilege level {level} ended by {other:x?}: KVM is faulty here"),
        }),
    }
}

/// Memory with the loop, and page tables that map its first 2 MiB one to one for user mode too.
fn memory() -> Result<Arc<GuestRegion>, EngineError> {
    let refused = |source| EngineError::Host { what: "map memory for the calibration", source };
    let mapping = MmapRegionBuilder::new_with_bitmap(MEMORY_BYTES, PageLog::with_len(MEMORY_BYTES))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
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
    let segment = |selector: u16, kind, long| Segment {
        selector: selector | u16::from(level),
        limit: 0xffff_ffff,
        kind,
        code_or_data: true,
        dpl: level,
        present: true,
        long,
        db: !long,
        granularity: true,
        ..Segment::default()
    };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_finds_user_mode_on_the_processor() {
        match calibrate() {
            Ok(found) => {
                println!("{found:?}");
                assert!(found.user_mips > SLOWEST_HARDWARE_MIPS, "{found:?}");
                assert!(found.kernel_mips > 0.01, "{found:?}");
            }
            Err(err) => println!("skipped: calibration: {err}"),
        }
    }

    #[test]
    fn a_host_without_kvm_is_told_so() {
        let error = calibrate_device(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
        assert!(
            error.starts_with("the kvm engine is not available: /nonexistent/kvm does not exist"),
            "{error}"
        );
    }
}
