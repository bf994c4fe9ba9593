//! Where everything lies in the window that host and guest both have at the same addresses, and the program in it.
//!
//! The program runs in user mode on both sides. For each case it loads all registers from a [`Context`], jumps to the
//! case's code, and saves all registers. A fault ends a case too: whoever handles it writes the fault down and goes on
//! where the registers are saved. Cases of 32 bits are reached and left by far jumps: the program itself has 64.

/// How many bits addresses of cases have: 64-bit mode, or compatibility mode with a code segment of 32 or 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bits {
    /// 64-bit mode.
    #[value(name = "64")]
    Long,
    /// Compatibility mode.
    #[value(name = "32")]
    Compatibility,
    /// Compatibility mode with segments of 16 bits, whose descriptors are local ones.
    #[value(name = "16")]
    Short,
}

impl Bits {
    /// Cases in a batch: of 16 bits as many as a segment holds, with a little room behind them.
    pub(super) fn cases(self) -> usize {
        if self == Bits::Short { 400 } else { CASES }
    }

    /// Where the code segment begins: what addresses of code are relative to.
    pub(super) fn code_base(self) -> u64 {
        if self == Bits::Short { CODE } else { 0 }
    }

    /// Where the data segments begin.
    pub(super) fn data_base(self) -> u64 {
        if self == Bits::Short { DATA - 0x4000 } else { 0 }
    }
}

/// Segments of 16 bits: selectors in the local table, and the tables' two descriptors' limits.
pub(super) const SHORT_CODE: u16 = 0x07;
pub(super) const SHORT_DATA: u16 = 0x0f;
pub(super) const SHORT_CODE_LIMIT: u32 = 0xffff;
/// Memory ends within the segment.
pub(super) const SHORT_DATA_LIMIT: u32 = 0xafff;
/// Offset in the code segment of what an indirect branch reaches.
pub(super) const SHORT_TAKEN: u64 = 0xfb00;

/// Selectors of user mode, with Linux's numbers on both sides: 32-bit code, data, 64-bit code.
pub(super) const CODE32: u16 = 0x23;
pub(super) const FLAT: u16 = 0x2b;
pub(super) const CODE64: u16 = 0x33;

/// Start of the window; below 2 GiB, so that 32-bit displacements reach it.
pub(super) const BASE: u64 = 0x3000_0000;
/// Length of the window in bytes.
pub(super) const WINDOW: usize = 0x18_0000;

/// Cases in a batch.
pub(super) const CASES: usize = 512;
/// Bytes of a [`Context`], before and after.
pub(super) const CONTEXT: usize = 1024;
/// Bytes for a case's code.
pub(super) const SLOT: usize = 160;

/// Variables of the program.
const VARIABLES: u64 = BASE;
/// Next context to load, where its result goes, and where the contexts end.
pub(super) const NEXT: u64 = VARIABLES;
pub(super) const RESULT: u64 = VARIABLES + 0x08;
pub(super) const END: u64 = VARIABLES + 0x10;
/// Where the program jumps when all cases are done.
pub(super) const EXIT: u64 = VARIABLES + 0x18;
/// Address of the part that saves registers; a case's code jumps through it.
pub(super) const SAVER: u64 = VARIABLES + 0x20;
const TARGET: u64 = VARIABLES + 0x28;
const SAVED_RSP: u64 = VARIABLES + 0x30;
const SAVED_RAX: u64 = VARIABLES + 0x38;
const SAVED_FLAGS: u64 = VARIABLES + 0x40;
/// Address of [`TAKEN`].
pub(super) const TAKEN_POINTER: u64 = VARIABLES + 0x50;
/// For whoever starts the program: its stack pointer.
pub(super) const CALLER: u64 = VARIABLES + 0x48;
/// Vector plus one, error code, address and RIP of a fault; zero without one.
pub(super) const FAULT: u64 = VARIABLES + 0x80;
const STACK_END: u64 = BASE + 0x1000;

/// The program, then what the host alone needs to start and end it.
pub(super) const PROGRAM: u64 = BASE + 0x1000;
pub(super) const HOST_ENTRY: u64 = BASE + 0x1800;
/// What a branch that is taken reaches.
pub(super) const TAKEN: u64 = BASE + 0x1c00;
/// The cases' code.
pub(super) const CODE: u64 = BASE + 0x2000;
/// Memory that cases work on, a page that is not there, one that is read-only, and another that is not there.
pub(super) const DATA: u64 = BASE + 0x3_0000;
pub(super) const DATA_LEN: usize = 0x3000;
pub(super) const HOLE: u64 = DATA + DATA_LEN as u64;
pub(super) const READ_ONLY: u64 = HOLE + 0x1000;
pub(super) const SECOND_HOLE: u64 = READ_ONLY + 0x1000;
pub(super) const BEFORE: u64 = BASE + 0x8_0000;
pub(super) const AFTER: u64 = BEFORE + (CASES * CONTEXT) as u64;

const _: () = assert!(
    CODE + (CASES * SLOT) as u64 <= DATA && AFTER as usize - BASE as usize + CASES * CONTEXT <= WINDOW
);

/// Offsets in a context: sixteen general registers, flags, the code's address or a fault's four words, an XSAVE area.
pub(super) const FLAGS_AT: usize = 128;
pub(super) const ENTRY_AT: usize = 136;
pub(super) const FAULT_AT: usize = 136;
pub(super) const XSAVE_AT: usize = 192;
pub(super) const XSAVE_LEN: usize = 832;

/// Registers before or after a case.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    /// XSAVE area in the standard layout with AVX.
    pub(super) xsave: Box<[u8; XSAVE_LEN]>,
    /// What [`FAULT`] was after the case.
    pub(super) fault: [u64; 4],
}

impl Context {
    /// The bytes of a context whose code is at `entry`.
    pub(super) fn to_bytes(&self, entry: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CONTEXT);
        for word in self.gpr.iter().chain([&self.rflags, &entry]) {
            bytes.extend(word.to_le_bytes());
        }
        bytes.resize(XSAVE_AT, 0);
        bytes.extend_from_slice(self.xsave.as_slice());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Context {
        let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        let mut xsave = Box::new([0; XSAVE_LEN]);
        xsave.copy_from_slice(&bytes[XSAVE_AT..XSAVE_AT + XSAVE_LEN]);
        Context {
            gpr: std::array::from_fn(|index| word(8 * index)),
            rflags: word(FLAGS_AT),
            xsave,
            fault: std::array::from_fn(|index| word(FAULT_AT + 8 * index)),
        }
    }

    pub(super) fn xmm(&self, register: usize) -> &[u8] {
        &self.xsave[160 + 16 * register..][..16]
    }

    pub(super) fn xmm_mut(&mut self, register: usize) -> &mut [u8] {
        &mut self.xsave[160 + 16 * register..][..16]
    }

    pub(super) fn upper_mut(&mut self, register: usize) -> &mut [u8] {
        &mut self.xsave[576 + 16 * register..][..16]
    }
}

/// Machine code in the making. Addresses in it are absolute and below 2 GiB.
#[derive(Default)]
pub(super) struct Code(pub(super) Vec<u8>);

impl Code {
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Code {
        self.0.extend_from_slice(bytes);
        self
    }

    /// REX.W opcode with a register and an absolute address.
    fn absolute(&mut self, opcode: u8, register: u8, at: u64) -> &mut Code {
        self.bytes(&[0x48 | (register >> 3) << 2, opcode, 0x04 | (register & 7) << 3, 0x25]);
        self.bytes(&(at as u32).to_le_bytes())
    }

    /// `mov register, [at]`.
    pub(super) fn load(&mut self, register: u8, at: u64) -> &mut Code {
        self.absolute(0x8b, register, at)
    }

    /// `mov [at], register`.
    pub(super) fn store(&mut self, register: u8, at: u64) -> &mut Code {
        self.absolute(0x89, register, at)
    }

    /// REX.W opcode with a register and `[base + offset]`; the base is none of RSP and R12.
    fn based(&mut self, opcode: u8, register: u8, base: u8, offset: usize) -> &mut Code {
        self.bytes(&[0x48 | (register >> 3) << 2 | base >> 3, opcode, 0x80 | (register & 7) << 3 | base & 7]);
        self.bytes(&(offset as u32).to_le_bytes())
    }

    /// `jmp selector:at`, as code of 32 bits has it.
    pub(super) fn far_jump(&mut self, selector: u16, at: u64) -> &mut Code {
        self.bytes(&[0xea]).bytes(&(at as u32).to_le_bytes()).bytes(&selector.to_le_bytes())
    }

    /// `jmp [at]`.
    pub(super) fn jump(&mut self, at: u64) -> &mut Code {
        self.bytes(&[0xff, 0x24, 0x25]).bytes(&(at as u32).to_le_bytes())
    }
}

const RAX: u8 = 0;
const RCX: u8 = 1;
const RBX: u8 = 3;
const RSP: u8 = 4;

/// The program, and the offset of the part that saves registers.
pub(super) fn program(bits: Bits) -> (Vec<u8>, u64) {
    let mut code = Code::default();
    let stack = (STACK_END as u32).to_le_bytes();
    // mov rsp, STACK_END
    code.bytes(&[0x48, 0xc7, 0xc4]).bytes(&stack);
    code.load(RAX, NEXT);
    // cmp rax, [END]; jae to the end, filled in below
    code.absolute(0x3b, RAX, END).bytes(&[0x0f, 0x83, 0, 0, 0, 0]);
    let jump_at = code.0.len();
    // mov rbx, rax; mov eax, 7; xor edx, edx; xrstor64 [rbx + XSAVE_AT]
    code.bytes(&[0x48, 0x89, 0xc3, 0xb8, 7, 0, 0, 0, 0x31, 0xd2]);
    code.based_two(&[0x0f, 0xae], 5, RBX, XSAVE_AT);
    code.based(0x8b, RAX, RBX, ENTRY_AT).store(RAX, TARGET);
    if bits != Bits::Long {
        // mov word [TARGET + 4], selector
        let selector = if bits == Bits::Short { SHORT_CODE } else { CODE32 };
        code.bytes(&[0x66, 0xc7, 0x04, 0x25]).bytes(&(TARGET as u32 + 4).to_le_bytes());
        code.bytes(&selector.to_le_bytes());
    }
    if bits == Bits::Short {
        // mov eax, SHORT_DATA; mov ds, eax; mov es, eax; mov ss, eax: in 64-bit mode they count for nothing
        code.bytes(&[0xb8, SHORT_DATA as u8, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]);
    }
    // push [rbx + FLAGS_AT]; popfq
    code.bytes(&[0xff, 0xb3]).bytes(&(FLAGS_AT as u32).to_le_bytes()).bytes(&[0x9d]);
    for register in (0..16).filter(|&register| register != RBX) {
        code.based(0x8b, register, RBX, usize::from(register) * 8);
    }
    code.based(0x8b, RBX, RBX, 24);
    match bits {
        Bits::Long => code.jump(TARGET),
        // jmp far [TARGET], of 32 bits
        _ => code.bytes(&[0xff, 0x2c, 0x25]).bytes(&(TARGET as u32).to_le_bytes()),
    };

    let saver = code.0.len() as u64;
    code.store(RSP, SAVED_RSP).bytes(&[0x48, 0xc7, 0xc4]).bytes(&stack);
    // pushfq; pop [SAVED_FLAGS]; push 2; popfq
    code.bytes(&[0x9c, 0x8f, 0x04, 0x25]).bytes(&(SAVED_FLAGS as u32).to_le_bytes()).bytes(&[0x6a, 2, 0x9d]);
    code.store(RAX, SAVED_RAX).load(RAX, RESULT);
    for register in (1..16).filter(|&register| register != RSP) {
        code.based(0x89, register, RAX, usize::from(register) * 8);
    }
    for (from, at) in [(SAVED_RAX, 0), (SAVED_RSP, 32), (SAVED_FLAGS, FLAGS_AT)] {
        code.load(RCX, from).based(0x89, RCX, RAX, at);
    }
    for word in 0..4 {
        code.load(RCX, FAULT + 8 * word).based(0x89, RCX, RAX, FAULT_AT + 8 * word as usize);
    }
    // xor ecx, ecx; mov [FAULT], rcx
    code.bytes(&[0x31, 0xc9]).store(RCX, FAULT);
    // mov rbx, rax; mov eax, 7; xor edx, edx; xsave64 [rbx + XSAVE_AT]
    code.bytes(&[0x48, 0x89, 0xc3, 0xb8, 7, 0, 0, 0, 0x31, 0xd2]);
    code.based_two(&[0x0f, 0xae], 4, RBX, XSAVE_AT);
    for variable in [NEXT, RESULT] {
        // add qword [variable], CONTEXT
        code.bytes(&[0x48, 0x81, 0x04, 0x25]).bytes(&(variable as u32).to_le_bytes());
        code.bytes(&(CONTEXT as u32).to_le_bytes());
    }
    // jmp to the start
    let back = (code.0.len() as i32 + 5).wrapping_neg();
    code.bytes(&[0xe9]).bytes(&back.to_le_bytes());
    let end = code.0.len();
    code.jump(EXIT);
    let distance = (end - jump_at) as u32;
    code.0[jump_at - 4..jump_at].copy_from_slice(&distance.to_le_bytes());
    (code.0, saver)
}

impl Code {
    /// REX.W with a two-byte opcode, its extension and `[base + offset]`.
    fn based_two(&mut self, opcode: &[u8; 2], extension: u8, base: u8, offset: usize) -> &mut Code {
        self.bytes(&[0x48]).bytes(opcode).bytes(&[0x80 | extension << 3 | base]);
        self.bytes(&(offset as u32).to_le_bytes())
    }
}

/// What a branch that is taken reaches: a change of a register that no flag notices, then the end of the case.
pub(super) fn taken(bits: Bits) -> Vec<u8> {
    let mut code = Code::default();
    match bits {
        // lea r11, [r11 + 0x55]
        Bits::Long => code.bytes(&[0x4d, 0x8d, 0x5b, 0x55]).jump(SAVER),
        // lea ebp, [ebp + 0x55]
        _ => code.bytes(&[0x8d, 0x6d, 0x55]).far_jump(CODE64, saver(bits)),
    };
    code.0
}

/// What an indirect branch of 16 bits reaches: a jump to [`TAKEN`], in the segment of 32 bits.
pub(super) fn short_taken() -> Vec<u8> {
    let mut code = Code::default();
    code.bytes(&[0x66]).far_jump(CODE32, TAKEN);
    code.0
}

/// Address of the part of the program that saves registers.
pub(super) fn saver(bits: Bits) -> u64 {
    PROGRAM + program(bits).1
}

/// How the host enters the program as a function, and how it comes back.
pub(super) fn host_entry() -> (Vec<u8>, u64) {
    let mut code = Code::default();
    // push rbx, rbp, r12 to r15
    code.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]).store(RSP, CALLER);
    // mov eax, FLAT; mov ds, eax; mov es, eax: code of 64 bits does without
    code.bytes(&[0xb8, FLAT as u8, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0]);
    let back = PROGRAM.wrapping_sub(HOST_ENTRY + code.0.len() as u64 + 5) as u32;
    code.bytes(&[0xe9]).bytes(&back.to_le_bytes());
    let exit = code.0.len() as u64;
    // mov eax, FLAT; mov ss, eax
    code.bytes(&[0xb8, FLAT as u8, 0, 0, 0, 0x8e, 0xd0]);
    code.load(RSP, CALLER).bytes(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
    (code.0, HOST_ENTRY + exit)
}
