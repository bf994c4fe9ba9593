//! Port input and output: IN, OUT, INS, OUTS (Intel SDM volume 1, chapter 19).

use harrier_engine::Flow;
use harrier_engine::cpu_state::MpState;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::by_size;
use crate::cpu::{Cpu, ES, RAX, RCX, RDI, RDX, RSI, rflags};
use crate::decode::Mode;
use crate::decode::lower::{Selected, address_kind, segment_slot};
use crate::decode::op::{ADDR_16, ADDR_32, ADDR_SEGMENTED, ADDR_SIZE_MASK, Exec, Op, SEG_FLAT, Step, Stop};
use crate::mmu::Intent;
use crate::native::mem::Word;

/// Elements that one call of a repeated handler may do before it lets interrupts in.
const MAX_ELEMENTS: u32 = 256;

/// In [`Op::aux`]: the port is in DX, not in the immediate.
const PORT_IN_DX: u16 = 1;
/// In [`Op::aux`]: repeated by the counter.
const REPEATED: u16 = 2;

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::In => {
            if instruction.op1_kind() == OpKind::Register {
                op.aux = PORT_IN_DX;
            }
            by_size!(instruction.op0_register().size(), input)
        }
        Mnemonic::Out => {
            if instruction.op0_kind() == OpKind::Register {
                op.aux = PORT_IN_DX;
            }
            by_size!(instruction.op1_register().size(), output)
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
            string_operand(instruction, op, mode, instruction.op0_kind());
            op.seg = if mode == Mode::Bits64 { SEG_FLAT } else { ES as u8 };
            by_size!(string_size(instruction), input_string)
        }
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            string_operand(instruction, op, mode, instruction.op1_kind());
            op.seg = segment_slot(instruction.memory_segment(), mode);
            by_size!(string_size(instruction), output_string)
        }
        _ => return None,
    };
    Selected::end(exec)
}

fn string_size(instruction: &Instruction) -> usize {
    match instruction.code() {
        Code::Insb_m8_DX | Code::Outsb_DX_m8 => 1,
        Code::Insw_m16_DX | Code::Outsw_DX_m16 => 2,
        _ => 4,
    }
}

fn string_operand(instruction: &Instruction, op: &mut Op, mode: Mode, kind: OpKind) {
    let size = match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        _ => 8,
    };
    op.addr = address_kind(size, mode);
    op.aux = if instruction.has_rep_prefix() || instruction.has_repne_prefix() { REPEATED } else { 0 };
}

impl Cpu {
    /// Whether a port may be accessed now: by privilege or by the task's bitmap.
    fn check_port(&mut self, port: u16, size: u64) -> Step {
        if self.real_mode() || (self.cpl <= self.iopl() && !self.v86()) {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if self.tr.unusable || self.tr.kind & 8 == 0 || limit < 0x67 {
            return self.raise_gp();
        }
        let map = u64::from(self.load_system::<u16>(self.table_address(self.tr.base, 0x66))?);
        let at = map + u64::from(port) / 8;
        // Two bytes are read, so the map needs one more than its last.
        if at + 1 > limit {
            return self.raise_gp();
        }
        let bits = self.load_system::<u16>(self.table_address(self.tr.base, at))?;
        let mask = ((1u32 << size) - 1) << (port & 7);
        if u32::from(bits) & mask != 0 { self.raise_gp() } else { Ok(()) }
    }

    fn port_read<W: Word>(&mut self, port: u16) -> W {
        let mut bytes = [0xff; 8];
        self.io_accesses += 1;
        self.fpu.settle();
        let flow = self.io.with(|io| io.pio_read(port, &mut bytes[..W::SIZE]));
        self.follow(flow);
        W::from_u64(u64::from_le_bytes(bytes))
    }

    fn port_write<W: Word>(&mut self, port: u16, value: W) {
        let bytes = value.to_u64().to_le_bytes();
        self.io_accesses += 1;
        self.fpu.settle();
        let flow = self.io.with(|io| io.pio_write(port, &bytes[..W::SIZE]));
        self.follow(flow);
    }

    /// Does what a device asked for after an access.
    pub(crate) fn follow(&mut self, flow: Flow) {
        match flow {
            Flow::Continue => return,
            Flow::Leave => self.leave = true,
            Flow::Halt => self.mp_state = MpState::Halted,
        }
        self.attention = true;
    }
}

fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.aux & PORT_IN_DX != 0 { cpu.regs[RDX] as u16 } else { u16::from(op.imm as u8) }
}

fn input<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = port(cpu, op);
    cpu.check_port(port, W::SIZE as u64)?;
    let value = cpu.port_read::<W>(port);
    cpu.set_reg(RAX as u8, value);
    cpu.end_block(op)
}

fn output<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = port(cpu, op);
    cpu.check_port(port, W::SIZE as u64)?;
    let value = cpu.reg::<W>(RAX as u8);
    cpu.port_write(port, value);
    cpu.end_block(op)
}

fn address_mask(op: &Op) -> u64 {
    match op.addr & ADDR_SIZE_MASK {
        ADDR_16 => 0xffff,
        ADDR_32 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Writes a pointer or counter: 16 bits keep the rest, 32 bits clear the upper half.
fn set_masked(cpu: &mut Cpu, register: usize, mask: u64, value: u64) {
    let kept = if mask == 0xffff { cpu.regs[register] & !mask } else { 0 };
    cpu.regs[register] = kept | (value & mask);
}

fn element(cpu: &mut Cpu, op: &Op, register: usize, size: u64, intent: Intent) -> Result<u64, Stop> {
    let offset = cpu.regs[register] & address_mask(op);
    if op.addr & ADDR_SEGMENTED == 0 {
        return Ok(offset.wrapping_add(cpu.seg_base[usize::from(op.seg & 7)]));
    }
    cpu.segmented(usize::from(op.seg), offset, size, intent)
}

fn advance<W: Word>(cpu: &mut Cpu, op: &Op, register: usize) {
    let by = W::SIZE as i64;
    let by = if cpu.rflags & rflags::DF != 0 { -by } else { by };
    let value = cpu.regs[register].wrapping_add_signed(by);
    set_masked(cpu, register, address_mask(op), value);
}

fn input_element<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = cpu.regs[RDX] as u16;
    cpu.check_port(port, W::SIZE as u64)?;
    let va = element(cpu, op, RDI, W::SIZE as u64, Intent::Write)?;
    // The device is read only when the value has a place.
    cpu.probe_write(va, W::SIZE)?;
    let value = cpu.port_read::<W>(port);
    cpu.store(va, value)?;
    advance::<W>(cpu, op, RDI);
    Ok(())
}

fn output_element<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = cpu.regs[RDX] as u16;
    cpu.check_port(port, W::SIZE as u64)?;
    let va = element(cpu, op, RSI, W::SIZE as u64, Intent::Read)?;
    let value = cpu.load::<W>(va)?;
    cpu.port_write(port, value);
    advance::<W>(cpu, op, RSI);
    Ok(())
}

fn input_string<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    // Without the right to use the port not even no elements are moved.
    cpu.check_port(cpu.regs[RDX] as u16, W::SIZE as u64)?;
    repeat(cpu, op, input_element::<W>)
}

fn output_string<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_port(cpu.regs[RDX] as u16, W::SIZE as u64)?;
    repeat(cpu, op, output_element::<W>)
}

/// Does one element, or as many as the counter says; pauses on the same instruction when it takes long.
fn repeat(cpu: &mut Cpu, op: &Op, element: Exec) -> Step {
    if op.aux & REPEATED == 0 {
        element(cpu, op)?;
        return cpu.end_block(op);
    }
    let mask = address_mask(op);
    let mut left = MAX_ELEMENTS;
    cpu.unfinished = false;
    while cpu.regs[RCX] & mask != 0 {
        if left == 0 || cpu.leave {
            cpu.unfinished = true;
            cpu.rip = cpu.op_rip(op);
            return Err(Stop::Block);
        }
        element(cpu, op)?;
        let count = cpu.regs[RCX].wrapping_sub(1);
        set_masked(cpu, RCX, mask, count);
        left -= 1;
        if cpu.alone {
            // A single step is one element; a fault or trap between them shows.
            left = 0;
        }
    }
    cpu.end_block(op)
}
