#![no_main]
//! The doorbell: every call number, arguments that are nearly right or not at all, blocks and lists anywhere, and guest
//! memory that the input writes. What reaches the machine's side must keep the promises of its trait.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use harrier_devices::Stateful;
use harrier_devices::byte_output::ByteOutput;
use harrier_devices::doorbell::{Doorbell, DoorbellConfig, Events, Hypercalls};
use harrier_devices::{BusDevice, InterruptLine};
use harrier_engine::{Flow, GuestMemory};
use harrier_fuzz::input::Input;
use harrier_hypercall_abi::block::{ALIGN, Block, PAYLOAD, RESULT_OFFSET, STATUS_OFFSET};
use harrier_hypercall_abi::calls::{
    self, CALLS, CheckpointResult, ClockResult, DeviceResult, EXIT_REASONS, IdentityResult,
    MEM_RELEASE_MAX_BYTES, MemRange, PHASES, ParkArgs, QuiesceResult,
};
use harrier_hypercall_abi::{Status, VERSION_MAJOR, port};
use harrier_machine::memory::{GuestRam, ReleaseError};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 4 << 20;
/// What the input reaches easily; cleared for each input.
const LOW: u64 = 64 << 10;

/// Stands for the machine: the same memory and queue, and a check of every promise.
struct Machine {
    ram: GuestRam,
    output: ByteOutput,
    features: u64,
    marks: usize,
    /// A CHECKPOINT call waits.
    is_held: Arc<AtomicBool>,
}

fn assert_text(text: &str) {
    assert!(text.len() <= 32 && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text:?}");
}

impl Hypercalls for Machine {
    fn features(&self) -> u64 {
        self.features
    }
    fn device(&self, index: u32) -> Option<DeviceResult> {
        (index < 2).then(|| DeviceResult::from_bytes(&[7; PAYLOAD]))
    }
    fn console(&mut self, bytes: &[u8]) -> usize {
        assert!(!bytes.is_empty() && bytes.len() <= calls::CONSOLE_MAX as usize);
        let taken = self.output.push_slice(bytes, Duration::ZERO);
        if taken < bytes.len() {
            self.output.take();
        }
        taken
    }
    fn mark(&mut self, phase: u32, name: &str, _value: u64) -> Result<(), Status> {
        assert!(PHASES.iter().any(|(known, ..)| *known == phase));
        assert!(phase != 0 || !name.is_empty());
        assert_text(name);
        self.marks += 1;
        if self.marks > 4 { Err(Status::Full) } else { Ok(()) }
    }
    fn clock(&mut self, tsc: u64) -> Result<ClockResult, Status> {
        if tsc == 1 {
            return Err(Status::HostFailed);
        }
        Ok(ClockResult { clock_page: 0xf_f000, monotonic_ns: tsc, wall_ns: i64::MIN })
    }
    fn park(&mut self, park: &ParkArgs) {
        assert!(park.apic_id < 256 && (park.vector == 0 || (32..256).contains(&park.vector)));
    }
    fn release(&mut self, range: MemRange) -> Result<(), Status> {
        assert!(range.gpa.is_multiple_of(4096) && range.len.is_multiple_of(4096) && range.len > 0);
        assert!(range.len <= MEM_RELEASE_MAX_BYTES);
        match self.ram.release(range.gpa, range.len) {
            Ok(()) => {
                assert!(range.gpa + range.len <= MEMORY);
                Ok(())
            }
            Err(ReleaseError::NotMemory) => Err(Status::BadPointer),
            Err(ReleaseError::Host(err)) => panic!("the host refused {range:?}: {err}"),
        }
    }
    fn agreed(&mut self, _guest_features: u64) {}
    fn checkpoint(&mut self) -> Result<(), Status> {
        assert!(!self.is_held.swap(true, Ordering::Relaxed), "one at a time");
        Ok(())
    }
    fn who(&self) -> CheckpointResult {
        CheckpointResult { generation: 1, role: 1, clone_index: 0 }
    }
    fn identity(&mut self) -> Result<IdentityResult, Status> {
        Ok(IdentityResult { generation: 1, role: 1, clone_index: 0, entropy: [7; 32] })
    }
    fn quiesce_wanted(&mut self) -> QuiesceResult {
        QuiesceResult { request: 1, remaining_ms: 1, reserved: 0 }
    }
    fn quiesce_ready(&mut self, request: u64) -> Result<(), Status> {
        if request == 1 { Ok(()) } else { Err(Status::Stale) }
    }
    fn exit(&mut self, _code: u8, reason: u32, message: &str) {
        assert!(EXIT_REASONS.iter().any(|(known, ..)| *known == reason));
        assert_text(message);
    }
}

struct Line;

impl InterruptLine for Line {
    fn set_level(&self, _high: bool) {}
}

thread_local! {
    /// Mapping memory anew for every input would be most of the work.
    static RAM: RefCell<GuestRam> = RefCell::new(GuestRam::new(MEMORY).expect("memory for the guest"));
}

/// An address that is memory mostly.
fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() & 15 {
        0 => input.u64(),
        1 => (MEMORY - 256).wrapping_add(u64::from(input.u16())),
        2 => u64::MAX - u64::from(input.u16()),
        3..8 => u64::from(input.u8()) * 4096 % LOW,
        8..12 => u64::from(input.u16()) * 8 % LOW,
        _ => u64::from(input.u16()),
    }
}

/// A number that is small mostly.
fn amount(input: &mut Input<'_>) -> u64 {
    match input.u8() & 7 {
        0 => input.u64(),
        1 => 1 << (input.u8() & 63),
        2 => u64::from(input.u16()) * 4096,
        3 | 4 => u64::from(input.u8() & 15) * 4096,
        _ => input.u8().into(),
    }
}

/// Arguments as the calls have them: addresses, amounts, numbers and texts.
fn args(input: &mut Input<'_>) -> [u8; PAYLOAD] {
    let mut args = [0; PAYLOAD];
    if input.u8() & 3 == 0 {
        let bytes = input.take(PAYLOAD);
        args[..bytes.len()].copy_from_slice(bytes);
        return args;
    }
    args[..8].copy_from_slice(&address(input).to_le_bytes());
    args[8..16].copy_from_slice(&amount(input).to_le_bytes());
    if input.u8() & 1 == 0 {
        // Of MARK and EXIT: two small numbers and a text.
        args[..4].copy_from_slice(&u32::from(input.u8() & 31).to_le_bytes());
        args[4..8].copy_from_slice(&u32::from(input.u8() & 3).to_le_bytes());
        let text = input.take(32);
        let at = if input.u8() & 1 == 0 { 8 } else { 16 };
        args[at..at + text.len()].copy_from_slice(text);
    }
    args
}

fn block(input: &mut Input<'_>) -> Block {
    let number = if input.u8() & 15 == 0 { input.u16() } else { u16::from(input.u8() % 13) };
    let known = calls::find(number).map_or(0, |call| call.args_len() as u32);
    let odd = input.u8();
    let rarely = |bit: u8, value: u32, usual: u32| if odd & 0x1f == bit { value } else { usual };
    Block {
        version: rarely(1, input.u16().into(), VERSION_MAJOR.into()) as u16,
        number,
        args_len: rarely(2, input.u32(), known),
        sequence: if odd & 0x80 == 0 { 0 } else { input.u8().into() },
        channel: rarely(3, input.u32(), u32::from(input.u8() & 3)),
        status: Status::Pending as i32,
        result_len: input.u8().into(),
        flags: rarely(4, input.u32(), 0),
        args: args(input),
        result: [0xee; PAYLOAD],
    }
}

fn ring(doorbell: &mut Doorbell, memory: &GuestMemory, gpa: u64, block: &Block) {
    let place = (gpa / ALIGN) as u32;
    let gpa = GuestAddress(u64::from(place) * ALIGN);
    let there = memory.write_slice(&block.to_bytes(), gpa).is_ok();
    let flow = doorbell.write(port::REG_DOORBELL.into(), &place.to_le_bytes());
    if !there {
        assert_eq!(flow, Flow::Continue);
        return;
    }
    let status: i32 = memory.read_obj(GuestAddress(gpa.0 + STATUS_OFFSET)).expect("the block");
    let len: u32 = memory.read_obj(GuestAddress(gpa.0 + STATUS_OFFSET + 4)).expect("the block");
    let status = Status::from_value(status).expect("a status of the ABI");
    assert_ne!(status, Status::Pending);
    let most = calls::find(block.number).and_then(|call| call.result).map_or(0, |result| result.size);
    assert!(len as usize <= most, "{block:?}: a result of {len} bytes");
    let mut result = [0; PAYLOAD];
    memory.read_slice(&mut result, GuestAddress(gpa.0 + RESULT_OFFSET)).expect("the block");
    let rest = &result[len as usize..];
    assert!(rest.iter().all(|&byte| byte == 0xee) || rest.iter().all(|&byte| byte == 0), "{block:?}");
    match flow {
        Flow::Continue => {}
        Flow::Halt => assert_eq!((block.number, status), (calls::number::PARK, Status::Ok)),
        Flow::Leave => {
            assert!(matches!(block.number, calls::number::EXIT | calls::number::CHECKPOINT), "{block:?}");
            assert_eq!(status, Status::Ok);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let ram = RAM.with_borrow(Clone::clone);
    let memory = ram.memory.clone();
    memory.write_slice(&[0; LOW as usize], GuestAddress(0)).expect("low memory");
    let events = Events::new(Arc::new(Line));
    let all = CALLS.iter().fold(0, |word, call| word | call.feature);
    let features = if input.u8() & 15 == 0 { input.u64() } else { all };
    let is_held = Arc::new(AtomicBool::new(false));
    let output = ByteOutput::new(8 << 10);
    let machine = Machine { ram, output, features, marks: 0, is_held: Arc::clone(&is_held) };
    let config = DoorbellConfig { shared_page_gpa: 0xf_f000, gsi: 3 };
    let mut doorbell = Doorbell::new(config, memory.clone(), events.clone(), Box::new(machine));
    while !input.is_empty() {
        match input.u8() & 15 {
            0..8 => {
                let block = block(&mut input);
                let gpa = address(&mut input);
                ring(&mut doorbell, &memory, gpa, &block);
            }
            8 | 9 => {
                // A list of ranges.
                let gpa = address(&mut input);
                for index in 0..u64::from(input.u8() & 7) {
                    let range = MemRange { gpa: address(&mut input), len: amount(&mut input) };
                    let at = gpa.wrapping_add(index * MemRange::SIZE as u64);
                    // Outside memory nothing happens.
                    let _ = memory.write_slice(&range.to_bytes(), GuestAddress(at));
                }
            }
            10 => {
                let gpa = address(&mut input);
                let len = usize::from(input.u8());
                let _ = memory.write_slice(input.take(len), GuestAddress(gpa));
            }
            11 => {
                // Whatever is there is a block.
                let place = (address(&mut input) / ALIGN) as u32;
                let _ = doorbell.write(port::REG_DOORBELL.into(), &place.to_le_bytes());
            }
            12 => {
                let (data, width) = input.access();
                let _ = doorbell.write(u64::from(input.u8() & 63), &data[..width]);
            }
            13 => {
                let (mut data, width) = input.access();
                let _ = doorbell.read(u64::from(input.u8() & 63), &mut data[..width]);
            }
            14 => {
                let bits = input.u32();
                events.raise(bits);
                // The snapshot of a CHECKPOINT call is there, or has failed; there may be no such call.
                match bits & 3 {
                    0 => doorbell.checkpoint_done(),
                    1 => doorbell.checkpoint_failed(),
                    _ => continue,
                }
                is_held.store(false, Ordering::Relaxed);
            }
            _ => {
                let saved = doorbell.save();
                assert!(saved.channels.len() <= 256);
                doorbell.restore(saved.clone()).expect("what it saved");
                is_held.store(false, Ordering::Relaxed);
                let after = doorbell.save();
                if saved.checkpoint.is_some() {
                    // The call has returned in the machine that was made of its snapshot.
                    assert_eq!(after.checkpoint, None);
                } else {
                    assert_eq!(after, saved);
                }
            }
        }
    }
});
