//! Code whose translation changes under it: by another CR3, by INVLPG.

use crate::machine::*;

/// Where the upper half has one page of code, and where the code is in it: away from what the dispatcher's cache
/// could confuse with the code at [`CODE`].
const HIGH: u64 = 0xffff_8000_0000_0000;
const OFFSET: u64 = 0x345;
/// `add ebx, 1; ret` and `add ebx, 0x100; ret`.
const FIRST: u64 = 0x14000;
const SECOND: u64 = 0x15000;
const OTHER_ROOT: u64 = 0x24000;
const GLOBAL: u64 = 1 << 8;

/// Maps [`HIGH`] to a page under a root, with tables at `tables`; answers where the last entry is.
fn map_high(machine: &Machine, root: u64, tables: u64, page: u64, bits: u64) -> u64 {
    machine.write_u64(root + 256 * 8, tables | 3);
    machine.write_u64(tables, tables + 0x1000 | 3);
    machine.write_u64(tables + 0x1000, tables + 0x2000 | 3);
    machine.write_u64(tables + 0x2000, page | 3 | bits);
    tables + 0x2000
}

/// A machine with both pages, the first one mapped; the address of its entry.
fn machine_with_pages(bits: u64) -> (Machine, Box<dyn harrier_engine::Vcpu>, u64) {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(FIRST + OFFSET, &[0x83, 0xc3, 0x01, 0xc3]);
    machine.write(SECOND + OFFSET, &[0x81, 0xc3, 0x00, 0x01, 0x00, 0x00, 0xc3]);
    let root = vcpu.state().unwrap().control.cr3;
    let entry = map_high(&machine, root, 0x20000, FIRST, bits);
    let low: [u64; 1] = machine.read(root);
    machine.write_u64(OTHER_ROOT, low[0]);
    map_high(&machine, OTHER_ROOT, 0x25000, SECOND, 0);
    edit(&mut *vcpu, |state| {
        state.regs.gpr[0] = HIGH + OFFSET;
        state.regs.gpr[1] = OTHER_ROOT;
        state.regs.gpr[3] = 0;
        state.regs.gpr[6] = entry;
        state.regs.gpr[7] = SECOND | 3 | bits;
        state.control.cr4 |= 1 << 7;
    });
    (machine, vcpu, entry)
}

#[test]
fn another_address_space_has_its_own_code_in_the_upper_half() {
    let (machine, mut vcpu, _) = machine_with_pages(0);
    // call rax; call rax; mov cr3, rcx; call rax
    machine.write(CODE, &[&[0xff, 0xd0, 0xff, 0xd0, 0x0f, 0x22, 0xd9, 0xff, 0xd0], LEAVE].concat());
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[3], 0x102);
}

#[test]
fn invlpg_ends_the_old_translation_of_code_global_or_not() {
    for bits in [0, GLOBAL] {
        let (machine, mut vcpu, entry) = machine_with_pages(bits);
        // call rax; mov [rsi], rdi; invlpg [rax]; call rax
        machine.write(CODE, &[&[0xff, 0xd0, 0x48, 0x89, 0x3e, 0x0f, 0x01, 0x38, 0xff, 0xd0], LEAVE].concat());
        let (state, _) = run(&mut *vcpu);
        assert_eq!(state.regs.gpr[3], 0x101, "bits {bits:#x}");
        assert_eq!(machine.read::<1>(entry)[0] & !0x60, SECOND | 3 | bits);
    }
}

#[test]
fn invlpg_inside_a_large_page_ends_the_translation_of_all_of_it() {
    let (machine, mut vcpu, _) = machine_with_pages(0);
    // The upper half maps the first 2 MiB by a large page, later by a table.
    machine.write_u64(0x21000, 0x83);
    edit(&mut *vcpu, |state| {
        state.regs.gpr[0] = HIGH + FIRST + OFFSET;
        state.regs.gpr[6] = 0x21000;
        state.regs.gpr[7] = 0x22003;
        state.regs.gpr[2] = HIGH + 0x1f_0000;
    });
    // Now a table whose page at the same place is the other code.
    machine.write_u64(0x22000 + 8 * (FIRST >> 12), SECOND | 3);
    // call rax; mov [rsi], rdi; invlpg [rdx]; call rax
    machine.write(CODE, &[&[0xff, 0xd0, 0x48, 0x89, 0x3e, 0x0f, 0x01, 0x3a, 0xff, 0xd0], LEAVE].concat());
    let (state, _) = run(&mut *vcpu);
    assert_eq!(state.regs.gpr[3], 0x101);
}
