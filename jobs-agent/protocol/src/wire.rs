//! Reading and writing the primitives that messages are made of: little-endian integers and length-prefixed
//! byte strings. [`Reader`] is total: whatever the bytes, it answers with a value or a [`DecodeError`].

/// Why a frame's payload is not the message that its kind promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload ends before the message does.
    #[error("the message is truncated")]
    Truncated,
    /// Bytes are left over behind the message.
    #[error("{0} bytes are left over behind the message")]
    TrailingBytes(usize),
    /// No message of this side has this kind.
    #[error("unknown message kind {0}")]
    UnknownKind(u16),
    /// A field holds a value that it cannot have.
    #[error("field {field} has the invalid value {value}")]
    InvalidField {
        /// The field's name.
        field: &'static str,
        /// What was found.
        value: u64,
    },
    /// The first frame does not open with the protocol's magic number.
    #[error("the peer does not speak the agent protocol")]
    WrongMagic,
}

/// A cursor over a payload.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A byte string with its length in front. The length is checked against what is there, never allocated from.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|_| DecodeError::Truncated)?)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The message must end where the payload does.
    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::TrailingBytes(self.rest.len())) }
    }
}

/// Appends a byte string with its length in front. Callers bound `bytes` far below 4 GiB.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}
