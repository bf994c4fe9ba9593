//! Kernel and ramdisk files: whatever they hold, loading them is an error or leaves an entry inside guest memory.
//!
//! The input is raw bytes, or a list of changes to a file that is right.
#![no_main]

use std::sync::{Arc, OnceLock};

use harrier_engine::{GuestMemory, GuestRegion};
use harrier_fuzz::input::Input;
use harrier_machine::boot::{self, Boot, BytesImage, ElfEntry, Entry, Image};
use harrier_machine::memory::{Backing, GuestRam, Laid};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const MEMORY_BYTES: usize = 48 << 20;

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| {
        let regions = [(0, MEMORY_BYTES), (1 << 32, 1 << 20)]
            .map(|(gpa, len)| Arc::new(GuestRegion::from_range(GuestAddress(gpa), len, None).unwrap()))
            .to_vec();
        let memory = GuestMemory::from_arc_regions(regions.clone()).unwrap();
        GuestRam { memory, regions, backing: Backing::Own(Laid::default()) }
    })
}

/// An ELF file of a class with a note, two segments and a multiboot header in the first.
fn elf(wide: bool) -> Vec<u8> {
    let (header_len, entry_len) = if wide { (64u64, 56u64) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    let mut words: Vec<(u64, bool)> = Vec::new();
    let machine = if wide { 62u64 } else { 3 };
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&(machine as u16).to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    words.extend([(0x100_0010, true), (header_len, true), (0, true), (0, false)]);
    push(&mut file, &words, wide);
    for half in [header_len, entry_len, 3, 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let note = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x100_0020];
    let start = header_len + 3 * entry_len;
    let segments = [
        (4u64, start, 0u64, 20u64, 20u64),
        (1, start + 20, 0x100_0000, 64, 4096),
        (1, start + 84, 0x110_0000, 16, 16),
    ];
    for (kind, offset, address, file_len, memory_len) in segments {
        let mut words = vec![(kind, false)];
        if wide {
            words.push((5, false));
        }
        words.extend([offset, address, address, file_len, memory_len].map(|word| (word, true)));
        if !wide {
            words.push((5, false));
        }
        words.push((4, true));
        push(&mut file, &words, wide);
    }
    for word in note {
        file.extend_from_slice(&word.to_le_bytes());
    }
    let magic = 0x1bad_b002u32;
    for word in [magic, 3, 0u32.wrapping_sub(magic + 3), 0, 0, 0, 0, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.resize(file.len() + 64, 0x90);
    file
}

fn push(file: &mut Vec<u8>, words: &[(u64, bool)], wide: bool) {
    for (word, native) in words {
        if *native && wide {
            file.extend_from_slice(&word.to_le_bytes());
        } else {
            file.extend_from_slice(&(*word as u32).to_le_bytes());
        }
    }
}

fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 1024 + 0x1000];
    let mut set = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]);
    set(0x1f4, &0x100u32.to_le_bytes());
    set(0x1fe, &[0x55, 0xaa]);
    set(0x202, b"HdrS");
    set(0x206, &0x20fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(0x230, &0x20_0000u32.to_le_bytes());
    set(0x234, &[1]);
    set(0x236, &1u16.to_le_bytes());
    set(0x238, &2047u32.to_le_bytes());
    set(0x248, &0x300u32.to_le_bytes());
    set(0x24c, &0x100u32.to_le_bytes());
    set(0x258, &0x100_0000u64.to_le_bytes());
    set(0x260, &0x80_0000u32.to_le_bytes());
    file
}

/// A multiboot kernel with load addresses in its header.
fn multiboot() -> Vec<u8> {
    let flags = 0x1_0003u32;
    let magic = 0x1bad_b002u32;
    let mut file = Vec::new();
    for word in
        [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags), 0x10_0000, 0x10_0000, 0, 0, 0x10_0020]
    {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.resize(256, 0x90);
    file
}

fn archive() -> Vec<u8> {
    let mut file = Vec::new();
    for (name, data) in [("init\0", &b"#!/bin/sh\n"[..]), ("TRAILER!!!\0", b"")] {
        file.extend_from_slice(b"070701");
        for field in [1, 0o100_755, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len(), 0] {
            file.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        file.extend_from_slice(name.as_bytes());
        file.resize(file.len().next_multiple_of(4), 0);
        file.extend_from_slice(data);
        file.resize(file.len().next_multiple_of(4), 0);
    }
    file
}

fn change(mut file: Vec<u8>, input: &mut Input<'_>) -> Vec<u8> {
    for _ in 0..input.u8() % 8 {
        let at = usize::from(input.u16()) % file.len();
        let width = 1 << (input.u8() & 3);
        for (to, from) in file.iter_mut().skip(at).zip(input.take(width)) {
            *to = *from;
        }
    }
    if input.u8() & 7 == 0 {
        file.truncate(usize::from(input.u16()) % (file.len() + 1));
    }
    file
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choice = input.u8();
    let elf_entry = [ElfEntry::Auto, ElfEntry::Pvh, ElfEntry::Linux64][usize::from(choice >> 6) % 3];
    let ramdisk = match choice >> 4 & 3 {
        0 => None,
        1 => Some(change(archive(), &mut input)),
        2 => Some(change([vec![0; 512], archive(), vec![0; 8], archive()].concat(), &mut input)),
        _ => {
            let len = input.u16().into();
            Some(input.take(len).to_vec())
        }
    };
    let kernel = match choice & 7 {
        0 | 1 => change(elf(true), &mut input),
        2 => change(elf(false), &mut input),
        3 | 4 => change(bzimage(), &mut input),
        5 => change(multiboot(), &mut input),
        _ => input.take(usize::MAX).to_vec(),
    };
    let command_line = "x".repeat(usize::from(input.u8()) * 16);
    let kernel = BytesImage::new("kernel", &kernel);
    let ramdisk = ramdisk.as_ref().map(|bytes| BytesImage::new("initrd", bytes));
    let boot = Boot::Kernel {
        kernel: &kernel,
        initrd: ramdisk.as_ref().map(|image| image as &dyn Image),
        command_line: &command_line,
        elf_entry,
    };
    match boot::load(&boot, ram()) {
        Ok(Entry::Long64 { rip, .. }) => assert!(ram().memory.address_in_range(GuestAddress(rip))),
        Ok(Entry::Protected32 { eip, .. }) => {
            assert!(ram().memory.address_in_range(GuestAddress(eip.into())))
        }
        Ok(Entry::Real { .. }) => panic!("no kernel starts in real mode"),
        Err(err) => assert!(!err.to_string().contains('\n')),
    }
});
