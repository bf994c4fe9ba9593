//! Memory of the guests: where tables, stacks and code lie, and what is in them before a case changes some of it.
//!
//! Everything lies below 64 KiB but page tables and the page that they are tried on, so that code of 16 bits and real mode
//! reach it with segments that begin at zero. What is no table is full of `OUT DX, AL`: wherever a case goes, it ends there.

/// Size of guest memory.
pub(super) const MEMORY: usize = 0x2_0000;
/// OUT DX, AL: one byte, so that every address is a place to end.
pub(super) const END: u8 = 0xee;

pub(super) const GDT: u64 = 0x1000;
pub(super) const LDT: u64 = 0x1200;
/// Entries of each of the two tables.
pub(super) const ENTRIES: u64 = 64;
pub(super) const TSS64: u64 = 0x1400;
pub(super) const TSS32: u64 = 0x1500;
/// Tasks that are not running, of 32 and of 16 bits.
pub(super) const OTHER_TSS32: u64 = 0x1700;
pub(super) const OTHER_TSS16: u64 = 0x1800;
pub(super) const IDT64: u64 = 0x2000;
pub(super) const IDT32: u64 = 0x3000;
/// First of eight vectors whose gates are random.
pub(super) const RANDOM_GATES: u8 = 0x30;
/// Tops of the stacks of privilege levels 0 to 2, and of two that the interrupt stack table names.
pub(super) const STACKS: [u64; 3] = [0x5800, 0x6000, 0x6800];
pub(super) const INTERRUPT_STACKS: [u64; 2] = [0x7000, 0x7400];
/// Stack of the code that runs.
pub(super) const STACK: u64 = 0x7c00;
pub(super) const DATA: u64 = 0x9000;
pub(super) const CODE: u64 = 0xa100;
pub(super) const HANDLERS: u64 = 0xb000;
pub(super) const TARGET: u64 = 0xc000;

/// Four levels that map everything to itself, page by page; the last two serve every mode of their format.
const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const DIRECTORY: u64 = 0x1_2000;
const TABLE: u64 = 0x1_3000;
const DIRECTORY32: u64 = 0x1_4000;
const TABLE32: u64 = 0x1_5000;
/// Tables with the entries that are tried, and the page they lead to.
pub(super) const TRIED_PDPT: u64 = 0x1_a000;
pub(super) const TRIED_DIRECTORY: u64 = 0x1_b000;
pub(super) const TRIED_TABLE: u64 = 0x1_c000;
pub(super) const TRIED_PAGE: u64 = 0x1_d000;

/// How the processor runs when a case begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Virtual-8086 mode, without paging.
    Virtual8086,
    /// Protected mode with 16-bit code, without paging.
    Protected16,
    /// Protected mode with 32-bit code, without paging.
    Protected32,
    /// 32-bit code with page tables of 32 bits.
    Paged32,
    /// 32-bit code with PAE page tables.
    Pae32,
    /// 32-bit code in long mode.
    Compatibility,
    /// 64-bit mode.
    Long,
}

impl Mode {
    pub(super) const ALL: [Mode; 8] = [
        Mode::Real,
        Mode::Virtual8086,
        Mode::Protected16,
        Mode::Protected32,
        Mode::Paged32,
        Mode::Pae32,
        Mode::Compatibility,
        Mode::Long,
    ];

    /// In long mode, EFER.LMA.
    pub(super) fn is_long(self) -> bool {
        matches!(self, Mode::Compatibility | Mode::Long)
    }

    /// Bits of the code segment.
    pub(super) fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 16,
            Mode::Long => 64,
            _ => 32,
        }
    }

    pub(super) fn is_paged(self) -> bool {
        matches!(self, Mode::Paged32 | Mode::Pae32 | Mode::Compatibility | Mode::Long)
    }

    /// Neither real nor virtual-8086 mode: selectors mean descriptors.
    pub(super) fn has_descriptors(self) -> bool {
        !matches!(self, Mode::Real | Mode::Virtual8086)
    }

    /// CR3.
    pub(super) fn root(self) -> u64 {
        match self {
            Mode::Paged32 => DIRECTORY32,
            Mode::Pae32 => PDPT,
            _ => PML4,
        }
    }

    /// Where the page lies whose entries are tried, and where these are: from the last level up.
    pub(super) fn tried(self) -> (u64, Vec<u64>) {
        match self {
            Mode::Long => (0x80_0000_0000, vec![TRIED_TABLE, TRIED_DIRECTORY, TRIED_PDPT, PML4 + 8]),
            Mode::Paged32 => (0x40_0000, vec![TRIED_TABLE, DIRECTORY32 + 4]),
            _ => (0x20_0000, vec![TRIED_TABLE, DIRECTORY + 8]),
        }
    }
}

/// Selectors of descriptors that stay as they are, by privilege level.
pub(super) mod selector {
    pub(crate) const CODE64: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const CODE32: u16 = 0x18;
    pub(crate) const CODE16: u16 = 0x20;
    pub(crate) const DATA16: u16 = 0x28;
    /// In the order that SYSRET wants.
    pub(crate) const USER_CODE32: u16 = 0x33;
    pub(crate) const USER_DATA: u16 = 0x3b;
    pub(crate) const USER_CODE64: u16 = 0x43;
    pub(crate) const USER_CODE16: u16 = 0x4b;
    pub(crate) const TASK: u16 = 0x80;
    pub(crate) const TABLE: u16 = 0x90;
    pub(crate) const OTHER_TASK32: u16 = 0xa0;
    pub(crate) const OTHER_TASK16: u16 = 0xb0;
    /// The first one of a random descriptor.
    pub(crate) const FIRST_RANDOM: u16 = 0xc0;
}

/// A descriptor of eight bytes.
pub(super) fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// A gate of eight bytes; the upper half of a long one is the rest of the offset.
pub(super) fn gate(selector: u16, offset: u64, access: u64, count: u64) -> u64 {
    (offset & 0xffff) | u64::from(selector) << 16 | count << 32 | access << 40 | (offset >> 16 & 0xffff) << 48
}

/// Memory before a case.
pub(super) fn image(mode: Mode) -> Vec<u8> {
    let mut image = Image(vec![END; MEMORY]);
    image.fill(0, 0x4000, 0);
    image.fill(PML4, 0x9000, 0);
    image.fill(TRIED_PDPT, 0x3000, 0);
    for vector in 0..256u64 {
        let handler = HANDLERS + vector * 8;
        // Offset and segment.
        image.bytes(vector * 4, &(handler as u32).to_le_bytes());
        image.word(IDT64 + vector * 16, gate(selector::CODE64, handler, 0x8e, 0));
        image.word(IDT32 + vector * 8, gate(selector::CODE32, handler, 0x8e, 0));
    }
    image.descriptors(mode);
    image.tasks();
    image.page_tables();
    image.0
}

struct Image(Vec<u8>);

impl Image {
    fn bytes(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, at: u64, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn fill(&mut self, at: u64, len: usize, value: u8) {
        self.0[at as usize..at as usize + len].fill(value);
    }

    fn descriptors(&mut self, mode: Mode) {
        let flat = |access, flags| descriptor(0, 0xf_ffff, access, flags);
        let small = |access| descriptor(0, 0xffff, access, 0);
        let (task, task_kind) = if mode.is_long() { (TSS64, 0x8b) } else { (TSS32, 0x8b) };
        for (selector, value) in [
            (selector::CODE64, flat(0x9b, 0xa)),
            (selector::DATA, flat(0x93, 0xc)),
            (selector::CODE32, flat(0x9b, 0xc)),
            (selector::CODE16, small(0x9b)),
            (selector::DATA16, small(0x93)),
            (selector::USER_CODE32, flat(0xfb, 0xc)),
            (selector::USER_DATA, flat(0xf3, 0xc)),
            (selector::USER_CODE64, flat(0xfb, 0xa)),
            (selector::USER_CODE16, small(0xfb)),
            // Privilege levels 1 and 2.
            (0x58, flat(0xb3, 0xc)),
            (0x60, flat(0xbb, if mode.is_long() { 0xa } else { 0xc })),
            (0x68, flat(0xd3, 0xc)),
            (0x70, flat(0xdb, if mode.is_long() { 0xa } else { 0xc })),
            (selector::TASK, descriptor(task, 0x8f, task_kind, 0)),
            (selector::TABLE, descriptor(LDT, ENTRIES * 8 - 1, 0x82, 0)),
            (selector::OTHER_TASK32, descriptor(OTHER_TSS32, 0x67, 0x89, 0)),
            (selector::OTHER_TASK16, descriptor(OTHER_TSS16, 0x2b, 0x81, 0)),
        ] {
            self.word(GDT + u64::from(selector & !7), value);
        }
    }

    /// Stacks for more privilege; ports 0x40 to 0x47 for everybody.
    fn tasks(&mut self) {
        for (level, top) in (0u64..).zip(STACKS) {
            self.word(TSS64 + 4 + 8 * level, top);
            for task in [TSS32, OTHER_TSS32] {
                self.bytes(task + 4 + 8 * level, &(top as u32).to_le_bytes());
                let stack = [selector::DATA, 0x59, 0x6a][level as usize];
                self.bytes(task + 8 + 8 * level, &stack.to_le_bytes());
            }
        }
        for (index, top) in (0u64..).zip(INTERRUPT_STACKS) {
            self.word(TSS64 + 0x24 + 8 * index, top);
        }
        for task in [TSS64, TSS32] {
            self.bytes(task + 0x66, &0x68u16.to_le_bytes());
            self.fill(task + 0x68, 0x28, 0xff);
            self.fill(task + 0x70, 1, 0);
        }
        // What the other tasks begin with: EIP, EFLAGS, registers, segments.
        let other = OTHER_TSS32;
        self.bytes(other + 0x1c, &(self.root_of_tasks() as u32).to_le_bytes());
        self.bytes(other + 0x20, &(TARGET as u32 + 0x40).to_le_bytes());
        self.bytes(other + 0x24, &2u32.to_le_bytes());
        self.bytes(other + 0x38, &(STACK as u32 - 0x200).to_le_bytes());
        let segments = [selector::DATA, selector::CODE32, selector::DATA, selector::DATA, 0, 0];
        for (index, segment) in (0u64..).zip(segments) {
            self.bytes(other + 0x48 + 4 * index, &segment.to_le_bytes());
        }
        let other = OTHER_TSS16;
        self.bytes(other + 0x0e, &(TARGET as u16 + 0x80).to_le_bytes());
        self.bytes(other + 0x10, &2u16.to_le_bytes());
        self.bytes(other + 0x1a, &(STACK as u16 - 0x300).to_le_bytes());
        for (index, segment) in
            (0u64..).zip([selector::DATA16, selector::CODE16, selector::DATA16, selector::DATA16])
        {
            self.bytes(other + 0x22 + 2 * index, &segment.to_le_bytes());
        }
    }

    /// A task switch loads CR3; cases change this where it matters.
    fn root_of_tasks(&self) -> u64 {
        DIRECTORY32
    }

    fn page_tables(&mut self) {
        // Present, writable, for everybody, accessed, and the last level dirty: a case that sets bits shows.
        self.word(PML4, PDPT | 0x27);
        // PAE's top entries have no such bits.
        self.word(PDPT, DIRECTORY | 1);
        self.word(DIRECTORY, TABLE | 0x27);
        self.bytes(DIRECTORY32, &(TABLE32 as u32 | 0x27).to_le_bytes());
        for page in 0..(MEMORY / 0x1000) as u64 {
            self.word(TABLE + 8 * page, page * 0x1000 | 0x67);
            self.bytes(TABLE32 + 4 * page, &(page as u32 * 0x1000 | 0x67).to_le_bytes());
        }
    }
}

/// The entry of the top level of four that is PAE's too: long mode wants its rights.
pub(super) const LONG_PDPT_ENTRY: (u64, u64) = (PDPT, DIRECTORY | 0x27);
