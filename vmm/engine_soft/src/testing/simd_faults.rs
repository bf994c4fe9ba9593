//! What SIMD and x87 instructions do when they may not run or their memory operand faults, and the images of
//! their state.

use harrier_engine::cpuid::Features;
use harrier_engine::{CpuModel, GuestRegion};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use super::{flat_vcpu, memory};
use crate::cpu::{Cpu, RAX, RBX, RDI, RDX, cr0, cr4};
use crate::decode::op::{REG_BLOCK, Stop};
use crate::fault::vector;
use crate::fpu::Fpu;
use crate::vcpu::SoftVcpu;

/// Memory starts here; its first pages are page tables.
const MEMORY: u64 = 0x10_0000;
const CODE: u64 = MEMORY + 0x1_0000;
/// Pages from here on are not mapped.
const HOLE: u64 = MEMORY + 0x8_0000;
const READ_ONLY: u64 = HOLE - 0x2000;

fn put(region: &GuestRegion, at: u64, value: u64) {
    region.write_obj(value, MemoryRegionAddress(at - MEMORY)).unwrap();
}

/// 64-bit mode with paging, everything switched on, RBX at the last byte before the hole.
fn paged() -> SoftVcpu {
    let region = memory(MEMORY, 1 << 20);
    for level in 0..3 {
        put(&region, MEMORY + 0x1000 * level, (MEMORY + 0x1000 * (level + 1)) | 3);
    }
    let mut page = MEMORY;
    while page < HOLE {
        let writable = if page == READ_ONLY { 0 } else { 2 };
        put(&region, MEMORY + 0x3000 + (page >> 12) * 8, page | 1 | writable);
        page += 0x1000;
    }
    assert!(region.len() > HOLE - MEMORY);
    let mut vcpu = flat_vcpu(region);
    let cpu = vcpu.cpu();
    cpu.features = Features::of(CpuModel::V3);
    cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.cr3 = MEMORY;
    cpu.xcr0 = 7;
    cpu.mode_changed();
    cpu.regs[RBX] = HOLE - 1;
    for (index, register) in cpu.fpu.ymm.iter_mut().enumerate() {
        *register = [u64::MAX, index as u64, 3, 4];
    }
    vcpu
}

/// Runs one instruction; the vector of the fault it raises.
fn step(vcpu: &mut SoftVcpu, code: &[u8]) -> Result<(), u8> {
    let (cpu, cache) = vcpu.parts();
    let mut bytes = code.to_vec();
    bytes.resize(32, 0x90);
    let page = cpu.mmu.map.page(CODE).unwrap();
    crate::native::mem::write_bytes(page.ptr(CODE), &bytes);
    cache.clear();
    cpu.mmu.code_generation += 1;
    cpu.rip = CODE;
    cpu.alone = true;
    let (block, ops) = cache.find(cpu).unwrap();
    cpu.mmu.running = block.pages;
    cpu.regs[REG_BLOCK as usize] = CODE;
    match (ops[0].exec)(cpu, &ops[0]) {
        Ok(()) | Err(Stop::Block) => Ok(()),
        Err(Stop::Fault) => Err(cpu.fault.vector),
        Err(Stop::Alone) => panic!("{code:02x?} wants to run by itself"),
    }
}

fn bytes(cpu: &mut Cpu, va: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    cpu.read(va, &mut out).unwrap();
    out
}

const MOVUPS_STORE: &[u8] = &[0x0f, 0x11, 0x03];
const MOVAPS_STORE: &[u8] = &[0x0f, 0x29, 0x03];
const MOVAPS_LOAD: &[u8] = &[0x0f, 0x28, 0x03];
const PADDD_LOAD: &[u8] = &[0x66, 0x0f, 0xfe, 0x03];
const PCMPISTRI_LOAD: &[u8] = &[0x66, 0x0f, 0x3a, 0x63, 0x03, 0x00];
const VMOVUPS_STORE: &[u8] = &[0xc5, 0xfc, 0x11, 0x03];
const VMOVAPS_LOAD: &[u8] = &[0xc5, 0xfc, 0x28, 0x03];
const VPADDD_LOAD: &[u8] = &[0xc5, 0xed, 0xfe, 0x0b];
const FSTP_M80: &[u8] = &[0xdb, 0x3b];
const FLD_M80: &[u8] = &[0xdb, 0x2b];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FNSAVE: &[u8] = &[0xdd, 0x33];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const MASKMOVDQU: &[u8] = &[0x66, 0x0f, 0xf7, 0xc1];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x13];
const MOVQ_MM: &[u8] = &[0x0f, 0x6f, 0x03];
const FWAIT: &[u8] = &[0x9b];
const EMMS: &[u8] = &[0x0f, 0x77];
const CRC32: &[u8] = &[0xf2, 0x0f, 0x38, 0xf1, 0xc1];

#[test]
fn a_store_that_reaches_an_absent_page_changes_nothing() {
    let mut vcpu = paged();
    step(&mut vcpu, FLD1).unwrap();
    for (code, at) in [
        (MOVUPS_STORE, HOLE - 15),
        (VMOVUPS_STORE, HOLE - 31),
        (FSTP_M80, HOLE - 9),
        (FNSAVE, HOLE - 107),
        (FXSAVE64, HOLE - 16),
        (FXSAVE64, HOLE - 400),
        (XSAVE64, HOLE - 64),
    ] {
        vcpu.cpu().regs[RBX] = at;
        vcpu.cpu().regs[RAX] = 7;
        vcpu.cpu().regs[RDX] = 0;
        let before = bytes(vcpu.cpu(), HOLE - 0x400, 0x400);
        assert_eq!(step(&mut vcpu, code), Err(vector::PF), "{code:02x?}");
        let cpu = vcpu.cpu();
        assert_eq!(cpu.fault.address & !0xfff, HOLE, "{code:02x?}");
        assert_eq!(cpu.fault.error, 2, "{code:02x?}");
        assert_eq!(bytes(cpu, HOLE - 0x400, 0x400), before, "{code:02x?}");
        cpu.fpu.settle();
        assert_eq!(cpu.fpu.x87.abridged_tags(), 0x80, "{code:02x?} must not pop");
    }
}

#[test]
fn a_store_to_a_read_only_page_faults_and_a_load_does_not() {
    let mut vcpu = paged();
    vcpu.cpu().regs[RBX] = READ_ONLY + 16;
    step(&mut vcpu, MOVAPS_LOAD).unwrap();
    assert_eq!(step(&mut vcpu, MOVAPS_STORE), Err(vector::PF));
    assert_eq!(vcpu.cpu().fault.error, 3);
}

#[test]
fn only_operands_that_must_be_aligned_are_checked() {
    let mut vcpu = paged();
    vcpu.cpu().regs[RBX] = HOLE - 0x200 + 8;
    for code in [MOVAPS_LOAD, MOVAPS_STORE, PADDD_LOAD, VMOVAPS_LOAD, FXSAVE64, FXRSTOR64, XSAVE64, XRSTOR64]
    {
        assert_eq!(step(&mut vcpu, code), Err(vector::GP), "{code:02x?}");
    }
    for code in [MOVUPS_STORE, PCMPISTRI_LOAD, VMOVUPS_STORE, VPADDD_LOAD, FSTP_M80, FLD_M80, MOVQ_MM] {
        assert_eq!(step(&mut vcpu, code), Ok(()), "{code:02x?}");
    }
}

#[test]
fn a_masked_store_touches_only_what_the_mask_chooses() {
    let mut vcpu = paged();
    let cpu = vcpu.cpu();
    cpu.regs[RDI] = HOLE - 4;
    cpu.fpu.ymm[0] = [0x1122_3344_5566_7788, 0, 0, 0];
    cpu.fpu.ymm[1] = [0x0000_0000_8000_80ff, 0, 0, 0];
    step(&mut vcpu, MASKMOVDQU).unwrap();
    assert_eq!(bytes(vcpu.cpu(), HOLE - 4, 4), [0x88, 0x77, 0, 0x55]);
    vcpu.cpu().fpu.ymm[1][0] = 0x80_0000_00ff;
    vcpu.cpu().fpu.ymm[0][0] = 0;
    assert_eq!(step(&mut vcpu, MASKMOVDQU), Err(vector::PF));
    assert_eq!(bytes(vcpu.cpu(), HOLE - 4, 4), [0x88, 0x77, 0, 0x55], "nothing before the fault is visible");
}

#[test]
fn a_gather_keeps_the_elements_before_the_fault() {
    let mut vcpu = paged();
    let cpu = vcpu.cpu();
    cpu.write(HOLE - 8, &[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    cpu.regs[RBX] = HOLE;
    cpu.fpu.ymm[1] = [(-8i32 as u32 as u64) | (-4i32 as u32 as u64) << 32, 0, 0, 0];
    cpu.fpu.ymm[2] = [u64::MAX, u64::MAX, 0, 0];
    // vpgatherdd xmm0, [rbx + xmm1], xmm2
    assert_eq!(step(&mut vcpu, &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0b]), Err(vector::PF));
    let cpu = vcpu.cpu();
    assert_eq!(cpu.fault.address, HOLE);
    assert_eq!(cpu.fpu.ymm[0][0], 2 << 32 | 1);
    assert_eq!(cpu.fpu.ymm[2][..2], [0, u64::MAX]);
}

#[test]
fn control_registers_decide_what_may_run() {
    let mut vcpu = paged();
    vcpu.cpu().regs[RBX] = HOLE - 0x200;
    let all = vcpu.cpu().cr4;
    let (nm, ud) = (Err(vector::NM), Err(vector::UD));
    // CR0 bits, CR4 bits missing; then x87, MMX, SSE, AVX, FXSAVE, FWAIT, integer.
    for (set, clear, wanted) in [
        (0, 0, [Ok(()); 7]),
        (cr0::TS, 0, [nm, nm, nm, nm, nm, Ok(()), Ok(())]),
        (cr0::TS | cr0::MP, 0, [nm, nm, nm, nm, nm, nm, Ok(())]),
        (cr0::EM, 0, [nm, ud, ud, Ok(()), ud, Ok(()), Ok(())]),
        (cr0::EM | cr0::TS, 0, [nm, ud, ud, nm, ud, Ok(()), Ok(())]),
        (0, cr4::OSFXSR, [Ok(()), Ok(()), ud, Ok(()), Ok(()), Ok(()), Ok(())]),
        (0, cr4::OSXSAVE, [Ok(()), Ok(()), Ok(()), ud, Ok(()), Ok(()), Ok(())]),
    ] {
        let cpu = vcpu.cpu();
        cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | set;
        cpu.cr4 = all & !clear;
        cpu.mode_changed();
        for (code, wanted) in
            [FLD1, EMMS, PADDD_LOAD, VPADDD_LOAD, FXSAVE64, FWAIT, CRC32].into_iter().zip(wanted)
        {
            assert_eq!(step(&mut vcpu, code), wanted, "{code:02x?} with cr0 +{set:x}, cr4 -{clear:x}");
        }
    }
    vcpu.cpu().xcr0 = 3;
    vcpu.cpu().cr4 = all;
    vcpu.cpu().mode_changed();
    assert_eq!(step(&mut vcpu, VPADDD_LOAD), ud, "XCR0 without AVX");
}

#[test]
fn an_unmasked_simd_exception_needs_osxmmexcpt() {
    let mut vcpu = paged();
    vcpu.cpu().fpu.mxcsr.set(0);
    // divps xmm0, xmm0: NaNs and 0 / 0
    vcpu.cpu().fpu.ymm[0] = [0; 4];
    assert_eq!(step(&mut vcpu, &[0x0f, 0x5e, 0xc0]), Err(vector::XM));
    assert_eq!(vcpu.cpu().fpu.mxcsr.get(), 1);
    vcpu.cpu().cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(step(&mut vcpu, &[0x0f, 0x5e, 0xc0]), Err(vector::UD));
}

#[test]
fn reserved_bits_of_mxcsr_are_refused() {
    let mut vcpu = paged();
    let cpu = vcpu.cpu();
    cpu.regs[RBX] = HOLE - 0x400;
    cpu.write(HOLE - 0x400, &0x1_1f80u32.to_le_bytes()).unwrap();
    cpu.write(HOLE - 0x400 + 24, &0x1_1f80u32.to_le_bytes()).unwrap();
    cpu.regs[RAX] = 7;
    cpu.regs[RDX] = 0;
    for code in [LDMXCSR, FXRSTOR64, XRSTOR64] {
        assert_eq!(step(&mut vcpu, code), Err(vector::GP), "{code:02x?}");
    }
    assert_eq!(vcpu.cpu().fpu.mxcsr.get(), 0x1f80);
}

#[test]
fn flags_that_gather_in_the_host_move_with_the_vcpu() {
    let mut vcpu = paged();
    vcpu.cpu().fpu.ymm[0] = [1f64.to_bits(), 0, 0, 0];
    vcpu.cpu().fpu.ymm[1] = [3f64.to_bits(), 0, 0, 0];
    // divsd xmm0, xmm1: inexact
    step(&mut vcpu, &[0xf2, 0x0f, 0x5e, 0xc1]).unwrap();
    step(&mut vcpu, FLD1).unwrap();
    vcpu.cpu().fpu.settle();
    let mut vcpu = std::thread::spawn(move || {
        // divsd xmm1, xmm2 with zero: divide by zero
        vcpu.cpu().fpu.ymm[2] = [0; 4];
        step(&mut vcpu, &[0xf2, 0x0f, 0x5e, 0xca]).unwrap();
        assert_eq!(vcpu.cpu().fpu.mxcsr.get(), 0x1f80 | 0x20 | 4);
        step(&mut vcpu, FLD1).unwrap();
        vcpu.cpu().fpu.settle();
        vcpu
    })
    .join()
    .unwrap();
    assert_eq!(vcpu.cpu().fpu.mxcsr.get(), 0x1f80 | 0x20 | 4);
    assert_eq!(vcpu.cpu().fpu.x87.abridged_tags(), 0xc0);
}

/// A register state with something in every place.
fn filled(random: u64) -> Fpu {
    let mut fpu = Fpu::default();
    let mut value = random;
    let mut next = || {
        value = value.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        value
    };
    for register in &mut fpu.ymm {
        *register = std::array::from_fn(|_| next());
    }
    let last = crate::fpu::x87::LastInstruction { ip: next(), dp: next(), opcode: 0x5a5 };
    fpu.x87.set_environment(0x27f, 0x2821, 0xa5, last);
    for index in 0..8 {
        let mut bytes = [0x42; 10];
        bytes[..8].copy_from_slice(&next().to_le_bytes());
        fpu.x87.set_register(index, bytes);
    }
    fpu.mxcsr.set(0x9fa1);
    fpu
}

#[test]
fn the_saved_area_brings_the_state_back() {
    let mut fpu = filled(1);
    let area = fpu.to_xsave(7);
    assert_eq!(area.len(), 832);
    let mut copy = filled(2);
    copy.from_xsave(&area, 7).unwrap();
    assert_eq!(copy.to_xsave(7), area);
    assert_eq!(copy.ymm, fpu.ymm);
    assert_eq!(fpu.to_xsave(3).len(), 576);
}

#[test]
fn the_initial_state_is_saved_as_zeros() {
    let mut fpu = filled(3);
    fpu.reset();
    let area = fpu.to_xsave(7);
    let used: Vec<_> = area.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(at, _)| at).collect();
    assert_eq!(used, [24, 25], "only MXCSR");
    let mut copy = filled(4);
    copy.from_xsave(&area, 7).unwrap();
    assert_eq!(copy.to_xsave(7), area);
}

#[test]
fn damaged_areas_are_refused() {
    let area = filled(5).to_xsave(7);
    let mut fpu = Fpu::default();
    let mut refused = |change: &dyn Fn(&mut Vec<u8>), xcr0| {
        let mut damaged = area.clone();
        change(&mut damaged);
        fpu.from_xsave(&damaged, xcr0).unwrap_err().0
    };
    assert!(refused(&|area| area.truncate(575), 7).contains("575 bytes"));
    assert!(refused(&|area| area.truncate(831), 7).contains("avx"));
    assert!(refused(&|area| area[512] |= 8, 7).contains("0xf"));
    assert!(refused(&|_| {}, 3).contains("xcr0"));
    assert!(refused(&|area| area[527] = 0x80, 7).contains("compacted"));
    assert!(refused(&|area| area[26] = 1, 7).contains("mxcsr"));
}

#[test]
fn fxsave_and_xsave_bring_the_state_back() {
    for (save, restore) in [(FXSAVE64, FXRSTOR64), (XSAVE64, XRSTOR64)] {
        let mut vcpu = paged();
        let cpu = vcpu.cpu();
        cpu.regs[RBX] = HOLE - 0x400;
        cpu.regs[RAX] = 7;
        cpu.regs[RDX] = 0;
        let usable = cpu.fpu.usable;
        cpu.fpu = filled(6);
        cpu.fpu.usable = usable;
        let wanted = cpu.fpu.to_xsave(if save == XSAVE64 { 7 } else { 3 });
        step(&mut vcpu, save).unwrap();
        vcpu.cpu().fpu.reset();
        step(&mut vcpu, restore).unwrap();
        assert_eq!(vcpu.cpu().fpu.to_xsave(if save == XSAVE64 { 7 } else { 3 }), wanted);
    }
}

#[test]
fn xrstor_gives_absent_components_their_initial_state_and_leaves_the_others() {
    let mut vcpu = paged();
    let cpu = vcpu.cpu();
    cpu.regs[RBX] = HOLE - 0x400;
    cpu.regs[RAX] = 2;
    cpu.regs[RDX] = 0;
    let usable = cpu.fpu.usable;
    cpu.fpu = filled(7);
    cpu.fpu.usable = usable;
    let upper = cpu.fpu.ymm.map(|register| [register[2], register[3]]);
    cpu.write(HOLE - 0x400, &[0; 0x400]).unwrap();
    cpu.write(HOLE - 0x400 + 24, &0x1f80u32.to_le_bytes()).unwrap();
    step(&mut vcpu, XRSTOR64).unwrap();
    let cpu = vcpu.cpu();
    assert_eq!(cpu.fpu.mxcsr.get(), 0x1f80);
    assert!(cpu.fpu.ymm.iter().all(|register| register[..2] == [0, 0]));
    assert_eq!(cpu.fpu.ymm.map(|register| [register[2], register[3]]), upper);
    assert_eq!(cpu.fpu.x87.abridged_tags(), 0xa5, "x87 was not asked for");
    cpu.write(HOLE - 0x400 + 512, &[8]).unwrap();
    assert_eq!(step(&mut vcpu, XRSTOR64), Err(vector::GP), "a component that XCR0 lacks");
}

#[test]
fn random_instructions_do_the_host_no_harm() {
    let mut vcpu = paged();
    let mut value = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        value
    };
    let (mut ran, mut faulted) = (0, 0);
    for round in 0..60_000 {
        if round % 1000 == 0 {
            // 64-bit and 32-bit code, with and without unmasked exceptions.
            let cpu = vcpu.cpu();
            let long = next() & 1 == 0;
            cpu.seg[crate::cpu::CS].long = long;
            for (index, seg) in cpu.seg.iter_mut().enumerate() {
                seg.db = index != crate::cpu::CS || !long;
                (seg.limit, seg.present, seg.code_or_data) = (u32::MAX, true, true);
                seg.kind = if index == crate::cpu::CS { 0xb } else { 3 };
            }
            cpu.mode_changed();
            cpu.fpu.mxcsr.set(if next() & 1 == 0 { 0x1f80 } else { next() as u32 & 0xffff });
        }
        for register in 0..16 {
            vcpu.cpu().regs[register] = READ_ONLY - 0x800 + (next() & 0x3fff);
        }
        let raw = next().to_le_bytes();
        let tail = next().to_le_bytes();
        let mut code = match next() % 8 {
            0 => vec![0xd8 | raw[7] & 7],
            1 => vec![0xc4, raw[7] & 0xe3 | 1, raw[6]],
            2 => vec![0xc5, raw[7]],
            3 => vec![0x66, 0x0f],
            4 => vec![0xf3, 0x0f],
            5 => vec![0xf2, 0x0f],
            6 => vec![0x66, 0x0f, 0x38 | raw[7] & 2],
            _ => vec![0x0f],
        };
        code.extend_from_slice(&raw[..6]);
        code.extend_from_slice(&tail);
        let instruction = iced_x86::Decoder::new(64, &code, 0).decode();
        if instruction.is_privileged() || instruction.flow_control() != iced_x86::FlowControl::Next {
            continue;
        }
        match step(&mut vcpu, &code) {
            Ok(()) => ran += 1,
            Err(_) => faulted += 1,
        }
        let cpu = vcpu.cpu();
        assert_eq!(cpu.regs[16], 0, "{code:02x?}");
        assert!(cpu.fpu.mxcsr.get() & !0xffff == 0, "{code:02x?}");
    }
    vcpu.cpu().fpu.settle();
    assert!(ran > 5_000 && faulted > 5_000, "{ran} ran, {faulted} faulted");
    assert_eq!(
        crate::native::x87::control_word(),
        0x37f,
        "the host's x87 unit is as compiled code expects it"
    );
    assert_eq!((1.0f64 / 3.0).to_bits(), 0x3fd5_5555_5555_5555, "and so is MXCSR");
}
