//! x87, SSE and AVX registers: KVM's XSAVE area from and to the canonical one.
//!
//! KVM gives the standard layout too, but longer than XCR0 needs, with components present that are in their
//! initial state, and with MXCSR_MASK, which is a constant of the processor.
#![expect(unsafe_code, reason = "KVM_GET_XSAVE2 writes as much as KVM_CAP_XSAVE2 says")]

use harrier_engine::EngineError;
use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::host::refused;

/// Legacy region and header (Intel SDM volume 1, 13.4).
pub(super) const SMALLEST: usize = 576;
const LEGACY: usize = 512;
const MXCSR: std::ops::Range<usize> = 24..28;
const MXCSR_MASK: std::ops::Range<usize> = 28..32;
const ST: std::ops::Range<usize> = 32..160;
const XMM: std::ops::Range<usize> = 160..416;
const UNUSED: std::ops::Range<usize> = 416..LEGACY;
const XSTATE_BV: std::ops::Range<usize> = LEGACY..LEGACY + 8;
/// Control word that FNINIT sets.
const INITIAL_CONTROL_WORD: u16 = 0x37f;
/// A component of an XSAVE area beyond the legacy region: where it is in the standard layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Component {
    /// Bit of XCR0.
    pub(crate) bit: u32,
    pub(crate) offset: usize,
    pub(crate) size: usize,
}

/// What is known of this host's XSAVE area.
#[derive(Debug, Clone)]
pub(crate) struct XsaveLayout {
    has_xsave2: bool,
    /// Bytes that KVM reads and writes.
    kvm_bytes: usize,
    components: Vec<Component>,
}

impl XsaveLayout {
    pub(crate) fn new(vm: &VmFd, components: Vec<Component>) -> XsaveLayout {
        // Before Linux 5.17 there is no XSAVE2, and the area is a page.
        let answer = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        XsaveLayout { has_xsave2: answer != 0, kvm_bytes: answer.max(size_of::<kvm_xsave>()), components }
    }

    /// Bytes that the components of `xcr0` need.
    fn bytes_for(&self, xcr0: u64) -> usize {
        let ends = self.components.iter().filter(|c| xcr0 >> c.bit & 1 != 0).map(|c| c.offset + c.size);
        ends.max().unwrap_or(SMALLEST).max(SMALLEST)
    }

    /// Reads a vCPU's area in canonical form.
    pub(crate) fn get(&self, vcpu: &VcpuFd, xcr0: u64) -> Result<Vec<u8>, EngineError> {
        let mut area = self.empty()?;
        if self.has_xsave2 {
            // SAFETY: the area has the size that KVM asked for, a page at least.
            unsafe { vcpu.get_xsave2(&mut area) }.map_err(refused("read the vector registers"))?;
        } else {
            let page = vcpu.get_xsave().map_err(refused("read the vector registers"))?;
            // SAFETY: only the fixed part is changed, not the length of the part behind it.
            unsafe { area.as_mut_fam_struct() }.xsave.region = page.region;
        }
        // This is on the way of every loan of user code: not a byte more than needed.
        let len = self.bytes_for(xcr0);
        let mut bytes = vec![0; len.next_multiple_of(4)];
        let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Ok(canonical(bytes, xcr0, len, &self.components))
    }

    /// Writes a vCPU's area.
    pub(crate) fn set(&self, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), EngineError> {
        if bytes.len() < SMALLEST || bytes.len() > self.kvm_bytes {
            return Err(EngineError::State {
                field: "xsave",
                reason: format!("{} bytes are not between {SMALLEST} and {}", bytes.len(), self.kvm_bytes),
            });
        }
        let mut area = self.empty()?;
        let words: Vec<u32> = bytes
            .chunks(4)
            .map(|chunk| chunk.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte)))
            .collect();
        // SAFETY: only words of the fixed part are changed, not the length of the part behind it.
        let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
        let behind = words.get(fixed.len()..).unwrap_or_default().to_vec();
        fixed.iter_mut().zip(&words).for_each(|(place, &word)| *place = word);
        if number(bytes, XSTATE_BV) & 1 == 0 {
            // KVM's copy into a processor without XSAVE does not look at XSTATE_BV.
            fixed[0] = INITIAL_CONTROL_WORD.into();
        }
        area.as_mut_slice().iter_mut().zip(behind).for_each(|(place, word)| *place = word);
        // SAFETY: the area has the size that KVM reads, a page at least.
        unsafe { vcpu.set_xsave2(&area) }.map_err(|err| EngineError::State {
            field: "xsave",
            reason: format!("KVM refused it ({err}): a reserved bit of MXCSR or XSTATE_BV may be set"),
        })
    }

    fn empty(&self) -> Result<Xsave, EngineError> {
        let words = (self.kvm_bytes - size_of::<kvm_xsave>()).div_ceil(4);
        Xsave::new(words).map_err(|err| EngineError::State {
            field: "xsave",
            reason: format!("{} bytes are too many ({err:?})", self.kvm_bytes),
        })
    }
}

fn number(bytes: &[u8], at: std::ops::Range<usize>) -> u64 {
    bytes.get(at).unwrap_or_default().iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn is_zero(bytes: &[u8], at: std::ops::Range<usize>) -> bool {
    bytes.get(at).is_none_or(|part| part.iter().all(|&byte| byte == 0))
}

fn clear(bytes: &mut [u8], at: std::ops::Range<usize>) {
    if let Some(part) = bytes.get_mut(at) {
        part.fill(0);
    }
}

/// Brings an area in standard layout into the form of [`harrier_engine::cpu_state`].
fn canonical(mut bytes: Vec<u8>, xcr0: u64, len: usize, components: &[Component]) -> Vec<u8> {
    // x87 and SSE registers are there whether or not XCR0 lists them: FXSAVE saves them too.
    let mut present = number(&bytes, XSTATE_BV) & (xcr0 | 3);
    let initial_x87 = number(&bytes, 0..2) == u64::from(INITIAL_CONTROL_WORD)
        && is_zero(&bytes, 2..24)
        && is_zero(&bytes, ST);
    if initial_x87 {
        present &= !1;
    }
    if is_zero(&bytes, XMM) {
        present &= !2;
    }
    for component in components {
        let at = component.offset..component.offset + component.size;
        if is_zero(&bytes, at.clone()) {
            present &= !(1 << component.bit);
        }
        if present >> component.bit & 1 == 0 {
            clear(&mut bytes, at);
        }
    }
    if present & 1 == 0 {
        clear(&mut bytes, 0..MXCSR.start);
        clear(&mut bytes, ST);
    }
    if present & 2 == 0 {
        clear(&mut bytes, XMM);
    }
    clear(&mut bytes, MXCSR_MASK);
    clear(&mut bytes, UNUSED);
    clear(&mut bytes, LEGACY..SMALLEST);
    bytes[XSTATE_BV].copy_from_slice(&present.to_le_bytes());
    bytes.resize(len, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVX: Component = Component { bit: 2, offset: 576, size: 256 };

    fn initial() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[..2].copy_from_slice(&INITIAL_CONTROL_WORD.to_le_bytes());
        bytes[MXCSR].copy_from_slice(&0x1f80u32.to_le_bytes());
        bytes[MXCSR_MASK].copy_from_slice(&0x2ffffu32.to_le_bytes());
        bytes[XSTATE_BV].copy_from_slice(&7u64.to_le_bytes());
        bytes
    }

    #[test]
    fn of_the_initial_state_only_mxcsr_is_left() {
        let area = canonical(initial(), 7, 832, &[AVX]);
        assert_eq!(area.len(), 832);
        assert_eq!(number(&area, MXCSR), 0x1f80);
        assert_eq!(area.iter().filter(|&&byte| byte != 0).count(), 2);
    }

    #[test]
    fn what_is_in_use_stays_and_what_xcr0_lacks_goes() {
        let mut bytes = initial();
        bytes[160] = 1;
        bytes[600] = 2;
        let area = canonical(bytes.clone(), 7, 832, &[AVX]);
        assert_eq!((number(&area, XSTATE_BV), area[160], area[600]), (6, 1, 2));
        let area = canonical(bytes, 1, 576, &[AVX]);
        assert_eq!((number(&area, XSTATE_BV), area[160], area.len()), (2, 1, 576));
    }

    #[test]
    fn a_used_x87_keeps_its_control_word() {
        let mut bytes = initial();
        bytes[ST.start] = 9;
        let area = canonical(bytes, 3, 576, &[]);
        assert_eq!((number(&area, XSTATE_BV), number(&area, 0..2)), (1, 0x37f));
    }
}
