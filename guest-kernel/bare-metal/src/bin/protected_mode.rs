//! 32-bit protected mode outside long mode: segment limits and types with their error codes, call gates, level 3 and back,
//! 32-bit paging with and without 4 MiB pages, PAE paging, virtual-8086 mode.

#![no_std]
#![no_main]

use harrier_bare_metal::boot::selector::{self, CODE32, DATA, SPARE, TASK, USER_CODE32, USER_DATA};
use harrier_bare_metal::cpu::{self, cr0, cr4, flags};
use harrier_bare_metal::legacy::{self, IDT32, Registers, TASK32, esp0, gate32, run_protected, stub32};
use harrier_bare_metal::paging::{entry, frame, peek, peek32, poke, poke32};
use harrier_bare_metal::trap::{self, set_descriptor, vector};
use harrier_bare_metal::{check, code32, guest_main, tcg_lacks};

guest_main!(main);

/// Where 32-bit code keeps its scratch memory.
const SCRATCH: u32 = frame(50) as u32;

fn main() {
    legacy::init();
    instructions();
    gates();
    level_3();
    call_gates();
    segment_limits();
    segment_loads();
    sixteen_bit();
    paging_32();
    paging_pae();
    sysenter();
    virtual_8086();
}

fn exec(code: u64) -> Registers {
    run_protected(Registers { esi: SCRATCH, ..Registers::protected(code) })
}

fn expect(name: &str, end: &Registers, vector: u64, error: u64) {
    check(name, u64::from(end.vector) << 32 | u64::from(end.error), vector << 32 | error);
}

/// A descriptor: access byte, and flags in the upper four bits of the second argument (8 pages, 4 32-bit).
fn descriptor(base: u64, limit: u64, access: u64, size: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | size << 52
        | (base >> 24 & 0xff) << 56
}

fn instructions() {
    let end = exec(code32!(
        "mov eax, 0x80000000",
        "add eax, 0x80000001",
        "setc bl",
        "inc ecx",
        "dec edx",
        "pushfd",
        "pop edi",
        "mov ebp, cs"
    ));
    check("arithmetic", end.eax.into(), 1);
    check("carry", end.ebx.into(), 1);
    check("inc and dec of one byte", u64::from(end.ecx) << 32 | u64::from(end.edx), 1 << 32 | 0xffff_ffff);
    check("cs", end.ebp.into(), CODE32);
    check("the end", end.vector.into(), vector::END);
    check("paging is off", u64::from(end.cr0) & cr0::PG, 0);
    let end = exec(code32!(
        "mov eax, esp",
        "pushad",
        "mov ecx, [esp + 12]",
        "mov [esi + 16], ecx",
        "popad",
        "mov ecx, [esi + 16]",
        "push ds",
        "pop es",
        "mov edx, es",
        "mov word ptr [esi], 0x1234",
        "mov ebx, [esi]",
        "mov edi, esi",
        "lodsd",
        "std",
        "stosb",
        "cld",
        "sub esi, edi"
    ));
    check("pushad saves the old esp", end.ecx.into(), end.esp.into());
    check("push and pop of segments", end.edx.into(), DATA);
    check("string instructions", end.esi.into(), 5);
    let end = exec(code32!(
        "mov ax, 0x00ff",
        "cwde",
        "mov ecx, eax",
        "cdq",
        "mov edx, 1",
        "shld eax, edx, 31",
        "bswap ecx",
        "nop"
    ));
    check("bswap", end.ecx.into(), 0xff00_0000);
    let end = exec(code32!(
        "mov al, 0x99",
        "add al, 0x01",
        "daa",
        "mov ecx, eax",
        "setc dl",
        "mov al, 9",
        "inc al",
        "aaa",
        "mov bx, ax",
        "mov ax, 0x0100",
        "sub al, 1",
        "aas"
    ));
    check("daa", u64::from(end.ecx & 0xff) << 8 | u64::from(end.edx & 0xff), 1);
    check("aas", u64::from(end.eax & 0xffff), 0x0009);
    let end = exec(code32!("mov ax, 0x10", "mov cx, 0x1b", "arpl ax, cx", "setz dl", "mov ebx, eax"));
    check("arpl", u64::from(end.ebx & 0xffff) << 8 | u64::from(end.edx & 0xff), 0x1301);
    let end = exec(code32!(
        "lea eax, [2f]",
        "mov [esi], eax",
        "mov word ptr [esi + 4], 0x30",
        "jmp fword ptr [esi]",
        "ud2",
        "2: .byte 0x0e",
        "call 3f",
        "mov ebx, 1",
        "jmp 4f",
        "3: mov ecx, [esp + 4]",
        "retf",
        "4:"
    ));
    check("far jump and far return", u64::from(end.ecx) << 8 | u64::from(end.ebx), CODE32 << 8 | 1);
    let end = exec(code32!("lgs eax, [esi]", "les ecx, [esi + 8]"));
    expect("lgs of a selector that is no segment", &end, vector::END, 0);
    let end =
        exec(code32!("str eax", "sldt ecx", "smsw edx", "sgdt [esi]", "mov ebx, [esi + 2]", "lsl edi, eax"));
    check("str", end.eax.into(), TASK32);
    check("the limit of the task state", end.edi.into(), 103);
    check("sgdt", end.ebx.into(), harrier_bare_metal::boot::GDT.get() as u64);
    let end = exec(code32!(
        "mov eax, cr0",
        "mov ecx, cr4",
        "mov edx, dr7",
        "mov eax, 1",
        "cpuid",
        "shr edx, 6",
        "and edx, 1"
    ));
    check("system registers and cpuid", end.edx.into(), 1);
    let end = exec(code32!("mov ecx, 0xc0000080", "rdmsr"));
    check("long mode is off", u64::from(end.eax) & 0x500, 0);
    let end = run_protected(Registers {
        ecx: 5,
        ..Registers::protected(code32!(".byte 0x48, 0x89, 0xc8", "mov edx, 2", "mov ebx, eax"))
    });
    check("there is no rex prefix", end.ebx.into(), 5);
    expect(
        "syscall without long mode needs EFER.SCE of its own",
        &exec(code32!("mov ecx, 0xc0000080", "rdmsr", "and al, 0xfe", "wrmsr", ".byte 0x0f, 0x05")),
        vector::UD,
        0,
    );
}

fn set_gate(n: usize, gate: u64) {
    unsafe { (*IDT32.get())[n] = gate }
}

fn gates() {
    let int = code32!("int 0x41");
    let end = exec(int);
    expect("int n", &end, 0x41, 0);
    check("int n is a trap", end.eip.into(), int + 2);
    check("without a change of level three words are pushed", u64::from(end.esp - end.pushed_at), 12 + 4);
    expect("int3", &exec(code32!("int3")), vector::BP, 0);
    expect("division by zero", &exec(code32!("xor ecx, ecx", "div ecx")), vector::DE, 0);
    set_gate(0x50, 0);
    expect("an empty gate", &exec(code32!("int 0x50")), vector::GP, 0x50 << 3 | 2);
    set_gate(0x50, gate32(stub32(0x50), CODE32, 0xe, 0) & !(1 << 47));
    expect("a gate that is not present", &exec(code32!("int 0x50")), vector::NP, 0x50 << 3 | 2);
    set_gate(0x50, gate32(stub32(0x50), DATA, 0xe, 0));
    expect("a gate to data", &exec(code32!("int 0x50")), vector::GP, DATA);
    set_gate(0x50, gate32(stub32(0x50), 0, 0xe, 0));
    expect("a gate with a null selector", &exec(code32!("int 0x50")), vector::GP, 0);
    let show = code32!("pushfd", "pop eax");
    set_gate(0x50, gate32(show, CODE32, 0xf, 0));
    let end = run_protected(Registers { eflags: 0x202, ..Registers::protected(code32!("int 0x50")) });
    check("a trap gate leaves the interrupt flag", u64::from(end.eax) & flags::IF, flags::IF);
    set_gate(0x50, gate32(show, CODE32, 0xe, 0));
    let end = run_protected(Registers { eflags: 0x202, ..Registers::protected(code32!("int 0x50")) });
    check("an interrupt gate clears it", u64::from(end.eax) & flags::IF, 0);
    legacy::default_gate(0x50);
    let end = exec(code32!("pushfd", "or dword ptr [esp], 0x100", "popfd", "nop", "nop"));
    expect("single step", &end, vector::DB, 0);
    let end = exec(code32!("int 0x44", "nop"));
    expect("another vector", &end, 0x44, 0);
    // A double fault, and what handles it.
    set_gate(13, 0);
    let end = exec(code32!("mov eax, 0x7f8", "mov ds, eax"));
    expect("a fault at the gate of #GP", &end, vector::DF, 0);
    legacy::default_gate(13);
}

fn level_3() {
    let user = |code: u64| {
        run_protected(Registers { esi: SCRATCH, esp: SCRATCH + 0x800, ..Registers::protected_user(code) })
    };
    let end = user(code32!("mov eax, cs", "mov ecx, ss", "mov edx, ds", "push eax", "pop ebx"));
    expect("level 3", &end, vector::END, 0);
    check("cs and ss", u64::from(end.eax) << 16 | u64::from(end.ecx), USER_CODE32 << 16 | USER_DATA);
    check("the stack that interrupts use", u64::from(esp0() - end.pushed_at), 20 + 4);
    check(
        "the old stack is saved",
        u64::from(end.esp) << 8 | u64::from(end.ss),
        u64::from(SCRATCH + 0x800) << 8 | USER_DATA,
    );
    for (name, code) in [
        ("cli", code32!("cli")),
        ("hlt", code32!("hlt")),
        ("mov to cr0", code32!("mov cr0, eax")),
        ("in", code32!("in al, 0x71")),
        ("lgdt", code32!("lgdt [esi]")),
        ("clts", code32!("clts")),
        ("rdmsr", code32!("rdmsr")),
    ] {
        expect(name, &user(code), vector::GP, 0);
    }
    expect("int n beyond the gate", &user(code32!("int 0x41")), vector::GP, 0x41 << 3 | 2);
    expect("kernel data", &user(code32!("mov eax, 0x10", "mov ds, eax")), vector::GP, DATA);
    expect(
        "a jump to kernel code",
        &user(code32!("push 0x30", "lea eax, [2f]", "push eax", "retf", "2:")),
        vector::GP,
        CODE32,
    );
    let end = run_protected(Registers {
        eflags: 0x3002,
        esp: SCRATCH + 0x800,
        ..Registers::protected_user(code32!(
            "mov edx, 0x3ff",
            "mov al, 0x77",
            "out dx, al",
            "xor eax, eax",
            "in al, dx",
            "sti",
            "pushfd",
            "pop ecx",
            "cli"
        ))
    });
    check("IOPL 3: ports", u64::from(end.eax & 0xff), 0x77);
    check("IOPL 3: sti", u64::from(end.ecx) & flags::IF, flags::IF);
    let end = run_protected(Registers {
        eflags: 0x2,
        esp: SCRATCH + 0x800,
        ..Registers::protected_user(code32!(
            "pushfd",
            "or dword ptr [esp], 0x3200",
            "popfd",
            "pushfd",
            "pop ecx"
        ))
    });
    check(
        "popf changes neither IOPL nor the interrupt flag",
        u64::from(end.ecx) & (flags::IF | flags::IOPL),
        0,
    );
    // From the kernel to level 3 by iret, and the segments that are not for it become null.
    let end = exec(code32!(
        "mov eax, 0x10",
        "mov es, eax",
        "mov fs, eax",
        "mov eax, 0x23",
        "mov gs, eax",
        "push 0x23",
        "push esi",
        "push 2",
        "push 0x1b",
        "lea eax, [2f]",
        "push eax",
        "iretd",
        "2: mov eax, cs",
        "mov ecx, es",
        "mov edx, gs",
        "mov ebx, fs"
    ));
    check("iret to level 3", end.eax.into(), USER_CODE32);
    check("kernel segments become null", u64::from(end.ecx) << 16 | u64::from(end.ebx), 0);
    check("user segments stay", end.edx.into(), USER_DATA);
    let end = exec(code32!(
        "push 0x23",
        "push esi",
        "push 0x1b",
        "lea eax, [2f]",
        "push eax",
        "retf",
        "2: mov eax, cs",
        "mov ecx, esp"
    ));
    check(
        "far return to level 3",
        u64::from(end.eax) << 32 | u64::from(end.ecx),
        USER_CODE32 << 32 | u64::from(SCRATCH),
    );
    expect(
        "iret to level 3 with a kernel stack segment",
        &exec(code32!("push 0x10", "push esi", "push 2", "push 0x1b", "push 0x1000", "iretd")),
        vector::GP,
        DATA,
    );
}

fn call_gates() {
    let target = code32!(
        "mov eax, [esp]",
        "mov ecx, [esp + 4]",
        "mov edx, [esp + 8]",
        "mov ebx, [esp + 12]",
        "mov edi, cs",
        "mov ebp, [esp + 16]",
        "mov esi, [esp + 20]"
    );
    let gate = |selector: u64, access: u64, count: u64| {
        target & 0xffff | selector << 16 | count << 32 | access << 40 | (target >> 16 & 0xffff) << 48
    };
    let user =
        |code: u64| run_protected(Registers { esp: SCRATCH + 0x800, ..Registers::protected_user(code) });
    let call = code32!("push 0x1111", "push 0x2222", ".byte 0x9a", ".long 0", ".word 0x4b", "2:");
    set_descriptor(SPARE, gate(CODE32, 0xec, 2));
    let end = user(call);
    expect("call gate", &end, vector::END, 0);
    check("return address", end.eax.into(), call + 17);
    check("cs of the caller", end.ecx.into(), USER_CODE32);
    check("parameters are copied", u64::from(end.edx) << 32 | u64::from(end.ebx), 0x2222 << 32 | 0x1111);
    check("level 0", end.edi.into(), CODE32);
    check(
        "esp and ss of the caller",
        u64::from(end.ebp) << 16 | u64::from(end.esi),
        u64::from(SCRATCH + 0x800 - 8) << 16 | USER_DATA,
    );
    set_descriptor(SPARE, gate(CODE32, 0x8c, 0));
    expect("a gate of level 0 from level 3", &user(call), vector::GP, SPARE);
    set_descriptor(SPARE, gate(CODE32, 0x6c, 0));
    expect("a gate that is not present", &user(call), vector::NP, SPARE);
    set_descriptor(SPARE, gate(DATA, 0xec, 0));
    expect("a gate to data", &user(call), vector::GP, DATA);
    set_descriptor(SPARE, gate(CODE32, 0xec, 0));
    let end = exec(code32!(".byte 0x9a", ".long 0", ".word 0x48"));
    expect("a gate at the same level", &end, vector::END, 0);
    check("pushes only the return address", u64::from(end.ecx), CODE32);
    // There and back with retf n.
    let back = code32!("mov eax, 0x99", "retf 8");
    set_descriptor(SPARE, back & 0xffff | CODE32 << 16 | 2 << 32 | 0xec << 40 | (back >> 16 & 0xffff) << 48);
    let end = user(code32!(
        "push 1",
        "push 2",
        ".byte 0x9a",
        ".long 0",
        ".word 0x4b",
        "mov ecx, cs",
        "mov edx, esp"
    ));
    check("return through the gate", end.eax.into(), 0x99);
    check("at level 3", end.ecx.into(), USER_CODE32);
    check("parameters are removed on both stacks", end.edx.into(), u64::from(SCRATCH) + 0x800);
    // Conforming code keeps the level of its caller.
    set_descriptor(SPARE, descriptor(0, 0xfffff, 0x9e, 0xc));
    let end = user(code32!("push 0x4b", "lea eax, [2f]", "push eax", "retf", "2: mov ecx, cs"));
    check("conforming code at level 3", end.ecx.into(), SPARE | 3);
}

fn segment_limits() {
    if tcg_lacks("segment limits") {
        return;
    }
    let with = |value: u64, code: u64| {
        set_descriptor(SPARE, value);
        run_protected(Registers { es: SPARE as u32, edi: 0, esi: SCRATCH, ..Registers::protected(code) })
    };
    let small = descriptor(u64::from(SCRATCH), 0xff, 0x93, 4);
    expect("the last byte", &with(small, code32!("mov al, es:[0xff]")), vector::END, 0);
    expect("the byte behind", &with(small, code32!("mov al, es:[0x100]")), vector::GP, 0);
    expect("a word across the limit", &with(small, code32!("mov ax, es:[0xff]")), vector::GP, 0);
    expect("a long across the limit", &with(small, code32!("mov dword ptr es:[0xfd], 1")), vector::GP, 0);
    expect("a long at the limit", &with(small, code32!("mov dword ptr es:[0xfc], 1")), vector::END, 0);
    expect("an address near 4 GiB", &with(small, code32!("mov eax, es:[0xfffffffc]")), vector::GP, 0);
    let end = with(small, code32!("mov ecx, 0x200", "rep stosb"));
    expect("a string store to the limit", &end, vector::GP, 0);
    check("stops exactly there", u64::from(end.ecx) << 32 | u64::from(end.edi), 0x100 << 32 | 0x100);
    expect("pages", &with(descriptor(0, 0, 0x93, 0xc), code32!("mov al, es:[0xfff]")), vector::END, 0);
    expect(
        "behind the page",
        &with(descriptor(0, 0, 0x93, 0xc), code32!("mov al, es:[0x1000]")),
        vector::GP,
        0,
    );
    let down = descriptor(u64::from(SCRATCH), 0xff, 0x97, 4);
    expect("expand-down: below", &with(down, code32!("mov al, es:[0xff]")), vector::GP, 0);
    expect("expand-down: above", &with(down, code32!("mov al, es:[0x100]")), vector::END, 0);
    let down16 = descriptor(u64::from(SCRATCH), 0xff, 0x97, 0);
    expect(
        "expand-down of 16 bits: beyond 64 KiB",
        &with(down16, code32!("mov al, es:[0x10000]")),
        vector::GP,
        0,
    );
    expect(
        "a store to read-only data",
        &with(descriptor(0, 0xfffff, 0x91, 0xc), code32!("mov es:[esi], al")),
        vector::GP,
        0,
    );
    expect(
        "a load from it",
        &with(descriptor(0, 0xfffff, 0x91, 0xc), code32!("mov al, es:[esi]")),
        vector::END,
        0,
    );
    expect(
        "a store to code",
        &with(descriptor(0, 0xfffff, 0x9b, 0xc), code32!("mov es:[esi], al")),
        vector::GP,
        0,
    );
    let end =
        run_protected(Registers { es: 0, esi: SCRATCH, ..Registers::protected(code32!("mov al, es:[esi]")) });
    expect("a null segment", &end, vector::GP, 0);
    set_descriptor(SPARE, descriptor(u64::from(SCRATCH), 0xfff, 0x93, 4));
    let stack =
        Registers { ss: SPARE as u32, esp: 0x1000, ..Registers::protected(code32!("mov eax, ss:[0x1000]")) };
    expect("the stack segment", &run_protected(stack), vector::SS, 0);
    set_descriptor(SPARE, descriptor(0, 0x2ff, 0x9b, 0xc));
    let code = code32!(
        "push 0x48",
        "lea eax, [2f]",
        "push eax",
        "retf",
        "2: mov ecx, 5",
        "mov eax, 0x400000",
        "jmp eax"
    );
    let end = exec(code);
    expect("a jump beyond the code segment", &end, vector::GP, 0);
    check("after what was inside", end.ecx.into(), 5);
}

fn segment_loads() {
    let load = code32!("mov es, eax", "mov ecx, es");
    let with = |value: u64, selector: u64| {
        set_descriptor(SPARE, value);
        run_protected(Registers { eax: selector as u32, ..Registers::protected(load) })
    };
    let data = descriptor(0, 0xfffff, 0x92, 0xc);
    expect("data", &with(data, SPARE), vector::END, 0);
    check("the accessed bit is set", trap::descriptor(SPARE) >> 40 & 1, 1);
    expect("not present", &with(data & !(1 << 47), SPARE), vector::NP, SPARE);
    expect("execute-only code", &with(descriptor(0, 0xfffff, 0x98, 0xc), SPARE), vector::GP, SPARE);
    expect("a task state", &with(data, TASK), vector::GP, TASK);
    expect("beyond the table", &with(data, 0x7f8), vector::GP, 0x7f8);
    expect("requested level 3 of level 0", &with(data, SPARE | 3), vector::GP, SPARE);
    expect("null", &with(data, 0), vector::END, 0);
    let load_ss = code32!("mov ss, eax");
    let ss = |value: u64, selector: u64| {
        set_descriptor(SPARE, value);
        run_protected(Registers { eax: selector as u32, ..Registers::protected(load_ss) })
    };
    expect("ss: null", &ss(data, 0), vector::GP, 0);
    expect("ss: not present", &ss(data & !(1 << 47), SPARE), vector::SS, SPARE);
    expect("ss: read-only", &ss(descriptor(0, 0xfffff, 0x90, 0xc), SPARE), vector::GP, SPARE);
    expect("ss: another level", &ss(data, USER_DATA), vector::GP, USER_DATA & !3);
    // A base that is not zero.
    set_descriptor(SPARE, descriptor(u64::from(SCRATCH), 0xfffff, 0x93, 0xc));
    poke32(u64::from(SCRATCH) + 0x20, 0x1357_9bdf);
    let end = run_protected(Registers {
        es: SPARE as u32,
        fs: SPARE as u32,
        esi: 0x20u32.wrapping_sub(SCRATCH),
        ..Registers::protected(code32!(
            "mov eax, es:[0x20]",
            "mov ecx, [esi + 0]",
            "mov edx, fs:[0x1c + 4]",
            "lea ebx, es:[0x20]"
        ))
    });
    check("a base", end.eax.into(), 0x1357_9bdf);
    check("another segment with it", end.edx.into(), 0x1357_9bdf);
    check("lea takes none", end.ebx.into(), 0x20);
    // Base plus offset wrap at 4 GiB.
    let end = run_protected(Registers {
        es: SPARE as u32,
        edi: 0u32.wrapping_sub(SCRATCH).wrapping_add(SCRATCH + 0x20),
        ..Registers::protected(code32!("mov eax, es:[edi]"))
    });
    check("base and offset", end.eax.into(), 0x1357_9bdf);
}

fn sixteen_bit() {
    // 16-bit code and stack in protected mode: base 0x30000 as CODE16 has it.
    set_descriptor(SPARE, descriptor(u64::from(SCRATCH), 0xffff, 0x93, 0));
    let code = harrier_bare_metal::code16!(
        "mov ax, 0x1234",
        "push ax",
        "pop cx",
        "mov bx, sp",
        "pushad",
        "popad",
        "mov edx, 0x87654321"
    );
    let end = run_protected(Registers {
        cs: selector::CODE16 as u32,
        eip: (code - legacy::LOW_START) as u32,
        ss: SPARE as u32,
        esp: 0xabcd_1000,
        ..Registers::protected(code)
    });
    check("16-bit code", u64::from(end.ecx), 0x1234);
    check("a 16-bit stack uses sp", u64::from(end.ebx), 0x1000);
    check("32-bit operands by prefix", end.edx.into(), 0x8765_4321);
    check("the upper half of esp stays", u64::from(end.esp & 0xffff), 0x1000);
}

/// Identity-maps 64 MiB with 4 MiB pages at level 3 and puts one page table under 0x8000_0000.
fn tables_32() -> (u32, u64) {
    let (directory, table) = (frame(60), frame(61));
    for n in 0..1024 {
        poke32(directory + n * 4, 0);
        poke32(table + n * 4, 0);
    }
    for n in 0..16 {
        poke32(directory + n * 4, (n << 22) as u32 | 0x87);
    }
    poke32(directory + 512 * 4, table as u32 | 7);
    (directory as u32, table)
}

fn paging_32() {
    let (cr3, table) = tables_32();
    let base = 0x8000_0000u32;
    let on = |registers: Registers| Registers { cr0: 0x8001_0031, cr3, cr4: cr4::PSE as u32, ..registers };
    let kernel = |code: u64| run_protected(on(Registers { edi: base, ..Registers::protected(code) }));
    let user = |code: u64| {
        run_protected(on(Registers { edi: base, esp: SCRATCH + 0x800, ..Registers::protected_user(code) }))
    };
    let read = code32!("mov eax, [edi]");
    let write = code32!("mov dword ptr [edi], 0x55aa");
    let execute = code32!("call edi");
    poke(frame(52), 0xc3);
    let cases: [(&str, u32, [u64; 5]); 5] = [
        ("missing", 0, [0x100, 0x102, 0x104, 0x106, 0x104]),
        ("kernel read-only", 1, [0, 0x103, 0x105, 0x107, 0x105]),
        ("kernel", 3, [0, 0, 0x105, 0x107, 0x105]),
        ("user read-only", 5, [0, 0x103, 0, 0x107, 0]),
        ("user", 7, [0, 0, 0, 0, 0]),
    ];
    for (name, bits, expected) in cases {
        poke32(table, frame(52) as u32 | bits);
        for (end, expected) in [kernel(read), kernel(write), user(read), user(write), {
            poke(frame(52), 0xc3);
            user(execute)
        }]
        .iter()
        .zip(expected)
        {
            let got = if u64::from(end.vector) == vector::PF {
                0x100 | u64::from(end.error)
            } else {
                u64::from(end.vector) ^ vector::END
            };
            check(name, got, expected);
            if got != 0 {
                check(name, end.cr2.into(), base.into());
            }
        }
    }
    poke32(table, frame(52) as u32 | 7);
    kernel(write);
    check("accessed and dirty", u64::from(peek32(table) & 0x60), 0x60);
    check("the directory entry is accessed", u64::from(peek32(u64::from(cr3) + 512 * 4) & 0x60), 0x20);
    poke32(table, frame(52) as u32 | 5);
    let end = run_protected(Registers {
        cr0: 0x8000_0031,
        ..on(Registers { edi: base, ..Registers::protected(write) })
    });
    check("without WP the kernel writes read-only pages", end.vector.into(), vector::END);
    // A 4 MiB page, its far end and its rights.
    poke32(u64::from(cr3) + 513 * 4, (32 << 20) | 0x81);
    poke32((32 << 20) + 0x3f_fff0, 0x4444);
    let end =
        run_protected(on(Registers { edi: base + (1 << 22) + 0x3f_fff0, ..Registers::protected(read) }));
    check("a 4 MiB page", end.eax.into(), 0x4444);
    let end = run_protected(on(Registers { edi: base + (1 << 22), ..Registers::protected(write) }));
    expect("a 4 MiB page is read-only", &end, vector::PF, 3);
    poke32(u64::from(cr3) + 513 * 4, (32 << 20) | 1 << 21 | 0x83);
    let end = run_protected(on(Registers { edi: base + (1 << 22), ..Registers::protected(read) }));
    if !tcg_lacks("reserved bits of a 4 MiB page") {
        expect("reserved bits of a 4 MiB page", &end, vector::PF, 9);
    }
    // Two pages that follow each other, and an access across them.
    poke32(table, frame(52) as u32 | 7);
    poke32(table + 4, frame(54) as u32 | 7);
    poke32(frame(54), 0);
    let end = run_protected(on(Registers {
        edi: base + 0xffe,
        ..Registers::protected(code32!("mov dword ptr [edi], 0x11223344", "mov eax, [edi]"))
    }));
    check("across two pages", end.eax.into(), 0x1122_3344);
    check("the second half", u64::from(peek32(frame(54))), 0x1122);
    let end = run_protected(on(Registers {
        edi: base + 0x1ffe,
        ..Registers::protected(code32!("mov eax, [edi]"))
    }));
    check("across into a missing page", end.cr2.into(), u64::from(base) + 0x2000);
    // invlpg and CR3.
    poke32(frame(52), 1);
    poke32(frame(54), 2);
    let end = run_protected(on(Registers {
        edi: base,
        esi: table as u32,
        ebx: frame(54) as u32 | 7,
        ..Registers::protected(code32!("mov eax, [edi]", "mov [esi], ebx", "invlpg [edi]", "mov ecx, [edi]"))
    }));
    // The tables are in the identity-mapped part.
    check("before invlpg", end.eax.into(), 1);
    check("after invlpg", end.ecx.into(), 2);
}

fn paging_pae() {
    let (pointers, directory, high, table) = (frame(62), frame(63), frame(64), frame(65));
    for n in 0..512 {
        for page in [pointers, directory, high, table] {
            poke(page + n * 8, 0);
        }
    }
    for n in 0..32 {
        poke(directory + n * 8, n << 21 | 0x87);
    }
    poke(pointers, directory | 1);
    poke(pointers + 16, high | 1);
    poke(high, table | 7);
    let base = 0x8000_0000u32;
    let on = |registers: Registers| Registers {
        cr0: 0x8001_0031,
        cr3: pointers as u32,
        cr4: cr4::PAE as u32,
        ..registers
    };
    let read = code32!("mov eax, [edi]");
    let write = code32!("mov dword ptr [edi], 0x55aa");
    let execute = code32!("call edi");
    let at = |code: u64, edi: u32| run_protected(on(Registers { edi, ..Registers::protected(code) }));
    poke(table, frame(52) | 3);
    poke32(frame(52), 0xc3);
    expect("read", &at(read, base), vector::END, 0);
    expect("execute", &at(execute, base), vector::END, 0);
    poke(table, frame(52) | 3 | entry::NX);
    expect("no-execute", &at(execute, base), vector::PF, 0x11);
    expect("no-execute can be read", &at(read, base), vector::END, 0);
    poke(table, frame(52) | 1);
    expect("read-only", &at(write, base), vector::PF, 3);
    poke(table, frame(52) | 3);
    at(write, base);
    check("accessed and dirty", peek(table) & 0x60, 0x60);
    expect("missing page", &at(read, base + 0x1000), vector::PF, 0);
    expect("missing directory", &at(read, base + (1 << 21)), vector::PF, 0);
    expect("missing pointer", &at(read, 0xc000_0000), vector::PF, 0);
    poke(high + 8, (32 << 20) | 0x83);
    poke32((32 << 20) + 0x1f_fffc, 0x7777);
    check("a 2 MiB page", at(read, base + (1 << 21) + 0x1f_fffc).eax.into(), 0x7777);
    let end =
        run_protected(on(Registers { edi: base, esp: SCRATCH + 0x800, ..Registers::protected_user(read) }));
    expect("a kernel page from level 3", &end, vector::PF, 5);
    let reserved =
        |end: &Registers| u64::from(end.vector) << 32 | u64::from(end.error | u32::from(cpu::under_tcg()));
    poke(table, frame(52) | 3 | 1 << 51);
    check("reserved bits", reserved(&at(read, base)), vector::PF << 32 | 9);
    poke(table, frame(52) | 3);
    // The four pointers are loaded with CR3 and not before.
    let change = code32!(
        "mov eax, [edi]",
        "mov [esi], ebx",
        "mov dword ptr [esi + 4], 0",
        "mov ecx, [edi + 0x1000 - 0x1000]",
        "mov edx, cr3",
        "mov cr3, edx",
        "mov edx, [edi]"
    );
    let end = run_protected(on(Registers {
        edi: base,
        esi: pointers as u32 + 16,
        ebx: 0,
        ..Registers::protected(change)
    }));
    expect("a pointer that was taken away", &end, vector::PF, 0);
    check("was still used before CR3 was written", end.ecx.into(), 0x55aa);
    poke(pointers + 16, high | 1 | 1 << 1);
    if !tcg_lacks("reserved bits of a pointer") {
        let end = run_protected(Registers {
            edi: pointers as u32,
            cr4: cr4::PAE as u32,
            ..Registers::protected(code32!(
                "mov cr3, edi",
                "mov eax, cr0",
                "or eax, 0x80000000",
                "mov cr0, eax"
            ))
        });
        expect("reserved bits of a pointer", &end, vector::GP, 0);
    }
    poke(pointers + 16, 0);
}

fn sysenter() {
    cpu::wrmsr(cpu::msr::SYSENTER_CS, 0);
    expect("sysenter without a selector", &exec(code32!("sysenter")), vector::GP, 0);
    // CS, SS, then the user's, follow each other: 0x48, 0x50, 0x58, 0x60.
    for (n, access) in [(0, 0x9b), (1, 0x93), (2, 0xfb), (3, 0xf3)] {
        set_descriptor(SPARE + n * 8, descriptor(0, 0xfffff, access, 0xc));
    }
    cpu::wrmsr(cpu::msr::SYSENTER_CS, SPARE);
    cpu::wrmsr(cpu::msr::SYSENTER_ESP, u64::from(SCRATCH) + 0x400);
    cpu::wrmsr(
        cpu::msr::SYSENTER_EIP,
        code32!(
            "mov eax, cs",
            "mov ebx, ss",
            "mov ebp, esp",
            "lea edx, [2f]",
            "mov ecx, esi",
            "sysexit",
            "2: mov edi, cs",
            "mov esi, ss"
        ),
    );
    let end = run_protected(Registers {
        esi: SCRATCH + 0x600,
        esp: SCRATCH + 0x800,
        ..Registers::protected_user(code32!("sysenter"))
    });
    check("sysenter: cs and ss", u64::from(end.eax) << 16 | u64::from(end.ebx), SPARE << 16 | (SPARE + 8));
    check("sysenter: esp", end.ebp.into(), u64::from(SCRATCH) + 0x400);
    check(
        "sysexit: cs and ss",
        u64::from(end.edi) << 16 | u64::from(end.esi),
        ((SPARE + 16) | 3) << 16 | ((SPARE + 24) | 3),
    );
    check("sysexit: esp", end.esp.into(), u64::from(SCRATCH) + 0x600);
    cpu::wrmsr(cpu::msr::SYSENTER_CS, 0);
}

fn virtual_8086() {
    // Entered by iret with the VM flag; code in low memory, segment 0x3000.
    let code = harrier_bare_metal::code16!(
        "mov ax, cs",
        "mov bx, ds",
        "mov cx, [0]",
        "mov dx, sp",
        "mov si, 0x5555",
        "hlt"
    );
    let enter = code32!(
        "push 0",
        "push 0",
        "push 0x3000",
        "push 0x3000",
        "push 0x4000",
        "push 0x800",
        "push 0x20002",
        "push 0x3000",
        "push edi",
        "iretd"
    );
    let end =
        run_protected(Registers { edi: (code - legacy::LOW_START) as u32, ..Registers::protected(enter) });
    expect("hlt in virtual-8086 mode", &end, vector::GP, 0);
    check("ran in its segments", u64::from(end.eax) << 16 | u64::from(end.ebx), 0x3000 << 16 | 0x3000);
    check("on its stack", u64::from(end.edx & 0xffff), 0x800);
    check("to its end", u64::from(end.esi & 0xffff), 0x5555);
    check("the flag is saved", u64::from(end.eflags) >> 17 & 1, 1);
    check("cs is saved as it was", end.cs.into(), 0x3000);
}
