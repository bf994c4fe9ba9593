//! Port and memory I/O: the serial port's registers, the I/O APIC's through every kind of instruction, and places
//! where there is nothing.

#![no_std]
#![no_main]

use harrier_bare_metal::apic::{self, IOAPIC};
use harrier_bare_metal::cpu::{self, flags, inb, inl, inw, outb, outl, outw};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke};
use harrier_bare_metal::trap::vector;
use harrier_bare_metal::{Frame, check, check_true, code, code64, guest_main, run, tcg_lacks};

guest_main!(main);

const SCRATCH: u16 = 0x3ff;
/// No device has these ports.
const NOBODY: u16 = 0x5670;
/// Guest physical addresses without memory or device.
const NOWHERE: u64 = 0xd800_0000;

fn main() {
    ports();
    serial();
    memory_mapped();
    nowhere();
}

fn ports() {
    for value in [0x00, 0x5a, 0xff] {
        outb(SCRATCH, value);
        check("the scratch register keeps a byte", inb(SCRATCH).into(), value.into());
    }
    check("an absent port reads ones: byte", inb(NOBODY).into(), 0xff);
    check("an absent port reads ones: word", inw(NOBODY).into(), 0xffff);
    check("an absent port reads ones: long", inl(NOBODY).into(), 0xffff_ffff);
    outb(NOBODY, 0);
    outw(NOBODY, 0);
    outl(NOBODY, 0);
    check("a write to an absent port does nothing", inl(NOBODY).into(), 0xffff_ffff);
    let end = run(Frame {
        rax: 0x1122_3344_5566_7788,
        rdx: NOBODY.into(),
        rflags: 2 | flags::STATUS,
        ..Frame::kernel(code64!("in al, dx", "mov rcx, rax", "in ax, dx", "mov rbx, rax", "in eax, dx"))
    });
    check("in to al leaves the rest", end.rcx, 0x1122_3344_5566_77ff);
    check("in to ax leaves the rest", end.rbx, 0x1122_3344_5566_ffff);
    check("in to eax clears the upper half", end.rax, 0xffff_ffff);
    check("in leaves the flags", end.rflags & flags::STATUS, flags::STATUS);
    let end = run(Frame { rax: 0x7f, ..Frame::kernel(code64!("in al, 0x71", "out 0x80, al", "mov ecx, 1")) });
    check("immediate ports", end.rcx, 1);
    let end = run(Frame {
        rdx: 0xffff_ffff_0000_03ff,
        rax: 0xa5,
        ..Frame::kernel(code64!("out dx, al", "xor eax, eax", "in al, dx"))
    });
    check("the port number has 16 bits", end.rax, 0xa5);
    poke(frame(0), 0x0706_0504_0302_0100);
    let end = run(Frame {
        rdx: SCRATCH.into(),
        rsi: frame(0),
        rcx: 6,
        rdi: frame(1),
        ..Frame::kernel(code64!("rep outsb", "insb"))
    });
    check("rep outsb ends with the last byte", peek(frame(1)) & 0xff, 5);
    check("rep outsb counts", end.rsi - frame(0), 6);
    poke(frame(1), 0);
    run(Frame { rdx: NOBODY.into(), rcx: 3, rdi: frame(1), ..Frame::kernel(code64!("rep insw")) });
    check("rep insw", peek(frame(1)), 0xffff_ffff_ffff);
}

fn serial() {
    const COM1: u16 = 0x3f8;
    // Nothing can be printed meanwhile: results are collected first.
    let lcr = inb(COM1 + 3);
    outb(COM1 + 3, 0x83);
    outb(COM1, 0x0c);
    outb(COM1 + 1, 0x34);
    let divisor = u64::from(inb(COM1)) | u64::from(inb(COM1 + 1)) << 8;
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x03);
    let line_control = inb(COM1 + 3);
    outb(COM1 + 1, 0x0f);
    let interrupts = inb(COM1 + 1);
    outb(COM1 + 1, 0);
    inb(COM1 + 2);
    let cause = inb(COM1 + 2) & 0x0f;
    outb(COM1 + 2, 1);
    let buffers = inb(COM1 + 2) & 0xc0;
    outb(COM1 + 4, 0x1e);
    outb(COM1, 0x42);
    let mut tries = 0;
    while inb(COM1 + 5) & 1 == 0 && tries < 100_000 {
        tries += 1;
    }
    let looped = inb(COM1);
    let modem = inb(COM1 + 6) >> 4;
    outb(COM1 + 4, 0x0b);
    outb(COM1 + 3, lcr & 0x7f);
    check("the divisor latch keeps", divisor, 0x340c);
    check("the line control register keeps", line_control.into(), 3);
    check("the interrupt enable register keeps four bits", interrupts.into(), 0x0f);
    check("no interrupt is identified", cause.into(), 1);
    check("buffers are identified", buffers.into(), 0xc0);
    check("loop-back brings the byte", looped.into(), 0x42);
    check("loop-back connects the modem lines", modem.into(), 0xd);
}

fn memory_mapped() {
    check("the i/o apic has 24 pins", u64::from(apic::ioapic_read(1) >> 16 & 0xff), 23);
    apic::ioapic_write(0x10 + 2 * 7, 0x0001_0033);
    check("a redirection entry keeps", apic::ioapic_read(0x10 + 2 * 7).into(), 0x0001_0033);
    apic::ioapic_write(0x11 + 2 * 7, 0x0500_0000);
    check("and its destination", apic::ioapic_read(0x11 + 2 * 7).into(), 0x0500_0000);
    check(
        "another entry is masked after reset",
        u64::from(apic::ioapic_read(0x10 + 2 * 9) & apic::MASKED),
        apic::MASKED.into(),
    );

    let window = IOAPIC + 0x10;
    let select = |index: u64| Frame { rsi: IOAPIC, rdi: window, rax: index, ..Frame::kernel(0) };
    let entry7 = 0x10 + 2 * 7;
    let exec = |code: u64, frame: Frame| run(Frame { rip: code, ..frame });
    let end = exec(code64!("mov [rsi], eax", "mov edx, [rdi]", "mov r8d, [rsi]"), select(entry7));
    check("mov", end.rdx, 0x0001_0033);
    check("the select register reads back", end.r8, entry7);
    let end = exec(
        code64!(
            "mov [rsi], eax",
            "cmp dword ptr [rdi], 0x10033",
            "sete dl",
            "test dword ptr [rdi], 0x10000",
            "setnz cl"
        ),
        select(entry7),
    );
    check("cmp and test with memory", end.rdx << 1 | end.rcx, 3);
    let end = exec(
        code64!("mov [rsi], eax", "mov ebx, 1", "add ebx, [rdi]", "push qword ptr [rdi]", "pop r8"),
        select(entry7),
    );
    check("add from memory", end.rbx, 0x0001_0034);
    check("push from memory", end.r8 & 0xffff_ffff, 0x0001_0033);
    let end = exec(
        code64!("mov [rsi], eax", "mov ecx, 0x10044", "xchg [rdi], ecx", "mov edx, [rdi]"),
        select(entry7),
    );
    check("xchg reads the old value", end.rcx, 0x0001_0033);
    check("xchg writes the new one", end.rdx, 0x0001_0044);
    let end = exec(
        code64!(
            "mov [rsi], eax",
            "or dword ptr [rdi], 0x1",
            "mov edx, [rdi]",
            "inc dword ptr [rdi]",
            "mov ecx, [rdi]"
        ),
        select(entry7),
    );
    check("or to memory", end.rdx, 0x0001_0045);
    check("inc to memory", end.rcx, 0x0001_0046);
    poke(frame(0), 0x1_0055);
    let end = exec(
        code64!("mov [rsi], eax", "push rsi", "mov rsi, r9", "movsd", "pop rsi", "mov edx, [rsi + 0x10]"),
        Frame { r9: frame(0), ..select(entry7) },
    );
    check("movsd to a device", end.rdx, 0x0001_0055);
    check("and it counts", end.rdi, window + 4);
    poke(frame(1), 0);
    let end = exec(
        code64!("mov [rsi], eax", "mov rsi, rdi", "mov rdi, r9", "movsd"),
        Frame { r9: frame(1), ..select(entry7) },
    );
    check("movsd from a device", peek(frame(1)), 0x0001_0055);
    check("and it counts too", end.rsi, window + 4);
    let end = exec(
        code64!(
            "mov [rsi], eax",
            "movd xmm0, dword ptr [rdi]",
            "movd edx, xmm0",
            "movzx ecx, byte ptr [rdi]"
        ),
        select(entry7),
    );
    check("movd from a device", end.rdx, 0x0001_0055);
    if !tcg_lacks("a byte read of a device register") {
        check("a byte read of a device register", end.rcx, 0x55);
    }
    // A device behind a small page that is not mapped one to one.
    map(TEST_BASE, IOAPIC | entry_bits());
    let end = run(Frame {
        rsi: TEST_BASE,
        rax: entry7,
        ..Frame::kernel(code64!("mov [rsi], eax", "mov edx, [rsi + 0x10]"))
    });
    check("a device through another address", end.rdx, 0x0001_0055);
    // A fault after a device access in one instruction leaves the device alone when it can.
    let missing = TEST_BASE + 0x10_0000;
    let end = run(Frame { rsi: IOAPIC + 0x10, rdi: missing, ..Frame::kernel(code!("movsd", "int 0xff")) });
    check("movsd from a device into a missing page", end.vector << 8 | end.error, vector::PF << 8 | 2);
    check("leaves the registers", end.rsi, IOAPIC + 0x10);
    apic::ioapic_write(0x10 + 2 * 7, apic::MASKED);
}

const fn entry_bits() -> u64 {
    entry::P | entry::W | entry::PCD
}

fn nowhere() {
    let read = code64!("mov rax, [rsi]", "mov ecx, [rsi + 4]", "movzx edx, byte ptr [rsi + 3]");
    let end = run(Frame { rsi: NOWHERE, ..Frame::kernel(read) });
    if !tcg_lacks("an absent address reads ones") {
        check("an absent address reads ones: 8 bytes", end.rax, u64::MAX);
        check("an absent address reads ones: 4 bytes", end.rcx, 0xffff_ffff);
        check("an absent address reads ones: 1 byte", end.rdx, 0xff);
        let end = run(Frame {
            rsi: NOWHERE,
            rax: 1,
            ..Frame::kernel(code64!("lock xadd [rsi], rax", "mov ecx, [rsi]"))
        });
        check("an exchange with an absent address reads ones", end.rax, u64::MAX);
        let end = run(Frame { rsi: NOWHERE, rdi: frame(2), rcx: 16, ..Frame::kernel(code64!("rep movsb")) });
        check("rep movsb from an absent address", peek(frame(2) + 8), u64::MAX);
        check("rep movsb from an absent address counts", end.rcx, 0);
    }
    let end = run(Frame { rdi: NOWHERE, rcx: 64, ..Frame::kernel(code64!("rep stosq", "mov ecx, 7")) });
    check("stores to an absent address do nothing", end.rcx, 7);
    check("and count", end.rdi, NOWHERE + 512);
    check_true("the machine still runs", cpu::rdtsc() != 0);
}
