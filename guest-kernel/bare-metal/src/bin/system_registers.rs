//! Long mode: segment registers, model-specific registers, control and debug registers with their traps, and what
//! the processor says of itself.

#![no_std]
#![no_main]

use harrier_bare_metal::boot::selector::{self, CODE64, DATA, SPARE, USER_CODE64, USER_DATA};
use harrier_bare_metal::cpu::{self, flags, msr};
use harrier_bare_metal::paging::{frame, peek, poke, user, user_stack};
use harrier_bare_metal::trap::{self, set_descriptor, vector};
use harrier_bare_metal::{Frame, check, check_true, code, code64, guest_main, run, tcg_lacks};

guest_main!(main);

fn main() {
    segments();
    msrs();
    control_registers();
    debug_traps();
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

fn in_user(code: u64) -> Frame {
    run(Frame::user(user(code), user_stack()))
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
    let end = kernel(code64!(
        "mov eax, 0x48",
        "lldt ax",
        "mov ecx, 0xc",
        "mov ds, ecx",
        "mov edx, ds",
        "mov ecx, 0x10",
        "mov ds, ecx",
        "sldt ebx",
        "lsl ecx, eax",
        "setz sil"
    ));
    expect("local descriptor table", &end, vector::END, 0);
    check("a selector of the local table", end.rdx, 0xc);
    check("sldt", end.rbx, SPARE);
    check("lsl of the local table", end.rsi << 32 | end.rcx, 1 << 32 | 0x17);
    expect("a local selector beyond the table", &load(load_ds, 0x1c), vector::GP, 0x1c);
    kernel(code64!("xor eax, eax", "lldt ax"));
    expect(
        "lldt of a data segment",
        &run(Frame { rax: DATA, ..Frame::kernel(code!("lldt ax", "int 0xff")) }),
        vector::GP,
        DATA,
    );
    expect(
        "ltr of a busy task",
        &run(Frame { rax: selector::TASK, ..Frame::kernel(code!("ltr ax", "int 0xff")) }),
        vector::GP,
        selector::TASK,
    );
    expect_real("ltr of null", || kernel(code!("ltr ax", "int 0xff")), vector::GP, 0);
    check("ltr marked the task busy", trap::descriptor(selector::TASK) >> 40 & 0xff, 0x8b);
    let end = kernel(code64!(
        "mov eax, 8",
        "lar ecx, eax",
        "setz bl",
        "verw ax",
        "setz bh",
        "mov eax, 0x7f8",
        "lar edx, eax",
        "setz al"
    ));
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
    expect_real(
        "far return to a segment that is both long and default",
        || go(end_here, SPARE),
        vector::GP,
        SPARE,
    );
    let end = run(Frame {
        rax: user(end_here),
        rcx: USER_CODE64,
        rdx: 0x5000,
        rbx: USER_DATA,
        ..Frame::kernel(code!("push rbx", "push rdx", "push rcx", "push rax", "retfq"))
    });
    expect("far return to user mode", &end, vector::END, 0);
    check("far return to user mode: cs", end.cs, USER_CODE64);
    check("far return to user mode: rsp", end.rsp, 0x5000);
    // A call gate to 64-bit code.
    let target = code!(
        "mov rbx, [rsp]",
        "mov rcx, [rsp + 8]",
        "mov rdx, [rsp + 16]",
        "mov rsi, [rsp + 24]",
        "int 0xff"
    );
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
    let get =
        |index: u32| run(Frame { rcx: index.into(), rax: u64::MAX, rdx: u64::MAX, ..Frame::kernel(read) });
    let set = |index: u32, value: u64| {
        run(Frame { rcx: index.into(), rax: value & 0xffff_ffff, rdx: value >> 32, ..Frame::kernel(write) })
    };
    for (name, index) in [
        ("EFER", msr::EFER),
        ("STAR", msr::STAR),
        ("LSTAR", msr::LSTAR),
        ("CSTAR", msr::CSTAR),
        ("SFMASK", msr::SFMASK),
        ("FS base", msr::FS_BASE),
        ("GS base", msr::GS_BASE),
        ("APIC base", msr::APIC_BASE),
        ("TSC", msr::TSC),
        ("PAT", msr::PAT),
        ("SYSENTER CS", msr::SYSENTER_CS),
        ("SYSENTER ESP", msr::SYSENTER_ESP),
        ("SYSENTER EIP", msr::SYSENTER_EIP),
    ] {
        let end = get(index);
        check(name, end.vector, vector::END);
        check_true("rdmsr clears the upper halves", end.rax >> 32 == 0 && end.rdx >> 32 == 0);
    }
    for (name, index, value) in [
        ("STAR keeps", msr::STAR, 0x1234_5678_9abc_def0),
        ("LSTAR keeps", msr::LSTAR, 0xffff_8000_1234_5678),
        ("KERNEL_GS_BASE keeps", msr::KERNEL_GS_BASE, 0x7fff_ffff_ffff),
        ("SYSENTER EIP keeps", msr::SYSENTER_EIP, 0xffff_ffff_8123_4567),
        ("SFMASK keeps", msr::SFMASK, 0x4_7700),
        ("PAT keeps", msr::PAT, 0x0007_0406_0007_0406),
        ("TSC_AUX keeps", msr::TSC_AUX, 0x1234),
    ] {
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
    for (name, index, value) in [
        ("KERNEL_GS_BASE", msr::KERNEL_GS_BASE, 1 << 47),
        ("FS base", msr::FS_BASE, 1 << 63),
        ("GS base", msr::GS_BASE, 0xfffe_0000_0000_0000),
        ("EFER with reserved bits", msr::EFER, 0xffff_ffff),
        ("PAT with a reserved type", msr::PAT, 2),
    ] {
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
    check(
        "RFLAGS.ID can change",
        kernel(code64!(
            "pushfq",
            "xor dword ptr [rsp], 0x200000",
            "mov eax, [rsp]",
            "popfq",
            "pushfq",
            "pop rcx",
            "xor eax, ecx"
        ))
        .rax & flags::ID,
        0,
    );
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
        expect(
            "CR3 with reserved bits",
            &run(Frame { rax: cpu::cr3() | 1 << 60, ..Frame::kernel(code!("mov cr3, rax", "int 0xff")) }),
            vector::GP,
            0,
        );
        expect(
            "CR8 with reserved bits",
            &run(Frame { rax: 16, ..Frame::kernel(code!("mov cr8, rax", "int 0xff")) }),
            vector::GP,
            0,
        );
    }
    expect("CR1 does not exist", &kernel(code!(".byte 0x0f, 0x20, 0xc8", "int 0xff")), vector::UD, 0);
    expect("CR5 does not exist", &kernel(code!(".byte 0x0f, 0x22, 0xe8", "int 0xff")), vector::UD, 0);
    cpu::set_cr8(5);
    check("CR8 keeps", cpu::cr8(), 5);
    check("CR8 is the APIC's task priority", cpu::peek_lapic_tpr(), 0x50);
    cpu::set_cr8(0);
    cpu::set_cr2(0x1234_5678_9abc_def0);
    check("CR2 keeps", cpu::cr2(), 0x1234_5678_9abc_def0);
    let end = kernel(code64!(
        "smsw ax",
        "mov rcx, cr0",
        "or al, 8",
        "lmsw ax",
        "mov rdx, cr0",
        "clts",
        "mov rbx, cr0",
        "xor eax, eax",
        "lmsw ax",
        "mov rsi, cr0"
    ));
    check("lmsw sets task switched", end.rdx, cr0 | cpu::cr0::TS);
    check("clts clears it", end.rbx, cr0);
    check("lmsw cannot clear protection", end.rsi & 1, 1);
    cpu::set_cr0(cr0);
    check("CR0 reads extension type as one", cpu::cr0() & 0x10, 0x10);
    let end = kernel(code!(".byte 0x0f, 0x20, 0x00", "int 0xff"));
    check(
        "mov from cr0 with a memory form reads a register",
        end.vector << 32 | end.rax,
        vector::END << 32 | cr0,
    );
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
    expect(
        "dr4 is undefined with CR4.DE",
        &kernel(code!(".byte 0x0f, 0x21, 0xe0", "int 0xff")),
        vector::UD,
        0,
    );
    cpu::set_cr4(cpu::cr4() & !cpu::cr4::DE);
}

fn identification() {
    let basic = cpu::cpuid(0, 0);
    check_true("basic leaves", basic.eax >= 1);
    let features = cpu::cpuid(1, 0);
    let needed = 1
        | 1 << 3
        | 1 << 4
        | 1 << 5
        | 1 << 6
        | 1 << 8
        | 1 << 9
        | 1 << 13
        | 1 << 15
        | 1 << 23
        | 1 << 24
        | 1 << 25
        | 1 << 26;
    check(
        "FPU PSE TSC MSR PAE CX8 APIC PGE CMOV MMX FXSR SSE SSE2",
        (features.edx & needed).into(),
        needed.into(),
    );
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
    let end = run(Frame {
        rax: u64::MAX,
        rbx: u64::MAX,
        rcx: u64::MAX,
        rdx: u64::MAX,
        ..Frame::kernel(code64!("mov eax, 1", "xor ecx, ecx", "cpuid"))
    });
    check_true("cpuid clears the upper halves", (end.rax | end.rbx | end.rcx | end.rdx) >> 32 == 0);
    check(
        "cpuid works in user mode",
        in_user(code64!("xor eax, eax", "cpuid")).rbx,
        cpu::cpuid(0, 0).ebx.into(),
    );
}
