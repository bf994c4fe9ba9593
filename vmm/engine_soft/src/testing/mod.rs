//! A machine for unit tests: flat 64-bit code without paging, in memory where guest and host addresses agree.

mod simd_faults;
mod simd_speed;

use std::sync::Arc;

use harrier_engine::cpu_state::Segment;
use harrier_engine::{CpuModel, GuestRegion, Io, PageLog, Vm, VmConfig};
use vm_memory::{GuestAddress, MmapRegion};

use crate::cpu::{CS, SS, efer};
use crate::vcpu::SoftVcpu;
use crate::vm::SoftVm;

/// No devices: reads give ones, a write to port 0xf4 leaves.
pub(crate) struct NoDevices;

impl Io for NoDevices {
    fn pio_read(&mut self, _port: u16, _data: &mut [u8]) -> harrier_engine::Flow {
        harrier_engine::Flow::Continue
    }
    fn pio_write(&mut self, port: u16, _data: &[u8]) -> harrier_engine::Flow {
        if port == 0xf4 { harrier_engine::Flow::Leave } else { harrier_engine::Flow::Continue }
    }
    fn mmio_read(&mut self, _gpa: u64, _data: &mut [u8]) -> harrier_engine::Flow {
        harrier_engine::Flow::Continue
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> harrier_engine::Flow {
        harrier_engine::Flow::Continue
    }
    fn eoi(&mut self, _vector: u8) -> harrier_engine::Flow {
        harrier_engine::Flow::Continue
    }
}

/// A vCPU in flat 64-bit mode, CPL 0, no paging.
pub(crate) fn flat_vcpu(region: GuestRegion) -> SoftVcpu {
    let config = VmConfig { cpu_model: CpuModel::V2, vcpu_count: 1, tsc_khz: None };
    let vm = SoftVm::new(&config, None);
    vm.map_memory(Arc::new(region), false).unwrap();
    let mut vcpu = SoftVcpu::new(vm.shared(), 0);
    let cpu = vcpu.cpu();
    cpu.efer = efer::LME | efer::LMA;
    cpu.seg[CS] = Segment { long: true, kind: 0xb, code_or_data: true, present: true, ..Segment::default() };
    cpu.seg[SS] = Segment { kind: 3, code_or_data: true, present: true, ..Segment::default() };
    cpu.mode_changed();
    vcpu
}

/// Guest memory of so many bytes at `gpa`.
pub(crate) fn memory(gpa: u64, size: usize) -> GuestRegion {
    let mapping = MmapRegion::<PageLog>::new(size).unwrap();
    GuestRegion::new(mapping, GuestAddress(gpa)).unwrap()
}

#[test]
fn a_vcpu_that_sleeps_gives_its_decoded_code_back_and_goes_on_as_before() {
    use vm_memory::{Bytes, MemoryRegionAddress};
    const COUNT: u32 = 6000;
    let region = memory(0x10_0000, 1 << 20);
    // inc eax, many times; then hlt, and leave with another inc when something wakes it.
    let mut code: Vec<u8> = [0xff, 0xc0].repeat(COUNT as usize);
    code.push(0xf4);
    region.write_slice(&code, MemoryRegionAddress(0)).unwrap();
    let mut vcpu = flat_vcpu(region);
    vcpu.cpu().rip = 0x10_0000;
    let kicker = harrier_engine::Vcpu::kicker(&vcpu);
    let kick = |after_ms| {
        let kicker = std::sync::Arc::clone(&kicker);
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(after_ms));
            kicker.kick();
        })
    };
    let held = |vcpu: &mut SoftVcpu| vcpu.parts().1.is_large();
    let sleep = |vcpu: &mut SoftVcpu, after_ms| {
        let kick = kick(after_ms);
        assert_eq!(harrier_engine::Vcpu::run(vcpu, &mut NoDevices), harrier_engine::Exit::Kicked);
        kick.join().unwrap();
    };
    sleep(&mut vcpu, 100);
    assert!(held(&mut vcpu), "a short sleep keeps it");
    assert_eq!(vcpu.cpu().regs[0], u64::from(COUNT));
    sleep(&mut vcpu, 900);
    assert!(!held(&mut vcpu));
    // The same code again, of which nothing that was decoded is left.
    vcpu.cpu().rip = 0x10_0000;
    vcpu.cpu().mp_state = harrier_engine::cpu_state::MpState::Runnable;
    sleep(&mut vcpu, 100);
    assert_eq!(vcpu.cpu().regs[0], 2 * u64::from(COUNT));
    assert!(held(&mut vcpu));
}

#[test]
#[ignore = "prints a speed; run by hand with --nocapture"]
fn speed_of_register_loops() {
    use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
    let region = memory(0x10_0000, 1 << 20);
    let code: &[u8] = &[
        0x48, 0x01, 0xc8, // add rax, rcx
        0x48, 0x31, 0xc3, // xor rbx, rax
        0x48, 0xc1, 0xe3, 0x03, // shl rbx, 3
        0x48, 0x89, 0xda, // mov rdx, rbx
        0x48, 0x8d, 0x72, 0x05, // lea rsi, [rdx+5]
        0x48, 0x29, 0xc6, // sub rsi, rax
        0x21, 0xd7, // and edi, edx
        0x09, 0xf7, // or edi, esi
        0xff, 0xc9, // dec ecx
        0xeb, 0xe4, // jmp
    ];
    region.write_slice(code, MemoryRegionAddress(0)).unwrap();
    assert_eq!(region.len(), 1 << 20);
    let mut vcpu = flat_vcpu(region);
    vcpu.cpu().rip = 0x10_0000;
    let kicker = harrier_engine::Vcpu::kicker(&vcpu);
    let start = std::time::Instant::now();
    let kick = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(1));
        kicker.kick();
    });
    let exit = harrier_engine::Vcpu::run(&mut vcpu, &mut NoDevices);
    let seconds = start.elapsed().as_secs_f64();
    kick.join().unwrap();
    let instructions = harrier_engine::Vcpu::counters(&vcpu).instructions.unwrap();
    println!("{exit:?}: {:.0} million instructions/s", instructions as f64 / seconds / 1e6);
}
