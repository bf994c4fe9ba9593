//! The doorbell: where a guest makes hypercalls, and where the host signals events to it.
//!
//! [`Doorbell`] sits at the ports of [`harrier_hypercall_abi::port`]. A write of an argument block's place makes a
//! call: the block is read once, checked, and answered before the port access ends. What the calls do is behind one
//! trait, [`Hypercalls`]. [`Events`] is the other direction: bits that stay pending, with a level interrupt, until the
//! guest clears them.
//!
//! Nothing that the guest passes is trusted: blocks and lists are copied before they are looked at, every length has
//! a cap in the ABI, and what goes wrong is a status for the guest and a thinned-out log line. A call is made once
//! for each sequence number ([`channels`]).

pub mod channels;
mod checkpoint;
mod events;
pub mod state;
#[cfg(test)]
mod tests;

use harrier_engine::{Flow, GuestMemory};
use harrier_hypercall_abi::block::{self, ALIGN, Block, CHANNELS, RESULT_OFFSET, STATUS_OFFSET};
use harrier_hypercall_abi::calls::{
    self, CONSOLE_MAX, Call, CheckpointArgs, CheckpointResult, ClockArgs, ClockResult, ConsoleArgs,
    ConsoleResult, DEVICE_NO_INTERRUPT, DEVICE_NONE, DeviceArgs, DeviceResult, EXIT_CODE_MAX, EXIT_REASONS,
    ExitArgs, FeaturesArgs, FeaturesResult, IdentityResult, MEM_RELEASE_MAX_BYTES, MEM_RELEASE_MAX_RANGES,
    MarkArgs, MemRange, MemReleaseArgs, MemReleaseResult, PARK_FIRST_VECTOR, PHASES, ParkArgs, QUIESCE_ASK,
    QUIESCE_READY, QuiesceArgs, QuiesceResult, number,
};
use harrier_hypercall_abi::{Status, VERSION, VERSION_MAJOR, port};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::bus::BusDevice;
use crate::guest_error::GuestErrors;
use crate::state::BadState;
use channels::{Answer, Channels, Lookup};
pub use checkpoint::PendingCheckpoint;
pub use events::Events;

/// Bytes of the console that are copied at a time.
const CONSOLE_CHUNK: usize = 4096;
const PAGE: u64 = 4096;

/// What the calls do. Everything has been checked against the ABI's caps before; addresses that lie in memory or not
/// are the implementation's to find out.
pub trait Hypercalls: Send {
    /// The feature bits of the calls that are offered; the others are answered with [`Status::Unsupported`].
    fn features(&self) -> u64;
    /// The guest has said which features it uses; also called when a state is taken up.
    fn agreed(&mut self, guest_features: u64);
    /// Writes to the console and answers how many bytes it took. Fewer than all: there is no room, and
    /// [`port::event::CONSOLE_ROOM`] is signalled when there is.
    fn console(&mut self, bytes: &[u8]) -> usize;
    /// Notes that `phase` begins. `name` is printable ASCII of at most 32 characters.
    ///
    /// # Errors
    /// [`Status::Full`] if no more marks are kept.
    fn mark(&mut self, phase: u32, name: &str, value: u64) -> Result<(), Status>;
    /// Writes the clock page for a guest whose TSC is `tsc` now.
    ///
    /// # Errors
    /// A status if the host has no clock to show.
    fn clock(&mut self, tsc: u64) -> Result<ClockResult, Status>;
    /// A processor begins to wait; the device makes it wait.
    fn park(&mut self, park: &ParkArgs);
    /// Gives the pages of `range`, which is page aligned and not empty, back to the host. They read as zero.
    ///
    /// # Errors
    /// [`Status::BadPointer`] if the range is not in one piece of memory; [`Status::HostFailed`].
    fn release(&mut self, range: MemRange) -> Result<(), Status>;
    /// Has a snapshot taken, and the calling processor held until [`Doorbell::checkpoint_done`] or
    /// [`Doorbell::checkpoint_failed`] has been called.
    ///
    /// # Errors
    /// [`Status::Full`] if no snapshot is to be had now.
    fn checkpoint(&mut self) -> Result<(), Status>;
    /// Who the machine is.
    fn who(&self) -> CheckpointResult;
    /// Who the machine is, with randomness for it alone.
    ///
    /// # Errors
    /// [`Status::HostFailed`] if the host has no randomness.
    fn identity(&mut self) -> Result<IdentityResult, Status>;
    /// Where the device of this number is, from zero; none above the last.
    fn device(&self, index: u32) -> Option<DeviceResult>;
    /// What the host wants of the guest's coming to rest.
    fn quiesce_wanted(&mut self) -> QuiesceResult;
    /// The guest has come to rest, as a request wants it.
    ///
    /// # Errors
    /// [`Status::Stale`] if the request is over or was never made.
    fn quiesce_ready(&mut self, request: u64) -> Result<(), Status>;
    /// What a snapshot has to keep of what the calls did.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// Takes up what [`Hypercalls::save`] gave.
    ///
    /// # Errors
    /// [`BadState`] if it is not such.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<(), BadState> {
        Ok(())
    }
    /// Ends the run. `message` is printable ASCII of at most 32 characters.
    fn exit(&mut self, code: u8, reason: u32, message: &str);
}

/// Where the doorbell is found, besides its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoorbellConfig {
    /// Guest-physical address of the shared page.
    pub shared_page_gpa: u64,
    /// Global system interrupt of the doorbell.
    pub gsi: u32,
}

/// What of a doorbell outlives a snapshot, besides [`Events`]' pending bits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DoorbellState {
    /// What the guest said that it will use.
    pub guest_features: u64,
    /// Doorbell writes that named no block.
    pub rejected: u32,
    /// The last answer on each channel that was used.
    pub channels: Vec<channels::ChannelState>,
}

/// The device.
pub struct Doorbell {
    config: DoorbellConfig,
    memory: GuestMemory,
    events: Events,
    calls: Box<dyn Hypercalls>,
    channels: Channels,
    guest_features: u64,
    rejected: u32,
    /// A CHECKPOINT call that has not ended.
    checkpoint: Option<PendingCheckpoint>,
    errors: GuestErrors,
}

/// How a call ended, and what the processor does next.
struct Done {
    answer: Answer,
    flow: Flow,
}

impl Doorbell {
    /// A doorbell for a guest with this memory.
    pub fn new(
        config: DoorbellConfig,
        memory: GuestMemory,
        events: Events,
        calls: Box<dyn Hypercalls>,
    ) -> Self {
        Doorbell {
            config,
            memory,
            events,
            calls,
            channels: Channels::default(),
            guest_features: 0,
            rejected: 0,
            checkpoint: None,
            errors: GuestErrors::default(),
        }
    }

    /// What a snapshot keeps.
    pub fn state(&self) -> DoorbellState {
        DoorbellState {
            guest_features: self.guest_features,
            rejected: self.rejected,
            channels: self.channels.state(),
        }
    }

    /// Takes over what a snapshot kept. Channels beyond the ABI's number are left out.
    pub fn set_state(&mut self, state: &DoorbellState) {
        self.guest_features = state.guest_features;
        self.rejected = state.rejected;
        self.channels = Channels::from_state(&state.channels);
    }

    /// What the guest said that it will use.
    pub fn guest_features(&self) -> u64 {
        self.guest_features
    }

    fn register(&self, offset: u64) -> Option<u32> {
        let features = self.calls.features();
        Some(match u16::try_from(offset).ok()? {
            port::REG_SIGNATURE => port::SIGNATURE,
            port::REG_VERSION => VERSION,
            port::REG_FEATURES_LOW => features as u32,
            port::REG_FEATURES_HIGH => (features >> 32) as u32,
            port::REG_EVENTS => self.events.pending(),
            port::REG_SHARED_PAGE => (self.config.shared_page_gpa / PAGE) as u32,
            port::REG_INTERRUPT => self.config.gsi,
            port::REG_REJECTED => self.rejected,
            _ => return None,
        })
    }

    /// Answers the call whose block is at `place` times the alignment.
    fn ring(&mut self, place: u32) -> Flow {
        let gpa = GuestAddress(u64::from(place) * ALIGN);
        let mut bytes = [0; Block::SIZE];
        if self.memory.read_slice(&mut bytes, gpa).is_err() {
            return self.reject(gpa);
        }
        let block = Block::from_bytes(&bytes);
        let done = match self.check(&block) {
            Ok(call) => self.call(call, &block, gpa),
            Err(status) => Done { answer: Answer::error(status), flow: Flow::Continue },
        };
        let answer = &done.answer;
        if answer.status != Status::Ok {
            self.errors.report(
                "hypercall",
                format_args!("call {} on channel {}: {}", block.number, block.channel, answer.status.name()),
            );
        }
        match self.write_answer(gpa, answer) {
            Ok(()) => done.flow,
            // The memory was there a moment ago.
            Err(_) => self.reject(gpa),
        }
    }

    /// Writes an answer into the block at `gpa`.
    fn write_answer(&self, gpa: GuestAddress, answer: &Answer) -> Result<(), GuestMemoryError> {
        // Results first: who sees the status sees them.
        let result = answer.result.get(..answer.result_len as usize).unwrap_or_default();
        let mut ending = [0; 8];
        let (status, len) = ending.split_at_mut(4);
        status.copy_from_slice(&(answer.status as i32).to_le_bytes());
        len.copy_from_slice(&answer.result_len.to_le_bytes());
        let at = |offset: u64| GuestAddress(gpa.0.saturating_add(offset));
        self.memory.write_slice(result, at(RESULT_OFFSET))?;
        self.memory.write_slice(&ending, at(STATUS_OFFSET))
    }

    fn reject(&mut self, gpa: GuestAddress) -> Flow {
        self.rejected = self.rejected.wrapping_add(1);
        self.errors.report("hypercall", format_args!("no memory for a block at {:#x}", gpa.0));
        Flow::Continue
    }

    fn check(&self, block: &Block) -> Result<&'static Call, Status> {
        if block.version != VERSION_MAJOR {
            return Err(Status::BadVersion);
        }
        let call = calls::find(block.number).ok_or(Status::UnknownCall)?;
        if call.reserved || (call.feature != 0 && self.calls.features() & call.feature == 0) {
            return Err(Status::Unsupported);
        }
        if block.args_len as usize != call.args_len() {
            return Err(Status::BadLength);
        }
        if block.flags != 0 || block.channel >= CHANNELS {
            return Err(Status::BadArgument);
        }
        Ok(call)
    }

    /// Makes the call, unless its sequence number says that it has been made.
    fn call(&mut self, call: &Call, block: &Block, gpa: GuestAddress) -> Done {
        match self.channels.look_up(block.channel, block.sequence, block.number) {
            Lookup::New => {}
            // What is to be the caller's alone is not said again from memory, least of all in a copy of the machine.
            Lookup::Made(_) if call.number == number::IDENTITY => {}
            Lookup::Made(answer) => return Done { answer, flow: Flow::Continue },
            Lookup::Stale => return Done { answer: Answer::error(Status::Stale), flow: Flow::Continue },
        }
        let mut flow = Flow::Continue;
        let answer = if call.number == number::CHECKPOINT {
            let (channel, sequence) = (block.channel, block.sequence);
            let pending = PendingCheckpoint { gpa: gpa.0, channel, sequence };
            let answer = self.checkpoint(CheckpointArgs::from_bytes(&block.args), pending);
            if answer.status == Status::Ok {
                flow = Flow::Leave;
            }
            answer
        } else {
            self.dispatch(call.number, &block.args, &mut flow)
        };
        self.channels.remember(block.channel, block.sequence, block.number, &answer);
        Done { answer, flow }
    }

    fn dispatch(&mut self, number: u16, args: &[u8; block::PAYLOAD], flow: &mut Flow) -> Answer {
        match number {
            number::FEATURES => self.features(FeaturesArgs::from_bytes(args)),
            number::CONSOLE => self.console(ConsoleArgs::from_bytes(args)),
            number::MARK => Answer::plain(self.mark(&MarkArgs::from_bytes(args))),
            number::CLOCK => match self.calls.clock(ClockArgs::from_bytes(args).tsc) {
                Ok(result) => Answer::ok(&result.to_bytes()),
                Err(status) => Answer::error(status),
            },
            number::PARK => {
                let parked = self.park(&ParkArgs::from_bytes(args));
                if parked.is_ok() {
                    *flow = Flow::Halt;
                }
                Answer::plain(parked)
            }
            number::MEM_RELEASE => self.release(MemReleaseArgs::from_bytes(args)),
            number::EXIT => {
                let ended = self.exit(&ExitArgs::from_bytes(args));
                if ended.is_ok() {
                    *flow = Flow::Leave;
                }
                Answer::plain(ended)
            }
            number::QUIESCE => self.quiesce(QuiesceArgs::from_bytes(args)),
            number::IDENTITY => match self.calls.identity() {
                Ok(result) => Answer::ok(&result.to_bytes()),
                Err(status) => Answer::error(status),
            },
            number::DEVICE => self.device(DeviceArgs::from_bytes(args)),
            // In the table, and not reserved: whoever adds a call adds it here.
            _ => Answer::error(Status::Unsupported),
        }
    }

    fn features(&mut self, args: FeaturesArgs) -> Answer {
        self.guest_features = args.guest_features;
        self.calls.agreed(args.guest_features);
        let result = FeaturesResult {
            features: self.calls.features(),
            shared_page: self.config.shared_page_gpa,
            version: VERSION,
            interrupt: self.config.gsi,
            console_max: CONSOLE_MAX,
            mem_release_max_ranges: MEM_RELEASE_MAX_RANGES,
        };
        Answer::ok(&result.to_bytes())
    }

    fn device(&self, args: DeviceArgs) -> Answer {
        if args.reserved != 0 {
            return Answer::error(Status::BadArgument);
        }
        let none =
            DeviceResult { kind: DEVICE_NONE, interrupt: DEVICE_NO_INTERRUPT, base: 0, len: 0, reserved: 0 };
        Answer::ok(&self.calls.device(args.index).unwrap_or(none).to_bytes())
    }

    fn console(&mut self, args: ConsoleArgs) -> Answer {
        if args.reserved != 0 {
            return Answer::error(Status::BadArgument);
        }
        if args.len > CONSOLE_MAX {
            return Answer::error(Status::BadLength);
        }
        let mut accepted = 0;
        let mut chunk = [0; CONSOLE_CHUNK];
        while accepted < args.len {
            let count = ((args.len - accepted) as usize).min(CONSOLE_CHUNK);
            let Some(bytes) = chunk.get_mut(..count) else { break };
            let readable = args
                .gpa
                .checked_add(accepted.into())
                .is_some_and(|gpa| self.memory.read_slice(bytes, GuestAddress(gpa)).is_ok());
            if !readable {
                let result = ConsoleResult { accepted, reserved: 0 };
                return Answer { status: Status::BadPointer, ..Answer::ok(&result.to_bytes()) };
            }
            let taken = self.calls.console(bytes).min(count);
            accepted += taken as u32;
            if taken < count {
                break;
            }
        }
        Answer::ok(&ConsoleResult { accepted, reserved: 0 }.to_bytes())
    }

    fn mark(&mut self, args: &MarkArgs) -> Result<(), Status> {
        let known = PHASES.iter().any(|(phase, ..)| *phase == args.phase);
        let name = text(&args.name).ok_or(Status::BadArgument)?;
        if args.reserved != 0 || !known || (args.phase == 0 && name.is_empty()) {
            return Err(Status::BadArgument);
        }
        self.calls.mark(args.phase, name, args.value)
    }

    fn park(&mut self, args: &ParkArgs) -> Result<(), Status> {
        if args.apic_id >= CHANNELS || (args.vector != 0 && !(PARK_FIRST_VECTOR..256).contains(&args.vector))
        {
            return Err(Status::BadArgument);
        }
        self.calls.park(args);
        Ok(())
    }

    fn release(&mut self, args: MemReleaseArgs) -> Answer {
        if args.reserved != 0 {
            return Answer::error(Status::BadArgument);
        }
        if args.count > MEM_RELEASE_MAX_RANGES {
            return Answer::error(Status::BadLength);
        }
        if !args.list_gpa.is_multiple_of(8) {
            return Answer::error(Status::BadPointer);
        }
        let mut result = MemReleaseResult::default();
        let ended = self.release_ranges(&args, &mut result);
        Answer { status: ended.err().unwrap_or(Status::Ok), ..Answer::ok(&result.to_bytes()) }
    }

    fn release_ranges(&mut self, args: &MemReleaseArgs, result: &mut MemReleaseResult) -> Result<(), Status> {
        for index in 0..args.count {
            // One at a time: a range may release the list itself, which then reads as zeros.
            let mut bytes = [0; MemRange::SIZE];
            let at = args.list_gpa.checked_add(u64::from(index) * MemRange::SIZE as u64);
            let at = at.ok_or(Status::BadPointer)?;
            self.memory.read_slice(&mut bytes, GuestAddress(at)).map_err(|_| Status::BadPointer)?;
            let range = MemRange::from_bytes(&bytes);
            if range.len == 0 || !range.len.is_multiple_of(PAGE) {
                return Err(Status::BadLength);
            }
            if !range.gpa.is_multiple_of(PAGE) || range.gpa.checked_add(range.len).is_none() {
                return Err(Status::BadPointer);
            }
            if result.released_bytes.saturating_add(range.len) > MEM_RELEASE_MAX_BYTES {
                return Err(Status::BadLength);
            }
            self.calls.release(range)?;
            result.released_bytes += range.len;
            result.done += 1;
        }
        Ok(())
    }

    fn quiesce(&mut self, args: QuiesceArgs) -> Answer {
        match (args.op, args.reserved, args.request) {
            (QUIESCE_ASK, 0, 0) => {}
            (QUIESCE_READY, 0, request) => {
                if let Err(status) = self.calls.quiesce_ready(request) {
                    return Answer::error(status);
                }
            }
            _ => return Answer::error(Status::BadArgument),
        }
        Answer::ok(&self.calls.quiesce_wanted().to_bytes())
    }

    fn exit(&mut self, args: &ExitArgs) -> Result<(), Status> {
        let known = EXIT_REASONS.iter().any(|(reason, ..)| *reason == args.reason);
        let message = text(&args.message).ok_or(Status::BadArgument)?;
        if args.code > EXIT_CODE_MAX || !known {
            return Err(Status::BadArgument);
        }
        self.calls.exit(args.code as u8, args.reason, message);
        Ok(())
    }
}

/// The text up to the first zero byte, if it is printable ASCII.
fn text(bytes: &[u8]) -> Option<&str> {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let printable = bytes.iter().all(|byte| (b' '..=b'~').contains(byte));
    printable.then(|| std::str::from_utf8(bytes).ok()).flatten()
}

impl BusDevice for Doorbell {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        if let (Ok(to), Some(value)) = (<&mut [u8; 4]>::try_from(data), self.register(offset)) {
            *to = value.to_le_bytes();
        }
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return Flow::Continue };
        match u16::try_from(offset) {
            Ok(port::REG_DOORBELL) => self.ring(value),
            Ok(port::REG_EVENTS) => {
                self.events.clear(value);
                Flow::Continue
            }
            _ => Flow::Continue,
        }
    }
}
