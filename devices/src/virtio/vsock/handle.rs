//! Connections that the host begins.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use vmm_sys_util::eventfd::EventFd;

/// Requests that wait for the device, at most.
const BACKLOG: usize = 128;

/// A connection that the host asks for.
pub(crate) struct HostRequest {
    pub(crate) stream: UnixStream,
    pub(crate) guest_port: u32,
    /// Tell the host end with a line when the guest has accepted.
    pub(crate) announce: bool,
}

/// Begins connections to ports of the guest, from any thread.
#[derive(Clone)]
pub struct VsockHandle {
    requests: SyncSender<HostRequest>,
    wake: Arc<EventFd>,
}

impl VsockHandle {
    pub(crate) fn new(wake: Arc<EventFd>) -> (Self, Receiver<HostRequest>) {
        let (requests, incoming) = sync_channel(BACKLOG);
        (VsockHandle { requests, wake }, incoming)
    }

    /// Connects to a port on which a program in the guest listens. The stream is there at once; if the guest
    /// refuses, or runs no driver yet, it ends without a byte.
    ///
    /// # Errors
    /// `NotConnected` when the device is gone, `WouldBlock` when it is flooded with requests.
    pub fn connect(&self, guest_port: u32) -> io::Result<UnixStream> {
        let (device, host) = UnixStream::pair()?;
        self.send(HostRequest { stream: device, guest_port, announce: false })?;
        Ok(host)
    }

    /// Connects an existing stream to a port of the guest. Once the guest has accepted, the stream reads
    /// `OK <port>\n`, with the port that the guest sees as its peer's, before anything else.
    ///
    /// # Errors
    /// As for [`VsockHandle::connect`].
    pub fn forward(&self, stream: UnixStream, guest_port: u32) -> io::Result<()> {
        self.send(HostRequest { stream, guest_port, announce: true })
    }

    fn send(&self, request: HostRequest) -> io::Result<()> {
        self.requests.try_send(request).map_err(|error| match error {
            TrySendError::Full(_) => io::ErrorKind::WouldBlock,
            TrySendError::Disconnected(_) => io::ErrorKind::NotConnected,
        })?;
        match self.wake.write(1) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}
