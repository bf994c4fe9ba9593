//! Scatter and gather system calls straight into and out of guest memory.
//!
//! Guest memory changes under our feet, so it may be touched only through raw pointers and by the kernel, never as
//! a Rust slice. These are the system calls for that which vm-memory lacks: with an offset, with several pieces at
//! once, and on sockets without a signal. Bytes that the kernel wrote are marked dirty.

#![expect(unsafe_code, reason = "iovecs that point into guest memory cannot be expressed safely")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::volatile_memory::{PtrGuard, PtrGuardMut};

use super::chain::MemorySlice;

/// The kernel's limit of pieces in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// iovecs for the kernel to read from, and what keeps their targets mapped.
struct Gather {
    iovecs: Vec<libc::iovec>,
    _guards: Vec<PtrGuard>,
}

impl Gather {
    fn new<'s, 'm: 's>(slices: impl Iterator<Item = &'s MemorySlice<'m>>) -> Self {
        let guards: Vec<PtrGuard> = slices.take(MAX_PIECES).map(|slice| slice.ptr_guard()).collect();
        let iovecs = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
            .collect();
        Gather { iovecs, _guards: guards }
    }

    fn count(&self) -> libc::c_int {
        // At most MAX_PIECES.
        self.iovecs.len() as libc::c_int
    }
}

/// iovecs for the kernel to write to, and what keeps their targets mapped.
struct Scatter {
    iovecs: Vec<libc::iovec>,
    _guards: Vec<PtrGuardMut>,
}

impl Scatter {
    fn new<'s, 'm: 's>(slices: impl Iterator<Item = &'s MemorySlice<'m>>) -> Self {
        let guards: Vec<PtrGuardMut> = slices.take(MAX_PIECES).map(|slice| slice.ptr_guard_mut()).collect();
        let iovecs = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        Scatter { iovecs, _guards: guards }
    }

    fn count(&self) -> libc::c_int {
        // At most MAX_PIECES.
        self.iovecs.len() as libc::c_int
    }
}

fn mark_written<'s, 'm: 's>(slices: impl Iterator<Item = &'s MemorySlice<'m>>, mut written: usize) {
    for slice in slices {
        if written == 0 {
            break;
        }
        let here = slice.len().min(written);
        slice.bitmap().mark_dirty(0, here);
        written -= here;
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    offset.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Repeats a system call that a signal interrupted; a negative result is an error.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// preadv(2): reads from `offset` into the slices, in order. May read less than fits; 0 is the end.
pub(crate) fn read_at<'s, 'm: 's>(
    file: &impl AsFd,
    offset: u64,
    slices: impl Iterator<Item = &'s MemorySlice<'m>> + Clone,
) -> io::Result<usize> {
    let (fd, offset) = (file.as_fd().as_raw_fd(), file_offset(offset)?);
    let target = Scatter::new(slices.clone());
    // SAFETY: every iovec is a VolatileSlice of guest memory that stays mapped while `slices` is borrowed and
    // its guard lives; the kernel may write there at any time as far as Rust is concerned.
    let count = retry(|| unsafe { libc::preadv(fd, target.iovecs.as_ptr(), target.count(), offset) })?;
    mark_written(slices, count);
    Ok(count)
}

/// pwritev(2): writes the slices at `offset`, in order. May write less than asked.
pub(crate) fn write_at<'s, 'm: 's>(
    file: &impl AsFd,
    offset: u64,
    slices: impl Iterator<Item = &'s MemorySlice<'m>>,
) -> io::Result<usize> {
    let (fd, offset) = (file.as_fd().as_raw_fd(), file_offset(offset)?);
    let source = Gather::new(slices);
    // SAFETY: every iovec is a VolatileSlice of guest memory that stays mapped while `slices` is borrowed and
    // its guard lives; the kernel only reads it.
    retry(|| unsafe { libc::pwritev(fd, source.iovecs.as_ptr(), source.count(), offset) })
}

/// readv(2) from a stream into the slices, in order. 0 is the end of the stream.
pub(crate) fn receive<'s, 'm: 's>(
    socket: &impl AsFd,
    slices: impl Iterator<Item = &'s MemorySlice<'m>> + Clone,
) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    let target = Scatter::new(slices.clone());
    // SAFETY: as in `read_at`.
    let count = retry(|| unsafe { libc::readv(fd, target.iovecs.as_ptr(), target.count()) })?;
    mark_written(slices, count);
    Ok(count)
}

/// sendmsg(2) of the slices, in order, that neither waits nor raises SIGPIPE. May send less than asked.
pub(crate) fn send<'s, 'm: 's>(
    socket: &impl AsFd,
    slices: impl Iterator<Item = &'s MemorySlice<'m>>,
) -> io::Result<usize> {
    let mut source = Gather::new(slices);
    send_iovecs(socket, &mut source.iovecs)
}

/// As [`send`], from two pieces of our own memory.
pub(crate) fn send_bytes(socket: &impl AsFd, pieces: (&[u8], &[u8])) -> io::Result<usize> {
    let mut iovecs = [pieces.0, pieces.1]
        .map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() });
    send_iovecs(socket, &mut iovecs)
}

fn send_iovecs(socket: &impl AsFd, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: an all-zero msghdr is valid: no address, no pieces, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the iovecs point to memory that the callers borrow for the whole call, and the kernel only
    // reads it.
    retry(|| unsafe { libc::sendmsg(fd, &raw const message, flags) })
}
