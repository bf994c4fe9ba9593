//! What of a case's result is compared, and the words for a difference.

use std::fmt::Write as _;

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind};

use super::generate::Case;
use super::layout::{Bits, CODE, Context, SLOT, XSAVE_AT};

/// First address that Linux keeps from user code, with its guard page.
const KERNEL_START: u64 = 0x7fff_ffff_f000;
/// Where the guest's own kernel ends.
const GUEST_KERNEL_END: u64 = 0x20_0000;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
/// Status flags, DF, AC.
const COMPARED: u64 = STATUS | 1 << 10 | 1 << 18;

/// Flags that the manual leaves undefined and in which processors differ among themselves.
struct Undefined {
    mnemonics: &'static [Mnemonic],
    flags: u64,
    /// Intel SDM volume 2, "Flags Affected" of these.
    section: &'static str,
}

const UNDEFINED: &[Undefined] = &[
    Undefined {
        mnemonics: &[Mnemonic::Aaa, Mnemonic::Aas],
        flags: OF | SF | ZF | PF,
        section: "AAA, AAS: OF, SF, ZF and PF are undefined",
    },
    Undefined {
        mnemonics: &[Mnemonic::Aam, Mnemonic::Aad],
        flags: OF | AF | CF,
        section: "AAM, AAD: OF, AF and CF are undefined",
    },
    Undefined { mnemonics: &[Mnemonic::Daa, Mnemonic::Das], flags: OF, section: "DAA, DAS: OF is undefined" },
    Undefined {
        mnemonics: &[Mnemonic::Div, Mnemonic::Idiv],
        flags: STATUS,
        section: "DIV, IDIV: all status flags are undefined",
    },
    Undefined {
        mnemonics: &[Mnemonic::Mul, Mnemonic::Imul],
        flags: SF | ZF | AF | PF,
        section: "MUL, IMUL: SF, ZF, AF and PF are undefined",
    },
    Undefined {
        mnemonics: &[Mnemonic::Rol, Mnemonic::Ror, Mnemonic::Rcl, Mnemonic::Rcr],
        flags: OF,
        section: "RCL/RCR/ROL/ROR: OF is defined only for rotates by one",
    },
    Undefined {
        mnemonics: &[Mnemonic::Shl, Mnemonic::Sal, Mnemonic::Shr, Mnemonic::Sar],
        flags: OF | AF,
        section: "SAL/SAR/SHL/SHR: OF is defined only for shifts by one, AF never",
    },
    Undefined {
        mnemonics: &[Mnemonic::Shld, Mnemonic::Shrd],
        flags: OF | AF,
        section: "SHLD, SHRD: OF is defined only for shifts by one, AF never",
    },
    Undefined {
        mnemonics: &[Mnemonic::Bsf, Mnemonic::Bsr],
        flags: CF | OF | SF | AF | PF,
        section: "BSF, BSR: CF, OF, SF, AF and PF are undefined",
    },
];

/// The flags that an instruction leaves undefined.
pub(super) fn undefined(instruction: &Instruction) -> u64 {
    let row = UNDEFINED.iter().find(|row| row.mnemonics.contains(&instruction.mnemonic()));
    let by_one = instruction.op_count() > 1
        && instruction.op1_kind() == OpKind::Immediate8
        && instruction.immediate8() == 1;
    row.map_or(0, |row| {
        if by_one && row.flags & OF != 0 && row.flags & SF == 0 { row.flags & !OF } else { row.flags }
    })
}

/// The list for people: what is not compared, and where the manual says so.
pub fn undefined_flags() -> impl Iterator<Item = &'static str> {
    UNDEFINED.iter().map(|row| row.section)
}

/// Makes two results of a case equal where they may differ.
pub(super) fn normalise(case: &Case, result: &mut Context) {
    let ignored = case.instructions.iter().fold(0, |all, instruction| all | undefined(instruction));
    result.rflags &= COMPARED & !ignored;
    if case.bits != Bits::Long {
        // Nobody promises the upper halves (volume 1, 3.4.1.1).
        result.gpr = result.gpr.map(|value| value & 0xffff_ffff);
        result.gpr[8..].fill(0);
    }
    if case.bits == Bits::Short {
        // A return from the host's kernel to a stack segment of 16 bits loads SP alone (SDM volume 2, IRET).
        result.gpr[4] &= 0xffff;
    }
    let area = &mut result.xsave;
    // The x87 unit's last instruction and operand: processors differ in when they note them. The mask of MXCSR, the
    // header and what is reserved say which processor it is.
    area[5..24].fill(0);
    area[28..32].fill(0);
    area[416..576].fill(0);
    for register in 0..8 {
        area[32 + 16 * register + 10..32 + 16 * register + 16].fill(0);
    }
    let [vector, error, address, _] = &mut result.fault;
    match *vector {
        0 => result.fault = [0; 4],
        // #PF: the address of an operand that crosses into a page may be any of it there.
        15 => {
            if *address >= KERNEL_START {
                // Linux tells user code that every page of the kernel is present.
                *error |= 1;
            }
            if *address < GUEST_KERNEL_END {
                *error |= 1;
            }
            *address &= !0xfff;
        }
        14 | 13 | 18 | 12 | 11 => *address = 0,
        _ => (*error, *address) = (0, 0),
    }
    let must_be_aligned = |instruction: &Instruction| super::encodings::is_aligned(instruction.code());
    if result.fault[0] == 13 && case.instructions.iter().any(must_be_aligned) {
        // Beyond the stack segment's limit and not aligned: #SS and #GP both apply.
        result.fault[0] = 14;
    }
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    if result.fault[0] == 20 && mxcsr & !(mxcsr >> 7) & 0x18 != 0 {
        // An unmasked overflow or underflow: whether the result was inexact as well is not known (volume 1, 4.9.1).
        area[24] |= 0x20;
    }
    let mmx = |instruction: &Instruction| {
        instruction.cpuid_features().contains(&CpuidFeature::MMX)
            || (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_mm())
    };
    if result.fault[0] != 0 && case.instructions.iter().any(mmx) {
        // Processors have set TOP to zero already when the store of an MMX register faults; the manual does not say.
        area[2..5].fill(0);
        area[32..160].fill(0);
    }
    let repeated = |instruction: &Instruction| {
        use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw, Scasb, Scasd, Scasq, Scasw};
        let string =
            [Cmpsb, Cmpsw, Cmpsd, Cmpsq, Scasb, Scasw, Scasd, Scasq].contains(&instruction.mnemonic());
        string && (instruction.has_repe_prefix() || instruction.has_repne_prefix())
    };
    if result.fault[0] != 0 && case.instructions.iter().any(repeated) {
        // Intel's processors put the flags back that the instruction began with (SDM volume 2, REP), AMD's have those of
        // the last element.
        result.rflags &= !STATUS;
    }
    let products = |instruction: &Instruction| {
        use Mnemonic::{Dppd, Dpps, Vdppd, Vdpps};
        matches!(instruction.mnemonic(), Dpps | Dppd | Vdpps | Vdppd)
    };
    if result.fault[0] == 20 && case.instructions.iter().any(products) {
        // Products and sums raise their exceptions one after the other.
        area[24] |= 0x3f;
    }
}

/// What becomes of an instruction that meets a fault, where the makers of processors do not agree.
struct Makers {
    codes: &'static [Code],
    mnemonics: &'static [Mnemonic],
    what: &'static str,
}

const MAKERS: &[Makers] = {
    use Code::*;
    use Mnemonic::*;
    &[
        Makers {
            codes: &[
                Sha1rnds4_xmm_xmmm128_imm8,
                Sha1nexte_xmm_xmmm128,
                Sha1msg1_xmm_xmmm128,
                Sha1msg2_xmm_xmmm128,
                Sha256rnds2_xmm_xmmm128,
                Sha256msg1_xmm_xmmm128,
                Sha256msg2_xmm_xmmm128,
            ],
            mnemonics: &[],
            what: "an operand of SHA that is not aligned: #GP on Intel's (SDM volume 2, exceptions type 4) and here, read on AMD's",
        },
        Makers {
            codes: &[Movsxd_r16_rm16],
            mnemonics: &[],
            what: "MOVSXD to 16 bits: Intel's read two bytes (SDM volume 2), as here, AMD's four",
        },
        Makers {
            codes: &[Ldmxcsr_m32, VEX_Vldmxcsr_m32],
            mnemonics: &[],
            what: "bit 17 of MXCSR: reserved on Intel's and here, the misaligned exception mask on AMD's (APM volume 2, 11.3)",
        },
        Makers {
            codes: &[],
            mnemonics: &[Fst, Fstp, Fist, Fistp, Fisttp, Fbstp],
            what: "an unmasked x87 exception of a store to where it faults: Intel's raise the first, AMD's and here the second",
        },
        Makers {
            codes: &[],
            mnemonics: &[Vcvtps2ph],
            what: "a conversion that is stored to where it faults: Intel's have raised its flags already, not AMD's, nor here",
        },
        Makers {
            codes: &[],
            mnemonics: &[Maskmovq, Maskmovdqu, Vmaskmovdqu, Vpmaskmovd, Vpmaskmovq, Vmaskmovps, Vmaskmovpd],
            what: "which byte of a masked store faults first, and whether others were stored before: here none",
        },
    ]
};

/// Whether a case met one of the [`differences_of_makers`]: it ends with a fault, on either side, in one of their
/// instructions.
pub(super) fn is_of_makers(case: &Case, host: &Context, engine: &Context) -> bool {
    let listed = |instruction: &Instruction| {
        MAKERS.iter().any(|row| {
            row.codes.contains(&instruction.code()) || row.mnemonics.contains(&instruction.mnemonic())
        })
    };
    (host.fault[0] != 0 || engine.fault[0] != 0) && case.instructions.iter().any(listed)
}

/// Where AMD's and Intel's processors differ from each other.
pub fn differences_of_makers() -> impl Iterator<Item = &'static str> {
    MAKERS.iter().map(|row| row.what)
}

/// A reproducer: the instructions, the registers that they began with, and in what the two sides differ.
pub(super) fn describe(
    case: &Case,
    slot: usize,
    host: &Context,
    engine: &Context,
    data: &[(u64, u8, u8)],
) -> String {
    let mut text = String::new();
    let before = &case.context;
    let code: Vec<String> = case.bytes[..case.code_len].iter().map(|byte| format!("{byte:02x}")).collect();
    let names: Vec<String> =
        case.instructions.iter().map(|instruction| format!("{:?}", instruction.code())).collect();
    let _ = writeln!(text, "{} at {:#x}: {}", names.join("; "), CODE + (slot * SLOT) as u64, code.join(" "));
    if host.fault != engine.fault {
        let _ = writeln!(
            text,
            "  fault (vector + 1, error, address, rip): processor {:x?}, engine {:x?}",
            host.fault, engine.fault
        );
    } else if host.fault[0] != 0 {
        let _ = writeln!(text, "  both raise vector {}", host.fault[0] - 1);
    }
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    for register in 0..16 {
        let (real, soft) = (host.gpr[register], engine.gpr[register]);
        if real != soft {
            let name = names.get(register).map_or(format!("r{register}"), |name| (*name).to_owned());
            let _ = writeln!(
                text,
                "  {name}: before {:x}, processor {real:x}, engine {soft:x}",
                before.gpr[register]
            );
        }
    }
    if host.rflags != engine.rflags {
        let _ = writeln!(
            text,
            "  flags: before {:x}, processor {:x}, engine {:x}",
            before.rflags, host.rflags, engine.rflags
        );
    }
    for at in (0..host.xsave.len()).step_by(8) {
        let word = |area: &[u8]| area[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        let (real, soft) = (word(&host.xsave[..]), word(&engine.xsave[..]));
        if real != soft {
            let _ = writeln!(
                text,
                "  {}: before {:x}, processor {real:x}, engine {soft:x}",
                area_name(at),
                word(&before.xsave[..])
            );
        }
    }
    for (at, real, soft) in data.iter().take(32) {
        let _ = writeln!(text, "  memory {at:#x}: processor {real:02x}, engine {soft:02x}");
    }
    let registers: Vec<String> = before.gpr.iter().map(|value| format!("{value:x}")).collect();
    let _ = writeln!(text, "  began with {} flags {:x}", registers.join(" "), before.rflags);
    let state: Vec<String> = before.xsave[..32].iter().map(|byte| format!("{byte:02x}")).collect();
    let _ = writeln!(text, "  x87 and MXCSR {}", state.join(""));
    for (index, instruction) in case.instructions.iter().enumerate().take(1) {
        for operand in 0..instruction.op_count() {
            let register = instruction.op_register(operand);
            if instruction.op_kind(operand) == OpKind::Register && register.is_vector_register() {
                let _ = writeln!(
                    text,
                    "  operand {operand} of {index}, xmm{}: {:02x?}",
                    register.number(),
                    before.xmm(register.number())
                );
            }
        }
    }
    text
}

fn area_name(at: usize) -> String {
    match at {
        0 => "x87 control, status, tags".to_owned(),
        24 => "MXCSR".to_owned(),
        32..160 => format!("st{}+{}", (at - 32) / 16, at % 16),
        160..416 => format!("xmm{}+{}", (at - 160) / 16, at % 16),
        576.. => format!("upper half of ymm{}+{}", (at - 576) / 16, at % 16),
        _ => format!("area+{}", at + XSAVE_AT),
    }
}
