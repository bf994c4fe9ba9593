//! The memory images of the register state: FXSAVE's 512 bytes, and the XSAVE area of the seam's
//! [`harrier_engine::CpuState`] (Intel SDM volume 1, 10.5 and 13.4).

use super::x87::LastInstruction;
use super::{Fpu, MXCSR_MASK};
use crate::native::mxcsr::Mxcsr;

/// Bytes of the legacy region.
pub(crate) const LEGACY: usize = 512;
/// XSAVE header after the legacy region.
const HEADER: usize = 64;
/// Offset and size of the AVX component in the standard layout.
pub(crate) const AVX_AT: usize = LEGACY + HEADER;
pub(crate) const AVX_SIZE: usize = 256;

/// Components of XCR0 and XSTATE_BV.
pub(crate) const X87_STATE: u64 = 1;
pub(crate) const SSE_STATE: u64 = 2;
pub(crate) const AVX_STATE: u64 = 4;

/// Parts of the legacy region.
const MXCSR_AT: usize = 24;
const MXCSR_MASK_AT: usize = 28;
const STACK_AT: usize = 32;
const XMM_AT: usize = 160;

/// A saved state that cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadArea(pub String);

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = area.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Little-endian number of `N` bytes at an offset; zero beyond the end.
fn number<const N: usize>(area: &[u8], at: usize) -> u64 {
    let mut bytes = [0u8; 8];
    if let Some(source) = area.get(at..at + N) {
        bytes[..N].copy_from_slice(source);
    }
    u64::from_le_bytes(bytes)
}

impl Fpu {
    /// The x87 part of the legacy region. `long` is the form with 64-bit pointers.
    pub(crate) fn put_x87(&mut self, area: &mut [u8], long: bool) {
        self.settle();
        let x87 = &self.x87;
        put(area, 0, &x87.control().to_le_bytes());
        put(area, 2, &x87.status().to_le_bytes());
        put(area, 4, &[x87.abridged_tags(), 0]);
        put(area, 6, &x87.last.opcode.to_le_bytes());
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        put(area, 8, &(x87.last.ip & mask).to_le_bytes());
        put(area, 16, &(x87.last.dp & mask).to_le_bytes());
        for index in 0..8 {
            put(area, STACK_AT + 16 * index, &x87.register(index));
            put(area, STACK_AT + 16 * index + 10, &[0; 6]);
        }
    }

    /// Loads the x87 part of the legacy region.
    pub(crate) fn take_x87(&mut self, area: &[u8], long: bool) {
        let pointer = |at| if long { number::<8>(area, at) } else { number::<4>(area, at) };
        let last = LastInstruction { ip: pointer(8), dp: pointer(16), opcode: number::<2>(area, 6) as u16 };
        let tags = number::<1>(area, 4) as u8;
        self.x87.set_environment(number::<2>(area, 0) as u16, number::<2>(area, 2) as u16, tags, last);
        for index in 0..8 {
            let at = STACK_AT + 16 * index;
            let mut value = [0; 10];
            value[..8].copy_from_slice(&number::<8>(area, at).to_le_bytes());
            value[8..].copy_from_slice(&(number::<2>(area, at + 8) as u16).to_le_bytes());
            self.x87.set_register(index, value);
        }
    }

    /// MXCSR and its mask.
    pub(crate) fn put_mxcsr(&self, area: &mut [u8]) {
        put(area, MXCSR_AT, &self.mxcsr.get().to_le_bytes());
        put(area, MXCSR_MASK_AT, &MXCSR_MASK.to_le_bytes());
    }

    /// MXCSR of the region, whether or not it is valid.
    pub(crate) fn mxcsr_of(area: &[u8]) -> u32 {
        number::<4>(area, MXCSR_AT) as u32
    }

    /// The first `count` XMM registers.
    pub(crate) fn put_xmm(&self, area: &mut [u8], count: usize) {
        for (index, register) in self.ymm.iter().take(count).enumerate() {
            put(area, XMM_AT + 16 * index, &register[0].to_le_bytes());
            put(area, XMM_AT + 16 * index + 8, &register[1].to_le_bytes());
        }
    }

    /// Loads the first `count` XMM registers.
    pub(crate) fn take_xmm(&mut self, area: &[u8], count: usize) {
        for (index, register) in self.ymm.iter_mut().take(count).enumerate() {
            register[0] = number::<8>(area, XMM_AT + 16 * index);
            register[1] = number::<8>(area, XMM_AT + 16 * index + 8);
        }
    }

    /// Components that are not in their initial state. MXCSR belongs to none of them here.
    pub(crate) fn in_use(&mut self) -> u64 {
        self.settle();
        let any = |from: usize| self.ymm.iter().any(|register| register[from] | register[from + 1] != 0);
        let component = |used: bool, bit: u64| if used { bit } else { 0 };
        component(!self.x87.is_initial(), X87_STATE)
            | component(any(0), SSE_STATE)
            | component(any(2), AVX_STATE)
    }

    /// The XSAVE area in the seam's canonical form: standard layout, components in their initial state absent
    /// and zero. 576 bytes, or 832 when XCR0 has AVX. MXCSR is always there; MXCSR_MASK, which is no state, is
    /// zero.
    #[expect(clippy::wrong_self_convention, reason = "the state has to be fetched from the host's registers")]
    pub(crate) fn to_xsave(&mut self, xcr0: u64) -> Vec<u8> {
        let avx = xcr0 & AVX_STATE != 0;
        let mut area = vec![0; AVX_AT + if avx { AVX_SIZE } else { 0 }];
        let present = self.in_use() & if avx { u64::MAX } else { !AVX_STATE };
        if present & X87_STATE != 0 {
            self.put_x87(&mut area, true);
        }
        put(&mut area, MXCSR_AT, &self.mxcsr.get().to_le_bytes());
        if present & SSE_STATE != 0 {
            self.put_xmm(&mut area, 16);
        }
        if present & AVX_STATE != 0 {
            self.put_avx(&mut area, 16);
        }
        put(&mut area, LEGACY, &present.to_le_bytes());
        area
    }

    /// The upper halves of the first `count` YMM registers.
    pub(crate) fn put_avx(&self, area: &mut [u8], count: usize) {
        for (index, register) in self.ymm.iter().take(count).enumerate() {
            put(area, AVX_AT + 16 * index, &register[2].to_le_bytes());
            put(area, AVX_AT + 16 * index + 8, &register[3].to_le_bytes());
        }
    }

    /// Loads the upper halves of the first `count` YMM registers.
    pub(crate) fn take_avx(&mut self, area: &[u8], count: usize) {
        for (index, register) in self.ymm.iter_mut().take(count).enumerate() {
            register[2] = number::<8>(area, AVX_AT + 16 * index);
            register[3] = number::<8>(area, AVX_AT + 16 * index + 8);
        }
    }

    /// Takes over the XSAVE area of a saved state.
    ///
    /// # Errors
    /// When it is too short, compacted, holds components that XCR0 lacks, or sets reserved bits of MXCSR.
    #[expect(clippy::wrong_self_convention, reason = "what is usable stays")]
    pub(crate) fn from_xsave(&mut self, area: &[u8], xcr0: u64) -> Result<(), BadArea> {
        if area.len() < AVX_AT {
            return Err(BadArea(format!("{} bytes are too short for an xsave area", area.len())));
        }
        let present = number::<8>(area, LEGACY);
        if number::<8>(area, LEGACY + 8) != 0 {
            return Err(BadArea("the xsave area is compacted, the standard layout is expected".to_owned()));
        }
        let known = X87_STATE | SSE_STATE | AVX_STATE;
        if present & !(xcr0 & known | X87_STATE | SSE_STATE) != 0 {
            return Err(BadArea(format!("xsave components {present:#x} are not all in xcr0 {xcr0:#x}")));
        }
        if present & AVX_STATE != 0 && area.len() < AVX_AT + AVX_SIZE {
            return Err(BadArea(format!("{} bytes are too short for the avx registers", area.len())));
        }
        let mxcsr = Self::mxcsr_of(area);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(BadArea(format!("mxcsr {mxcsr:#x} has reserved bits set")));
        }
        self.settle();
        let keep = self.usable;
        *self = Fpu { mxcsr: Mxcsr::new(mxcsr), usable: keep, ..Fpu::default() };
        if present & X87_STATE != 0 {
            self.take_x87(area, true);
        }
        if present & SSE_STATE != 0 {
            self.take_xmm(area, 16);
        }
        if present & AVX_STATE != 0 {
            self.take_avx(area, 16);
        }
        Ok(())
    }

    /// State after RESET (Intel SDM volume 3, table 10-1).
    #[cfg(test)]
    pub(crate) fn reset(&mut self) {
        self.settle();
        let keep = self.usable;
        *self = Fpu { usable: keep, ..Fpu::default() };
    }
}
