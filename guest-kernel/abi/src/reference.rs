//! What is written from the tables: the C header for the Linux patches, and the reference for people.

use core::fmt::{self, Write};

use crate::block::{self, Block, Status};
use crate::calls::{
    self, CALLS, COMMON_ERRORS, Call, DEVICES, EXIT_REASONS, MemRange, PHASES, QUIESCE_OPS, ROLES,
};
use crate::layout::{Kind, Layout};
use crate::port::{self, event};
use crate::shared_page::{self, ClockPage};
use crate::{VERSION_MAJOR, VERSION_MINOR};

/// Width of a comment line in the C header.
const COMMENT_WIDTH: usize = 76;

/// Writes the C header.
///
/// # Errors
/// Those of `out`.
pub fn c_header(out: &mut dyn Write) -> fmt::Result {
    out.write_str(
        "/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */\n\
         /*\n\
         \x20* The hypercalls of the Harrier monitor. Generated from the tables of the\n\
         \x20* crate harrier-hypercall-abi by `cargo run -p harrier-hypercall-abi -- header`;\n\
         \x20* do not edit. docs/hypercalls.md is the reference.\n\
         \x20*/\n\
         #ifndef _HARRIER_HYPERCALL_H\n\
         #define _HARRIER_HYPERCALL_H\n\n\
         #include <linux/types.h>\n\n",
    )?;
    let mut group = Group { out, title: "Version" };
    group.title()?;
    group.define("VERSION_MAJOR", VERSION_MAJOR.into(), "")?;
    group.define("VERSION_MINOR", VERSION_MINOR.into(), "")?;
    group.next("The doorbell: discovery and registers")?;
    writeln!(group.out, "#define HARRIER_ACPI_ID \"{}\"", port::ACPI_ID)?;
    group.hex("PORT", port::BASE.into(), "")?;
    group.define("PORT_LEN", port::LEN.into(), "")?;
    group.hex("SIGNATURE", port::SIGNATURE.into(), "")?;
    for (name, offset, doc) in port::REGISTERS {
        group.hex_named("REG_", name, u64::from(*offset), doc)?;
    }
    group.next("Events: bits of HARRIER_REG_EVENTS")?;
    for (name, bit, doc) in event::EVENTS {
        group.hex_named("EVENT_", name, u64::from(*bit), doc)?;
    }
    group.next("Calls")?;
    for call in CALLS {
        group.define_named("CALL_", call.name, i64::from(call.number))?;
    }
    group.next("Feature bits")?;
    for call in CALLS.iter().filter(|call| call.feature != 0) {
        writeln!(group.out, "#define HARRIER_FEATURE_{} {:#x}ULL", call.name, call.feature)?;
    }
    group.next("How a call ended")?;
    for status in Status::ALL {
        group.define_named("STATUS_", status.name(), i64::from(*status as i32))?;
    }
    group.next("Limits and special values")?;
    group.define("BLOCK_ALIGN", block::ALIGN, "")?;
    group.define("CHANNELS", block::CHANNELS.into(), "")?;
    group.define("CONSOLE_MAX", calls::CONSOLE_MAX.into(), "bytes")?;
    group.define("MEM_RELEASE_MAX_RANGES", calls::MEM_RELEASE_MAX_RANGES.into(), "")?;
    group.define("MEM_RELEASE_MAX_BYTES", calls::MEM_RELEASE_MAX_BYTES, "in one call")?;
    group.define("MARKS_MAX", calls::MARKS_MAX as u64, "")?;
    writeln!(group.out, "#define HARRIER_PARK_NO_TIMEOUT {:#x}ULL", calls::PARK_NO_TIMEOUT)?;
    group.define("EXIT_CODE_MAX", calls::EXIT_CODE_MAX.into(), "")?;
    group.next("Phases of MARK")?;
    for (phase, name, doc) in PHASES {
        group.hex_named("PHASE_", name, u64::from(*phase), doc)?;
    }
    group.next("Reasons of EXIT")?;
    for (reason, name, doc) in EXIT_REASONS {
        group.hex_named("EXIT_", name, u64::from(*reason), doc)?;
    }
    group.next("Operations of QUIESCE")?;
    for (op, name, doc) in QUIESCE_OPS {
        group.hex_named("QUIESCE_", name, u64::from(*op), doc)?;
    }
    group.next("Roles of CHECKPOINT and IDENTITY")?;
    for (role, name, doc) in ROLES {
        group.hex_named("ROLE_", name, u64::from(*role), doc)?;
    }
    group.next("Devices of DEVICE")?;
    for (kind, name, doc) in DEVICES {
        group.hex_named("DEVICE_", name, u64::from(*kind), doc)?;
    }
    group.hex("DEVICE_NO_INTERRUPT", calls::DEVICE_NO_INTERRUPT.into(), "")?;
    group.next("Flags of the clock page")?;
    group.hex("CLOCK_VALID", shared_page::CLOCK_VALID.into(), "")?;
    group.hex("CLOCK_TSC_RELIABLE", shared_page::CLOCK_TSC_RELIABLE.into(), "")?;
    group.hex("CLOCK_OFFSET", shared_page::CLOCK_OFFSET, "of the clock in the shared page")?;
    writeln!(out)?;
    for layout in layouts() {
        c_struct(out, layout)?;
    }
    out.write_str("#endif /* _HARRIER_HYPERCALL_H */\n")
}

/// Every structure of the ABI: the block, the shared page, then those of the calls.
pub fn layouts() -> impl Iterator<Item = &'static Layout> {
    let of_calls = CALLS.iter().flat_map(|call| [call.args, call.result]).flatten();
    [&Block::LAYOUT, &ClockPage::LAYOUT, &MemRange::LAYOUT].into_iter().chain(of_calls)
}

/// Constants of the header that belong together.
struct Group<'a> {
    out: &'a mut dyn Write,
    title: &'static str,
}

impl Group<'_> {
    fn title(&mut self) -> fmt::Result {
        writeln!(self.out, "/* {} */", self.title)
    }

    fn next(&mut self, title: &'static str) -> fmt::Result {
        self.title = title;
        writeln!(self.out)?;
        self.title()
    }

    fn comment(&mut self, doc: &str) -> fmt::Result {
        if doc.is_empty() { writeln!(self.out) } else { writeln!(self.out, " /* {doc} */") }
    }

    fn define(&mut self, name: &str, value: u64, doc: &str) -> fmt::Result {
        write!(self.out, "#define HARRIER_{name} {value}")?;
        self.comment(doc)
    }

    fn define_named(&mut self, prefix: &str, name: &str, value: i64) -> fmt::Result {
        if value < 0 {
            writeln!(self.out, "#define HARRIER_{prefix}{name} ({value})")
        } else {
            writeln!(self.out, "#define HARRIER_{prefix}{name} {value}")
        }
    }

    fn hex(&mut self, name: &str, value: u64, doc: &str) -> fmt::Result {
        self.hex_named("", name, value, doc)
    }

    fn hex_named(&mut self, prefix: &str, name: &str, value: u64, doc: &str) -> fmt::Result {
        write!(self.out, "#define HARRIER_{prefix}{name} {value:#x}")?;
        self.comment(doc)
    }
}

/// The name of a structure in C: `ParkArgs` is `harrier_park_args`.
struct CName(&'static str);

impl fmt::Display for CName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("harrier")?;
        for letter in self.0.chars() {
            if letter.is_ascii_uppercase() {
                f.write_char('_')?;
            }
            f.write_char(letter.to_ascii_lowercase())?;
        }
        Ok(())
    }
}

fn c_struct(out: &mut dyn Write, layout: &Layout) -> fmt::Result {
    out.write_str("/*\n")?;
    wrapped(out, " *", layout.doc)?;
    writeln!(out, " */\nstruct {} {{", CName(layout.name))?;
    for field in layout.fields {
        out.write_str("\t/*\n")?;
        wrapped(out, "\t *", field.doc)?;
        out.write_str("\t */\n")?;
        match field.kind {
            Kind::Number { signed, bits } => {
                writeln!(out, "\t__{}{bits} {};", if signed { 's' } else { 'u' }, field.name)?;
            }
            Kind::Bytes(count) => writeln!(out, "\t__u8 {}[{count}];", field.name)?,
        }
    }
    writeln!(out, "}};")?;
    writeln!(
        out,
        "_Static_assert(sizeof(struct {}) == {}, \"layout of {}\");\n",
        CName(layout.name),
        layout.size,
        layout.name
    )
}

/// The words of `text` in lines that begin with `prefix`; an empty line stays one.
fn wrapped(out: &mut dyn Write, prefix: &str, text: &str) -> fmt::Result {
    let mut column = 0;
    for line in text.lines() {
        if line.trim().is_empty() {
            if column > 0 {
                writeln!(out)?;
            }
            writeln!(out, "{prefix}")?;
            column = 0;
            continue;
        }
        for word in line.split_whitespace() {
            if column > 0 && column + 1 + word.len() > COMMENT_WIDTH {
                writeln!(out)?;
                column = 0;
            }
            if column == 0 {
                out.write_str(prefix)?;
                column = prefix.len();
            }
            write!(out, " {word}")?;
            column += 1 + word.len();
        }
    }
    if column > 0 { writeln!(out) } else { Ok(()) }
}

/// Writes the reference: registers, the block, errors, events and every call, as Markdown.
///
/// # Errors
/// Those of `out`.
pub fn markdown(out: &mut dyn Write) -> fmt::Result {
    writeln!(out, "### Registers\n\nOffsets from port {:#x}; 4 bytes wide.\n", port::BASE)?;
    out.write_str("| offset | name | what it does |\n|---|---|---|\n")?;
    for (name, offset, doc) in port::REGISTERS {
        writeln!(out, "| {offset:#04x} | {name} | {doc} |")?;
    }
    out.write_str("\n### Argument block\n\n")?;
    structure(out, &Block::LAYOUT)?;
    out.write_str("\n### Status\n\n| value | name | what it says |\n|---|---|---|\n")?;
    for status in Status::ALL {
        write!(out, "| {} | {} |", *status as i32, status.name())?;
        words(out, status.doc())?;
        out.write_str(" |\n")?;
    }
    out.write_str("\n### Events\n\n| bit | name | what it says |\n|---|---|---|\n")?;
    for (name, bit, doc) in event::EVENTS {
        writeln!(out, "| {} | {name} | {doc} |", bit.trailing_zeros())?;
    }
    out.write_str("\n### Clock page\n\n")?;
    structure(out, &ClockPage::LAYOUT)?;
    out.write_str("\n### Calls\n\nEvery call can end with ")?;
    names(out, COMMON_ERRORS)?;
    out.write_str(".\n")?;
    for call in CALLS {
        markdown_call(out, call)?;
    }
    Ok(())
}

fn markdown_call(out: &mut dyn Write, call: &Call) -> fmt::Result {
    write!(out, "\n#### {} {}\n\n", call.number, call.name)?;
    out.write_str(call.doc)?;
    out.write_str("\n\n")?;
    if call.reserved {
        writeln!(
            out,
            "Answered with UNSUPPORTED, its feature bit {} is clear.",
            call.feature.trailing_zeros()
        )?;
        return Ok(());
    }
    if call.feature == 0 {
        out.write_str("- feature bit: none, it is always there\n")?;
    } else {
        writeln!(out, "- feature bit: {}", call.feature.trailing_zeros())?;
    }
    writeln!(out, "- since: {VERSION_MAJOR}.{}", call.since_minor)?;
    out.write_str("- errors: ")?;
    if call.errors.is_empty() {
        out.write_str("none of its own")?;
    } else {
        names(out, call.errors)?;
    }
    writeln!(out, "\n- cost: the exit and {}", call.cost)?;
    for (title, layout) in [("Arguments", call.args), ("Result", call.result)] {
        if let Some(layout) = layout {
            writeln!(out, "\n{title}:\n")?;
            structure(out, layout)?;
        }
    }
    let extra = match call.name {
        "MARK" => Some(("phase", PHASES)),
        "EXIT" => Some(("reason", EXIT_REASONS)),
        "QUIESCE" => Some(("operation", QUIESCE_OPS)),
        "CHECKPOINT" | "IDENTITY" => Some(("role", ROLES)),
        "DEVICE" => Some(("kind", DEVICES)),
        "MEM_RELEASE" => {
            out.write_str("\nA range:\n\n")?;
            structure(out, &MemRange::LAYOUT)?;
            None
        }
        _ => None,
    };
    if let Some((title, rows)) = extra {
        writeln!(out, "\n| {title} | name | meaning |\n|---|---|---|")?;
        for (number, name, doc) in rows {
            writeln!(out, "| {number} | {name} | {doc} |")?;
        }
    }
    Ok(())
}

fn structure(out: &mut dyn Write, layout: &Layout) -> fmt::Result {
    for line in layout.doc.lines() {
        writeln!(out, "{}", line.trim())?;
    }
    out.write_str("\n| offset | type | field | what it holds |\n|---|---|---|---|\n")?;
    for field in layout.fields {
        write!(out, "| {} | ", field.offset)?;
        match field.kind {
            Kind::Number { signed, bits } => write!(out, "{}{bits}", if signed { 'i' } else { 'u' })?,
            Kind::Bytes(count) => write!(out, "{count} bytes")?,
        }
        write!(out, " | `{}` |", field.name)?;
        words(out, field.doc)?;
        out.write_str(" |\n")?;
    }
    Ok(())
}

fn words(out: &mut dyn Write, text: &str) -> fmt::Result {
    text.split_whitespace().try_for_each(|word| write!(out, " {word}"))
}

fn names(out: &mut dyn Write, list: &[Status]) -> fmt::Result {
    for (index, status) in list.iter().enumerate() {
        write!(out, "{}{}", if index == 0 { "" } else { ", " }, status.name())?;
    }
    Ok(())
}
