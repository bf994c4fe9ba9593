//! What leaving a guest costs: the round trip of a port write through the engine's run loop and through a bare loop around
//! KVM_RUN; a store to a device that exits, and one for which KVM signals an event (ioeventfd); an interrupt by an ioctl, and
//! one by an event (irqfd).
//!
//! Each pair runs in turns in one process and the medians are compared, since absolute times drift.

use std::sync::Arc;
use std::time::Instant;

use harrier_engine::cpu_state::Segment;
use harrier_engine::{CpuModel, CpuState, Engine, Flow, GuestRegion, Io, PageLog, Probe, Vcpu, VmConfig};
use harrier_engine_kvm::KvmEngine;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 64 << 10;
const CODE: u64 = 0x1000;
/// out 0x80, al; jmp back
const LOOP: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
const EXITS: u32 = 2_000;
const TURNS: usize = 15;

/// Leaves after so many port writes.
struct Count(u32);

impl Io for Count {
    fn pio_read(&mut self, _port: u16, _data: &mut [u8]) -> Flow {
        Flow::Leave
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) -> Flow {
        self.0 -= 1;
        if self.0 == 0 { Flow::Leave } else { Flow::Continue }
    }
    fn mmio_read(&mut self, _gpa: u64, _data: &mut [u8]) -> Flow {
        Flow::Leave
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
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .expect("64 KiB of memory");
    let region = GuestRegion::new(mapping, GuestAddress(0)).expect("a region at 0");
    region.write_slice(&LOOP, MemoryRegionAddress(CODE)).expect("the code fits");
    Arc::new(region)
}

fn start(state: &mut CpuState) {
    state.segments.cs.selector = 0;
    state.segments.cs.base = 0;
    state.regs.rip = CODE;
}

/// The bare loop: no state, no kicks, one match.
#[expect(unsafe_code, reason = "maps memory into a bare VM")]
fn bare(kvm: &Kvm, memory: &GuestRegion) -> (kvm_ioctls::VmFd, VcpuFd) {
    let vm = kvm.create_vm().expect("a VM");
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the region outlives the VM, which ends with the process.
    unsafe { vm.set_user_memory_region(region) }.expect("memory");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).expect("registers");
    let regs = kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).expect("registers");
    (vm, vcpu)
}

fn bare_turn(vcpu: &mut VcpuFd) -> f64 {
    let begin = Instant::now();
    for _ in 0..EXITS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => {}
            other => panic!("the bare loop ended by {other:?}"),
        }
    }
    begin.elapsed().as_secs_f64() / f64::from(EXITS) * 1e9
}

fn engine_turn(vcpu: &mut dyn Vcpu) -> f64 {
    let begin = Instant::now();
    assert_eq!(vcpu.run(&mut Count(EXITS)), harrier_engine::Exit::Left);
    begin.elapsed().as_secs_f64() / f64::from(EXITS) * 1e9
}

/// Stores to two places: the first is a device's, for the other an event is signalled. `out 0x80, al` ends either loop.
const STORES: u32 = 2_000;
const DEVICE: u64 = 0xd000_0000;
const EVENT: u64 = DEVICE + 0x1000;

/// mov ecx, STORES; again: mov [place], eax; dec ecx; jnz again; out 0x80, al
fn store_loop(place: u64) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend_from_slice(&STORES.to_le_bytes());
    code.push(0xa3);
    code.extend_from_slice(&(place as u32).to_le_bytes());
    code.extend_from_slice(&[0x49, 0x75, 0xf8, 0xe6, 0x80]);
    code
}

/// Nanoseconds for a store to `place`.
fn store_turn(memory: &GuestRegion, vcpu: &mut dyn Vcpu, place: u64) -> f64 {
    memory.write_slice(&store_loop(place), MemoryRegionAddress(CODE)).expect("the code fits");
    let mut state = vcpu.state().expect("a state");
    let segments = &mut state.segments;
    let data = Segment::flat(0x10, 3, false);
    segments.cs = Segment::flat(8, 0xb, false);
    (segments.ds, segments.ss, segments.es) = (data, data, data);
    state.control.cr0 = 0x11;
    state.regs.rip = CODE;
    vcpu.set_state(&state).expect("a state");
    let begin = Instant::now();
    assert_eq!(vcpu.run(&mut Count(1)), harrier_engine::Exit::Left);
    begin.elapsed().as_secs_f64() / f64::from(STORES) * 1e9
}

fn compare_stores(engine: &KvmEngine, config: &VmConfig) {
    let vm = engine.create_vm(config).expect("a VM");
    let memory = memory();
    vm.map_memory(Arc::clone(&memory), false).expect("memory");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    if !vm.signal_stores(EVENT, 0, &event).expect("an answer") {
        println!("skipped: store: this host's KVM signals no stores");
        return;
    }
    let (mut exits, mut events) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        exits.push(store_turn(&memory, vcpu.as_mut(), DEVICE));
        events.push(store_turn(&memory, vcpu.as_mut(), EVENT));
    }
    assert_eq!(event.read().ok(), Some(u64::from(STORES) * TURNS as u64), "each store was signalled");
    let (exits, events) = (median(exits), median(events));
    println!("store: event {events:.0} ns, exit {exits:.0} ns, ratio {:.3}", events / exits);
}

/// Sends interrupts to a vCPU that does not run.
fn compare_interrupts(kvm: &Kvm) {
    let vm = kvm.create_vm().expect("a VM");
    let split = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&split).expect("a split interrupt controller");
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    let message = kvm_bindings::kvm_msi { address_lo: 0xfee0_0000, data: 0x31, ..Default::default() };
    let mut route = kvm_bindings::kvm_irq_routing_entry {
        type_: kvm_bindings::KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    (route.u.msi.address_lo, route.u.msi.data) = (message.address_lo, message.data);
    let table = kvm_bindings::KvmIrqRouting::from_entries(&[route]).expect("a table");
    vm.set_gsi_routing(&table).expect("a route");
    let event = EventFd::new(EFD_NONBLOCK).expect("an event");
    vm.register_irqfd(&event, 0).expect("an event for an interrupt");
    let time = |send: &dyn Fn()| {
        let begin = Instant::now();
        (0..EXITS).for_each(|_| send());
        begin.elapsed().as_secs_f64() / f64::from(EXITS) * 1e9
    };
    let (mut calls, mut events) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        calls.push(time(&|| _ = vm.signal_msi(message)));
        events.push(time(&|| event.write(1).expect("a signal")));
    }
    let (calls, events) = (median(calls), median(events));
    println!("interrupt: event {events:.0} ns, call {calls:.0} ns, ratio {:.3}", events / calls);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let engine = KvmEngine::default();
    if let Probe::Unavailable { reason } = engine.probe() {
        println!("skipped: port_exit: kvm: {reason}");
        return;
    }
    let config = VmConfig { cpu_model: CpuModel::V1, vcpu_count: 1, tsc_khz: None };
    let vm = engine.create_vm(&config).expect("a VM");
    vm.map_memory(memory(), false).expect("memory");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut state = vcpu.state().expect("a state");
    start(&mut state);
    vcpu.set_state(&state).expect("a state");

    let kvm = Kvm::new().expect("/dev/kvm");
    let bare_memory = memory();
    let (_vm, mut bare_vcpu) = bare(&kvm, &bare_memory);
    let (mut ours, mut bares) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        bares.push(bare_turn(&mut bare_vcpu));
        ours.push(engine_turn(vcpu.as_mut()));
    }
    let (ours, bares) = (median(ours), median(bares));
    println!("port exit: engine {ours:.0} ns, bare KVM_RUN loop {bares:.0} ns, ratio {:.3}", ours / bares);
    compare_stores(&engine, &config);
    compare_interrupts(&kvm);
}
