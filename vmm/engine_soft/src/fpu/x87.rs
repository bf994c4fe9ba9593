//! The x87 unit's state.
//!
//! While the guest computes, the state stays in the host's own x87 unit (`resident`): nothing else in this
//! process uses that unit. It is taken out with [`X87::settle`] when somebody wants to see it, when MMX
//! instructions run, before devices are called and at the end of a run.
//!
//! An unmasked exception is noticed in the status word after the instruction and noted as `pending`; the next
//! waiting instruction raises #MF in the guest without executing, so that the host never takes one.
//!
//! The instruction and data pointers are those of the guest: the last instruction that is no control
//! instruction, and its memory operand if it has one, whether or not an exception is pending. Their selectors
//! are zero, as on processors that report them as deprecated (Intel SDM volume 1, 8.1.8).

use crate::native::x87::{self, Image};

/// Exception flags of the status word, masks of the control word.
pub(crate) const EXCEPTIONS: u16 = 0x3f;
/// Error summary and busy bits of the status word.
const SUMMARY: u16 = 0x8080;
/// Control word after FNINIT.
pub(crate) const CONTROL_INIT: u16 = 0x37f;

const REGISTERS: usize = 28;

/// Where the last instruction and its operand were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LastInstruction {
    /// Offset of the instruction in its code segment.
    pub ip: u64,
    /// Offset of the memory operand in its segment.
    pub dp: u64,
    /// The low three bits of the first opcode byte, then the second byte.
    pub opcode: u16,
}

/// State of the x87 unit.
#[derive(Clone)]
pub(crate) struct X87 {
    /// The state, unless it is `resident`. Registers are in stack order.
    image: Image,
    /// The state is in the host's unit.
    resident: bool,
    /// An unmasked exception waits for the next waiting instruction.
    pub pending: bool,
    pub last: LastInstruction,
}

impl Default for X87 {
    fn default() -> X87 {
        let mut x87 =
            X87 { image: Image([0; 112]), resident: false, pending: false, last: LastInstruction::default() };
        x87.initialise();
        x87
    }
}

impl X87 {
    /// FNINIT; the physical registers keep their bits.
    pub(crate) fn initialise(&mut self) {
        self.settle();
        self.set_top(0);
        self.set_word(0, CONTROL_INIT);
        self.set_word(4, 0);
        self.set_word(8, 0xffff);
        self.pending = false;
        self.last = LastInstruction::default();
    }

    /// State after RESET and in the initial configuration of XSAVE: FNINIT with the registers cleared.
    pub(crate) fn reset(&mut self) {
        self.settle();
        self.image = Image([0; 112]);
        self.initialise();
    }

    /// Brings the state into the host's unit.
    #[inline(always)]
    pub(crate) fn make_resident(&mut self) {
        if !self.resident {
            x87::load(&self.image);
            self.resident = true;
        }
    }

    /// Takes it out again.
    #[inline(always)]
    pub(crate) fn settle(&mut self) {
        if self.resident {
            x87::save(&mut self.image);
            self.resident = false;
        }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.image.0[at], self.image.0[at + 1]])
    }

    fn set_word(&mut self, at: usize, value: u16) {
        self.image.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Control word, wherever it is.
    pub(crate) fn control(&self) -> u16 {
        if self.resident { x87::control_word() } else { self.word(0) }
    }

    /// Status word, wherever it is.
    pub(crate) fn status(&self) -> u16 {
        if self.resident { x87::status_word() } else { self.word(4) }
    }

    /// Top of stack. The state must be settled, as for everything below.
    fn top(&self) -> usize {
        usize::from(self.word(4) >> 11 & 7)
    }

    /// The tag word with one bit a physical register, set when the register is not empty.
    pub(crate) fn abridged_tags(&self) -> u8 {
        let full = self.word(8);
        (0..8).fold(0, |tags, register| tags | u8::from(full >> (2 * register) & 3 != 3) << register)
    }

    /// The full tag word: two bits a physical register (0 valid, 1 zero, 2 special, 3 empty).
    pub(crate) fn full_tags(&self) -> u16 {
        let used = self.abridged_tags();
        let mut full = 0;
        for physical in 0..8 {
            let tag = if used >> physical & 1 == 0 {
                3
            } else {
                let value = self.register((physical + 8 - self.top()) & 7);
                classify(&value)
            };
            full |= tag << (2 * physical);
        }
        full
    }

    fn set_abridged_tags(&mut self, tags: u8) {
        let full = (0..8).fold(0, |full, n| full | if tags >> n & 1 == 0 { 3u16 << (2 * n) } else { 0 });
        self.set_word(8, full);
    }

    /// ST(i), 80 bits.
    pub(crate) fn register(&self, index: usize) -> [u8; 10] {
        let mut value = [0; 10];
        let at = REGISTERS + 10 * (index & 7);
        value.copy_from_slice(&self.image.0[at..at + 10]);
        value
    }

    /// Replaces ST(i).
    pub(crate) fn set_register(&mut self, index: usize, value: [u8; 10]) {
        let at = REGISTERS + 10 * (index & 7);
        self.image.0[at..at + 10].copy_from_slice(&value);
    }

    /// Moves the top of stack; the physical registers stay where they are.
    fn set_top(&mut self, top: usize) {
        let by = (top + 8 - self.top()) & 7;
        self.image.0[REGISTERS..REGISTERS + 80].rotate_left(10 * by);
        self.set_word(4, self.word(4) & !0x3800 | (top as u16 & 7) << 11);
    }

    /// Loads control, status and tag words and the pointers, as FLDENV does; physical registers stay.
    pub(crate) fn set_environment(&mut self, control: u16, status: u16, tags: u8, last: LastInstruction) {
        self.settle();
        // Bit 6 of the control word reads as one, bits 7 and 13 to 15 as zero.
        let control = control & 0x1f3f | 0x40;
        self.set_word(0, control);
        self.set_top(usize::from(status >> 11 & 7));
        self.pending = status & !control & EXCEPTIONS != 0;
        self.set_word(4, status & !SUMMARY | if self.pending { SUMMARY } else { 0 });
        self.set_abridged_tags(tags);
        self.last = LastInstruction { opcode: last.opcode & 0x7ff, ..last };
    }

    /// Masks all exceptions, as FNSTENV does at its end.
    pub(crate) fn mask_all(&mut self) {
        self.set_word(0, self.word(0) | EXCEPTIONS);
        self.set_word(4, self.word(4) & !SUMMARY);
        self.pending = false;
    }

    /// Whether this is the state after RESET.
    pub(crate) fn is_initial(&self) -> bool {
        self.word(0) == CONTROL_INIT
            && self.word(4) == 0
            && self.abridged_tags() == 0
            && self.last == LastInstruction::default()
            && self.image.0[REGISTERS..REGISTERS + 80].iter().all(|&byte| byte == 0)
    }

    /// What every MMX instruction but EMMS does: top of stack 0, no register empty.
    #[inline]
    pub(crate) fn enter_mmx(&mut self) {
        self.settle();
        if self.top() != 0 {
            self.set_top(0);
        }
        self.set_word(8, 0);
    }

    /// EMMS.
    pub(crate) fn leave_mmx(&mut self) {
        self.enter_mmx();
        self.set_word(8, 0xffff);
    }

    /// Where MM0 to MM7 are after [`Self::enter_mmx`], ten bytes apart.
    #[inline(always)]
    pub(crate) fn mmx_registers(&mut self) -> *mut u8 {
        (&raw mut self.image.0).cast::<u8>().wrapping_add(REGISTERS)
    }

    /// MMn without entering MMX mode: the physical register.
    pub(crate) fn mmx_value(&self, index: u8) -> u64 {
        let [value @ .., _, _] = self.register((usize::from(index & 7) + 8 - self.top()) & 7);
        u64::from_le_bytes(value)
    }

    /// A copy of the state, settled.
    pub(crate) fn settled(&mut self) -> X87 {
        self.settle();
        self.clone()
    }

    /// Sets sign and exponent of MMn, as every write to it does.
    #[inline]
    pub(crate) fn mmx_written(&mut self, index: u8) {
        self.set_word(REGISTERS + 10 * usize::from(index & 7) + 8, 0xffff);
    }
}

/// Tag of a register that is not empty.
fn classify(value: &[u8; 10]) -> u16 {
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    let [mantissa @ .., _, _] = *value;
    let mantissa = u64::from_le_bytes(mantissa);
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}
