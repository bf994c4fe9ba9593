//! Which instructions a processor model of engine_soft has: every encoding that iced-x86 knows is executed once with each
//! model, and raises #UD or not. What CPUID shows must be there, and what it hides must not.
//!
//! [`survey`] executes them, [`Survey::disagreements`] says where CPUID and processor differ, and [`page`] is the table in
//! `docs/instructions.md`. Which CPUID bit belongs to an encoding stands here once more, apart from the engine.

mod encode;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use harrier_engine::assist::{AssistantVcpu, Assisted, SoftwareEngine as _};
use harrier_engine::cpu_state::{DescriptorTable, Segment};
use harrier_engine::cpuid::{EAX, EBX, ECX, EDX, FEATURES};
use harrier_engine::{CpuModel, CpuState, Engine, GuestRegion, PageLog, VmConfig};
use harrier_engine_soft::SoftEngine;
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};
use vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress, MmapRegion};

use self::encode::Encoded;
use crate::devices::PortWrites;
use crate::diff;

/// The models, in the order of the table's columns.
pub const MODELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::Host];

const MEMORY_BYTES: usize = 0x10000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const UNDEFINED: u64 = 0x6000;
const OTHER: u64 = 0x7000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STACK: u64 = 0xb000;
const CODE64: u16 = 0x10;
const CODE32: u16 = 0x18;
const FLAT_DATA: u16 = 0x20;
/// Numbers of the registers in which CPUID answers.
const REGISTERS: [(usize, usize); 4] = [(EAX, 0), (EBX, 3), (ECX, 1), (EDX, 2)];

/// CPUID's name of the features that iced-x86 asks of an instruction; without a name it is on every x86-64 processor.
const SHOWN_BY: &[(CpuidFeature, &str)] = {
    use CpuidFeature::*;
    &[
        (INTEL8086, ""),
        (INTEL8086_ONLY, ""),
        (INTEL186, ""),
        (INTEL286, ""),
        (INTEL286_ONLY, ""),
        (INTEL386, ""),
        (INTEL386_ONLY, ""),
        (INTEL486, ""),
        (X64, ""),
        (CPUID, ""),
        (MULTIBYTENOP, ""),
        (PAUSE, ""),
        (FPU, "fpu"),
        (FPU287, "fpu"),
        (FPU387, "fpu"),
        (CMOV, "cmov"),
        (TSC, "tsc"),
        (MSR, "msr"),
        (CX8, "cx8"),
        (SEP, "sep"),
        (RDPMC, ""),
        (CLFSH, "clflush"),
        (MMX, "mmx"),
        (FXSR, "fxsr"),
        (SSE, "sse"),
        (SSE2, "sse2"),
        (SYSCALL, "syscall"),
        (CMPXCHG16B, "cx16"),
        (SSE3, "sse3"),
        (SSSE3, "ssse3"),
        (SSE4_1, "sse4_1"),
        (SSE4_2, "sse4_2"),
        (POPCNT, "popcnt"),
        (XSAVE, "xsave"),
        (AVX, "avx"),
        (AVX2, "avx2"),
        (FMA, "fma"),
        (F16C, "f16c"),
        (BMI1, "bmi1"),
        (BMI2, "bmi2"),
        (MOVBE, "movbe"),
        (LZCNT, "lzcnt"),
        (ADX, "adx"),
        (AES, "aes"),
        (PCLMULQDQ, "pclmulqdq"),
        (SHA, "sha_ni"),
        (GFNI, "gfni"),
        (VAES, "vaes"),
        (VPCLMULQDQ, "vpclmulqdq"),
        (RDTSCP, "rdtscp"),
        (RDPID, "rdpid"),
        (RDRAND, "rdrand"),
        (RDSEED, "rdseed"),
        (FSGSBASE, "fsgsbase"),
        (SMAP, "smap"),
        (INVPCID, "invpcid"),
        (CLFLUSHOPT, "clflushopt"),
        (CLWB, "clwb"),
        (XSAVEOPT, "xsaveopt"),
        (XSAVEC, "xsavec"),
    ]
};

/// Encodings that do nothing, or less, on a processor without their feature, instead of raising #UD.
fn is_hint(mnemonic: Mnemonic) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match mnemonic {
        Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote | Prefetch | Prefetchw | Prefetchwt1 | Prefetchit0
        | Prefetchit1 | Reservednop | Bndcl | Bndcn | Bndcu | Bndldx | Bndmk | Bndmov | Bndstx => {
            "an opcode reserved for hints (Intel SDM volume 2, table A-3)"
        }
        Wbnoinvd => "WBINVD with a prefix",
        Tzcnt | Lzcnt => "BSF and BSR with a prefix",
        _ => return None,
    })
}

/// Instructions that raise #UD though their feature is there.
fn is_always_undefined(mnemonic: Mnemonic) -> Option<&'static str> {
    Some(match mnemonic {
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => "made for it",
        Mnemonic::Rsm => "only in system management mode",
        _ => return None,
    })
}

/// Instructions of the hypervisor's interface: KVM's hypercalls.
fn is_hypercall(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Vmcall | Mnemonic::Vmmcall)
}

/// What became of one encoding.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The encoding, by iced-x86's name.
    pub code: Code,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The mode that it was executed in, 64 or 32 bits.
    pub bits: u32,
    /// For each of [`MODELS`]: whether CPUID shows its features; `None` where the host cannot offer the model.
    pub shown: [Option<bool>; 4],
    /// For each of [`MODELS`]: whether it was executed, or raised something else than #UD.
    pub executed: [Option<bool>; 4],
}

/// What became of all encodings.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// One entry an encoding.
    pub seen: Vec<Seen>,
    /// Encodings that iced-x86 knows and takes for another when it decodes them: of processors that are long gone.
    pub aliases: usize,
}

impl Survey {
    /// Where what CPUID says and what the processor does are not the same; empty if all is well.
    pub fn disagreements(&self) -> Vec<String> {
        let mut found = Vec::new();
        for seen in &self.seen {
            for (column, model) in MODELS.iter().enumerate() {
                let (Some(shown), Some(executed)) = (seen.shown[column], seen.executed[column]) else {
                    continue;
                };
                let mnemonic = seen.code.mnemonic();
                let wanted = match shown {
                    true => is_always_undefined(mnemonic).is_none(),
                    false => is_hint(mnemonic).is_some() || is_hypercall(mnemonic),
                };
                if executed != wanted {
                    let what = if executed { "is executed" } else { "raises #UD" };
                    let shows = if shown { "shows" } else { "hides" };
                    found.push(format!(
                        "{:?} ({:02x?}, {} bits) {what} with cpu model {model}, whose CPUID {shows} it",
                        seen.code, seen.bytes, seen.bits
                    ));
                }
            }
        }
        found
    }
}

/// Executes every encoding once with each model that this host offers.
///
/// # Errors
/// The engine refuses a machine or a state.
pub fn survey() -> Result<Survey, String> {
    let offered = Engine::cpu_models(&SoftEngine);
    let mut processors = Vec::new();
    for model in MODELS {
        let processor = if offered.contains(&model) { Some(Processor::new(model)?) } else { None };
        processors.push(processor);
    }
    let mut survey = Survey::default();
    for code in Code::values() {
        let Some(Encoded { bytes, bits, alias }) = encode::encode(code, CODE, DATA) else { continue };
        if alias {
            survey.aliases += 1;
            continue;
        }
        let mut seen = Seen { code, bytes, bits, shown: [None; 4], executed: [None; 4] };
        for (column, processor) in processors.iter_mut().enumerate() {
            let Some(processor) = processor else { continue };
            seen.shown[column] = Some(processor.shows(code));
            let executed = processor.executes(&seen.bytes, bits);
            seen.executed[column] = Some(executed.map_err(|err| format!("{code:?}: {err}"))?);
        }
        survey.seen.push(seen);
    }
    Ok(survey)
}

/// CPUID's names of the features that an encoding needs; `None` if one of them has no bit in any model.
fn needs(code: Code) -> Option<Vec<&'static str>> {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let names = instruction
        .cpuid_features()
        .iter()
        .map(|wanted| SHOWN_BY.iter().find(|(feature, _)| feature == wanted).map(|(_, name)| *name));
    let names: Option<Vec<_>> = names.collect();
    names.map(|names| names.into_iter().filter(|name| !name.is_empty()).collect())
}

/// One processor of a model with a little memory.
struct Processor {
    memory: Arc<GuestRegion>,
    shown: BTreeSet<&'static str>,
    vcpu: Box<dyn AssistantVcpu>,
    start: CpuState,
}

impl Processor {
    fn new(model: CpuModel) -> Result<Processor, String> {
        let text = |err: &dyn std::fmt::Display| err.to_string();
        let config = VmConfig { cpu_model: model, vcpu_count: 1, tsc_khz: Some(1_000_000) };
        let mapping = MmapRegion::<PageLog>::new(MEMORY_BYTES).map_err(|err| text(&err))?;
        let memory = GuestRegion::new(mapping, GuestAddress(0)).ok_or("no memory at address 0")?;
        let memory = Arc::new(memory);
        let assistant = SoftEngine.create_assistant(&config).map_err(|err| text(&err))?;
        assistant.map_memory(Arc::clone(&memory), false).map_err(|err| text(&err))?;
        let vm = SoftEngine.create_vm(&config).map_err(|err| text(&err))?;
        let start = vm.create_vcpu(0).and_then(|mut vcpu| vcpu.state()).map_err(|err| text(&err))?;
        let vcpu = assistant.create_vcpu(0).map_err(|err| text(&err))?;
        let mut processor = Processor { memory, shown: BTreeSet::new(), vcpu, start };
        processor.shown = processor.ask()?;
        Ok(processor)
    }

    /// Whether CPUID shows all that an encoding needs.
    fn shows(&self, code: Code) -> bool {
        needs(code).is_some_and(|names| names.iter().all(|name| self.has(name)))
    }

    /// Whether CPUID shows a feature.
    fn has(&self, name: &str) -> bool {
        self.shown.contains(name)
    }

    /// The features that the CPUID instruction shows.
    fn ask(&mut self) -> Result<BTreeSet<&'static str>, String> {
        let mut shown = BTreeSet::new();
        for row in FEATURES {
            let mut state = self.state(64);
            self.prepare(&[0x0f, 0xa2], 64);
            state.regs.gpr[0] = u64::from(row.leaf);
            state.regs.gpr[1] = u64::from(row.subleaf);
            self.vcpu.execute(&mut state, &mut PortWrites::unheard()).map_err(|err| err.to_string())?;
            let register = REGISTERS.iter().find(|(part, _)| *part == row.register);
            let answer = register.map_or(0, |(_, number)| state.regs.gpr[*number]);
            if answer >> row.bit & 1 != 0 {
                shown.insert(row.name);
            }
        }
        Ok(shown)
    }

    /// Executes one instruction: whether it raises no #UD.
    fn executes(&mut self, bytes: &[u8], bits: u32) -> Result<bool, String> {
        let mut state = self.state(bits);
        self.prepare(bytes, bits);
        match self.vcpu.execute(&mut state, &mut PortWrites::unheard()) {
            Ok(Assisted::Done { .. }) => Ok(state.regs.rip != UNDEFINED),
            Ok(Assisted::TripleFault) => Err("a triple fault".to_owned()),
            Ok(Assisted::Unsupported(reason)) => Err(reason),
            Err(err) => Err(err.to_string()),
        }
    }

    /// Kernel mode, flat segments, every feature that the model has switched on.
    fn state(&self, bits: u32) -> CpuState {
        let mut state = self.start.clone();
        let long = bits == 64;
        let flat = |kind: u8, selector: u16| Segment::flat(selector, kind, long && kind & 8 != 0);
        let segments = &mut state.segments;
        segments.cs = flat(0xb, if long { CODE64 } else { CODE32 });
        for segment in
            [&mut segments.ss, &mut segments.ds, &mut segments.es, &mut segments.fs, &mut segments.gs]
        {
            *segment = flat(3, FLAT_DATA);
        }
        segments.gdtr = DescriptorTable { base: GDT, limit: 0x27 };
        segments.idtr = DescriptorTable { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
        let control = &mut state.control;
        control.cr0 = 0x31 | u64::from(long) << 31;
        control.cr3 = 0x1000;
        control.cr4 = 0x620;
        control.efer = if long { 0x501 } else { 1 };
        if self.has("xsave") {
            control.cr4 |= 1 << 18;
            control.xcr0 = 7;
        }
        if self.has("fsgsbase") {
            control.cr4 |= 1 << 16;
        }
        state.regs.gpr = [DATA; 16];
        // String instructions go round once.
        state.regs.gpr[1] = 1;
        state.regs.gpr[4] = STACK;
        state.regs.rip = CODE;
        state
    }

    /// Page tables that map everything to itself, descriptors, gates and the code.
    fn prepare(&self, code: &[u8], bits: u32) {
        let write = |at: u64, bytes: &[u8]| {
            self.memory
                .write_slice(bytes, MemoryRegionAddress(at))
                .unwrap_or_else(|err| panic!("{at:#x}: {err}"));
        };
        for (table, entry) in [(0x1000u64, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
            write(table, &entry.to_le_bytes());
        }
        let descriptors = [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        for (index, descriptor) in descriptors.iter().enumerate() {
            write(GDT + 8 * index as u64, &descriptor.to_le_bytes());
        }
        for vector in 0..256u64 {
            let handler = if vector == 6 { UNDEFINED } else { OTHER };
            let selector = u64::from(if bits == 64 { CODE64 } else { CODE32 });
            let gate = handler | selector << 16 | 0x8e00 << 32;
            match bits {
                64 => {
                    write(IDT + 16 * vector, &gate.to_le_bytes());
                    write(IDT + 16 * vector + 8, &[0; 8]);
                }
                _ => write(IDT + 8 * vector, &gate.to_le_bytes()),
            }
        }
        write(DATA, &[0; 0x400]);
        write(CODE, &[0x90; 32]);
        write(CODE, code);
    }
}

/// A row of the table.
#[derive(Default)]
struct Group {
    encodings: usize,
    executed: [usize; 4],
    compared: usize,
    apart: BTreeMap<&'static str, usize>,
}

/// `docs/instructions.md`, from a survey on a host that offers every model.
pub fn page(survey: &Survey) -> String {
    let comparable = diff::comparable();
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let mut hidden = 0;
    for seen in &survey.seen {
        let has = in_models(seen);
        // UD2 and its like are instructions for all that.
        if !has.contains(&true) {
            hidden += 1;
            continue;
        }
        let mut instruction = Instruction::default();
        instruction.set_code(seen.code);
        let names: Vec<String> = instruction.cpuid_features().iter().map(|one| format!("{one:?}")).collect();
        let group = groups.entry(names.join(" and ")).or_default();
        group.encodings += 1;
        for (count, has) in group.executed.iter_mut().zip(has) {
            *count += usize::from(has);
        }
        if comparable.contains(&seen.code) {
            group.compared += 1;
        } else {
            *group.apart.entry(tested_apart(seen)).or_default() += 1;
        }
    }
    let mut text = String::from(
        "# Instructions of the software processor\n\n\
         Made by `cargo xtask conformance coverage`; a test compares this page with the code. Every encoding that the decoder\n\
         knows was executed once with each CPU model. A model's column counts those that did not raise #UD; *compared* counts those that\n\
         `cargo xtask conformance diff` compares with the processor, random operands, flags and faults; the last column says\n\
         what tests the others (`kernel-diff` is `cargo xtask conformance kernel-diff`, beside KVM). `host` is everything that engine_soft can offer, on a host that has it all.\n\n\
         | group | encodings | v1 | v2 | v3 | host | compared | others are tested by |\n\
         |---|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for (name, group) in &groups {
        let [v1, v2, v3, host] = group.executed;
        let apart: Vec<String> =
            group.apart.iter().map(|(what, count)| format!("{what} ({count})")).collect();
        let _ = writeln!(
            text,
            "| {name} | {} | {v1} | {v2} | {v3} | {host} | {} | {} |",
            group.encodings,
            group.compared,
            apart.join("; ")
        );
    }
    let all: usize = groups.values().map(|group| group.encodings).sum();
    let compared: usize = groups.values().map(|group| group.compared).sum();
    let _ = write!(
        text,
        "\n{all} encodings, of which {compared} are compared with the processor. {hidden} encodings raise #UD in every model, among\n\
         them AVX-512, AMX, XOP and 3DNow. #UD, and only #UD, is checked for each of them and each model.\n",
    );
    text
}

/// Which models have an encoding: as seen, or by the table of features where this host lacks one. So the page is the same on
/// every host.
fn in_models(seen: &Seen) -> [bool; 4] {
    let by_table = |model: CpuModel| {
        let row = |name: &str| FEATURES.iter().find(|row| row.name == name);
        needs(seen.code)
            .is_some_and(|names| names.iter().all(|name| row(name).is_some_and(|row| row.model <= model)))
    };
    let mut has = [false; 4];
    for ((has, model), executed) in has.iter_mut().zip(MODELS).zip(seen.executed) {
        *has = match executed {
            Some(executed) if model != CpuModel::Host => executed,
            Some(true) => true,
            _ => by_table(model) && is_always_undefined(seen.code.mnemonic()).is_none(),
        };
    }
    has
}

/// Where an encoding is tested that the comparison leaves out.
fn tested_apart(seen: &Seen) -> &'static str {
    use Mnemonic::*;
    match seen.code.mnemonic() {
        _ if seen.bits == 32 => "kernel-diff, guests protected_mode and real_mode, kvm-unit-tests",
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xrstor | Xrstor64 | Xsaveopt
        | Xsaveopt64 | Xsavec | Xsavec64 | Fnsave | Fnstenv | Frstor | Fldenv => "guest fpu, unit tests, FEX",
        Syscall | Sysret | Sysretq | Sysenter | Sysexit | Sysexitq | Swapgs | Int | Iret | Iretd | Iretq
        | Retf | Jmp | Call | Ret => "kernel-diff, guests long_mode and protected_mode",
        Mov | Lmsw | Smsw | Rdmsr | Wrmsr | Sgdt | Sidt | Lgdt | Lidt | Lldt | Sldt | Ltr | Str | Lar
        | Lsl | Verr | Verw | Lss | Lfs | Lgs | Pop | Xgetbv | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => {
            "kernel-diff, guest system_registers, kvm-unit-tests"
        }
        Push | Cpuid | Rdtsc | Rdtscp | Rdpid | Rdpmc => "guest system_registers, kvm-unit-tests",
        Invlpg | Invpcid | Clac | Stac => "kernel-diff, guest paging, kvm-unit-tests access, pcid and smap",
        Vmcall | Vmmcall => "kvm-unit-tests hypercall",
        Hlt => "guests apic and smp",
        Rdrand | Rdseed => "unit tests",
        Xsetbv => "kernel-diff, kvm-unit-tests xsave",
        Int1 | Int3 => "kernel-diff, guests long_mode and system_registers",
        _ => "being executed only",
    }
}
