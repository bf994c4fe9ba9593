//! A machine with a megabyte of memory, and long mode set up in it without running anything.

use std::sync::Arc;

use harrier_engine::cpu_state::{CpuState, DescriptorTable, MpState, Segment};
use harrier_engine::{CpuModel, Engine, Exit, Flow, GuestRegion, Io, PageLog, Vcpu, Vm, VmConfig};
use harrier_engine_soft::SoftEngine;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress, MmapRegion};

/// Where things lie. All of the first 2 MiB is mapped to itself; user code may use it from [`USER_PAGE`] on.
pub(crate) const GDT: u64 = 0x500;
pub(crate) const TSS: u64 = 0x600;
pub(crate) const IDT: u64 = 0x1000;
const TABLES: u64 = 0x2000;
pub(crate) const CODE: u64 = 0x8000;
pub(crate) const HANDLER: u64 = 0x9000;
pub(crate) const STACK: u64 = 0xb000;
pub(crate) const RING0_STACK: u64 = 0xc000;
pub(crate) const IST1: u64 = 0xd008;
pub(crate) const USER_PAGE: u64 = 0x10000;
/// A page that is not mapped.
pub(crate) const HOLE: u64 = 0x1f000;

pub(crate) const KERNEL_CODE: u16 = 0x08;
pub(crate) const KERNEL_DATA: u16 = 0x10;
pub(crate) const USER_DATA: u16 = 0x1b;
pub(crate) const USER_CODE: u16 = 0x23;
pub(crate) const TASK: u16 = 0x28;

/// Ends a program: `out 0xf4, al`.
pub(crate) const LEAVE: &[u8] = &[0xe6, 0xf4];

pub(crate) struct Machine {
    pub vm: Box<dyn Vm>,
    pub region: Arc<GuestRegion>,
}

/// Devices: port 0xf4 leaves, everything is written down.
#[derive(Default)]
pub(crate) struct Devices {
    pub written: Vec<(u16, u32)>,
    pub ended: Vec<u8>,
}

impl Io for Devices {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Flow {
        for (place, byte) in data.iter_mut().zip(u32::from(port).to_le_bytes()) {
            *place = byte;
        }
        Flow::Continue
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) -> Flow {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.written.push((port, u32::from_le_bytes(value)));
        if port == 0xf4 { Flow::Leave } else { Flow::Continue }
    }
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        Flow::Continue
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Flow {
        Flow::Continue
    }
    fn eoi(&mut self, vector: u8) -> Flow {
        self.ended.push(vector);
        Flow::Continue
    }
}

impl Machine {
    pub(crate) fn new(vcpu_count: u32) -> Machine {
        Machine::with_model(vcpu_count, CpuModel::V2)
    }

    pub(crate) fn with_model(vcpu_count: u32, cpu_model: CpuModel) -> Machine {
        let config = VmConfig { cpu_model, vcpu_count, tsc_khz: Some(1_000_000) };
        let vm = SoftEngine.create_vm(&config).unwrap();
        let mapping = MmapRegion::<PageLog>::new(1 << 20).unwrap();
        let region = Arc::new(GuestRegion::new(mapping, GuestAddress(0)).unwrap());
        vm.map_memory(Arc::clone(&region), false).unwrap();
        Machine { vm, region }
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.region.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub(crate) fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u64; N] {
        std::array::from_fn(|index| {
            self.region.read_obj(MemoryRegionAddress(gpa + 8 * index as u64)).unwrap()
        })
    }

    pub(crate) fn read_u32(&self, gpa: u64) -> u32 {
        self.region.read_obj(MemoryRegionAddress(gpa)).unwrap()
    }

    /// A 64-bit gate: interrupt gate with this stack-table entry, for CPL `dpl` and below.
    pub(crate) fn gate(&self, vector: u8, handler: u64, ist: u64, dpl: u64) {
        let at = IDT + u64::from(vector) * 16;
        let low = (handler & 0xffff)
            | u64::from(KERNEL_CODE) << 16
            | ist << 32
            | (0x8e | dpl << 5) << 40
            | (handler >> 16 & 0xffff) << 48;
        self.write_u64(at, low);
        self.write_u64(at + 8, handler >> 32);
    }

    /// A vCPU at [`CODE`] in long mode, CPL 0, with page tables, GDT, IDT and TSS in memory. Exceptions without a
    /// gate of their own leave at [`HANDLER`].
    pub(crate) fn long_mode(&self, index: u32) -> Box<dyn Vcpu> {
        for (slot, descriptor) in [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8b00_0000_0067 | TSS << 16,
        ]
        .into_iter()
        .enumerate()
        {
            self.write_u64(GDT + 8 * slot as u64, descriptor);
        }
        self.write_u64(TSS + 4, RING0_STACK);
        self.write_u64(TSS + 36, IST1);
        for vector in 0..=255 {
            self.gate(vector, HANDLER, 0, 0);
        }
        self.write(HANDLER, LEAVE);
        self.write_u64(TABLES, TABLES + 0x1000 | 7);
        self.write_u64(TABLES + 0x1000, TABLES + 0x2000 | 7);
        self.write_u64(TABLES + 0x2000, TABLES + 0x3000 | 7);
        for page in 0..256 {
            let at = page * 0x1000;
            let rights = if at >= USER_PAGE { 7 } else { 3 };
            self.write_u64(TABLES + 0x3000 + page * 8, if at == HOLE { 0 } else { at | rights });
        }
        let mut vcpu = self.vm.create_vcpu(index).unwrap();
        let mut state = vcpu.state().unwrap();
        let data = Segment::flat(KERNEL_DATA, 3, false);
        let segments = &mut state.segments;
        segments.cs = Segment::flat(KERNEL_CODE, 0xb, true);
        (segments.ss, segments.ds, segments.es) = (data, data, data);
        segments.tr = Segment {
            selector: TASK,
            base: TSS,
            limit: 0x67,
            kind: 0xb,
            present: true,
            ..Segment::default()
        };
        segments.gdtr = DescriptorTable { base: GDT, limit: 0x37 };
        segments.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        state.control.cr0 = 0x8001_0031;
        state.control.cr3 = TABLES;
        state.control.cr4 = 0x620;
        state.control.efer = 0xd01;
        state.regs.rip = CODE;
        state.regs.gpr[4] = STACK;
        state.mp_state = MpState::Runnable;
        vcpu.set_state(&state).unwrap();
        vcpu
    }
}

/// Changes a vCPU's state.
pub(crate) fn edit(vcpu: &mut dyn Vcpu, change: impl FnOnce(&mut CpuState)) {
    let mut state = vcpu.state().unwrap();
    change(&mut state);
    vcpu.set_state(&state).unwrap();
}

/// Runs until a write to port 0xf4.
pub(crate) fn run(vcpu: &mut dyn Vcpu) -> (CpuState, Devices) {
    let mut devices = Devices::default();
    assert_eq!(vcpu.run(&mut devices), Exit::Left);
    (vcpu.state().unwrap(), devices)
}

/// `mov ecx, msr; mov eax, low; mov edx, high; wrmsr`.
pub(crate) fn wrmsr(msr: u32, value: u64) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(msr.to_le_bytes());
    code.push(0xb8);
    code.extend((value as u32).to_le_bytes());
    code.push(0xba);
    code.extend(((value >> 32) as u32).to_le_bytes());
    code.extend([0x0f, 0x30]);
    code
}
