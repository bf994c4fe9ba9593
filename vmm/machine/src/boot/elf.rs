//! ELF kernels: everything in the file is checked before a byte of it reaches guest memory.
//!
//! The result is an [`ElfPlan`] whose segments lie in guest memory, do not overlap and are wholly in the file.
//! Formats: Tool Interface Standard ELF 1.2, System V ABI AMD64 supplement; PVH entry note: Xen public header
//! `elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`.

use std::ops::Range;

use harrier_engine::GuestMemory;

use super::image::{self, Image};
use super::{KernelError, ram_run_end};
use crate::layout::KERNEL_START;
use crate::memory::{ByteSize, GuestRam};

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const ET_EXEC: u16 = 2;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const NOTE_PHYS32_ENTRY: u32 = 18;
/// A kernel has a handful of program headers.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Notes beyond this many bytes of a segment are not looked at.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// Word size of an ELF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// ELFCLASS32.
    Elf32,
    /// ELFCLASS64.
    Elf64,
}

/// One piece of the file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest physical address.
    pub(super) gpa: u64,
    /// Bytes in memory; what the file does not give stays zero.
    pub(super) memory_bytes: u64,
    /// Where the file's bytes begin.
    pub(super) file_offset: u64,
    /// How many the file gives; at most `memory_bytes`.
    pub(super) file_bytes: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.memory_bytes)
    }

    fn contains(&self, gpa: u64) -> bool {
        (self.gpa..self.end()).contains(&gpa)
    }
}

/// A checked ELF kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ElfPlan {
    /// Word size.
    pub(super) class: Class,
    /// Sorted by address, at least one.
    pub(super) segments: Vec<Segment>,
    /// The header's entry address; inside a segment.
    pub(super) entry: u64,
    /// The 32-bit entry that the PVH note names; inside a segment.
    pub(super) pvh_entry: Option<u64>,
    /// Whether a note says that this is Linux, whose header's entry is that of the 64-bit boot protocol.
    pub(super) is_linux: bool,
    /// First address behind the last segment.
    pub(super) end: u64,
}

struct Header {
    class: Class,
    machine: u16,
    kind: u16,
    entry: u64,
    table_offset: u64,
    entry_len: u16,
    count: u16,
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

/// Whether the image begins like an ELF file.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Checks the whole file against `memory`. Segments lie above 1 MiB, or in `low` if there is room for them below.
pub(super) fn plan(
    image: &dyn Image,
    low: Option<Range<u64>>,
    memory: &GuestMemory,
) -> Result<ElfPlan, KernelError> {
    let name = || image.name().to_owned();
    let header = read_header(image)?;
    match (header.class, header.machine) {
        (Class::Elf64, EM_X86_64) | (Class::Elf32, EM_386) => {}
        (_, machine) => {
            return Err(KernelError::ForeignArchitecture { name: name(), machine: machine_name(machine) });
        }
    }
    let program_headers = read_program_headers(image, &header)?;
    if header.kind != ET_EXEC || program_headers.iter().any(|ph| ph.kind == PT_INTERP) {
        return Err(KernelError::NotAKernel { name: name(), what: "an ELF program, library or object file" });
    }
    let mut segments = Vec::new();
    let mut notes = Notes::default();
    for ph in &program_headers {
        match ph.kind {
            PT_LOAD if ph.memory_bytes != 0 => segments.push(check_segment(image, ph, low.as_ref(), memory)?),
            PT_NOTE if header.class == Class::Elf64 => notes.add(read_notes(image, ph)?),
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.gpa);
    for (a, b) in segments.iter().zip(segments.iter().skip(1)) {
        if b.gpa < a.end() {
            return Err(KernelError::SegmentsOverlap { name: name(), first: a.gpa, second: b.gpa });
        }
    }
    let Some(end) = segments.last().map(Segment::end) else {
        return Err(KernelError::NotAKernel { name: name(), what: "an ELF file without loadable segments" });
    };
    let Notes { pvh_entry, is_linux } = notes;
    for entry in pvh_entry.into_iter().chain([header.entry]) {
        if !segments.iter().any(|segment| segment.contains(entry)) {
            return Err(KernelError::EntryOutside { name: name(), entry });
        }
    }
    Ok(ElfPlan { class: header.class, segments, entry: header.entry, pvh_entry, is_linux, end })
}

/// Copies the segments of a checked file.
pub(super) fn load(image: &dyn Image, plan: &ElfPlan, ram: &GuestRam) -> Result<(), KernelError> {
    for segment in &plan.segments {
        image::copy(image, segment.file_offset, segment.file_bytes, ram, segment.gpa)?;
    }
    Ok(())
}

fn truncated(image: &dyn Image, needed: u64) -> KernelError {
    KernelError::Truncated { name: image.name().to_owned(), len: image.len_bytes(), needed }
}

fn read_header(image: &dyn Image) -> Result<Header, KernelError> {
    let head: [u8; 64] = image::head(image)?;
    let is_64 = head[4] == 2;
    let needed = if is_64 { 64 } else { 52 };
    if image.len_bytes() < needed {
        return Err(truncated(image, needed));
    }
    let word16 = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let word32 = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let word64 = |at: usize| u64::from(word32(at)) | u64::from(word32(at + 4)) << 32;
    match (head[4], head[5]) {
        (1 | 2, 1) => {}
        (1 | 2, 2) => {
            return Err(KernelError::ForeignArchitecture {
                name: image.name().to_owned(),
                machine: machine_name(u16::from_be_bytes([head[18], head[19]])),
            });
        }
        _ => {
            return Err(KernelError::NotAKernel {
                name: image.name().to_owned(),
                what: "a damaged ELF file (its class or byte order is invalid)",
            });
        }
    }
    Ok(if is_64 {
        Header {
            class: Class::Elf64,
            kind: word16(16),
            machine: word16(18),
            entry: word64(24),
            table_offset: word64(32),
            entry_len: word16(54),
            count: word16(56),
        }
    } else {
        Header {
            class: Class::Elf32,
            kind: word16(16),
            machine: word16(18),
            entry: u64::from(word32(24)),
            table_offset: u64::from(word32(28)),
            entry_len: word16(42),
            count: word16(44),
        }
    })
}

fn read_program_headers(image: &dyn Image, header: &Header) -> Result<Vec<ProgramHeader>, KernelError> {
    let name = || image.name().to_owned();
    let expected: u16 = if header.class == Class::Elf64 { 56 } else { 32 };
    if header.count == 0 || header.count > MAX_PROGRAM_HEADERS || header.entry_len != expected {
        return Err(KernelError::NotAKernel {
            name: name(),
            what: "an ELF file with an invalid program header table",
        });
    }
    let len = u64::from(header.count) * u64::from(expected);
    let end = header.table_offset.checked_add(len).ok_or_else(|| truncated(image, u64::MAX))?;
    if end > image.len_bytes() {
        return Err(truncated(image, end));
    }
    let mut table = vec![0; usize::from(header.count) * usize::from(expected)];
    image::read(image, header.table_offset, &mut table)?;
    Ok(table.chunks_exact(usize::from(expected)).map(|raw| parse_program_header(raw, header.class)).collect())
}

fn parse_program_header(raw: &[u8], class: Class) -> ProgramHeader {
    let word32 =
        |at: usize| raw.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    let word64 = |at: usize| u64::from(word32(at)) | u64::from(word32(at + 4)) << 32;
    match class {
        Class::Elf64 => ProgramHeader {
            kind: word32(0),
            offset: word64(8),
            paddr: word64(24),
            file_bytes: word64(32),
            memory_bytes: word64(40),
            align: word64(48),
        },
        Class::Elf32 => ProgramHeader {
            kind: word32(0),
            offset: word32(4).into(),
            paddr: word32(12).into(),
            file_bytes: word32(16).into(),
            memory_bytes: word32(20).into(),
            align: word32(28).into(),
        },
    }
}

fn check_segment(
    image: &dyn Image,
    ph: &ProgramHeader,
    low: Option<&Range<u64>>,
    memory: &GuestMemory,
) -> Result<Segment, KernelError> {
    let name = || image.name().to_owned();
    let outside =
        || KernelError::SegmentOutside { name: name(), gpa: ph.paddr, memory_bytes: ph.memory_bytes };
    if ph.file_bytes > ph.memory_bytes {
        return Err(KernelError::NotAKernel {
            name: name(),
            what: "an ELF file with a segment that is larger in the file than in memory",
        });
    }
    let file_end = ph.offset.checked_add(ph.file_bytes).ok_or_else(|| truncated(image, u64::MAX))?;
    if file_end > image.len_bytes() {
        return Err(truncated(image, file_end));
    }
    let end = ph.paddr.checked_add(ph.memory_bytes).ok_or_else(outside)?;
    let below = low.is_some_and(|low| low.start <= ph.paddr && end <= low.end);
    if ph.paddr < KERNEL_START && !below {
        return Err(outside());
    }
    let low_end = ram_run_end(memory, KERNEL_START);
    if ram_run_end(memory, ph.paddr) < end {
        // With more memory it would fit, unless it reaches into the device hole.
        if end <= crate::layout::MMIO_HOLE_START && end > low_end {
            return Err(KernelError::MemoryTooSmall {
                name: name(),
                needed: ByteSize(end.next_multiple_of(1 << 20)),
                have: ByteSize(low_end),
            });
        }
        return Err(outside());
    }
    Ok(Segment {
        gpa: ph.paddr,
        memory_bytes: ph.memory_bytes,
        file_offset: ph.offset,
        file_bytes: ph.file_bytes,
    })
}

/// What the notes of a kernel say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Notes {
    pvh_entry: Option<u64>,
    is_linux: bool,
}

impl Notes {
    /// Adds what a further segment says; of two entries the first holds.
    fn add(&mut self, other: Notes) {
        self.pvh_entry = self.pvh_entry.or(other.pvh_entry);
        self.is_linux |= other.is_linux;
    }
}

fn read_notes(image: &dyn Image, ph: &ProgramHeader) -> Result<Notes, KernelError> {
    let end = ph.offset.checked_add(ph.file_bytes).ok_or_else(|| truncated(image, u64::MAX))?;
    if end > image.len_bytes() {
        return Err(truncated(image, end));
    }
    let mut bytes = vec![0; usize::try_from(ph.file_bytes.min(MAX_NOTE_BYTES)).unwrap_or(0)];
    image::read(image, ph.offset, &mut bytes)?;
    let mut notes = Notes::default();
    parse_notes(&bytes, if ph.align == 8 { 8 } else { 4 }, &mut notes);
    Ok(notes)
}

/// Reads notes up to the end or to the first that is damaged (None either way).
fn parse_notes(bytes: &[u8], align: usize, notes: &mut Notes) -> Option<()> {
    let word32 = |at: usize| {
        let word = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(word.try_into().ok()?))
    };
    let mut at = 0usize;
    loop {
        let name_len = usize::try_from(word32(at)?).ok()?;
        let desc_len = usize::try_from(word32(at + 4)?).ok()?;
        let kind = word32(at + 8)?;
        let name_at = at + 12;
        let name_end = name_at.checked_add(name_len)?;
        let desc_at = name_end.checked_next_multiple_of(align)?;
        match bytes.get(name_at..name_end)? {
            b"Xen\0" if kind == NOTE_PHYS32_ENTRY && desc_len >= 4 => {
                notes.add(Notes { pvh_entry: Some(word32(desc_at)?.into()), is_linux: false });
            }
            b"Linux\0" => notes.is_linux = true,
            _ => {}
        }
        at = desc_at.checked_add(desc_len)?.checked_next_multiple_of(align)?;
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        8 => "MIPS".to_owned(),
        20 | 21 => "PowerPC".to_owned(),
        22 => "S/390".to_owned(),
        40 => "32-bit ARM".to_owned(),
        62 => "x86-64".to_owned(),
        183 => "ARM64".to_owned(),
        243 => "RISC-V".to_owned(),
        258 => "LoongArch".to_owned(),
        other => format!("ELF machine {other}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::image::BytesImage;
    use super::*;

    /// Builds small ELF files; segments are (type, paddr, file bytes, memory bytes).
    pub(crate) fn elf64(entry: u64, segments: &[(u32, u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        file.resize(16, 0);
        file.extend_from_slice(&2u16.to_le_bytes());
        file.extend_from_slice(&62u16.to_le_bytes());
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&entry.to_le_bytes());
        file.extend_from_slice(&64u64.to_le_bytes());
        file.extend_from_slice(&[0; 8 + 4]);
        file.extend_from_slice(&64u16.to_le_bytes());
        file.extend_from_slice(&56u16.to_le_bytes());
        file.extend_from_slice(&(segments.len() as u16).to_le_bytes());
        file.resize(64, 0);
        let mut offset = 64 + 56 * segments.len() as u64;
        for (kind, paddr, bytes, memory_bytes) in segments {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&5u32.to_le_bytes());
            for word in [offset, *paddr, *paddr, bytes.len() as u64, *memory_bytes, 4] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        for (_, _, bytes, _) in segments {
            file.extend_from_slice(bytes);
        }
        file
    }

    pub(crate) fn pvh_note(entry: u32) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 20, 3] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"GNU\0");
        note.extend_from_slice(&[0; 20]);
        for word in [4u32, 4, 18] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&entry.to_le_bytes());
        note
    }

    /// What `BUILD_SALT` of Linux's include/linux/build-salt.h makes.
    pub(crate) fn linux_note() -> Vec<u8> {
        let mut note = Vec::new();
        for word in [6u32, 1, 0x100] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"Linux\0\0\0");
        note.extend_from_slice(&[0; 4]);
        note
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 32 << 20)]).unwrap()
    }

    fn plan_of(bytes: &[u8]) -> Result<ElfPlan, String> {
        plan(&BytesImage::new("k", bytes), None, &memory()).map_err(|err| err.to_string())
    }

    #[test]
    fn segments_and_both_entries_are_found() {
        let note = pvh_note(0x100_0010);
        let file = elf64(
            0x100_0000,
            &[
                (PT_LOAD, 0x110_0000, &[1; 8], 16),
                (PT_LOAD, 0x100_0000, &[2; 32], 32),
                (PT_NOTE, 0, &note, 0),
            ],
        );
        let plan = plan_of(&file).unwrap();
        assert_eq!((plan.entry, plan.pvh_entry, plan.end), (0x100_0000, Some(0x100_0010), 0x110_0010));
        assert_eq!(plan.segments.iter().map(|s| s.gpa).collect::<Vec<_>>(), [0x100_0000, 0x110_0000]);
    }

    #[test]
    fn every_truncation_of_a_kernel_is_an_error() {
        let note = pvh_note(0x100_0000);
        let file = elf64(0x100_0000, &[(PT_NOTE, 0, &note, 0), (PT_LOAD, 0x100_0000, &[2; 32], 32)]);
        plan_of(&file).unwrap();
        for len in 0..file.len() {
            assert!(plan_of(&file[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn overlapping_outside_and_oversized_segments_are_refused() {
        let load = |a: (u64, u64), b: (u64, u64)| {
            plan_of(&elf64(a.0, &[(PT_LOAD, a.0, &[0; 4], a.1), (PT_LOAD, b.0, &[0; 4], b.1)])).unwrap_err()
        };
        let text = load((0x100_0000, 0x1001), (0x100_1000, 8));
        assert_eq!(
            text,
            "kernel 'k': its segments at 0x1000000 and 0x1001000 overlap: the file is damaged, build it again"
        );
        for outside in
            [(0x1000, 8), (u64::MAX - 4, 8), (0xc000_0000, 8), (0x20_0000_0000, 8), (0xbfff_fffc, 8)]
        {
            assert!(load((0x100_0000, 8), outside).contains("outside"), "{outside:x?}");
        }
        let text = load((0x100_0000, 8), (0x1ff_fffc, 8));
        assert_eq!(text, "kernel 'k' needs 33M of memory and the machine has 32M there: give more memory");
    }

    #[test]
    fn foreign_and_unfit_files_are_named() {
        let good = elf64(0x100_0000, &[(PT_LOAD, 0x100_0000, &[2; 32], 32)]);
        let changed = |at: usize, value: u8| {
            let mut file = good.clone();
            file[at] = value;
            plan_of(&file).unwrap_err()
        };
        assert!(changed(18, 183).contains("is for ARM64"));
        assert!(changed(16, 3).contains("is an ELF program"));
        assert!(changed(4, 9).contains("damaged ELF"));
        assert!(changed(54, 55).contains("invalid program header table"));
        assert!(changed(26, 2).contains("entry 0x1020000") || changed(26, 2).contains("entry"));
    }

    #[test]
    fn hostile_notes_end_the_search() {
        let parse = |bytes: &[u8], align| {
            let mut notes = Notes::default();
            parse_notes(bytes, align, &mut notes);
            notes
        };
        assert_eq!(parse(&pvh_note(7), 4), Notes { pvh_entry: Some(7), is_linux: false });
        let both = [pvh_note(7), linux_note(), pvh_note(8), vec![0xff; 16]].concat();
        assert_eq!(parse(&both, 4), Notes { pvh_entry: Some(7), is_linux: true });
        assert_eq!(parse(&[0xff; 64], 4), Notes::default());
        assert_eq!(parse(&[0; 4096], 8), Notes::default());
        assert_eq!(parse(&[], 4), Notes::default());
    }
}
