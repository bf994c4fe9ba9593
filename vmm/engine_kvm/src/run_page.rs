//! The page that KVM shares with user space for each vCPU (`struct kvm_run`), mapped a second time.
//!
//! [`RunPage`] belongs to the vCPU and to its kickers alike: a kicker sets `immediate_exit` while the vCPU's
//! thread is inside KVM, which kvm-ioctls' own mapping does not allow. Everything is read and written through
//! volatile slices with checked bounds.
#![expect(unsafe_code, reason = "maps the vCPU's page and makes a volatile slice of it")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vm_memory::{ByteValued, Bytes, VolatileMemory, VolatileSlice};

/// `struct kvm_run` and what follows it, shared with the kernel.
#[derive(Debug)]
pub(crate) struct RunPage {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping stays until drop, and is accessed only by volatile and atomic operations.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the vCPU's page; `len` is the size that KVM_GET_VCPU_MMAP_SIZE says.
    pub(crate) fn map(vcpu: &VcpuFd, len: usize) -> io::Result<RunPage> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other("KVM_GET_VCPU_MMAP_SIZE is smaller than struct kvm_run"));
        }
        // SAFETY: a new shared mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(RunPage { start, len })
    }

    /// Memory that no kernel shares, for tests of what is read from a page.
    #[cfg(test)]
    pub(crate) fn without_kernel(len: usize) -> RunPage {
        // SAFETY: a new private mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        RunPage { start: NonNull::new(start.cast()).unwrap(), len }
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the mapping has `len` bytes and lives as long as `self`.
        unsafe { VolatileSlice::new(self.start.as_ptr(), self.len) }
    }

    /// Reads a value at a byte offset; `None` beyond the mapping.
    pub(crate) fn read<T: ByteValued>(&self, offset: usize) -> Option<T> {
        self.slice().read_obj(offset).ok()
    }

    /// Writes a value at a byte offset; false beyond the mapping.
    pub(crate) fn write<T: ByteValued>(&self, offset: usize, value: T) -> bool {
        self.slice().write_obj(value, offset).is_ok()
    }

    /// Reads bytes; false beyond the mapping.
    pub(crate) fn read_bytes(&self, offset: usize, bytes: &mut [u8]) -> bool {
        self.slice().read_slice(bytes, offset).is_ok()
    }

    /// Writes bytes; false beyond the mapping.
    pub(crate) fn write_bytes(&self, offset: usize, bytes: &[u8]) -> bool {
        self.slice().write_slice(bytes, offset).is_ok()
    }

    /// Makes KVM_RUN return with EINTR as soon as it has completed a half-finished exit, or stops that.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        let slice = self.slice();
        if let Ok(flag) = slice.get_atomic_ref::<AtomicU8>(std::mem::offset_of!(kvm_run, immediate_exit)) {
            flag.store(on.into(), Ordering::SeqCst);
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody holds a slice of it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
