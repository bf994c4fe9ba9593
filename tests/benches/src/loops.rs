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

/// Sums and shuffles of packed integers, eight instructions an iteration.
pub(crate) fn packed(iterations: u64) -> u64 {
    // SAFETY: only the named registers and the flags change.
    unsafe {
        asm!(
            "2:",
            "paddd {x}, {y}",
            "pxor {z}, {x}",
            "pshufd {y}, {z}, 0x39",
            "pslld {x}, 3",
            "pmuludq {z}, {y}",
            "psubd {y}, {x}",
            "dec {n}",
            "jnz 2b",
            x = inout(xmm_reg) 1.0_f64 => _,
            y = inout(xmm_reg) 2.0_f64 => _,
            z = inout(xmm_reg) 3.0_f64 => _,
            n = inout(reg) iterations.max(1) => _,
            options(nomem, nostack),
        );
    }
    iterations.max(1) * 8
}

/// Calls, returns and a conditional branch that changes its way, nine to ten instructions an iteration.
pub(crate) fn calls(iterations: u64) -> u64 {
    // SAFETY: the called code lies within the block, returns, and uses the stack as any call does.
    unsafe {
        asm!(
            "jmp 3f",
            "2:",
            "add {a}, 1",
            "ret",
            "3:",
            "call 2b",
            "test {n}, 1",
            "jz 4f",
            "add {b}, {a}",
            "4:",
            "call 2b",
            "dec {n}",
            "jnz 3b",
            a = inout(reg) 1_u64 => _,
            b = inout(reg) 2_u64 => _,
            n = inout(reg) iterations.max(1) => _,
        );
    }
    // Two calls with two instructions each, four others and every second time one more.
    iterations.max(1) * 10 + iterations.max(1) / 2
}

/// Touches fresh pages of 4 KiB, one fault each.
pub(crate) fn page_faults(pages: usize) -> std::io::Result<u64> {
    let Some(length) = pages.checked_mul(PAGE).and_then(NonZeroUsize::new) else { return Ok(0) };
    let (rights, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice touches no other.
    let start = unsafe { mmap_anonymous(None, length, rights, flags) }?;
    // SAFETY: the range is the mapping above. A kernel without huge pages refuses, which is as good.
    let _ = unsafe { madvise(start, length.get(), MmapAdvise::MADV_NOHUGEPAGE) };
    for page in 0..pages {
        // SAFETY: inside the mapping above, which is writable.
        unsafe { start.cast::<u8>().add(page * PAGE).write_volatile(1) };
    }
    // SAFETY: the mapping above, which nothing refers to any more.
    let _ = unsafe { munmap(start, length.get()) };
    Ok(pages as u64)
}
