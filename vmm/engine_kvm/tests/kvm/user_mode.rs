//! User code alone, as the software engine lends it to KVM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_engine::cpu_state::Segment;
use harrier_engine::user_mode::{
    UserAccess, UserCode, UserExit, UserMemory, UserMode, UserPage, UserProcessor, UserRegisters,
};
use harrier_engine::{CpuModel, GuestRegion, PageLog};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::support::engine;

const MEMORY: usize = 1 << 20;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7fff_0000_0000;

/// The only address space but in the test of several.
const SPACE: u64 = 0x1000;

/// Pages that user mode may have, and what it asked for.
#[derive(Default)]
struct Pages {
    there: BTreeMap<u64, UserPage>,
    asked: Vec<(u64, UserAccess)>,
    forgotten: u32,
}

impl Pages {
    fn add(&mut self, va: u64, gpa: u64, writable: bool, executable: bool) {
        let code = executable.then_some(UserCode { version: 1, trapped: false });
        self.there.insert(va, UserPage { gpa, writable, code });
    }

    /// The page's code is another from now on, or more is known of it.
    fn change_code(&mut self, va: u64, version: u64, trapped: bool) {
        self.there.get_mut(&va).unwrap().code = Some(UserCode { version, trapped });
    }
}

impl UserMemory for Pages {
    fn translate(&mut self, va: u64, access: UserAccess) -> Option<UserPage> {
        let page = self.there.get(&(va & !0xfff)).copied()?;
        self.asked.push((va, access));
        let fetch = access == UserAccess::Fetch;
        if access == UserAccess::Write && !page.writable || fetch && page.code.is_none() {
            return None;
        }
        Some(UserPage { writable: page.writable && !fetch, code: page.code.filter(|_| fetch), ..page })
    }

    fn nearby(&mut self, va: u64, access: UserAccess) -> Vec<(u64, UserPage)> {
        let near = [va.wrapping_sub(0x1000) & !0xfff, va.wrapping_add(0x1000) & !0xfff];
        let access = if access == UserAccess::Fetch { access } else { UserAccess::Read };
        near.into_iter().filter_map(|near| Some((near, self.translate(near, access)?))).collect()
    }

    fn peek(&mut self, va: u64) -> Option<u64> {
        self.there.get(&(va & !0xfff)).map(|page| page.gpa)
    }

    fn forgotten(&mut self) {
        self.forgotten += 1;
    }
}

struct Program {
    memory: Arc<GuestRegion>,
    _mode: Arc<dyn UserMode>,
    processor: Box<dyn UserProcessor>,
    pages: Pages,
    registers: UserRegisters,
}

/// `code` at [`CODE`], a writable page at [`DATA`].
fn program(code: &[u8]) -> Option<Program> {
    let mode = engine()?.create_user_mode(CpuModel::V3).unwrap();
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
        segments: [null, Segment::flat(0x33, 0xb, true), Segment::flat(0x2b, 3, false), null, null, null],
        xsave,
        xcr0: 3,
        ..UserRegisters::default()
    };
    Some(Program { memory, _mode: mode, processor, pages, registers })
}

impl Program {
    fn run(&mut self) -> UserExit {
        self.processor.run(SPACE, &mut self.registers, &mut self.pages, None)
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
fn single_pages_are_forgotten_and_the_others_stay() {
    // mov rax, [rsi]; mov rbx, [rsi+0x1000]; syscall
    let Some(mut program) =
        program(&[0x48, 0x8b, 0x06, 0x48, 0x8b, 0x9e, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x05])
    else {
        return;
    };
    program.registers.gpr[6] = DATA;
    program.pages.add(DATA + 0x1000, 0x3000, true, false);
    for (gpa, value) in [(0x2000, 1u64), (0x3000, 2), (0x4000, 3)] {
        program.memory.write_obj(value, MemoryRegionAddress(gpa)).unwrap();
    }
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!((program.registers.gpr[0], program.registers.gpr[3]), (1, 2));
    let begin = Instant::now();
    for round in 0..2000u64 {
        program.pages.asked.clear();
        let (gpa, value) = if round % 2 == 0 { (0x4000, 3) } else { (0x2000, 1) };
        program.pages.add(DATA, gpa, true, false);
        // The second address was never mapped.
        let whole = program.processor.forget_pages(SPACE, &[DATA, DATA + 0x10_0000]);
        program.registers.rip = CODE;
        assert_eq!(program.run(), UserExit::Software);
        assert_eq!((program.registers.gpr[0], program.registers.gpr[3]), (value, 2), "round {round}");
        let asked: Vec<u64> = program.pages.asked.iter().map(|(va, _)| *va).collect();
        assert!(asked.contains(&DATA) && (whole || !asked.contains(&CODE)), "{asked:x?}");
    }
    println!("forgetting one page and asking for it again: {:?}", begin.elapsed() / 2000);
}

#[test]
fn each_space_has_its_own_pages_and_keeps_them() {
    // mov rax, [rsi]; syscall
    let Some(mut program) = program(&[0x48, 0x8b, 0x06, 0x0f, 0x05]) else { return };
    program.registers.gpr[6] = DATA;
    for space in 1..=3u64 {
        program.memory.write_obj(space, MemoryRegionAddress(0x2000 * space)).unwrap();
    }
    let begin = Instant::now();
    for round in 0..3000 {
        let space = round % 3 + 1;
        if round < 3 {
            program.pages.add(DATA, 0x2000 * space, true, false);
        } else {
            // Nothing is asked any more.
            program.pages.there.clear();
        }
        program.registers.rip = CODE;
        let exit = program.processor.run(space, &mut program.registers, &mut program.pages, None);
        assert_eq!((exit, program.registers.gpr[0]), (UserExit::Software, space), "round {round}");
        assert_eq!(program.registers.rip, CODE + 3);
    }
    println!("a run in another space: {:?}", begin.elapsed() / 3000);
}

/// What software would execute is where the registers stand.
fn stops_at(program: &mut Program, from: u64, at: u64) {
    program.registers.rip = from;
    assert_eq!(program.run(), UserExit::Software);
    assert_eq!(program.registers.rip, at);
}

/// So far into the page, decoders are in step.
const MIDST: u64 = 2048;

/// NOPs, and `code` in their midst.
fn in_the_midst(code: &[u8]) -> Vec<u8> {
    let mut page = vec![0x90; MIDST as usize];
    page.extend(code);
    page
}

#[test]
fn user_mode_stops_before_each_cpuid_that_is_certain_or_was_executed() {
    // nop; cpuid; mov ecx, edx; mov [rsi], ebx; syscall, twice
    let code = [0x90, 0x0f, 0xa2, 0x89, 0xd1, 0x89, 0x1e, 0x0f, 0x05].repeat(2);
    let Some(mut program) = program(&in_the_midst(&[&code[..], &[0x90; 32]].concat())) else { return };
    program.registers.gpr[6] = DATA;
    stops_at(&mut program, CODE + 2000, CODE + MIDST + 1);
    stops_at(&mut program, CODE + MIDST + 3, CODE + MIDST + 7);
    stops_at(&mut program, CODE + MIDST + 9, CODE + MIDST + 10);
    // Before zeros it may be data, and the page is software's until software has met one.
    program.memory.write_slice(&[0; 2048], MemoryRegionAddress(0x1000 + MIDST)).unwrap();
    program.memory.write_slice(&code[..3], MemoryRegionAddress(0x1000 + MIDST)).unwrap();
    for (version, trapped, at) in [(2, false, 2000), (3, true, MIDST + 1)] {
        program.pages.change_code(CODE, version, trapped);
        program.processor.forget_pages(SPACE, &[CODE]);
        stops_at(&mut program, CODE + 2000, CODE + at);
    }
}

#[test]
fn bytes_of_cpuid_in_another_instruction_are_executed_as_that() {
    // mov eax, 0xa20f; syscall
    let Some(mut program) = program(&in_the_midst(&[0xb8, 0x0f, 0xa2, 0, 0, 0x0f, 0x05])) else { return };
    stops_at(&mut program, CODE, CODE + MIDST + 5);
    assert_eq!(program.registers.gpr[0], 0xa20f);
}

#[test]
fn a_cpuid_that_crosses_into_the_next_page_is_found_whichever_is_there_first() {
    for first_is_there in [true, false] {
        let Some(mut program) = program(&vec![0x90; 4095]) else { return };
        program.memory.write_slice(&[0x0f, 0xa2, 0x0f, 0x05], MemoryRegionAddress(0x1fff)).unwrap();
        program.pages.there.remove(&DATA);
        if first_is_there {
            // The first page runs by itself, and ends at the second.
            stops_at(&mut program, CODE + 4000, CODE + 4095);
        }
        program.pages.add(CODE + 0x1000, 0x2000, false, true);
        stops_at(&mut program, CODE + 4000, CODE + 4095);
        stops_at(&mut program, CODE + 0x1001, CODE + 0x1001);
        // Another page follows in its place: jz with the same first byte.
        program.processor.forget_pages(SPACE, &[CODE, CODE + 0x1000]);
        program.pages.change_code(CODE + 0x1000, 2, false);
        program.memory.write_slice(&[0x84, 0, 0, 0, 0, 0x0f, 0x05], MemoryRegionAddress(0x2000)).unwrap();
        stops_at(&mut program, CODE + 4000, CODE + 0x1005);
    }
}

#[test]
fn a_page_whose_end_was_open_runs_freely_once_the_next_one_is_known() {
    // jz over the page's end, and a syscall behind it.
    let Some(mut program) = program(&vec![0x90; 4095]) else { return };
    let code = [0x0f, 0x84, 0, 0, 0, 0, 0x0f, 0x05];
    program.memory.write_slice(&code, MemoryRegionAddress(0x1fff)).unwrap();
    program.pages.there.remove(&DATA);
    stops_at(&mut program, CODE + 4000, CODE + 4095);
    program.pages.add(CODE + 0x1000, 0x2000, false, true);
    stops_at(&mut program, CODE + 0x1005, CODE + 0x1005);
    stops_at(&mut program, CODE + 4000, CODE + 0x1005);
}

#[test]
fn xsave_and_its_kin_are_softwares_where_the_processor_saves_more_than_the_model_knows_of() {
    // nop; xsave [rsi]; mov ecx, edx; syscall
    let code = [0x90, 0x0f, 0xae, 0x26, 0x89, 0xd1, 0x0f, 0x05];
    let Some(mut program) = program(&in_the_midst(&code)) else { return };
    program.registers.gpr[6] = DATA;
    program.registers.gpr[0] = 7;
    program.pages.change_code(CODE, 1, true);
    let at = if is_x86_feature_detected!("avx512f") { 1 } else { 6 };
    stops_at(&mut program, CODE, CODE + MIDST + at);
}

#[test]
fn a_trap_after_each_instruction_that_user_mode_asked_for_is_told() {
    // push 0x302; popf; nop; nop
    let Some(mut program) = program(&[0x68, 0x02, 0x03, 0, 0, 0x9d, 0x90, 0x90]) else { return };
    program.registers.gpr[4] = DATA + 0x800;
    assert_eq!(program.run(), UserExit::Stepped);
    assert_eq!(program.registers.rip, CODE + 7);
    assert_ne!(program.registers.rflags & 0x100, 0);
}

#[test]
fn a_kick_and_a_time_limit_end_an_endless_loop() {
    let Some(mut program) = program(&[0xeb, 0xfe]) else { return };
    let limit = Duration::from_millis(5);
    let exit = program.processor.run(SPACE, &mut program.registers, &mut program.pages, Some(limit));
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
