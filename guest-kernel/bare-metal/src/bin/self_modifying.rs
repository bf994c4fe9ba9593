//! Code that writes code: the next instruction, the same block, another page, through another address, by every kind of
//! store, ahead of a repeat and across pages.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu;
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke, poke_bytes};
use harrier_bare_metal::trap::{Block, set_handler, vector};
use harrier_bare_metal::{Frame, check, check_true, guest_main, run};

guest_main!(main);

/// Where code under test is put; both pages follow each other.
const CODE: u64 = frame(20);
/// The same two pages, under another address.
const ALIAS: u64 = TEST_BASE + 0x80_0000;

fn main() {
    for page in 0..2 {
        map(ALIAS + page * 4096, frame(20 + page) | entry::P | entry::W);
    }
    same_block();
    every_store();
    loops();
    other_pages();
    aliases();
    crossing();
    handlers();
    data_beside_code();
}

/// Puts machine code at `at` and runs it.
fn run_at(at: u64, bytes: &[u8], start: Frame) -> Frame {
    poke_bytes(at, bytes);
    run(Frame { rip: at, ..start })
}

fn kernel() -> Frame {
    Frame::kernel(0)
}

fn same_block() {
    // mov byte ptr [rip + 1], 7; mov eax, 1; int 0xff
    let end = run_at(CODE, &[0xc6, 0x05, 1, 0, 0, 0, 7, 0xb8, 1, 0, 0, 0, 0xcd, 0xff], kernel());
    check("the next instruction", end.rax, 7);
    // The same, two instructions further on.
    let end = run_at(
        CODE,
        &[0xc6, 0x05, 5, 0, 0, 0, 8, 0x90, 0x48, 0x89, 0xc2, 0xb8, 1, 0, 0, 0, 0xcd, 0xff],
        kernel(),
    );
    check("an instruction further on", end.rax, 8);
    // Behind a jump.
    let end = run_at(CODE, &[0xc6, 0x05, 3, 0, 0, 0, 9, 0xeb, 0x00, 0xb8, 1, 0, 0, 0, 0xcd, 0xff], kernel());
    check("behind a jump", end.rax, 9);
    // The instruction itself: mov byte ptr [rip - 1], 0x55 writes its own immediate, which has been read.
    let end = run_at(CODE, &[0xc6, 0x05, 0xff, 0xff, 0xff, 0xff, 0x55, 0xcd, 0xff], kernel());
    check("the instruction itself", end.vector, vector::END);
    check("changes", peek(CODE) >> 48 & 0xff, 0x55);
    // An instruction behind: run twice by a loop. 2: mov eax, 0; (imm at +1) inc byte [rip-11]; dec ecx; jnz
    let end = run_at(
        CODE,
        &[0xb8, 0, 0, 0, 0, 0xfe, 0x05, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf1, 0xcd, 0xff],
        Frame { rcx: 10, ..kernel() },
    );
    check("an instruction behind, each time around", end.rax, 9);
    // A store that makes the next instruction longer: nop nop nop nop nop becomes mov eax, imm32.
    let end = run_at(
        CODE,
        &[0x66, 0xc7, 0x05, 0, 0, 0, 0, 0xb8, 0x34, 0x90, 0x90, 0x90, 0x90, 0x90, 0xcd, 0xff],
        kernel(),
    );
    check("instruction boundaries", end.rax, 0x9090_9034);
    // Into an undefined instruction and out of one.
    let end = run_at(CODE, &[0x66, 0xc7, 0x05, 0, 0, 0, 0, 0x0f, 0x0b, 0x90, 0x90, 0xcd, 0xff], kernel());
    check("an instruction that becomes undefined", end.vector << 8 | (end.rip - CODE), vector::UD << 8 | 9);
    let end = run_at(CODE, &[0x66, 0xc7, 0x05, 0, 0, 0, 0, 0x90, 0x90, 0x0f, 0x0b, 0xcd, 0xff], kernel());
    check("an undefined instruction that becomes defined", end.vector, vector::END);
    // A conditional jump is turned around: cmp eax, eax; jne over; mov ecx, 1; over: int
    let end = run_at(
        CODE,
        &[0x39, 0xc0, 0xc6, 0x05, 0, 0, 0, 0, 0x75, 0x74, 0x05, 0xb9, 1, 0, 0, 0, 0xcd, 0xff],
        kernel(),
    );
    check("a condition", end.rcx, 1);
    // With the trap flag: after the store, one step at a time.
    let mut frame = Frame { rflags: 0x102, ..kernel() };
    poke_bytes(CODE, &[0xc6, 0x05, 1, 0, 0, 0, 0x66, 0xb8, 1, 0, 0, 0, 0xcd, 0xff]);
    frame.rip = CODE;
    let mut steps = 0;
    loop {
        frame = run(frame);
        if frame.vector != vector::DB || steps == 10 {
            break;
        }
        steps += 1;
    }
    check("single steps through it", frame.rax << 8 | steps, 0x6602);
}

/// Each writes 8 bytes at RDI over the code that follows: `mov eax, 1` becomes `mov eax, N`.
fn every_store() {
    const OLD: [u8; 8] = [0xb8, 1, 0, 0, 0, 0x90, 0x90, 0x90];
    const NEW: u64 = 0x9090_9000_0000_55b8;
    let stores: [(&str, &[u8]); 16] = [
        ("mov", &[0x48, 0x89, 0x07]),
        ("stosq", &[0x48, 0xab]),
        ("movsq", &[0x48, 0xa5]),
        ("rep stosq", &[0xb9, 1, 0, 0, 0, 0xf3, 0x48, 0xab]),
        ("rep movsb", &[0xb9, 8, 0, 0, 0, 0xf3, 0xa4]),
        ("xchg", &[0x48, 0x87, 0x07]),
        ("lock xadd", &[0x48, 0x2b, 0x07, 0xf0, 0x48, 0x0f, 0xc1, 0x07]),
        ("cmpxchg", &[0x48, 0x89, 0xc1, 0x48, 0x8b, 0x07, 0xf0, 0x48, 0x0f, 0xb1, 0x0f]),
        ("push", &[0x48, 0x8d, 0x67, 0x08, 0x50]),
        ("pop", &[0x50, 0x8f, 0x07]),
        ("movq from xmm", &[0x66, 0x48, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0xd6, 0x07]),
        ("movups", &[0xf3, 0x0f, 0x7e, 0x06, 0x0f, 0x11, 0x07]),
        ("movnti", &[0x48, 0x0f, 0xc3, 0x07]),
        ("fistp", &[0xdf, 0x2e, 0xdf, 0x3f]),
        ("xor", &[0x48, 0x8b, 0x0f, 0x48, 0x31, 0xc1, 0x48, 0x31, 0x0f]),
        (
            "bts and btr",
            &[
                0x48, 0x0f, 0xba, 0x2f, 0x0a, 0x48, 0x0f, 0xba, 0x2f, 0x0c, 0x48, 0x0f, 0xba, 0x2f, 0x0e,
                0x48, 0x0f, 0xba, 0x37, 0x0c, 0x48, 0x0f, 0xba, 0x2f, 0x0c,
            ],
        ),
    ];
    for (name, store) in stores {
        let mut code = [0x90; 64];
        code[..store.len()].copy_from_slice(store);
        let at = store.len();
        code[at..at + 8].copy_from_slice(&OLD);
        code[at + 8..at + 10].copy_from_slice(&[0xcd, 0xff]);
        poke(frame(30), NEW);
        poke(frame(30) + 8, 0xffcd);
        if name == "movups" {
            // It stores 16 bytes; the upper half, which is loaded as zero, becomes `add [rax], al`. RAX is 0x55 then.
            code[at + 8..at + 16].fill(0);
            code[at + 16..at + 18].copy_from_slice(&[0xcd, 0xff]);
        }
        let start = Frame { rax: NEW, rdi: CODE + at as u64, rsi: frame(30), ..kernel() };
        let end = run_at(CODE, &code, start);
        check(name, end.rax, 0x55);
        check(name, end.vector, vector::END);
    }
}

fn loops() {
    // A function in a loop whose constant the loop increments, 100 000 times: sum of the constants.
    // 2: call f; add rdx, rax; inc dword [f + 1]; dec ecx; jnz 2b; int 0xff; f: mov eax, 0; ret
    poke_bytes(
        CODE,
        &[0xe8, 15, 0, 0, 0, 0x48, 0x01, 0xc2, 0xff, 0x05, 7, 0, 0, 0, 0xff, 0xc9, 0x75, 0xee, 0xcd, 0xff],
    );
    poke_bytes(CODE + 20, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let end = run(Frame { rip: CODE, rcx: 100_000, ..kernel() });
    check("a constant that changes each time", end.rdx, 99_999 * 100_000 / 2);
    // The same far away in another page.
    poke_bytes(CODE, &[0xff, 0xd7, 0x48, 0x01, 0xc2, 0xff, 0x47, 0x01, 0xff, 0xc9, 0x75, 0xf4, 0xcd, 0xff]);
    poke_bytes(frame(25) + 100, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let end = run(Frame { rip: CODE, rcx: 100_000, rdi: frame(25) + 100, ..kernel() });
    check("a constant in another page", end.rdx, 99_999 * 100_000 / 2);
    // A loop that overwrites its own jump at the end: jnz becomes nop nop in the fifth round.
    // 2: inc eax; cmp eax, 5; jne 3f; mov word [4f], 0x9090; 3: test eax, eax; 4: jnz 2b; int 0xff
    let end = run_at(
        CODE,
        &[
            0xff, 0xc0, 0x83, 0xf8, 5, 0x75, 0x09, 0x66, 0xc7, 0x05, 2, 0, 0, 0, 0x90, 0x90, 0x85, 0xc0,
            0x75, 0xec, 0xcd, 0xff,
        ],
        kernel(),
    );
    check("a loop that ends itself", end.rax, 5);
    // Copying a function over another one, then calling it, again and again.
    poke_bytes(frame(26), &[0xb8, 1, 0, 0, 0, 0xc3, 0x90, 0x90]);
    poke_bytes(frame(26) + 16, &[0xb8, 2, 0, 0, 0, 0xc3, 0x90, 0x90]);
    // 2: xor rsi, 16; mov r8, [rsi]; mov [rdi], r8; call rdi; add rdx, rax; dec ecx; jnz 2b; int 0xff
    let end = run_at(
        CODE,
        &[
            0x48, 0x83, 0xf6, 16, 0x4c, 0x8b, 0x06, 0x4c, 0x89, 0x07, 0xff, 0xd7, 0x48, 0x01, 0xc2, 0xff,
            0xc9, 0x75, 0xed, 0xcd, 0xff,
        ],
        Frame { rsi: frame(26), rdi: frame(27), rcx: 1000, ..kernel() },
    );
    check("functions that replace each other", end.rdx, 1500);
}

fn other_pages() {
    let function = frame(22);
    let call = [0xff, 0xd7, 0x89, 0xc2, 0xc7, 0x47, 0x01, 0x22, 0, 0, 0, 0xff, 0xd7, 0xcd, 0xff];
    poke_bytes(function, &[0xb8, 0x11, 0, 0, 0, 0xc3]);
    let end = run_at(CODE, &call, Frame { rdi: function, ..kernel() });
    check("another page: before", end.rdx, 0x11);
    check("another page: after", end.rax, 0x22);
    // Code that was never run before it changed again, and code that is moved whole pages at a time.
    poke_bytes(function + 512, &[0xb8, 0x33, 0, 0, 0, 0xc3]);
    poke_bytes(function + 512, &[0xb8, 0x44, 0, 0, 0, 0xc3]);
    check(
        "never run before",
        run_at(CODE, &[0xff, 0xd7, 0xcd, 0xff], Frame { rdi: function + 512, ..kernel() }).rax,
        0x44,
    );
    poke_bytes(frame(23) + 512, &[0xb8, 0x66, 0, 0, 0, 0xc3]);
    // rep movsq of a page over the function, then the call
    let end = run_at(
        CODE,
        &[0x57, 0xf3, 0x48, 0xa5, 0x5f, 0x48, 0x81, 0xc7, 0, 2, 0, 0, 0xff, 0xd7, 0xcd, 0xff],
        Frame { rsi: frame(23), rdi: function, rcx: 512, ..kernel() },
    );
    check("a page copied over it", end.rax, 0x66);
    // rep stosb that fills ahead of itself, over the code that follows: nops up to the end.
    let mut code = [0x0f; 64];
    code[..4].copy_from_slice(&[0xf3, 0xaa, 0xeb, 0x00]);
    code[62..].copy_from_slice(&[0xcd, 0xff]);
    let end = run_at(CODE, &code, Frame { rax: 0x90, rcx: 58, rdi: CODE + 4, ..kernel() });
    check("a repeat that writes what follows it", end.vector << 8 | (end.rip - CODE), vector::END << 8 | 64);
}

fn aliases() {
    // Written through one address, run through another; a serializing instruction between (SDM volume 3, 9.1.3).
    poke_bytes(CODE, &[0xb8, 1, 0, 0, 0, 0xc3]);
    let call = [
        0xff, 0xd7, 0x41, 0x89, 0xc0, 0xc7, 0x46, 0x01, 2, 0, 0, 0, 0x31, 0xc0, 0x0f, 0xa2, 0xff, 0xd7, 0xcd,
        0xff,
    ];
    let end = run_at(frame(24), &call, Frame { rdi: CODE, rsi: ALIAS, ..kernel() });
    check("written through another address: before", end.r8, 1);
    check("written through another address: after", end.rax, 2);
    let end = run_at(frame(24), &call, Frame { rdi: ALIAS, rsi: CODE, ..kernel() });
    check("run through another address: before", end.r8, 2);
    check("run through another address: after", end.rax, 2);
    poke_bytes(CODE, &[0xb8, 3, 0, 0, 0, 0xc3]);
    cpu::cpuid(0, 0);
    let end = run_at(
        frame(24),
        &[0xff, 0xd7, 0x41, 0x89, 0xc0, 0xff, 0xd6, 0xcd, 0xff],
        Frame { rdi: ALIAS, rsi: CODE, ..kernel() },
    );
    check("both addresses show the change", end.r8 << 8 | end.rax, 0x303);
    // Through a 2 MiB page: the identity map is one.
    let end = run_at(ALIAS, &[0xc6, 0x05, 1, 0, 0, 0, 7, 0xb8, 1, 0, 0, 0, 0xcd, 0xff], kernel());
    check("the next instruction, in a small page", end.rax, 7);
}

fn crossing() {
    // An instruction across two pages, changed in its second one.
    let at = CODE + 4096 - 2;
    poke_bytes(at, &[0xb8, 1, 0, 0, 0, 0xc3]);
    let call = [0xff, 0xd7, 0x41, 0x89, 0xc0, 0xc6, 0x47, 0x03, 2, 0xff, 0xd7, 0xcd, 0xff];
    let end = run_at(frame(24), &call, Frame { rdi: at, ..kernel() });
    check("across pages: before", end.r8, 1);
    check("across pages: second page changed", end.rax, 0x2_0001);
    let call = [0xff, 0xd7, 0x41, 0x89, 0xc0, 0xc6, 0x47, 0x01, 5, 0xff, 0xd7, 0xcd, 0xff];
    let end = run_at(frame(24), &call, Frame { rdi: at, ..kernel() });
    check("across pages: first page changed", end.rax, 0x2_0005);
    // A store across the page boundary, over code on both sides.
    let call = [0xff, 0xd7, 0x41, 0x89, 0xc0, 0x48, 0x89, 0x37, 0xff, 0xd7, 0xcd, 0xff];
    let end = run_at(frame(24), &call, Frame { rdi: at, rsi: 0x9090_c300_0007_07b8, ..kernel() });
    check("across pages: a store on both sides", end.rax, 0x0707);
    // Straight on from one page into the next, whose first instruction the last one of the first page writes.
    poke_bytes(CODE + 4096 - 7, &[0xc6, 0x05, 1, 0, 0, 0, 0x77, 0xb8, 0, 0, 0, 0, 0xcd, 0xff]);
    let end = run(Frame { rip: CODE + 4096 - 7, ..kernel() });
    check("the first instruction of the next page", end.rax, 0x77);
}

unsafe extern "C" fn patch(frame: &mut Frame, _: &mut Block) {
    // Where the breakpoint was, there is a nop from now on.
    frame.rip -= 1;
    unsafe { (frame.rip as *mut u8).write_volatile(0x90) }
}

fn handlers() {
    set_handler(vector::BP, Some(patch));
    // 2: int3; inc eax; dec ecx; jnz 2b; int 0xff
    let end =
        run_at(CODE, &[0xcc, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xf9, 0xcd, 0xff], Frame { rcx: 5, ..kernel() });
    check("a handler that replaces the breakpoint", end.rax, 5);
    set_handler(vector::BP, None);
    check("it was replaced", peek(CODE) & 0xff, 0x90);
    // A fault handler that fixes the faulting instruction.
    unsafe extern "C" fn fix(frame: &mut Frame, _: &mut Block) {
        unsafe { (frame.rip as *mut u16).write_volatile(0xc0ff) }
    }
    set_handler(vector::UD, Some(fix));
    let end = run_at(CODE, &[0x0f, 0x0b, 0xff, 0xc9, 0x75, 0xfa, 0xcd, 0xff], Frame { rcx: 4, ..kernel() });
    check("a handler that repairs the instruction", end.rax, 4);
    set_handler(vector::UD, None);
}

fn data_beside_code() {
    // A counter in the page of the loop that counts: the code stays as it is, the counter is right.
    // 2: inc qword [rip + 100]; dec rcx; jnz 2b; int 0xff
    poke(CODE + 7 + 100, 0);
    let start = cpu::rdtsc();
    let end = run_at(
        CODE,
        &[0x48, 0xff, 0x05, 100, 0, 0, 0, 0x48, 0xff, 0xc9, 0x75, 0xf4, 0xcd, 0xff],
        Frame { rcx: 100_000, ..kernel() },
    );
    let ticks = cpu::rdtsc() - start;
    check("data in the page of the code", peek(CODE + 7 + 100), 100_000);
    check("and the code runs to its end", end.vector, vector::END);
    check_true("in finite time", ticks < u64::MAX / 2);
    // A stack in the page of the code.
    let end = run_at(
        CODE,
        &[0x50, 0x58, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xf8, 0xcd, 0xff],
        Frame { rcx: 10_000, rsp: CODE + 2048, ..kernel() },
    );
    check("a stack in the page of the code", end.rax, 10_000);
}
