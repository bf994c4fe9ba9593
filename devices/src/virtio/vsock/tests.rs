//! The socket device against a guest made by hand: real sockets on the host side, no threads.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use super::connection::BUFFER_LEN;
use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

const CID: u32 = 3;
const PORT: u32 = 1024;
/// As Linux does: receive buffers of a page.
const RECEIVE_LEN: u32 = 4096;
const RECEIVE_BUFFERS: u64 = BUFFERS;
const TRANSMIT_BUFFERS: u64 = BUFFERS + 0x40_0000;

struct Guest {
    driver: Driver,
    ports: InProcess,
    listener: VsockListener,
    handle: VsockHandle,
    /// Receive buffers by head.
    buffers: HashMap<u16, u64>,
    received: VecDeque<(Header, Vec<u8>)>,
    free_receive: u64,
}

impl Guest {
    fn new() -> Self {
        let ports = InProcess::new();
        let listener = ports.listen(PORT).unwrap();
        let device = Vsock::new(CID, Box::new(ports.clone())).unwrap();
        let handle = device.handle();
        let driver = Driver::new(Box::new(device));
        Guest {
            driver,
            ports,
            listener,
            handle,
            buffers: HashMap::new(),
            received: VecDeque::new(),
            free_receive: 0,
        }
    }

    /// Gives the device `count` more receive buffers.
    fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let address = RECEIVE_BUFFERS + u64::from(RECEIVE_LEN) * (self.free_receive % 256);
            self.free_receive += 1;
            let head = self.driver.offer(RECEIVE_QUEUE, &[(address, RECEIVE_LEN, WRITE)]);
            self.buffers.insert(head, address);
        }
        self.driver.kick(RECEIVE_QUEUE);
        self.collect();
    }

    fn collect(&mut self) {
        while let Some((head, len)) = self.driver.used(RECEIVE_QUEUE) {
            let address = self.buffers.remove(&head).unwrap();
            let bytes = self.driver.read(address, len as usize);
            let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            self.received.push_back((header, bytes[HEADER_LEN..].to_vec()));
        }
    }

    /// Lets the device look at its host side.
    fn poll(&mut self) {
        for _ in 0..4 {
            self.driver.transport.process_pending();
        }
        self.collect();
    }

    /// Sends a packet, its payload cut into pieces.
    fn send_cut(&mut self, header: Header, payload: &[u8], cut: usize) {
        self.driver.write(TRANSMIT_BUFFERS, &header.encode());
        self.driver.write(TRANSMIT_BUFFERS + 0x1000, payload);
        let mut chain = vec![(TRANSMIT_BUFFERS, HEADER_LEN as u32, 0)];
        let mut at = TRANSMIT_BUFFERS + 0x1000;
        for piece in payload.chunks(cut.max(1)) {
            chain.push((at, piece.len() as u32, 0));
            at += piece.len() as u64;
        }
        let head = self.driver.offer(TRANSMIT_QUEUE, &chain);
        self.driver.kick(TRANSMIT_QUEUE);
        assert_eq!(self.driver.used(TRANSMIT_QUEUE), Some((head, 0)));
        self.collect();
    }

    fn packet(&self, guest_port: u32, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: PORT,
            kind: KIND_STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    fn send(&mut self, guest_port: u32, op: u16) {
        self.send_cut(self.packet(guest_port, op), &[], 1);
    }

    fn send_data(&mut self, guest_port: u32, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..self.packet(guest_port, op::RW) };
        self.send_cut(header, payload, 1 << 20);
    }

    fn shutdown(&mut self, guest_port: u32, flags: u32) {
        self.send_cut(Header { flags, ..self.packet(guest_port, op::SHUTDOWN) }, &[], 1);
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        if self.received.is_empty() {
            self.poll();
        }
        self.received.pop_front().expect("no packet came")
    }

    fn next_op(&mut self) -> u16 {
        self.next().0.op
    }

    fn quiet(&mut self) -> bool {
        self.poll();
        self.received.is_empty()
    }

    /// A connection from `guest_port`, with its host end (non-blocking).
    fn connect(&mut self, guest_port: u32) -> UnixStream {
        self.send(guest_port, op::REQUEST);
        let (header, _) = self.next();
        assert_eq!((header.op, header.src_port, header.dst_port), (op::RESPONSE, PORT, guest_port));
        assert_eq!(header.buf_alloc, BUFFER_LEN);
        let stream = self.listener.try_accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

fn read_now(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = [0; 65536];
    while let Ok(count @ 1..) = stream.read(&mut piece) {
        all.extend_from_slice(&piece[..count]);
    }
    all
}

fn at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect()
}

#[test]
fn the_guest_reads_its_context_id() {
    let mut guest = Guest::new();
    assert_eq!((guest.driver.get(0x100), guest.driver.get(0x104)), (CID, 0));
    assert_eq!(guest.driver.get(0x8), 19);
}

#[test]
fn bytes_pass_both_ways_in_any_cut() {
    let mut guest = Guest::new();
    guest.give_buffers(64);
    let mut host = guest.connect(5000);
    let bytes = pattern(10_000);
    for cut in [10_000, 4096, 100] {
        let header = Header { len: 10_000, ..guest.packet(5000, op::RW) };
        guest.send_cut(header, &bytes, cut);
        assert_eq!(read_now(&mut host), bytes);
    }
    host.write_all(&bytes).unwrap();
    let mut seen = Vec::new();
    while seen.len() < bytes.len() {
        let (header, payload) = guest.next();
        assert_eq!((header.op, header.dst_port), (op::RW, 5000));
        assert_eq!(header.fwd_cnt, 30_000);
        seen.extend(payload);
    }
    assert_eq!(seen, bytes);
    assert!(guest.quiet());
}

#[test]
fn header_and_payload_may_share_a_descriptor() {
    let mut guest = Guest::new();
    guest.give_buffers(8);
    let mut host = guest.connect(1);
    let header = Header { len: 5, ..guest.packet(1, op::RW) };
    guest.driver.write(TRANSMIT_BUFFERS, &[header.encode().as_slice(), b"hello"].concat());
    guest.driver.offer(TRANSMIT_QUEUE, &[(TRANSMIT_BUFFERS, 20, 0), (TRANSMIT_BUFFERS + 20, 29, 0)]);
    guest.driver.kick(TRANSMIT_QUEUE);
    assert_eq!(read_now(&mut host), b"hello");
}

#[test]
fn ports_where_nobody_listens_are_reset() {
    let mut guest = Guest::new();
    guest.give_buffers(4);
    let request = Header { dst_port: 9, ..guest.packet(1, op::REQUEST) };
    guest.send_cut(request, &[], 1);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.src_port, header.dst_port), (op::RST, 9, 1));
}

#[test]
fn packets_that_belong_nowhere_are_reset_and_resets_are_not_answered() {
    let mut guest = Guest::new();
    guest.give_buffers(32);
    for operation in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        guest.send(7, operation);
        assert_eq!(guest.next_op(), op::RST, "{operation}");
    }
    guest.send(7, op::RST);
    assert!(guest.quiet());
    guest.send_cut(Header { kind: 2, ..guest.packet(7, op::REQUEST) }, &[], 1);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.kind), (op::RST, 2));
    guest.send_cut(Header { src_cid: 9, ..guest.packet(7, op::REQUEST) }, &[], 1);
    assert!(guest.quiet());
    assert!(guest.listener.try_accept().is_none());
}

#[test]
fn a_guest_that_ends_its_sending_can_still_receive() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.connect(1);
    guest.send_data(1, b"question");
    guest.shutdown(1, SHUTDOWN_SEND);
    assert_eq!(read_now(&mut host), b"question");
    assert!(at_end(&mut host));
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
    drop(host);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    guest.shutdown(1, SHUTDOWN_BOTH);
    assert_eq!(guest.next_op(), op::RST);
    assert!(guest.quiet());
}

#[test]
fn a_host_end_that_ends_its_sending_can_still_receive() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.connect(1);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().1, b"question");
    let (header, _) = guest.next();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    guest.send_data(1, b"answer");
    assert_eq!(read_now(&mut host), b"answer");
    guest.shutdown(1, SHUTDOWN_BOTH);
    assert_eq!(guest.next_op(), op::RST);
    assert!(at_end(&mut host));
}

#[test]
fn a_guest_that_takes_no_more_breaks_the_host_ends_pipe() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.connect(1);
    guest.shutdown(1, SHUTDOWN_RECEIVE);
    assert_eq!(host.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    guest.send_data(1, b"still");
    assert_eq!(read_now(&mut host), b"still");
}

#[test]
fn everything_that_the_host_end_wrote_arrives_before_its_end() {
    let mut guest = Guest::new();
    let bytes = pattern(100_000);
    guest.give_buffers(1);
    let mut host = guest.connect(1);
    host.write_all(&bytes).unwrap();
    drop(host);
    let mut seen = Vec::new();
    loop {
        guest.give_buffers(3);
        guest.poll();
        match guest.received.pop_front() {
            Some((header, payload)) if header.op == op::RW => seen.extend(payload),
            Some((header, _)) => {
                assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
                break;
            }
            None => {}
        }
    }
    assert_eq!(seen, bytes);
}

#[test]
fn everything_that_the_guest_wrote_arrives_after_it_has_closed() {
    let mut guest = Guest::new();
    guest.give_buffers(64);
    let mut host = guest.connect(1);
    let bytes = pattern(64 * 1024);
    // More than a socket holds: part of it waits in the device.
    for _ in 0..6 {
        guest.send_data(1, &bytes);
    }
    guest.shutdown(1, SHUTDOWN_BOTH);
    while guest.next_op() != op::RST {}
    let mut seen = Vec::new();
    while seen.len() < 6 * bytes.len() {
        seen.extend(read_now(&mut host));
        guest.poll();
    }
    assert_eq!(seen, bytes.repeat(6));
    assert!(at_end(&mut host));
}

#[test]
fn a_host_end_that_does_not_read_costs_the_guest_its_credit_and_no_byte() {
    let mut guest = Guest::new();
    guest.give_buffers(128);
    let mut host = guest.connect(1);
    let bytes = pattern(16 * 1024);
    let mut sent = 0u32;
    let mut taken = 0u32;
    let mut expected = Vec::new();
    while BUFFER_LEN - sent.wrapping_sub(taken) >= bytes.len() as u32 {
        guest.send_data(1, &bytes);
        expected.extend_from_slice(&bytes);
        sent += bytes.len() as u32;
        guest.poll();
        if let Some((header, _)) = guest.received.pop_back() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            taken = header.fwd_cnt;
        }
        assert!(sent < 64 << 20, "credit must end");
    }
    assert!(taken > 0);
    guest.send(1, op::CREDIT_REQUEST);
    let before = guest.next().0;
    assert_eq!(before.op, op::CREDIT_UPDATE);
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        seen.extend(read_now(&mut host));
        guest.poll();
    }
    assert_eq!(seen, expected);
    let last = guest.received.pop_back().unwrap().0;
    assert_eq!(last.op, op::CREDIT_UPDATE);
    assert!(sent.wrapping_sub(last.fwd_cnt) < BUFFER_LEN / 4);
}

#[test]
fn a_guest_that_overdraws_its_credit_is_reset() {
    let mut guest = Guest::new();
    guest.give_buffers(200);
    let _host = guest.connect(1);
    let bytes = pattern(64 * 1024);
    for _ in 0..32 {
        guest.send_data(1, &bytes);
    }
    guest.poll();
    assert!(guest.received.iter().any(|(header, _)| header.op == op::RST));
}

#[test]
fn the_guests_credit_holds_back_the_host_end() {
    let mut guest = Guest::new();
    guest.give_buffers(64);
    let request = Header { buf_alloc: 5000, ..guest.packet(1, op::REQUEST) };
    guest.send_cut(request, &[], 1);
    assert_eq!(guest.next_op(), op::RESPONSE);
    let mut host = guest.listener.try_accept().unwrap();
    let bytes = pattern(12_000);
    host.write_all(&bytes).unwrap();
    guest.poll();
    let mut seen = Vec::new();
    let mut asked = 0;
    let mut take = |guest: &mut Guest| {
        while let Some((header, payload)) = guest.received.pop_front() {
            asked += usize::from(header.op == op::CREDIT_REQUEST);
            seen.extend(payload);
        }
        (seen.len(), asked)
    };
    assert_eq!(take(&mut guest), (5000, 1));
    let update = Header { buf_alloc: 5000, fwd_cnt: 4000, ..guest.packet(1, op::CREDIT_UPDATE) };
    guest.send_cut(update, &[], 1);
    guest.poll();
    assert_eq!(take(&mut guest), (9000, 2));
    // A guest that claims to have taken more than it got is given nothing for it.
    let update = Header { buf_alloc: 5000, fwd_cnt: 900_000, ..guest.packet(1, op::CREDIT_UPDATE) };
    guest.send_cut(update, &[], 1);
    guest.poll();
    assert_eq!(take(&mut guest).0, 9000);
    let update = Header { buf_alloc: 5000, fwd_cnt: 9000, ..guest.packet(1, op::CREDIT_UPDATE) };
    guest.send_cut(update, &[], 1);
    guest.poll();
    assert_eq!(take(&mut guest).0, 12_000);
    assert_eq!(seen, bytes);
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.handle.connect(777).unwrap();
    host.write_all(b"early").unwrap();
    let (request, _) = guest.next();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 777));
    assert!(guest.quiet(), "no data before the guest has accepted");
    let answer = Header { dst_port: request.src_port, ..guest.packet(777, op::RESPONSE) };
    guest.send_cut(answer, &[], 1);
    assert_eq!(guest.next().1, b"early");
    let data = Header { dst_port: request.src_port, len: 4, ..guest.packet(777, op::RW) };
    guest.send_cut(data, b"late", 1);
    let mut bytes = [0; 4];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"late");
}

#[test]
fn a_guest_that_refuses_ends_the_hosts_stream() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.handle.connect(777).unwrap();
    let (request, _) = guest.next();
    let refusal = Header { dst_port: request.src_port, ..guest.packet(777, op::RST) };
    guest.send_cut(refusal, &[], 1);
    assert!(at_end(&mut host));
    // And one that gives up before the answer is taken back.
    drop(guest.handle.connect(778).unwrap());
    assert_eq!(guest.next_op(), op::REQUEST);
    assert_eq!(guest.next_op(), op::RST);
}

#[test]
fn a_forwarded_stream_learns_that_the_guest_has_accepted() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let (device, mut host) = UnixStream::pair().unwrap();
    guest.handle.forward(device, 777).unwrap();
    let (request, _) = guest.next();
    let answer = Header { dst_port: request.src_port, ..guest.packet(777, op::RESPONSE) };
    guest.send_cut(answer, &[], 1);
    host.set_nonblocking(true).unwrap();
    assert_eq!(read_now(&mut host), format!("OK {}\n", request.src_port).into_bytes());
    host.write_all(b"x").unwrap();
    assert_eq!(guest.next().0.fwd_cnt, 0);
}

#[test]
fn without_a_driver_the_hosts_connections_end_at_once() {
    let device = Vsock::new(CID, Box::new(NoHost)).unwrap();
    let handle = device.handle();
    let driver = Driver::cold(Box::new(device));
    let mut host = handle.connect(1).unwrap();
    driver.transport.process_pending();
    assert!(at_end(&mut host));
    drop(driver);
    assert_eq!(handle.connect(1).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn a_reset_of_the_device_closes_every_connection_and_delivers_what_was_sent() {
    let mut guest = Guest::new();
    guest.give_buffers(16);
    let mut host = guest.connect(1);
    guest.send_data(1, b"last words");
    guest.driver.bring_up(0);
    guest.buffers.clear();
    assert_eq!(read_now(&mut host), b"last words");
    assert!(at_end(&mut host));
    guest.give_buffers(16);
    let mut again = guest.connect(1);
    guest.send_data(1, b"new");
    assert_eq!(read_now(&mut again), b"new");
}

#[test]
fn many_connections_take_turns_and_the_surplus_is_reset() {
    let mut guest = Guest::new();
    guest.give_buffers(200);
    let mut hosts = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.connect(port));
        guest.give_buffers(1);
    }
    guest.send(100_000, op::REQUEST);
    assert_eq!(guest.next_op(), op::RST);
    for host in &mut hosts {
        host.write_all(&pattern(100)).unwrap();
    }
    let mut seen = HashMap::new();
    while seen.len() < hosts.len() {
        guest.give_buffers(50);
        let (header, payload) = guest.next();
        assert_eq!(payload, pattern(100));
        assert_eq!(seen.insert(header.dst_port, ()), None);
    }
}

#[test]
fn answers_without_a_buffer_hold_back_the_guests_packets_and_not_memory() {
    let mut guest = Guest::new();
    for _ in 0..4 * MAX_REPLIES {
        guest.driver.write(TRANSMIT_BUFFERS, &guest.packet(1, op::RW).encode());
        guest.driver.offer(TRANSMIT_QUEUE, &[(TRANSMIT_BUFFERS, HEADER_LEN as u32, 0)]);
    }
    guest.driver.kick(TRANSMIT_QUEUE);
    for _ in 0..8 {
        guest.driver.transport.process_pending();
    }
    let handled = std::iter::from_fn(|| guest.driver.used(TRANSMIT_QUEUE)).count();
    assert_eq!(handled, MAX_REPLIES);
    for _ in 0..8 {
        guest.give_buffers(64);
        guest.poll();
    }
    assert_eq!(guest.received.len(), 4 * MAX_REPLIES);
}

#[test]
fn useless_buffers_and_packets_are_handed_back() {
    let mut guest = Guest::new();
    guest.driver.offer(RECEIVE_QUEUE, &[(RECEIVE_BUFFERS, HEADER_LEN as u32 - 1, WRITE)]);
    guest.driver.offer(RECEIVE_QUEUE, &[(RECEIVE_BUFFERS, 100, 0)]);
    guest.driver.kick(RECEIVE_QUEUE);
    let short = guest.driver.offer(TRANSMIT_QUEUE, &[(TRANSMIT_BUFFERS, HEADER_LEN as u32 - 1, 0)]);
    guest.driver.kick(TRANSMIT_QUEUE);
    assert_eq!(guest.driver.used(TRANSMIT_QUEUE), Some((short, 0)));
    guest.driver.write(TRANSMIT_BUFFERS, &guest.packet(1, op::RW).encode());
    guest.driver.offer(TRANSMIT_QUEUE, &[(TRANSMIT_BUFFERS, HEADER_LEN as u32, 0)]);
    guest.driver.kick(TRANSMIT_QUEUE);
    assert!(guest.driver.used(TRANSMIT_QUEUE).is_some());
    assert_eq!(guest.driver.used(RECEIVE_QUEUE).unwrap().1, 0);
    assert_eq!(guest.driver.used(RECEIVE_QUEUE).unwrap().1, 0);
    guest.give_buffers(1);
    assert_eq!(guest.next_op(), op::RST);
    // A length that is not there.
    guest.give_buffers(8);
    let _host = guest.connect(1);
    let header = Header { len: 100, ..guest.packet(1, op::RW) };
    guest.send_cut(header, b"less", 4);
    assert_eq!(guest.next_op(), op::RST);
}

#[test]
fn a_listener_with_a_full_backlog_refuses() {
    let mut guest = Guest::new();
    guest.give_buffers(250);
    let answers: Vec<u16> = (0..140)
        .map(|port| {
            guest.send(port, op::REQUEST);
            guest.next_op()
        })
        .collect();
    assert_eq!(answers.iter().filter(|&&answer| answer == op::RESPONSE).count(), 128);
    assert!(guest.listener.accept(Duration::ZERO).is_ok());
    assert!(guest.ports.listen(PORT).is_err());
}

#[test]
fn an_event_loop_hears_of_the_host_side_and_sleeps_otherwise() {
    let mut guest = Guest::new();
    guest.give_buffers(2);
    let mut host = guest.connect(1);
    let mut manager = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
    manager.add_subscriber(guest.driver.transport.events());
    let settle = |manager: &mut EventManager<_>| {
        for _ in 0..100 {
            if manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the loop spins");
    };
    settle(&mut manager);
    host.write_all(&pattern(10_000)).unwrap();
    settle(&mut manager);
    guest.collect();
    assert_eq!(guest.received.len(), 1, "one buffer was left");
    // Out of buffers, out of credit, closed: nothing of that may keep the loop awake.
    drop(host);
    settle(&mut manager);
    drop(guest.handle.connect(9).unwrap());
    settle(&mut manager);
    for _ in 0..10 {
        guest.give_buffers(1);
        settle(&mut manager);
    }
    guest.collect();
    let bytes: usize = guest.received.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(bytes, 10_000);
    let mut last: Vec<u16> = guest.received.iter().rev().take(3).map(|(header, _)| header.op).collect();
    last.sort_unstable();
    assert!(last.contains(&op::SHUTDOWN) && last.contains(&op::RST), "{last:?}");
}
