//! Sequence numbers: a call that is made again with its number is answered from memory.
//!
//! A guest that is not sure whether its call was made, because it was restored in between, makes it again with the
//! same number.

use harrier_hypercall_abi::Status;
use harrier_hypercall_abi::block::{CHANNELS, PAYLOAD};

/// What a call answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// How it ended.
    pub status: Status,
    /// Bytes of `result` that are valid.
    pub result_len: u32,
    /// The result; zeros behind it.
    pub result: [u8; PAYLOAD],
}

impl Answer {
    /// A success with these bytes, of which a block has room for [`PAYLOAD`].
    pub(super) fn ok(bytes: &[u8]) -> Self {
        let mut result = [0; PAYLOAD];
        for (to, from) in result.iter_mut().zip(bytes) {
            *to = *from;
        }
        Answer { status: Status::Ok, result_len: bytes.len().min(PAYLOAD) as u32, result }
    }

    /// An error without result.
    pub(super) fn error(status: Status) -> Self {
        Answer { status, ..Answer::ok(&[]) }
    }

    /// Success or error, without result.
    pub(super) fn plain(ended: Result<(), Status>) -> Self {
        Answer::error(ended.err().unwrap_or(Status::Ok))
    }
}

/// The last numbered call of a channel, as a snapshot keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelState {
    /// The channel, below [`CHANNELS`].
    pub channel: u32,
    /// Its last sequence number, not zero.
    pub sequence: u64,
    /// The call's number.
    pub number: u16,
    /// What it answered.
    pub answer: Answer,
}

/// Whether a call is to be made.
pub(super) enum Lookup {
    New,
    Made(Answer),
    Stale,
}

/// The channels that were used.
#[derive(Default)]
pub(super) struct Channels {
    /// Sorted by channel; at most [`CHANNELS`].
    used: Vec<ChannelState>,
}

impl Channels {
    pub(super) fn look_up(&self, channel: u32, sequence: u64, number: u16) -> Lookup {
        if sequence == 0 {
            return Lookup::New;
        }
        let last = self.used.binary_search_by_key(&channel, |last| last.channel).ok();
        match last.and_then(|at| self.used.get(at)) {
            Some(last) if sequence == last.sequence && number == last.number => {
                Lookup::Made(last.answer.clone())
            }
            Some(last) if sequence <= last.sequence => Lookup::Stale,
            _ => Lookup::New,
        }
    }

    pub(super) fn remember(&mut self, channel: u32, sequence: u64, number: u16, answer: &Answer) {
        if sequence == 0 || channel >= CHANNELS {
            return;
        }
        let made = ChannelState { channel, sequence, number, answer: answer.clone() };
        match self.used.binary_search_by_key(&channel, |last| last.channel) {
            Ok(at) => {
                if let Some(last) = self.used.get_mut(at) {
                    *last = made;
                }
            }
            Err(at) => self.used.insert(at, made),
        }
    }

    pub(super) fn state(&self) -> Vec<ChannelState> {
        self.used.clone()
    }

    pub(super) fn from_state(state: &[ChannelState]) -> Self {
        let mut channels = Channels::default();
        for last in state {
            channels.remember(last.channel, last.sequence, last.number, &last.answer);
        }
        channels
    }
}
