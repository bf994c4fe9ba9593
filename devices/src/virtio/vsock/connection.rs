//! One connection: a stream socket of the host, and what both ends know of each other's buffers.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{HOST_CID, Header, KIND_STREAM, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::virtio::chain::Buffers;
use crate::virtio::volatile_io;

/// Bytes from the guest that may wait for the host end to take them.
pub(super) const BUFFER_LEN: u32 = 256 * 1024;
/// The guest hears of freed room when this much of it is news.
const ANNOUNCE_STEP: u32 = BUFFER_LEN / 4;

/// Names a connection: one port on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host has asked; the guest has not answered.
    Requested,
    /// Bytes flow.
    Established,
    /// Over for the guest; what it sent last is still on its way to the host end.
    Lingering,
}

/// Control packets that are due, in the order in which they are sent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Due {
    pub(super) reset: bool,
    pub(super) request: bool,
    pub(super) response: bool,
    /// SHUTDOWN flags that the guest has not heard yet.
    pub(super) shutdown: u32,
    pub(super) credit_update: bool,
    pub(super) credit_request: bool,
}

/// What became of data from the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// Sent on or kept.
    Yes,
    /// The guest sent more than it may.
    CreditExceeded,
}

pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) phase: Phase,
    pub(super) stream: UnixStream,
    pub(super) announce: bool,
    pub(super) due: Due,
    /// It is in the device's list of those that have something for the guest.
    pub(super) listed: bool,

    /// The host end may have bytes (or its end) for us to read.
    pub(super) readable: bool,
    /// Nothing more comes from the host end.
    pub(super) host_ended: bool,
    /// Both directions of the host end are closed.
    pub(super) host_gone: bool,
    /// The guest takes no more.
    guest_deaf: bool,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_buffer: u32,
    guest_taken: u32,
    /// Credit was asked for and has not come.
    credit_asked: bool,

    /// Bytes from the guest that the host end has not taken.
    backlog: VecDeque<u8>,
    /// The host end may take bytes.
    writable: bool,
    /// The host end takes no more: what the guest sends is dropped.
    host_deaf: bool,
    /// Nothing more comes from the guest.
    guest_ended: bool,
    /// Bytes that the host end has taken, modulo 2^32.
    taken: u32,
    /// The value of `taken` that the guest knows.
    taken_announced: u32,
}

impl Connection {
    pub(super) fn new(key: Key, stream: UnixStream, phase: Phase) -> Self {
        Connection {
            key,
            phase,
            stream,
            announce: false,
            due: Due::default(),
            listed: false,
            readable: false,
            host_ended: false,
            host_gone: false,
            guest_deaf: false,
            sent: 0,
            guest_buffer: 0,
            guest_taken: 0,
            credit_asked: false,
            backlog: VecDeque::new(),
            writable: true,
            host_deaf: false,
            guest_ended: false,
            taken: 0,
            taken_announced: 0,
        }
    }

    /// A packet to the guest with everything but its operation filled in.
    pub(super) fn header(&mut self, guest_cid: u64, op: u16) -> Header {
        self.taken_announced = self.taken;
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: KIND_STREAM,
            op,
            buf_alloc: BUFFER_LEN,
            fwd_cnt: self.taken,
            ..Header::default()
        }
    }

    /// Takes over what a packet says about the guest's buffer.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// `count` bytes went to the guest.
    pub(super) fn count_sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Established && self.readable && !self.host_ended && !self.guest_deaf
    }

    /// The host end has bytes and the guest has room.
    pub(super) fn has_data(&self) -> bool {
        self.may_read() && self.credit() > 0
    }

    /// Notes what follows from the present state: what is due after an event.
    pub(super) fn settle(&mut self) {
        if self.phase == Phase::Established && self.host_gone && (self.host_ended || self.guest_deaf) {
            self.due.shutdown = SHUTDOWN_BOTH;
        }
        if self.phase == Phase::Requested && self.host_gone {
            self.due.reset = true;
        }
        if self.may_read() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.due.credit_request = true;
        }
    }

    /// Whether the guest is to get a packet, given a buffer.
    pub(super) fn has_work(&self) -> bool {
        let due = &self.due;
        due.reset
            || due.request
            || due.response
            || due.shutdown != 0
            || due.credit_update
            || due.credit_request
            || self.has_data()
    }

    /// The host end will send no more.
    pub(super) fn host_end_of_stream(&mut self) {
        self.host_ended = true;
        self.due.shutdown |= SHUTDOWN_SEND;
    }

    fn host_takes_no_more(&mut self) {
        self.host_deaf = true;
        self.count_taken(self.backlog.len());
        self.backlog = VecDeque::new();
        self.due.shutdown |= SHUTDOWN_RECEIVE;
    }

    fn count_taken(&mut self, count: usize) {
        // At most BUFFER_LEN at a time.
        self.taken = self.taken.wrapping_add(count as u32);
        if self.taken.wrapping_sub(self.taken_announced) >= ANNOUNCE_STEP {
            self.due.credit_update = true;
        }
    }

    /// Sends bytes of the guest to the host end, or keeps them.
    pub(super) fn accept(&mut self, mut data: Buffers<'_>) -> Accepted {
        if data.len() > (BUFFER_LEN as usize).saturating_sub(self.backlog.len()) {
            return Accepted::CreditExceeded;
        }
        while !data.is_empty() && !self.host_deaf && self.writable && self.backlog.is_empty() {
            match volatile_io::send(&self.stream, data.slices()) {
                Ok(count) => {
                    data.skip(count);
                    self.count_taken(count);
                }
                Err(error) => self.note_send_error(&error),
            }
        }
        if self.host_deaf {
            self.count_taken(data.len());
        } else if !data.is_empty() {
            let mut bytes = vec![0; data.len()];
            data.read(&mut bytes);
            self.backlog.extend(bytes);
        }
        Accepted::Yes
    }

    fn note_send_error(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.writable = false;
        } else {
            self.host_takes_no_more();
        }
    }

    /// The host end may have room again: sends what was kept.
    pub(super) fn flush(&mut self) {
        self.writable = true;
        while self.writable && !self.backlog.is_empty() {
            match volatile_io::send_bytes(&self.stream, self.backlog.as_slices()) {
                Ok(count) => {
                    self.backlog.drain(..count.min(self.backlog.len()));
                    self.count_taken(count);
                }
                Err(error) => self.note_send_error(&error),
            }
        }
        self.finish_sending();
    }

    fn finish_sending(&mut self) {
        if self.backlog.is_empty() {
            // Most of the time nothing waits.
            self.backlog.shrink_to(4096);
            if self.guest_ended && !self.host_deaf {
                // An error means that the host end has closed it already.
                drop(self.stream.shutdown(Shutdown::Write));
            }
        }
    }

    /// The guest shuts down; answers whether both directions are closed now.
    pub(super) fn guest_shutdown(&mut self, flags: u32) -> bool {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // Writers at the host end learn of it; an error means that they are gone.
            drop(self.stream.shutdown(Shutdown::Read));
        }
        if flags & SHUTDOWN_SEND != 0 && !self.guest_ended {
            self.guest_ended = true;
            self.finish_sending();
        }
        self.guest_deaf && self.guest_ended
    }

    /// Nothing more may come from the guest.
    pub(super) fn guest_has_ended(&self) -> bool {
        self.guest_ended
    }

    /// Nothing waits for the host end.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty() || self.host_deaf
    }

    /// Puts a line in front of everything that the guest sends.
    pub(super) fn announce_accepted(&mut self) {
        self.backlog.extend(format!("OK {}\n", self.key.host_port).into_bytes());
        let line_len = self.backlog.len() as u32;
        // The line is not the guest's: it must not count as taken from its buffer.
        self.taken = self.taken.wrapping_sub(line_len);
        self.taken_announced = self.taken_announced.wrapping_sub(line_len);
        self.flush();
    }
}

/// The operation of the next control packet that is due, with its flags; takes it off the list.
pub(super) fn next_control(due: &mut Due) -> Option<(u16, u32)> {
    if std::mem::take(&mut due.reset) {
        return Some((op::RST, 0));
    }
    if std::mem::take(&mut due.request) {
        return Some((op::REQUEST, 0));
    }
    if std::mem::take(&mut due.response) {
        return Some((op::RESPONSE, 0));
    }
    match std::mem::take(&mut due.shutdown) {
        0 => {}
        flags => return Some((op::SHUTDOWN, flags)),
    }
    if std::mem::take(&mut due.credit_request) {
        return Some((op::CREDIT_REQUEST, 0));
    }
    std::mem::take(&mut due.credit_update).then_some((op::CREDIT_UPDATE, 0))
}
