//! The decoded form of one instruction.

use crate::cpu::Cpu;

/// Register slot that always reads as zero: the base or index of an address without one.
pub(crate) const REG_ZERO: u8 = 16;
/// Register slot that holds the block's first RIP, for RIP-relative addresses.
pub(crate) const REG_BLOCK: u8 = 17;
/// Segment slots of [`Op::seg`]: ES CS SS DS FS GS, then flat data and flat stack (64-bit mode).
pub(crate) const SEG_FLAT: u8 = 6;
/// Flat, by way of RSP or RBP: a non-canonical address is a stack fault.
pub(crate) const SEG_FLAT_STACK: u8 = 7;

/// Why a handler did not simply go on with the next operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// The block is over: `cpu.rip` holds the next instruction.
    Block,
    /// A fault is in `cpu.fault`; nothing of this instruction is visible.
    Fault,
    /// The store would hit the code being executed: run this instruction again on its own.
    Alone,
}

/// Outcome of a handler.
pub(crate) type Step = Result<(), Stop>;
/// A handler: executes one operation.
pub(crate) type Exec = fn(&mut Cpu, &Op) -> Step;

/// One instruction, decoded. What the fields mean beyond their comment is between the decoder and the handler.
#[derive(Clone, Copy)]
pub(crate) struct Op {
    /// The handler.
    pub exec: Exec,
    /// Immediate, or a branch target relative to the block's first RIP.
    pub imm: u64,
    /// Displacement of the memory operand (relative to the block's RIP when the base is [`REG_BLOCK`]).
    pub disp: i32,
    /// First register operand (a slot; for byte registers bit 7 says AH, CH, DH or BH).
    pub reg: u8,
    /// Second register operand.
    pub rm: u8,
    /// Base register slot of the memory operand.
    pub base: u8,
    /// Index register slot of the memory operand.
    pub index: u8,
    /// Shift of the index, 0 to 3.
    pub scale: u8,
    /// Segment slot of the memory operand.
    pub seg: u8,
    /// Instruction length in bytes.
    pub len: u8,
    /// Address size and segment checks of the memory operand; see the `ADDR_` constants.
    pub addr: u8,
    /// Offset of the instruction from the block's first RIP.
    pub pc: u16,
    /// Anything else a handler needs.
    pub aux: u16,
}

/// 64-bit address size in 64-bit mode: no masks, no limits. The fast path.
pub(crate) const ADDR_FLAT: u8 = 0;
/// Bits 1:0 when not flat: 1 = 16-bit, 2 = 32-bit, 3 = 64-bit address size.
pub(crate) const ADDR_SIZE_MASK: u8 = 3;
/// 16-bit address size.
pub(crate) const ADDR_16: u8 = 1;
/// 32-bit address size.
pub(crate) const ADDR_32: u8 = 2;
/// The segment's limit, type and base count (everything but 64-bit mode).
pub(crate) const ADDR_SEGMENTED: u8 = 4;

const _: () = assert!(size_of::<Op>() == 32);
