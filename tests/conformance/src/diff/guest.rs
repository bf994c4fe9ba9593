//! The engine's side: a machine whose only program is the one of the window, in user mode, with fault handlers that
//! write down and go on.

use std::sync::Arc;

use harrier_engine::cpu_state::{DescriptorTable, Segment};
use harrier_engine::{CpuModel, Engine, EngineError, Exit, Flow, GuestRegion, PageLog, Vcpu, Vm, VmConfig};
use vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress, MmapRegion};

use super::layout::{
    BASE, Bits, CODE, CODE64, Code, DATA, EXIT, FAULT, FLAT, HOLE, PROGRAM, READ_ONLY, SAVER, SECOND_HOLE,
    SHORT_CODE_LIMIT, SHORT_DATA_LIMIT, SHORT_TAKEN, TAKEN, TAKEN_POINTER, WINDOW, program, short_taken,
    taken,
};
use crate::devices::PortWrites;

const GDT: u64 = 0x1000;
const TSS: u64 = 0x1800;
const IDT: u64 = 0x2000;
const HANDLERS: u64 = 0x3000;
/// Local descriptors: code and data of 16 bits.
const LDT: u64 = 0x1c00;
const KERNEL_STACK: u64 = 0x6000;
/// Four levels, each a page but the last.
const TABLES: u64 = 0x8000;
/// Guest physical address of the window.
const WINDOW_GPA: u64 = 0x10_0000;
const EXIT_CODE: u64 = 0x7000;
const EXIT_PORT: u16 = 0xf4;
const EXIT_VECTOR: u8 = 0x80;
/// Of a page-table entry.
const NO_EXECUTE: u64 = 1 << 63;

pub(super) struct Guest {
    vcpu: Box<dyn Vcpu>,
    region: Arc<GuestRegion>,
    _vm: Box<dyn Vm>,
}

impl Guest {
    /// A machine of this engine with this model, which has AVX.
    pub(super) fn new(engine: &dyn Engine, cpu_model: CpuModel, bits: Bits) -> Result<Guest, EngineError> {
        let vm = engine.create_vm(&VmConfig { cpu_model, vcpu_count: 1, tsc_khz: None })?;
        let size = WINDOW_GPA as usize + WINDOW;
        let memory = |reason: String| EngineError::Memory { gpa: 0, size_bytes: size as u64, reason };
        let mapping = MmapRegion::<PageLog>::new(size).map_err(|err| memory(err.to_string()))?;
        let region = GuestRegion::new(mapping, GuestAddress(0))
            .ok_or_else(|| memory("it does not fit the address space".to_owned()))?;
        let region = Arc::new(region);
        vm.map_memory(Arc::clone(&region), false)?;
        let vcpu = vm.create_vcpu(0)?;
        let mut guest = Guest { vcpu, region, _vm: vm };
        guest.put_kernel();
        guest.put_short_segments();
        let (program, saver) = program(bits);
        guest.write(PROGRAM, &program);
        guest.write(TAKEN, &taken(bits));
        guest.write(CODE + SHORT_TAKEN, &short_taken());
        guest.write(TAKEN_POINTER, &TAKEN.to_le_bytes());
        guest.write(SAVER, &(PROGRAM + saver).to_le_bytes());
        // int 0x80 in the window's first page of code.
        let exit = PROGRAM + 0xff0;
        guest.write(exit, &[0xcd, EXIT_VECTOR]);
        guest.write(EXIT, &exit.to_le_bytes());
        guest.enter_user_mode()?;
        Ok(guest)
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        // All addresses are constants or checked by the callers.
        let written = self.region.write_slice(bytes, MemoryRegionAddress(gpa));
        assert!(written.is_ok(), "{gpa:#x} is beyond the guest's memory");
    }

    fn put_word(&self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// Writes into the window.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.put(at - BASE + WINDOW_GPA, bytes);
    }

    /// Reads from the window.
    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = self.region.read_slice(&mut bytes, MemoryRegionAddress(at - BASE + WINDOW_GPA));
        assert!(read.is_ok(), "{at:#x} is beyond the window");
        bytes
    }

    /// Runs the program once.
    pub(super) fn run(&mut self) -> Result<(), String> {
        let mut state = self.vcpu.state().map_err(|err| err.to_string())?;
        state.regs.rip = PROGRAM;
        state.segments.cs = Segment::flat(CODE64, 0xb, true);
        state.segments.ss = Segment::flat(FLAT, 3, false);
        state.regs.rflags = 0x202;
        self.vcpu.set_state(&state).map_err(|err| err.to_string())?;
        let leave = |port, _: &[u8]| if port == EXIT_PORT { Flow::Leave } else { Flow::Continue };
        match self.vcpu.run(&mut PortWrites(leave)) {
            Exit::Left => Ok(()),
            other => Err(format!("the engine ended by {other:?}")),
        }
    }

    /// Descriptors, page tables and fault handlers.
    fn put_kernel(&self) {
        // The kernel's code and data; user mode's as Linux has them; the task.
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
            0x0000_8b00_0000_0067 | TSS << 16,
        ];
        for (slot, descriptor) in descriptors.into_iter().enumerate() {
            self.put_word(GDT + 8 * slot as u64, descriptor);
        }
        self.put_word(TSS + 4, KERNEL_STACK);
        // No ports: the map begins behind the segment's end.
        self.put(TSS + 0x66, &0x68u16.to_le_bytes());
        let gate = |vector: u64, handler: u64, privilege: u64| {
            let low = (handler & 0xffff) | 8 << 16 | (0x8e | privilege << 5) << 40 | (handler >> 16) << 48;
            self.put_word(IDT + vector * 16, low);
            self.put_word(IDT + vector * 16 + 8, 0);
        };
        for vector in 0..32u8 {
            let handler = HANDLERS + 0x80 * u64::from(vector);
            self.put(handler, &handler_code(vector));
            gate(vector.into(), handler, if matches!(vector, 3 | 4) { 3 } else { 0 });
        }
        // out EXIT_PORT, al
        self.put(EXIT_CODE, &[0xe6, EXIT_PORT as u8]);
        gate(EXIT_VECTOR.into(), EXIT_CODE, 3);

        // The kernel's megabyte at 0, the window for user mode at its place.
        let [top, second] = [TABLES, TABLES + 0x1000];
        let [low, high] = [TABLES + 0x2000, TABLES + 0x3000];
        self.put_word(top, second | 7);
        self.put_word(second, low | 7);
        self.put_word(low, 0x83);
        // The window's gibibyte is the first one too: its directory entries lie further up.
        for index in 0..WINDOW.div_ceil(1 << 21) as u64 {
            let table = high + index * 0x1000;
            self.put_word(low + 8 * ((BASE >> 21) + index), table | 7);
            for page in 0..512 {
                let va = BASE + (index << 21) + page * 0x1000;
                let gpa = va - BASE + WINDOW_GPA;
                let entry = match va {
                    HOLE | SECOND_HOLE => 0,
                    READ_ONLY => gpa | 5 | NO_EXECUTE,
                    _ if (DATA..BASE + WINDOW as u64).contains(&va) => gpa | 7 | NO_EXECUTE,
                    _ if va < BASE + WINDOW as u64 => gpa | 7,
                    _ => 0,
                };
                self.put_word(table + 8 * page, entry);
            }
        }
    }

    fn put_short_segments(&self) {
        let descriptor = |base: u64, limit: u32, access: u64| {
            u64::from(limit & 0xffff) | (base & 0xff_ffff) << 16 | access << 40 | (base >> 24) << 56
        };
        let bits = Bits::Short;
        self.put_word(LDT, descriptor(bits.code_base(), SHORT_CODE_LIMIT, 0xfb));
        self.put_word(LDT + 8, descriptor(bits.data_base(), SHORT_DATA_LIMIT, 0xf3));
    }

    fn enter_user_mode(&mut self) -> Result<(), EngineError> {
        let mut state = self.vcpu.state()?;
        let segments = &mut state.segments;
        (segments.ds, segments.es) = (Segment::flat(FLAT, 3, false), Segment::flat(FLAT, 3, false));
        (segments.fs, segments.gs) = (Segment::flat(FLAT, 3, false), Segment::flat(FLAT, 3, false));
        segments.cs = Segment::flat(CODE64, 0xb, true);
        segments.ss = Segment::flat(FLAT, 3, false);
        segments.tr = Segment {
            selector: 0x40,
            base: TSS,
            limit: 0x67,
            kind: 0xb,
            present: true,
            ..Segment::default()
        };
        segments.ldtr =
            Segment { selector: 0x48, base: LDT, limit: 0xf, kind: 2, present: true, ..Segment::default() };
        segments.gdtr = DescriptorTable { base: GDT, limit: 0x4f };
        segments.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        // Paging, write protection, alignment checks; FXSAVE, SIMD exceptions and XSAVE, as Linux has them.
        state.control.cr0 = 0x8005_0033;
        state.control.cr3 = TABLES;
        state.control.cr4 = 0x4_0620;
        state.control.efer = 0xd01;
        state.control.xcr0 = 7;
        self.vcpu.set_state(&state)
    }
}

/// Writes the fault down and returns to where registers are saved.
fn handler_code(vector: u8) -> Vec<u8> {
    let mut code = Code::default();
    if !matches!(vector, 8 | 10..=14 | 17 | 21) {
        code.bytes(&[0x6a, 0]);
    }
    // push rax; mov eax, vector + 1
    code.bytes(&[0x50, 0xb8, vector + 1, 0, 0, 0]).store(0, FAULT);
    // mov rax, [rsp + 8]
    code.bytes(&[0x48, 0x8b, 0x44, 0x24, 8]).store(0, FAULT + 8);
    // mov rax, cr2
    code.bytes(&[0x0f, 0x20, 0xd0]).store(0, FAULT + 16);
    // mov rax, [rsp + 16]
    code.bytes(&[0x48, 0x8b, 0x44, 0x24, 16]).store(0, FAULT + 24);
    // and dword [rsp + 32], ~TF
    code.bytes(&[0x81, 0x64, 0x24, 32, 0xff, 0xfe, 0xff, 0xff]);
    // mov qword [rsp + 24], CODE64
    code.bytes(&[0x48, 0xc7, 0x44, 0x24, 24, CODE64 as u8, 0, 0, 0]);
    // mov rax, [SAVER]; mov [rsp + 16], rax; pop rax; add rsp, 8; iretq
    code.load(0, SAVER).bytes(&[0x48, 0x89, 0x44, 0x24, 16, 0x58, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf]);
    code.0
}
