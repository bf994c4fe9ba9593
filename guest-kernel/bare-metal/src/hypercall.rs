//! Hypercalls from a guest without an operating system: the doorbell, one argument block a processor, and a function
//! for each call.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use calls::{
    ClockArgs, ClockResult, ConsoleArgs, ConsoleResult, ExitArgs, FeaturesArgs, FeaturesResult, MarkArgs,
    MemRange, MemReleaseArgs, MemReleaseResult, ParkArgs,
};
pub use harrier_hypercall_abi::block::{ALIGN, Block, PAYLOAD, STATUS_OFFSET};
pub use harrier_hypercall_abi::calls::{self, number};
pub use harrier_hypercall_abi::shared_page::ClockPage;
pub use harrier_hypercall_abi::{Status, VERSION_MAJOR, features, port};

use crate::boot::{MAX_CPUS, Shared};
use crate::cpu::{inl, outl, rdtsc};

/// A block of each processor, by its number.
static BLOCKS: Shared<[[u64; Block::SIZE / 8]; MAX_CPUS]> = Shared::new([[0; Block::SIZE / 8]; MAX_CPUS]);

/// What a call ended with.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// The status; `None` for a number that the ABI does not have.
    pub status: Option<Status>,
    /// The result's bytes.
    pub result: [u8; PAYLOAD],
    /// How many of them are valid.
    pub result_len: u32,
}

impl Answer {
    /// Whether the call was made.
    pub fn is_ok(&self) -> bool {
        self.status == Some(Status::Ok)
    }

    /// The status as a number for checks.
    pub fn code(&self) -> u64 {
        self.status.map_or(u64::MAX, |status| status as i32 as u32 as u64)
    }
}

/// The number of a status, as [`Answer::code`] gives it.
pub const fn code(status: Status) -> u64 {
    status as i32 as u32 as u64
}

/// Whether there is a host that answers.
pub fn present() -> bool {
    register(port::REG_SIGNATURE) == port::SIGNATURE
}

/// Reads a register of the doorbell.
pub fn register(offset: u16) -> u32 {
    inl(port::BASE + offset)
}

/// Writes a register of the doorbell.
pub fn set_register(offset: u16, value: u32) {
    outl(port::BASE + offset, value);
}

/// A block for this call, without a sequence number, of processor 0.
pub fn block(number: u16, args: &[u8]) -> Block {
    let mut block = Block {
        version: VERSION_MAJOR,
        number,
        args_len: args.len() as u32,
        status: Status::Pending as i32,
        ..Block::default()
    };
    for (to, from) in block.args.iter_mut().zip(args) {
        *to = *from;
    }
    block
}

/// Where the block of this processor is.
pub fn block_gpa(processor: usize) -> u64 {
    BLOCKS.get() as u64 + (processor * Block::SIZE) as u64
}

/// Makes the call that `block` describes.
pub fn ring(block: &Block) -> Answer {
    let gpa = put(block);
    set_register(port::REG_DOORBELL, (gpa / ALIGN) as u32);
    answer(gpa)
}

/// Makes the call that processor 0's block still describes from the last time, and looks at nothing but its status.
pub fn ring_again() -> bool {
    let gpa = block_gpa(0);
    let status = (gpa + STATUS_OFFSET) as *mut i32;
    unsafe { status.write_volatile(Status::Pending as i32) };
    set_register(port::REG_DOORBELL, (gpa / ALIGN) as u32);
    unsafe { status.read_volatile() == Status::Ok as i32 }
}

/// Makes the call with interrupts enabled from its very instruction on, and disables them again.
pub fn ring_and_wait(block: &Block) -> Answer {
    let gpa = put(block);
    let place = (gpa / ALIGN) as u32;
    unsafe {
        asm!("sti", "out dx, eax", "cli", in("dx") port::BASE + port::REG_DOORBELL, in("eax") place);
    }
    answer(gpa)
}

fn put(block: &Block) -> u64 {
    let gpa = block_gpa(block.channel as usize % MAX_CPUS);
    // In memory the structure is what the ABI says: little endian, without padding. The doorbell's OUT comes after it,
    // because the compiler takes it for an access to all memory.
    unsafe { (gpa as *mut Block).write(*block) };
    gpa
}

fn answer(gpa: u64) -> Answer {
    let block = Block::from_bytes(&unsafe { (gpa as *const [u8; Block::SIZE]).read_volatile() });
    Answer { status: Status::from_value(block.status), result: block.result, result_len: block.result_len }
}

fn call(number: u16, args: &[u8]) -> Answer {
    ring(&block(number, args))
}

/// What the host offers.
pub fn features(guest_features: u64) -> (Answer, FeaturesResult) {
    let answer = call(number::FEATURES, &FeaturesArgs { guest_features }.to_bytes());
    (answer, FeaturesResult::from_bytes(&answer.result))
}

/// Prints; answers how many bytes the console took.
pub fn console(text: &[u8]) -> (Answer, u32) {
    let args = ConsoleArgs { gpa: text.as_ptr() as u64, len: text.len() as u32, reserved: 0 };
    let answer = call(number::CONSOLE, &args.to_bytes());
    (answer, ConsoleResult::from_bytes(&answer.result).accepted)
}

/// The first 32 bytes of a text, as marks and exits carry it.
pub fn text(text: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

/// Notes that a phase begins.
pub fn mark(phase: u32, name: &str, value: u64) -> Answer {
    call(number::MARK, &MarkArgs { phase, reserved: 0, value, name: text(name) }.to_bytes())
}

/// Fills in the clock page.
pub fn clock() -> (Answer, ClockResult) {
    clock_at(rdtsc())
}

/// The same with a TSC that was read before.
pub fn clock_at(tsc: u64) -> (Answer, ClockResult) {
    let answer = call(number::CLOCK, &ClockArgs { tsc }.to_bytes());
    (answer, ClockResult::from_bytes(&answer.result))
}

/// Reads a clock page.
pub fn read_clock(gpa: u64) -> ClockPage {
    let sequence = unsafe { &*(gpa as *const AtomicU32) };
    loop {
        let before = sequence.load(Ordering::Acquire);
        let page = ClockPage::from_bytes(&unsafe { (gpa as *const [u8; ClockPage::SIZE]).read_volatile() });
        if before & 1 == 0 && sequence.load(Ordering::Acquire) == before {
            return page;
        }
    }
}

/// Guest time on a clock page when the TSC is `tsc`.
pub fn guest_time_ns(page: &ClockPage, tsc: u64) -> u64 {
    let ticks = u128::from(tsc.wrapping_sub(page.tsc_base));
    let shifted = if page.tsc_shift >= 0 { ticks << page.tsc_shift } else { ticks >> -page.tsc_shift };
    page.monotonic_base_ns.wrapping_add(((shifted * u128::from(page.tsc_to_ns_multiplier)) >> 32) as u64)
}

/// Guest time now, by the clock page at this address.
pub fn now(gpa: u64) -> u64 {
    loop {
        let page = read_clock(gpa);
        let now = guest_time_ns(&page, rdtsc());
        if read_clock(gpa).sequence == page.sequence {
            return now;
        }
    }
}

/// Waits for an interrupt; `vector` comes after the time.
pub fn park(timeout_ns: u64, vector: u32) -> Answer {
    let args = ParkArgs { timeout_ns, apic_id: 0, vector };
    ring_and_wait(&block(number::PARK, &args.to_bytes()))
}

/// Gives pages back to the host.
pub fn mem_release(ranges: &[MemRange]) -> (Answer, MemReleaseResult) {
    // The structure is laid out as the ABI says.
    let list_gpa = ranges.as_ptr() as u64;
    let args = MemReleaseArgs { list_gpa, count: ranges.len() as u32, reserved: 0 };
    let answer = call(number::MEM_RELEASE, &args.to_bytes());
    (answer, MemReleaseResult::from_bytes(&answer.result))
}

/// Ends the machine; comes back only if the host refuses.
pub fn exit(code: u32, reason: u32, message: &str) -> Answer {
    call(number::EXIT, &ExitArgs { code, reason, message: text(message) }.to_bytes())
}
