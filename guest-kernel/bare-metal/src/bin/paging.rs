//! Four-level paging: which accesses fault with which error code, accessed and dirty bits, large and global pages,
//! no-execute, write protection, reserved bits, and when a changed entry takes effect.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu::{self, cr0, cr4};
use harrier_bare_metal::paging::entry::{A, D, G, NX, P, PS, U, W};
use harrier_bare_metal::paging::{
    TEST_BASE, entry, frame, map, map_2m, peek, poke, poke_bytes, user, user_stack,
};
use harrier_bare_metal::trap::vector;
use harrier_bare_metal::{Frame, check, code, code64, guest_main, run, tcg_lacks};

guest_main!(main);

const PAGE: u64 = TEST_BASE + 0x40_0000;

fn main() {
    error_codes();
    upper_levels();
    accessed_and_dirty();
    large_pages();
    reserved_bits();
    write_protection();
    stale_translations();
    global_pages();
    addresses();
    page_crossing();
    system_accesses();
}

/// What an access to `va` does: 0 if nothing, else 0x100 | error code, with CR2 checked.
fn outcome(name: &str, code: u64, va: u64, user_mode: bool) -> u64 {
    let frame = if user_mode { Frame::user(user(code), user_stack()) } else { Frame::kernel(code) };
    cpu::set_cr2(0x1234_5678);
    let end = run(Frame { rdi: va, rax: va, ..frame });
    match end.vector {
        vector::END => 0,
        vector::PF => {
            check(name, end.cr2, va);
            0x100 | end.error
        }
        other => 0x1000 | other,
    }
}

/// Compares an outcome whose error code has the reserved bit. TCG leaves the present bit out.
fn check_reserved(name: &str, got: u64, expected: u64) {
    check(name, if cpu::under_tcg() { got | 1 } else { got }, expected);
}

fn error_codes() {
    let read = code64!("mov al, [rdi]");
    let write = code64!("mov [rdi], al");
    let update = code64!("lock add byte ptr [rdi], 0");
    // The page holds `ret`; executing it means calling it.
    let execute = code64!("call rax");
    // (entry bits, kernel read, kernel write, kernel fetch, user read, user write, user fetch)
    let cases: [(&str, u64, [u64; 6]); 9] = [
        ("missing", 0, [0x100, 0x102, 0x110, 0x104, 0x106, 0x114]),
        ("missing with all other bits", !P, [0x100, 0x102, 0x110, 0x104, 0x106, 0x114]),
        ("kernel read-only", P, [0, 0x103, 0, 0x105, 0x107, 0x115]),
        ("kernel writable", P | W, [0, 0, 0, 0x105, 0x107, 0x115]),
        ("kernel no-execute", P | W | NX, [0, 0, 0x111, 0x105, 0x107, 0x115]),
        ("user read-only", P | U, [0, 0x103, 0, 0, 0x107, 0]),
        ("user writable", P | W | U, [0, 0, 0, 0, 0, 0]),
        ("user no-execute", P | W | U | NX, [0, 0, 0x111, 0, 0, 0x115]),
        ("user read-only no-execute", P | U | NX, [0, 0x103, 0x111, 0, 0x107, 0x115]),
    ];
    poke(frame(0), 0xc3);
    for (name, bits, expected) in cases {
        map(PAGE, frame(0) | bits);
        let got = [
            outcome(name, read, PAGE, false),
            outcome(name, write, PAGE, false) | outcome(name, update, PAGE, false) << 16,
            {
                poke(frame(0), 0xc3);
                outcome(name, execute, PAGE, false)
            },
            outcome(name, read, PAGE, true),
            outcome(name, write, PAGE, true) | outcome(name, update, PAGE, true) << 16,
            {
                poke(frame(0), 0xc3);
                outcome(name, execute, PAGE, true)
            },
        ];
        let what = ["kernel read", "kernel write", "kernel fetch", "user read", "user write", "user fetch"];
        for (index, got) in got.into_iter().enumerate() {
            let wanted = expected[index];
            if index % 3 != 1 {
                check(what[index], got, wanted);
            } else if !cpu::under_tcg() {
                check(what[index], got, wanted | wanted << 16);
            } else {
                // TCG reports the read of a locked update.
                check(what[index], got & 0xffff, wanted);
            }
        }
    }
    // Without EFER.NXE there is no fetch bit and NX is reserved.
    let efer = cpu::rdmsr(cpu::msr::EFER);
    cpu::wrmsr(cpu::msr::EFER, efer & !0x800);
    map(PAGE, frame(0) | P | W | NX);
    check_reserved("no-execute bit without NXE is reserved", outcome("", read, PAGE, false), 0x109);
    map(PAGE, 0);
    if !tcg_lacks("no fetch bit in the error code without NXE") {
        check("no fetch bit in the error code without NXE", outcome("", execute, PAGE, false), 0x100);
    }
    cpu::wrmsr(cpu::msr::EFER, efer);
}

fn upper_levels() {
    let read = code64!("mov al, [rdi]");
    let write = code64!("mov [rdi], al");
    let execute = code64!("call rax");
    poke(frame(0), 0xc3);
    map(PAGE, frame(0) | P | W | U);
    for level in 2..=4 {
        let slot = entry(PAGE, level);
        let original = peek(slot as u64);
        let set = |bits_off: u64, bits_on: u64| {
            poke(slot as u64, original & !bits_off | bits_on);
            cpu::set_cr3(cpu::cr3());
        };
        set(P, 0);
        check("upper level missing", outcome("", write, PAGE, false), 0x102);
        set(W, 0);
        check("upper level read-only: read", outcome("", read, PAGE, true), 0);
        check("upper level read-only: kernel write", outcome("", write, PAGE, false), 0x103);
        check("upper level read-only: user write", outcome("", write, PAGE, true), 0x107);
        set(U, 0);
        check("upper level kernel: user read", outcome("", read, PAGE, true), 0x105);
        check("upper level kernel: kernel write", outcome("", write, PAGE, false), 0);
        set(0, NX);
        poke(frame(0), 0xc3);
        check("upper level no-execute: fetch", outcome("", execute, PAGE, false), 0x111);
        check("upper level no-execute: read", outcome("", read, PAGE, false), 0);
        set(A, 0);
        outcome("", read, PAGE, false);
        check("upper level accessed bit is set", peek(slot as u64) & (A | D), A);
        set(0, 0);
    }
}

fn accessed_and_dirty() {
    let read = code64!("mov al, [rdi]");
    let write = code64!("mov [rdi], al");
    let slot = entry(PAGE, 1) as u64;
    map(PAGE, frame(0) | P | W | U);
    outcome("", read, PAGE, false);
    check("a read sets accessed", peek(slot) & (A | D), A);
    outcome("", write, PAGE, false);
    check("a write sets dirty", peek(slot) & (A | D), A | D);
    map(PAGE, frame(0) | P | W | U);
    outcome("", write, PAGE, true);
    check("a user write sets both", peek(slot) & (A | D), A | D);
    map(PAGE, frame(0) | P | W | U);
    poke(frame(0), 0xc3);
    outcome("", code64!("call rax"), PAGE, false);
    check("a fetch sets accessed", peek(slot) & (A | D), A);
    map(PAGE, frame(0) | P | U);
    outcome("", write, PAGE, true);
    check("a refused write does not set dirty", peek(slot) & D, 0);
    map(PAGE, frame(0) | P | W | U);
    outcome("", code64!("cmpxchg [rdi], cl"), PAGE, false);
    check("cmpxchg sets dirty", peek(slot) & (A | D), A | D);
    map(PAGE, frame(0) | P | W | U);
    let end =
        run(Frame { rdi: PAGE, rcx: 0, rsi: PAGE, ..Frame::kernel(code64!("rep movsb", "test al, [rdi]")) });
    check("a repeat of zero times does not set dirty", peek(slot) & D | end.rcx, 0);
    outcome("", code64!("push 0x5", "pop qword ptr [rdi]"), PAGE, false);
    check("a pop to memory sets dirty", peek(slot) & D, D);
    check("and stores", peek(frame(0)), 5);
}

fn large_pages() {
    // A 2 MiB page at an address of its own, over the physical memory of frame(0).
    let base = TEST_BASE + 0x4000_0000;
    let target = 32 << 20;
    let slot = entry(base, 2) as u64;
    map_2m(base, target | PS | P | W | U);
    poke(target + 0x12_3450, 0xabcd);
    let end = run(Frame {
        rdi: base + 0x12_3450,
        ..Frame::kernel(code64!("mov rax, [rdi]", "mov qword ptr [rdi + 8], 0x77"))
    });
    check("2 MiB page: read", end.rax, 0xabcd);
    check("2 MiB page: write", peek(target + 0x12_3458), 0x77);
    check("2 MiB page: accessed and dirty", peek(slot) & (A | D), A | D);
    map_2m(base, target | PS | P | U);
    check("2 MiB page: read-only", outcome("", code64!("mov [rdi], al"), base + 0x1f_ffff, true), 0x107);
    map_2m(base, target | PS | P | W | U | NX);
    check("2 MiB page: no-execute", outcome("", code64!("call rax"), base + 0x1000, true), 0x115);
    map_2m(base, target | 1 << 13 | PS | P | W);
    check_reserved(
        "2 MiB page: reserved address bits",
        outcome("", code64!("mov al, [rdi]"), base, false),
        0x109,
    );
    map_2m(base, 0);
    check("2 MiB page: missing", outcome("", code64!("mov al, [rdi]"), base + 0x1f_f000, false), 0x100);
    if cpu::cpuid(0x8000_0001, 0).edx & 1 << 26 == 0
        && !tcg_lacks("1 GiB page without the feature is reserved")
    {
        let slot = entry(base, 3) as u64;
        let original = peek(slot);
        poke(slot, PS | P | W);
        cpu::set_cr3(cpu::cr3());
        check_reserved(
            "1 GiB page without the feature is reserved",
            outcome("", code64!("mov al, [rdi]"), base, false),
            0x109,
        );
        poke(slot, original);
    }
    let slot = entry(base, 4) as u64;
    let original = peek(slot);
    poke(slot, original | PS);
    cpu::set_cr3(cpu::cr3());
    check_reserved(
        "page size bit in the top level is reserved",
        outcome("", code64!("mov al, [rdi]"), base, false),
        0x109,
    );
    poke(slot, original);
    cpu::set_cr3(cpu::cr3());
}

fn reserved_bits() {
    let physical_bits = cpu::cpuid(0x8000_0008, 0).eax & 0xff;
    for bit in [51, physical_bits] {
        if bit >= 52 {
            continue;
        }
        map(PAGE, frame(0) | P | W | U | 1 << bit);
        check_reserved(
            "reserved bit: kernel read",
            outcome("", code64!("mov al, [rdi]"), PAGE, false),
            0x109,
        );
        check_reserved("reserved bit: user write", outcome("", code64!("mov [rdi], al"), PAGE, true), 0x10f);
        check_reserved("reserved bit: user fetch", outcome("", code64!("jmp rax"), PAGE, true), 0x11d);
    }
    map(PAGE, frame(0) | P | W | U | 0x7ff << 52 | 7 << 9);
    check("bits that software may use", outcome("", code64!("mov al, [rdi]"), PAGE, true), 0);
    map(PAGE, frame(0) | U | W | 1 << 51);
    check("no reserved bit in a missing page", outcome("", code64!("mov al, [rdi]"), PAGE, true), 0x104);
}

fn write_protection() {
    let write = code64!("mov byte ptr [rdi], 7");
    map(PAGE, frame(0) | P);
    check("the kernel cannot write with WP", outcome("", write, PAGE, false), 0x103);
    cpu::set_cr0(cpu::cr0() & !cr0::WP);
    check("the kernel can write without WP", outcome("", write, PAGE, false), 0);
    check("and sets dirty", peek(entry(PAGE, 1) as u64) & D, D);
    map(PAGE, frame(0) | P | U);
    check("the kernel can write a user page without WP", outcome("", write, PAGE, false), 0);
    check("the user cannot write without WP", outcome("", write, PAGE, true), 0x107);
    cpu::set_cr0(cpu::cr0() | cr0::WP);
    check("and again not with WP", outcome("", write, PAGE, false), 0x103);
}

fn stale_translations() {
    let read = code64!("mov rax, [rdi]");
    let get = || run(Frame { rdi: PAGE, ..Frame::kernel(read) });
    poke(frame(0), 0x1000);
    poke(frame(1), 0x2000);
    let slot = entry(PAGE, 1) as u64;
    map(PAGE, frame(0) | P);
    check("before the change", get().rax, 0x1000);
    poke(slot, frame(1) | P);
    cpu::invlpg(PAGE + 0x123);
    check("after invlpg", get().rax, 0x2000);
    poke(slot, frame(0) | P);
    cpu::set_cr3(cpu::cr3());
    check("after a write of CR3", get().rax, 0x1000);
    poke(slot, 0);
    cpu::invlpg(PAGE);
    check("missing after invlpg", get().vector, vector::PF);
    poke(slot, frame(1) | P);
    check("an entry that becomes present needs no flush", get().rax, 0x2000);
    // From read-only to writable: the fault's retry must see the new entry.
    let write = code64!("mov qword ptr [rdi], 3");
    check("read-only", run(Frame { rdi: PAGE, ..Frame::kernel(write) }).error, 3);
    poke(slot, frame(1) | P | W);
    check(
        "more rights after a fault need no flush",
        run(Frame { rdi: PAGE, ..Frame::kernel(write) }).vector,
        vector::END,
    );
    check("and the write arrives", peek(frame(1)), 3);
    // Code through a changed mapping.
    poke_bytes(frame(0), &[0xb8, 1, 0, 0, 0, 0xc3]);
    poke_bytes(frame(1), &[0xb8, 2, 0, 0, 0, 0xc3]);
    let call = code64!("call rdi", "mov rbx, rax", "mov [rsi], rcx", "invlpg [rdi]", "call rdi");
    map(PAGE, frame(0) | P | W);
    let end = run(Frame { rdi: PAGE, rsi: slot, rcx: frame(1) | P, ..Frame::kernel(call) });
    check("code before invlpg", end.rbx, 1);
    check("code after invlpg", end.rax, 2);
    let call =
        code64!("call rdi", "mov rbx, rax", "mov [rsi], rcx", "mov rdx, cr3", "mov cr3, rdx", "call rdi");
    let end = run(Frame { rdi: PAGE, rsi: slot, rcx: frame(0) | P, ..Frame::kernel(call) });
    check("code before the write of CR3", end.rbx, 2);
    check("code after the write of CR3", end.rax, 1);
}

fn global_pages() {
    let get = || run(Frame { rdi: PAGE, ..Frame::kernel(code64!("mov rax, [rdi]")) });
    poke(frame(0), 0x1000);
    poke(frame(1), 0x2000);
    let slot = entry(PAGE, 1) as u64;
    map(PAGE, frame(0) | P | G);
    check("global page", get().rax, 0x1000);
    poke(slot, frame(1) | P | G);
    cpu::set_cr3(cpu::cr3());
    // The processor may keep the old translation, and may have lost it.
    check("global page after a write of CR3: either", u64::from(matches!(get().rax, 0x1000 | 0x2000)), 1);
    cpu::invlpg(PAGE);
    check("global page after invlpg", get().rax, 0x2000);
    poke(slot, frame(0) | P | G);
    cpu::set_cr4(cpu::cr4() & !cr4::PGE);
    check("global page after CR4.PGE changed", get().rax, 0x1000);
    poke(slot, frame(1) | P | G);
    cpu::set_cr4(cpu::cr4() | cr4::PGE);
    check("global page after CR4.PGE changed back", get().rax, 0x2000);
    map(PAGE, 0);
}

fn addresses() {
    let cases: [(&str, u64, u64, u64); 8] = [
        ("non-canonical read", code!("mov al, [rdi]", "int 0xff"), 0x8000_0000_0000, vector::GP),
        ("non-canonical write", code!("mov [rdi], al", "int 0xff"), 0xffff_7fff_ffff_ffff, vector::GP),
        (
            "non-canonical through rbp",
            code!("mov rbp, rdi", "mov al, [rbp]", "int 0xff"),
            0x8000_0000_0000,
            vector::SS,
        ),
        // The prefix counts for nothing in 64-bit mode (Intel SDM volume 1, 3.3.4).
        (
            "non-canonical with an ss override",
            code!("mov al, ss:[rdi]", "int 0xff"),
            0x8000_0000_0000,
            vector::GP,
        ),
        (
            "non-canonical through rsp",
            code!("mov rbx, rsp", "mov rsp, rdi", "mov al, [rsp]", "int 0xff"),
            1 << 63,
            vector::SS,
        ),
        ("non-canonical push", code!("mov rsp, rdi", "push rax", "int 0xff"), 1 << 63, vector::SS),
        ("non-canonical pop", code!("mov rsp, rdi", "pop rax", "int 0xff"), 1 << 63, vector::SS),
        ("non-canonical call stack", code!("mov rsp, rdi", "call 2f", "2: int 0xff"), 1 << 63, vector::SS),
    ];
    for (name, code, va, expected) in cases {
        if cpu::under_tcg() && expected == vector::SS {
            tcg_lacks(name);
            continue;
        }
        let end = run(Frame { rdi: va, ..Frame::kernel(code) });
        check(name, end.vector, expected);
        check(name, end.error, 0);
    }
    let jump = run(Frame { rdi: 1 << 47, ..Frame::kernel(code!("jmp rdi")) });
    check("jump to a non-canonical address", jump.vector, vector::GP);
    let ret = run(Frame { rdi: 1 << 47, ..Frame::kernel(code!("push rdi", "ret")) });
    check("return to a non-canonical address", ret.vector, vector::GP);
    let high = run(Frame { rdi: 0xffff_8000_0000_0000, ..Frame::kernel(code!("mov al, [rdi]")) });
    check("the first address of the upper half is canonical", high.vector, vector::PF);
    check("and is what CR2 says", high.cr2, 0xffff_8000_0000_0000);
    let low = run(Frame { rdi: 0x7fff_ffff_fffc, ..Frame::kernel(code!("mov eax, [rdi]")) });
    check("the last address of the lower half is canonical", low.vector, vector::PF);
    if !tcg_lacks("an access across the end of the lower half") {
        let across = run(Frame { rdi: 0x7fff_ffff_fffd, ..Frame::kernel(code!("mov eax, [rdi]")) });
        check("an access across the end of the lower half", across.vector, vector::GP);
    }
    let invlpg = run(Frame { rdi: 1 << 47, ..Frame::kernel(code64!("invlpg [rdi]")) });
    check("invlpg of a non-canonical address does nothing", invlpg.vector, vector::END);
    let clflush = run(Frame { rdi: PAGE, ..Frame::kernel(code!("clflush [rdi]", "int 0xff")) });
    if !tcg_lacks("clflush of a missing page faults") {
        check("clflush of a missing page faults", clflush.vector, vector::PF);
    }
}

fn page_crossing() {
    let next = PAGE + 4096;
    map(PAGE, frame(0) | P | W);
    map(next, 0);
    poke(frame(0) + 4088, 0x1111_1111_1111_1111);
    let write = run(Frame { rdi: next - 4, rax: u64::MAX, ..Frame::kernel(code!("mov [rdi], rax")) });
    check("write across into a missing page: cr2", write.cr2, next);
    check("write across into a missing page stores nothing", peek(frame(0) + 4088), 0x1111_1111_1111_1111);
    let push = run(Frame { rsp: next + 4, ..Frame::kernel(code!("push rax")) });
    check("push across into a missing page", push.cr2, next);
    check("push leaves rsp", push.rsp, next + 4);
    let add = run(Frame { rdi: next - 1, rflags: 3, ..Frame::kernel(code!("adc dword ptr [rdi], 1")) });
    check("add across into a missing page", add.cr2, next);
    check("add leaves flags", add.rflags & cpu::flags::STATUS, 1);
    let read = run(Frame { rdi: next - 7, ..Frame::kernel(code!("mov rax, [rdi]")) });
    check("read across into a missing page", read.cr2, next);
    map(next, frame(5) | P);
    let write = run(Frame { rdi: next - 4, rax: u64::MAX, ..Frame::kernel(code!("mov [rdi], rax")) });
    check("write across into a read-only page", write.error, 3);
    check("write across into a read-only page stores nothing", peek(frame(0) + 4088), 0x1111_1111_1111_1111);
    map(next, frame(5) | P | W);
    poke(frame(5), 0);
    let write = run(Frame {
        rdi: next - 3,
        rax: 0x8877_6655_4433_2211,
        ..Frame::kernel(code64!(
            "mov [rdi], rax",
            "mov rcx, [rdi]",
            "lock inc qword ptr [rdi]",
            "mov rdx, [rdi]"
        ))
    });
    check("read across pages", write.rcx, 0x8877_6655_4433_2211);
    check("locked update across pages", write.rdx, 0x8877_6655_4433_2212);
    check("write across pages: first", peek(frame(0) + 4088), 0x3322_1211_1111_1111);
    check("write across pages: second", peek(frame(5)), 0x88_7766_5544);
    // An instruction whose bytes lie in two pages.
    poke_bytes(frame(0) + 4096 - 3, &[0x48, 0xb8, 0x11]);
    poke_bytes(frame(5), &[0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0xc3]);
    let end = run(Frame { rdi: next - 3, ..Frame::kernel(code64!("call rdi")) });
    check("instruction across pages", end.rax, 0x8877_6655_4433_2211);
    map(next, 0);
    let end = run(Frame { rdi: next - 3, ..Frame::kernel(code!("call rdi")) });
    check("instruction across into a missing page: cr2", end.cr2, next);
    check("instruction across into a missing page: error", end.error, 0x10);
    check("instruction across into a missing page: rip", end.rip, next - 3);
    map(next, frame(6) | P);
    poke_bytes(frame(6), &[0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0x00, 0xc3]);
    let end = run(Frame { rdi: next - 3, ..Frame::kernel(code64!("call rdi")) });
    check("instruction across after its second page changed", end.rax, 0x00ff_eedd_ccbb_aa11);
}

fn system_accesses() {
    // The tables are read with kernel rights, whatever the privilege level.
    map(PAGE, frame(0) | P | W);
    let code = user(code64!("mov eax, 0x23", "verr ax", "setz cl", "lar edx, ax", "lsl ebx, eax"));
    let end = run(Frame::user(code, user_stack()));
    check("verr reads the descriptor table from user mode", end.rcx & 0xff, 1);
    check("lar reads the descriptor table from user mode", end.rdx & 0x00f0_ff00, 0x00c0_f300);
    check("lsl reads the descriptor table from user mode", end.rbx, 0xffff_ffff);
    let end = run(Frame::user(user(code64!("mov eax, ds")), user_stack()));
    check("iretq to user mode clears a kernel data segment", end.rax, 0);
    let end = run(Frame::user(user(code!("mov rax, [0x200000]", "int 0xff")), user_stack()));
    check("user mode cannot read the kernel", end.error << 8 | end.vector, 5 << 8 | vector::PF);
    let end = run(Frame::user(user(code!("int 0xff")), 0x1000));
    check("user stack is not touched by an interrupt", end.rsp, 0x1000);
}
