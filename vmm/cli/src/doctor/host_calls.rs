//! The two questions to the kernel that no safe wrapper asks.

#![expect(unsafe_code, reason = "a KVM ioctl and the landlock system call have no safe wrapper here")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// KVM_GET_API_VERSION (Linux documentation, `virt/kvm/api.rst`, 4.1).
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
/// LANDLOCK_CREATE_RULESET_VERSION.
const LANDLOCK_VERSION: libc::c_uint = 1;

/// The version of the interface behind an open /dev/kvm; 12 on every current kernel.
pub(super) fn kvm_api_version(kvm: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open for the whole call, and this ioctl takes no pointer.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

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
