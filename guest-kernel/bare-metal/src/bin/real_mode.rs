//! Real-address mode: segments, interrupts, string instructions, far transfers, 32-bit overrides, limits, big real mode.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu::flags;
use harrier_bare_metal::legacy::{self, Registers, SEGMENT, STACK16, run_real};
use harrier_bare_metal::paging::{peek, peek8, peek32, poke, poke_bytes, poke32};
use harrier_bare_metal::trap::vector;
use harrier_bare_metal::{check, check_bytes, check_true, code16, guest_main, tcg_lacks};

guest_main!(main);

/// Scratch memory in another segment: 0x5000.
const DATA: u64 = 0x50000;
const END: u32 = vector::END as u32;

fn main() {
    legacy::init();
    basics();
    addressing();
    strings();
    interrupts();
    far_transfers();
    faults();
    big_real_mode();
    protected_and_back();
}

fn exec(code: u64) -> Registers {
    run_real(Registers { es: 0x5000, ..Registers::real(code) })
}

fn basics() {
    let end = exec(code16!("mov ax, 0x1234", "mov bx, ax", "add ax, bx", "mov cx, cs", "mov dx, ss"));
    check("16-bit arithmetic", end.eax.into(), 0x2468);
    check("cs", end.ecx.into(), SEGMENT.into());
    check("ends by its interrupt", end.vector.into(), END.into());
    check("protection is off", (end.cr0 & 1).into(), 0);
    check("the stack is balanced", end.esp.into(), STACK16.into());
    let end = run_real(Registers {
        eax: 0xffff_ffff,
        ecx: 0x1234_0000,
        ..Registers::real(code16!(
            "inc ax",
            "dec cx",
            "mov edx, 0x12345678",
            "add edx, 0x11111111",
            "movzx ebx, dh"
        ))
    });
    check("16-bit operands leave the upper half", end.eax.into(), 0xffff_0000);
    check("and wrap", end.ecx.into(), 0x1234_ffff);
    check("a 32-bit operand by prefix", end.edx.into(), 0x2345_6789);
    check("movzx", end.ebx.into(), 0x67);
    let end = exec(code16!(
        "mov ax, 0xffff",
        "mov cx, 2",
        "mul cx",
        "mov bx, dx",
        "mov dx, 1",
        "mov ax, 0",
        "mov cx, 0x10",
        "div cx"
    ));
    check("mul", end.ebx.into(), 1);
    check("div", end.eax.into(), 0x1000);
    let end = exec(code16!(
        "mov ax, 0x0f0f",
        "aam",
        "mov bx, ax",
        "mov ax, 0x0205",
        "aad",
        "xchg ax, cx",
        "mov al, 0x79",
        "add al, 0x35",
        "daa",
        "mov dl, al"
    ));
    check("aam", end.ebx.into(), 0x0105);
    check("aad", end.ecx.into(), 25);
    check("daa", (end.edx & 0xff).into(), 0x14);
    let end = exec(code16!(
        "mov bp, sp",
        "push ax",
        "push cx",
        "mov bx, sp",
        "sub bp, bx",
        "pusha",
        "popa",
        "pushfd",
        "pop eax",
        "pop dx",
        "pop dx"
    ));
    check("push moves the stack by two", end.ebp.into(), 4);
    check("pushfd and pop eax", end.eax.into(), u64::from(end.eflags & 0xffff));
    check("and everything is popped", end.esp.into(), STACK16.into());
    let end = exec(code16!(
        "mov bp, 0x1111",
        "enter 6, 0",
        "mov ax, sp",
        "mov cx, bp",
        "leave",
        "mov dx, sp",
        "loop 2f",
        "2: mov bx, 5",
        "3: dec bx",
        "jnz 3b",
        "mov si, 1",
        "jcxz 4f",
        "mov si, 2",
        "4:"
    ));
    check("enter", (end.ecx.wrapping_sub(end.eax) & 0xffff).into(), 0xffff & 5);
    check("leave", end.edx.into(), STACK16.into());
    check("loop and jcxz", end.esi.into(), 2);
}

fn addressing() {
    poke(DATA + 0x100, 0x1122_3344_5566_7788);
    let end = exec(code16!(
        "mov bx, 0xf0",
        "mov si, 0x10",
        "mov ax, es:[bx + si]",
        "mov cx, es:[bx + si + 2]",
        "mov di, 0x102",
        "mov dx, es:[di + 2]",
        "mov eax, eax"
    ));
    check("base and index", end.eax.into(), 0x7788);
    check("with displacement", end.ecx.into(), 0x5566);
    check("through di", end.edx.into(), 0x3344);
    let end = exec(code16!(
        "mov bx, 0xfff8",
        "mov si, 0x108",
        "mov ax, es:[bx + si]",
        "mov ebx, 0x100",
        "mov ecx, es:[ebx + 4]",
        "mov edx, 0x40",
        "mov esi, es:[edx * 4]"
    ));
    check("16-bit addresses wrap", end.eax.into(), 0x7788);
    check("a 32-bit address", end.ecx.into(), 0x1122_3344);
    check("a scaled index", end.esi.into(), 0x5566_7788);
    // bp and sp use the stack segment.
    let end = run_real(Registers {
        ss: 0x5000,
        esp: 0x800,
        ebp: 0x100,
        ..Registers::real(code16!(
            "mov ax, [bp]",
            "mov cx, ds:[bp]",
            "mov edx, [ebp + 4]",
            "push 0x77",
            "mov bx, [esp]",
            "pop si"
        ))
    });
    check("bp uses ss", end.eax.into(), 0x7788);
    check("and ebp too", end.edx.into(), 0x1122_3344);
    check("esp as a base", end.ebx.into(), 0x77);
    let end = exec(code16!(
        "mov ax, 0x5010",
        "mov ds, ax",
        "mov fs, ax",
        "mov bx, ds:[0]",
        "mov ecx, fs:[4]",
        "mov ax, 0x4000",
        "mov gs, ax",
        "mov ax, gs:[0x100]",
        "lds si, es:[0x100]",
        "mov dx, ds"
    ));
    check("another segment", end.ebx.into(), 0x7788);
    check("fs", end.ecx.into(), 0x1122_3344);
    check("lds loads the offset", end.esi.into(), 0x7788);
    check("lds loads the segment", end.edx.into(), 0x5566);
    let end = exec(code16!(
        "lea ax, [bx + si + 0x1234]",
        "mov ebx, 0x12345678",
        "lea ecx, [ebx * 2 + 1]",
        "lea dx, [ebx]"
    ));
    check("lea 16", end.eax.into(), 0x1234);
    check("lea 32", end.ecx.into(), 0x2468_acf1);
    check("lea of a 32-bit address into 16 bits", end.edx.into(), 0x5678);
    // Segment 0xffff reaches just above 1 MiB (the A20 line is on).
    poke32(0x10_0010, 0xcafe_f00d);
    let end = run_real(Registers { ds: 0xffff, ..Registers::real(code16!("mov eax, [0x20]")) });
    check("just above 1 MiB", end.eax.into(), 0xcafe_f00d);
    poke_bytes(DATA + 0xfffe, &[0x34, 0x12]);
    let end = exec(code16!("mov ax, es:[0xfffe]"));
    check("the last word of a segment", end.eax.into(), 0x1234);
}

fn strings() {
    poke_bytes(DATA, b"The quick brown fox.");
    let end = exec(code16!(
        "push es",
        "pop ds",
        "xor si, si",
        "mov di, 0x100",
        "mov cx, 20",
        "rep movsb",
        "mov ax, 0x5858",
        "mov cx, 4",
        "rep stosw"
    ));
    check("rep movsb: registers", u64::from(end.esi) << 32 | u64::from(end.edi), 20 << 32 | 0x11c);
    let mut text = [0; 28];
    for (n, byte) in text.iter_mut().enumerate() {
        *byte = peek8(DATA + 0x100 + n as u64);
    }
    check_bytes("rep movsb and rep stosw", &text, b"The quick brown fox.XXXXXXXX");
    let end = exec(code16!(
        "mov di, 0",
        "mov cx, 100",
        "mov al, 'q'",
        "repne scasb",
        "mov bx, cx",
        "std",
        "mov ax, 0x1122",
        "mov di, 0x202",
        "stosw",
        "stosb",
        "cld"
    ));
    check("repne scasb", end.ebx.into(), 95);
    check("downwards", end.edi.into(), 0x1ff);
    check("what was stored", u64::from(peek32(DATA + 0x200)), 0x1122_0022);
    // The index wraps inside its segment, the count is CX.
    poke(DATA, 0);
    poke(DATA + 0xfff8, 0);
    let end = run_real(Registers {
        es: 0x5000,
        edi: 0xabcd_fffe,
        ecx: 0xffff_0004,
        eax: 0x61,
        ..Registers::real(code16!("rep stosb"))
    });
    check("the index wraps at 64 KiB", end.edi.into(), 0xabcd_0002);
    check("and the count has 16 bits", end.ecx.into(), 0xffff_0000);
    check("bytes on both sides", u64::from(peek8(DATA + 0xffff)) << 16 | (peek(DATA) & 0xffff), 0x61_6161);
    let end = run_real(Registers {
        es: 0x5000,
        ds: 0x5000,
        esi: 0,
        edi: 0x300,
        ecx: 3,
        ..Registers::real(code16!(".byte 0x67", "rep movsd"))
    });
    check("32-bit string instruction", u64::from(end.esi) << 32 | u64::from(end.edi), 12 << 32 | 0x30c);
    let end = run_real(Registers {
        edx: 0x3ff,
        eax: 0x5a,
        es: 0x5000,
        edi: 0x400,
        ..Registers::real(code16!("out dx, al", "insb", "mov al, es:[0x400]"))
    });
    check("ports", (end.eax & 0xff).into(), 0x5a);
}

fn interrupts() {
    let handler = code16!(
        "mov bx, sp",
        "mov cx, ss:[bx]",
        "mov dx, ss:[bx + 2]",
        "mov si, ss:[bx + 4]",
        "pushf",
        "pop di",
        "add word ptr ss:[bx], 1",
        "iret"
    );
    legacy::set_vector16(0x60, SEGMENT, (handler - legacy::LOW_START) as u16);
    let caller = code16!("sti", "stc", "int 0x60", "nop", "mov ax, 7", "pushf", "pop bp", "cli");
    let end = exec(caller);
    check("int pushes the next ip", u64::from(end.ecx) + legacy::LOW_START, caller + 4);
    check("and cs", end.edx.into(), SEGMENT.into());
    check("and the flags", u64::from(end.esi) & (flags::IF | flags::CF), flags::IF | flags::CF);
    check("the handler runs with interrupts disabled", u64::from(end.edi) & flags::IF, 0);
    check("iret restores the flags", u64::from(end.ebp) & (flags::IF | flags::CF), flags::IF | flags::CF);
    check("and goes on", end.eax.into(), 7);
    let end = exec(code16!("mov al, 0x7f", "add al, 1", "into", "mov cx, 1"));
    check("into", end.vector.into(), vector::OF);
    let div = code16!("xor cx, cx", "div cx");
    let end = exec(div);
    check("division by zero", end.vector.into(), vector::DE);
    check("is a fault", u64::from(end.eip) + legacy::LOW_START, div + 2);
    check("and pushes six bytes", (STACK16 - end.pushed_at).into(), 6);
    let end = exec(code16!("ud2"));
    check("an undefined instruction", end.vector.into(), vector::UD);
    let end = exec(code16!("int3"));
    check("int3", end.vector.into(), vector::BP);
    poke_bytes(DATA + 0x10, &[5, 0, 9, 0]);
    let end = exec(code16!("mov ax, 4", "bound ax, es:[0x10]"));
    check("bound", end.vector.into(), vector::BR);
    let step = code16!("pushf", "pop ax", "or ah, 1", "push ax", "popf", "nop", "nop");
    let end = exec(step);
    check("single step", end.vector.into(), vector::DB);
    // The vector table can be elsewhere.
    poke32(DATA + 0x20, u32::from(SEGMENT) << 16 | u32::from(legacy::stub16(0x77)));
    poke_bytes(DATA + 0x30, &[0xff, 0x03, 0, 0, 5, 0]);
    let end = exec(code16!("lidt es:[0x30]", "int 8"));
    check("another vector table", end.vector.into(), 0x77);
    let end = exec(code16!("sidt es:[0x40]", "mov ax, es:[0x40]", "mov ecx, es:[0x42]"));
    check("sidt", u64::from(end.eax) << 32 | u64::from(end.ecx), 0x3ff << 32);
}

fn far_transfers() {
    // call far 0x3000:target through memory, and the same with an immediate.
    let target =
        code16!("mov bx, sp", "mov ax, ss:[bx]", "mov dx, ss:[bx + 2]", "mov cx, 0x4444", ".byte 0xcb");
    poke32(DATA + 0x50, u32::from(SEGMENT) << 16 | (target - legacy::LOW_START) as u32);
    let call = code16!(".byte 0x26, 0xff, 0x1e, 0x50, 0x00", "mov si, 1");
    let end = exec(call);
    check("far call", end.ecx.into(), 0x4444);
    check("far call pushes cs", end.edx.into(), SEGMENT.into());
    check("far return", end.esi.into(), 1);
    check("far return balances", end.esp.into(), STACK16.into());
    let end = exec(code16!(
        "push cs",
        "lea ax, [7f - 0x30000]",
        "push ax",
        "mov ax, 5",
        ".byte 0xcb",
        "ud2",
        "7: mov dx, 6"
    ));
    check("far return as a jump", end.edx.into(), 6);
    // The same code under another segment: 0x3010:x is 0x3000:(x + 0x100).
    let place = code16!("mov ax, cs");
    let end = run_real(Registers { cs: 0x2ff0, eip: (place - 0x2ff00) as u32, ..Registers::real(place) });
    check("another code segment", end.eax.into(), 0x2ff0);
    let end = exec(code16!(
        "call 2f",
        "mov dx, 1",
        "jmp 3f",
        "2: mov ax, 1",
        "ret 0",
        "3: push 9",
        "push 8",
        "call 4f",
        "jmp 5f",
        "4: ret 4",
        "5: mov bx, sp"
    ));
    check("near call and return", u64::from(end.eax) << 8 | u64::from(end.edx), 0x101);
    check("return with a number", end.ebx.into(), STACK16.into());
    let end = exec(code16!(
        "lea ax, [2f - 0x30000]",
        "jmp ax",
        "ud2",
        "2: mov cx, 3",
        ".byte 0x66, 0xe8, 0, 0, 0, 0",
        "pop eax",
        "mov bx, sp"
    ));
    check("indirect jump", end.ecx.into(), 3);
    check("a 32-bit call pushes four bytes", end.ebx.into(), STACK16.into());
}

fn faults() {
    let word = code16!("mov bx, 0xffff", "mov ax, [bx]", "mov cx, 1");
    if !tcg_lacks("segment limits in real mode") {
        check("a word across the end of its segment", exec(word).vector.into(), vector::GP);
        check(
            "a 32-bit address beyond the limit",
            exec(code16!("mov ebx, 0x10000", "mov al, [ebx]")).vector.into(),
            vector::GP,
        );
        check(
            "the same with the stack segment",
            exec(code16!("mov ebx, 0x10000", "mov al, ss:[ebx]")).vector.into(),
            vector::SS,
        );
        let end = run_real(Registers {
            es: 0x5000,
            edi: 0xfffe,
            ecx: 4,
            eax: 1,
            ..Registers::real(code16!("rep stosd"))
        });
        check(
            "a string store across the end",
            u64::from(end.vector) << 32 | u64::from(end.ecx),
            vector::GP << 32 | 4,
        );
        let jump = code16!(".byte 0x66, 0xe9", ".long 0x20000");
        check("a jump beyond the limit", exec(jump).vector.into(), vector::GP);
    }
    let end = exec(code16!("lldt ax"));
    check("lldt is undefined", end.vector.into(), vector::UD);
    let end = exec(code16!("lar ax, cx"));
    check("lar is undefined", end.vector.into(), vector::UD);
    let end = exec(code16!("arpl ax, cx"));
    check("arpl is undefined", end.vector.into(), vector::UD);
    let end = exec(code16!("mov cx, 1", "smsw ax", "mov edx, cr0"));
    check("smsw works", u64::from(end.eax & 0xffff), u64::from(end.edx & 0xffff));
    let end = exec(code16!("mov eax, 1", "cpuid", "mov ecx, 0x1b", "rdmsr"));
    check("cpuid and rdmsr work", u64::from(end.eax & 0xffff_f000), 0xfee0_0000);
    let end =
        exec(code16!("mov ss, ax", "mov esp, 0x8000", "mov ax, 0x3000", "mov ss, ax", "mov esp, 0xfff0"));
    check("any selector can be loaded", end.vector.into(), END.into());
}

fn big_real_mode() {
    // A segment loaded in protected mode keeps its limit: 32-bit addresses reach everything.
    poke32(16 << 20, 0x600d_f00d);
    let end = exec(code16!(
        "mov eax, cr0",
        "or al, 1",
        "mov cr0, eax",
        "mov bx, 0x10",
        "mov fs, bx",
        "and al, 0xfe",
        "mov cr0, eax",
        "mov ebx, 0x1000000",
        "mov ecx, fs:[ebx]",
        "mov dword ptr fs:[ebx + 4], 0x1234",
        "xor bx, bx",
        "mov gs, bx",
        "mov dx, fs"
    ));
    check("a flat segment in real mode", end.ecx.into(), 0x600d_f00d);
    check("a store through it", u64::from(peek32((16 << 20) + 4)), 0x1234);
    check("its selector", end.edx.into(), 0x10);
    // A load in real mode changes the base and leaves the limit.
    let end = exec(code16!(
        "mov eax, cr0",
        "or al, 1",
        "mov cr0, eax",
        "mov bx, 0x10",
        "mov fs, bx",
        "and al, 0xfe",
        "mov cr0, eax",
        "mov bx, 0x5000",
        "mov fs, bx",
        "mov ebx, 0x1000000 - 0x50000",
        "mov ecx, fs:[ebx]"
    ));
    check("another base and the old limit", end.ecx.into(), 0x600d_f00d);
}

fn protected_and_back() {
    let end = exec(code16!(
        "mov eax, cr0",
        "or al, 1",
        "mov cr0, eax",
        ".byte 0xea",
        ".word 2f - 0x30000, 0x38",
        "2: mov ax, cs",
        "mov cx, 0x40",
        "mov ds, cx",
        "mov dx, [0x500]",
        "mov ebx, cr0",
        "and bl, 0xfe",
        "mov cr0, ebx",
        ".byte 0xea",
        ".word 3f - 0x30000, 0x3000",
        "3: mov si, cs"
    ));
    check("16-bit protected mode: cs", (end.eax & 0xffff).into(), 0x38);
    check("real mode again: cs", end.esi.into(), SEGMENT.into());
    check("the end is reached", end.vector.into(), END.into());
    let end = exec(code16!(
        "smsw ax",
        "or al, 1",
        "lmsw ax",
        "mov bx, 0x10",
        "mov es, bx",
        "smsw cx",
        "mov eax, cr0",
        "and al, 0xfe",
        "mov cr0, eax"
    ));
    check("lmsw enters protected mode", (end.ecx & 1).into(), 1);
    check_true("mov to cr0 leaves it", end.cr0 & 1 == 0);
}
