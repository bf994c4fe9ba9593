//! Processor time of the calling thread: what others use of the processor meanwhile does not count.
#![expect(unsafe_code, reason = "asks the kernel for a clock that the standard library does not have")]

use std::time::Duration;

/// Time that this thread has run; zero where the host does not say.
pub(crate) fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a value of this frame.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } != 0 {
        return Duration::ZERO;
    }
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn work_counts_and_sleep_does_not() {
        let begin = now();
        std::thread::sleep(Duration::from_millis(30));
        let slept = now() - begin;
        assert!(slept < Duration::from_millis(20), "{slept:?}");
        let end = Instant::now() + Duration::from_millis(20);
        while Instant::now() < end {}
        assert!(now() - begin > slept);
    }
}
