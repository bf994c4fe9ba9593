//! A software processor with a little memory between two guard pages.

use std::sync::Arc;

use harrier_engine::assist::{Assistant, SoftwareEngine};
use harrier_engine::cpu_state::{DescriptorTable, MpState, SAVED_MSRS, Segment};
use harrier_engine::{CpuModel, CpuState, Flow, GuestRegion, Io, PageLog, VmConfig};
use harrier_engine_soft::SoftEngine;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use vm_memory::GuestAddress;
use vm_memory::bitmap::NewBitmap as _;
use vm_memory::mmap::MmapRegionBuilder;

use crate::input::Input;

/// Guest memory: from address 0 on.
pub const MEMORY_BYTES: usize = 16 * PAGE;
const PAGE: usize = 4096;

/// The models, one for each pair of bits.
pub const MODELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::Host];

/// Memory of a guest; an access beyond either end is a fault of this process.
pub fn memory() -> Arc<GuestRegion> {
    let whole = MEMORY_BYTES + 2 * PAGE;
    // SAFETY: a fresh mapping that nobody else knows and that is never unmapped; its first and last pages are taken
    // away, and the region gets what lies between.
    let mapping = unsafe {
        let start = mmap_anonymous(
            std::ptr::null_mut(),
            whole,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
        .expect("a mapping");
        let inner = start.cast::<u8>().add(PAGE);
        mprotect(start, PAGE, MprotectFlags::empty()).expect("a guard page");
        mprotect(inner.add(MEMORY_BYTES).cast(), PAGE, MprotectFlags::empty()).expect("a guard page");
        MmapRegionBuilder::new_with_bitmap(MEMORY_BYTES, PageLog::with_len(MEMORY_BYTES))
            .with_raw_mmap_pointer(inner)
            .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits().cast_signed())
            .build()
            .expect("a region")
    };
    Arc::new(GuestRegion::new(mapping, GuestAddress(0)).expect("a region at address 0"))
}

/// What every machine is created with.
pub fn config(cpu_model: CpuModel) -> VmConfig {
    VmConfig { cpu_model, vcpu_count: 1, tsc_khz: Some(1_000_000) }
}

/// An assistant that executes single instructions on `memory`.
pub fn assistant(model: CpuModel, memory: &Arc<GuestRegion>) -> Box<dyn Assistant> {
    // What assists KVM has no model of its own for the host; the best named one is the same code.
    let assistant = SoftEngine.create_assistant(&config(model)).expect("an assistant");
    assistant.map_memory(Arc::clone(memory), false).expect("memory");
    assistant
}

/// Devices that answer something and end the run now and then.
pub struct Devices(pub u64);

impl Devices {
    fn next(&mut self) -> Flow {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        if self.0 >> 60 == 0 { Flow::Leave } else { Flow::Continue }
    }
}

impl Io for Devices {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) -> Flow {
        data.fill(self.0 as u8);
        self.next()
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) -> Flow {
        self.next()
    }
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) -> Flow {
        data.fill(self.0 as u8);
        self.next()
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Flow {
        self.next()
    }
    fn eoi(&mut self, _vector: u8) -> Flow {
        Flow::Continue
    }
}

/// An address that often means something in so little memory.
fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() & 7 {
        0 => input.u64(),
        1 => u64::MAX - u64::from(input.u16()),
        2 => u64::from(input.u32()),
        3 => MEMORY_BYTES as u64 - u64::from(input.u8()),
        _ => u64::from(input.u16()) % MEMORY_BYTES as u64,
    }
}

fn segment(input: &mut Input<'_>) -> Segment {
    let bits = input.u16();
    Segment {
        selector: input.u16(),
        base: if bits & 0x1000 != 0 { address(input) } else { 0 },
        limit: if bits & 0x2000 != 0 { input.u32() } else { u32::MAX },
        kind: bits as u8 & 0xf,
        code_or_data: bits & 0x10 == 0,
        dpl: (bits >> 5) as u8 & 3,
        present: bits & 0x80 == 0,
        avl: false,
        long: bits & 0x100 != 0,
        db: bits & 0x200 != 0,
        granularity: bits & 0x400 != 0,
        unusable: bits & 0x800 != 0 && bits & 0x4000 != 0,
    }
}

/// Makes a state of the input, starting from one that the processor had. Not every answer is one that a processor can
/// be in.
pub fn state(input: &mut Input<'_>, mut state: CpuState) -> CpuState {
    for register in &mut state.regs.gpr {
        *register = address(input);
    }
    state.regs.rip = address(input);
    state.regs.rflags = u64::from(input.u32()) & 0x3f_7fd5 | 2;
    let segments = &mut state.segments;
    for segment_register in [
        &mut segments.es,
        &mut segments.cs,
        &mut segments.ss,
        &mut segments.ds,
        &mut segments.fs,
        &mut segments.gs,
        &mut segments.ldtr,
        &mut segments.tr,
    ] {
        *segment_register = segment(input);
    }
    segments.gdtr = DescriptorTable { base: address(input), limit: input.u16() };
    segments.idtr = DescriptorTable { base: address(input), limit: input.u16() };
    let mode = input.u8();
    let control = &mut state.control;
    control.cr0 =
        u64::from(input.u32()) & 0xe005_002e | 0x10 | u64::from(mode & 1) | u64::from(mode & 3 == 3) << 31;
    control.cr2 = address(input);
    control.cr3 = address(input) & 0xffff;
    control.cr4 = u64::from(input.u32()) & if mode & 0x10 != 0 { 0x37_0ffb } else { 0x6f8 };
    control.cr8 = 0;
    control.efer = u64::from(input.u8() & 1) | u64::from(mode & 8) << 8;
    if mode & 7 == 7 {
        control.efer |= 0x500;
        control.cr4 |= 0x20;
    }
    control.xcr0 = [1, 3, 7, 7][usize::from(input.u8() & 3)];
    state.debug_addresses = std::array::from_fn(|_| address(input));
    state.dr7 = if mode & 0x20 != 0 { u64::from(input.u32()) } else { 0x400 };
    for (index, value) in &mut state.msrs {
        if SAVED_MSRS.contains(index) && mode & 0x40 != 0 {
            *value ^= u64::from(input.u8());
        }
    }
    state.xsave = vec![0; if control.xcr0 & 4 != 0 { 832 } else { 576 }];
    let area = input.take(832);
    state.xsave[..area.len().min(512)].copy_from_slice(&area[..area.len().min(512)]);
    state.xsave[24..28].copy_from_slice(&(0x1f80u32 ^ u32::from(input.u16())).to_le_bytes());
    state.xsave[28..32].fill(0);
    state.xsave[512] = 3;
    state.mp_state = MpState::Runnable;
    state
}
