//! Integer instructions with known results: arithmetic, shifts, bit instructions, exchanges, stack frames, flags.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu::flags::{AC, AF, CF, DF, ID, IF, OF, PF, SF, STATUS, ZF};
use harrier_bare_metal::paging::{frame, peek, poke, poke8};
use harrier_bare_metal::trap::vector;
use harrier_bare_metal::{Frame, check, check_true, code, code64, cpu, guest_main, run, tcg_lacks, trap};

guest_main!(main);

fn main() {
    arithmetic();
    multiply_and_divide();
    shifts();
    bits();
    conditions();
    exchanges();
    moves();
    flags_and_stack();
    undefined();
}

/// Runs `code` with RAX, RCX, RDX and RBX; RSI points to scratch memory, the status flags are as given.
fn exec(code: u64, rax: u64, rcx: u64, rdx: u64, rbx: u64, flags: u64) -> Frame {
    run(Frame { rax, rcx, rdx, rbx, rsi: frame(0), rflags: 2 | flags, ..Frame::kernel(code) })
}

fn ended(name: &str, end: &Frame, expected: u64) {
    check(name, end.vector, expected);
}

macro_rules! binary {
    ($op:literal, $width:literal, $a:literal, $b:literal, $carry:expr => $result:expr, $flags:expr, $mask:expr) => {{
        let (a, c) = match $width {
            8 => ("al", "cl"),
            16 => ("ax", "cx"),
            32 => ("eax", "ecx"),
            _ => ("rax", "rcx"),
        };
        _ = (a, c);
        let code = match $width {
            8 => code64!(concat!($op, " al, cl")),
            16 => code64!(concat!($op, " ax, cx")),
            32 => code64!(concat!($op, " eax, ecx")),
            _ => code64!(concat!($op, " rax, rcx")),
        };
        let name = concat!($op, " ", stringify!($width), " of ", stringify!($a), " and ", stringify!($b));
        let end = exec(code, $a, $b, 0, 0, $carry);
        check(name, end.rax, $result);
        check(
            concat!($op, " ", stringify!($width), " flags of ", stringify!($a), " and ", stringify!($b)),
            end.rflags & $mask,
            $flags,
        );
    }};
}

fn arithmetic() {
    binary!("add", 8, 0x1122_3344_5566_77ff, 1, 0 => 0x1122_3344_5566_7700, CF | PF | AF | ZF, STATUS);
    binary!("add", 16, 0x1122_3344_5566_7fff, 1, 0 => 0x1122_3344_5566_8000, OF | SF | AF | PF, STATUS);
    binary!("add", 32, 0x1122_3344_7fff_ffff, 0x7fff_ffff, 0 => 0xffff_fffe, OF | SF | AF, STATUS);
    binary!("add", 64, 0x8000_0000_0000_0000, 0x8000_0000_0000_0000, 0 => 0, OF | CF | ZF | PF, STATUS);
    binary!("adc", 64, 0xffff_ffff_ffff_ffff, 0, CF => 0, CF | ZF | PF | AF, STATUS);
    binary!("adc", 8, 0x7f, 0x80, CF => 0, CF | ZF | PF | AF, STATUS);
    binary!("sub", 32, 0xffff_ffff_0000_0000, 1, 0 => 0xffff_ffff, CF | SF | PF | AF, STATUS);
    binary!("sub", 8, 0x80, 1, 0 => 0x7f, OF | AF, STATUS);
    binary!("sbb", 16, 0x1_0000, 0xffff, CF => 0x1_0000, CF | ZF | PF | AF, STATUS);
    binary!("sbb", 64, 0, 0x8000_0000_0000_0000, CF => 0x7fff_ffff_ffff_ffff, CF | PF | AF, STATUS);
    binary!("cmp", 32, 5, 5, CF => 5, ZF | PF, STATUS);
    binary!("and", 64, 0xff00_0000_0000_00f0, 0xf000_0000_0000_000f, CF | OF => 0xf000_0000_0000_0000, SF | PF, STATUS & !AF);
    binary!("or", 16, 0xabcd_0f00, 0x00f0, CF => 0xabcd_0ff0, PF, STATUS & !AF);
    binary!("xor", 32, 0xffff_ffff_1234_5678, 0x1234_5678, OF => 0, ZF | PF, STATUS & !AF);
    binary!("test", 8, 0x80, 0x80, CF => 0x80, SF, STATUS & !AF);

    let inc = exec(code64!("inc al"), 0x1ff, 0, 0, 0, CF);
    check("inc keeps carry and wraps the byte", inc.rax, 0x100);
    check("inc flags", inc.rflags & STATUS, CF | ZF | PF | AF);
    let dec = exec(code64!("dec eax"), 0xffff_ffff_8000_0000, 0, 0, 0, 0);
    check("dec 32 clears the upper half", dec.rax, 0x7fff_ffff);
    check("dec flags", dec.rflags & STATUS, OF | AF | PF);
    let neg = exec(code64!("neg rax"), 0x8000_0000_0000_0000, 0, 0, 0, 0);
    check("neg of the smallest", neg.rax, 0x8000_0000_0000_0000);
    check("neg flags", neg.rflags & STATUS, CF | OF | SF | PF);
    let not = exec(code64!("not ax"), 0x1_0000, 0, 0, 0, STATUS);
    check("not 16", not.rax, 0x1_ffff);
    check("not leaves flags", not.rflags & STATUS, STATUS);
    let high = exec(code64!("add ah, ch", "mov dl, bh"), 0x1200, 0xff00, 0xaa, 0x5500, 0);
    check("high byte add", high.rax, 0x1100);
    check("high byte move", high.rdx, 0x55);
    let rex = exec(code64!("mov sil, al", "add dil, sil"), 0x77, 0, 0, 0, 0);
    check("byte registers with rex", rex.rsi, frame(0) | 0x77);
    check("byte add with rex", rex.rdi, 0x77);
    let lea = exec(
        code64!("lea rdx, [rax + rcx * 8 - 8]", "lea ebx, [rax + rcx]", "lea ax, [rcx + 1]"),
        0x1_0000_0005,
        3,
        0,
        0,
        STATUS,
    );
    check("lea 64", lea.rdx, 0x1_0000_0015);
    check("lea 32 truncates", lea.rbx, 8);
    check("lea 16 keeps the rest", lea.rax, 0x1_0000_0004);
    check("lea leaves flags", lea.rflags & STATUS, STATUS);
    let a32 = exec(code64!("lea rdx, [eax + ecx]"), 0xffff_ffff, 2, 0, 0, 0);
    check("32-bit addresses wrap", a32.rdx, 1);
    poke(frame(0), 0x7fff_ffff_ffff_fff0);
    let memory = exec(
        code64!("add qword ptr [rsi], 0x10", "setc al", "sets cl", "seto dl", "lock add dword ptr [rsi], -1"),
        0,
        0,
        0,
        0,
        0,
    );
    check("add to memory", peek(frame(0)), 0x8000_0000_ffff_ffff);
    check("setc", memory.rax, 0);
    check("sets", memory.rcx, 1);
    check("seto", memory.rdx, 1);
    let imm = exec(
        code64!("and rax, -16", "cmp rcx, -1", "sete dl", "add ebx, 0x80000000", "setc bh"),
        0xffff_ffff_ffff_ffff,
        0xffff_ffff_ffff_ffff,
        0,
        0x8000_0000,
        0,
    );
    check("sign-extended immediate", imm.rax, 0xffff_ffff_ffff_fff0);
    check("sign-extended comparison", imm.rdx, 1);
    check("32-bit immediate", imm.rbx, 0x100);
}

fn multiply_and_divide() {
    let mul = exec(code64!("mul rcx"), 0xffff_ffff_ffff_ffff, 0xffff_ffff_ffff_ffff, 0, 0, 0);
    check("mul 64 low", mul.rax, 1);
    check("mul 64 high", mul.rdx, 0xffff_ffff_ffff_fffe);
    check("mul 64 carry and overflow", mul.rflags & (CF | OF), CF | OF);
    let mul8 = exec(code64!("mul cl"), 0xaabb_0010, 0x0f, 0xff, 0, CF | OF);
    check("mul 8", mul8.rax, 0xaabb_00f0);
    check("mul 8 leaves dx", mul8.rdx, 0xff);
    check("mul 8 fits", mul8.rflags & (CF | OF), 0);
    let imul = exec(code64!("imul ecx"), 0xffff_fffe, 3, 0xffff_ffff_ffff_ffff, 0, 0);
    check("imul 32 low", imul.rax, 0xffff_fffa);
    check("imul 32 high", imul.rdx, 0xffff_ffff);
    check("imul 32 fits", imul.rflags & (CF | OF), 0);
    let imul2 = exec(code64!("imul rax, rcx"), 0x4000_0000_0000_0000, 2, 0, 0, 0);
    check("imul two operands", imul2.rax, 0x8000_0000_0000_0000);
    check("imul two operands overflows", imul2.rflags & (CF | OF), CF | OF);
    let imul3 = exec(code64!("imul ax, cx, -3", "imul edx, ecx, 0x10001"), 0x1_0000, 0x0100, 0, 0, 0);
    check("imul 16 immediate", imul3.rax, 0x1_fd00);
    check("imul 32 immediate", imul3.rdx, 0x0100_0100);

    let div = exec(code64!("div rcx"), 5, 0x10, 1, 0, 0);
    check("div 64 quotient", div.rax, 0x1000_0000_0000_0000);
    check("div 64 remainder", div.rdx, 5);
    let div8 = exec(code64!("div cl"), 0x1234_01ff, 2, 0, 0, 0);
    check("div 8", div8.rax, 0x1234_01ff);
    let div32 = exec(code64!("div ecx"), 0xdead_beef_0000_0007, 2, 0xffff_ffff_0000_0001, 0, 0);
    check("div 32 quotient", div32.rax, 0x8000_0003);
    check("div 32 remainder", div32.rdx, 1);
    let idiv = exec(code64!("idiv rcx"), (-7i64) as u64, 2, u64::MAX, 0, 0);
    check("idiv 64 quotient", idiv.rax, (-3i64) as u64);
    check("idiv 64 remainder", idiv.rdx, u64::MAX);
    let idiv16 = exec(code64!("idiv cx"), 0xffff_0000, 2, 0xffff, 0, 0);
    check("idiv 16 quotient", idiv16.rax, 0xffff_8000);
    check("idiv 16 remainder", idiv16.rdx, 0);

    let faults: [(&str, u64, u64, u64, u64); 9] = [
        ("div 64 by zero", code64!("div rcx"), 1, 0, 0),
        ("div 64 quotient too large", code64!("div rcx"), 0, 5, 5),
        ("div 32 quotient too large", code64!("div ecx"), 0, 0x1_0000_0001, 1),
        ("div 16 by zero", code64!("div cx"), 1, 0x1_0000, 0),
        ("div 8 quotient too large", code64!("div cl"), 0x200, 2, 0),
        ("idiv 64 of the smallest by -1", code64!("idiv rcx"), 1 << 63, u64::MAX, u64::MAX),
        ("idiv 64 quotient too large", code64!("idiv rcx"), 0, 2, 1),
        ("idiv 32 of the smallest by -1", code64!("idiv ecx"), 0x8000_0000, 0xffff_ffff, 0xffff_ffff),
        ("idiv 8 quotient too large", code64!("idiv cl"), 0x80, 1, 0),
    ];
    for (name, code, rax, rcx, rdx) in faults {
        let end = exec(code, rax, rcx, rdx, 0, 0);
        ended(name, &end, vector::DE);
        check_true(name, end.rip == code && end.rax == rax && end.rdx == rdx);
    }
    let cwd = exec(code64!("cbw", "mov rcx, rax", "cwd", "cwde", "cdqe"), 0x1234_0080, 0, 0x1_0000, 0, 0);
    check("cbw", cwd.rcx, 0x1234_ff80);
    check("cwd", cwd.rdx, 0x1_ffff);
    check("cwde and cdqe", cwd.rax, 0xffff_ffff_ffff_ff80);
    let cqo = exec(code64!("cdq", "mov rcx, rdx", "cdqe", "cqo"), 0x8000_0000, 0, 0, 0, 0);
    check("cdq", cqo.rcx, 0xffff_ffff);
    check("cqo", cqo.rdx, u64::MAX);
}

fn shifts() {
    /// Name, code, RAX, RCX, flags before, result, flags after, which of them are defined.
    type Shift = (&'static str, u64, u64, u64, u64, u64, u64, u64);
    let cases: [Shift; 22] = [
        (
            "shl 64 by 1",
            code64!("shl rax, 1"),
            0xc000_0000_0000_0000,
            0,
            0,
            0x8000_0000_0000_0000,
            CF | SF | PF,
            STATUS & !AF,
        ),
        (
            "shl 32 by 31",
            code64!("shl eax, 31"),
            0xffff_ffff_0000_0003,
            0,
            0,
            0x8000_0000,
            CF | SF | PF,
            STATUS & !(AF | OF),
        ),
        ("shl by 0 leaves flags", code64!("shl rax, cl"), 5, 0, STATUS, 5, STATUS, STATUS),
        (
            "shl 32 by 0 clears the upper half",
            code64!("shl eax, cl"),
            0x1_0000_0005,
            32,
            STATUS,
            5,
            STATUS,
            STATUS,
        ),
        ("shl 32 masks the count", code64!("shl eax, cl"), 1, 33, 0, 2, 0, STATUS & !(AF | OF)),
        ("shl 64 masks the count", code64!("shl rax, cl"), 1, 65, 0, 2, 0, STATUS & !AF),
        ("shl 8 by 8", code64!("shl al, 8"), 0x101, 0, 0, 0x100, CF | ZF | PF, STATUS & !(AF | OF)),
        ("shl 8 by 20", code64!("shl al, 20"), 0x1ff, 0, 0, 0x100, ZF | PF, STATUS & !(AF | OF | CF)),
        (
            "shr 64 by 1",
            code64!("shr rax, 1"),
            0x8000_0000_0000_0001,
            0,
            0,
            0x4000_0000_0000_0000,
            CF | OF | PF,
            STATUS & !AF,
        ),
        ("shr 16 by 16", code64!("shr ax, 16"), 0x1_8000, 0, 0, 0x1_0000, CF | ZF | PF, STATUS & !(AF | OF)),
        (
            "sar 64 by 63",
            code64!("sar rax, 63"),
            0x8000_0000_0000_0000,
            0,
            0,
            u64::MAX,
            SF | PF,
            STATUS & !(AF | OF),
        ),
        ("sar 8 by 31", code64!("sar al, 31"), 0x80, 0, 0, 0xff, CF | SF | PF, STATUS & !(AF | OF)),
        ("rol 8 by 9", code64!("rol al, 9"), 0x81, 0, 0, 0x03, CF, CF),
        (
            "rol 16 by 16 sets carry",
            code64!("rol ax, 16"),
            0x0001,
            0,
            ZF | SF,
            0x0001,
            CF | ZF | SF,
            CF | ZF | SF,
        ),
        ("ror 64 by 1", code64!("ror rax, 1"), 1, 0, 0, 0x8000_0000_0000_0000, CF | OF, CF | OF),
        ("ror 32 by 4", code64!("ror eax, 4"), 0x1234_5678, 0, 0, 0x8123_4567, CF, CF),
        ("rcl 8 by 9 is the identity", code64!("rcl al, 9"), 0xa5, 0, CF, 0xa5, CF, CF),
        ("rcl 64 by 1", code64!("rcl rax, 1"), 0x8000_0000_0000_0000, 0, CF, 1, CF | OF, CF | OF),
        ("rcl 16 by 17 is the identity", code64!("rcl ax, 17"), 0x1234, 0, CF, 0x1234, CF, CF),
        ("rcr 32 by 1", code64!("rcr eax, 1"), 1, 0, CF, 0x8000_0000, CF | OF, CF | OF),
        ("rcr 8 by 3", code64!("rcr al, 3"), 0b0000_0111, 0, 0, 0b1100_0000, CF, CF),
        ("rcr 64 by cl", code64!("rcr rax, cl"), 0x3, 2, 0, 0x8000_0000_0000_0000, CF, CF),
    ];
    for (name, code, rax, rcx, flags, result, expected, mask) in cases {
        let end = exec(code, rax, rcx, 0, 0, flags);
        check(name, end.rax, result);
        check(name, end.rflags & mask, expected);
    }
    let shld = exec(
        code64!("shld rax, rdx, 12", "mov rbx, 0", "shrd ecx, edx, 8"),
        0x0123_4567_89ab_cdef,
        0xffff_ffff,
        0xfed0_0000_0000_0012,
        0,
        0,
    );
    check("shld 64", shld.rax, 0x3456_789a_bcde_ffed);
    check("shrd 32", shld.rcx, 0x12ff_ffff);
    let shld0 = exec(code64!("shld eax, edx, cl"), 0x1_0000_0001, 32, 0xffff_ffff, 0, STATUS);
    check("shld by 0", shld0.rax, 1);
    check("shld by 0 leaves flags", shld0.rflags & STATUS, STATUS);
    let shrd16 = exec(code64!("shrd ax, dx, 4"), 0x1234, 0, 0xabcd, 0, 0);
    check("shrd 16", shrd16.rax, 0xd123);
    poke(frame(0), 0x80);
    exec(code64!("sar byte ptr [rsi], 3", "rol dword ptr [rsi + 4], cl"), 0, 1, 0, 0, 0);
    check("sar in memory", peek(frame(0)), 0xf0);
}

fn bits() {
    for n in 0..64 {
        poke(frame(1) + n * 8, 0);
        poke(frame(2) + n * 8, 0);
    }
    let far = exec(
        code64!(
            "add rsi, 0x1800",
            "bts [rsi], rax",
            "setc al",
            "bts word ptr [rsi], cx",
            "bts dword ptr [rsi], edx",
            "setc dl",
        ),
        0x1005,
        0xffff,
        (-0x2000i32) as u32 as u64,
        0,
        0,
    );
    check("bts 64 far ahead", peek(frame(1) + 0x800 + 0x200), 1 << 5);
    check("bts 16 behind", peek(frame(1) + 0x800 - 8), 1 << 63);
    check("bts 32 far behind", peek(frame(1) + 0x800 - 0x400), 1);
    check("bts answers the old bit", far.rax & 0xff, 0);
    let bt = exec(
        code64!("bt eax, 33", "setc dl", "bt rax, rcx", "setc bl", "btr rax, 1", "btc eax, 31"),
        0b10,
        64 + 1,
        0,
        0,
        0,
    );
    check("bt immediate wraps", bt.rdx, 1);
    check("bt register wraps", bt.rbx, 1);
    check("btr and btc", bt.rax, 0x8000_0000);
    poke(frame(1), 0x10);
    let imm = exec(
        code64!("btr qword ptr [rsi + 0x1000], 68", "setc al", "btc dword ptr [rsi + 0x1000], 32"),
        0,
        0,
        0,
        0,
        0,
    );
    check("bt memory immediate wraps inside the operand", peek(frame(1)), 1);
    check("btr answers the old bit", imm.rax, 1);
    let scan =
        exec(code64!("bsf rax, rcx", "bsr edx, ecx", "bsf rbx, rdi", "setz dil"), 0, 0x1_0010_0000, 0, 0, 0);
    check("bsf", scan.rax, 20);
    check("bsr", scan.rdx, 20);
    check("bsf of zero sets zero", scan.rdi, 1);
    let popcnt = exec(code64!("popcnt rax, rcx", "popcnt dx, cx"), 0, 0xff00_0000_0000_f00f, 0, 0, STATUS);
    check("popcnt 64", popcnt.rax, 16);
    check("popcnt 16", popcnt.rdx, 8);
    check("popcnt clears flags", popcnt.rflags & STATUS, 0);
    let bswap =
        exec(code64!("bswap rax", "bswap ecx"), 0x0102_0304_0506_0708, 0xffff_ffff_1122_3344, 0, 0, 0);
    check("bswap 64", bswap.rax, 0x0807_0605_0403_0201);
    check("bswap 32", bswap.rcx, 0x4433_2211);
    let crc =
        exec(code64!("crc32 eax, cl", "crc32 rdx, rbx"), 0xffff_ffff, 0x61, 0, 0x0102_0304_0506_0708, 0);
    check("crc32 of a byte", crc.rax ^ 0xffff_ffff, 0xc1d0_4330);
    check_true("crc32 of 8 bytes clears the upper half", crc.rdx >> 32 == 0 && crc.rdx != 0);
}

fn conditions() {
    // For every combination of CF, ZF, SF, OF and PF all sixteen conditions, as a bit mask in RAX.
    let code = code64!(
        "pushfq",
        "pop rbx",
        ".irp cc, g, le, ge, l, np, p, ns, s, a, be, ne, e, ae, b, no, o",
        "push rbx",
        "popfq",
        "set\\cc dl",
        "lea rax, [rax * 2]",
        "movzx edx, dl",
        "lea rax, [rax + rdx]",
        ".endr",
        "push rbx",
        "popfq",
        "mov ecx, 7",
        "mov edi, 9",
        "cmova rcx, rdi",
        "mov r8d, -1",
        "cmovno r8d, edi",
    );
    let mut wrong = 0;
    let mut moved = 0;
    let mut jumps = 0;
    for n in 0..32u64 {
        let bit = |index: u64, flag: u64| if n >> index & 1 != 0 { flag } else { 0 };
        let flags = bit(0, CF) | bit(1, ZF) | bit(2, SF) | bit(3, OF) | bit(4, PF);
        let has = |flag: u64| flags & flag != 0;
        let less = has(SF) != has(OF);
        let expected =
            [has(OF), has(CF), has(ZF), has(CF) || has(ZF), has(SF), has(PF), less, less || has(ZF)];
        let mut mask = 0;
        for (index, condition) in expected.into_iter().enumerate() {
            mask |= (if condition { 1 } else { 2 }) << (2 * index);
        }
        let end = exec(code, 0, 0, 0, 0, flags);
        wrong += u64::from(end.rax != mask);
        let above = !has(CF) && !has(ZF);
        moved += u64::from(end.rcx != if above { 9 } else { 7 });
        moved += u64::from(end.r8 != if has(OF) { 0xffff_ffff } else { 9 });
        let jump = exec(
            code64!(
                ".irp cc, g, le, ge, l, np, p, ns, s, a, be, ne, e, ae, b, no, o",
                "lea rax, [rax * 2]",
                "j\\cc 2f",
                "jmp 3f",
                "2: lea rax, [rax + 1]",
                "3:",
                ".endr"
            ),
            0,
            0,
            0,
            0,
            flags,
        );
        jumps += u64::from(jump.rax != mask);
    }
    check("setcc in all flag combinations", wrong, 0);
    check("cmovcc in all flag combinations", moved, 0);
    check("jcc in all flag combinations", jumps, 0);
    let cmov = exec(code64!("stc", "cmovnc eax, ecx"), 0x1_0000_0002, 7, 0, 0, 0);
    check("cmov 32 that does not move clears the upper half", cmov.rax, 2);
    let looped = exec(
        code64!(
            "2: inc rax",
            "loop 2b",
            "mov ecx, 3",
            "3: inc rdx",
            "cmp rdx, 2",
            "loopne 3b",
            "jrcxz 4f",
            "mov ebx, 1",
            "4:"
        ),
        0,
        5,
        0,
        0,
        0,
    );
    check("loop", looped.rax, 5);
    check("loopne", looped.rdx, 2);
    check("jrcxz does not jump", looped.rbx, 1);
    let jecxz = exec(code64!("jecxz 2f", "mov eax, 1", "2:"), 0, 0x1_0000_0000, 0, 0, 0);
    check("jecxz looks at 32 bits", jecxz.rax, 0);
}

fn exchanges() {
    let at = frame(0);
    poke(at, 0x1111_2222_3333_4444);
    poke(at + 8, 0x5555_6666_7777_8888);
    let end = exec(code64!("cmpxchg8b [rsi]"), 0x3333_4444, 0xccc, 0x1111_2222, 0xbbb, 0);
    check("cmpxchg8b stores", peek(at), 0xccc_0000_0bbb);
    check("cmpxchg8b sets zero only", end.rflags & STATUS, ZF);
    let end = exec(code64!("lock cmpxchg8b [rsi]"), 1, 2, 3, 4, STATUS);
    check("cmpxchg8b loads the low half", end.rax, 0xbbb);
    check("cmpxchg8b loads the high half", end.rdx, 0xccc);
    check("cmpxchg8b clears zero only", end.rflags & STATUS, STATUS & !ZF);
    poke(at, 0x1111_2222_3333_4444);
    let end =
        exec(code64!("lock cmpxchg16b [rsi]"), 0x1111_2222_3333_4444, 0xc, 0x5555_6666_7777_8888, 0xb, 0);
    check("cmpxchg16b stores low", peek(at), 0xb);
    check("cmpxchg16b stores high", peek(at + 8), 0xc);
    check("cmpxchg16b sets zero", end.rflags & STATUS, ZF);
    let end = exec(code64!("cmpxchg16b [rsi]"), 0, 0, 0xc, 0, ZF);
    check("cmpxchg16b loads", end.rax << 32 | end.rdx, 0xb_0000_000c);
    let end = exec(code64!("cmpxchg16b [rsi + 8]"), 0, 0, 0, 0, 0);
    ended("cmpxchg16b wants alignment", &end, vector::GP);
    poke(at, 0x1_0000_0002);
    let end = exec(
        code64!("xadd [rsi], eax", "mov rdx, rax", "lock xadd [rsi], rcx"),
        0xffff_ffff_ffff_ffff,
        2,
        0,
        0,
        0,
    );
    check("xadd memory", peek(at), 0x1_0000_0003);
    check("xadd 32 clears the upper half", end.rdx, 2);
    check("xadd 64", end.rcx, 0x1_0000_0001);
    let end = exec(code64!("xadd rax, rax", "xadd cl, ch"), 5, 0x0201, 0, 0, 0);
    check("xadd with itself", end.rax, 10);
    check("xadd of bytes", end.rcx, 0x0103);
    poke(at, 7);
    let end = exec(code64!("cmpxchg [rsi], rcx", "setz dl", "cmpxchg [rsi], rcx", "setz bl"), 1, 9, 0, 0, 0);
    check("cmpxchg", peek(at), 9);
    check("cmpxchg fails, then stores", end.rdx << 1 | end.rbx, 1);
    check("cmpxchg loads the accumulator", end.rax, 7);
    let end = exec(code64!("cmpxchg edx, ecx"), 0x1_0000_0005, 9, 0xffff_ffff_0000_0005, 0, 0);
    check("cmpxchg 32 register", end.rdx, 9);
    let end = exec(
        code64!("xchg [rsi], al", "xchg rcx, rdx", "xchg eax, ebx"),
        0xff01,
        1,
        2,
        0xffff_ffff_0000_0003,
        0,
    );
    check("xchg memory", peek(at), 1);
    check("xchg registers", end.rcx << 8 | end.rdx, 0x201);
    check("xchg 32", end.rax << 16 | end.rbx, 0x3_ff09);
    let end =
        exec(code64!("xchg ax, ax", ".byte 0x90", ".byte 0x87, 0xc0"), 0xffff_ffff_ffff_ffff, 0, 0, 0, 0);
    check("xchg eax, eax clears the upper half and nop does not", end.rax, 0xffff_ffff);
    let nop = exec(code64!(".byte 0x90"), u64::MAX, 0, 0, 0, 0);
    check("nop leaves rax", nop.rax, u64::MAX);
    if !tcg_lacks("lock on mov is undefined") {
        let lock = exec(code!(".byte 0xf0", "mov [rsi], eax", "int 0xff"), 0, 0, 0, 0, 0);
        ended("lock on mov is undefined", &lock, vector::UD);
    }
    let lock = exec(code!(".byte 0xf0, 0x01, 0xc8", "ud2"), 0, 0, 0, 0, 0);
    ended("lock on registers is undefined", &lock, vector::UD);
}

fn moves() {
    poke(frame(0), 0xffff_ffff_8765_43f1);
    let end = exec(
        code64!(
            "movzx eax, byte ptr [rsi]",
            "movsx rcx, word ptr [rsi]",
            "movsxd rdx, dword ptr [rsi]",
            "movsx ebx, byte ptr [rsi]",
            "movzx edi, word ptr [rsi]"
        ),
        u64::MAX,
        0,
        0,
        0,
        0,
    );
    check("movzx", end.rax, 0xf1);
    check("movsx 64 of 16", end.rcx, 0x43f1);
    check("movsxd", end.rdx, 0xffff_ffff_8765_43f1);
    check("movsx 32 of 8", end.rbx, 0xffff_fff1);
    check("movzx 32 of 16", end.rdi, 0x43f1);
    let end = exec(
        code64!(
            "mov rax, 0x123456789abcdef0",
            "mov ecx, 0x80000000",
            "mov rdx, -0x80000000",
            "mov bx, 0x1234"
        ),
        0,
        u64::MAX,
        0,
        0xffff_ffff_ffff_ffff,
        0,
    );
    check("mov 64 immediate", end.rax, 0x1234_5678_9abc_def0);
    check("mov 32 immediate", end.rcx, 0x8000_0000);
    check("mov sign-extended immediate", end.rdx, 0xffff_ffff_8000_0000);
    check("mov 16 immediate", end.rbx, 0xffff_ffff_ffff_1234);
    let end =
        exec(code64!("movabs [0x1000010], rax", "movabs al, [0x1000011]"), 0x0102_0304_0506_0708, 0, 0, 0, 0);
    check("movabs", end.rax, 0x0102_0304_0506_0707);
    for n in 0..256 {
        poke8(frame(3) + n, (255 - n) as u8);
    }
    let end = exec(code64!("lea rbx, [rsi + 0x3000]", "xlatb"), 0x1234_5610, 0, 0, 0, 0);
    check("xlatb", end.rax, 0x1234_56ef);
    let end = exec(
        code64!("mov eax, ds", "mov rcx, 0xffffffffffffffff", ".byte 0x66, 0x8c, 0xc9", "mov [rsi], ss"),
        u64::MAX,
        0,
        0,
        0,
        0,
    );
    check("mov from ds", end.rax, 0x10);
    check("mov 16 from cs", end.rcx, 0xffff_ffff_ffff_0008);
    check("mov of ss to memory is 16 bits", peek(frame(0)), 0xffff_ffff_8765_0010);
    let end = exec(code64!("clc", "cmc", "setc al", "std", "pushfq", "pop rcx", "cld"), 0, 0, 0, 0, 0);
    check("cmc", end.rax, 1);
    check("std", end.rcx & DF, DF);
    let end = exec(code64!("sahf", "lahf"), 0xff00, 0, 0, 0, OF);
    check("sahf and lahf", end.rax, 0xd700);
    check("sahf leaves overflow", end.rflags & STATUS, STATUS);
}

fn flags_and_stack() {
    let end = exec(
        code64!(
            "mov rbx, rsp",
            "pushfq",
            "pop rax",
            "or rax, 0x240cd5",
            "push rax",
            "popfq",
            "pushfq",
            "pop rcx",
            "sub rbx, rsp",
            "push 2",
            "popfq"
        ),
        0,
        0,
        0,
        1,
        0,
    );
    check(
        "popf sets status, direction, ac and id flags",
        end.rcx & (STATUS | DF | AC | ID),
        STATUS | DF | AC | ID,
    );
    check("push and pop balance", end.rbx, 0);
    check("popf clears", end.rflags & (STATUS | DF | AC | ID | IF), 0);
    let end =
        exec(code64!("pushfq", "or dword ptr [rsp], 0x30000", "popfq", "pushfq", "pop rax"), 0, 0, 0, 0, 0);
    check("popf clears rf and ignores vm", end.rax & 0x3_0000, 0);
    let end = exec(
        code64!("pushf", ".byte 0x66, 0x68, 0xd5, 0x0c", ".byte 0x66, 0x9d", "pushfq", "pop rax", "popf"),
        0,
        0,
        0,
        0,
        0,
    );
    check("popf 16 leaves the upper half", end.rax & 0xffff_0000, 0);
    let end = exec(
        code64!(
            "mov rbx, rsp",
            "push -2",
            "pop rax",
            "push 0x7fffffff",
            "pop rcx",
            ".byte 0x66, 0x6a, 0x05",
            "pop dx",
            "sub rbx, rsp"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    check("push sign-extends a byte", end.rax, (-2i64) as u64);
    check("push immediate", end.rcx, 0x7fff_ffff);
    check("push word", end.rdx, 5);
    check("push word balances", end.rbx, 0);
    let top = trap::snippet_stack();
    let end = exec(
        code64!("push rsp", "pop rax", "push rcx", "pop rsp", "mov rdx, rsp", "mov rsp, rax"),
        0,
        0x1234,
        0,
        0,
        0,
    );
    check("push rsp pushes the old value", end.rax, top);
    check("pop rsp takes the value", end.rdx, 0x1234);
    let end = exec(
        code64!(
            "push rax",
            "pop qword ptr [rsp - 8]",
            "mov rcx, [rsp - 8]",
            "push qword ptr [rsp - 8]",
            "pop rdx"
        ),
        0x77,
        0,
        0,
        0,
        0,
    );
    check("pop to the stack counts from the new rsp", end.rcx, 0x77);
    check("push from the stack counts from the old rsp", end.rdx, 0x77);
    let end = exec(
        code64!(
            "mov rbp, 0x5555",
            "enter 0x20, 0",
            "mov rax, rsp",
            "mov rcx, rbp",
            "mov rdx, [rbp]",
            "leave",
            "mov rbx, rsp"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    check("enter makes room", top - end.rax, 0x28);
    check("enter sets the frame", top - end.rcx, 8);
    check("enter saves the frame", end.rdx, 0x5555);
    check("leave restores the stack", end.rbx, top);
    check("leave restores the frame", end.rbp, 0x5555);
    poke(frame(0) + 0x100 - 8, 0xaaaa);
    poke(frame(0) + 0x100 - 16, 0xbbbb);
    let end = exec(
        code64!(
            "lea rbp, [rsi + 0x100]",
            "enter 8, 3",
            "mov rax, [rsp + 24]",
            "mov rcx, [rsp + 16]",
            "mov rdx, [rsp + 8]",
            "mov rbx, rbp",
            "mov rsp, rbp",
            "add rsp, 8"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    check("enter with levels copies the first frame pointer", end.rax, 0xaaaa);
    check("enter with levels copies the second frame pointer", end.rcx, 0xbbbb);
    check("enter with levels pushes its own frame pointer", end.rdx, top - 8);
    check("enter with levels sets the frame", end.rbx, top - 8);
    let end = exec(
        code64!(
            "call 2f",
            "jmp 3f",
            "2: inc rax",
            "ret",
            "3:",
            "lea rcx, [rip + 4f]",
            "call rcx",
            "jmp 5f",
            "4: inc rax",
            "push 1",
            "push 2",
            "mov rdx, [rsp + 16]",
            "mov [rsp + 8], rdx",
            "add rsp, 8",
            "ret 8",
            "5:"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    check("near calls", end.rax, 2);
    check("ret with a number pops more", end.rsp, top);
    let end = exec(
        code64!(
            "lea rax, [rip + 2f]",
            "mov [rsi], rax",
            "jmp [rsi]",
            "ud2",
            "2:",
            "lea rax, [rip + 3f]",
            "jmp rax",
            "ud2",
            "3:",
            "lea rax, [rip + 4f]",
            "push 8",
            "push rax",
            "retfq",
            "ud2",
            "4:"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    ended("indirect jumps", &end, vector::END);
    let end = exec(
        code64!(
            "lea rax, [rip + 3f]",
            "mov [rsi], eax",
            "mov dword ptr [rsi + 4], 8",
            "call fword ptr [rsi]",
            "jmp 4f",
            "3: mov eax, 77",
            "mov ecx, [rsp + 4]",
            "retf",
            "4:"
        ),
        0,
        0,
        0,
        0,
        0,
    );
    check("far call through memory", end.rax, 77);
    check("far call pushes cs", end.rcx, 8);
    check("far return balances", end.rsp, top);
}

fn undefined() {
    let cases: [(&str, u64); 12] = [
        ("ud2", code!("ud2")),
        ("ud1", code!(".byte 0x0f, 0xb9, 0xc0", "int 0xff")),
        ("push es in 64-bit mode", code!(".byte 0x06", "int 0xff")),
        ("pusha in 64-bit mode", code!(".byte 0x60", "int 0xff")),
        ("into in 64-bit mode", code!(".byte 0xce", "int 0xff")),
        ("aam in 64-bit mode", code!(".byte 0xd4, 0x0a", "int 0xff")),
        ("far call immediate in 64-bit mode", code!(".byte 0x9a, 0, 0, 0, 0, 8, 0", "int 0xff")),
        ("salc in 64-bit mode", code!(".byte 0xd6", "int 0xff")),
        ("lea of a register", code!(".byte 0x8d, 0xc0", "int 0xff")),
        ("mov to cs", code!(".byte 0x8e, 0xc8", "int 0xff")),
        ("mov from segment register 7", code!(".byte 0x8c, 0xf8", "int 0xff")),
        ("group 5 with 7", code!(".byte 0xff, 0xf8", "int 0xff")),
    ];
    for (name, code) in cases {
        let end = exec(code, 0, 0, 0, 0, 0);
        ended(name, &end, vector::UD);
        check(name, end.rip, code);
    }
    let end = exec(code!("2: .rept 15", ".byte 0x66", ".endr", "nop", "int 0xff"), 0, 0, 0, 0, 0);
    ended("an instruction of 16 bytes", &end, vector::GP);
    let end = exec(code64!(".rept 14", ".byte 0x66", ".endr", ".byte 0x90"), 0, 0, 0, 0, 0);
    ended("an instruction of 15 bytes", &end, vector::END);
    if cpu::cpuid(1, 0).ecx & 1 << 22 == 0 {
        let end = exec(code!("movbe eax, [rsi]", "int 0xff"), 0, 0, 0, 0, 0);
        ended("movbe without the feature", &end, vector::UD);
    } else {
        poke(frame(0), 0x1122_3344);
        let end = exec(code64!("movbe eax, [rsi]"), 0, 0, 0, 0, 0);
        check("movbe", end.rax, 0x4433_2211);
    }
    let end = exec(
        code64!(
            "endbr64",
            "nop dword ptr [rax + rax]",
            "prefetchnta [rsi]",
            "pause",
            "rep bsf rax, rcx",
            "lfence",
            "mfence",
            "sfence",
            "clflush [rsi]"
        ),
        0,
        4,
        0,
        0,
        0,
    );
    ended("hints do nothing", &end, vector::END);
}
