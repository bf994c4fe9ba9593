//! Loops of known instructions, and page faults.
#![expect(
    unsafe_code,
    reason = "an instruction's cost is measured by that instruction, not by what a compiler makes"
)]

use std::arch::asm;
use std::num::NonZeroUsize;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

const PAGE: usize = 4096;

/// Eight dependent and independent register instructions an iteration.
pub(crate) fn registers(iterations: u64) -> u64 {
    // SAFETY: only the named registers and the flags change.
    unsafe {
        asm!(
            "2:",
            "add {a}, {b}",
            "xor {c}, {a}",
            "lea {d}, [{d} + {c}]",
            "sub {b}, 3",
            "mov {e}, {d}",
            "and {e}, 0xff",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) 1_u64 => _,
            b = inout(reg) 2_u64 => _,
            c = inout(reg) 3_u64 => _,
            d = inout(reg) 4_u64 => _,
            e = out(reg) _,
            n = inout(reg) iterations.max(1) => _,
            options(nomem, nostack),
        );
    }
    iterations.max(1) * 8
}

/// A load, a change and a store over 32 KiB, seven instructions an iteration.
pub(crate) fn memory(iterations: u64) -> u64 {
    let mut buffer = vec![0_u64; 4096];
    // SAFETY: the index is kept below 4096, so every access is inside `buffer`.
    unsafe {
        asm!(
            "2:",
            "mov {v}, [{base} + {i} * 8]",
            "add {v}, {n}",
            "mov [{base} + {i} * 8], {v}",
            "lea {i}, [{i} + 1]",
            "and {i}, 4095",
            "dec {n}",
            "jnz 2b",
            base = in(reg) buffer.as_mut_ptr(),
            i = inout(reg) 0_u64 => _,
            v = out(reg) _,
            n = inout(reg) iterations.max(1) => _,
            options(nostack),
        );
    }
    std::hint::black_box(buffer);
    iterations.max(1) * 7
}

/// Multiplications and additions of doubles, six instructions an iteration.
pub(crate) fn doubles(iterations: u64) -> u64 {
    // SAFETY: only the named registers and the flags change.
    unsafe {
        asm!(
            "2:",
            "mulsd {x}, {f}",
            "addsd {x}, {g}",
            "mulsd {y}, {f}",
            "addsd {y}, {x}",
            "dec {n}",
            "jnz 2b",
            x = inout(xmm_reg) 1.0_f64 => _,
            y = inout(xmm_reg) 2.0_f64 => _,
            f = in(xmm_reg) 0.5_f64,
            g = in(xmm_reg) 1.5_f64,
            n = inout(reg) iterations.max(1) => _,
            options(nomem, nostack),
        );
    }
    iterations.max(1) * 6
}

/// Touches fresh pages of 4 KiB, one fault each.
pub(crate) fn page_faults(pages: usize) -> u64 {
    let Some(length) = pages.checked_mul(PAGE).and_then(NonZeroUsize::new) else { return 0 };
    let (rights, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice touches no other.
    let Ok(start) = (unsafe { mmap_anonymous(None, length, rights, flags) }) else { return 0 };
    // SAFETY: the range is the mapping above. A kernel without huge pages refuses, which is as good.
    let _ = unsafe { madvise(start, length.get(), MmapAdvise::MADV_NOHUGEPAGE) };
    for page in 0..pages {
        // SAFETY: inside the mapping above, which is writable.
        unsafe { start.cast::<u8>().add(page * PAGE).write_volatile(1) };
    }
    // SAFETY: the mapping above, which nothing refers to any more.
    let _ = unsafe { munmap(start, length.get()) };
    0
}
