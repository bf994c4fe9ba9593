//! User code alone, as the software engine lends it to KVM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::cpu_state::Segment;
use harrier_engine::user_mode::{
    UserAccess, UserExit, UserMemory, UserMode, UserPage, UserProcessor, UserRegisters,
};
use harrier_engine::{GuestRegion, PageLog};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::support::engine;

const MEMORY: usize = 1 << 20;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7fff_0000_0000;

/// Pages that user mode may have, and what it asked for.
#[derive(Default)]
struct Pages {
    there: BTreeMap<u64, UserPage>,
    asked: Vec<(u64, UserAccess)>,
}

impl Pages {
    fn add(&mut self, va: u64, gpa: u64, writable: bool, executable: bool) {
        self.there.insert(va, UserPage { gpa, writable, executable, cpuid: false });
    }
}

impl UserMemory for Pages {
    fn translate(&mut self, va: u64, access: UserAccess) -> Option<UserPage> {
        let page = self.there.get(&(va & !0xfff)).copied()?;
        self.asked.push((va, access));
        (access != UserAccess::Write || page.writable).then_some(page)
    }
}

struct Program {
    memory: Arc<GuestRegion>,
    _mode: Arc<dyn UserMode>,
    processor: Box<dyn UserProcessor>,
    pages: Pages,
    registers: UserRegisters,
}

fn segment(selector: u16, code: bool) -> Segment {
    Segment {
        selector,
        limit: 0xffff_ffff,
        kind: if code { 0xb } else { 3 },
        code_or_data: true,
        dpl: 3,
        present: true,
        long: code,
        db: !code,
        granularity: true,
        ..Segment::default()
    }
}

/// `code` at [`CODE`], a writable page at [`DATA`].
fn program(code: &[u8]) -> Option<Program> {
    let mode = engine()?.create_user_mode().unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(MEMORY, PageLog::with_len(MEMORY))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let memory = Arc::new(GuestRegion::new(mapping, GuestAddress(0)).unwrap());
    memory.write_slice(code, MemoryRegionAddress(0x1000)).unwrap();
    mode.map_memory(Arc::clone(&memory), false).unwrap();
    let processor = mode.create_processor(0).unwrap();
    let mut pages = Pages::default();
    pages.add(CODE, 0x1000, false, true);
    pages.add(DATA, 0x2000, true, false);
    let null = Segment { unusable: true, ..Segment::default() };
    let mut xsave = vec![0; 576];
    xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let registers = UserRegisters {
        rip: CODE,
        rflags: 0x202,
        segments: [null, segment(0x33, true), segment(0x2b, false), null, null, null],
        xsave,
        xcr0: 3,
        ..UserRegisters::default()
    };
    Some(Program { memory, _mode: mode, processor, pages, registers })
}

impl Program {
    fn run(&mut self) -> UserExit {
        self.processor.run(&mut self.registers, &mut self.pages, None)
    }
}

#[test]
fn user_code_runs_up_to_a_system_call_which_software_executes() {
    // mov rcx, [rsi]; add rcx, rax; mov [rsi+8], rcx; movq xmm3, rcx; syscall
    let code = [
        0x48, 0x8b, 0x0e, 0x48, 0x01, 0xc1, 0x48, 0x89, 0x4e, 0x08, 0x66, 0x48, 0x0f, 0x6e, 0xd9, 0x0f, 0x05,
    ];
    let Some(mut program) = program(&code) else { return };
    program.registers.gpr[6] = DATA;
    program.registers.gpr[0] = 5;
    program.registers.gpr[4] = DATA + 0x800;
    program.memory.write_obj(37u64, MemoryRegionAddress(0x2000)).unwrap();
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, CODE + 15, "at the SYSCALL");
    assert_eq!(program.registers.rflags & 0x202, 0x202);
    assert_eq!(program.registers.gpr[4], DATA + 0x800);
    assert_eq!(program.memory.read_obj::<u64>(MemoryRegionAddress(0x2008)).unwrap(), 42);
    assert_eq!(program.registers.xsave[160 + 48], 42);
    assert_eq!(program.registers.segments[1].selector, 0x33);
    assert!(program.pages.asked.contains(&(DATA, UserAccess::Read)));
}

#[test]
fn faults_stand_at_their_instruction_with_the_registers_before_it() {
    // The instruction, and how far into it the registers may have changed: not at all.
    let faults: [(&str, &[u8]); 8] = [
        ("a page that is not there", &[0x48, 0x8b, 0x03]),
        ("an undefined instruction", &[0x0f, 0x0b]),
        ("a breakpoint", &[0xcc]),
        ("a software interrupt", &[0xcd, 0x80]),
        ("a division by zero", &[0x48, 0xf7, 0xf1]),
        ("a privileged instruction", &[0xf4]),
        ("a port", &[0xe6, 0x80]),
        ("kernel memory", &[0x48, 0x8b, 0x07]),
    ];
    for (name, instruction) in faults {
        let mut code = vec![0x48, 0xff, 0xc2]; // inc rdx
        code.extend(instruction);
        let Some(mut program) = program(&code) else { return };
        program.registers.gpr[3] = 0x1234_5000;
        program.registers.gpr[7] = 0xffff_ff00_0000_2000;
        program.registers.gpr[4] = DATA + 0x800;
        let before = program.registers.clone();
        assert_eq!(program.run(), UserExit::Software, "{name}");
        assert_eq!(program.registers.rip, CODE + 3, "{name}");
        assert_eq!(program.registers.gpr[2], 1, "{name}");
        assert_eq!(program.registers.gpr[4], before.gpr[4], "{name}");
        assert_eq!(program.registers.segments, before.segments, "{name}");
    }
}

#[test]
fn a_write_to_a_page_that_is_watched_is_softwares() {
    // mov rax, [rsi]; mov [rsi], rax
    let Some(mut program) = program(&[0x48, 0x8b, 0x06, 0x48, 0x89, 0x06]) else { return };
    program.pages.add(DATA, 0x2000, false, false);
    program.registers.gpr[6] = DATA;
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, CODE + 3);
    // Nobody watches any longer: the same translation is asked for again.
    program.pages.add(DATA, 0x2000, true, false);
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, CODE + 6, "zeros follow: [rax] is not there");
}

#[test]
fn forgotten_translations_are_asked_for_again_and_may_lead_elsewhere() {
    // mov rax, [rsi]; syscall; jmp back
    let Some(mut program) = program(&[0x48, 0x8b, 0x06, 0x0f, 0x05, 0xeb, 0xf9]) else { return };
    program.registers.gpr[6] = DATA;
    program.memory.write_obj(1u64, MemoryRegionAddress(0x2000)).unwrap();
    program.memory.write_obj(2u64, MemoryRegionAddress(0x3000)).unwrap();
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.gpr[0], 1);
    // More often than the tables have room for.
    for round in 0..1500u64 {
        program.pages.add(DATA, if round % 2 == 0 { 0x3000 } else { 0x2000 }, true, false);
        program.processor.forget_translations();
        program.registers.rip = CODE;
        assert_eq!(program.run(), UserExit::Software);
        assert_eq!(program.registers.gpr[0], 2 - round % 2, "round {round}");
    }
}

#[test]
fn a_page_with_cpuid_is_softwares_also_when_it_was_just_written() {
    // nop; mov [rsi], rbx; jmp rsi
    let Some(mut program) = program(&[0x90, 0x48, 0x89, 0x1e, 0xff, 0xe6]) else { return };
    program.pages.add(DATA, 0x2000, true, true);
    program.registers.gpr[6] = DATA;
    // nop; nop; syscall: writing, then executing what was written, works.
    program.registers.gpr[3] = 0x050f_9090;
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, DATA + 2);
    // nop; nop; cpuid
    program.registers.rip = CODE;
    program.registers.gpr[3] = 0xa20f_9090;
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, DATA);
}

#[test]
fn a_kick_and_a_time_limit_end_an_endless_loop() {
    let Some(mut program) = program(&[0xeb, 0xfe]) else { return };
    let limit = Duration::from_millis(5);
    let exit = program.processor.run(&mut program.registers, &mut program.pages, Some(limit));
    assert_eq!((exit, program.registers.rip), (UserExit::Interrupted, CODE));
    let kicker = program.processor.kicker();
    kicker.kick();
    assert_eq!(program.run(), UserExit::Interrupted);
    let kicking = std::thread::spawn(move || kicker.kick());
    assert_eq!(program.run(), UserExit::Interrupted);
    kicking.join().unwrap();
}

#[test]
fn user_code_runs_at_the_processors_speed() {
    // loop: dec rcx; jnz loop; syscall
    let Some(mut program) = program(&[0x48, 0xff, 0xc9, 0x75, 0xfb, 0x0f, 0x05]) else { return };
    program.registers.gpr[1] = 1;
    assert_eq!(program.run(), UserExit::Software);
    let mut turn = |rounds: u64| {
        program.registers.rip = CODE;
        program.registers.gpr[1] = rounds;
        let begin = Instant::now();
        assert_eq!(program.run(), UserExit::Software);
        begin.elapsed()
    };
    let exit = (0..50).map(|_| turn(1)).min().unwrap();
    let million = (0..5).map(|_| turn(1_000_000)).min().unwrap();
    println!(
        "user mode: {:.1} us a round trip, {million:?} for 2 million instructions",
        exit.as_secs_f64() * 1e6
    );
    assert!(million < Duration::from_millis(20), "{million:?}");
}
