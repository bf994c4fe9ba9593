//! How fast kinds of SIMD and x87 instructions run. Prints; asserts nothing.
#![expect(unsafe_code, reason = "reads the thread's processor time")]

use vm_memory::{Bytes, MemoryRegionAddress};

use super::{NoDevices, flat_vcpu, memory};
use crate::cpu::{cr0, cr4};

fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a valid timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Nanoseconds an instruction, in a loop of 32 of them.
fn nanoseconds(instruction: &[u8]) -> f64 {
    let region = memory(0x10_0000, 1 << 20);
    let mut code = vec![0xd9, 0xe8];
    let start = code.len();
    for _ in 0..32 {
        code.extend_from_slice(instruction);
    }
    let back = start as i32 - (code.len() as i32 + 5);
    code.push(0xe9);
    code.extend_from_slice(&back.to_le_bytes());
    region.write_slice(&code, MemoryRegionAddress(0)).unwrap();
    let mut vcpu = flat_vcpu(region);
    let cpu = vcpu.cpu();
    cpu.rip = 0x10_0000;
    cpu.cr0 |= cr0::PE;
    cpu.cr4 |= cr4::OSFXSR;
    cpu.regs[3] = 0x18_0000;
    cpu.mode_changed();
    let kicker = harrier_engine::Vcpu::kicker(&vcpu);
    let begin = cpu_seconds();
    let kick = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        kicker.kick();
    });
    harrier_engine::Vcpu::run(&mut vcpu, &mut NoDevices);
    let seconds = cpu_seconds() - begin;
    kick.join().unwrap();
    seconds * 1e9 / harrier_engine::Vcpu::counters(&vcpu).instructions.unwrap() as f64
}

#[test]
#[ignore = "prints speeds; run by hand with --nocapture"]
fn speed_of_simd_and_x87() {
    for (name, code) in [
        ("mov rax, rcx", &[0x48, 0x89, 0xc8][..]),
        ("mov rax, [rbx]", &[0x48, 0x8b, 0x03]),
        ("movaps xmm1, xmm2", &[0x0f, 0x28, 0xca]),
        ("movups xmm1, [rbx]", &[0x0f, 0x10, 0x0b]),
        ("movups [rbx], xmm1", &[0x0f, 0x11, 0x0b]),
        ("movsd xmm1, [rbx]", &[0xf2, 0x0f, 0x10, 0x0b]),
        ("pxor xmm1, xmm2", &[0x66, 0x0f, 0xef, 0xca]),
        ("paddd xmm1, xmm2", &[0x66, 0x0f, 0xfe, 0xca]),
        ("pcmpeqb xmm1, [rbx]", &[0x66, 0x0f, 0x74, 0x0b]),
        ("pmovmskb eax, xmm1", &[0x66, 0x0f, 0xd7, 0xc1]),
        ("pshufd xmm1, xmm2, 0x1b", &[0x66, 0x0f, 0x70, 0xca, 0x1b]),
        ("addsd xmm1, xmm2", &[0xf2, 0x0f, 0x58, 0xca]),
        ("mulsd xmm1, [rbx]", &[0xf2, 0x0f, 0x59, 0x0b]),
        ("ucomisd xmm1, xmm2", &[0x66, 0x0f, 0x2e, 0xca]),
        ("cvtsi2sd xmm1, eax", &[0xf2, 0x0f, 0x2a, 0xc8]),
        ("fld1; fstp st0", &[0xd9, 0xe8, 0xdd, 0xd8]),
        ("fadd qword [rbx]", &[0xdc, 0x03]),
        ("paddb mm1, mm2", &[0x0f, 0xfc, 0xca]),
    ] {
        println!("{:6.2} ns  {name}", nanoseconds(code));
    }
}
