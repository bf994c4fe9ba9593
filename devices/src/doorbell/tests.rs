use std::sync::{Arc, Mutex};

use harrier_engine::{Flow, GuestMemory};
use harrier_hypercall_abi::block::Block;
use harrier_hypercall_abi::calls::{self, number};
use harrier_hypercall_abi::{Status, features, port};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::interrupt::tests::RecordedLine;
use crate::state::Stateful;

const MEMORY: usize = 1 << 20;
const BLOCK: u64 = 0x1000;
const BUFFER: u64 = 0x2000;
const ALL: u64 = features::CONSOLE
    | features::MARK
    | features::CLOCK
    | features::PARK
    | features::MEM_RELEASE
    | features::EXIT
    | features::CHECKPOINT
    | features::QUIESCE
    | features::IDENTITY
    | features::DEVICE;

/// What the calls did.
#[derive(Default)]
struct Seen {
    console: Vec<u8>,
    console_room: Option<usize>,
    marks: Vec<(u32, String, u64)>,
    parks: Vec<ParkArgs>,
    released: Vec<MemRange>,
    exits: Vec<(u8, u32, String)>,
    agreed: Vec<u64>,
    checkpoints: usize,
    identities: u8,
    ready: Vec<u64>,
}

struct Machine {
    features: u64,
    seen: Arc<Mutex<Seen>>,
    who: CheckpointResult,
}

impl Hypercalls for Machine {
    fn features(&self) -> u64 {
        self.features
    }
    fn device(&self, index: u32) -> Option<DeviceResult> {
        let device = DeviceResult {
            kind: calls::DEVICE_VIRTIO_MMIO,
            interrupt: 16,
            base: 0xd000_0000,
            len: 0x1000,
            reserved: 0,
        };
        (index < 2).then_some(device)
    }
    fn console(&mut self, bytes: &[u8]) -> usize {
        let mut seen = self.seen.lock().unwrap();
        let room = seen.console_room.map_or(bytes.len(), |room| room.saturating_sub(seen.console.len()));
        let taken = bytes.len().min(room);
        seen.console.extend_from_slice(&bytes[..taken]);
        taken
    }
    fn mark(&mut self, phase: u32, name: &str, value: u64) -> Result<(), Status> {
        let marks = &mut self.seen.lock().unwrap().marks;
        if marks.len() == 2 {
            return Err(Status::Full);
        }
        marks.push((phase, name.to_owned(), value));
        Ok(())
    }
    fn clock(&mut self, tsc: u64) -> Result<ClockResult, Status> {
        Ok(ClockResult { clock_page: 0x3000, monotonic_ns: tsc, wall_ns: -1 })
    }
    fn park(&mut self, park: &ParkArgs) {
        self.seen.lock().unwrap().parks.push(*park);
    }
    fn release(&mut self, range: MemRange) -> Result<(), Status> {
        if range.gpa + range.len > MEMORY as u64 {
            return Err(Status::BadPointer);
        }
        self.seen.lock().unwrap().released.push(range);
        Ok(())
    }
    fn agreed(&mut self, guest_features: u64) {
        self.seen.lock().unwrap().agreed.push(guest_features);
    }
    fn checkpoint(&mut self) -> Result<(), Status> {
        self.seen.lock().unwrap().checkpoints += 1;
        Ok(())
    }
    fn who(&self) -> CheckpointResult {
        self.who
    }
    fn identity(&mut self) -> Result<IdentityResult, Status> {
        let identities = &mut self.seen.lock().unwrap().identities;
        *identities += 1;
        let CheckpointResult { generation, role, clone_index } = self.who;
        Ok(IdentityResult { generation, role, clone_index, entropy: [*identities; 32] })
    }
    fn quiesce_wanted(&mut self) -> QuiesceResult {
        QuiesceResult { request: 5, remaining_ms: 77, reserved: 0 }
    }
    fn quiesce_ready(&mut self, request: u64) -> Result<(), Status> {
        if request != 5 {
            return Err(Status::Stale);
        }
        self.seen.lock().unwrap().ready.push(request);
        Ok(())
    }
    fn exit(&mut self, code: u8, reason: u32, message: &str) {
        self.seen.lock().unwrap().exits.push((code, reason, message.to_owned()));
    }
}

struct Guest {
    doorbell: Doorbell,
    memory: GuestMemory,
    line: Arc<RecordedLine>,
    events: Events,
    seen: Arc<Mutex<Seen>>,
}

fn guest_with(features: u64) -> Guest {
    guest_of(features, CheckpointResult::default())
}

fn guest_of(features: u64, who: CheckpointResult) -> Guest {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let line = Arc::new(RecordedLine::default());
    let events = Events::new(line.clone());
    let seen = Arc::new(Mutex::new(Seen::default()));
    let config = DoorbellConfig { shared_page_gpa: 0xf_f000, gsi: 3 };
    let calls = Box::new(Machine { features, seen: seen.clone(), who });
    let doorbell = Doorbell::new(config, memory.clone(), events.clone(), calls);
    Guest { doorbell, memory, line, events, seen }
}

fn guest() -> Guest {
    guest_with(ALL)
}

fn block(number: u16, args: &[u8]) -> Block {
    let mut block = Block {
        version: VERSION_MAJOR,
        number,
        args_len: args.len() as u32,
        status: Status::Pending as i32,
        ..Block::default()
    };
    block.args[..args.len()].copy_from_slice(args);
    block
}

impl Guest {
    fn ring(&mut self, block: &Block) -> (Flow, Block) {
        self.memory.write_slice(&block.to_bytes(), GuestAddress(BLOCK)).unwrap();
        let place = (BLOCK / ALIGN) as u32;
        let flow = self.doorbell.write(port::REG_DOORBELL.into(), &place.to_le_bytes());
        let mut bytes = [0; Block::SIZE];
        self.memory.read_slice(&mut bytes, GuestAddress(BLOCK)).unwrap();
        (flow, Block::from_bytes(&bytes))
    }

    fn call(&mut self, number: u16, args: &[u8]) -> (Status, Vec<u8>) {
        self.made(&block(number, args))
    }

    fn made(&mut self, block: &Block) -> (Status, Vec<u8>) {
        let (_, answer) = self.ring(block);
        let result = answer.result[..answer.result_len as usize].to_vec();
        (Status::from_value(answer.status).unwrap(), result)
    }

    fn register(&mut self, register: u16) -> u32 {
        let mut bytes = [0; 4];
        assert_eq!(self.doorbell.read(register.into(), &mut bytes), Flow::Continue);
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn a_guest_finds_everything_at_the_port() {
    let mut guest = guest();
    let registers = [
        (port::REG_SIGNATURE, u32::from_le_bytes(*b"HARV")),
        (port::REG_VERSION, 0x1_0002),
        (port::REG_FEATURES_LOW, ALL as u32),
        (port::REG_FEATURES_HIGH, 0),
        (port::REG_EVENTS, 0),
        (port::REG_SHARED_PAGE, 0xff),
        (port::REG_INTERRUPT, 3),
        (port::REG_REJECTED, 0),
    ];
    for (register, value) in registers {
        assert_eq!(guest.register(register), value, "{register:#x}");
    }
    let (status, result) = guest.call(number::FEATURES, &7u64.to_le_bytes());
    assert_eq!(status, Status::Ok);
    let result = FeaturesResult::from_bytes(&result);
    assert_eq!((result.features, result.shared_page, result.interrupt), (ALL, 0xf_f000, 3));
    assert_eq!((result.console_max, result.mem_release_max_ranges), (65536, 512));
    assert_eq!(guest.doorbell.guest_features(), 7);
}

#[test]
fn other_widths_and_odd_offsets_reach_nothing() {
    let mut guest = guest();
    guest.memory.write_slice(&block(number::EXIT, &[0; 40]).to_bytes(), GuestAddress(BLOCK)).unwrap();
    let place = BLOCK / ALIGN;
    for data in [&place.to_le_bytes()[..1], &place.to_le_bytes()[..2], &place.to_le_bytes()[..8]] {
        assert_eq!(guest.doorbell.write(0, data), Flow::Continue);
    }
    for offset in [1, 4, 8, 28, 31, u64::MAX] {
        assert_eq!(guest.doorbell.write(offset, &(place as u32).to_le_bytes()), Flow::Continue);
    }
    assert!(guest.seen.lock().unwrap().exits.is_empty());
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (32, 4), (u64::MAX, 4)] {
        let mut data = vec![0; len];
        let _ = guest.doorbell.read(offset, &mut data);
        assert_eq!(data, vec![0xff; len], "{offset} {len}");
    }
}

#[test]
fn what_is_wrong_with_a_block_is_said_in_it() {
    let mut guest = guest();
    let good = block(number::FEATURES, &[0; 8]);
    for (bad, status) in [
        (Block { version: 0, ..good }, Status::BadVersion),
        (Block { version: 2, ..good }, Status::BadVersion),
        (Block { number: 0, ..good }, Status::UnknownCall),
        (Block { number: 12, ..good }, Status::UnknownCall),
        (Block { number: u16::MAX, ..good }, Status::UnknownCall),
        (Block { args_len: 7, ..good }, Status::BadLength),
        (Block { args_len: 9, ..good }, Status::BadLength),
        (Block { args_len: u32::MAX, ..good }, Status::BadLength),
        (Block { channel: 256, ..good }, Status::BadArgument),
        (Block { flags: 1, ..good }, Status::BadArgument),
        (Block { number: number::CHECKPOINT, args_len: 0, ..good }, Status::BadLength),
    ] {
        let (flow, answer) = guest.ring(&bad);
        assert_eq!((flow, Status::from_value(answer.status)), (Flow::Continue, Some(status)), "{bad:?}");
        assert_eq!(answer.result_len, 0);
        assert_eq!((answer.version, answer.number, answer.args), (bad.version, bad.number, bad.args));
    }
    assert_eq!(guest.ring(&Block { channel: 255, ..good }).1.status, 0);
}

#[test]
fn a_block_outside_memory_is_counted_and_nothing_is_written() {
    let mut guest = guest();
    // The last block of memory works; one that begins in memory and ends outside does not.
    let end = MEMORY as u64;
    guest.memory.write_slice(&block(99, &[]).to_bytes(), GuestAddress(end - 128)).unwrap();
    for gpa in [end - 64, end, u64::from(u32::MAX) * ALIGN] {
        let place = (gpa / ALIGN) as u32;
        assert_eq!(guest.doorbell.write(0, &place.to_le_bytes()), Flow::Continue);
    }
    assert_eq!(guest.register(port::REG_REJECTED), 3);
    let place = ((end - 128) / ALIGN) as u32;
    let _ = guest.doorbell.write(0, &place.to_le_bytes());
    assert_eq!(guest.register(port::REG_REJECTED), 3);
    let status: i32 = guest.memory.read_obj(GuestAddress(end - 128 + STATUS_OFFSET)).unwrap();
    assert_eq!(status, Status::UnknownCall as i32);
}

#[test]
fn a_feature_that_is_not_offered_is_not_reached() {
    let mut guest = guest_with(0);
    for call in calls::CALLS.iter().filter(|call| !call.reserved && call.feature != 0) {
        let (status, _) = guest.call(call.number, &vec![0; call.args_len()]);
        assert_eq!(status, Status::Unsupported, "{}", call.name);
    }
    assert_eq!(guest.call(number::FEATURES, &[0; 8]).0, Status::Ok);
}

#[test]
fn a_whole_buffer_goes_to_the_console() {
    let mut guest = guest();
    let text: Vec<u8> = (0..calls::CONSOLE_MAX).map(|index| index as u8).collect();
    guest.memory.write_slice(&text, GuestAddress(BUFFER + 1)).unwrap();
    let args = |gpa, len| ConsoleArgs { gpa, len, reserved: 0 }.to_bytes();
    let (status, result) = guest.call(number::CONSOLE, &args(BUFFER + 1, calls::CONSOLE_MAX));
    assert_eq!((status, ConsoleResult::from_bytes(&result).accepted), (Status::Ok, calls::CONSOLE_MAX));
    assert!(guest.seen.lock().unwrap().console == text);
    assert_eq!(guest.call(number::CONSOLE, &args(0, 0)).0, Status::Ok);
    for (args, status) in [
        (args(BUFFER, calls::CONSOLE_MAX + 1), Status::BadLength),
        (args(BUFFER, u32::MAX), Status::BadLength),
        (args(MEMORY as u64, 1), Status::BadPointer),
        (args(u64::MAX, 1), Status::BadPointer),
        (args(u64::MAX - 4095, 8192), Status::BadPointer),
        (ConsoleArgs { gpa: BUFFER, len: 1, reserved: 1 }.to_bytes(), Status::BadArgument),
    ] {
        assert_eq!(guest.call(number::CONSOLE, &args).0, status);
    }
    assert_eq!(guest.seen.lock().unwrap().console.len(), text.len());
    // The part that is in memory was taken, and the answer says so.
    let (status, result) = guest.call(number::CONSOLE, &args(MEMORY as u64 - 4096, 4097));
    assert_eq!((status, ConsoleResult::from_bytes(&result).accepted), (Status::BadPointer, 4096));
}

#[test]
fn a_console_without_room_says_how_much_it_took() {
    let mut guest = guest();
    guest.seen.lock().unwrap().console_room = Some(5000);
    let args = ConsoleArgs { gpa: BUFFER, len: 6000, reserved: 0 }.to_bytes();
    let (status, result) = guest.call(number::CONSOLE, &args);
    assert_eq!((status, ConsoleResult::from_bytes(&result).accepted), (Status::Ok, 5000));
}

#[test]
fn marks_have_a_phase_or_a_name() {
    let mut guest = guest();
    let mut name = [0; 32];
    name[..4].copy_from_slice(b"disk");
    let mark = MarkArgs { phase: 1, reserved: 0, value: 42, name: [0; 32] };
    assert_eq!(guest.call(number::MARK, &mark.to_bytes()).0, Status::Ok);
    for bad in [
        MarkArgs { phase: 0, ..mark },
        MarkArgs { phase: 11, ..mark },
        MarkArgs { phase: u32::MAX, ..mark },
        MarkArgs { reserved: 1, ..mark },
        MarkArgs { name: [7; 32], ..mark },
        MarkArgs { name: [0xc3; 32], ..mark },
    ] {
        assert_eq!(guest.call(number::MARK, &bad.to_bytes()).0, Status::BadArgument, "{bad:?}");
    }
    assert_eq!(guest.call(number::MARK, &MarkArgs { phase: 0, name, ..mark }.to_bytes()).0, Status::Ok);
    assert_eq!(guest.call(number::MARK, &mark.to_bytes()).0, Status::Full);
    assert_eq!(guest.seen.lock().unwrap().marks, [(1, String::new(), 42), (0, "disk".to_owned(), 42)]);
    // A name may fill its field without an end.
    assert_eq!(text(&[b'x'; 32]), Some("x".repeat(32).as_str()));
}

#[test]
fn the_clock_answers_what_the_machine_says() {
    let mut guest = guest();
    let (status, result) = guest.call(number::CLOCK, &9u64.to_le_bytes());
    assert_eq!(status, Status::Ok);
    let expected = ClockResult { clock_page: 0x3000, monotonic_ns: 9, wall_ns: -1 };
    assert_eq!(ClockResult::from_bytes(&result), expected);
}

#[test]
fn park_makes_the_processor_wait_after_its_status_is_written() {
    let mut guest = guest();
    let park = ParkArgs { timeout_ns: 1000, apic_id: 1, vector: 0x40 };
    let (flow, answer) = guest.ring(&block(number::PARK, &park.to_bytes()));
    assert_eq!((flow, answer.status), (Flow::Halt, 0));
    for bad in [
        ParkArgs { vector: 31, ..park },
        ParkArgs { vector: 256, ..park },
        ParkArgs { vector: 1, ..park },
        ParkArgs { apic_id: 256, ..park },
    ] {
        let (flow, answer) = guest.ring(&block(number::PARK, &bad.to_bytes()));
        assert_eq!((flow, answer.status), (Flow::Continue, Status::BadArgument as i32), "{bad:?}");
    }
    assert_eq!(guest.seen.lock().unwrap().parks, [park]);
}

#[test]
fn pages_are_released_range_by_range_up_to_the_first_bad_one() {
    let mut guest = guest();
    let range = |gpa, len| MemRange { gpa, len };
    let mut release = |ranges: &[MemRange], count: u32| {
        for (index, range) in ranges.iter().enumerate() {
            let at = GuestAddress(BUFFER + (index * MemRange::SIZE) as u64);
            guest.memory.write_slice(&range.to_bytes(), at).unwrap();
        }
        let args = MemReleaseArgs { list_gpa: BUFFER, count, reserved: 0 };
        let (status, result) = guest.call(number::MEM_RELEASE, &args.to_bytes());
        let result = MemReleaseResult::from_bytes(&result);
        (status, result.done, result.released_bytes)
    };
    let good = [range(0x1_0000, 0x1000), range(0x2_0000, 0x3000)];
    assert_eq!(release(&good, 2), (Status::Ok, 2, 0x4000));
    assert_eq!(release(&good, 0), (Status::Ok, 0, 0));
    for (bad, status) in [
        (range(0x1_0000, 0), Status::BadLength),
        (range(0x1_0000, 0x1001), Status::BadLength),
        (range(0x1_0001, 0x1000), Status::BadPointer),
        (range(u64::MAX - 0xfff, 0x1000), Status::BadPointer),
        (range(MEMORY as u64, 0x1000), Status::BadPointer),
        (range(0, calls::MEM_RELEASE_MAX_BYTES), Status::BadLength),
    ] {
        assert_eq!(release(&[good[0], bad, good[1]], 3), (status, 1, 0x1000), "{bad:?}");
    }
    for (args, status) in [
        (MemReleaseArgs { list_gpa: BUFFER, count: 513, reserved: 0 }, Status::BadLength),
        (MemReleaseArgs { list_gpa: BUFFER + 4, count: 1, reserved: 0 }, Status::BadPointer),
        (MemReleaseArgs { list_gpa: MEMORY as u64, count: 1, reserved: 0 }, Status::BadPointer),
        (MemReleaseArgs { list_gpa: u64::MAX - 7, count: 2, reserved: 0 }, Status::BadPointer),
        (MemReleaseArgs { list_gpa: BUFFER, count: 1, reserved: 1 }, Status::BadArgument),
    ] {
        assert_eq!(guest.call(number::MEM_RELEASE, &args.to_bytes()).0, status, "{args:?}");
    }
}

#[test]
fn exit_leaves_with_code_reason_and_words() {
    let mut guest = guest();
    let mut message = [0; 32];
    message[..7].copy_from_slice(b"no disk");
    let exit = ExitArgs { code: 255, reason: 1, message };
    for bad in [
        ExitArgs { code: 256, ..exit },
        ExitArgs { reason: 4, ..exit },
        ExitArgs { message: [b'\n'; 32], ..exit },
    ] {
        let (flow, answer) = guest.ring(&block(number::EXIT, &bad.to_bytes()));
        assert_eq!((flow, answer.status), (Flow::Continue, Status::BadArgument as i32), "{bad:?}");
    }
    let (flow, answer) = guest.ring(&block(number::EXIT, &exit.to_bytes()));
    assert_eq!((flow, answer.status), (Flow::Leave, 0));
    assert_eq!(guest.seen.lock().unwrap().exits, [(255, 1, "no disk".to_owned())]);
}

#[test]
fn a_call_with_the_same_number_again_is_answered_and_not_made() {
    let mut guest = guest();
    let mark = MarkArgs { phase: 3, ..MarkArgs::default() };
    let numbered = |channel, sequence| Block { channel, sequence, ..block(number::MARK, &mark.to_bytes()) };
    let mut status = |block: &Block| Status::from_value(guest.ring(block).1.status).unwrap();
    assert_eq!(status(&numbered(0, 5)), Status::Ok);
    assert_eq!(status(&numbered(0, 5)), Status::Ok);
    assert_eq!(status(&numbered(0, 4)), Status::Stale);
    let other = Block { sequence: 5, ..block(number::FEATURES, &[0; 8]) };
    assert_eq!(status(&other), Status::Stale, "the number was another call's");
    assert_eq!(status(&numbered(1, 4)), Status::Ok, "channels are apart");
    assert_eq!(guest.seen.lock().unwrap().marks.len(), 2);
    // Errors are remembered, too; a call that was not understood is not one.
    let (_, full) = guest.ring(&numbered(0, 6));
    assert_eq!(full.status, Status::Full as i32);
    let (_, bad) = guest.ring(&Block { args_len: 3, ..numbered(0, 7) });
    assert_eq!(bad.status, Status::BadLength as i32);
    guest.seen.lock().unwrap().marks.clear();
    assert_eq!(guest.ring(&numbered(0, 6)).1.status, Status::Full as i32);
    assert_eq!(guest.ring(&numbered(0, 7)).1.status, 0);
    assert_eq!(guest.seen.lock().unwrap().marks.len(), 1);
}

#[test]
fn a_restored_doorbell_answers_the_calls_of_the_saved_one() {
    let mut before = guest();
    let clock = Block { sequence: 1, channel: 7, ..block(number::CLOCK, &77u64.to_le_bytes()) };
    let (_, first) = before.ring(&clock);
    let _ = before.doorbell.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(before.call(number::FEATURES, &0x80u64.to_le_bytes()).0, Status::Ok);
    let mut after = guest();
    let mut state = before.doorbell.state();
    after.doorbell.set_state(&state);
    assert_eq!(after.doorbell.state(), state);
    let (_, again) = after.ring(&Block { args: [0; 48], ..clock });
    assert_eq!(again.result, first.result);
    assert_eq!((after.doorbell.guest_features(), after.register(port::REG_REJECTED)), (0x80, 1));
    // A forged state does not make it grow.
    let one = state.channels[0].clone();
    state.channels = (0..1000).map(|channel| channels::ChannelState { channel, ..one.clone() }).collect();
    after.doorbell.set_state(&state);
    assert_eq!(after.doorbell.state().channels.len(), CHANNELS as usize);
}

#[test]
fn events_hold_the_line_until_the_guest_clears_them() {
    let mut guest = guest();
    guest.events.raise(port::event::CLOCK);
    guest.events.raise(port::event::CLOCK | port::event::CONSOLE_ROOM);
    assert_eq!((guest.register(port::REG_EVENTS), guest.line.rises(), guest.line.is_high()), (3, 1, true));
    let _ = guest.doorbell.write(port::REG_EVENTS.into(), &1u32.to_le_bytes());
    assert_eq!((guest.register(port::REG_EVENTS), guest.line.is_high()), (2, true));
    let _ = guest.doorbell.write(port::REG_EVENTS.into(), &u32::MAX.to_le_bytes());
    assert_eq!((guest.register(port::REG_EVENTS), guest.line.is_high()), (0, false));
    guest.events.raise(0);
    assert_eq!((guest.line.rises(), guest.line.is_high()), (1, false));
}

#[test]
fn identity_is_never_said_from_memory() {
    let mut guest = guest_of(ALL, CheckpointResult { generation: 3, role: 2, clone_index: 9 });
    let mut numbered = block(number::IDENTITY, &[]);
    numbered.sequence = 4;
    for expected in 1..=2u8 {
        let (status, result) = guest.made(&numbered);
        let identity = IdentityResult::from_bytes(&result);
        assert_eq!((status, identity.generation, identity.role), (Status::Ok, 3, 2));
        assert_eq!((identity.clone_index, identity.entropy), (9, [expected; 32]));
    }
    numbered.sequence = 3;
    assert_eq!(guest.made(&numbered).0, Status::Stale);
}

#[test]
fn a_guest_asks_and_answers_about_its_rest() {
    let mut guest = guest();
    let args = |op, reserved, request| QuiesceArgs { op, reserved, request }.to_bytes();
    let (status, result) = guest.call(number::QUIESCE, &args(QUIESCE_ASK, 0, 0));
    let wanted = QuiesceResult::from_bytes(&result);
    assert_eq!((status, wanted.request, wanted.remaining_ms), (Status::Ok, 5, 77));
    for (args, status) in [
        (args(QUIESCE_READY, 0, 5), Status::Ok),
        (args(QUIESCE_READY, 0, 4), Status::Stale),
        (args(QUIESCE_READY, 0, 0), Status::Stale),
        (args(QUIESCE_READY, 1, 5), Status::BadArgument),
        (args(QUIESCE_ASK, 0, 5), Status::BadArgument),
        (args(2, 0, 0), Status::BadArgument),
    ] {
        assert_eq!(guest.call(number::QUIESCE, &args).0, status, "{args:?}");
    }
    assert_eq!(guest.seen.lock().unwrap().ready, [5]);
}

#[test]
fn a_checkpoint_returns_here_and_in_what_is_made_of_it() {
    let mut guest = guest_of(ALL, CheckpointResult { generation: 1, role: 1, clone_index: 0 });
    let mut checkpoint = block(number::CHECKPOINT, &[0; 8]);
    (checkpoint.sequence, checkpoint.channel) = (7, 2);
    let (status, result) = guest.made(&checkpoint);
    let here = CheckpointResult::from_bytes(&result);
    assert_eq!((status, here), (Status::Ok, CheckpointResult { generation: 1, role: 0, clone_index: 0 }));
    // One at a time, and not by a guest's retry.
    assert_eq!(guest.call(number::CHECKPOINT, &[0; 8]).0, Status::Full);
    assert_eq!(guest.made(&checkpoint), (status, result));
    guest.call(number::FEATURES, &features::QUIESCE.to_le_bytes());
    guest.events.raise(port::event::QUIESCE | port::event::CLOCK);
    let saved = guest.doorbell.save();
    assert_eq!(guest.seen.lock().unwrap().checkpoints, 1);

    let mut other = guest_of(ALL, CheckpointResult { generation: 2, role: 2, clone_index: 4 });
    other.doorbell.restore(saved).unwrap();
    let answered = |guest: &Guest| {
        let mut bytes = [0; Block::SIZE];
        guest.memory.read_slice(&mut bytes, GuestAddress(BLOCK)).unwrap();
        let block = Block::from_bytes(&bytes);
        (block.status, CheckpointResult::from_bytes(&block.result))
    };
    let there = CheckpointResult { generation: 2, role: 2, clone_index: 4 };
    assert_eq!(answered(&other), (0, there));
    assert_eq!(CheckpointResult::from_bytes(&other.made(&checkpoint).1), there, "also from memory");
    assert_eq!(other.events.pending(), port::event::CLOCK, "nobody waits for its rest any more");
    assert_eq!(other.seen.lock().unwrap().agreed, [features::QUIESCE]);
    assert_eq!(other.doorbell.save().checkpoint, None);

    // The machine itself hears if there is none.
    guest.doorbell.checkpoint_failed();
    assert_eq!(guest.made(&checkpoint).0, Status::HostFailed);
    checkpoint.sequence = 8;
    assert_eq!(guest.made(&checkpoint).0, Status::Ok);
    guest.doorbell.checkpoint_done();
    assert_eq!(guest.made(&checkpoint).0, Status::Ok, "from memory");
    let wrong = CheckpointArgs { flags: 1, reserved: 0 }.to_bytes();
    assert_eq!(guest.call(number::CHECKPOINT, &wrong).0, Status::BadArgument);
    assert_eq!(guest.seen.lock().unwrap().checkpoints, 2);
}

#[test]
fn device_tells_of_each_and_of_none_behind_the_last() {
    let mut guest = guest();
    let mut ask = |index, reserved| {
        let (status, result) =
            guest.made(&block(number::DEVICE, &calls::DeviceArgs { index, reserved }.to_bytes()));
        let device = DeviceResult::from_bytes(&result);
        (status, device.kind, device.interrupt)
    };
    for index in [0, 1] {
        assert_eq!(ask(index, 0), (Status::Ok, calls::DEVICE_VIRTIO_MMIO, 16));
    }
    for index in [2, u32::MAX] {
        assert_eq!(ask(index, 0), (Status::Ok, calls::DEVICE_NONE, calls::DEVICE_NO_INTERRUPT));
    }
    assert_eq!(ask(0, 1).0, Status::BadArgument);
}
