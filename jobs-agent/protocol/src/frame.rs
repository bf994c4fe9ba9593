//! Frames: [`Inbox`] cuts what arrives into [`Frame`]s, [`Outbox`] collects what is to be sent. Both keep what a
//! non-blocking connection could not take or give in one go.

use std::io::{self, Read, Write};

/// Length of a frame's header in bytes.
pub const HEADER_LEN: usize = 12;

/// The longest payload in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// How much an [`Inbox`] reads at once; it holds at least one whole frame.
const INBOX_LEN: usize = 2 * (HEADER_LEN + MAX_PAYLOAD);

/// What is wrong with a frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload is longer than any frame may be.
    #[error("a frame of {0} bytes, more than {MAX_PAYLOAD}")]
    TooLong(u32),
    /// The reserved field is not zero.
    #[error("reserved header field is {0:#x}, not zero")]
    Reserved(u16),
}

/// One frame as it came, its payload not yet looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which message this is.
    pub kind: u16,
    /// The command that it belongs to, or zero.
    pub id: u32,
    /// The message itself.
    pub payload: &'a [u8],
}

/// Receives bytes and cuts them into frames. Its memory is fixed.
#[derive(Debug)]
pub struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { buffer: vec![0; INBOX_LEN].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Inbox {
    /// Reads once from `source`, as much as it gives and there is room for. Zero means that the peer has ended the
    /// connection; take all complete frames with [`Inbox::next_frame`] before calling this again.
    pub fn fill(&mut self, source: &mut impl Read) -> io::Result<usize> {
        self.compact();
        let room = self.buffer.get_mut(self.end..).unwrap_or_default();
        if room.is_empty() {
            return Err(io::Error::other("the frames already received have not been taken"));
        }
        let count = source.read(room)?;
        self.end = self.end.saturating_add(count).min(self.buffer.len());
        Ok(count)
    }

    /// The next complete frame, or `None` until more has arrived.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let pending = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((header, rest)) = pending.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let [l0, l1, l2, l3, k0, k1, r0, r1, i0, i1, i2, i3] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let reserved = u16::from_le_bytes([r0, r1]);
        let payload_len = usize::try_from(length).unwrap_or(usize::MAX);
        if payload_len > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        let Some(payload) = rest.get(..payload_len) else { return Ok(None) };
        self.start += HEADER_LEN + payload_len;
        Ok(Some(Frame {
            kind: u16::from_le_bytes([k0, k1]),
            id: u32::from_le_bytes([i0, i1, i2, i3]),
            payload,
        }))
    }

    /// Forgets what has arrived: another connection begins.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Whether part of a frame is there that the peer has not completed.
    #[must_use]
    pub fn is_mid_frame(&self) -> bool {
        self.start != self.end
    }

    /// Moves what is left to the front, once nothing is left or the room behind it is short of a frame.
    fn compact(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < HEADER_LEN + MAX_PAYLOAD {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }
}

/// Collects frames until the connection takes them. How much it may hold is its owner's business: see [`Outbox::len`].
#[derive(Debug, Default)]
pub struct Outbox {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outbox {
    /// Appends a frame whose payload `write` produces. A payload beyond [`MAX_PAYLOAD`] is a mistake of the caller
    /// and is cut off, which the peer will refuse.
    pub fn push(&mut self, kind: u16, id: u32, write: impl FnOnce(&mut Vec<u8>)) {
        let header_at = self.buffer.len();
        self.buffer.extend_from_slice(&[0; HEADER_LEN]);
        let payload_at = self.buffer.len();
        write(&mut self.buffer);
        let length = self.buffer.len() - payload_at;
        debug_assert!(length <= MAX_PAYLOAD, "payload of {length} bytes");
        let length = length.min(MAX_PAYLOAD);
        self.buffer.truncate(payload_at + length);
        let [k0, k1] = kind.to_le_bytes();
        let [i0, i1, i2, i3] = id.to_le_bytes();
        let [l0, l1, l2, l3] = (length as u32).to_le_bytes();
        let header = [l0, l1, l2, l3, k0, k1, 0, 0, i0, i1, i2, i3];
        if let Some(room) = self.buffer.get_mut(header_at..payload_at) {
            room.copy_from_slice(&header);
        }
    }

    /// Forgets what waits to be sent: another connection begins.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.sent = 0;
    }

    /// How many bytes wait to be sent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.buffer.len() - self.sent
    }

    /// Whether nothing waits to be sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends as much as `sink` takes now. `Ok` also when a non-blocking sink takes no more for the moment; an error is
    /// the connection's end.
    pub fn flush(&mut self, sink: &mut impl Write) -> io::Result<()> {
        while let Some(pending) = self.buffer.get(self.sent..).filter(|pending| !pending.is_empty()) {
            match sink.write(pending) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent = self.sent.saturating_add(count).min(self.buffer.len()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.is_empty() {
            self.buffer.clear();
            self.sent = 0;
        } else if self.sent >= self.buffer.len() / 2 {
            self.buffer.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(inbox: &mut Inbox) -> Result<Vec<(u16, u32, Vec<u8>)>, FrameError> {
        let mut all = Vec::new();
        while let Some(frame) = inbox.next_frame()? {
            all.push((frame.kind, frame.id, frame.payload.to_vec()));
        }
        Ok(all)
    }

    /// A source that gives a fixed number of bytes per read.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let step = self.1.min(self.0.len());
            (&mut self.0).take(step as u64).read(buffer)
        }
    }

    #[test]
    fn frames_survive_any_cut_of_the_byte_stream() {
        let sent: Vec<(u16, u32, Vec<u8>)> = vec![
            (1, 0, vec![]),
            (2, 7, vec![1; 5]),
            (3, u32::MAX, vec![2; MAX_PAYLOAD]),
            (4, 1, vec![3; 40_000]),
        ];
        let mut outbox = Outbox::default();
        for (kind, id, payload) in &sent {
            outbox.push(*kind, *id, |out| out.extend_from_slice(payload));
        }
        let mut bytes = Vec::new();
        outbox.flush(&mut bytes).unwrap();
        assert!(outbox.is_empty());
        for step in [1, 11, 12, 13, 4096, 65_548, 1 << 20] {
            let mut inbox = Inbox::default();
            let mut source = Trickle(&bytes, step);
            let mut received = Vec::new();
            while inbox.fill(&mut source).unwrap() > 0 {
                received.extend(frames(&mut inbox).unwrap());
            }
            assert_eq!(received, sent, "reading {step} bytes at a time");
            assert!(!inbox.is_mid_frame());
        }
    }

    #[test]
    fn an_oversized_length_is_refused_before_its_payload_arrives() {
        let mut inbox = Inbox::default();
        let mut header = Vec::from(u32::MAX.to_le_bytes());
        header.extend_from_slice(&[0; 8]);
        inbox.fill(&mut header.as_slice()).unwrap();
        assert_eq!(inbox.next_frame(), Err(FrameError::TooLong(u32::MAX)));
    }

    #[test]
    fn a_reserved_field_that_is_set_is_refused() {
        let mut inbox = Inbox::default();
        inbox.fill(&mut [0_u8, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0].as_slice()).unwrap();
        assert_eq!(inbox.next_frame(), Err(FrameError::Reserved(1)));
    }

    #[test]
    fn an_unfinished_frame_is_noticed() {
        let mut inbox = Inbox::default();
        inbox.fill(&mut [9_u8, 0, 0, 0, 1, 0].as_slice()).unwrap();
        assert_eq!(inbox.next_frame(), Ok(None));
        assert!(inbox.is_mid_frame());
    }

    #[test]
    fn an_outbox_keeps_what_a_sink_that_would_block_has_not_taken() {
        struct Narrow(Vec<u8>, usize);
        impl Write for Narrow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.1 == 0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let count = bytes.len().min(self.1);
                self.1 -= count;
                self.0.extend_from_slice(&bytes[..count]);
                Ok(count)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut outbox = Outbox::default();
        outbox.push(5, 6, |out| out.extend_from_slice(b"payload"));
        let mut sink = Narrow(Vec::new(), 0);
        for _ in 0..19 {
            assert!(!outbox.is_empty());
            sink.1 = 1;
            outbox.flush(&mut sink).unwrap();
        }
        assert!(outbox.is_empty());
        let mut inbox = Inbox::default();
        inbox.fill(&mut sink.0.as_slice()).unwrap();
        assert_eq!(frames(&mut inbox).unwrap(), [(5, 6, b"payload".to_vec())]);
    }
}
