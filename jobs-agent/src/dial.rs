//! Dialling the host: at the machine's start, and again whenever the connection is gone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use harrier_agent_protocol::AGENT_PORT;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt::SocketError,
};

use crate::sys;

/// The host's vsock address (virtio 1.2, 5.10.4).
const HOST_CID: u32 = 2;

/// How long the host is dialled at first before the agent gives up.
pub(crate) const DIAL_LIMIT: Duration = Duration::from_secs(20);

/// The pauses between two attempts double from the first to the second of these.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Where the host is.
#[derive(Clone, Debug)]
pub(crate) enum Dialer {
    /// Nowhere: the connection was given, and there is no other.
    Given,
    /// A Unix socket.
    Unix(PathBuf),
    /// Port [`AGENT_PORT`] of the machine's host.
    Vsock,
}

/// What came of an attempt.
enum Attempt {
    Connected(File),
    /// It takes time; the socket can be written to once it is decided.
    Pending(OwnedFd),
}

impl Dialer {
    /// Begins an attempt without waiting for the other side.
    fn attempt(&self) -> io::Result<Attempt> {
        match self {
            Self::Given => Err(io::ErrorKind::Unsupported.into()),
            Self::Unix(path) => {
                UnixStream::connect(path).map(|stream| Attempt::Connected(OwnedFd::from(stream).into()))
            }
            Self::Vsock => {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT)) {
                    Ok(()) => Ok(Attempt::Connected(socket.into())),
                    Err(Errno::EINPROGRESS) => Ok(Attempt::Pending(socket)),
                    Err(errno) => Err(errno.into()),
                }
            }
        }
    }

    /// Whether a lost connection can be made again.
    pub(crate) fn can_redial(&self) -> bool {
        !matches!(self, Self::Given)
    }
}

/// Dials the host from inside a machine until it answers. The transport may still be on its way when this is first tried.
pub(crate) fn first() -> Result<File, String> {
    let deadline_ns = sys::monotonic_ns().saturating_add(DIAL_LIMIT.as_nanos() as u64);
    let mut pause = Duration::from_millis(1);
    loop {
        let attempt =
            socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).and_then(|socket| {
                connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT)).map(|()| socket)
            });
        let errno = match attempt {
            Ok(socket) => return Ok(File::from(socket)),
            Err(errno) => errno,
        };
        if sys::monotonic_ns() >= deadline_ns {
            let remedy = match errno {
                Errno::EAFNOSUPPORT => "the kernel has no vsock: build it with VSOCKETS, or list its modules",
                Errno::ENODEV | Errno::EADDRNOTAVAIL => {
                    "there is no vsock device, or the kernel lacks VIRTIO_VSOCKETS or VIRTIO_MMIO, or their modules"
                }
                _ => "nobody answers on the host",
            };
            let limit = DIAL_LIMIT.as_secs();
            return Err(format!("no connection to the host within {limit} s: {} ({remedy})", errno.desc()));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Attempts to reach the host again, one after the other, from within a poll loop.
pub(crate) struct Redial {
    dialer: Dialer,
    /// When the connection was lost.
    since_ns: u64,
    next_ns: u64,
    pause: Duration,
    pending: Option<OwnedFd>,
}

impl Redial {
    /// The first attempt is due at once.
    pub(crate) fn new(dialer: Dialer) -> Self {
        let now_ns = sys::monotonic_ns();
        Self { dialer, since_ns: now_ns, next_ns: now_ns, pause: FIRST_PAUSE, pending: None }
    }

    /// The connection that came of it was of no use: the next attempt is due after a pause.
    pub(crate) fn go_on(mut self) -> Self {
        self.put_off();
        self
    }

    /// The attempt that is under way: to be polled for writing.
    pub(crate) fn pending(&self) -> Option<BorrowedFd<'_>> {
        self.pending.as_ref().map(AsFd::as_fd)
    }

    /// When to call [`Redial::advance`] again, if nothing happens to the pending attempt.
    pub(crate) fn wake_ns(&self, linger: Option<Duration>) -> Option<u64> {
        let next_ns = self.pending.is_none().then_some(self.next_ns);
        next_ns.into_iter().chain(self.deadline_ns(linger)).min()
    }

    /// Whether the host has been gone for longer than `linger`; `None` is for ever.
    pub(crate) fn is_over(&self, linger: Option<Duration>) -> bool {
        self.deadline_ns(linger).is_some_and(|deadline_ns| sys::monotonic_ns() >= deadline_ns)
    }

    fn deadline_ns(&self, linger: Option<Duration>) -> Option<u64> {
        linger.map(|linger| self.since_ns.saturating_add(linger.as_nanos() as u64))
    }

    /// Goes on as far as possible without waiting; `is_ready` says that the pending attempt is decided.
    pub(crate) fn advance(&mut self, is_ready: bool) -> Option<File> {
        if let Some(socket) = self.pending.take_if(|_| is_ready) {
            match getsockopt(&socket, SocketError) {
                Ok(0) => return Some(socket.into()),
                _ => self.put_off(),
            }
        }
        if self.pending.is_none() && sys::monotonic_ns() >= self.next_ns {
            match self.dialer.attempt() {
                Ok(Attempt::Connected(connection)) => return Some(connection),
                Ok(Attempt::Pending(socket)) => self.pending = Some(socket),
                Err(_) => self.put_off(),
            }
        }
        None
    }

    fn put_off(&mut self) {
        self.next_ns = sys::monotonic_ns().saturating_add(self.pause.as_nanos() as u64);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}
