//! The socket device (virtio 1.2, section 5.10): stream connections between guest and host.
//!
//! Each connection has a Unix stream socket as its host end. A [`VsockBackend`] supplies it when the guest
//! connects; a [`VsockHandle`] when the host does. [`ConnectSocket`] offers the latter to other processes.
//!
//! Payload moves between the sockets and guest memory without a copy of ours. Back-pressure holds both ways: the
//! guest's credit says how much of the host end is read, and what the host end does not take waits in a bounded
//! buffer that the guest's credit covers. All host ends are in one epoll set, edge-triggered, which is the
//! device's host descriptor; so the device needs no thread and tests need no event loop.

mod backend;
mod connect_socket;
mod connection;
mod handle;
mod packet;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use harrier_engine::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::Buffers;
use super::queue::{DeviceQueue, QueueError};
use super::{Progress, Running, VirtioDevice, volatile_io};
use crate::guest_error::GuestErrors;
use crate::state::BadState;

pub use backend::{InProcess, NoHost, PortInUse, SocketPaths, VsockBackend, VsockListener};
pub use connect_socket::ConnectSocket;
pub use handle::VsockHandle;

use connection::{Accepted, Connection, Key, Phase, next_control};
use handle::HostRequest;
use packet::{HEADER_LEN, HOST_CID, Header, KIND_STREAM, SHUTDOWN_BOTH, op};

const DEVICE_TYPE: u32 = 19;
const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;
const EVENT_QUEUE: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: connections are gone, the context id may be another one (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Connections at a time, lingering ones included; each is one open file of the process.
const MAX_CONNECTIONS: usize = 512;
/// Resets for packets that belong to no connection, waiting for a buffer. When there are as many, the guest's
/// packets wait too.
const MAX_REPLIES: usize = 64;
/// Packets from the guest that are handled before the other direction has its turn.
const TRANSMIT_BATCH: usize = 64;
/// Receive buffers that are filled before others have their turn.
const RECEIVE_BATCH: usize = 256;
/// Receive buffers that are filled by one read at most.
const MAX_SCATTER: usize = 16;
/// Host ports of connections that the host begins start here, far from those that services use.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Epoll data of the wake-up event; connections count up from 0.
const WAKE: u64 = u64::MAX;

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    backend: Box<dyn VsockBackend>,
    epoll: Epoll,
    wake: Arc<EventFd>,
    handle: VsockHandle,
    requests: Receiver<HostRequest>,
    connections: HashMap<u64, Connection>,
    /// Those that are not lingering.
    by_key: HashMap<Key, u64>,
    next_id: u64,
    next_host_port: u32,
    /// Connections that have something for the guest, in the order of their turns.
    turns: VecDeque<u64>,
    replies: VecDeque<Header>,
    /// The transmit queue may have packets.
    transmit_pending: bool,
    /// The guest has given no receive buffer since the last one was used.
    receive_starved: bool,
    /// The guest has not heard yet that its connections are gone.
    reset_due: bool,
    errors: GuestErrors,
}

/// What came of trying to send to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// Packets went out, and so many receive buffers are used up.
    Packets(usize),
    /// There is no receive buffer.
    NoBuffer,
}

/// A receive buffer of the guest.
struct Slot<'m> {
    head: u16,
    header: Buffers<'m>,
    data: Buffers<'m>,
}

/// Takes the next receive buffer that has room for a header. Useless ones go back to the guest.
fn next_slot<'m>(
    queue: &mut DeviceQueue,
    mem: &'m GuestMemory,
    errors: &mut GuestErrors,
) -> Result<Option<Slot<'m>>, QueueError> {
    while let Some(chain) = queue.pop(mem)? {
        let head = chain.head();
        let mut data = chain.writable;
        if data.len() >= HEADER_LEN {
            let header = data.split_front(HEADER_LEN);
            return Ok(Some(Slot { head, header, data }));
        }
        errors.report("vsock", format_args!("a receive buffer of {} bytes", data.len()));
        queue.complete(mem, head, 0)?;
    }
    Ok(None)
}

impl Vsock {
    /// A device for the guest with this context id (3 or more); `backend` answers the guest's connections.
    ///
    /// # Errors
    /// The host has no descriptors to give.
    pub fn new(guest_cid: u32, backend: Box<dyn VsockBackend>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let (handle, requests) = VsockHandle::new(wake.clone());
        Ok(Vsock {
            guest_cid: guest_cid.into(),
            backend,
            epoll,
            wake,
            handle,
            requests,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            next_id: 0,
            next_host_port: FIRST_HOST_PORT,
            turns: VecDeque::new(),
            replies: VecDeque::new(),
            transmit_pending: false,
            receive_starved: false,
            reset_due: false,
            errors: GuestErrors::default(),
        })
    }

    /// Begins connections to the guest.
    pub fn handle(&self) -> VsockHandle {
        self.handle.clone()
    }

    fn report(&mut self, message: std::fmt::Arguments<'_>) {
        self.errors.report("vsock", message);
    }

    /// Adds a connection, or answers false if there are too many or the host has no room.
    fn add(&mut self, connection: Connection) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.report(format_args!("more than {MAX_CONNECTIONS} connections; one is refused"));
            return false;
        }
        let id = self.next_id;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = connection.stream.set_nonblocking(true).and_then(|()| {
            let fd = connection.stream.as_raw_fd();
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
        });
        if let Err(error) = watched {
            self.report(format_args!("a connection is refused: host: {error}"));
            return false;
        }
        self.next_id += 1;
        self.by_key.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.touch(id);
        true
    }

    /// Forgets a connection and closes its host end.
    fn remove(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            if self.by_key.get(&connection.key) == Some(&id) {
                self.by_key.remove(&connection.key);
            }
            // Closing would do; this tells the kernel even if somebody holds a duplicate.
            let fd = connection.stream.as_raw_fd();
            drop(self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()));
        }
    }

    /// The connection is over for the guest. What the guest has sent still reaches the host end.
    fn finish(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if self.by_key.get(&connection.key) == Some(&id) {
            self.by_key.remove(&connection.key);
        }
        if connection.is_flushed() {
            self.remove(id);
        } else {
            connection.phase = Phase::Lingering;
            connection.due = Default::default();
            connection.guest_shutdown(SHUTDOWN_BOTH);
        }
    }

    /// After anything that happened to a connection: gives it a turn if it has something for the guest.
    fn touch(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.phase == Phase::Lingering {
            if connection.is_flushed() {
                self.remove(id);
            }
            return;
        }
        connection.settle();
        if connection.has_work() && !connection.listed {
            connection.listed = true;
            self.turns.push_back(id);
        }
    }

    /// Resets a connection that the guest knows.
    fn reset_connection(&mut self, id: u64, packet: &Header) {
        self.replies.push_back(packet.reset_reply());
        self.finish(id);
    }

    fn free_host_port(&mut self, guest_port: u32) -> Option<u32> {
        // More tries than there can be connections.
        for _ in 0..=MAX_CONNECTIONS {
            let host_port = self.next_host_port;
            self.next_host_port = host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_key.contains_key(&Key { guest_port, host_port }) {
                return Some(host_port);
            }
        }
        None
    }

    /// Takes up what a [`VsockHandle`] asked for; without a driver it is refused by closing.
    fn take_requests(&mut self, running: bool) {
        while let Ok(request) = self.requests.try_recv() {
            if !running {
                continue;
            }
            let Some(host_port) = self.free_host_port(request.guest_port) else { continue };
            let key = Key { guest_port: request.guest_port, host_port };
            let mut connection = Connection::new(key, request.stream, Phase::Requested);
            connection.announce = request.announce;
            connection.due.request = true;
            self.add(connection);
        }
    }

    /// Learns what happened to the host ends.
    fn take_events(&mut self, running: bool) {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => {
                log::warn!("vsock: cannot learn of the host ends: {error}");
                return;
            }
        };
        for event in events.iter().take(count) {
            let id = event.data();
            if id == WAKE {
                // Only the signal matters, not its count.
                drop(self.wake.read());
                self.take_requests(running);
                continue;
            }
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let happened = event.event_set();
            let gone = happened.intersects(EventSet::HANG_UP | EventSet::ERROR);
            connection.host_gone |= gone;
            connection.readable |= gone || happened.intersects(EventSet::IN | EventSet::READ_HANG_UP);
            if happened.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) {
                connection.flush();
            }
            self.touch(id);
        }
    }

    /// Makes the host descriptor readable, to be called again.
    fn wake(&self) {
        if let Err(error) = self.wake.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::warn!("vsock: cannot wake the event loop: {error}");
        }
    }

    fn work(&mut self, running: Running<'_>) -> Result<(), QueueError> {
        let Running { mem, queues } = running;
        let [receive, transmit, events, ..] = queues else { return Ok(()) };
        if self.reset_due {
            self.announce_reset(mem, events)?;
        }
        if self.transmit_pending {
            self.transmit_pending = self.pump_transmit(mem, transmit)?;
        }
        if !self.receive_starved {
            self.pump_receive(mem, receive)?;
        }
        let transmit_waits = self.transmit_pending && self.replies.len() < MAX_REPLIES;
        let something_due = !self.turns.is_empty() || !self.replies.is_empty();
        let receive_waits = something_due && !self.receive_starved;
        if transmit_waits || receive_waits {
            self.wake();
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone, once it has given a buffer for the event.
    fn announce_reset(&mut self, mem: &GuestMemory, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let Some(mut chain) = queue.pop(mem)? else { return Ok(()) };
        let written = chain.writable.write(&EVENT_TRANSPORT_RESET.to_le_bytes());
        queue.complete(mem, chain.head(), written)?;
        self.reset_due = false;
        Ok(())
    }

    /// Handles packets of the guest; answers whether there may be more.
    fn pump_transmit(&mut self, mem: &GuestMemory, queue: &mut DeviceQueue) -> Result<bool, QueueError> {
        for _ in 0..TRANSMIT_BATCH {
            if self.replies.len() >= MAX_REPLIES {
                return Ok(true);
            }
            let Some(chain) = queue.pop(mem)? else { return Ok(false) };
            let head = chain.head();
            let mut payload = chain.readable;
            match payload.read_array::<HEADER_LEN>() {
                Some(bytes) => self.handle_packet(&Header::decode(&bytes), payload),
                None => self.report(format_args!("a packet shorter than its header")),
            }
            queue.complete(mem, head, 0)?;
        }
        Ok(true)
    }

    fn handle_packet(&mut self, packet: &Header, mut payload: Buffers<'_>) {
        if packet.src_cid != self.guest_cid {
            return self.report(format_args!("a packet from context id {}, not its own", packet.src_cid));
        }
        let key = Key { guest_port: packet.src_port, host_port: packet.dst_port };
        let id = self.by_key.get(&key).copied();
        if packet.dst_cid != HOST_CID || packet.kind != KIND_STREAM {
            return self.answer_reset(packet);
        }
        let Some(id) = id else {
            return match packet.op {
                op::REQUEST => self.open(key, packet),
                _ => self.answer_reset(packet),
            };
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.learn_credit(packet);
        match (packet.op, connection.phase) {
            (op::RST, _) => return self.finish(id),
            (op::RESPONSE, Phase::Requested) => {
                connection.phase = Phase::Established;
                if connection.announce {
                    connection.announce_accepted();
                }
            }
            (op::SHUTDOWN, Phase::Established) => {
                if connection.guest_shutdown(packet.flags) {
                    return self.reset_connection(id, packet);
                }
            }
            (op::RW, Phase::Established) => {
                let len = packet.len as usize;
                if payload.len() < len || connection.guest_has_ended() {
                    self.report(format_args!("a packet that lacks its data or comes after the end"));
                    return self.reset_connection(id, packet);
                }
                if connection.accept(payload.split_front(len)) == Accepted::CreditExceeded {
                    self.report(format_args!("{len} bytes beyond the credit of port {}", key.host_port));
                    return self.reset_connection(id, packet);
                }
            }
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => connection.due.credit_update = true,
            (operation, phase) => {
                self.report(format_args!("operation {operation} on a connection in phase {phase:?}"));
                return self.reset_connection(id, packet);
            }
        }
        self.touch(id);
    }

    fn answer_reset(&mut self, packet: &Header) {
        if packet.op != op::RST {
            self.replies.push_back(packet.reset_reply());
        }
    }

    /// The guest asks for a connection.
    fn open(&mut self, key: Key, packet: &Header) {
        match self.backend.connect(key.host_port) {
            Ok(stream) => {
                let mut connection = Connection::new(key, stream, Phase::Established);
                connection.learn_credit(packet);
                connection.due.response = true;
                if !self.add(connection) {
                    self.answer_reset(packet);
                }
            }
            Err(error) => {
                log::debug!("vsock: port {} is refused: {error}", key.host_port);
                self.answer_reset(packet);
            }
        }
    }

    /// Gives the guest what is due, as far as it has buffers and the batch goes.
    fn pump_receive(&mut self, mem: &GuestMemory, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let mut budget = RECEIVE_BATCH;
        while budget > 0 {
            let sent = if let Some(reply) = self.replies.front() {
                match next_slot(queue, mem, &mut self.errors)? {
                    Some(mut slot) => {
                        slot.header.write(&reply.encode());
                        queue.complete(mem, slot.head, HEADER_LEN)?;
                        self.replies.pop_front();
                        Sent::Packets(1)
                    }
                    None => Sent::NoBuffer,
                }
            } else if let Some(&id) = self.turns.front() {
                let sent = self.take_turn(id, mem, queue)?;
                if sent != Sent::NoBuffer {
                    self.turns.pop_front();
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.listed = false;
                    }
                    self.touch(id);
                }
                sent
            } else {
                return Ok(());
            };
            match sent {
                Sent::Packets(count) => budget = budget.saturating_sub(count.max(1)),
                Sent::NoBuffer => {
                    self.receive_starved = true;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// One connection's turn: its next control packet, or as much data as one read gives.
    fn take_turn(&mut self, id: u64, mem: &GuestMemory, queue: &mut DeviceQueue) -> Result<Sent, QueueError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(Sent::Packets(0)) };
        if connection.phase == Phase::Lingering || !connection.has_work() {
            return Ok(Sent::Packets(0));
        }
        let mut due = connection.due;
        let Some((operation, flags)) = next_control(&mut due) else {
            return self.send_data(id, mem, queue);
        };
        let Some(mut slot) = next_slot(queue, mem, &mut self.errors)? else { return Ok(Sent::NoBuffer) };
        connection.due = due;
        let header = Header { flags, ..connection.header(self.guest_cid, operation) };
        slot.header.write(&header.encode());
        queue.complete(mem, slot.head, HEADER_LEN)?;
        // Both ends of the host are closed: nothing is left to wait for. Whatever the guest still says is
        // answered by a reset, as for any connection that is not known.
        if operation == op::RST || operation == op::SHUTDOWN && flags == SHUTDOWN_BOTH {
            self.finish(id);
        }
        Ok(Sent::Packets(1))
    }

    fn send_data(&mut self, id: u64, mem: &GuestMemory, queue: &mut DeviceQueue) -> Result<Sent, QueueError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(Sent::Packets(0)) };
        let credit = connection.credit() as usize;
        let mut slots: Vec<Slot<'_>> = Vec::new();
        let mut target = Buffers::default();
        // As many buffers as the socket has bytes for, so that few are taken in vain.
        let waiting = rustix::io::ioctl_fionread(&connection.stream).unwrap_or(0).clamp(1, credit as u64);
        while target.len() < waiting as usize && slots.len() < MAX_SCATTER {
            let Some(mut slot) = next_slot_for_data(queue, mem, slots.is_empty())? else { break };
            slot.data = slot.data.split_front(credit - target.len());
            target.append(&slot.data);
            slots.push(slot);
        }
        if slots.is_empty() {
            return Ok(Sent::NoBuffer);
        }
        let mut left = match volatile_io::receive(&connection.stream, target.slices()) {
            Ok(0) => {
                connection.host_end_of_stream();
                0
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connection.readable = false;
                0
            }
            Err(error) => {
                log::debug!("vsock: port {}: {error}", connection.key.host_port);
                connection.host_gone = true;
                connection.host_end_of_stream();
                0
            }
        };
        let mut packets = 0;
        for mut slot in slots {
            let len = slot.data.len().min(left);
            if len == 0 {
                // From here on nothing is completed, so the rest goes back in the order of the ring.
                queue.unpop();
                continue;
            }
            left -= len;
            let count = u32::try_from(len).unwrap_or(u32::MAX);
            let header = Header { len: count, ..connection.header(self.guest_cid, op::RW) };
            connection.count_sent(count);
            slot.header.write(&header.encode());
            queue.complete(mem, slot.head, HEADER_LEN + len)?;
            packets += 1;
        }
        Ok(Sent::Packets(packets))
    }
}

/// The next receive buffer with room for data. A useless one goes back to the guest if it is the `first`;
/// later ones stay for the next turn, because completing them would forbid putting others back.
fn next_slot_for_data<'m>(
    queue: &mut DeviceQueue,
    mem: &'m GuestMemory,
    first: bool,
) -> Result<Option<Slot<'m>>, QueueError> {
    while let Some(chain) = queue.pop(mem)? {
        let head = chain.head();
        let mut data = chain.writable;
        if data.len() > HEADER_LEN {
            let header = data.split_front(HEADER_LEN);
            return Ok(Some(Slot { head, header, data }));
        }
        if !first {
            queue.unpop();
            return Ok(None);
        }
        queue.complete(mem, head, 0)?;
    }
    Ok(None)
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn start(&mut self, _features: u64) {}

    fn reset(&mut self) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            self.finish(id);
        }
        self.turns.clear();
        self.replies.clear();
        self.transmit_pending = false;
        self.receive_starved = false;
        self.reset_due = false;
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "guest_cid": self.guest_cid })
    }

    /// Connections do not survive: their host ends are elsewhere. The guest hears of it before anything else; it
    /// reads its context id again, which may be a new one.
    fn restore(&mut self, state: &serde_json::Value, features: Option<u64>) -> Result<(), BadState> {
        let then = state.get("guest_cid").and_then(serde_json::Value::as_u64);
        BadState::unless(then.is_some(), || format!("{state} has no guest_cid"))?;
        self.reset_due = features.is_some();
        Ok(())
    }

    fn process_queue(&mut self, queue: usize, running: Running<'_>) -> Result<Progress, QueueError> {
        match queue {
            RECEIVE_QUEUE => self.receive_starved = false,
            TRANSMIT_QUEUE => self.transmit_pending = true,
            EVENT_QUEUE if self.reset_due => {}
            _ => return Ok(Progress::Done),
        }
        self.work(running)?;
        Ok(Progress::Done)
    }

    fn host_fd(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn process_host(&mut self, running: Option<Running<'_>>) -> Result<(), QueueError> {
        self.take_events(running.is_some());
        if let Some(running) = running {
            self.work(running)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
