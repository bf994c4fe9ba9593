//! x87, MMX, SSE and AVX registers.

/// Register state in the layout of the instructions that save it.
#[derive(Clone)]
pub(crate) struct Fpu {
    /// YMM registers (XMM in the lower half).
    pub ymm: [[u64; 4]; 16],
    pub mxcsr: u32,
}

impl Default for Fpu {
    fn default() -> Fpu {
        Fpu { ymm: [[0; 4]; 16], mxcsr: 0x1f80 }
    }
}
