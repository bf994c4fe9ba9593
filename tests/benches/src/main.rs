//! The loops of `cargo xtask bench compute`: one static program for Harrier's guest, a peer's guest and the host.
//!
//! It says `@begin NAME` before a loop and `@end NAME` after it, with the instructions of the loop's body where their
//! number is known. Who reads these lines takes the time, because the clock of a guest is what the monitor makes of it.

mod loops;

use std::hint::black_box;
use std::io::Write as _;

/// Name, and what runs; the answer is the number of instructions, 0 where it is not known.
type Loop = (&'static str, fn() -> u64);

const LOOPS: &[Loop] = &[
    ("register loop", || loops::registers(20_000_000)),
    ("load and store loop", || loops::memory(10_000_000)),
    ("SSE2 double loop", || loops::doubles(5_000_000)),
    ("sort 200,000 numbers", sort),
    ("CRC-32 of 4 MiB by table", crc),
    ("100,000 system calls", system_calls),
    ("4,096 page faults", page_faults),
];

fn main() {
    let only = std::env::args().nth(1);
    for (name, run) in LOOPS.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name)) {
        say(&format!("@begin {name}"));
        let instructions = run();
        say(&format!("@end {name}|{instructions}"));
    }
}

/// A closed output has nobody to tell.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Numbers that are the same everywhere (xorshift, Marsaglia 2003).
fn numbers(count: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    (0..count).map(|_| next()).collect()
}

fn sort() -> u64 {
    let mut list = numbers(200_000);
    list.sort_unstable();
    black_box(list);
    0
}

fn crc() -> u64 {
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
    0
}

fn system_calls() -> u64 {
    for _ in 0..100_000 {
        black_box(std::process::id());
    }
    0
}

fn page_faults() -> u64 {
    // Above the C library's threshold: every block is mapped anew.
    const BLOCK: usize = 1 << 20;
    for _ in 0..16 {
        let mut block = vec![0_u8; BLOCK];
        for page in block.chunks_mut(4096) {
            page[0] = 1;
        }
        black_box(block);
    }
    0
}
