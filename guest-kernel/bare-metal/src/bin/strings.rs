//! String instructions: every width, both directions, the repeat prefixes, and faults in the middle, after which the
//! registers must say exactly how far the instruction came.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu::flags::{CF, DF, PF, STATUS, ZF};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, peek8, poke, poke8};
use harrier_bare_metal::trap::vector;
use harrier_bare_metal::{Frame, check, check_true, code, code64, cpu, guest_main, run};

guest_main!(main);

/// Two pages that follow each other here, and nothing before or behind them.
const A: u64 = TEST_BASE + 0x10_1000;
const B: u64 = TEST_BASE + 0x20_1000;

fn main() {
    for page in 0..2 {
        map(A + page * 4096, frame(page) | entry::P | entry::W);
        // In physical memory the pages of B are in the other order.
        map(B + page * 4096, frame(9 - page) | entry::P | entry::W);
    }
    moves();
    stores_and_loads();
    scans_and_compares();
    faults();
    address_sizes();
}

fn fill(base: u64, len: u64, seed: u64) {
    for n in 0..len {
        poke8(base + n, (n.wrapping_mul(7) ^ n >> 8).wrapping_add(seed) as u8);
    }
}

/// How many of the `len` bytes are not what [`fill`] with `seed` put at `offset` from its base.
fn wrong(base: u64, len: u64, offset: u64, seed: u64) -> u64 {
    let byte = |n: u64| (n.wrapping_mul(7) ^ n >> 8).wrapping_add(seed) as u8;
    (0..len).filter(|n| peek8(base + n) != byte(n + offset)).count() as u64
}

fn exec(code: u64, rax: u64, rcx: u64, rsi: u64, rdi: u64, flags: u64) -> Frame {
    run(Frame { rax, rcx, rsi, rdi, rflags: 2 | flags, ..Frame::kernel(code) })
}

fn registers(name: &str, end: &Frame, rcx: u64, rsi: u64, rdi: u64) {
    check(name, end.rcx, rcx);
    check(name, end.rsi, rsi);
    check(name, end.rdi, rdi);
}

fn moves() {
    let single: [(&str, u64, u64); 4] = [
        ("movsb", code64!("movsb"), 1),
        ("movsw", code64!("movsw"), 2),
        ("movsd", code64!("movsd"), 4),
        ("movsq", code64!("movsq"), 8),
    ];
    for (name, code, width) in single {
        fill(A, 64, 1);
        fill(B, 64, 2);
        let end = exec(code, 0, 5, A + 8, B + 8, STATUS);
        registers(name, &end, 5, A + 8 + width, B + 8 + width);
        check(name, wrong(B + 8, width, 8, 1) + wrong(B, 8, 0, 2) + wrong(B + 8 + width, 8, 8 + width, 2), 0);
        check(name, end.rflags & STATUS, STATUS);
        let end = exec(code, 0, 5, A + 8, B + 8, DF);
        registers(name, &end, 5, A + 8 - width, B + 8 - width);
    }
    let repeated: [(&str, u64, u64); 4] = [
        ("rep movsb", code64!("rep movsb"), 1),
        ("rep movsw", code64!("rep movsw"), 2),
        ("rep movsd", code64!("rep movsd"), 4),
        ("rep movsq", code64!("rep movsq"), 8),
    ];
    for (name, code, width) in repeated {
        // Up, unaligned, over the page boundary of both sides at different places.
        let count = 4608 / width;
        fill(A, 8192, 3);
        fill(B, 8192, 4);
        let end = exec(code, 0, count, A + 0x333, B + 0x701, 0);
        registers(name, &end, 0, A + 0x333 + 4608, B + 0x701 + 4608);
        check(name, wrong(B + 0x701, 4608, 0x333, 3), 0);
        check(name, wrong(B, 0x701, 0, 4) + wrong(B + 0x701 + 4608, 64, 0x701 + 4608, 4), 0);
        // Down.
        fill(B, 8192, 5);
        let end = exec(code, 0, count, A + 0x1ffb - width, B + 0x1ff0 - width, DF);
        registers(name, &end, 0, A + 0x1ffb - width - 4608, B + 0x1ff0 - width - 4608);
        check(name, wrong(B + 0x1ff0 - 4608, 4608, 0x1ffb - 4608, 3), 0);
        check(name, wrong(B, 0x1ff0 - 4608, 0, 5) + wrong(B + 0x1ff0, 16, 0x1ff0, 5), 0);
        let end = exec(code, 0, 0, 1, 2, 0);
        registers(name, &end, 0, 1, 2);
        check(name, end.vector, vector::END);
    }
    // Overlap: the first element repeats itself.
    fill(A, 64, 9);
    exec(code64!("rep movsb"), 0, 32, A, A + 1, 0);
    check_true("overlapping rep movsb repeats a byte", (0..33).all(|n| peek8(A + n) == 9));
    poke(A, 0x1111_1111_2222_2222);
    poke(A + 8, 0x3333_3333);
    exec(code64!("rep movsd"), 0, 6, A, A + 8, 0);
    check("overlapping rep movsd repeats two words", peek(A + 24), 0x1111_1111_2222_2222);
    fill(A, 64, 9);
    exec(code64!("rep movsq"), 0, 4, A, A + 4, 0);
    // Each element takes its first half from the one before.
    let halves = [(4, 0), (8, 4), (12, 4), (16, 12), (20, 12)];
    check_true(
        "overlapping rep movsq by half an element",
        halves.iter().all(|(at, from)| wrong(A + at, 4, *from, 9) == 0),
    );
    fill(A, 4200, 9);
    exec(code64!("rep movsb"), 0, 4190, A + 1, A, 0);
    check("overlapping rep movsb downwards in memory", wrong(A, 4190, 1, 9), 0);
    fill(A, 64, 9);
    exec(code64!("rep movsb"), 0, 32, A + 31, A + 30, DF);
    check_true(
        "overlapping rep movsb backwards repeats a byte",
        (0..30).all(|n| peek8(A + n) == peek8(A + 31)),
    );
    let end = exec(code64!("repne movsb"), 0, 3, A, B, 0);
    registers("repne movs repeats too", &end, 0, A + 3, B + 3);
}

fn stores_and_loads() {
    let stores: [(&str, u64, u64); 4] = [
        ("rep stosb", code64!("rep stosb"), 1),
        ("rep stosw", code64!("rep stosw"), 2),
        ("rep stosd", code64!("rep stosd"), 4),
        ("rep stosq", code64!("rep stosq"), 8),
    ];
    let value: u64 = 0x1122_3344_5566_7788;
    for (name, code, width) in stores {
        let bytes = value.to_le_bytes();
        let count = 4800 / width;
        for (flags, start, low) in [(0, B + 0x123, B + 0x123), (DF, B + 0x1fff - width, B + 0x1fff - 4800)] {
            fill(B, 8192, 4);
            let end = exec(code, value, count, 0, start, flags);
            let moved = if flags == 0 { start + 4800 } else { start - 4800 };
            registers(name, &end, 0, 0, moved);
            let bad = (0..4800).filter(|n| peek8(low + n) != bytes[(n % width) as usize]).count();
            check(name, bad as u64, 0);
            check(name, wrong(low - 16, 16, low - 16 - B, 4) + wrong(low + 4800, 1, low + 4800 - B, 4), 0);
        }
    }
    fill(A, 64, 3);
    poke(A + 8, 0xa1a2_a3a4_a5a6_a7a8);
    let end = exec(
        code64!("lodsb", "mov rbx, rax", "lodsw", "mov rdx, rax", "lodsd", "mov r8, rax", "std", "lodsq"),
        u64::MAX,
        4,
        A + 8,
        0,
        0,
    );
    check("lodsb", end.rbx, 0xffff_ffff_ffff_ffa8);
    check("lodsw", end.rdx, 0xffff_ffff_ffff_a6a7);
    check("lodsd clears the upper half", end.r8, 0xa2a3_a4a5);
    check("lodsq", end.rsi, A + 7);
    let end = exec(code64!("rep lodsb"), 0, 9, A + 7, 0, 0);
    check("rep lodsb ends with the last", end.rax, 0xa1);
    let end = exec(code64!("stosb", "stosw", "stosd", "stosq"), 0x0102_0304_0506_0708, 9, 0, B, 0);
    check("single stores", end.rdi - B, 15);
    check("single stores do not count", end.rcx, 9);
    check("stosw after stosb", peek(B) & 0xff_ffff, 0x07_0808);
}

fn scans_and_compares() {
    fill(A, 8192, 0);
    for n in 0..8192 {
        poke8(B + n, 0xee);
    }
    poke8(B + 0x1100, 0x41);
    let end = exec(code64!("repne scasb"), 0x41, 0x2000, 0, B, 0);
    registers("repne scasb finds", &end, 0x2000 - 0x1101, 0, B + 0x1101);
    check("repne scasb flags", end.rflags & (ZF | CF), ZF);
    let end = exec(code64!("repe scasb"), 0xee, 0x2000, 0, B, 0);
    registers("repe scasb finds", &end, 0x2000 - 0x1101, 0, B + 0x1101);
    check("repe scasb flags are of the last comparison", end.rflags & STATUS, cpu::flags::SF);
    let end = exec(code64!("repne scasb"), 0x42, 0x100, 0, B, CF);
    registers("repne scasb does not find", &end, 0, 0, B + 0x100);
    check("repne scasb does not find: zero", end.rflags & ZF, 0);
    let end = exec(code64!("repne scasb"), 0x42, 0, 0, B, ZF | CF | PF);
    check("scas with count zero leaves flags", end.rflags & STATUS, ZF | CF | PF);
    let end = exec(code64!("repne scasw"), 0x41ee, 0x900, 0, B + 1, 0);
    registers("repne scasw", &end, 0x900 - 0x880, 0, B + 1 + 0x1100);
    let end = exec(code64!("repe scasq"), 0xeeee_eeee_eeee_eeee, 0x300, 0, B, 0);
    registers("repe scasq", &end, 0x300 - 0x221, 0, B + 0x1108);
    let end = exec(code64!("repe scasd"), 0xeeee_eeee, 0x800, 0, B + 0x1ffc, DF);
    registers("repe scasd down", &end, 0x800 - (0x1ffc - 0x1100) / 4 - 1, 0, B + 0x10fc);
    for n in 0..8192 {
        poke8(B + n, peek8(A + n));
    }
    poke8(B + 0x1230, !peek8(B + 0x1230));
    let end = exec(code64!("repe cmpsb"), 0, 0x2000, A, B, 0);
    registers("repe cmpsb", &end, 0x2000 - 0x1231, A + 0x1231, B + 0x1231);
    check("repe cmpsb differs", end.rflags & ZF, 0);
    let end = exec(code64!("repe cmpsq"), 0, 0x400, A, B, 0);
    registers("repe cmpsq", &end, 0x400 - 0x247, A + 0x1238, B + 0x1238);
    let end = exec(code64!("repe cmpsw"), 0, 0x100, A, B, 0);
    registers("repe cmpsw of equals", &end, 0, A + 0x200, B + 0x200);
    check("repe cmpsw of equals flags", end.rflags & STATUS, ZF | PF);
    let end = exec(code64!("repne cmpsd"), 0, 0x10, A, B + 1, 0);
    check("repne cmpsd of unequals", end.rcx, 0);
    poke8(A, 5);
    poke8(B, 6);
    let end = exec(code64!("cmpsb"), 0, 7, A, B, 0);
    check("cmps subtracts the destination from the source", end.rflags & CF, CF);
    let end = exec(code64!("scasb"), 6, 7, A, B, 0);
    registers("scasb", &end, 7, A, B + 1);
}

fn faults() {
    let end_of_b = B + 8192;
    let movs: [(&str, u64, u64); 4] = [
        ("rep movsb into a missing page", code!("rep movsb", "int 0xff"), 1),
        ("rep movsw into a missing page", code!("rep movsw", "int 0xff"), 2),
        ("rep movsd into a missing page", code!("rep movsd", "int 0xff"), 4),
        ("rep movsq into a missing page", code!("rep movsq", "int 0xff"), 8),
    ];
    for (name, code, width) in movs {
        fill(A, 8192, 1);
        fill(B, 8192, 2);
        let end = exec(code, 0, 0x100, A + 0x11, end_of_b - 16 * width, STATUS);
        check(name, end.vector, vector::PF);
        check(name, end.error, 2);
        check(name, end.cr2, end_of_b);
        check(name, end.rip, code);
        registers(name, &end, 0x100 - 16, A + 0x11 + 16 * width, end_of_b);
        check(name, wrong(end_of_b - 16 * width, 16 * width, 0x11, 1), 0);
        check(name, end.rflags & STATUS, STATUS);
        // An element across the end stores none of its bytes.
        fill(B, 8192, 2);
        let end = exec(code, 0, 0x100, A, end_of_b - 1 - width, 0);
        let done = if width == 1 { 2 } else { 1 };
        check(name, end.cr2, end_of_b);
        registers(name, &end, 0x100 - done, A + done * width, end_of_b - 1 - width + done * width);
        if width > 1 {
            check(name, wrong(end_of_b - 1, 1, 8191, 2), 0);
        }
        // Down, out of the source this time.
        let end = exec(code, 0, 0x100, A + 8 * width, B + 4096, DF);
        check(name, end.vector << 8 | end.error, vector::PF << 8);
        check(name, end.cr2, A - width);
        registers(name, &end, 0x100 - 9, A - width, B + 4096 - 9 * width);
    }
    let end = exec(code!("rep stosq", "int 0xff"), 7, 0x1000, 0, A + 8, 0);
    check("rep stosq into a missing page", end.cr2, A + 8192);
    registers("rep stosq into a missing page", &end, 0x1000 - 1023, 0, A + 8192);
    let end = exec(code!("repne scasb", "int 0xff"), 0x1ff, 0x1000, 0, A + 8192 - 5, 0);
    check("repne scasb into a missing page", end.vector, vector::PF);
    let end2 = exec(code!("rep lodsd", "int 0xff"), 0x1ff, 0x1000, A + 8192 - 8, 0, 0);
    registers("rep lodsd into a missing page", &end2, 0x1000 - 2, A + 8192, 0);
    check("rep lodsd loaded before the fault", end2.rax, peek(A + 8192 - 8) >> 32);
    _ = end;
    for n in 0..64 {
        poke8(A + 8192 - 64 + n, 3);
        poke8(B + 8192 - 64 + n, 3);
    }
    let end = exec(code!("repe cmpsw", "int 0xff"), 0, 0x1000, A + 8192 - 32, B + 8192 - 64, 0);
    registers("repe cmpsw into a missing page", &end, 0x1000 - 16, A + 8192, B + 8192 - 32);
    check("repe cmpsw into a missing page: cr2", end.cr2, A + 8192);
    // The instruction goes on where it was once the page is there.
    fill(A, 8192, 6);
    fill(B, 8192, 7);
    let code = code!("rep movsb", "int 0xff");
    let end = exec(code, 0, 0x1800, A, B + 0x1000, 0);
    map(B + 8192, frame(12) | entry::P | entry::W);
    let end = run(Frame { rsp: end.rsp, ..end });
    check("rep movsb resumes", end.vector, vector::END);
    registers("rep movsb resumes", &end, 0, A + 0x1800, B + 0x2800);
    check("rep movsb resumes: bytes", wrong(B + 0x1000, 0x1800, 0, 6), 0);
    map(B + 8192, 0);
    // A page that may not be written.
    map(B + 4096, frame(8) | entry::P);
    let end = exec(code, 0, 0x1800, A, B + 0xff0, 0);
    check("rep movsb into a read-only page", end.error, 3);
    registers("rep movsb into a read-only page", &end, 0x1800 - 16, A + 16, B + 0x1000);
    map(B + 4096, frame(8) | entry::P | entry::W);
    let end = exec(code, 0, 4, A, 0x8000_0000_0000_0000, 0);
    check("rep movsb to a non-canonical address", end.vector, vector::GP);
    registers("rep movsb to a non-canonical address", &end, 4, A, 0x8000_0000_0000_0000);
    // Single steps: a trap after every element.
    cpu::set_dr6(0);
    let end = exec(code, 0, 5, A, B, cpu::flags::TF);
    check("single step stops after one element", end.vector, vector::DB);
    registers("single step stops after one element", &end, 4, A + 1, B + 1);
    check("single step inside rep stays at the instruction", end.rip, code);
    let end = run(Frame { rflags: end.rflags & !cpu::flags::TF, ..end });
    registers("and goes on", &end, 0, A + 5, B + 5);
}

fn address_sizes() {
    fill(frame(0), 64, 1);
    let end = exec(
        code64!("addr32 rep movsb"),
        0,
        0xffff_ffff_0000_0010,
        0xaaaa_0000_0000_0000 | frame(0),
        0xbbbb_0000_0000_0000 | frame(4),
        0,
    );
    check("32-bit addresses: done", end.vector, vector::END);
    registers("32-bit addresses", &end, 0, frame(0) + 16, frame(4) + 16);
    check("32-bit addresses: bytes", wrong(frame(4), 16, 0, 1), 0);
    let end =
        exec(code64!("addr32 lodsb", "addr32 stosb"), 0, 1 << 40, 1 << 40 | frame(0), 1 << 40 | frame(4), 0);
    check("32-bit lods and stos", end.rsi << 32 | end.rdi, (frame(0) + 1) << 32 | (frame(4) + 1));
    check("without repeat rcx is untouched", end.rcx, 1 << 40);
    cpu::wrmsr(cpu::msr::FS_BASE, 0x40);
    fill(frame(0), 128, 1);
    let end = exec(
        code64!("movs byte ptr [rdi], byte ptr fs:[rsi]", "lods al, byte ptr fs:[rsi]"),
        0,
        1,
        frame(0),
        frame(4),
        0,
    );
    check("movs takes a segment override for the source", wrong(frame(4), 1, 0x40, 1), 0);
    check("lods takes a segment override", end.rax, u64::from(peek8(frame(0) + 0x41)));
    cpu::wrmsr(cpu::msr::FS_BASE, 0);
    // Ports: the serial scratch register.
    poke(frame(0), 0x1234_5678_9abc_def0);
    let end = run(Frame {
        rdx: 0x3ff,
        rcx: 3,
        rsi: frame(0),
        rdi: frame(4),
        ..Frame::kernel(code64!("rep outsb", "mov ecx, 2", "rep insb"))
    });
    registers("rep outsb and insb", &end, 0, frame(0) + 3, frame(4) + 2);
    check("rep insb reads the port", peek(frame(4)) & 0xffff, 0xbcbc);
    let end = run(Frame {
        rdx: 0x3ff,
        rcx: 0x40,
        rdi: B + 8192 - 4,
        ..Frame::kernel(code!("rep insb", "int 0xff"))
    });
    check("rep insb into a missing page", end.cr2, B + 8192);
    check("rep insb into a missing page: count", end.rcx, 0x3c);
    let end = run(Frame {
        rdx: 0x3ff,
        rsi: frame(0) + 1,
        rdi: B + 64,
        rflags: 2 | DF,
        ..Frame::kernel(code64!("outsb", "insb"))
    });
    check("outs and ins go down", end.rsi << 32 | (end.rdi - B), frame(0) << 32 | 63);
    check("ins after outs", u64::from(peek8(B + 64)), 0xde);
}
