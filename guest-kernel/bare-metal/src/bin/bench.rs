//! Loops to measure an engine by. For each one line `bench INSTRUCTIONS TICKS NAME`: what the guest retired, as counted by
//! hand, and the time-stamp ticks that passed. On the command line `scale=N` makes every loop N times as long and
//! `only=NAME` picks those whose names begin so. The machine's owner knows how long a tick is.

#![no_std]
#![no_main]

use core::fmt::Write;

use harrier_bare_metal::boot::{command_line, selector};
use harrier_bare_metal::cpu::{self, msr};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, user, user_stack};
use harrier_bare_metal::report::Console;
use harrier_bare_metal::trap::{Block, set_handler, vector};
use harrier_bare_metal::{Frame, check_true, code64, guest_main, run};

guest_main!(main);

fn main() {
    let scale = harrier_bare_metal::boot::parameter("scale").unwrap_or(1).clamp(1, 1000);
    let kernel = |code: u64, rcx: u64| {
        run(Frame { rcx, rsi: frame(0), rdi: frame(256), ..Frame::kernel(code) }).vector == vector::END
    };
    // 20 instructions a round.
    let registers = code64!(
        "2: add rax, rcx",
        "mov rdx, rax",
        "xor rbx, rdx",
        "shl rdx, 3",
        "add rdx, rbx",
        "lea r8, [rdx + rax * 2 + 7]",
        "sub r9, r8",
        "mov r10, r9",
        "and r10, 0xffff",
        "or r11, r10",
        "inc r12",
        "movzx r13d, dl",
        "add r14, r13",
        "imul r15, r14, 5",
        "cmp rax, r15",
        "cmovb rbx, r8",
        "not r9",
        "ror r11, 7",
        "dec rcx",
        "jnz 2b",
    );
    bench("registers", 20 * 2_000_000 * scale, || kernel(registers, 2_000_000 * scale));
    let branches = code64!(
        "2: test cl, 1",
        "jz 3f",
        "inc rax",
        "jmp 4f",
        "3: inc rdx",
        "nop",
        "4: call 5f",
        "dec rcx",
        "jnz 2b",
        "jmp 6f",
        "5: cmp rax, rdx",
        "ja 7f",
        "7: ret",
        "6:"
    );
    bench("branches", 10 * 2_000_000 * scale, || kernel(branches, 2_000_000 * scale));
    // Loads and stores over 512 KiB: 9 instructions a round.
    let memory = code64!(
        "2: mov rax, [rsi]",
        "add rax, rcx",
        "mov [rdi], rax",
        "mov edx, [rdi + 4]",
        "add [rsi + 8], edx",
        "add rsi, 64",
        "add rdi, 64",
        "and rsi, 0x107ffff",
        "and rdi, 0x117ffff",
        "or rdi, 0x1100000",
        "or rsi, 0x1000000",
        "dec rcx",
        "jnz 2b"
    );
    bench("memory", 13 * 1_000_000 * scale, || kernel(memory, 1_000_000 * scale));
    let strings = code64!(
        "mov r8, rcx",
        "mov r9, rsi",
        "mov r10, rdi",
        "2: mov rsi, r9",
        "mov rdi, r10",
        "mov ecx, 4096",
        "rep movsb",
        "mov rdi, r10",
        "mov ecx, 512",
        "rep stosq",
        "dec r8",
        "jnz 2b"
    );
    bench("strings of 4 KiB", 9 * 2_000 * scale, || kernel(strings, 2_000 * scale));
    let sse = code64!(
        "movups xmm0, [rsi]",
        "2: paddd xmm1, xmm0",
        "pxor xmm2, xmm1",
        "mulps xmm3, xmm0",
        "addps xmm4, xmm3",
        "movaps xmm5, xmm4",
        "shufps xmm5, xmm5, 0x1b",
        "dec rcx",
        "jnz 2b"
    );
    bench("sse", 8 * 500_000 * scale, || kernel(sse, 500_000 * scale));
    let locked = code64!("2: lock xadd [rsi], rax", "lock cmpxchg [rdi], rdx", "dec rcx", "jnz 2b");
    bench("locked updates", 4 * 500_000 * scale, || kernel(locked, 500_000 * scale));

    // syscall and sysret: 2 + 1 + 2 instructions a round.
    cpu::wrmsr(msr::STAR, selector::USER_CODE32 << 48 | selector::CODE64 << 32);
    cpu::wrmsr(msr::SFMASK, 0x700);
    cpu::wrmsr(msr::LSTAR, code64!("inc rdx", "sysretq"));
    let calls = 200_000 * scale;
    let call = user(code64!("mov r8, rcx", "2: syscall", "dec r8", "jnz 2b"));
    bench("system calls", 5 * calls, || {
        let end = run(Frame { rcx: calls, ..Frame::user(call, user_stack()) });
        end.rdx == calls
    });

    // A fault a round, which the handler answers by skipping the instruction.
    unsafe extern "C" fn skip(frame: &mut Frame, _: &mut Block) {
        frame.rip += 2;
    }
    set_handler(vector::PF, Some(skip));
    let faults = 50_000 * scale;
    let missing = code64!("2: mov eax, [rdi]", "dec rcx", "jnz 2b");
    bench("page faults", 60 * faults, || {
        run(Frame { rcx: faults, rdi: TEST_BASE + 0x77_7000, ..Frame::kernel(missing) }).vector == vector::END
    });
    set_handler(vector::PF, None);

    // A page-table change, invlpg and an access a round.
    let page = TEST_BASE + 0x40_0000;
    map(page, frame(0) | entry::P | entry::W);
    let slot = entry(page, 1) as u64;
    let flush =
        code64!("2: xor qword ptr [rsi], 0x1000", "invlpg [rdi]", "mov eax, [rdi]", "dec rcx", "jnz 2b");
    let rounds = 200_000 * scale;
    bench("translation flushes", 5 * rounds, || {
        run(Frame { rcx: rounds, rdi: page, rsi: slot, ..Frame::kernel(flush) }).vector == vector::END
    });
    let exits = 20_000 * scale;
    let port = code64!("mov edx, 0x3ff", "2: out dx, al", "in al, dx", "dec ecx", "jnz 2b");
    bench("port accesses", 4 * exits, || {
        run(Frame { rcx: exits, ..Frame::kernel(port) }).vector == vector::END
    });
}

/// Runs `body` and prints what it took.
fn bench(name: &str, instructions: u64, body: impl FnOnce() -> bool) {
    let only = command_line().split_ascii_whitespace().find_map(|word| word.strip_prefix("only="));
    if only.is_some_and(|only| !name.starts_with(only)) {
        return;
    }
    let start = cpu::rdtsc();
    let ended = body();
    let ticks = cpu::rdtsc() - start;
    _ = writeln!(Console, "bench {instructions} {ticks} {name}");
    check_true(name, ended);
}
