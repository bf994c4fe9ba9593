//! x87 instructions about the state itself: FNINIT, FNSTENV, FLDENV, FNSAVE, FRSTOR (Intel SDM volume 1, 8.1.10).

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::fpu::x87::LastInstruction;
use crate::mmu::Intent;

/// Bytes of the environment with a 16-bit and a 32-bit operand size.
const NARROW: usize = 14;
const WIDE: usize = 28;
/// Bytes of the eight registers after it.
const REGISTERS: usize = 80;

fn initialise(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.x87_check()?;
    cpu.fpu.x87.initialise();
    Ok(())
}

/// Whether the environment has the form of real mode.
fn real_form(cpu: &Cpu) -> bool {
    cpu.real_mode() || cpu.v86()
}

/// The environment; the length is `size`.
fn environment(cpu: &mut Cpu, size: usize) -> [u8; WIDE] {
    cpu.fpu.settle();
    let real = real_form(cpu);
    let x87 = &cpu.fpu.x87;
    let (control, status, tags) = (x87.control(), x87.status(), x87.full_tags());
    let LastInstruction { ip, dp, opcode } = x87.last;
    let mut area = [0; WIDE];
    if size == WIDE {
        let high = |value: u64| (value as u32 & 0xffff_0000) >> 4;
        let words: [u32; 7] = if real {
            [
                0xffff_0000 | u32::from(control),
                0xffff_0000 | u32::from(status),
                0xffff_0000 | u32::from(tags),
                0xffff_0000 | ip as u32 & 0xffff,
                high(ip) | u32::from(opcode),
                0xffff_0000 | dp as u32 & 0xffff,
                high(dp),
            ]
        } else {
            [
                0xffff_0000 | u32::from(control),
                0xffff_0000 | u32::from(status),
                0xffff_0000 | u32::from(tags),
                ip as u32,
                u32::from(opcode) << 16,
                dp as u32,
                0xffff_0000,
            ]
        };
        for (place, word) in area.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    } else {
        let high = |value: u64| ((value >> 16) as u16 & 0xf) << 12;
        let words: [u16; 7] = if real {
            [control, status, tags, ip as u16, high(ip) | opcode, dp as u16, high(dp)]
        } else {
            [control, status, tags, ip as u16, 0, dp as u16, 0]
        };
        for (place, word) in area.chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
    area
}

/// Loads an environment of `size` bytes.
fn load_environment(cpu: &mut Cpu, area: &[u8], size: usize) {
    let word = |index: usize| {
        let width = size / 7;
        let at = index * width;
        area.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    let dword = |index: usize| {
        let at = index * 4;
        area.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    let last = match (size == WIDE, real_form(cpu)) {
        (true, false) => LastInstruction {
            ip: u64::from(dword(3)),
            dp: u64::from(dword(5)),
            opcode: (dword(4) >> 16) as u16,
        },
        (true, true) => LastInstruction {
            ip: u64::from(word(3)) | u64::from(dword(4) << 4 & 0xffff_0000),
            dp: u64::from(word(5)) | u64::from(dword(6) << 4 & 0xffff_0000),
            opcode: word(4),
        },
        (false, false) => LastInstruction { ip: u64::from(word(3)), dp: u64::from(word(5)), opcode: 0 },
        (false, true) => LastInstruction {
            ip: u64::from(word(3)) | u64::from(word(4) >> 12) << 16,
            dp: u64::from(word(5)) | u64::from(word(6) >> 12) << 16,
            opcode: word(4),
        },
    };
    let full = word(2);
    let tags = (0..8).fold(0, |tags, n| tags | u8::from(full >> (2 * n) & 3 != 3) << n);
    cpu.fpu.x87.set_environment(word(0), word(1), tags, last);
}

fn store_environment<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_check()?;
    let va = cpu.addr(op, SIZE as u64, Intent::Write)?;
    let area = environment(cpu, SIZE);
    cpu.write(va, &area[..SIZE])?;
    cpu.fpu.x87.mask_all();
    Ok(())
}

fn read_area(cpu: &mut Cpu, op: &Op, size: usize) -> Result<[u8; WIDE + REGISTERS], Stop> {
    let va = cpu.addr(op, size as u64, Intent::Read)?;
    let mut area = [0; WIDE + REGISTERS];
    cpu.read(va, &mut area[..size])?;
    Ok(area)
}

fn restore_environment<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_wait()?;
    let area = read_area(cpu, op, SIZE)?;
    load_environment(cpu, &area[..SIZE], SIZE);
    Ok(())
}

/// FNSAVE; `SIZE` is that of the environment.
fn save<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_check()?;
    let size = SIZE + REGISTERS;
    let va = cpu.addr(op, size as u64, Intent::Write)?;
    let mut area = [0; WIDE + REGISTERS];
    area[..SIZE].copy_from_slice(&environment(cpu, SIZE)[..SIZE]);
    for (index, place) in area[SIZE..size].chunks_exact_mut(10).enumerate() {
        place.copy_from_slice(&cpu.fpu.x87.register(index));
    }
    cpu.write(va, &area[..size])?;
    cpu.fpu.x87.initialise();
    Ok(())
}

fn restore<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_wait()?;
    let area = read_area(cpu, op, SIZE + REGISTERS)?;
    load_environment(cpu, &area[..SIZE], SIZE);
    for (index, bytes) in area[SIZE..SIZE + REGISTERS].chunks_exact(10).enumerate() {
        let mut value = [0; 10];
        value.copy_from_slice(bytes);
        cpu.fpu.x87.set_register(index, value);
    }
    Ok(())
}

/// Handler of one of these instructions.
pub(crate) fn select(instruction: &Instruction) -> Option<Selected> {
    use Code::*;
    let exec: Exec = match instruction.code() {
        Fninit => initialise,
        Fnstenv_m14byte => store_environment::<NARROW>,
        Fnstenv_m28byte => store_environment::<WIDE>,
        Fldenv_m14byte => restore_environment::<NARROW>,
        Fldenv_m28byte => restore_environment::<WIDE>,
        Fnsave_m94byte => save::<NARROW>,
        Fnsave_m108byte => save::<WIDE>,
        Frstor_m94byte => restore::<NARROW>,
        Frstor_m108byte => restore::<WIDE>,
        _ => return None,
    };
    Selected::go_on(exec)
}
