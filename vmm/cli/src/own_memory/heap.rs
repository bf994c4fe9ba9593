//! How the C library's heap behaves: one for all threads, and given back when the machine has settled.
//!
//! A monitor has a dozen threads of which most allocate next to nothing, and hundreds of monitors may run beside each
//! other: a heap for each thread costs more memory than it saves waiting. What reading the command line and a
//! snapshot took is free afterwards, and worth more to the host than to a machine that sleeps. Large pieces are mapped one by
//! one, so that they go back when they are freed.
#![expect(unsafe_code, reason = "mallopt and malloc_trim of the C library")]

/// Larger pieces are mapped, in bytes. The library would raise it with the first of them that is freed.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 128 << 10;

/// To be called before there are other threads.
pub(crate) fn share_between_threads() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets numbers that later allocations look at; no memory is touched.
    unsafe {
        // Where it is refused, there are more heaps, and they stay larger.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
    }
}

/// Gives free memory back to the host.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the heap's own lock and gives back pages that no allocation lies in.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;
    use crate::own_memory::tests::resident_kib;

    #[test]
    fn what_is_free_goes_back_to_the_host() {
        // Too small to be mapped on their own, and the last one keeps the heap's end where it is.
        let mut pieces: Vec<Vec<u8>> = (0..4096).map(|_| vec![1; 4096]).collect();
        let last = pieces.pop();
        drop(pieces);
        let before = resident_kib("RssAnon:");
        give_back();
        let after = resident_kib("RssAnon:");
        assert!(after + 8 * 1024 < before, "{before} KiB before, {after} KiB after");
        drop(last);
    }
}
