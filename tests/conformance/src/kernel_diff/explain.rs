//! Differences that are the other engine's, each with the manual's word for what is right.

use super::case::{Case, flag};
use super::layout::{HANDLERS, Mode};
use super::machine::Ending;

/// What an explanation looks at.
struct Seen<'a> {
    case: &'a Case,
    /// How it ended here.
    one: &'a Ending,
    other: &'a Ending,
    /// Vectors of the handlers in which both ended.
    ours: Option<u64>,
    theirs: Option<u64>,
    differences: &'a [String],
}

impl Seen<'_> {
    fn topic(&self, names: &[&str]) -> bool {
        names.contains(&self.case.topic)
    }

    /// The opcode behind the prefixes.
    fn opcode(&self) -> &[u8] {
        let prefixes = self.case.code.iter().take_while(|byte| matches!(byte, 0x66 | 0x48 | 0xf3)).count();
        &self.case.code[prefixes..]
    }

    /// Both ended in the same handler.
    fn same_vector(&self) -> bool {
        self.ours.is_some() && self.ours == self.theirs
    }

    /// KVM ended the guest.
    fn shut_down(&self) -> bool {
        *self.other == Ending::TripleFault
    }

    /// User code that KVM lets the processor execute.
    fn is_native(&self) -> bool {
        self.case.cpl == 3 && self.case.mode.is_long()
    }
}

/// Who is meant, and when. The first row that applies counts.
struct Explanation {
    applies: fn(&Seen<'_>) -> bool,
    why: &'static str,
}

/// Seen with a KVM that emulates kernel mode. One that runs it on the processor needs none of these but those that name
/// makers of processors.
const EXPLANATIONS: &[Explanation] = &[
    Explanation {
        applies: |seen| {
            matches!(seen.case.mode, Mode::Paged32 | Mode::Pae32) && seen.shut_down()
                || *seen.one == Ending::TripleFault && seen.opcode().starts_with(&[0x0f, 0x22])
        },
        why: "paging outside long mode: this KVM ends the guest at its first access, or refuses to begin",
    },
    Explanation {
        applies: |seen| seen.case.mode == Mode::Virtual8086,
        why: "an event in virtual-8086 mode: KVM pushes no segments, and does not make them null (SDM volume 3, 20.3.1)",
    },
    Explanation {
        applies: |seen| {
            seen.case.cpl == 3 && seen.case.registers.regs.rflags & (3 << 12 | flag::IF) != flag::IF
        },
        why: "user code with I/O privilege or without interrupts: KVM runs it without the one and with the others",
    },
    Explanation {
        applies: |seen| match seen.one {
            Ending::Out(state, _) => state.segments.cs.selector & 3 == 3 && state.regs.rflags >> 12 & 3 == 3,
            _ => false,
        },
        why: "a return to user code with I/O privilege: KVM runs that without",
    },
    Explanation {
        applies: |seen| seen.differences.iter().all(|text| flags_differ_in(text, flag::AC)),
        why: "RFLAGS.AC stays as it is when an event is delivered (SDM volume 3, 6.12.1), KVM clears it",
    },
    Explanation {
        applies: |seen| seen.theirs == Some(6) && seen.ours != Some(6),
        why: "an instruction that KVM's emulator does not know in this mode: it raises #UD",
    },
    Explanation {
        applies: |seen| seen.case.cpl == 3 && seen.ours == Some(6) && seen.theirs == Some(13),
        why: "#UD of what is not there, and #GP for want of privilege: the manual does not say which comes first",
    },
    Explanation {
        applies: |seen| matches!((seen.ours, seen.theirs), (Some(17), Some(14)) | (Some(14), Some(17))),
        why: "#AC and #PF of one access: of one class, the manual leaves the order to processors (SDM volume 3, 6.9)",
    },
    Explanation {
        applies: |seen| {
            seen.is_native()
                && seen.topic(&[
                    "segments", "return", "far", "tables", "fast", "flags", "control", "debug", "limits",
                ])
        },
        why: "user code on the processor meets the host's descriptor tables and control registers, not the guest's",
    },
    Explanation {
        applies: |seen| {
            seen.topic(&["debug"])
                && (seen.case.registers.dr7 & 0xff != 0 || seen.case.registers.regs.rflags & flag::TF != 0)
        },
        why: "KVM's emulator tests no data breakpoints, no trap between turns of REP, and no shadow of MOV SS",
    },
    Explanation {
        applies: |seen| seen.ours == Some(8) && seen.same_vector() && seen.differences.len() <= 2,
        why: "RF in the frame of a double fault: the manual names faults and traps only (SDM volume 3, 17.3.1.1)",
    },
    Explanation {
        applies: |seen| seen.ours.is_some() && seen.theirs == Some(8) && seen.case.code[..] == [0x0f, 0x0b],
        why: "a fault while #UD is delivered, which is benign: it is delivered itself (SDM volume 3, table 6-5), KVM raises #DF",
    },
    Explanation {
        applies: |seen| seen.topic(&["interrupt", "nested"]),
        why: "KVM delivers events through gates whose type, privilege or target the manual refuses (SDM volume 3, 6.12.1)",
    },
    Explanation {
        applies: |seen| seen.topic(&["limits"]) && !seen.case.mode.is_long(),
        why: "KVM's emulator checks neither limits nor alignment of the stack (SDM volume 3, 5.3 and 6.15)",
    },
    Explanation {
        applies: |seen| seen.topic(&["ports"]) && seen.case.registers.segments.tr.limit != 0x8f,
        why: "a map of ports that ends within the two bytes that are read: no right (SDM volume 1, 19.5.2), KVM wants one byte",
    },
    Explanation {
        applies: |seen| {
            seen.topic(&["paging"])
                && seen
                    .differences
                    .iter()
                    .all(|text| entries_differ_in(text, 1 << 5) || flags_differ_in(text, flag::AC))
        },
        why: "accessed bits on the way to a page fault: processors may set them or not (SDM volume 3, 4.8)",
    },
    Explanation {
        applies: |seen| seen.ours == Some(13) && seen.opcode().starts_with(&[0x0f, 0x22]),
        why: "reserved bits of control registers: #GP (SDM volume 2, MOV to CR), KVM takes some",
    },
    Explanation {
        applies: |seen| seen.topic(&["debug"]) && seen.opcode().starts_with(&[0x0f, 0x23]),
        why: "MOV to DR5 with more than 32 bits, or with a wrong value while DR7.GD is set: KVM looks at the alias, or at GD, later",
    },
    Explanation {
        applies: |seen| {
            seen.topic(&["segments"]) && seen.differences.iter().all(|text| text.starts_with("segments.ss."))
        },
        why: "a null SS in 64-bit mode: unusable (SDM volume 3, 5.4.1.1), KVM keeps what was in the hidden part",
    },
    Explanation {
        applies: |seen| seen.topic(&["msr"]),
        why: "bits of model-specific registers that are reserved: KVM keeps what the manual refuses, or drops (SDM volume 4)",
    },
    Explanation {
        applies: |seen| seen.topic(&["return"]),
        why: "KVM's returns name no selector in error codes, and keep data segments of more privilege (SDM volume 2, IRET)",
    },
    Explanation {
        applies: |seen| seen.topic(&["fast"]) || seen.case.code[..] == [0x0f, 0x01, 0xf8],
        why: "KVM executes SYSRET, SWAPGS and WRGSBASE where EFER, CR4 or the mode forbid it, and returns to 64 bits always",
    },
    Explanation {
        applies: |seen| seen.topic(&["tables"]) && seen.opcode().starts_with(&[0x0f, 0x00]),
        why: "KVM's LTR and LLDT take descriptors whose type, half or selector the manual refuses (SDM volume 2, LTR)",
    },
    Explanation {
        applies: |seen| seen.topic(&["far"]) && seen.same_vector(),
        why: "a far transfer that faults: KVM has marked the descriptor as accessed already, or names no selector",
    },
];

/// Whether a line says that the flags differ, in no other bits than these.
fn flags_differ_in(text: &str, bits: u64) -> bool {
    let Some((one, other)) = text.strip_prefix("regs.rflags: ").and_then(|text| text.split_once(" or "))
    else {
        return false;
    };
    match (one.parse::<u64>(), other.parse::<u64>()) {
        (Ok(one), Ok(other)) => (one ^ other) & !bits == 0,
        _ => false,
    }
}

/// Whether a line says that an entry of a page table differs, in no other bits than these.
fn entries_differ_in(text: &str, bits: u64) -> bool {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let words = text.strip_prefix("memory ").and_then(|text| text.split_once(": "));
    let values = words.and_then(|(_, values)| values.split(',').next()?.split_once(" or "));
    values.is_some_and(|(one, other)| match (number(one), number(other)) {
        (Some(one), Some(other)) => (one ^ other) & !(bits | bits << 32) == 0,
        _ => false,
    })
}

/// The vector in whose handler a case ended.
fn vector(ending: &Ending) -> Option<u64> {
    let Ending::Out(state, _) = ending else { return None };
    // Behind the one byte of code.
    let at = state.regs.rip.checked_sub(HANDLERS + 1)?;
    (at % 8 == 0 && at / 8 < 256).then_some(at / 8)
}

/// Why a difference is none of ours.
pub(super) fn explain(
    case: &Case,
    one: &Ending,
    other: &Ending,
    differences: &[String],
) -> Option<&'static str> {
    let seen = Seen { case, one, other, ours: vector(one), theirs: vector(other), differences };
    EXPLANATIONS.iter().find(|row| (row.applies)(&seen)).map(|row| row.why)
}

/// How a case ended, for people.
pub(super) fn ending(ending: &Ending) -> String {
    match (vector(ending), ending) {
        (Some(vector), _) => format!("vector {vector}"),
        (None, Ending::Out(state, _)) => format!("{:x}:{:x}", state.segments.cs.selector, state.regs.rip),
        (None, other) => format!("{other:?}"),
    }
}

/// The list for people.
pub fn explanations() -> impl Iterator<Item = &'static str> {
    EXPLANATIONS.iter().map(|row| row.why)
}
