//! System calls that have no safe wrapper elsewhere. Nothing but the calls and their results.
#![expect(unsafe_code, reason = "system calls without a safe wrapper in nix")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use harrier_agent_protocol::{Status, Usage, WindowSize};
use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| {
            (time.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec() as u64)
        })
        .unwrap_or(0)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Where Harrier's own guest kernel lets programs ask the monitor; linux/harrier.h describes the calls.
pub(crate) const DEVICE: &str = "/dev/harrier";

/// `struct harrier_ioc_features`.
#[repr(C)]
#[derive(Default)]
struct Features {
    features: u64,
    version: u32,
    reserved: u32,
}

/// `struct harrier_ioc_mark`.
#[repr(C)]
struct Mark {
    phase: u32,
    reserved: u32,
    value: u64,
    name: [u8; 32],
}

/// `struct harrier_ioc_exit`.
#[repr(C)]
struct End {
    code: u32,
    reason: u32,
    message: [u8; 32],
}

/// `struct harrier_ioc_identity`: who a machine is.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Identity {
    pub(crate) generation: u64,
    /// `HARRIER_ROLE_*`.
    pub(crate) role: u32,
    pub(crate) clone_index: u32,
}

/// The kernel writes (`_IOW`, 1) or fills in (`_IOR`, 2) a structure of `T`'s size.
const fn request<T>(direction: libc::Ioctl, number: libc::Ioctl) -> libc::Ioctl {
    direction << 30 | (size_of::<T>() as libc::Ioctl) << 16 | 0xbe << 8 | number
}

/// The monitor's device, open.
pub(crate) struct Device(std::fs::File);

impl Device {
    pub(crate) fn open() -> io::Result<Device> {
        std::fs::File::open(DEVICE).map(Device)
    }

    /// What the monitor offers: `HARRIER_FEATURE_*` bits.
    pub(crate) fn features(&self) -> io::Result<u64> {
        let mut features = Features::default();
        // SAFETY: the call writes one Features.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request::<Features>(2, 1), &raw mut features) })?;
        Ok(features.features)
    }

    /// Notes a moment.
    pub(crate) fn mark(&self, phase: u32, value: u64, name: [u8; 32]) -> io::Result<()> {
        let mark = Mark { phase, reserved: 0, value, name };
        // SAFETY: the call reads one Mark.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request::<Mark>(1, 3), &raw const mark) }).map(drop)
    }

    /// Ends the machine; comes back only if that fails.
    pub(crate) fn exit(&self, code: u32, message: [u8; 32]) -> io::Result<()> {
        let end = End { code, reason: 0, message };
        // SAFETY: the call reads one End.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request::<End>(1, 7), &raw const end) }).map(drop)
    }

    /// Takes a snapshot of the machine, and says who returns.
    pub(crate) fn checkpoint(&self) -> io::Result<Identity> {
        let mut identity = Identity::default();
        // SAFETY: the call writes one Identity.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request::<Identity>(2, 8), &raw mut identity) })?;
        Ok(identity)
    }

    /// Who this machine is.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        let mut identity = Identity::default();
        // SAFETY: the call writes one Identity.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request::<Identity>(2, 10), &raw mut identity) })?;
        Ok(identity)
    }

    /// Waits until the machine is another one than when the device was opened.
    pub(crate) fn wait_for_restore(&self) -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Tells the monitor that a phase begins, one of `HARRIER_PHASE_*` of linux/harrier_hypercall.h. For the monitor's
/// figures only: another kernel or monitor has no such device, and nothing is lost.
pub(crate) fn mark(phase: u32) {
    if let Ok(device) = Device::open() {
        let _ = device.mark(phase, 0, [0; 32]);
    }
}

/// A process that has ended.
pub(crate) struct Reaped {
    pub(crate) pid: libc::pid_t,
    pub(crate) status: Status,
    pub(crate) usage: Usage,
}

/// Reaps one ended child, if there is one. `Err` of ECHILD: there are no children at all.
pub(crate) fn reap() -> io::Result<Option<Reaped>> {
    loop {
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: both pointers are valid for writes of their type for the duration of the call.
        let pid = check(unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) })?;
        if pid == 0 {
            return Ok(None);
        }
        // SAFETY: rusage is plain integers, so that all-zero is a valid value even where wait4 wrote nothing.
        let usage = unsafe { usage.assume_init() };
        let micros = |time: libc::timeval| {
            (time.tv_sec as u64).saturating_mul(1_000_000).saturating_add(time.tv_usec as u64)
        };
        let status = if libc::WIFEXITED(status) {
            Status::Code(libc::WEXITSTATUS(status) as u8)
        } else if libc::WIFSIGNALED(status) {
            Status::Signal(libc::WTERMSIG(status) as u8)
        } else {
            continue;
        };
        let usage = Usage {
            user_us: micros(usage.ru_utime),
            system_us: micros(usage.ru_stime),
            max_rss_kib: usage.ru_maxrss as u64,
        };
        return Ok(Some(Reaped { pid, status, usage }));
    }
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    Parent(libc::pid_t),
    Child,
}

/// Forks. The agent has one thread, so that the child may do whatever the parent may.
pub(crate) fn fork() -> io::Result<Fork> {
    // SAFETY: the process is single-threaded (main.rs); no lock can be held by a thread that the child lacks.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Ends the process at once, without anything that the parent set up to happen at its end.
pub(crate) fn exit_now(code: libc::c_int) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// How a process of a namespace has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(u8),
    Signal(u8),
}

/// Waits for one child.
pub(crate) fn wait_for(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: the pointer is valid for writes of an int.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Waits for all children until this one has ended.
pub(crate) fn reap_until(pid: libc::pid_t) -> Ended {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is valid for writes of an int.
        let reaped = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if reaped == pid && libc::WIFEXITED(status) {
            return Ended::Code(libc::WEXITSTATUS(status) as u8);
        }
        if reaped == pid && libc::WIFSIGNALED(status) {
            return Ended::Signal(libc::WTERMSIG(status) as u8);
        }
        if reaped < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD) {
            return Ended::Signal(libc::SIGKILL as u8);
        }
    }
}

/// Tells the other end of a pipe.
pub(crate) fn write_ended(pipe: &OwnedFd, ended: Ended) {
    let bytes = match ended {
        Ended::Code(code) => [1, code],
        Ended::Signal(number) => [2, number],
    };
    // Who does not hear it is gone.
    let _ = nix::unistd::write(pipe, &bytes);
}

/// What the other end of a pipe tells; nothing if it went without a word.
pub(crate) fn read_ended(pipe: &OwnedFd) -> Option<Ended> {
    let mut bytes = [0; 2];
    loop {
        return match nix::unistd::read(pipe, &mut bytes) {
            Ok(2) => match bytes {
                [1, code] => Some(Ended::Code(code)),
                [2, number] => Some(Ended::Signal(number)),
                _ => None,
            },
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) | Err(_) => None,
        };
    }
}

/// Ignores every signal that can be, but those about children.
pub(crate) fn ignore_signals() {
    for number in (1..=64).filter(|number| *number != libc::SIGCHLD) {
        // SAFETY: SIG_IGN is no handler of ours; numbers that cannot be set are refused with an error.
        unsafe { libc::signal(number, libc::SIG_IGN) };
    }
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Ends the process by a signal, without a core.
pub(crate) fn end_by_signal(number: u8) -> ! {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit reads one rlimit; signal, raise and the mask take integers and a set that lives long enough.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        libc::signal(number.into(), libc::SIG_DFL);
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_UNBLOCK, all.as_ptr(), std::ptr::null_mut());
        libc::raise(number.into());
    }
    exit_now(libc::c_int::from(number).saturating_add(128))
}

/// Closes every file but one. For processes that only wait from here on: nothing is used that was open before.
pub(crate) fn close_all_but(fd: RawFd) {
    let fd = fd.unsigned_abs();
    for (first, last) in [(0, fd.wrapping_sub(1)), (fd.saturating_add(1), u32::MAX)] {
        if first <= last && !(fd == 0 && first == 0) {
            // SAFETY: close_range takes integers; files that others own in this process are not used any more.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Puts every signal back to its default action; none stays ignored.
pub(crate) fn default_signals() {
    for number in 1..=64 {
        // SAFETY: SIG_DFL is no handler of ours; numbers that cannot be set (SIGKILL, SIGSTOP, those of the C library)
        // are refused with an error, which does not matter.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

/// Sends a signal to a process group.
pub(crate) fn kill_group(pgid: libc::pid_t, number: u8) -> io::Result<()> {
    // SAFETY: kill takes no pointers.
    check(unsafe { libc::kill(pgid.saturating_neg(), number.into()) }).map(drop)
}

/// Sends a signal to every process but this one (and the kernel's). For process 1 only.
pub(crate) fn kill_all(number: libc::c_int) {
    // SAFETY: kill takes no pointers. That nobody is left to signal is no error here.
    unsafe { libc::kill(-1, number) };
}

/// Makes a terminal the controlling one of the calling session leader.
pub(crate) fn set_controlling_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Sets the window size of a terminal; its foreground process group gets SIGWINCH.
pub(crate) fn set_window_size(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// How many bytes can be read at once.
pub(crate) fn readable_bytes(fd: impl AsFd) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(u64::try_from(count).unwrap_or(0))
}

/// Makes orphaned descendants children of this process, as they are of process 1.
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes an integer.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1_u64) }).map(drop)
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    // A socket of any family serves interface requests; this one needs no IP in the kernel.
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    // SAFETY: ifreq is integers, bytes and pointers that nobody follows here; all-zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq with a NUL-terminated name, which the zeroed rest gives.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }).map(drop)
}

/// Takes over a file descriptor that the parent process left open.
pub(crate) fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_SETFD takes an integer; it fails where fd is not open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: fd is open, as fcntl has shown, and nothing in this process has taken it yet: this is called once,
    // before anything else is opened.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Random bytes, as good as the kernel has them; never waits.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    /// `GRND_INSECURE` of linux/random.h: do not wait for the kernel to be seeded.
    const INSECURE: libc::c_uint = 4;
    let mut bytes = [0; N];
    // SAFETY: the pointer is valid for writes of N bytes.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, INSECURE) };
    if count != N as isize {
        // A kernel before 5.6: different from run to run, which is what callers need.
        let noise = u128::from(monotonic_ns()) << 64 | u128::from(std::process::id());
        bytes.iter_mut().zip(noise.to_le_bytes()).for_each(|(slot, byte)| *slot = byte);
    }
    bytes
}

/// Sets CLOCK_REALTIME, in nanoseconds since 1970.
pub(crate) fn set_wall_clock(unix_ns: u64) -> io::Result<()> {
    let time = nix::sys::time::TimeSpec::from(std::time::Duration::from_nanos(unix_ns));
    nix::time::clock_settime(ClockId::CLOCK_REALTIME, time).map_err(Into::into)
}

/// Mixes fresh randomness into the kernel's and has it used from now on (random(4)).
pub(crate) fn reseed(entropy: &[u8; 32]) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        size_bytes: libc::c_int,
        bytes: [u8; 32],
    }
    /// `_IOW('R', 3, int[2])` and `_IO('R', 7)`.
    const RNDADDENTROPY: u64 = 0x4008_5203;
    const RNDRESEEDCRNG: u64 = 0x5207;
    let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    let info = PoolInfo { entropy_bits: 256, size_bytes: 32, bytes: *entropy };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and as many bytes behind it as its second field says.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const info) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) }).map(drop)
}
