//! What a PC's firmware leaves behind and real-mode programs count on: interrupt lines with vectors. There is no 8259
//! here, so the lines go through the I/O APIC, at the vectors that the 8259s would give them.

/// A piece of code in front of a 32-bit ELF program, as a program header of its own.
const CODE_GPA: u32 = 0x7800;
const LOCAL_APIC_SPURIOUS: u32 = 0xfee0_00f0;
const IO_APIC_SELECT: u32 = 0xfec0_0000;
const IO_APIC_WINDOW: u32 = 0xfec0_0010;
/// First redirection entry, two registers each.
const REDIRECTION: u32 = 0x10;
/// Software-enabled, spurious vector 0xff.
const ENABLED: u32 = 0x1ff;

const ENTRY_AT: usize = 24;
const TABLE_AT: usize = 28;
const COUNT_AT: usize = 44;
const PROGRAM_HEADER_BYTES: usize = 32;

/// The program with the code in front of it; `None` if it is no 32-bit ELF file.
pub(super) fn put_before(program: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| program.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    if !program.starts_with(b"\x7fELF\x01\x01") {
        return None;
    }
    let table = usize::try_from(word(TABLE_AT)?).ok()?;
    let count = u16::try_from(word(COUNT_AT)? & 0xffff).ok()?;
    let headers = program.get(table..table.checked_add(usize::from(count) * PROGRAM_HEADER_BYTES)?)?;
    let code = code(word(ENTRY_AT)?);
    let code_len = u32::try_from(code.len()).ok()?;

    let mut file = program.to_vec();
    let code_at = u32::try_from(file.len()).ok()?;
    file.extend(code);
    file.resize(file.len().next_multiple_of(4), 0);
    let table = u32::try_from(file.len()).ok()?;
    file.extend(headers);
    for field in [1, code_at, CODE_GPA, CODE_GPA, code_len, code_len, 5, 1] {
        file.extend(field.to_le_bytes());
    }
    file.get_mut(ENTRY_AT..ENTRY_AT + 4)?.copy_from_slice(&CODE_GPA.to_le_bytes());
    file.get_mut(TABLE_AT..TABLE_AT + 4)?.copy_from_slice(&table.to_le_bytes());
    file.get_mut(COUNT_AT..COUNT_AT + 2)?.copy_from_slice(&(count + 1).to_le_bytes());
    Some(file)
}

/// Switches the local APIC on, gives the lines 0 to 15 their vectors, and jumps to the program.
fn code(entry: u32) -> Vec<u8> {
    let mut stores = vec![(LOCAL_APIC_SPURIOUS, ENABLED)];
    for line in 0..16 {
        let vector = if line < 8 { 0x08 + line } else { 0x70 + line - 8 };
        for (register, value) in [(REDIRECTION + 2 * line + 1, 0), (REDIRECTION + 2 * line, vector)] {
            stores.extend([(IO_APIC_SELECT, register), (IO_APIC_WINDOW, value)]);
        }
    }
    let mut code = Vec::new();
    for (address, value) in stores {
        // mov dword [address], value
        code.extend([0xc7, 0x05]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    // jmp entry
    let next = CODE_GPA.wrapping_add(code.len() as u32 + 5);
    code.push(0xe9);
    code.extend(entry.wrapping_sub(next).to_le_bytes());
    code
}
