//! The programs of `cargo xtask bench compute`, `system` and `devices`: the same static binary in Harrier's guest, in a
//! peer's and on the host.
//!
//! `harrier-bench-guest GROUP [FILE]` runs the loops of that group and then the shell commands of FILE (a line each: name,
//! tab, command). Before each it says `@begin NAME`, after it `@end NAME|WORK|NANOSECONDS`: the instructions of the loop
//! or how often it did its thing where that number is known, else 0, and the processor time that this kernel counts.
//! Who reads these lines from outside takes the time there, because a guest's clocks are what the monitor makes of them;
//! after each line the program sleeps, so that a late reader still sees the processor time of that moment.

mod disk;
mod kernel;
mod loops;

use std::hint::black_box;
use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};

/// Name, and what runs; the answer is the work done, 0 where it is not known.
type Loop = (&'static str, fn() -> std::io::Result<u64>);

/// User code only; the work is instructions.
const COMPUTE: &[Loop] = &[
    ("register loop", || Ok(loops::registers(20_000_000))),
    ("load and store loop", || Ok(loops::memory(10_000_000))),
    ("SSE2 double loop", || Ok(loops::doubles(5_000_000))),
    ("SSE2 packed integer loop", || Ok(loops::packed(5_000_000))),
    ("calls and returns", || Ok(loops::calls(3_000_000))),
    ("sort of 200,000 numbers", sort),
    ("CRC-32 of 4 MiB by table", crc),
];

/// The kernel's services; the work is how many.
const SYSTEM: &[Loop] = &[
    ("system call", kernel::system_calls),
    ("page fault", || loops::page_faults(4096)),
    ("fork and exec", kernel::forks),
    ("context switch", kernel::context_switches),
    ("pipe, 64 KiB", kernel::pipe),
    ("file copy in memory, 64 KiB", kernel::file_copy),
];

/// The disk /dev/vda; the work is bytes or requests.
const DISK: &[Loop] = &[
    ("sequential read", disk::sequential_read),
    ("random read, 4 KiB", disk::random_read),
    ("sequential write", disk::sequential_write),
    ("random write, 4 KiB", disk::random_write),
];

/// How late a reader of our lines may be.
const PAUSE: Duration = Duration::from_millis(40);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let loops = match arguments.next().as_deref() {
        Some("compute") => COMPUTE,
        Some("system") => SYSTEM,
        Some("disk") => DISK,
        other => {
            eprintln!("'{}' is no group: give compute, system or disk", other.unwrap_or_default());
            return ExitCode::FAILURE;
        }
    };
    for (name, run) in loops {
        measure(name, || run().inspect_err(|error| eprintln!("{name}: {error}")).ok());
    }
    let commands = match arguments.next().map(std::fs::read_to_string) {
        None => String::new(),
        Some(Ok(commands)) => commands,
        Some(Err(error)) => {
            eprintln!("the commands cannot be read: {error}");
            return ExitCode::FAILURE;
        }
    };
    for (name, command) in commands.lines().filter_map(|line| line.split_once('\t')) {
        measure(name, || {
            let status = Command::new("busybox").args(["sh", "-c", command]).stdout(Stdio::null()).status();
            status.is_ok_and(|status| status.success()).then_some(0)
        });
    }
    ExitCode::SUCCESS
}

fn measure(name: &str, run: impl FnOnce() -> Option<u64>) {
    say(&format!("@begin {name}"));
    let before = cpu_ns();
    let result = run();
    let used_ns = cpu_ns().saturating_sub(before);
    match result {
        Some(work) => say(&format!("@end {name}|{work}|{used_ns}")),
        None => say(&format!("@failed {name}")),
    }
}

/// A closed output has nobody to tell.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
    std::thread::sleep(PAUSE);
}

/// Processor time of this process and its ended children.
fn cpu_ns() -> u64 {
    let own = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(0, |time| time.num_nanoseconds());
    let children = getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_or(0, |usage| usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds());
    u64::try_from(own + children).unwrap_or_default()
}

/// Numbers that are the same everywhere (xorshift, Marsaglia 2003).
pub(crate) fn numbers(count: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    (0..count).map(|_| next()).collect()
}

fn sort() -> std::io::Result<u64> {
    let mut list = numbers(200_000);
    list.sort_unstable();
    black_box(list);
    Ok(0)
}

fn crc() -> std::io::Result<u64> {
    let table: Vec<u32> = (0..256_u32)
        .map(|index| {
            (0..8)
                .fold(index, |value, _| if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 })
        })
        .collect();
    let mut crc = u32::MAX;
    for number in numbers(1 << 20) {
        for byte in number.to_le_bytes() {
            let index = usize::from(crc.to_le_bytes()[0] ^ byte);
            crc = table.get(index).copied().unwrap_or_default() ^ (crc >> 8);
        }
    }
    black_box(crc);
    Ok(0)
}
