//! The question to the kernel that no safe wrapper asks.

#![expect(unsafe_code, reason = "the landlock system call has no safe wrapper here")]

use std::io;

/// LANDLOCK_CREATE_RULESET_VERSION.
const LANDLOCK_VERSION: libc::c_uint = 1;

/// The highest landlock ABI of the kernel.
pub(super) fn landlock_abi() -> io::Result<i64> {
    // SAFETY: with this flag the call takes a null pointer and length zero, and only returns a number
    // (Linux documentation, `userspace-api/landlock.rst`).
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_VERSION,
        )
    };
    if abi < 0 { Err(io::Error::last_os_error()) } else { Ok(abi) }
}
