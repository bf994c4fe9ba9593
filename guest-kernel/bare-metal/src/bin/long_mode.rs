//! Long mode: gates and stacks, user mode, returns, system calls, double faults, compatibility mode.

#![no_std]
#![no_main]

use harrier_bare_metal::boot::selector::{self, CODE64, DATA, SPARE, USER_CODE32, USER_CODE64, USER_DATA};
use harrier_bare_metal::cpu::{self, flags, msr};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke, user, user_stack};
use harrier_bare_metal::trap::{self, Gate, default_gate, set_descriptor, set_gate, vector};
use harrier_bare_metal::{Frame, check, code, code32, code64, guest_main, run, tcg_lacks};

guest_main!(main);

fn main() {
    exceptions();
    gates_and_stacks();
    user_mode();
    iret();
    system_calls();
    swapgs();
    double_faults();
    compatibility_mode();
}

fn kernel(code: u64) -> Frame {
    run(Frame::kernel(code))
}

fn expect(name: &str, end: &Frame, vector: u64, error: u64) {
    check(name, end.vector << 32 | end.error, vector << 32 | error);
}

/// [`expect`] for what TCG is known to do differently; under it nothing is executed.
fn expect_real(name: &str, code: impl FnOnce() -> Frame, vector: u64, error: u64) {
    if !tcg_lacks(name) {
        expect(name, &code(), vector, error);
    }
}

/// The error code that names gate `n` of the interrupt descriptor table. TCG counts 16 bytes a gate.
fn at(n: u64) -> u64 {
    if cpu::under_tcg() { n << 4 | 2 } else { n << 3 | 2 }
}

fn in_user(code: u64) -> Frame {
    run(Frame::user(user(code), user_stack()))
}

fn exceptions() {
    let int3 = code!("int3");
    let end = kernel(int3);
    expect("int3", &end, vector::BP, 0);
    check("int3 is a trap", end.rip, int3 + 1);
    let int = code!("int 0x41");
    let end = kernel(int);
    expect("int n", &end, 0x41, 0);
    check("int n is a trap", end.rip, int + 2);
    check("int n saves the flags", end.rflags, 2);
    let icebp = code!(".byte 0xf1");
    if !tcg_lacks("int1") {
        let end = kernel(icebp);
        expect("int1", &end, vector::DB, 0);
        check("int1 is a trap", end.rip, icebp + 1);
    }
    let end = run(Frame { rsp: trap::snippet_stack() - 5, ..Frame::kernel(code!("int 0x42")) });
    check("the old rsp is saved as it was", end.rsp, trap::snippet_stack() - 5);
    check("the old ss is saved", end.ss, DATA);
    check("the frame is at the top of the gate's stack", trap::ist1() - end.pushed_at, 48);
    expect_real(
        "rdmsr of an unknown register",
        || kernel(code!("mov ecx, 0xdead0000", "rdmsr", "int 0xff")),
        vector::GP,
        0,
    );
}

fn gates_and_stacks() {
    // Without IST, from kernel mode: the stack in use, aligned down to 16 bytes.
    set_gate(0x50, Gate::new(trap::stub(0x50), 0, 0));
    let top = trap::snippet_stack();
    for offset in [0, 8, 3] {
        let end = run(Frame { rsp: top - 256 - offset, ..Frame::kernel(code!("int 0x50")) });
        check(
            "without ist the frame is on the stack in use",
            end.pushed_at,
            ((top - 256 - offset) & !15) - 48,
        );
        check("and names the old stack pointer", end.rsp, top - 256 - offset);
    }
    set_gate(0x50, Gate::new(trap::stub(0x50), 0, 3));
    let end = in_user(code!("int 0x50"));
    check("from user mode the frame is on rsp0", trap::rsp0() - end.pushed_at, 48);
    check("from user mode cs is saved", end.cs, USER_CODE64);
    check("from user mode ss is saved", end.ss, USER_DATA);
    // A trap gate leaves interrupts enabled; both kinds clear TF and the rest.
    let code = code!("pushfq", "pop rax", "int 0xff");
    let mut gate = Gate::new(code, 1, 0);
    set_gate(0x51, gate);
    let start = Frame { rflags: 2 | flags::IF | flags::NT | flags::CF, ..Frame::kernel(code!("int 0x51")) };
    check("an interrupt gate clears the interrupt flag and nt", run(start).rax, 2 | flags::CF);
    gate.low |= 1 << 40;
    set_gate(0x51, gate);
    check("a trap gate leaves the interrupt flag", run(start).rax, 2 | flags::CF | flags::IF);
    cpu::cli();
    // Faulty gates.
    set_gate(0x52, Gate { low: default_gate(0x52).low & !(1 << 47), ..default_gate(0x52) });
    expect("a gate that is not present", &kernel(code!("int 0x52")), vector::NP, at(0x52));
    set_gate(0x52, Gate { low: 0, high: 0 });
    expect("an empty gate", &kernel(code!("int 0x52")), vector::GP, at(0x52));
    set_gate(0x52, Gate { low: default_gate(0x52).low & !(0xffff << 16), ..default_gate(0x52) });
    expect("a gate with a null selector", &kernel(code!("int 0x52")), vector::GP, 0);
    set_gate(0x52, Gate { low: default_gate(0x52).low & !(0xffff << 16) | DATA << 16, ..default_gate(0x52) });
    expect("a gate to a data segment", &kernel(code!("int 0x52")), vector::GP, DATA);
    set_gate(
        0x52,
        Gate { low: default_gate(0x52).low & !(0xffff << 16) | selector::CODE32 << 16, ..default_gate(0x52) },
    );
    expect("a gate to 32-bit code", &kernel(code!("int 0x52")), vector::GP, selector::CODE32);
    set_gate(
        0x52,
        Gate { low: default_gate(0x52).low & !(0xffff << 16) | 0x7f8 << 16, ..default_gate(0x52) },
    );
    expect("a gate beyond the descriptor table", &kernel(code!("int 0x52")), vector::GP, 0x7f8);
    let int = code!("int 0x42");
    let end = in_user(int);
    expect("int n beyond the gate's privilege", &end, vector::GP, at(0x42));
    check("and stays at the instruction", end.rip, user(int));
    set_gate(0x52, default_gate(0x52));
    trap::load_idt(harrier_bare_metal::trap::IDT.get() as u64, 0x41f);
    expect("int n beyond the table", &kernel(code!("int 0x42")), vector::GP, at(0x42));
    expect("int n at the end of the table", &kernel(code!("int 0x41")), 0x41, 0);
    trap::load_idt(harrier_bare_metal::trap::IDT.get() as u64, 4095);
    expect("int3 from user mode", &in_user(code!("int3")), vector::BP, 0);
    set_gate(vector::BP, Gate::new(trap::stub(vector::BP), 1, 0));
    expect("int3 beyond the gate's privilege", &in_user(code!("int3")), vector::GP, at(3));
    expect_real("int1 ignores the gate's privilege", || in_user(code!(".byte 0xf1")), vector::DB, 0);
    set_gate(vector::BP, default_gate(vector::BP));
}

fn user_mode() {
    let privileged: [(&str, u64); 19] = [
        ("hlt in user mode", code!("hlt")),
        ("cli in user mode", code!("cli")),
        ("sti in user mode", code!("sti")),
        ("in in user mode", code!("mov edx, 0x3fd", "2: in al, dx")),
        ("out in user mode", code!("mov edx, 0x3ff", "out dx, al")),
        ("mov to cr3 in user mode", code!("mov cr3, rax")),
        ("mov from cr0 in user mode", code!("mov rax, cr0")),
        ("mov from dr7 in user mode", code!("mov rax, dr7")),
        ("clts in user mode", code!("clts")),
        ("lgdt in user mode", code!("lgdt [rsp - 16]")),
        ("lidt in user mode", code!("lidt [rsp - 16]")),
        ("lldt in user mode", code!("xor eax, eax", "lldt ax")),
        ("ltr in user mode", code!("xor eax, eax", "ltr ax")),
        ("invlpg in user mode", code!("invlpg [rsp]")),
        ("wbinvd in user mode", code!("wbinvd")),
        ("rdmsr in user mode", code!("mov ecx, 0x10", "rdmsr")),
        ("wrmsr in user mode", code!("mov ecx, 0x10", "wrmsr")),
        ("swapgs in user mode", code!("swapgs")),
        ("lmsw in user mode", code!("lmsw ax")),
    ];
    for (name, code) in privileged {
        expect(name, &in_user(code), vector::GP, 0);
    }
    expect("sysret in user mode", &in_user(code!("sysretq")), vector::GP, 0);
    let end = in_user(code64!(
        "sidt [rsp - 16]",
        "sgdt [rsp - 32]",
        "str eax",
        "sldt ecx",
        "smsw edx",
        "mov rbx, [rsp - 14]"
    ));
    expect("sidt, sgdt, str, sldt and smsw work in user mode", &end, vector::END, 0);
    check("str", end.rax, selector::TASK);
    check("sldt", end.rcx, 0);
    check("smsw", end.rdx & 0xffff, cpu::cr0() & 0xffff);
    check("sidt", end.rbx, harrier_bare_metal::trap::IDT.get() as u64);
    // IOPL and the permission map.
    let port = code!("mov edx, 0x3ff", "mov al, 0x5a", "out dx, al", "xor eax, eax", "in al, dx", "int 0xff");
    let start = Frame::user(user(port), user_stack());
    let end = run(Frame { rflags: 2 | flags::IOPL, ..start });
    expect("ports with IOPL 3", &end, vector::END, 0);
    check("ports with IOPL 3: value", end.rax, 0x5a);
    let end = run(Frame {
        rflags: 2 | flags::IOPL,
        ..Frame::user(user(code64!("sti", "pushfq", "pop rax", "cli", "pushfq", "pop rcx")), user_stack())
    });
    check("sti with IOPL 3", end.rax & flags::IF, flags::IF);
    check("cli with IOPL 3", end.rcx & flags::IF, 0);
    let map = &mut trap::this_cpu().task.io_map;
    map[0x3ff / 8] &= !(1 << 7);
    expect("a port that the map permits", &run(start), vector::END, 0);
    expect(
        "a word port of which the map permits half",
        &run(Frame::user(user(code!("mov edx, 0x3fe", "in ax, dx", "int 0xff")), user_stack())),
        vector::GP,
        0,
    );
    expect(
        "a port beyond the map",
        &run(Frame::user(user(code!("mov edx, 0xffff", "in al, dx", "int 0xff")), user_stack())),
        vector::GP,
        0,
    );
    trap::this_cpu().task.io_map[0x3ff / 8] = 0xff;
    let popf = code64!("pushfq", "or dword ptr [rsp], 0x3200", "popfq", "pushfq", "pop rax");
    let end = in_user(popf);
    check(
        "popf in user mode changes neither IOPL nor the interrupt flag",
        end.rax & (flags::IF | flags::IOPL),
        0,
    );
    let end = kernel(code64!(
        "pushfq",
        "or dword ptr [rsp], 0x3000",
        "popfq",
        "pushfq",
        "pop rax",
        "push 2",
        "popfq"
    ));
    check("popf in kernel mode changes IOPL", end.rax & flags::IOPL, flags::IOPL);
    cpu::set_cr4(cpu::cr4() | cpu::cr4::TSD);
    expect("rdtsc in user mode with CR4.TSD", &in_user(code!("rdtsc", "int 0xff")), vector::GP, 0);
    expect("rdtsc in kernel mode with CR4.TSD", &kernel(code64!("rdtsc")), vector::END, 0);
    cpu::set_cr4(cpu::cr4() & !cpu::cr4::TSD);
    expect("rdtsc in user mode", &in_user(code64!("rdtsc")), vector::END, 0);
    expect(
        "rdpmc in user mode without CR4.PCE",
        &in_user(code!("xor ecx, ecx", "rdpmc", "int 0xff")),
        vector::GP,
        0,
    );
    // Alignment checks happen in user mode with both AM and AC.
    cpu::set_cr0(cpu::cr0() | cpu::cr0::AM);
    let unaligned = code64!("mov eax, [rsp - 15]");
    if !tcg_lacks("alignment check") {
        let end = run(Frame { rflags: 2 | flags::AC, ..Frame::user(user(unaligned), user_stack()) });
        expect("alignment check", &end, vector::AC, 0);
    }
    expect("no alignment check without AC", &in_user(unaligned), vector::END, 0);
    let end = run(Frame { rflags: 2 | flags::AC, ..Frame::kernel(unaligned) });
    expect("no alignment check in kernel mode", &end, vector::END, 0);
    cpu::set_cr0(cpu::cr0() & !cpu::cr0::AM);
}

/// Runs `iretq` on this frame; the target ends by itself.
fn iretq(rip: u64, cs: u64, rflags: u64, rsp: u64, ss: u64) -> Frame {
    let code = code!("push rax", "push rcx", "push rdx", "push rbx", "push rsi", "iretq");
    run(Frame { rax: ss, rcx: rsp, rdx: rflags, rbx: cs, rsi: rip, ..Frame::kernel(code) })
}

fn iret() {
    let end_here = code!("int 0xff");
    let top = trap::snippet_stack();
    let end = iretq(end_here, CODE64, 2 | flags::STATUS | flags::AC, top - 100, DATA);
    expect("iretq to the same level", &end, vector::END, 0);
    check("iretq loads the flags", end.rflags & 0xf_ffff, 2 | flags::STATUS | flags::AC);
    check("iretq to the same level loads rsp", end.rsp, top - 100);
    let end = iretq(end_here, CODE64, 2, top - 64, 0);
    expect("iretq to the same level with a null ss", &end, vector::END, 0);
    check("iretq with a null ss", end.ss, 0);
    let end = iretq(user(end_here), USER_CODE64, 2 | flags::IOPL, 0x1234_5678_9abc, USER_DATA);
    expect("iretq to user mode", &end, vector::END, 0);
    check("iretq to user mode loads rsp", end.rsp, 0x1234_5678_9abc);
    check("iretq to user mode loads IOPL", end.rflags & flags::IOPL, flags::IOPL);
    expect(
        "iretq to user mode with a kernel ss",
        &iretq(user(end_here), USER_CODE64, 2, 0, DATA),
        vector::GP,
        DATA,
    );
    expect("iretq to user mode with a null ss", &iretq(user(end_here), USER_CODE64, 2, 0, 3), vector::GP, 0);
    expect(
        "iretq to user mode with a null ss of the wrong level",
        &iretq(user(end_here), USER_CODE64, 2, 0, 0),
        vector::GP,
        0,
    );
    expect("iretq to a null cs", &iretq(end_here, 0, 2, top, DATA), vector::GP, 0);
    expect("iretq to a data segment", &iretq(end_here, DATA, 2, top, DATA), vector::GP, DATA);
    expect(
        "iretq with a level that is not the segment's",
        &iretq(end_here, CODE64 | 3, 2, top, USER_DATA),
        vector::GP,
        CODE64,
    );
    expect("iretq beyond the descriptor table", &iretq(end_here, 0x7f8, 2, top, DATA), vector::GP, 0x7f8);
    set_descriptor(SPARE, trap::descriptor(CODE64) & !(1 << 47));
    expect(
        "iretq to a segment that is not present",
        &iretq(end_here, SPARE, 2, top, DATA),
        vector::NP,
        SPARE,
    );
    set_descriptor(SPARE, trap::descriptor(DATA) & !(1 << 47));
    expect_real(
        "iretq with a stack that is not present",
        || iretq(end_here, CODE64, 2, top, SPARE),
        vector::SS,
        SPARE,
    );
    expect_real("iretq to a non-canonical address", || iretq(1 << 47, CODE64, 2, top, DATA), vector::GP, 0);
    let end = run(Frame { rflags: 2 | flags::NT, ..Frame::kernel(code!("push 2", "push 8", "iretq")) });
    expect("iretq with the nested-task flag", &end, vector::GP, 0);
    // iretd pops 32-bit values and goes to 64-bit code all the same.
    let end = kernel(code!(
        "lea rax, [rip + 2f]",
        "lea rsp, [rsp - 20]",
        "mov [rsp], eax",
        "mov dword ptr [rsp + 4], 8",
        "mov dword ptr [rsp + 8], 2",
        "mov dword ptr [rsp + 12], 0x8000",
        "mov dword ptr [rsp + 16], 0x10",
        "iretd",
        "2: int 0xff"
    ));
    expect("iretd", &end, vector::END, 0);
    check("iretd loads 32 bits of rsp", end.rsp, 0x8000);
}

fn system_calls() {
    let efer = cpu::rdmsr(msr::EFER);
    expect(
        "syscall without EFER.SCE",
        &{
            cpu::wrmsr(msr::EFER, efer & !1);
            in_user(code!("syscall", "int 0xff"))
        },
        vector::UD,
        0,
    );
    cpu::wrmsr(msr::EFER, efer | 1);
    cpu::wrmsr(msr::STAR, (USER_CODE32) << 48 | CODE64 << 32);
    cpu::wrmsr(msr::SFMASK, flags::IF | flags::DF | flags::CF);
    let syscall = code!("syscall", "int 0xff");
    // The entry ends the run at once, with kernel selectors.
    cpu::wrmsr(msr::LSTAR, code!("pushfq", "pop rax", "int 0xff"));
    let start = Frame {
        rflags: 2 | flags::STATUS | flags::DF,
        rsp: trap::snippet_stack(),
        ..Frame::user(user(syscall), 0)
    };
    let end = run(start);
    check("syscall saves the next rip", end.rcx, user(syscall) + 2);
    check("syscall saves the flags", end.r11, 2 | flags::STATUS | flags::DF);
    if !tcg_lacks("syscall masks the flags") {
        check("syscall masks the flags", end.rax, 2 | flags::STATUS & !flags::CF);
    }
    check("syscall loads cs", end.cs, CODE64);
    check("syscall loads ss", end.ss, DATA);
    check("syscall leaves rsp", end.rsp, trap::snippet_stack());
    // There and back.
    cpu::wrmsr(msr::LSTAR, code!("mov rax, rcx", "sysretq"));
    let end = run(start);
    expect("sysret", &end, vector::END, 0);
    check("sysret restores the flags", end.rflags, 2 | flags::STATUS | flags::DF);
    check("sysret loads cs", end.cs, USER_CODE64);
    check("sysret loads ss", end.ss, USER_DATA);
    check("sysret returns behind the call", end.rip, user(syscall) + 4);
    let end = run(Frame {
        rcx: user(code!("int 0xff")),
        r11: flags::NT | flags::IOPL | flags::RF | flags::AC,
        ..Frame::kernel(code!("sysretq"))
    });
    check(
        "sysret loads the flags",
        end.rflags & !if cpu::under_tcg() { flags::RF } else { 0 },
        2 | flags::NT | flags::IOPL | flags::AC,
    );
    let end = run(Frame { rcx: 1 << 47, ..Frame::kernel(code!("sysretq")) });
    // Intel faults before the change of level, AMD and TCG after it.
    expect("sysret to a non-canonical address", &end, vector::GP, 0);
    expect(
        "syscall from kernel mode",
        &{
            cpu::wrmsr(msr::LSTAR, code!("int 0xff"));
            kernel(code!("syscall", "ud2"))
        },
        vector::END,
        0,
    );
    let wrmsr = code!("wrmsr", "int 0xff");
    let start = Frame { rcx: msr::LSTAR.into(), rdx: 0x8000, ..Frame::kernel(wrmsr) };
    expect_real("a non-canonical LSTAR is refused", || run(start), vector::GP, 0);
    // sysretl goes to compatibility mode.
    let target = code32!("mov eax, cs");
    let end =
        run(Frame { rcx: user(target) & 0xffff_ffff, r11: 2, ..Frame::kernel(code!(".byte 0x0f, 0x07")) });
    // Only the kernel may execute there.
    expect("sysret to compatibility mode", &end, vector::PF, 0x15);
    check("sysret to compatibility mode loads cs", end.cs, USER_CODE32);
    check("sysret to compatibility mode fetches from 32 bits", end.rip, user(target) & 0xffff_ffff);
}

fn swapgs() {
    cpu::wrmsr(msr::GS_BASE, 0x1111_1000);
    cpu::wrmsr(msr::KERNEL_GS_BASE, 0xffff_8000_0000_2000);
    let end = kernel(code64!("swapgs"));
    expect("swapgs", &end, vector::END, 0);
    check("swapgs loads gs", cpu::rdmsr(msr::GS_BASE), 0xffff_8000_0000_2000);
    check("swapgs saves gs", cpu::rdmsr(msr::KERNEL_GS_BASE), 0x1111_1000);
    cpu::wrmsr(msr::GS_BASE, frame(3));
    cpu::wrmsr(msr::FS_BASE, frame(4) - 0x10);
    poke(frame(3) + 8, 0x33);
    poke(frame(4), 0x44);
    let end = run(Frame {
        rdi: 8,
        ..Frame::kernel(code64!(
            "mov rax, gs:[rdi]",
            "mov rcx, fs:[0x10]",
            "lea rdx, gs:[rdi]",
            "mov qword ptr gs:[rdi + 8], 9",
            "addr32 mov rbx, fs:[edi + 8]"
        ))
    });
    check("gs base", end.rax, 0x33);
    check("fs base", end.rcx, 0x44);
    check("lea takes no segment base", end.rdx, 8);
    check("store through gs", peek(frame(3) + 16), 9);
    check("the base is added to a 32-bit address", end.rbx, 0x44);
    let end = kernel(code64!("mov eax, 0x10", "mov fs, eax", "mov gs, eax"));
    expect("loading fs and gs", &end, vector::END, 0);
    check("loading fs loads the base", cpu::rdmsr(msr::FS_BASE), 0);
    check("loading gs loads the base", cpu::rdmsr(msr::GS_BASE), 0);
    set_descriptor(SPARE, 0x12cf_9334_5678_ffff);
    kernel(code64!("mov eax, 0x48", "mov fs, eax"));
    check("loading fs from a descriptor with a base", cpu::rdmsr(msr::FS_BASE), 0x1234_5678);
    kernel(code64!(
        "mov eax, 0x48",
        "mov ds, eax",
        "mov es, eax",
        "mov eax, ds:[0x200000]",
        "mov eax, 0x10",
        "mov ds, eax",
        "mov es, eax"
    ));
    let end = run(Frame {
        rsi: frame(3) + 8,
        ..Frame::kernel(code64!(
            "mov eax, 0x48",
            "mov ds, eax",
            "mov rcx, [rsi]",
            "mov eax, 0x10",
            "mov ds, eax"
        ))
    });
    check("the base of ds is ignored in 64-bit mode", end.rcx, 0x33);
    kernel(code64!("xor eax, eax", "mov fs, eax", "mov gs, eax"));
    cpu::wrmsr(msr::FS_BASE, 0);
    cpu::wrmsr(msr::GS_BASE, 0);
}

fn double_faults() {
    // #GP while delivering #PF: the gate of #PF is missing.
    set_gate(vector::GP, Gate { low: 0, high: 0 });
    expect(
        "a fault at the gate of #GP",
        &run(Frame { rsi: 1 << 47, ..Frame::kernel(code!("mov rax, [rsi]")) }),
        vector::DF,
        0,
    );
    set_gate(vector::GP, default_gate(vector::GP));
    set_gate(vector::PF, Gate { low: default_gate(vector::PF).low & !(1 << 47), ..default_gate(vector::PF) });
    let end = kernel(code!("mov rax, [0x7000000000]", "int 0xff"));
    expect("a fault at the gate of #PF", &end, vector::DF, 0);
    set_gate(vector::PF, default_gate(vector::PF));
    // A benign exception before a contributory one is no double fault.
    set_gate(vector::UD, Gate { low: default_gate(vector::UD).low & !(1 << 47), ..default_gate(vector::UD) });
    let end = kernel(code!("ud2"));
    check("a fault at the gate of #UD is served by itself", end.vector, vector::NP);
    // The EXT bit says that the program did not ask for it.
    check("its error code names the gate", end.error & !1, at(vector::UD));
    set_gate(vector::UD, default_gate(vector::UD));
    // A page fault on the stack while delivering a page fault.
    let task = &mut trap::this_cpu().task;
    let ist = task.ist[3];
    task.ist[3] = TEST_BASE + 0x7fff_f000;
    set_gate(vector::PF, Gate::new(trap::stub(vector::PF), 4, 0));
    expect(
        "a page fault on the stack of #PF",
        &kernel(code!("mov rax, [0x7000000000]", "int 0xff")),
        vector::DF,
        0,
    );
    set_gate(vector::PF, default_gate(vector::PF));
    set_gate(vector::GP, Gate::new(trap::stub(vector::GP), 4, 0));
    expect(
        "a page fault on the stack of #GP",
        &run(Frame { rsi: 1 << 47, ..Frame::kernel(code!("mov rax, [rsi]")) }),
        vector::PF,
        2,
    );
    set_gate(vector::GP, default_gate(vector::GP));
    // User stack switch to a bad RSP0.
    let task = &mut trap::this_cpu().task;
    task.ist[3] = ist;
    let rsp0 = task.rsp[0];
    task.rsp[0] = 1 << 47;
    set_gate(0x53, Gate::new(trap::stub(0x53), 0, 3));
    let end = in_user(code!("int 0x53"));
    if !tcg_lacks("a non-canonical rsp0") {
        expect("a non-canonical rsp0", &end, vector::SS, 0);
    }
    trap::this_cpu().task.rsp[0] = rsp0;
    map(TEST_BASE + 0x1000, frame(6) | entry::P);
    trap::this_cpu().task.rsp[0] = TEST_BASE + 0x1100;
    let end = in_user(code!("int 0x53"));
    expect("a read-only kernel stack", &end, vector::PF, 3);
    check("the fault is in user mode's state", end.cs, USER_CODE64);
    check("and names the stack", end.cr2, TEST_BASE + 0x1100 - 8);
    trap::this_cpu().task.rsp[0] = rsp0;
    check("vector of the double fault came with its own stack", trap::count(vector::DF).into(), 3);
}

fn compatibility_mode() {
    let kernel32 = |code: u64| run(Frame { cs: selector::CODE32, rax: 0x11, ..Frame::kernel(code) });
    let end = kernel32(code32!("mov eax, 0x80000000", "inc ecx", "push eax", "pop edx", "mov ebx, esp"));
    expect("compatibility mode", &end, vector::END, 0);
    check("0x40 to 0x4f are inc and dec", end.rcx, 1);
    check("push is 32 bits", end.rdx, 0x8000_0000);
    check("esp", end.rbx, trap::snippet_stack());
    check("cs", end.cs, selector::CODE32);
    let end = kernel32(code32!(
        "mov al, 0x7f",
        "aam",
        "mov ecx, eax",
        "mov eax, 0x0105",
        "aad",
        "mov edx, eax",
        "mov al, 0x0a",
        "clc",
        "aaa",
        "mov ebx, eax"
    ));
    check("aam", end.rcx & 0xffff, 0x0c07);
    check("aad", end.rdx & 0xffff, 15);
    check("aaa", end.rbx & 0xffff, 0x0100);
    let end = kernel32(code32!(
        "mov al, 0x2f",
        "add al, 0x35",
        "daa",
        "mov ecx, eax",
        "mov al, 0x35",
        "sub al, 0x47",
        "das",
        "movzx edx, al"
    ));
    check("daa", end.rcx & 0xff, 0x6a);
    check("das", end.rdx, 0x88);
    let end = kernel32(code32!(
        "mov ebx, 0x12345678",
        "pushad",
        "xor ebx, ebx",
        "popad",
        "pushfd",
        "pop ecx",
        ".byte 0xd6"
    ));
    check("pushad and popad", end.rbx, 0x1234_5678);
    check("salc without carry", end.rax & 0xff, 0);
    let end = kernel32(code32!(
        "mov edi, 0x1000000",
        "mov dword ptr [edi], 3",
        "mov dword ptr [edi + 4], 9",
        "mov eax, 5",
        "bound eax, [edi]",
        "mov eax, 10",
        "lea ecx, [2f]",
        "2: bound eax, [edi]"
    ));
    expect("bound", &end, vector::BR, 0);
    check("bound is a fault", end.rip, end.rcx);
    let end = kernel32(code32!("mov al, 0x7f", "add al, 1", "into", "nop"));
    expect("into", &end, vector::OF, 0);
    let end = kernel32(code32!("call 2f", "2: pop eax", "lea ecx, [2b]", "sub eax, ecx"));
    check("call and pop", end.rax, 0);
    let end = run(Frame {
        cs: selector::CODE32,
        rdx: 0x1_0000_0003,
        ..Frame::kernel(code32!(
            "mov eax, edx",
            "lea ecx, [edx + 0x7fffffff]",
            "push es",
            "pop ds",
            "mov ebx, ds"
        ))
    });
    check("registers have 32 bits", end.rax, 3);
    check("segment push and pop", end.rbx, DATA);
    expect(
        "user compatibility mode",
        &run(Frame { rip: 0x1234, cs: USER_CODE32, ..Frame::user(0, 0x1000) }),
        vector::PF,
        0x15,
    );
    // 32-bit addresses wrap at 4 GiB, and segment bases count.
    set_descriptor(SPARE, trap::descriptor(DATA) | (frame(3) & 0xff_ffff) << 16 | (frame(3) >> 24) << 56);
    poke(frame(3) + 0x10, 0x5555);
    let end = kernel32(code32!(
        "mov eax, 0x48",
        "mov es, eax",
        "mov ecx, es:[0x10]",
        "mov ds, eax",
        "mov edx, [0x10]",
        "mov eax, 0x10",
        "mov ds, eax"
    ));
    check("segment base in compatibility mode", end.rcx, 0x5555);
    check("ds base in compatibility mode", end.rdx, 0x5555);
    set_descriptor(SPARE, trap::descriptor(DATA) & !(0xf << 48) & !(1 << 55) & !0xffff | 0xff);
    let limit = code32!("mov eax, 0x48", "mov es, eax", "mov ecx, es:[0xfc]", "mov ecx, es:[0xfd]");
    if !tcg_lacks("segment limit in compatibility mode") {
        expect("segment limit in compatibility mode", &kernel32(limit), vector::GP, 0);
    }
    // Far jump from compatibility mode to 64-bit mode and back.
    let end = kernel32(code32!(
        "push 8",
        "lea eax, [2f]",
        "push eax",
        "retf",
        ".code64",
        "2: mov rax, 0x123456789a",
        "push 0x30",
        "lea rcx, [rip + 3f]",
        "push rcx",
        "retfq",
        ".code32",
        "3: mov edx, cs"
    ));
    check("to 64-bit mode", end.rax, 0x12_3456_789a);
    check("and back", end.rdx, selector::CODE32);
    // syscall from compatibility mode goes to CSTAR where there is such a thing, sysenter to its own registers.
    cpu::wrmsr(msr::SYSENTER_CS, CODE64);
    cpu::wrmsr(msr::SYSENTER_ESP, trap::snippet_stack() - 0x100);
    cpu::wrmsr(msr::SYSENTER_EIP, code!("mov eax, cs", "mov ecx, ss", "int 0xff"));
    let vendor = cpu::cpuid(0, 0).ebx;
    if vendor == u32::from_le_bytes(*b"Genu") {
        let end = kernel(code!("sysenter"));
        expect("sysenter", &end, vector::END, 0);
        check("sysenter: cs and ss", end.rax << 16 | end.rcx, CODE64 << 16 | DATA);
        check("sysenter: rsp", end.rsp, trap::snippet_stack() - 0x100);
        cpu::wrmsr(msr::SYSENTER_CS, 0);
        expect("sysenter with a null selector", &kernel(code!("sysenter")), vector::GP, 0);
    } else {
        harrier_bare_metal::skip("sysenter in long mode", "only Intel's processors have it");
    }
}
