//! From KVM's dirty log to the page logs of the seam.

use harrier_engine::EngineError;
use harrier_engine::memory::PAGE_SIZE;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, MmapRegion};

use crate::host::refused;
use crate::slots::Slots;

/// Marks the pages that vCPUs wrote since the last call.
///
/// The first call turns KVM's log on and marks everything: what was written before, nobody recorded.
pub(crate) fn sync(vm: &VmFd, slots: &mut Slots) -> Result<(), EngineError> {
    if !slots.logging() {
        slots.log_writes(vm)?;
        for slot in slots.iter().filter(|slot| slot.is_logged()) {
            let mapping: &MmapRegion<harrier_engine::PageLog> = &slot.region;
            mapping.bitmap().mark_dirty(0, mapping.size());
        }
        return Ok(());
    }
    for slot in slots.iter().filter(|slot| slot.is_logged()) {
        let len = usize::try_from(slot.region.len()).unwrap_or(usize::MAX);
        let words = vm.get_dirty_log(slot.number, len).map_err(refused("read KVM's log of written pages"))?;
        let mapping: &MmapRegion<harrier_engine::PageLog> = &slot.region;
        for (first, count) in runs(&words) {
            mapping.bitmap().mark_dirty(first * PAGE_SIZE, count * PAGE_SIZE);
        }
    }
    Ok(())
}

/// The runs of set bits in a bitmap, as first bit and length; a run ends with its word at the latest.
fn runs(words: &[u64]) -> impl Iterator<Item = (usize, usize)> {
    words.iter().enumerate().flat_map(|(index, &word)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = rest.trailing_zeros();
            let count = (rest >> first).trailing_ones();
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << first };
            rest &= !mask;
            Some((index * 64 + first as usize, count as usize))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_set_bits_are_found_in_every_place() {
        let words = [0b1011, 0, u64::MAX, 1 << 63, 0b10];
        let found: Vec<_> = runs(&words).collect();
        assert_eq!(found, [(0, 2), (3, 1), (128, 64), (255, 1), (257, 1)]);
    }
}
