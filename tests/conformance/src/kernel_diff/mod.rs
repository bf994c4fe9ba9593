//! Kernel mode on two engines: generated instructions, faults, gates and page tables, each executed once on the software
//! processor and once by KVM, from the same registers and memory, and everything compared that software can see.
//!
//! [`topics`] and [`transfers`] make cases out of [`case`] and [`layout`], [`machine`] runs them, and [`explain`] has the table of differences
//! that are the other engine's. KVM is used without the software processor's help: an assist would compare it with itself.
//! Where a KVM emulates kernel mode it is a second opinion, and the manual decides.

mod case;
mod explain;
mod layout;
mod machine;
mod topics;
mod transfers;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use harrier_engine::{CpuModel, Engine};
use serde::Serialize;

use self::case::Case;
pub use self::explain::explanations;
pub use self::layout::Mode;
use self::machine::{Ending, Registers, Side};

/// Mismatches of one kind that are written down.
const KEPT: usize = 1;
/// After so many, a run ends.
const TOO_MANY: usize = 60;

/// What is compared.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the random numbers begin.
    pub seed: u64,
    /// Cases to compare.
    pub count: u64,
    /// Only this topic.
    pub only: Option<String>,
    /// Only this mode.
    pub mode: Option<Mode>,
    /// Only the case with this number, which is described.
    pub case: Option<u64>,
    /// Say how far it is on standard error, each so many cases; 0 for never.
    pub progress: u64,
}

/// What came out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Cases that both engines executed.
    pub cases: u64,
    /// Those that ended alike, by topic.
    pub alike: BTreeMap<&'static str, u64>,
    /// Those in which the second engine is known to differ, by the reason.
    pub explained: BTreeMap<&'static str, u64>,
    /// Cases that the second engine could not execute by itself, or that led to where no memory is.
    pub unable: u64,
    /// Reproducers of the others.
    pub mismatches: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Outcome {
    /// Cases that ended alike.
    pub fn same(&self) -> u64 {
        self.alike.values().sum()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mismatch in &self.mismatches {
            writeln!(f, "{mismatch}")?;
        }
        for (reason, count) in &self.explained {
            writeln!(f, "{count:8} {reason}")?;
        }
        let topics: Vec<String> = self.alike.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(
            f,
            "{} cases in {:.1} s, {} end alike ({}), {} are explained, {} are beyond KVM, {} differ",
            self.cases,
            self.seconds,
            self.same(),
            topics.join(", "),
            self.explained.values().sum::<u64>(),
            self.unable,
            self.mismatches.len()
        )
    }
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum KernelDiffError {
    /// No machine.
    #[error("the {engine} engine cannot be run: {reason}")]
    Engine {
        /// The engine.
        engine: &'static str,
        /// Why not.
        reason: String,
    },
    /// No such topic.
    #[error("'{0}' is no topic: use one of {1}")]
    Topic(String, String),
    /// The software processor executed something for KVM.
    #[error("the software processor executed {0} instructions for KVM: it would be compared with itself")]
    Assisted(u64),
}

/// Compares `options.count` cases on `one` and on `other`, KVM without help.
///
/// # Errors
/// [`KernelDiffError`] if one of the engines cannot be run. Differences are part of the outcome.
pub fn run(one: &dyn Engine, other: &dyn Engine, options: &Options) -> Result<Outcome, KernelDiffError> {
    let started = Instant::now();
    if let Some(only) = &options.only
        && !topics::TOPICS.iter().any(|(name, _)| name == only)
    {
        let names: Vec<&str> = topics::TOPICS.iter().map(|(name, _)| *name).collect();
        return Err(KernelDiffError::Topic(only.clone(), names.join(", ")));
    }
    let side = |engine: &dyn Engine| {
        Side::new(engine, CpuModel::Host)
            .map_err(|err| KernelDiffError::Engine { engine: engine.name(), reason: err.to_string() })
    };
    let (mut one, mut other) = (side(one)?, side(other)?);
    let cr4_bits = common_cr4(&mut one, &mut other);
    let mut outcome = Outcome::default();
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut tables_changed = true;
    let numbers = options.case.map_or(0..options.count, |number| number..number + 1);
    for number in numbers {
        let case = topics::make(options, number, cr4_bits);
        let fresh = case.topic == "paging" || tables_changed;
        tables_changed = case.topic == "paging";
        let first = one.run(&case.registers, &case.memory, fresh);
        let second = other.run(&case.registers, &case.memory, fresh);
        outcome.cases += 1;
        if other.assists() != 0 {
            return Err(KernelDiffError::Assisted(other.assists()));
        }
        let beyond = [&first, &second].iter().any(|ending| matches!(ending, Ending::Unable(_)));
        if beyond && options.case.is_none() {
            outcome.unable += 1;
            continue;
        }
        let differences = differences(&case, &first, &second);
        if differences.is_empty() {
            *outcome.alike.entry(case.topic).or_default() += 1;
        } else if let Some(reason) = explain::explain(&case, &first, &second, &differences) {
            *outcome.explained.entry(reason).or_default() += 1;
        } else {
            let seen = known.entry(kind_of(&case, &differences)).or_default();
            *seen += 1;
            if *seen <= KEPT {
                outcome.mismatches.push(describe(number, &case, [&first, &second], &differences));
                if outcome.mismatches.len() >= TOO_MANY {
                    break;
                }
            }
        }
        if options.case.is_some() {
            outcome.mismatches.push(describe(number, &case, [&first, &second], &differences));
        }
        if options.progress != 0 && outcome.cases % options.progress == 0 {
            let seconds = started.elapsed().as_secs_f64();
            eprintln!("xtask: {} cases, {seconds:.0} s, {} differ", outcome.cases, outcome.mismatches.len());
        }
    }
    outcome.seconds = started.elapsed().as_secs_f64();
    Ok(outcome)
}

/// The bits of CR4 that both processors can have set.
fn common_cr4(one: &mut Side, other: &mut Side) -> u64 {
    (0..64).map(|bit| 1u64 << bit).fold(0, |all, bit| {
        let mut case = Case::new(crate::diff::random::Random::new(1), Mode::Long, 0, 0);
        case.registers.control.cr4 |= bit;
        let registers: &Registers = &case.registers;
        if one.takes(registers) && other.takes(registers) { all | bit } else { all }
    })
}

/// In what two endings differ.
fn differences(case: &Case, one: &Ending, other: &Ending) -> Vec<String> {
    let (Ending::Out(state, memory), Ending::Out(other_state, other_memory)) = (one, other) else {
        return if one == other {
            Vec::new()
        } else {
            vec![format!("end: {} or {}", explain::ending(one), explain::ending(other))]
        };
    };
    let mut found = state.differences(other_state);
    let words = memory.chunks_exact(8).zip(other_memory.chunks_exact(8)).enumerate();
    for (index, (bytes, other_bytes)) in words.filter(|(_, (bytes, other))| bytes != other) {
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let before = case.word(8 * index as u64);
        found.push(format!(
            "memory {:#x}: {:x} or {:x}, before {before:x}",
            8 * index,
            number(bytes),
            number(other_bytes)
        ));
    }
    found
}

/// Mismatches with the same fields in the same topic and mode are of one kind.
fn kind_of(case: &Case, differences: &[String]) -> String {
    let fields: Vec<&str> = differences.iter().map(|text| text.split(':').next().unwrap_or(text)).collect();
    let opcode = case.code.iter().find(|byte| !matches!(byte, 0x66 | 0x48 | 0xf3 | 0x0f)).copied();
    format!("{} {:?} {:x?} {}", case.topic, case.mode, opcode, fields.join(" "))
}

fn describe(number: u64, case: &Case, ends: [&Ending; 2], differences: &[String]) -> String {
    let code: Vec<String> = case.code.iter().map(|byte| format!("{byte:02x}")).collect();
    let registers = &case.registers;
    let gpr: Vec<String> = registers.regs.gpr[..8].iter().map(|value| format!("{value:x}")).collect();
    let control = &registers.control;
    let mut text = format!(
        "case {number}: {} {}in {:?} mode at level {}: {}\n  began with {} flags {:x} cr0 {:x} cr3 {:x} cr4 {:x} efer {:x} dr7 {:x}\n  ended at {} or {}",
        case.topic,
        case.name,
        case.mode,
        case.cpl,
        code.join(" "),
        gpr.join(" "),
        registers.regs.rflags,
        control.cr0,
        control.cr3,
        control.cr4,
        control.efer,
        registers.dr7,
        explain::ending(ends[0]),
        explain::ending(ends[1]),
    );
    for difference in differences.iter().take(24) {
        text.push_str("\n  ");
        text.push_str(difference);
    }
    text
}
