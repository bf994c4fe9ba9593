//! Arithmetic of paravirtual clock pages, which both engines and the machine write.

/// Multiplier and shift with which a clock page turns ticks of a counter of `khz` kHz (at least 1) into nanoseconds:
/// `((ticks << shift) * multiplier) >> 32`, a negative shift to the right (as in Linux, arch/x86/include/asm/pvclock.h).
pub fn clock_scale(khz: u32) -> (u32, i8) {
    let khz = u128::from(khz.max(1));
    let mut shift = 0i32;
    // The multiplier shall use all of its 32 bits: ns per tick, as a fraction, between 1/2 and 1.
    let exact = |shift: i32| (1_000_000u128 << (32 - shift)) / khz;
    while exact(shift) >> 32 != 0 {
        shift += 1;
    }
    while exact(shift) >> 31 == 0 {
        shift -= 1;
    }
    (exact(shift) as u32, shift as i8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_seconds_of_ticks_are_ten_seconds() {
        for khz in [1, 999, 1_000_000, 2_500_000, 3_999_999, u32::MAX] {
            let (multiplier, shift) = clock_scale(khz);
            let ticks = 10 * u128::from(khz) * 1000;
            let shifted = if shift >= 0 { ticks << shift } else { ticks >> -shift };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            assert!(ns.abs_diff(10_000_000_000) < 20_000, "{khz}: {ns}");
        }
    }
}
