//! Where a guest's connections to the host end.
//!
//! A [`VsockBackend`] decides for each port. [`SocketPaths`] maps ports to Unix sockets on the file system,
//! [`InProcess`] to listeners in this process.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Connections that wait to be accepted, at most, per port.
const ACCEPT_BACKLOG: usize = 128;

/// Decides what a guest reaches when it connects to a port of the host.
pub trait VsockBackend: Send {
    /// The host end for a new connection to `port`. Called on the event loop: must not wait.
    ///
    /// # Errors
    /// The connection is refused; the guest sees a reset.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// Refuses everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHost;

impl VsockBackend for NoHost {
    fn connect(&mut self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Port `p` is the Unix socket `PREFIX_p`, on which a program of the host listens.
#[derive(Debug, Clone)]
pub struct SocketPaths {
    prefix: PathBuf,
}

impl SocketPaths {
    /// Maps ports to sockets whose paths start with `prefix`.
    pub fn new(prefix: impl Into<PathBuf>) -> Self {
        SocketPaths { prefix: prefix.into() }
    }

    /// The socket of a port.
    pub fn path(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.prefix);
        path.push(format!("_{port}"));
        path.into()
    }
}

impl VsockBackend for SocketPaths {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(self.path(port))?;
        // Not UnixStream::connect: with a full backlog it would hold up the event loop.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

type Listeners = Arc<Mutex<HashMap<u32, SyncSender<UnixStream>>>>;

fn lock(listeners: &Listeners) -> MutexGuard<'_, HashMap<u32, SyncSender<UnixStream>>> {
    listeners.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ports on which this process itself listens. Clones share the ports: keep one, give one to the device.
#[derive(Clone, Default)]
pub struct InProcess {
    listeners: Listeners,
}

/// The port has a listener already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("vsock port {0} has a listener already: use another port or drop the other listener")]
pub struct PortInUse(pub u32);

impl InProcess {
    /// No ports yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens on a port until the listener is dropped.
    ///
    /// # Errors
    /// [`PortInUse`].
    pub fn listen(&self, port: u32) -> Result<VsockListener, PortInUse> {
        let mut listeners = lock(&self.listeners);
        if listeners.contains_key(&port) {
            return Err(PortInUse(port));
        }
        let (sender, incoming) = sync_channel(ACCEPT_BACKLOG);
        listeners.insert(port, sender);
        Ok(VsockListener { port, incoming, listeners: self.listeners.clone() })
    }

    /// Asks `next` for ports on which nobody listens here.
    pub fn or_else(self, next: impl VsockBackend) -> impl VsockBackend {
        Either { first: self, second: next }
    }
}

impl VsockBackend for InProcess {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let listeners = lock(&self.listeners);
        let listener = listeners.get(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        let (device, host) = UnixStream::pair()?;
        match listener.try_send(host) {
            Ok(()) => Ok(device),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                Err(io::ErrorKind::ConnectionRefused.into())
            }
        }
    }
}

struct Either<B> {
    first: InProcess,
    second: B,
}

impl<B: VsockBackend> VsockBackend for Either<B> {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        if lock(&self.first.listeners).contains_key(&port) {
            return self.first.connect(port);
        }
        self.second.connect(port)
    }
}

/// Accepts the connections to one port of [`InProcess`]. The streams that it gives block.
pub struct VsockListener {
    port: u32,
    incoming: Receiver<UnixStream>,
    listeners: Listeners,
}

impl VsockListener {
    /// Waits for the next connection.
    ///
    /// # Errors
    /// `TimedOut` when none came in time, `NotConnected` when none can come any more.
    pub fn accept(&self, timeout: Duration) -> io::Result<UnixStream> {
        self.incoming.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            RecvTimeoutError::Disconnected => io::ErrorKind::NotConnected.into(),
        })
    }

    /// The next connection if there is one already.
    pub fn try_accept(&self) -> Option<UnixStream> {
        self.incoming.try_recv().ok()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        lock(&self.listeners).remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn socket_paths_reach_who_listens_and_refuse_the_rest_without_waiting() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let mut backend = SocketPaths::new(dir.as_path().join("guest.vsock"));
        assert!(backend.connect(7).is_err());
        let listener = UnixListener::bind(dir.as_path().join("guest.vsock_7")).unwrap();
        let stream = backend.connect(7).unwrap();
        let (other, _) = listener.accept().unwrap();
        assert_eq!(stream.peer_addr().unwrap().as_pathname(), Some(backend.path(7).as_path()));
        drop(other);
        // Nobody accepts: at some point the backlog is full, and that must not block.
        let refused = (0..10_000).find_map(|_| match backend.connect(7) {
            Ok(stream) => {
                std::mem::forget(stream);
                None
            }
            Err(error) => Some(error),
        });
        assert!(refused.is_some());
        assert!(SocketPaths::new("x".repeat(200)).connect(1).is_err());
    }

    #[test]
    fn a_port_has_one_listener_until_it_is_dropped() {
        let ports = InProcess::new();
        let listener = ports.listen(5).unwrap();
        assert_eq!(ports.listen(5).err(), Some(PortInUse(5)));
        let mut backend = ports.clone().or_else(NoHost);
        assert!(backend.connect(6).is_err());
        assert!(backend.connect(5).is_ok());
        assert!(listener.try_accept().is_some() && listener.try_accept().is_none());
        for _ in 0..ACCEPT_BACKLOG {
            assert!(backend.connect(5).is_ok());
        }
        assert!(backend.connect(5).is_err());
        drop(listener);
        assert!(backend.connect(5).is_err());
        assert!(ports.listen(5).is_ok());
    }
}
