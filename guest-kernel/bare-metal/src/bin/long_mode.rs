//! Long mode: gates and stacks, user mode, system calls, segments, model-specific registers, debug traps, interrupt
//! shadows, double faults, compatibility mode.

#![no_std]
#![no_main]

use harrier_bare_metal::boot::selector::{self, CODE64, DATA, SPARE, USER_CODE32, USER_CODE64, USER_DATA};
use harrier_bare_metal::cpu::{self, flags, msr};
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke, user, user_stack};
use harrier_bare_metal::trap::{self, Gate, default_gate, set_descriptor, set_gate, vector};
use harrier_bare_metal::{Frame, check, check_true, code, code32, code64, guest_main, run, tcg_lacks};

guest_main!(main);

fn main() {
    exceptions();
    gates_and_stacks();
    user_mode();
    iret();
    system_calls();
    swapgs();
    segments();
    msrs();
    control_registers();
    debug_traps();
    double_faults();
    compatibility_mode();
    identification();
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
    expect_real("rdmsr of an unknown register", || kernel(code!("mov ecx, 0xdead0000", "rdmsr", "int 0xff")), vector::GP, 0);
}

fn gates_and_stacks() {
    // Without IST, from kernel mode: the stack in use, aligned down to 16 bytes.
    set_gate(0x50, Gate::new(trap::stub(0x50), 0, 0));
    let top = trap::snippet_stack();
    for offset in [0, 8, 3] {
        let end = run(Frame { rsp: top - 256 - offset, ..Frame::kernel(code!("int 0x50")) });
        check("without ist the frame is on the stack in use", end.pushed_at, (top - 256 - offset & !15) - 48);
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
    set_gate(0x52, Gate { low: default_gate(0x52).low & !(0xffff << 16) | selector::CODE32 << 16, ..default_gate(0x52) });
    expect("a gate to 32-bit code", &kernel(code!("int 0x52")), vector::GP, selector::CODE32);
    set_gate(0x52, Gate { low: default_gate(0x52).low & !(0xffff << 16) | 0x7f8 << 16, ..default_gate(0x52) });
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
    let end = in_user(code64!("sidt [rsp - 16]", "sgdt [rsp - 32]", "str eax", "sldt ecx", "smsw edx", "mov rbx, [rsp - 14]"));
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
    let end = run(Frame { rflags: 2 | flags::IOPL, ..Frame::user(user(code64!("sti", "pushfq", "pop rax", "cli", "pushfq", "pop rcx")), user_stack()) });
    check("sti with IOPL 3", end.rax & flags::IF, flags::IF);
    check("cli with IOPL 3", end.rcx & flags::IF, 0);
    let map = &mut trap::this_cpu().task.io_map;
    map[0x3ff / 8] &= !(1 << 7);
    expect("a port that the map permits", &run(start), vector::END, 0);
    expect("a word port of which the map permits half", &run(Frame::user(user(code!("mov edx, 0x3fe", "in ax, dx", "int 0xff")), user_stack())), vector::GP, 0);
    expect("a port beyond the map", &run(Frame::user(user(code!("mov edx, 0xffff", "in al, dx", "int 0xff")), user_stack())), vector::GP, 0);
    trap::this_cpu().task.io_map[0x3ff / 8] = 0xff;
    let popf = code64!("pushfq", "or dword ptr [rsp], 0x3200", "popfq", "pushfq", "pop rax");
    let end = in_user(popf);
    check("popf in user mode changes neither IOPL nor the interrupt flag", end.rax & (flags::IF | flags::IOPL), 0);
    let end = kernel(code64!("pushfq", "or dword ptr [rsp], 0x3000", "popfq", "pushfq", "pop rax", "push 2", "popfq"));
    check("popf in kernel mode changes IOPL", end.rax & flags::IOPL, flags::IOPL);
    cpu::set_cr4(cpu::cr4() | cpu::cr4::TSD);
    expect("rdtsc in user mode with CR4.TSD", &in_user(code!("rdtsc", "int 0xff")), vector::GP, 0);
    expect("rdtsc in kernel mode with CR4.TSD", &kernel(code64!("rdtsc")), vector::END, 0);
    cpu::set_cr4(cpu::cr4() & !cpu::cr4::TSD);
    expect("rdtsc in user mode", &in_user(code64!("rdtsc")), vector::END, 0);
    expect("rdpmc in user mode without CR4.PCE", &in_user(code!("xor ecx, ecx", "rdpmc", "int 0xff")), vector::GP, 0);
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
    expect("iretq to user mode with a kernel ss", &iretq(user(end_here), USER_CODE64, 2, 0, DATA), vector::GP, DATA);
    expect("iretq to user mode with a null ss", &iretq(user(end_here), USER_CODE64, 2, 0, 3), vector::GP, 0);
    expect("iretq to user mode with a null ss of the wrong level", &iretq(user(end_here), USER_CODE64, 2, 0, 0), vector::GP, 0);
    expect("iretq to a null cs", &iretq(end_here, 0, 2, top, DATA), vector::GP, 0);
    expect("iretq to a data segment", &iretq(end_here, DATA, 2, top, DATA), vector::GP, DATA);
    expect("iretq with a level that is not the segment's", &iretq(end_here, CODE64 | 3, 2, top, USER_DATA), vector::GP, CODE64);
    expect("iretq beyond the descriptor table", &iretq(end_here, 0x7f8, 2, top, DATA), vector::GP, 0x7f8);
    set_descriptor(SPARE, trap::descriptor(CODE64) & !(1 << 47));
    expect("iretq to a segment that is not present", &iretq(end_here, SPARE, 2, top, DATA), vector::NP, SPARE);
    set_descriptor(SPARE, trap::descriptor(DATA) & !(1 << 47));
    expect_real("iretq with a stack that is not present", || iretq(end_here, CODE64, 2, top, SPARE), vector::SS, SPARE);
    expect_real("iretq to a non-canonical address", || iretq(1 << 47, CODE64, 2, top, DATA), vector::GP, 0);
    let end = run(Frame { rflags: 2 | flags::NT, ..Frame::kernel(code!("push 2", "push 8", "iretq")) });
    expect("iretq with the nested-task flag", &end, vector::GP, 0);
    // iretd pops 32-bit values and goes to 64-bit code all the same.
    let end = kernel(code!("lea rax, [rip + 2f]", "lea rsp, [rsp - 20]", "mov [rsp], eax", "mov dword ptr [rsp + 4], 8", "mov dword ptr [rsp + 8], 2",
        "mov dword ptr [rsp + 12], 0x8000", "mov dword ptr [rsp + 16], 0x10", "iretd", "2: int 0xff"));
    expect("iretd", &end, vector::END, 0);
    check("iretd loads 32 bits of rsp", end.rsp, 0x8000);
}

fn system_calls() {
    let efer = cpu::rdmsr(msr::EFER);
    expect("syscall without EFER.SCE", &{
        cpu::wrmsr(msr::EFER, efer & !1);
        in_user(code!("syscall", "int 0xff"))
    }, vector::UD, 0);
    cpu::wrmsr(msr::EFER, efer | 1);
    cpu::wrmsr(msr::STAR, (USER_CODE32) << 48 | CODE64 << 32);
    cpu::wrmsr(msr::SFMASK, flags::IF | flags::DF | flags::CF);
    let syscall = code!("syscall", "int 0xff");
    // The entry ends the run at once, with kernel selectors.
    cpu::wrmsr(msr::LSTAR, code!("pushfq", "pop rax", "int 0xff"));
    let start = Frame { rflags: 2 | flags::STATUS | flags::DF, rsp: trap::snippet_stack(), ..Frame::user(user(syscall), 0) };
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
    let end = run(Frame { rcx: user(code!("int 0xff")), r11: flags::NT | flags::IOPL | flags::RF | flags::AC, ..Frame::kernel(code!("sysretq")) });
    check("sysret loads the flags", end.rflags & !if cpu::under_tcg() { flags::RF } else { 0 }, 2 | flags::NT | flags::IOPL | flags::AC);
    let end = run(Frame { rcx: 1 << 47, ..Frame::kernel(code!("sysretq")) });
    // Intel faults before the change of level, AMD and TCG after it.
    expect("sysret to a non-canonical address", &end, vector::GP, 0);
    expect("syscall from kernel mode", &{
        cpu::wrmsr(msr::LSTAR, code!("int 0xff"));
        kernel(code!("syscall", "ud2"))
    }, vector::END, 0);
    let wrmsr = code!("wrmsr", "int 0xff");
    let start = Frame { rcx: msr::LSTAR.into(), rdx: 0x8000, ..Frame::kernel(wrmsr) };
    expect_real("a non-canonical LSTAR is refused", || run(start), vector::GP, 0);
    // sysretl goes to compatibility mode.
    let target = code32!("mov eax, cs");
    let end = run(Frame { rcx: user(target) & 0xffff_ffff, r11: 2, ..Frame::kernel(code!(".byte 0x0f, 0x07")) });
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
    let end = run(Frame { rdi: 8, ..Frame::kernel(code64!("mov rax, gs:[rdi]", "mov rcx, fs:[0x10]", "lea rdx, gs:[rdi]", "mov qword ptr gs:[rdi + 8], 9",
        "addr32 mov rbx, fs:[edi + 8]")) });
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
    kernel(code64!("mov eax, 0x48", "mov ds, eax", "mov es, eax", "mov eax, ds:[0x200000]", "mov eax, 0x10", "mov ds, eax", "mov es, eax"));
    let end = run(Frame { rsi: frame(3) + 8, ..Frame::kernel(code64!("mov eax, 0x48", "mov ds, eax", "mov rcx, [rsi]", "mov eax, 0x10", "mov ds, eax")) });
    check("the base of ds is ignored in 64-bit mode", end.rcx, 0x33);
    kernel(code64!("xor eax, eax", "mov fs, eax", "mov gs, eax"));
    cpu::wrmsr(msr::FS_BASE, 0);
    cpu::wrmsr(msr::GS_BASE, 0);
}

fn segments() {
    let load_ds = code!("mov ds, eax", "mov eax, 0x10", "mov ds, eax", "int 0xff");
    let load_ss = code!("mov ss, eax", "int 0xff");
    let load = |code: u64, selector: u64| run(Frame { rax: selector, ..Frame::kernel(code) });
    expect("null in ds", &load(load_ds, 0), vector::END, 0);
    expect("null in ss at level 0", &load(load_ss, 0), vector::END, 0);
    expect("data beyond the table", &load(load_ds, 0x7f8), vector::GP, 0x7f8);
    expect("local selector without a local table", &load(load_ds, 0xc), vector::GP, 0xc);
    expect("readable code in ds", &load(load_ds, CODE64), vector::END, 0);
    set_descriptor(SPARE, trap::descriptor(CODE64) & !(1 << 41));
    expect("unreadable code in ds", &load(load_ds, SPARE), vector::GP, SPARE);
    expect("system segment in ds", &load(load_ds, selector::TASK), vector::GP, selector::TASK);
    set_descriptor(SPARE, trap::descriptor(DATA) & !(1 << 47));
    expect("data that is not present", &load(load_ds, SPARE), vector::NP, SPARE);
    expect("stack that is not present", &load(load_ss, SPARE), vector::SS, SPARE);
    expect("stack of another level", &load(load_ss, USER_DATA), vector::GP, USER_DATA & !3);
    expect("code in ss", &load(load_ss, CODE64), vector::GP, CODE64);
    set_descriptor(SPARE, trap::descriptor(DATA) & !(1 << 41));
    expect("read-only data in ss", &load(load_ss, SPARE), vector::GP, SPARE);
    expect("requested level too low", &load(load_ds, DATA | 3), vector::GP, DATA);
    expect("user data from kernel mode", &load(load_ds, USER_DATA), vector::END, 0);
    let end = run(Frame { rax: DATA, ..Frame::user(user(load_ds), user_stack()) });
    expect("kernel data from user mode", &end, vector::GP, DATA);
    set_descriptor(SPARE, 0x00cf_9200_0000_ffff);
    expect("loading a segment", &load(load_ds, SPARE), vector::END, 0);
    check("sets the accessed bit", trap::descriptor(SPARE), 0x00cf_9300_0000_ffff);
    // The local table.
    set_descriptor(SPARE, 0x17 | (frame(7) & 0xff_ffff) << 16 | 0x82 << 40 | (frame(7) >> 24) << 56);
    set_descriptor(SPARE + 8, 0);
    poke(frame(7) + 8, 0x00cf_9300_0000_ffff);
    let end = kernel(code64!("mov eax, 0x48", "lldt ax", "mov ecx, 0xc", "mov ds, ecx", "mov edx, ds", "mov ecx, 0x10", "mov ds, ecx", "sldt ebx", "lsl ecx, eax", "setz sil"));
    expect("local descriptor table", &end, vector::END, 0);
    check("a selector of the local table", end.rdx, 0xc);
    check("sldt", end.rbx, SPARE);
    check("lsl of the local table", end.rsi << 32 | end.rcx, 1 << 32 | 0x17);
    expect("a local selector beyond the table", &load(load_ds, 0x1c), vector::GP, 0x1c);
    kernel(code64!("xor eax, eax", "lldt ax"));
    expect("lldt of a data segment", &run(Frame { rax: DATA, ..Frame::kernel(code!("lldt ax", "int 0xff")) }), vector::GP, DATA);
    expect("ltr of a busy task", &run(Frame { rax: selector::TASK, ..Frame::kernel(code!("ltr ax", "int 0xff")) }), vector::GP, selector::TASK);
    expect_real("ltr of null", || kernel(code!("ltr ax", "int 0xff")), vector::GP, 0);
    check("ltr marked the task busy", trap::descriptor(selector::TASK) >> 40 & 0xff, 0x8b);
    let end = kernel(code64!("mov eax, 8", "lar ecx, eax", "setz bl", "verw ax", "setz bh", "mov eax, 0x7f8", "lar edx, eax", "setz al"));
    check("lar of code", end.rcx & 0x00f0_ff00, 0x00a0_9b00);
    check("lar succeeds, verw of code does not", end.rbx, 1);
    check("lar beyond the table", end.rax & 0xff, 0);
    // Far transfers between 64-bit segments.
    let far = code!("push rcx", "push rax", "retfq");
    let end_here = code!("int 0xff");
    let go = |rip: u64, cs: u64| run(Frame { rax: rip, rcx: cs, ..Frame::kernel(far) });
    expect("far return", &go(end_here, CODE64), vector::END, 0);
    expect("far return to data", &go(end_here, DATA), vector::GP, DATA);
    expect("far return to null", &go(end_here, 0), vector::GP, 0);
    set_descriptor(SPARE, trap::descriptor(CODE64) | 1 << 54);
    expect_real("far return to a segment that is both long and default", || go(end_here, SPARE), vector::GP, SPARE);
    let end = run(Frame { rax: user(end_here), rcx: USER_CODE64, rdx: 0x5000, rbx: USER_DATA, ..Frame::kernel(code!("push rbx", "push rdx", "push rcx", "push rax", "retfq")) });
    expect("far return to user mode", &end, vector::END, 0);
    check("far return to user mode: cs", end.cs, USER_CODE64);
    check("far return to user mode: rsp", end.rsp, 0x5000);
    // A call gate to 64-bit code.
    let target = code!("mov rbx, [rsp]", "mov rcx, [rsp + 8]", "mov rdx, [rsp + 16]", "mov rsi, [rsp + 24]", "int 0xff");
    set_descriptor(SPARE, target & 0xffff | CODE64 << 16 | 0xec << 40 | (target >> 16 & 0xffff) << 48);
    set_descriptor(SPARE + 8, target >> 32);
    let call = code!("sub rsp, 16", "mov dword ptr [rsp + 4], 0x4b", "call fword ptr [rsp]", "int 0xfe");
    let start = Frame::user(user(call), user_stack());
    let end = run(start);
    expect("call gate from user mode", &end, vector::END, 0);
    check("call gate: return address", end.rbx, user(call) + 15);
    check("call gate: cs", end.rcx, USER_CODE64);
    check("call gate: rsp", end.rdx, user_stack() - 16);
    check("call gate: ss", end.rsi, USER_DATA);
    check("call gate: level", end.cs, CODE64);
    check("call gate: stack", end.rsp, trap::rsp0() - 32);
}

fn msrs() {
    let read = code!("rdmsr", "int 0xff");
    let write = code!("wrmsr", "int 0xff");
    let get = |index: u32| run(Frame { rcx: index.into(), rax: u64::MAX, rdx: u64::MAX, ..Frame::kernel(read) });
    let set = |index: u32, value: u64| run(Frame { rcx: index.into(), rax: value & 0xffff_ffff, rdx: value >> 32, ..Frame::kernel(write) });
    for (name, index) in [("EFER", msr::EFER), ("STAR", msr::STAR), ("LSTAR", msr::LSTAR), ("CSTAR", msr::CSTAR), ("SFMASK", msr::SFMASK),
        ("FS base", msr::FS_BASE), ("GS base", msr::GS_BASE), ("APIC base", msr::APIC_BASE), ("TSC", msr::TSC), ("PAT", msr::PAT),
        ("SYSENTER CS", msr::SYSENTER_CS), ("SYSENTER ESP", msr::SYSENTER_ESP), ("SYSENTER EIP", msr::SYSENTER_EIP)] {
        let end = get(index);
        check(name, end.vector, vector::END);
        check_true("rdmsr clears the upper halves", end.rax >> 32 == 0 && end.rdx >> 32 == 0);
    }
    for (name, index, value) in [("STAR keeps", msr::STAR, 0x1234_5678_9abc_def0), ("LSTAR keeps", msr::LSTAR, 0xffff_8000_1234_5678),
        ("KERNEL_GS_BASE keeps", msr::KERNEL_GS_BASE, 0x7fff_ffff_ffff), ("SYSENTER EIP keeps", msr::SYSENTER_EIP, 0xffff_ffff_8123_4567),
        ("SFMASK keeps", msr::SFMASK, 0x4_7700), ("PAT keeps", msr::PAT, 0x0007_0406_0007_0406), ("TSC_AUX keeps", msr::TSC_AUX, 0x1234)] {
        let old = get(index);
        if old.vector != vector::END {
            harrier_bare_metal::skip(name, "the register is not there");
            continue;
        }
        set(index, value);
        let end = get(index);
        check(name, end.rdx << 32 | end.rax, value);
        set(index, old.rdx << 32 | old.rax);
    }
    expect_real("wrmsr of an unknown register", || set(0x1234_5678, 0), vector::GP, 0);
    for (name, index, value) in [("KERNEL_GS_BASE", msr::KERNEL_GS_BASE, 1 << 47), ("FS base", msr::FS_BASE, 1 << 63), ("GS base", msr::GS_BASE, 0xfffe_0000_0000_0000),
        ("EFER with reserved bits", msr::EFER, 0xffff_ffff), ("PAT with a reserved type", msr::PAT, 2)] {
        if cpu::under_tcg() {
            tcg_lacks(name);
            continue;
        }
        expect(name, &set(index, value), vector::GP, 0);
    }
    let efer = cpu::rdmsr(msr::EFER);
    if !tcg_lacks("EFER.LME cannot change while paging") {
        expect("EFER.LME cannot change while paging", &set(msr::EFER, efer & !0x100), vector::GP, 0);
    }
    check("EFER says that long mode is active", efer & 0x500, 0x500);
    check("RFLAGS.ID can change", kernel(code64!("pushfq", "xor dword ptr [rsp], 0x200000", "mov eax, [rsp]", "popfq", "pushfq", "pop rcx", "xor eax, ecx")).rax & flags::ID, 0);
    let tsc = cpu::rdtsc();
    let later = cpu::rdtsc();
    check_true("the time-stamp counter counts", later > tsc);
    if cpu::cpuid(0x8000_0001, 0).edx & 1 << 27 != 0 {
        cpu::wrmsr(msr::TSC_AUX, 0x77);
        check("rdtscp reads TSC_AUX", kernel(code64!("mov rcx, -1", "rdtscp")).rcx, 0x77);
    } else {
        expect("rdtscp without the feature", &kernel(code!("rdtscp", "int 0xff")), vector::UD, 0);
    }
}

fn control_registers() {
    let cr0 = cpu::cr0();
    let set0 = |value: u64| run(Frame { rax: value, ..Frame::kernel(code!("mov cr0, rax", "int 0xff")) });
    let set4 = |value: u64| run(Frame { rax: value, ..Frame::kernel(code!("mov cr4, rax", "int 0xff")) });
    if !tcg_lacks("control register faults") {
        expect("paging without protection", &set0(cr0 & !1), vector::GP, 0);
        expect("CR0 with high bits", &set0(cr0 | 1 << 32), vector::GP, 0);
        expect("not write-through without cache disable", &set0(cr0 | 1 << 29), vector::GP, 0);
        expect("CR4 without PAE in long mode", &set4(cpu::cr4() & !cpu::cr4::PAE), vector::GP, 0);
        expect("CR4 with reserved bits", &set4(cpu::cr4() | 1 << 63), vector::GP, 0);
        expect("CR3 with reserved bits", &run(Frame { rax: cpu::cr3() | 1 << 60, ..Frame::kernel(code!("mov cr3, rax", "int 0xff")) }), vector::GP, 0);
        expect("CR8 with reserved bits", &run(Frame { rax: 16, ..Frame::kernel(code!("mov cr8, rax", "int 0xff")) }), vector::GP, 0);
    }
    expect("CR1 does not exist", &kernel(code!(".byte 0x0f, 0x20, 0xc8", "int 0xff")), vector::UD, 0);
    expect("CR5 does not exist", &kernel(code!(".byte 0x0f, 0x22, 0xe8", "int 0xff")), vector::UD, 0);
    cpu::set_cr8(5);
    check("CR8 keeps", cpu::cr8(), 5);
    check("CR8 is the APIC's task priority", cpu::peek_lapic_tpr(), 0x50);
    cpu::set_cr8(0);
    cpu::set_cr2(0x1234_5678_9abc_def0);
    check("CR2 keeps", cpu::cr2(), 0x1234_5678_9abc_def0);
    let end = kernel(code64!("smsw ax", "mov rcx, cr0", "or al, 8", "lmsw ax", "mov rdx, cr0", "clts", "mov rbx, cr0", "xor eax, eax", "lmsw ax", "mov rsi, cr0"));
    check("lmsw sets task switched", end.rdx, cr0 | cpu::cr0::TS);
    check("clts clears it", end.rbx, cr0);
    check("lmsw cannot clear protection", end.rsi & 1, 1);
    cpu::set_cr0(cr0);
    check("CR0 reads extension type as one", cpu::cr0() & 0x10, 0x10);
    let end = kernel(code!(".byte 0x0f, 0x20, 0x00", "int 0xff"));
    check("mov from cr0 with a memory form reads a register", end.vector << 32 | end.rax, vector::END << 32 | cr0);
}

fn debug_traps() {
    cpu::set_dr6(0);
    let step = code!("2: nop", "nop", "int 0xff");
    let end = run(Frame { rflags: 2 | flags::TF, ..Frame::kernel(step) });
    expect("single step", &end, vector::DB, 0);
    check("single step: after one instruction", end.rip, step + 1);
    check("single step: DR6", cpu::dr6() & 0xe00f, 0x4000);
    check("single step: flags", end.rflags & flags::TF, flags::TF);
    cpu::set_dr6(0);
    let popf = code!("pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "nop", "int 0xff");
    let end = kernel(popf);
    expect("popf that sets the trap flag", &end, vector::DB, 0);
    check("traps after the next instruction", end.rip, popf + 10);
    // Reading the flags does not trap early, a branch traps at its target.
    let jump = code!("jmp 2f", "ud2", "2: nop", "int 0xff");
    let end = run(Frame { rflags: 2 | flags::TF, ..Frame::kernel(jump) });
    check("single step of a branch", end.rip, jump + 4);
    let syscall = run(Frame { rflags: 2 | flags::TF, ..Frame::kernel(code!("int 0x41")) });
    expect("int n with the trap flag traps in no other way", &syscall, 0x41, 0);
    // mov ss: the trap is held back by one instruction.
    let mov_ss = code!("mov ss, eax", "nop", "nop", "int 0xff");
    let end = run(Frame { rflags: 2 | flags::TF, rax: DATA, ..Frame::kernel(mov_ss) });
    expect("single step of mov ss", &end, vector::DB, 0);
    check("comes one instruction later", end.rip, mov_ss + 3);
    let fault = code!("div ecx");
    let end = run(Frame { rflags: 2 | flags::TF, ..Frame::kernel(fault) });
    expect("a faulting instruction does not trap", &end, vector::DE, 0);
    // Breakpoints.
    let target = code!("nop", "nop", "nop", "int 0xff");
    cpu::set_dr6(0);
    cpu::set_dr0(target + 1);
    cpu::set_dr7(0x402);
    let end = kernel(target);
    expect("instruction breakpoint", &end, vector::DB, 0);
    check("instruction breakpoint is a fault", end.rip, target + 1);
    check("instruction breakpoint: DR6", cpu::dr6() & 0xe00f, 1);
    // Other faults set it (Intel SDM volume 3, 18.3.1.1).
    check("instruction breakpoint leaves rf clear in the saved flags", end.rflags & flags::RF, 0);
    let end = run(Frame { rflags: 2 | flags::RF, ..Frame::kernel(target + 1) });
    expect("the resume flag suppresses it", &end, vector::END, 0);
    if !tcg_lacks("and is cleared") {
        check("and is cleared", end.rflags & flags::RF, 0);
    }
    cpu::set_dr6(0);
    cpu::set_dr0(frame(0) + 4);
    cpu::set_dr7(0x402 | 0xd << 16);
    let store = code!("mov dword ptr [rdi], 1", "nop", "int 0xff");
    let end = run(Frame { rdi: frame(0) + 4, ..Frame::kernel(store) });
    expect("data breakpoint", &end, vector::DB, 0);
    check("data breakpoint is a trap", end.rip, store + 6);
    check("data breakpoint: DR6", cpu::dr6() & 0xe00f, 1);
    check("and the store happened", peek(frame(0)) >> 32, 1);
    let end = run(Frame { rdi: frame(0) + 8, ..Frame::kernel(store) });
    expect("a store beside it", &end, vector::END, 0);
    let end = run(Frame { rdi: frame(0) + 1, ..Frame::kernel(store) });
    expect("a store that overlaps it", &end, vector::DB, 0);
    let end = run(Frame { rdi: frame(0) + 4, ..Frame::kernel(code64!("mov eax, [rdi]")) });
    expect("a load does not hit a write breakpoint", &end, vector::END, 0);
    cpu::set_dr7(0x402 | 0xf << 16);
    let end = run(Frame { rdi: frame(0) + 4, ..Frame::kernel(code!("mov eax, [rdi]", "int 0xff")) });
    expect("a load hits an access breakpoint", &end, vector::DB, 0);
    cpu::set_dr7(0x400);
    cpu::set_dr6(0);
    let dr6 = cpu::dr6();
    check("DR6 reads its fixed bits", dr6, 0xffff_0ff0);
    check("DR7 reads its fixed bit", cpu::dr7(), 0x400);
    if !tcg_lacks("general detect") {
        cpu::set_dr7(0x2400);
        let end = kernel(code!("mov rax, dr0", "int 0xff"));
        expect("general detect", &end, vector::DB, 0);
        check("general detect: DR6", cpu::dr6() & 0xe00f, 0x2000);
        check("general detect: DR7 is cleared", cpu::dr7() & 0x2000, 0);
        cpu::set_dr6(0);
    }
    check("dr4 is dr6 without CR4.DE", kernel(code64!(".byte 0x0f, 0x21, 0xe0")).rax, 0xffff_0ff0);
    cpu::set_cr4(cpu::cr4() | cpu::cr4::DE);
    expect("dr4 is undefined with CR4.DE", &kernel(code!(".byte 0x0f, 0x21, 0xe0", "int 0xff")), vector::UD, 0);
    cpu::set_cr4(cpu::cr4() & !cpu::cr4::DE);
}

fn double_faults() {
    // #GP while delivering #PF: the gate of #PF is missing.
    set_gate(vector::GP, Gate { low: 0, high: 0 });
    expect("a fault at the gate of #GP", &run(Frame { rsi: 1 << 47, ..Frame::kernel(code!("mov rax, [rsi]")) }), vector::DF, 0);
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
    expect("a page fault on the stack of #PF", &kernel(code!("mov rax, [0x7000000000]", "int 0xff")), vector::DF, 0);
    set_gate(vector::PF, default_gate(vector::PF));
    set_gate(vector::GP, Gate::new(trap::stub(vector::GP), 4, 0));
    expect("a page fault on the stack of #GP", &run(Frame { rsi: 1 << 47, ..Frame::kernel(code!("mov rax, [rsi]")) }), vector::PF, 2);
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
    let end = kernel32(code32!("mov al, 0x7f", "aam", "mov ecx, eax", "mov eax, 0x0105", "aad", "mov edx, eax", "mov al, 0x0a", "clc", "aaa", "mov ebx, eax"));
    check("aam", end.rcx & 0xffff, 0x0c07);
    check("aad", end.rdx & 0xffff, 15);
    check("aaa", end.rbx & 0xffff, 0x0100);
    let end = kernel32(code32!("mov al, 0x2f", "add al, 0x35", "daa", "mov ecx, eax", "mov al, 0x35", "sub al, 0x47", "das", "movzx edx, al"));
    check("daa", end.rcx & 0xff, 0x6a);
    check("das", end.rdx, 0x88);
    let end = kernel32(code32!("mov ebx, 0x12345678", "pushad", "xor ebx, ebx", "popad", "pushfd", "pop ecx", ".byte 0xd6"));
    check("pushad and popad", end.rbx, 0x1234_5678);
    check("salc without carry", end.rax & 0xff, 0);
    let end = kernel32(code32!("mov edi, 0x1000000", "mov dword ptr [edi], 3", "mov dword ptr [edi + 4], 9", "mov eax, 5", "bound eax, [edi]", "mov eax, 10", "lea ecx, [2f]", "2: bound eax, [edi]"));
    expect("bound", &end, vector::BR, 0);
    check("bound is a fault", end.rip, end.rcx);
    let end = kernel32(code32!("mov al, 0x7f", "add al, 1", "into", "nop"));
    expect("into", &end, vector::OF, 0);
    let end = kernel32(code32!("call 2f", "2: pop eax", "lea ecx, [2b]", "sub eax, ecx"));
    check("call and pop", end.rax, 0);
    let end = run(Frame { cs: selector::CODE32, rdx: 0x1_0000_0003, ..Frame::kernel(code32!("mov eax, edx", "lea ecx, [edx + 0x7fffffff]", "push es", "pop ds", "mov ebx, ds")) });
    check("registers have 32 bits", end.rax, 3);
    check("segment push and pop", end.rbx, DATA);
    expect("user compatibility mode", &run(Frame { rip: 0x1234, cs: USER_CODE32, ..Frame::user(0, 0x1000) }), vector::PF, 0x15);
    // 32-bit addresses wrap at 4 GiB, and segment bases count.
    set_descriptor(SPARE, trap::descriptor(DATA) | (frame(3) & 0xff_ffff) << 16 | (frame(3) >> 24) << 56);
    poke(frame(3) + 0x10, 0x5555);
    let end = kernel32(code32!("mov eax, 0x48", "mov es, eax", "mov ecx, es:[0x10]", "mov ds, eax", "mov edx, [0x10]", "mov eax, 0x10", "mov ds, eax"));
    check("segment base in compatibility mode", end.rcx, 0x5555);
    check("ds base in compatibility mode", end.rdx, 0x5555);
    set_descriptor(SPARE, trap::descriptor(DATA) & !(0xf << 48) & !(1 << 55) & !0xffff | 0xff);
    let limit = code32!("mov eax, 0x48", "mov es, eax", "mov ecx, es:[0xfc]", "mov ecx, es:[0xfd]");
    if !tcg_lacks("segment limit in compatibility mode") {
        expect("segment limit in compatibility mode", &kernel32(limit), vector::GP, 0);
    }
    // Far jump from compatibility mode to 64-bit mode and back.
    let end = kernel32(code32!("push 8", "lea eax, [2f]", "push eax", "retf", ".code64", "2: mov rax, 0x123456789a", "push 0x30", "lea rcx, [rip + 3f]", "push rcx",
        "retfq", ".code32", "3: mov edx, cs"));
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

fn identification() {
    let basic = cpu::cpuid(0, 0);
    check_true("basic leaves", basic.eax >= 1);
    let features = cpu::cpuid(1, 0);
    let needed = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26;
    check("FPU PSE TSC MSR PAE CX8 APIC PGE CMOV MMX FXSR SSE SSE2", (features.edx & needed).into(), needed.into());
    let v2 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;
    check("SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT", (features.ecx & v2).into(), v2.into());
    check("the initial APIC id is 0", (features.ebx >> 24).into(), 0);
    let extended = cpu::cpuid(0x8000_0000, 0);
    check_true("extended leaves", extended.eax >= 0x8000_0008);
    let features = cpu::cpuid(0x8000_0001, 0);
    let needed = 1 << 11 | 1 << 20 | 1 << 29;
    check("SYSCALL NX LM", (features.edx & needed).into(), needed.into());
    check("LAHF", (features.ecx & 1).into(), 1);
    let sizes = cpu::cpuid(0x8000_0008, 0).eax;
    check_true("address sizes", (36..=52).contains(&(sizes & 0xff)) && sizes >> 8 & 0xff == 48);
    let end = run(Frame { rax: u64::MAX, rbx: u64::MAX, rcx: u64::MAX, rdx: u64::MAX, ..Frame::kernel(code64!("mov eax, 1", "xor ecx, ecx", "cpuid")) });
    check_true("cpuid clears the upper halves", (end.rax | end.rbx | end.rcx | end.rdx) >> 32 == 0);
    check("cpuid works in user mode", in_user(code64!("xor eax, eax", "cpuid")).rbx, cpu::cpuid(0, 0).ebx.into());
}
