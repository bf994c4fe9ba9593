//! The software processor finishes what a KVM cannot: a guest of a few kernel-mode instructions that not every KVM's
//! emulator knows. On hardware nothing needs finishing, and the outcome is the same.

use std::sync::Arc;

use harrier_engine::cpu_state::{DescriptorTable, Segment};
use harrier_engine::{CpuModel, CpuState, Engine, Exit, Flow, GuestRegion, Io, PageLog, Probe, Vm, VmConfig};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

const MEMORY: usize = 4 << 20;
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x2000;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const STACK: u64 = 0x9000;
const PML4: u64 = 0x10_0000;
// mmap(2) constants of Linux on x86-64.
const PROT_READ_WRITE: i32 = 1 | 2;
const MAP_PRIVATE_ANONYMOUS: i32 = 2 | 0x20;

/// Leaves on the first write to a port.
struct LeaveOnWrite;

impl Io for LeaveOnWrite {
    fn pio_read(&mut self, _port: u16, _data: &mut [u8]) -> Flow {
        Flow::Continue
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) -> Flow {
        Flow::Leave
    }
    fn mmio_read(&mut self, _gpa: u64, _data: &mut [u8]) -> Flow {
        Flow::Continue
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Flow {
        Flow::Continue
    }
    fn eoi(&mut self, _vector: u8) -> Flow {
        Flow::Continue
    }
}

fn memory() -> Arc<GuestRegion> {
    let mapping = MmapRegionBuilder::new_with_bitmap(MEMORY, PageLog::with_len(MEMORY))
        .with_mmap_prot(PROT_READ_WRITE)
        .with_mmap_flags(MAP_PRIVATE_ANONYMOUS)
        .build()
        .unwrap();
    let region = GuestRegion::new(mapping, GuestAddress(0)).unwrap();
    let put = |at: u64, value: u64| region.write_obj(value, MemoryRegionAddress(at)).unwrap();
    put(PML4, PML4 + 0x1003);
    put(PML4 + 0x1000, PML4 + 0x2003);
    for page in 0..512 {
        put(PML4 + 0x2000 + 8 * page, page << 21 | 0x83);
    }
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    // Interrupt gate of vector 3.
    put(IDT + 16 * 3, HANDLER & 0xffff | 8 << 16 | 0x8e << 40);
    Arc::new(region)
}

fn long_mode(state: &mut CpuState) {
    let data = Segment::flat(0x10, 3, false);
    let segments = &mut state.segments;
    segments.cs = Segment::flat(8, 0xb, true);
    (segments.ds, segments.es, segments.ss, segments.fs, segments.gs) = (data, data, data, data, data);
    segments.gdtr = DescriptorTable { base: GDT, limit: 0x17 };
    segments.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    state.control.cr0 = 0x8000_0033;
    state.control.cr3 = PML4;
    state.control.cr4 = 0x620;
    state.control.efer = 0x500;
    state.regs.gpr = [0; 16];
    state.regs.gpr[4] = STACK;
    state.regs.rip = CODE;
    state.regs.rflags = 2;
}

#[test]
fn instructions_that_kvms_emulator_lacks_are_executed_in_software() {
    let engine = KvmEngine::default().with_assistant(Arc::new(SoftEngine));
    if let Probe::Unavailable { reason } = engine.probe() {
        println!("skipped: assist: kvm: {reason}");
        return;
    }
    let config = VmConfig { cpu_model: CpuModel::V1, vcpu_count: 1, tsc_khz: None };
    let vm: Box<dyn Vm> = engine.create_vm(&config).unwrap();
    let memory = memory();
    // movq xmm1, rbx; movq rcx, xmm1; pxor xmm0, xmm0; int3; out 0xf4, al
    let code = [
        0x66, 0x48, 0x0f, 0x6e, 0xcb, 0x66, 0x48, 0x0f, 0x7e, 0xc9, 0x66, 0x0f, 0xef, 0xc0, 0xcc, 0xe6, 0xf4,
    ];
    memory.write_slice(&code, MemoryRegionAddress(CODE)).unwrap();
    // mov rsi, [rsp]; iretq
    memory.write_slice(&[0x48, 0x8b, 0x34, 0x24, 0x48, 0xcf], MemoryRegionAddress(HANDLER)).unwrap();
    vm.map_memory(memory, false).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = vcpu.state().unwrap();
    long_mode(&mut state);
    state.regs.gpr[3] = 0x1122_3344_5566_7788;
    vcpu.set_state(&state).unwrap();

    assert_eq!(vcpu.run(&mut LeaveOnWrite), Exit::Left);
    let state = vcpu.state().unwrap();
    assert_eq!(state.regs.rip, CODE + code.len() as u64);
    assert_eq!(state.regs.gpr[1], 0x1122_3344_5566_7788);
    assert_eq!(state.regs.gpr[6], CODE + 15, "the handler found the address after INT3 on its stack");
    assert_eq!(state.regs.gpr[4], STACK);
    println!("assists: {}", vcpu.counters().assists);
}
