//! Decoded blocks and the cache that holds them.
//!
//! A block is straight-line code from one physical address to the first instruction that ends it, the end of
//! its page, [`MAX_OPS`] or [`MAX_BYTES`]. Only a block's first and only instruction may cross into the next page. Blocks are
//! keyed by physical address and mode; a direct-mapped jump cache in front is keyed by RIP.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use super::Mode;
use super::lower::{self, Lowered};
use super::op::{Op, Stop};
use crate::cpu::{CS, Cpu};
use crate::exec::fused;
use crate::fault::vector;
use crate::mmu::map::chunk_mask;
use crate::mmu::{Intent, PAGE, Rights};
use crate::native::mem;

/// WBNOINVD is WBINVD with a prefix; and what one processor prefetches with, another takes for a NOP.
const OPTIONS: u32 = DecoderOptions::NO_WBNOINVD | DecoderOptions::FORCE_RESERVED_NOP;
/// Most operations in a block.
const MAX_OPS: usize = 64;
/// Longest instruction in bytes (Intel SDM volume 2, 2.3.11).
const MAX_INSTRUCTION: usize = 15;
/// Most bytes of code in a block; few blocks are longer than a fifth of it.
const MAX_BYTES: usize = 192;
/// Operations that the cache holds before it is emptied; 32 bytes each.
const MAX_CACHED_OPS: usize = 512 * 1024;
/// With room for more operations than this, the cache is worth giving back: a quarter of a mebibyte and more.
const LARGE_OPS: usize = 4096;
const JUMP_BITS: u32 = 12;
/// No second page.
const NO_PAGE: u64 = u64::MAX;

/// A decoded piece of code.
#[derive(Clone, Copy)]
struct Block {
    first: u32,
    count: u32,
    /// Length of the code in bytes.
    len: u32,
    /// Physical pages that hold the code; the second is `u64::MAX` unless the instruction crosses.
    pages: [u64; 2],
    gpa: u64,
    mode: Mode,
    valid: bool,
}

/// What the dispatcher needs of a block, by RIP.
#[derive(Clone, Copy)]
pub(crate) struct Jump {
    rip: u64,
    key: u64,
    /// The block's pages.
    pub pages: [u64; 2],
    first: u32,
    count: u16,
    /// Length of the code in bytes.
    pub len: u16,
}

const NO_JUMP: Jump = Jump { rip: 0, key: 0, pages: [NO_PAGE; 2], first: 0, count: 0, len: 0 };

#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

type AddressMap<V> = HashMap<u64, V, BuildHasherDefault<AddressHasher>>;

/// The decoded code of one vCPU.
pub(crate) struct CodeCache {
    ops: Vec<Op>,
    blocks: Vec<Block>,
    by_address: AddressMap<u32>,
    by_page: AddressMap<Vec<u32>>,
    jumps: Box<[Jump; 1 << JUMP_BITS]>,
    /// Operations in a block at most.
    max_ops: usize,
    /// Blocks thrown away because their code was written.
    pub invalidations: u64,
}

impl CodeCache {
    pub(crate) fn new() -> CodeCache {
        CodeCache {
            ops: Vec::new(),
            blocks: Vec::new(),
            by_address: AddressMap::default(),
            by_page: AddressMap::default(),
            jumps: Box::new([NO_JUMP; 1 << JUMP_BITS]),
            max_ops: MAX_OPS,
            invalidations: 0,
        }
    }

    /// Decodes no more than one instruction at a time from now on: for who executes one and forgets.
    pub(crate) fn one_by_one(&mut self) {
        self.max_ops = 1;
    }

    /// What a jump cache entry depends on besides RIP.
    #[inline(always)]
    fn key(cpu: &Cpu, rip: u64) -> u64 {
        cpu.mmu.code_generation_at(rip) << 3 | u64::from(cpu.cpl == 3) << 2 | cpu.mode as u64
    }

    /// The block at RIP. The answer stays valid until the next call.
    #[inline(always)]
    pub(crate) fn find(&mut self, cpu: &mut Cpu) -> Result<(&Jump, &[Op]), Stop> {
        let rip = cpu.rip;
        let key = Self::key(cpu, rip);
        let slot = Self::slot(rip);
        let jump = &self.jumps[slot];
        if jump.rip != rip || jump.key != key {
            self.find_slow(cpu)?;
        }
        let jump = &self.jumps[slot];
        let first = jump.first as usize;
        Ok((jump, &self.ops[first..first + usize::from(jump.count)]))
    }

    #[inline(always)]
    fn slot(rip: u64) -> usize {
        (rip ^ rip >> JUMP_BITS) as usize & ((1 << JUMP_BITS) - 1)
    }

    #[cold]
    #[inline(never)]
    fn find_slow(&mut self, cpu: &mut Cpu) -> Result<(), Stop> {
        let rip = cpu.rip;
        let va = if cpu.mode == Mode::Bits64 {
            rip
        } else {
            if rip > u64::from(cpu.seg[CS].limit) {
                return cpu.raise_gp();
            }
            rip.wrapping_add(cpu.seg_base[CS]) & 0xffff_ffff
        };
        let gpa = fetch_address(cpu, va)?;
        let address_key = gpa << 2 | cpu.mode as u64;
        let mut found = self.by_address.get(&address_key).copied();
        if let Some(index) = found {
            let second = self.blocks[index as usize].pages[1];
            if second != NO_PAGE && fetch_address(cpu, (va | (PAGE - 1)).wrapping_add(1))? != second {
                found = None;
            }
        }
        let index = match found {
            Some(index) => index,
            None => self.decode(cpu, va, gpa, address_key)?,
        };
        cpu.mmu.note_code_address(va);
        let block = &self.blocks[index as usize];
        if block.pages[1] != NO_PAGE {
            cpu.mmu.note_code_address((va | (PAGE - 1)).wrapping_add(1));
        }
        // The key is taken again: translating may have changed it.
        self.jumps[Self::slot(rip)] = Jump {
            rip,
            key: Self::key(cpu, rip),
            pages: block.pages,
            first: block.first,
            count: block.count as u16,
            len: block.len as u16,
        };
        Ok(())
    }

    fn decode(&mut self, cpu: &mut Cpu, va: u64, gpa: u64, address_key: u64) -> Result<u32, Stop> {
        if self.ops.len() > MAX_CACHED_OPS {
            self.clear();
            cpu.mmu.code_generation += 1;
        }
        let mode = cpu.mode;
        let first = self.ops.len();
        let in_page = (PAGE - (gpa & (PAGE - 1))) as usize;
        loop {
            let mut bytes = [0u8; MAX_BYTES + MAX_INSTRUCTION];
            let window = in_page.min(MAX_BYTES);
            read_code(cpu, gpa, &mut bytes[..window])?;
            let mut len = self.decode_ops(cpu, &bytes[..window], mode);
            let mut pages = [gpa & !(PAGE - 1), NO_PAGE];
            if len == 0 {
                // Not even one instruction fits: it crosses into the next page.
                let second = fetch_address(cpu, (va | (PAGE - 1)).wrapping_add(1))?;
                read_code(cpu, second, &mut bytes[window..window + MAX_INSTRUCTION])?;
                len = self.decode_one(cpu, &bytes[..window + MAX_INSTRUCTION], mode);
                pages[1] = second;
            }
            // From here on writes to the code are noticed; what was written before shows in the bytes.
            let here = len.min(in_page);
            note_code(cpu, gpa, here);
            if pages[1] != NO_PAGE {
                note_code(cpu, pages[1], len - here);
            }
            let mut again = [0u8; MAX_BYTES + MAX_INSTRUCTION];
            read_code(cpu, gpa, &mut again[..here])?;
            if pages[1] != NO_PAGE {
                read_code(cpu, pages[1], &mut again[here..len])?;
            }
            if again[..len] != bytes[..len] {
                self.ops.truncate(first);
                continue;
            }
            if let Some(last) = self.ops.last_mut() {
                last.exec = crate::exec::system::at_block_end(last.exec);
            }
            let index = self.blocks.len() as u32;
            self.blocks.push(Block {
                first: first as u32,
                count: (self.ops.len() - first) as u32,
                len: len as u32,
                pages,
                gpa,
                mode,
                valid: true,
            });
            self.by_address.insert(address_key, index);
            for page in pages.into_iter().filter(|&page| page != NO_PAGE) {
                self.by_page.entry(page).or_default().push(index);
            }
            return Ok(index);
        }
    }

    /// Decodes whole instructions from the start of `bytes`; answers their length.
    fn decode_ops(&mut self, cpu: &Cpu, bytes: &[u8], mode: Mode) -> usize {
        let mut decoder = Decoder::with_ip(mode.bits(), bytes, 0, OPTIONS);
        let mut instruction = Instruction::default();
        let mut before = Instruction::default();
        for _ in 0..self.max_ops {
            let at = decoder.position();
            if !decoder.can_decode() {
                break;
            }
            decoder.decode_out(&mut instruction);
            if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() - at < MAX_INSTRUCTION {
                return at;
            }
            let raw = &bytes[at..];
            if at > 0
                && mode == Mode::Bits64
                && let Some(op) = self.ops.last_mut()
            {
                fused::fuse(op, &before, &instruction);
            }
            before = instruction;
            if self.push(cpu, &instruction, raw, at, mode) {
                return at + self.ops.last().map_or(0, |op| usize::from(op.len));
            }
        }
        decoder.position()
    }

    fn decode_one(&mut self, cpu: &Cpu, bytes: &[u8], mode: Mode) -> usize {
        let mut decoder = Decoder::with_ip(mode.bits(), bytes, 0, OPTIONS);
        let instruction = decoder.decode();
        self.push(cpu, &instruction, bytes, 0, mode);
        self.ops.last().map_or(1, |op| usize::from(op.len))
    }

    /// Lowers one instruction; true when it ends the block.
    fn push(&mut self, cpu: &Cpu, instruction: &Instruction, raw: &[u8], pc: usize, mode: Mode) -> bool {
        let Lowered { mut op, ends } = lower::lower(cpu, instruction, raw, mode);
        op.pc = pc as u16;
        op.len = instruction.len().clamp(1, MAX_INSTRUCTION) as u8;
        self.ops.push(op);
        ends
    }

    /// Throws away the blocks that touch these chunks of a page.
    pub(crate) fn invalidate(&mut self, page: u64, chunks: u64) {
        let Some(list) = self.by_page.get_mut(&page) else { return };
        let (blocks, by_address) = (&mut self.blocks, &mut self.by_address);
        let mut dropped = 0;
        list.retain(|&index| {
            let block = &mut blocks[index as usize];
            if !block.valid {
                return false;
            }
            let here = if page == block.pages[0] {
                chunk_mask(block.gpa & (PAGE - 1), u64::from(block.len).min(PAGE - (block.gpa & (PAGE - 1))))
            } else {
                1
            };
            if here & chunks == 0 {
                return true;
            }
            block.valid = false;
            dropped += 1;
            let key = block.gpa << 2 | block.mode as u64;
            if by_address.get(&key) == Some(&index) {
                by_address.remove(&key);
            }
            false
        });
        self.invalidations += dropped;
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.ops.clear();
        self.blocks.clear();
        self.by_address.clear();
        self.by_page.clear();
    }

    /// Whether it holds enough memory to be worth giving back.
    pub(crate) fn is_large(&self) -> bool {
        self.ops.capacity() > LARGE_OPS
    }

    /// Forgets everything and gives its memory back. The caller makes the jump cache's keys invalid.
    pub(crate) fn release(&mut self) {
        self.ops = Vec::new();
        self.blocks = Vec::new();
        self.by_address = AddressMap::default();
        self.by_page = AddressMap::default();
    }
}

/// Guest physical address of code, with the right to execute checked.
fn fetch_address(cpu: &mut Cpu, va: u64) -> Result<u64, Stop> {
    let va = if cpu.mode == Mode::Bits64 { va } else { va & 0xffff_ffff };
    let rights = if cpu.cpl == 3 { Rights::User } else { Rights::Supervisor };
    match cpu.mmu.tlb.fetch(rights, va) {
        Some(gpa) => Ok(gpa),
        None => cpu.translate(va, rights, Intent::Fetch),
    }
}

fn read_code(cpu: &mut Cpu, gpa: u64, out: &mut [u8]) -> Result<(), Stop> {
    let map = Arc::clone(&cpu.mmu.map);
    match map.page(gpa) {
        Some(page) => {
            mem::read_bytes(page.ptr(gpa), out);
            Ok(())
        }
        None => {
            cpu.unsupported = Some(format!("executing code at {gpa:#x}, where there is no memory"));
            cpu.raise(vector::UD)
        }
    }
}

/// Marks a range as holding decoded code.
pub(crate) fn note_code(cpu: &mut Cpu, gpa: u64, len: usize) {
    let map = Arc::clone(&cpu.mmu.map);
    let Some(page) = map.page(gpa) else { return };
    if page.add_code(chunk_mask(gpa & (PAGE - 1), len as u64)) == 0 {
        cpu.mmu.tlb.protect_host_page(page.host());
        cpu.lent.protect(gpa);
        cpu.shared.new_code_page(cpu.index, gpa & !(PAGE - 1));
    }
}
