//! A Unix socket through which other processes connect to ports of the guest.
//!
//! A client connects, writes `CONNECT <port>\n` and reads `OK <port>\n` when the guest has accepted; from then on
//! the stream is the connection. It ends without a byte when the guest refuses. This is the convention of other
//! monitors, so their clients work.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::handle::VsockHandle;

/// Clients that have connected and not yet said where to.
const MAX_CLIENTS: usize = 64;
/// Bytes of the longest request, `CONNECT 4294967295\n`.
const MAX_LINE: usize = 19;

const LISTENER: u32 = 0;
const CLIENT: u32 = 1;

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What came of reading from a client.
enum Line {
    Incomplete,
    Port(u32),
    Bad,
}

impl Client {
    /// Reads a byte at a time: what follows the line belongs to the guest.
    fn read_line(&mut self) -> Line {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Line::Bad,
                Ok(_) if byte == *b"\n" => return parse(&self.line).map_or(Line::Bad, Line::Port),
                Ok(_) if self.line.len() >= MAX_LINE => return Line::Bad,
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Line::Incomplete,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Line::Bad,
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_end_matches('\r').parse().ok()
}

/// The listening side, for the event loop.
pub struct ConnectSocket {
    listener: UnixListener,
    handle: VsockHandle,
    clients: HashMap<RawFd, Client>,
}

impl ConnectSocket {
    /// Listens at `path`, which must not exist; whoever made it removes it.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn bind(path: &Path, handle: VsockHandle) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(ConnectSocket { listener, handle, clients: HashMap::new() })
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(error) => {
                // Out of descriptors, most likely: the client waits in the backlog, and we must not spin.
                log::warn!("vsock: no more connections are accepted from the host: {error}");
                drop(ops.remove(Events::empty(&self.listener)));
                return;
            }
        };
        if self.clients.len() >= MAX_CLIENTS {
            log::warn!("vsock: more than {MAX_CLIENTS} clients without a request; one was refused");
            return;
        }
        let watched = Events::with_data(&stream, CLIENT, EventSet::IN | EventSet::READ_HANG_UP);
        if stream.set_nonblocking(true).is_ok() && ops.add(watched).is_ok() {
            self.clients.insert(stream.as_raw_fd(), Client { stream, line: Vec::new() });
        }
    }

    fn read_client(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get_mut(&fd) else { return };
        let port = match client.read_line() {
            Line::Incomplete => return,
            Line::Port(port) => Some(port),
            Line::Bad => None,
        };
        if let Err(error) = ops.remove(Events::empty_raw(fd)) {
            log::warn!("vsock: a client cannot be unwatched: {error:?}");
        }
        let Some(client) = self.clients.remove(&fd) else { return };
        if let Some(port) = port
            && let Err(error) = self.handle.forward(client.stream, port)
        {
            log::warn!("vsock: a connection to port {port} of the guest was refused: {error}");
        }
    }
}

impl MutEventSubscriber for ConnectSocket {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::with_data(&self.listener, LISTENER, EventSet::IN)) {
            log::error!("vsock: connections from the host will not work: {error:?}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            LISTENER => self.accept(ops),
            _ => self.read_client(events.fd(), ops),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use event_manager::{EventManager, SubscriberOps};
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn a_client_names_a_port_and_the_rest_of_its_bytes_stay_in_the_stream() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("vsock");
        let (handle, requests) =
            VsockHandle::new(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()));
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(ConnectSocket::bind(&path, handle).unwrap()));
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"CONN").unwrap();
        manager.run_with_timeout(0).unwrap();
        manager.run_with_timeout(0).unwrap();
        assert!(requests.try_recv().is_err());
        client.write_all(b"ECT 1024\nhello").unwrap();
        manager.run_with_timeout(0).unwrap();
        let mut request = requests.try_recv().unwrap();
        assert_eq!((request.guest_port, request.announce), (1024, true));
        let mut rest = [0; 5];
        request.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn nonsense_is_hung_up_on() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("vsock");
        let (handle, requests) =
            VsockHandle::new(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()));
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(ConnectSocket::bind(&path, handle).unwrap()));
        for nonsense in
            ["\n", "CONNECT\n", "CONNECT -1\n", "CONNECT 4294967296\n", "GET / HTTP/1.1 and more and more"]
        {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(nonsense.as_bytes()).unwrap();
            for _ in 0..4 {
                manager.run_with_timeout(0).unwrap();
            }
            let mut answer = Vec::new();
            // Unread bytes make the hang-up a reset.
            assert!(matches!(client.read_to_end(&mut answer), Ok(0) | Err(_)), "{nonsense}");
        }
        assert!(requests.try_recv().is_err());
    }
}
