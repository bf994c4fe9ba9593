//! What a snapshot keeps of the doorbell.

use harrier_hypercall_abi::Status;
use harrier_hypercall_abi::block::{CHANNELS, PAYLOAD};
use harrier_hypercall_abi::port::event;
use serde::{Deserialize, Serialize};

use super::channels::{Answer, ChannelState};
use super::{Doorbell, DoorbellState, PendingCheckpoint};
use crate::state::{BadState, Stateful};

/// The device, its pending events, and what its calls have left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// What the guest said that it will use.
    pub guest_features: u64,
    /// Doorbell writes that named no block.
    pub rejected: u32,
    /// Pending events.
    pub events: u32,
    /// The last answer on each channel that was used.
    pub channels: Vec<SavedChannel>,
    /// The calls' own part.
    pub calls: serde_json::Value,
    /// A CHECKPOINT call that waits for this very snapshot. Version 1 had none.
    #[serde(default)]
    pub checkpoint: Option<PendingCheckpoint>,
}

/// The last numbered call of a channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedChannel {
    /// The channel.
    pub channel: u32,
    /// Its last sequence number.
    pub sequence: u64,
    /// The call's number.
    pub number: u16,
    /// How it ended.
    pub status: i32,
    /// Bytes of `result` that are valid.
    pub result_len: u32,
    /// The result.
    pub result: Vec<u8>,
}

impl Stateful for Doorbell {
    type State = Saved;
    const NAME: &'static str = "doorbell";
    const VERSION: u32 = 2;
    const OLDEST_VERSION: u32 = 1;

    fn save(&self) -> Saved {
        let DoorbellState { guest_features, rejected, channels } = self.state();
        let channels =
            channels.into_iter().map(|ChannelState { channel, sequence, number, answer }| SavedChannel {
                channel,
                sequence,
                number,
                status: answer.status as i32,
                result_len: answer.result_len,
                result: answer.result.to_vec(),
            });
        Saved {
            guest_features,
            rejected,
            events: self.events.pending(),
            channels: channels.collect(),
            calls: self.calls.save(),
            checkpoint: self.checkpoint,
        }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), BadState> {
        let count = saved.channels.len();
        BadState::unless(count <= CHANNELS as usize, || format!("{count} channels are too many"))?;
        let mut channels = Vec::new();
        for last in saved.channels {
            let status = Status::from_value(last.status)
                .ok_or_else(|| BadState(format!("no status is {}", last.status)))?;
            let result: [u8; PAYLOAD] = last
                .result
                .try_into()
                .map_err(|result: Vec<u8>| BadState(format!("a result of {} bytes", result.len())))?;
            BadState::unless(last.result_len as usize <= PAYLOAD, || {
                format!("{} bytes of a result", last.result_len)
            })?;
            channels.push(ChannelState {
                channel: last.channel,
                sequence: last.sequence,
                number: last.number,
                answer: Answer { status, result_len: last.result_len, result },
            });
        }
        self.set_state(&DoorbellState {
            guest_features: saved.guest_features,
            rejected: saved.rejected,
            channels,
        });
        self.calls.restore(&saved.calls)?;
        self.calls.agreed(saved.guest_features);
        // What the host that took the snapshot asked for is over.
        self.events.raise(saved.events & !event::QUIESCE);
        if let Some(pending) = saved.checkpoint {
            BadState::unless(pending.channel < CHANNELS, || format!("channel {}", pending.channel))?;
            self.checkpoint = Some(pending);
            self.checkpoint_returns();
        }
        Ok(())
    }
}
