//! A machine of one memory region and recorded accesses, for guests of a few bytes.

use std::sync::Arc;

use harrier_engine::cpu_state::Segment;
use harrier_engine::{CpuModel, CpuState, Engine, Flow, GuestRegion, Io, PageLog, Probe, Vcpu, Vm, VmConfig};
use harrier_engine_kvm::KvmEngine;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

/// Bytes of guest memory, from address 0 on.
pub(crate) const MEMORY: usize = 4 << 20;
/// Where guests are loaded and start.
pub(crate) const CODE: u64 = 0x1000;
/// Top of their stack.
pub(crate) const STACK: u64 = 0x9000;
/// An address without memory.
pub(crate) const DEVICE: u64 = 0xd000_0000;
/// A write to this port leaves the guest.
pub(crate) const EXIT_PORT: u16 = 0xf4;

/// The engine, or a visible skip where this host has no usable KVM.
pub(crate) fn engine() -> Option<KvmEngine> {
    let engine = KvmEngine::default();
    match engine.probe() {
        Probe::Available { .. } => Some(engine),
        Probe::Unavailable { reason } => {
            let test = std::thread::current().name().unwrap_or("a test").to_owned();
            println!("skipped: {test}: kvm: {reason}");
            None
        }
    }
}

/// Memory, machine and vCPUs.
pub(crate) struct Machine {
    pub(crate) memory: Arc<GuestRegion>,
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
}

pub(crate) fn machine(engine: &dyn Engine, vcpu_count: u32) -> Machine {
    let config = VmConfig { cpu_model: CpuModel::V1, vcpu_count, tsc_khz: None };
    let vm = engine.create_vm(&config).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(MEMORY, PageLog::with_len(MEMORY))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let memory = Arc::new(GuestRegion::new(mapping, GuestAddress(0)).unwrap());
    vm.map_memory(Arc::clone(&memory), false).unwrap();
    let vcpus = (0..vcpu_count).map(|index| vm.create_vcpu(index).unwrap()).collect();
    Machine { memory, vm, vcpus }
}

impl Machine {
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub(crate) fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, MemoryRegionAddress(gpa)).unwrap();
        bytes
    }

    /// Takes over the whole memory of another machine.
    pub(crate) fn copy_from(&self, other: &Machine) {
        let mut bytes = vec![0; MEMORY];
        other.memory.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        self.write(0, &bytes);
    }

    /// Loads `code` and lets vCPU 0 start there in real mode.
    pub(crate) fn start_real(&mut self, code: &[u8]) {
        self.start(code, real_mode);
    }

    /// Loads `code` and lets vCPU 0 start there in flat 32-bit protected mode.
    pub(crate) fn start_protected(&mut self, code: &[u8]) {
        self.start(code, protected_mode);
    }

    /// Loads `code` and lets vCPU 0 start there in long mode, with the first 4 GiB mapped one to one.
    pub(crate) fn start_long(&mut self, code: &[u8]) {
        self.page_tables();
        self.start(code, long_mode);
    }

    fn start(&mut self, code: &[u8], mode: fn(&mut CpuState)) {
        self.write(CODE, code);
        let mut state = self.vcpus[0].state().unwrap();
        mode(&mut state);
        self.vcpus[0].set_state(&state).unwrap();
    }

    fn page_tables(&self) {
        const PML4: u64 = 0x10_0000;
        const PDPT: u64 = 0x10_1000;
        const PD: u64 = 0x10_2000;
        self.write_u64(PML4, PDPT | 3);
        for gib in 0..4 {
            self.write_u64(PDPT + 8 * gib, (PD + 0x1000 * gib) | 3);
            for large_page in 0..512 {
                self.write_u64(PD + 0x1000 * gib + 8 * large_page, gib << 30 | large_page << 21 | 0x83);
            }
        }
    }

    pub(crate) fn run(&mut self, io: &mut Recorder) -> harrier_engine::Exit {
        self.vcpus[0].run(io)
    }
}

pub(crate) fn real_mode(state: &mut CpuState) {
    state.segments.cs.selector = 0;
    state.segments.cs.base = 0;
    entry(state);
}

pub(crate) fn protected_mode(state: &mut CpuState) {
    let data = Segment::flat(0x10, 3, false);
    let segments = &mut state.segments;
    segments.cs = Segment::flat(0x8, 0xb, false);
    (segments.ds, segments.es, segments.ss, segments.fs, segments.gs) = (data, data, data, data, data);
    state.control.cr0 = 0x11;
    entry(state);
}

pub(crate) fn long_mode(state: &mut CpuState) {
    protected_mode(state);
    state.segments.cs.long = true;
    state.segments.cs.db = false;
    state.control.cr0 = 0x8000_0011;
    state.control.cr3 = 0x10_0000;
    state.control.cr4 = 0x20 | 0x600;
    state.control.efer = 0x500;
    entry(state);
}

fn entry(state: &mut CpuState) {
    state.regs.gpr = [0; 16];
    state.regs.gpr[4] = STACK;
    state.regs.rip = CODE;
    state.regs.rflags = 2;
}

/// What the guest accessed, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Load(u64, usize),
    Store(u64, Vec<u8>),
    Eoi(u8),
}

/// Records accesses; loads and IN answer 0x11, 0x12, 0x13, …
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    pub(crate) seen: Vec<Access>,
    next: u8,
}

impl Recorder {
    fn fill(&mut self, data: &mut [u8]) {
        for byte in data {
            self.next += 1;
            *byte = 0x10 + self.next;
        }
    }

    /// What was written to a port, byte by byte.
    pub(crate) fn written(&self, port: u16) -> Vec<u8> {
        let of_port = |access: &Access| match access {
            Access::Out(at, bytes) if *at == port => bytes.clone(),
            _ => Vec::new(),
        };
        self.seen.iter().flat_map(of_port).collect()
    }
}

impl Io for Recorder {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Flow {
        self.seen.push(Access::In(port, data.len()));
        self.fill(data);
        Flow::Continue
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> Flow {
        self.seen.push(Access::Out(port, data.to_vec()));
        if port == EXIT_PORT { Flow::Leave } else { Flow::Continue }
    }

    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Flow {
        self.seen.push(Access::Load(gpa, data.len()));
        self.fill(data);
        Flow::Continue
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Flow {
        self.seen.push(Access::Store(gpa, data.to_vec()));
        Flow::Continue
    }

    fn eoi(&mut self, vector: u8) -> Flow {
        self.seen.push(Access::Eoi(vector));
        Flow::Continue
    }
}
