//! Windows: how much of a stream may be under way. The sender holds a [`SendWindow`], the receiver a
//! [`ReceiveWindow`]; credit flows back as the receiver disposes of bytes. Both also count the stream's offset, which
//! data frames carry so that a later connection can tell what it has already seen.

use crate::WINDOW;

/// How a peer broke a stream's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// More was sent than there was credit for.
    #[error("{sent} bytes were sent with a credit of {credit}")]
    Overrun {
        /// What came.
        sent: u64,
        /// What was allowed.
        credit: u64,
    },
    /// Data does not go on where it ended.
    #[error("data at offset {found}, expected {expected}")]
    Offset {
        /// Where the data claims to belong.
        found: u64,
        /// Where the stream stands.
        expected: u64,
    },
    /// More credit came back than was used.
    #[error("{given} bytes of credit were given back, {used} were under way")]
    Credit {
        /// What came back.
        given: u64,
        /// What was under way.
        used: u64,
    },
}

/// The sending end of a stream.
#[derive(Clone, Debug, Default)]
pub struct SendWindow {
    offset: u64,
    under_way: u64,
}

impl SendWindow {
    /// How many bytes may be sent now.
    #[must_use]
    pub fn available(&self) -> usize {
        usize::try_from(u64::from(WINDOW).saturating_sub(self.under_way)).unwrap_or(0)
    }

    /// Records that `count` bytes, at most [`SendWindow::available`], are sent; gives the offset that their frame carries.
    pub fn send(&mut self, count: usize) -> u64 {
        let offset = self.offset;
        self.offset = self.offset.saturating_add(count as u64);
        self.under_way = self.under_way.saturating_add(count as u64);
        offset
    }

    /// Takes back credit. More than is under way is an error of the peer.
    pub fn credit(&mut self, bytes: u32) -> Result<(), FlowError> {
        let given = u64::from(bytes);
        self.under_way =
            self.under_way.checked_sub(given).ok_or(FlowError::Credit { given, used: self.under_way })?;
        Ok(())
    }

    /// How many bytes were sent in all.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// The receiving end of a stream.
#[derive(Clone, Debug, Default)]
pub struct ReceiveWindow {
    offset: u64,
    held: u64,
    disposed: u64,
}

impl ReceiveWindow {
    /// Checks a data frame against offset and credit, and counts it.
    pub fn receive(&mut self, offset: u64, count: usize) -> Result<(), FlowError> {
        if offset != self.offset {
            return Err(FlowError::Offset { found: offset, expected: self.offset });
        }
        let sent = count as u64;
        let credit = u64::from(WINDOW).saturating_sub(self.held.saturating_add(self.disposed));
        if sent > credit {
            return Err(FlowError::Overrun { sent, credit });
        }
        self.offset = self.offset.saturating_add(sent);
        self.held = self.held.saturating_add(sent);
        Ok(())
    }

    /// Records that `count` of the bytes received are gone: written, or dropped for good.
    pub fn dispose(&mut self, count: usize) {
        let count = (count as u64).min(self.held);
        self.held -= count;
        self.disposed += count;
    }

    /// Credit that is worth a frame: everything disposed of, once it is a quarter of the window.
    pub fn credit_due(&mut self) -> Option<u32> {
        if self.disposed < u64::from(WINDOW / 4) {
            return None;
        }
        u32::try_from(std::mem::take(&mut self.disposed)).ok()
    }

    /// How many bytes were received in all.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes were received and not yet disposed of.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_never_lets_more_than_its_size_under_way() {
        let (mut sender, mut receiver) = (SendWindow::default(), ReceiveWindow::default());
        let mut total = 0;
        for round in 0..1000_usize {
            let count = sender.available().min(1 + round * 37 % 70_000);
            let offset = sender.send(count);
            receiver.receive(offset, count).unwrap();
            total += count as u64;
            assert!(receiver.held() <= u64::from(WINDOW));
            receiver.dispose(round * 53 % 90_000);
            if let Some(credit) = receiver.credit_due() {
                sender.credit(credit).unwrap();
            }
        }
        assert_eq!((sender.offset(), receiver.offset()), (total, total));
        assert!(total > 10 * u64::from(WINDOW));
    }

    #[test]
    fn data_without_credit_is_refused() {
        let mut receiver = ReceiveWindow::default();
        receiver.receive(0, WINDOW as usize).unwrap();
        assert_eq!(receiver.receive(u64::from(WINDOW), 1), Err(FlowError::Overrun { sent: 1, credit: 0 }));
        // Disposed of, but the credit has not gone out: still none.
        receiver.dispose(10);
        assert_eq!(receiver.receive(u64::from(WINDOW), 1), Err(FlowError::Overrun { sent: 1, credit: 0 }));
    }

    #[test]
    fn a_gap_or_a_repetition_is_refused() {
        let mut receiver = ReceiveWindow::default();
        receiver.receive(0, 10).unwrap();
        for found in [0, 9, 11, u64::MAX] {
            assert_eq!(receiver.receive(found, 1), Err(FlowError::Offset { found, expected: 10 }));
        }
    }

    #[test]
    fn credit_that_was_never_used_is_refused() {
        let mut sender = SendWindow::default();
        sender.send(5);
        assert_eq!(sender.credit(6), Err(FlowError::Credit { given: 6, used: 5 }));
    }
}
