//! Streams that survive the connection: the sender keeps what the receiver has not yet disposed of, so that a later
//! connection goes on exactly where the receiver stands. The sender holds a [`SendStream`], the receiver a
//! [`ReceiveStream`]; all positions are offsets from the stream's beginning.

use std::collections::VecDeque;

use crate::WINDOW;

/// How a peer broke a stream's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// More was sent than there was room for.
    #[error("data up to offset {end}, allowed up to {limit}")]
    Overrun {
        /// Where the data ends.
        end: u64,
        /// Where it had to end.
        limit: u64,
    },
    /// Data does not go on where it ended.
    #[error("data at offset {found}, expected {expected}")]
    Offset {
        /// Where the data claims to belong.
        found: u64,
        /// Where the stream stands.
        expected: u64,
    },
    /// Something was acknowledged that was not sent, or that was acknowledged before.
    #[error("offset {found} is acknowledged, {from} to {to} can be")]
    Ack {
        /// What was acknowledged.
        found: u64,
        /// The last acknowledgement.
        from: u64,
        /// What was sent.
        to: u64,
    },
    /// The receiver stands where the sender has nothing to go on from.
    #[error("the stream is to go on at offset {found}, {from} to {to} are there")]
    Resume {
        /// Where the receiver stands.
        found: u64,
        /// The first byte that is kept.
        from: u64,
        /// The stream's end so far.
        to: u64,
    },
}

/// How far a receiver has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// It has everything before this offset.
    pub received: u64,
    /// It has disposed of everything before this offset. Never beyond `received`.
    pub disposed: u64,
}

/// The sending end of a stream. It holds at most [`WINDOW`] bytes.
#[derive(Clone, Debug, Default)]
pub struct SendStream {
    /// From `acked` on.
    kept: VecDeque<u8>,
    acked: u64,
    /// What the present connection has been given.
    sent: u64,
}

impl SendStream {
    /// A stream of which everything before `acked` is done with and `kept` follows; at most [`WINDOW`] bytes of it.
    #[must_use]
    pub fn restore(acked: u64, mut kept: Vec<u8>) -> Self {
        kept.truncate(WINDOW as usize);
        Self { kept: kept.into(), acked, sent: acked }
    }

    /// How many bytes may be added now.
    #[must_use]
    pub fn room(&self) -> usize {
        (WINDOW as usize).saturating_sub(self.kept.len())
    }

    /// Appends to the stream what there is [`SendStream::room`] for; says how much that was.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.get(..self.room()).unwrap_or(bytes);
        self.kept.extend(taken);
        taken.len()
    }

    /// The next bytes to send, at most `max`, with their offset; they count as sent.
    pub fn next_piece(&mut self, max: usize) -> Option<(u64, &[u8])> {
        let offset = self.sent;
        let start = usize::try_from(offset.saturating_sub(self.acked)).ok()?;
        let (front, back) = self.kept.as_slices();
        let rest = match front.get(start..).filter(|rest| !rest.is_empty()) {
            Some(rest) => rest,
            None => back.get(start.checked_sub(front.len())?..)?,
        };
        let piece = rest.get(..max).unwrap_or(rest);
        self.sent = self.sent.saturating_add(piece.len() as u64);
        (!piece.is_empty()).then_some((offset, piece))
    }

    /// Whether the present connection has been given everything.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.sent == self.end()
    }

    /// The receiver has disposed of everything before `offset`.
    pub fn ack(&mut self, offset: u64) -> Result<(), FlowError> {
        if offset < self.acked || offset > self.sent {
            return Err(FlowError::Ack { found: offset, from: self.acked, to: self.sent });
        }
        self.forget_until(offset);
        Ok(())
    }

    /// A new connection: the receiver stands at `position`.
    pub fn resume(&mut self, position: Position) -> Result<(), FlowError> {
        let Position { received, disposed } = position;
        for found in [received, disposed.min(received)] {
            if found < self.acked || found > self.end() {
                return Err(FlowError::Resume { found, from: self.acked, to: self.end() });
            }
        }
        self.forget_until(disposed.min(received));
        self.sent = received;
        Ok(())
    }

    /// Everything before this offset is acknowledged.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// How long the stream is so far, in bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.acked.saturating_add(self.kept.len() as u64)
    }

    /// A copy of what is not acknowledged, from [`SendStream::acked`] on.
    #[must_use]
    pub fn kept(&self) -> Vec<u8> {
        self.kept.iter().copied().collect()
    }

    fn forget_until(&mut self, offset: u64) {
        let count = usize::try_from(offset.saturating_sub(self.acked)).unwrap_or(usize::MAX);
        self.kept.drain(..count.min(self.kept.len()));
        self.acked = offset;
        if self.kept.is_empty() {
            self.kept.shrink_to(4096);
        }
    }
}

/// The receiving end of a stream.
#[derive(Clone, Debug, Default)]
pub struct ReceiveStream {
    received: u64,
    disposed: u64,
    /// What of `disposed` the sender has been told.
    acked: u64,
}

impl ReceiveStream {
    /// A stream of which everything before `offset` is received and disposed of.
    #[must_use]
    pub fn restore(offset: u64) -> Self {
        Self { received: offset, disposed: offset, acked: offset }
    }

    /// Checks a data frame against position and window, and counts it.
    pub fn receive(&mut self, offset: u64, count: usize) -> Result<(), FlowError> {
        if offset != self.received {
            return Err(FlowError::Offset { found: offset, expected: self.received });
        }
        let limit = self.acked.saturating_add(u64::from(WINDOW));
        let end = offset.saturating_add(count as u64);
        if end > limit {
            return Err(FlowError::Overrun { end, limit });
        }
        self.received = end;
        Ok(())
    }

    /// Records that `count` of the bytes received are gone: written, or dropped for good.
    pub fn dispose(&mut self, count: usize) {
        self.disposed = self.disposed.saturating_add(count as u64).min(self.received);
    }

    /// An acknowledgement that is worth a frame: once a quarter of the window is disposed of.
    pub fn ack_due(&mut self) -> Option<u64> {
        if self.disposed - self.acked < u64::from(WINDOW / 4) {
            return None;
        }
        self.acked = self.disposed;
        Some(self.disposed)
    }

    /// What to tell the sender on a new connection; it counts as told.
    pub fn resume(&mut self) -> Position {
        self.acked = self.disposed;
        self.position()
    }

    /// How far the stream has come.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { received: self.received, disposed: self.disposed }
    }

    /// How many bytes were received and not yet disposed of.
    #[must_use]
    pub fn held(&self) -> usize {
        usize::try_from(self.received - self.disposed).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: usize = WINDOW as usize;

    #[test]
    fn a_window_never_lets_more_than_its_size_under_way() {
        let (mut sender, mut receiver) = (SendStream::default(), ReceiveStream::default());
        let mut total = 0;
        for round in 0..1000_usize {
            total += sender.push(&vec![1; 1 + round * 37 % 70_000]) as u64;
            while let Some((offset, piece)) = sender.next_piece(10_000) {
                receiver.receive(offset, piece.len()).unwrap();
            }
            assert!(receiver.held() <= FULL);
            receiver.dispose(round * 53 % 90_000);
            if let Some(offset) = receiver.ack_due() {
                sender.ack(offset).unwrap();
            }
        }
        assert_eq!((sender.end(), receiver.position().received), (total, total));
        assert!(total > 10 * u64::from(WINDOW));
    }

    #[test]
    fn data_beyond_the_window_is_refused() {
        let mut receiver = ReceiveStream::default();
        receiver.receive(0, FULL).unwrap();
        let limit = u64::from(WINDOW);
        assert_eq!(receiver.receive(limit, 1), Err(FlowError::Overrun { end: limit + 1, limit }));
        // Disposed of, but the sender has not been told: still none.
        receiver.dispose(10);
        assert_eq!(receiver.receive(limit, 1), Err(FlowError::Overrun { end: limit + 1, limit }));
        assert_eq!(receiver.resume(), Position { received: limit, disposed: 10 });
        receiver.receive(limit, 10).unwrap();
    }

    #[test]
    fn a_gap_or_a_repetition_is_refused() {
        let mut receiver = ReceiveStream::default();
        receiver.receive(0, 10).unwrap();
        for found in [0, 9, 11, u64::MAX] {
            assert_eq!(receiver.receive(found, 1), Err(FlowError::Offset { found, expected: 10 }));
        }
    }

    #[test]
    fn what_was_never_sent_or_is_acknowledged_already_cannot_be_acknowledged() {
        let mut sender = SendStream::default();
        sender.push(&[7; 6]);
        assert_eq!(sender.next_piece(5).map(|(offset, piece)| (offset, piece.len())), Some((0, 5)));
        assert_eq!(sender.ack(6), Err(FlowError::Ack { found: 6, from: 0, to: 5 }));
        sender.ack(4).unwrap();
        assert_eq!(sender.ack(3), Err(FlowError::Ack { found: 3, from: 4, to: 5 }));
    }

    #[test]
    fn a_new_connection_goes_on_where_the_receiver_stands_and_nowhere_else() {
        let mut sender = SendStream::default();
        sender.push(b"0123456789");
        while sender.next_piece(3).is_some() {}
        sender.ack(2).unwrap();
        sender.resume(Position { received: 5, disposed: 4 }).unwrap();
        assert_eq!((sender.acked(), sender.is_sent()), (4, false));
        assert_eq!(sender.next_piece(100), Some((5, b"56789".as_slice())));
        for found in [3, 11] {
            let position = Position { received: found, disposed: found };
            assert_eq!(sender.resume(position), Err(FlowError::Resume { found, from: 4, to: 10 }));
        }
        let mut restored = SendStream::restore(sender.acked(), sender.kept());
        restored.resume(Position { received: 4, disposed: 4 }).unwrap();
        assert_eq!(restored.next_piece(100), Some((4, b"456789".as_slice())));
    }
}
