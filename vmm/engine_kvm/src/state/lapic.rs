//! The local APIC's register page.

use harrier_engine::cpu_state::LapicState;
use kvm_bindings::kvm_lapic_state;

/// Index of the id register, which KVM shows in xAPIC form (bits 31:24) unless it is told otherwise.
const ID: usize = 2;

pub(super) fn from_kvm(page: &kvm_lapic_state) -> LapicState {
    let mut state = LapicState::default();
    for (register, bytes) in state.registers.iter_mut().zip(page.regs.chunks_exact(16)) {
        *register = bytes.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte as u8));
    }
    state.registers[ID] >>= 24;
    state
}

pub(super) fn to_kvm(state: &LapicState) -> kvm_lapic_state {
    let mut page = kvm_lapic_state::default();
    for (index, (register, bytes)) in state.registers.iter().zip(page.regs.chunks_exact_mut(16)).enumerate() {
        let value = if index == ID { register << 24 } else { *register };
        for (place, byte) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *place = byte.cast_signed();
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_survives_the_way_to_kvm_and_back_and_the_id_changes_its_form() {
        let state = LapicState { registers: std::array::from_fn(|i| 0x8000_0001 + i as u32) };
        let state = LapicState {
            registers: std::array::from_fn(|i| if i == ID { 0xfe } else { state.registers[i] }),
        };
        let page = to_kvm(&state);
        assert_eq!(page.regs[0x23] as u8, 0xfe);
        assert_eq!(from_kvm(&page), state);
    }
}
