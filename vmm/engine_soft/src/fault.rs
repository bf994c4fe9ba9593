//! Exceptions as handlers raise them.

/// Exception vectors (Intel SDM volume 3, table 6-1).
pub(crate) mod vector {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const AC: u8 = 17;
    pub(crate) const XM: u8 = 19;
}

/// A fault of the current instruction, not yet delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Fault {
    pub vector: u8,
    /// Pushed for the vectors that have one; see [`has_error_code`].
    pub error: u32,
    /// Linear address for #PF (goes to CR2 on delivery); payload of DR6 for #DB.
    pub address: u64,
    /// A non-canonical data address: #SS instead of #GP when the operand is on the stack segment.
    pub non_canonical: bool,
    /// The exception is a trap: RIP is already the next instruction.
    pub trap: bool,
}

/// Whether the exception pushes an error code.
pub(crate) fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}
