//! Which encodings are compared, and what sets them apart for whoever makes cases of them.

use std::collections::BTreeSet;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind,
};

use super::layout::Bits;
use super::operands;
use super::random::Random;

/// Features whose instructions are compared, and the name by which Linux shows them; the first ones are everywhere.
const FEATURES: &[(CpuidFeature, &str)] = {
    use CpuidFeature::*;
    &[
        (INTEL8086, ""),
        (INTEL8086_ONLY, ""),
        (INTEL186, ""),
        (INTEL286, ""),
        (INTEL386, ""),
        (INTEL486, ""),
        (X64, ""),
        (FPU, ""),
        (FPU287, ""),
        (FPU387, ""),
        (MULTIBYTENOP, ""),
        (PAUSE, ""),
        (CMOV, "cmov"),
        (CX8, "cx8"),
        (CMPXCHG16B, "cx16"),
        (MMX, "mmx"),
        (SSE, "sse"),
        (SSE2, "sse2"),
        (CLFSH, "clflush"),
        (SSE3, "pni"),
        (SSSE3, "ssse3"),
        (SSE4_1, "sse4_1"),
        (SSE4_2, "sse4_2"),
        (POPCNT, "popcnt"),
        (LZCNT, "abm"),
        (BMI1, "bmi1"),
        (BMI2, "bmi2"),
        (ADX, "adx"),
        (MOVBE, "movbe"),
        (PREFETCHW, "3dnowprefetch"),
        (AVX, "avx"),
        (AVX2, "avx2"),
        (FMA, "fma"),
        (F16C, "f16c"),
        (AES, "aes"),
        (PCLMULQDQ, "pclmulqdq"),
        (SHA, "sha_ni"),
        (GFNI, "gfni"),
        (VAES, "vaes"),
        (VPCLMULQDQ, "vpclmulqdq"),
        (CLFLUSHOPT, "clflushopt"),
        (CLWB, "clwb"),
    ]
};

/// What cannot be compared in user mode, and why.
fn left_out(mnemonic: Mnemonic) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match mnemonic {
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq | Int => {
            "enters the kernel, which is another one"
        }
        Iret | Iretd | Iretq | Retf => "loads selectors, and the descriptor tables differ",
        Lds | Les | Lfs | Lgs | Lss | Lar | Lsl | Verr | Verw | Arpl | Str | Sldt | Lldt | Ltr => {
            "reads descriptors or selectors, and the tables differ"
        }
        Sgdt | Sidt | Smsw => "Linux answers for the processor where it has UMIP",
        Cpuid | Rdtsc | Rdtscp | Rdpid | Rdpmc | Rdrand | Rdseed | Xgetbv | Rdmsr | Wrmsr => {
            "its answer is the processor's own"
        }
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Swapgs => "the host's thread lives behind these bases",
        Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Fnsave | Fsave
        | Fnstenv | Fstenv | Fldenv | Frstor | Fxrstor | Fxrstor64 | Xrstor | Xrstor64 => {
            "has the x87 unit's last addresses, or a processor's own header; tested by themselves"
        }
        Db | Dw | Dd | Dq | Zero_bytes => "is no instruction",
        Ret | Jmpe => "goes where memory says",
        Monitor | Mwait | Monitorx | Mwaitx | Hlt | Vmcall | Vmmcall | Rsm | Getsec => {
            "waits, or leaves the processor"
        }
        Ud0 => "has several lengths",
        _ => return None,
    })
}

/// What processors do not agree on, so that one of them cannot say what is right. 0F 0D with a register is #UD on AMD's and
/// does nothing on Intel's; and there are hypervisors that deliver the #DB of INT1 as a fault.
fn differs_between_processors(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
            | Code::Int1
    )
}

/// The encodings that are compared.
pub(super) fn encodings(bits: Bits) -> Vec<Code> {
    let flags = host_flags();
    chosen(bits, |name| name.is_empty() || flags.iter().any(|flag| flag == name))
}

/// The encodings that are compared on a host that has them all.
pub fn comparable() -> BTreeSet<Code> {
    [Bits::Long, Bits::Compatibility, Bits::Short]
        .into_iter()
        .flat_map(|bits| chosen(bits, |_| true))
        .collect()
}

/// The encodings whose features, by Linux's names, are all there.
fn chosen(bits: Bits, is_there: impl Fn(&str) -> bool) -> Vec<Code> {
    let here =
        |feature: &CpuidFeature| FEATURES.iter().any(|(known, name)| known == feature && is_there(name));
    let mut random = Random::new(1);
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let mut instruction = Instruction::default();
            instruction.set_code(*code);
            matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && match bits {
                    Bits::Long => info.mode64(),
                    Bits::Compatibility => info.mode32(),
                    Bits::Short => info.mode16(),
                }
                && !info.fwait()
                && *code != Code::INVALID
                && left_out(code.mnemonic()).is_none()
                && !differs_between_processors(*code)
                && !instruction.cpuid_features().is_empty()
                && instruction.cpuid_features().iter().all(here)
        })
        .filter(|code| (0..20).any(|_| operands::instruction(&mut random, *code, bits).is_some()))
        .collect()
}

/// The processor's features by Linux's names.
fn host_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    line.split_whitespace().map(str::to_owned).collect()
}

pub(super) fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// Near jumps and calls through a register or memory.
pub(super) fn is_indirect_branch(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
}

pub(super) fn is_branch(instruction: &Instruction) -> bool {
    instruction.op_count() > 0
        && matches!(
            instruction.op0_kind(),
            OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16
        )
}

/// Gathers raise #UD if two of their three registers are the same.
pub(super) fn vsib_is_distinct(instruction: &Instruction) -> bool {
    if !instruction.memory_index().is_vector_register() {
        return true;
    }
    let index = instruction.memory_index().number();
    let others = [instruction.op0_register().number(), instruction.op2_register().number()];
    !others.contains(&index) && others[0] != others[1]
}

pub(super) fn is_comparison(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Cmp | Test | Sub | Add | And | Or | Xor | Dec | Inc | Neg | Sbb)
}

/// Whether an instruction may stand in a sequence: it goes on with the next one, and leaves no flag undefined.
pub(super) fn is_steady(code: Code) -> bool {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.flow_control() == FlowControl::Next
        && !instruction.is_string_instruction()
        && !instruction.is_stack_instruction()
        && !instruction.is_privileged()
        && instruction.rflags_undefined() == 0
        && super::compare::undefined(&instruction) == 0
        && !code
            .op_code()
            .op_kinds()
            .iter()
            .any(|kind| matches!(kind, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y))
        && !is_bit_string(code)
        && !matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
        && !matches!(
            code.mnemonic(),
            Mnemonic::In | Mnemonic::Out | Mnemonic::Cli | Mnemonic::Sti | Mnemonic::Xlatb
        )
}

pub(super) fn is_bit_string(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Bt_rm16_r16
            | Bt_rm32_r32
            | Bt_rm64_r64
            | Bts_rm16_r16
            | Bts_rm32_r32
            | Bts_rm64_r64
            | Btr_rm16_r16
            | Btr_rm32_r32
            | Btr_rm64_r64
            | Btc_rm16_r16
            | Btc_rm32_r32
            | Btc_rm64_r64
    )
}

/// Whether an access is atomic. Hosts slow those down by tens of milliseconds that cross a cache line (Linux's split lock
/// detection), so none here does.
pub(super) fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || matches!(instruction.mnemonic(), Mnemonic::Xchg | Mnemonic::Cmpxchg8b)
}

/// Whether a memory operand has to be aligned to its size, or #GP.
pub(super) fn is_aligned(code: Code) -> bool {
    use Mnemonic::*;
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let features = instruction.cpuid_features();
    match code.op_code().encoding() {
        EncodingKind::VEX => matches!(
            code.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        ),
        _ => {
            code.mnemonic() == Cmpxchg16b
                || (instruction.memory_size().size() == 16
                    && !features.contains(&CpuidFeature::FPU)
                    && !matches!(code.mnemonic(), Movups | Movupd | Movdqu | Lddqu))
        }
    }
}
