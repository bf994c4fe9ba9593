//! Instructions in user mode, compared with the processor that this runs on: the same program with the same registers
//! and memory at the same addresses, once in a process of the host and once in a guest of an engine.
//!
//! [`layout`] has the program, [`native`] and [`guest`] run it, [`generate`] makes cases of [`encodings`] and [`operands`], and [`compare`] says what counts.
//! A batch of cases is run in one go on each side; memory goes from case to case, and where a batch differs its cases are
//! run again one by one.

mod compare;
mod encodings;
mod generate;
mod guest;
mod layout;
mod native;
mod operands;
pub(crate) mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Instant;

use harrier_engine::{CpuModel, Engine};
use serde::Serialize;

use self::generate::{Case, Generator};
use self::guest::Guest;
pub use self::layout::Bits;
use self::layout::{
    AFTER, BEFORE, CODE, CONTEXT, Context, DATA, DATA_LEN, END, NEXT, READ_ONLY, RESULT, SLOT,
};
use self::native::Native;
use self::random::Random;

pub use self::compare::{differences_of_makers, undefined_flags};
pub use self::encodings::comparable;

/// Mismatches of one encoding that are written down.
const KEPT: usize = 1;
/// After so many, a run ends.
const TOO_MANY: usize = 40;

/// What is compared.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the random numbers begin.
    pub seed: u64,
    /// Instructions to compare, at least.
    pub count: u64,
    /// Only encodings whose name, as iced-x86 writes it, contains this.
    pub only: Option<String>,
    /// The mode that instructions are executed in.
    pub bits: Bits,
    /// Say how far it is on standard error, each so many instructions; 0 for never.
    pub progress: u64,
}

/// What came out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Instructions that were compared, those that faulted included.
    pub instructions: u64,
    /// Cases that ended with a fault, by vector.
    pub faults: BTreeMap<u64, u64>,
    /// Cases that met one of the [`differences_of_makers`] and count neither way.
    pub makers: u64,
    /// Encodings that were compared.
    pub encodings: usize,
    /// Reproducers, at most one an encoding.
    pub mismatches: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for mismatch in &self.mismatches {
            writeln!(f, "{mismatch}")?;
        }
        let faults: Vec<String> =
            self.faults.iter().map(|(vector, count)| format!("vector {vector}: {count}")).collect();
        writeln!(
            f,
            "{} instructions of {} encodings compared in {:.1} s, {} differ, {} met differences of makers; faults in both: {}",
            self.instructions,
            self.encodings,
            self.seconds,
            self.mismatches.len(),
            self.makers,
            faults.join(", ")
        )
    }
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// No child, no window.
    #[error("the processor's side cannot be run: {0}")]
    Native(#[from] std::io::Error),
    /// No machine.
    #[error("the engine's side cannot be run: {0}")]
    Engine(String),
    /// AVX is what the registers of both sides are loaded with.
    #[error("the {engine} engine offers neither cpu model v3 nor host here, and the comparison needs AVX")]
    Model {
        /// The engine.
        engine: &'static str,
    },
    /// Nothing to compare.
    #[error("no encoding's name contains '{0}': names are those of iced-x86, like Add_rm32_r32")]
    NoEncoding(String),
}

/// Both sides with one memory.
struct Sides {
    native: Native,
    guest: Guest,
}

/// Compares `options.count` instructions on `engine` with the host's processor.
///
/// # Errors
/// [`DiffError`] if one of the sides cannot be run. Differences are part of the outcome.
pub fn run(engine: &dyn Engine, options: &Options) -> Result<Outcome, DiffError> {
    let started = Instant::now();
    let model = [CpuModel::Host, CpuModel::V3].into_iter().find(|model| engine.cpu_models().contains(model));
    let model = model.ok_or(DiffError::Model { engine: engine.name() })?;
    let mut encodings = encodings::encodings(options.bits);
    if let Some(part) = &options.only {
        encodings.retain(|code| format!("{code:?}").contains(part.as_str()));
        if encodings.is_empty() {
            return Err(DiffError::NoEncoding(part.clone()));
        }
    }
    let mut outcome = Outcome { encodings: encodings.len(), ..Outcome::default() };
    let mut generator = Generator::new(encodings, options.bits);
    // The child first: it is forked before there are threads and memory of the engine.
    let native = Native::start(options.bits)?;
    let guest = Guest::new(engine, model, options.bits).map_err(|err| DiffError::Engine(err.to_string()))?;
    let mut sides = Sides { native, guest };
    let mut random = Random::new(options.seed);
    let mut known = BTreeMap::new();
    let mut shown = 0;
    while outcome.instructions < options.count {
        let cases: Vec<Case> =
            (0..options.bits.cases()).map(|slot| generator.case(&mut random, slot)).collect();
        let data = random.data(DATA_LEN);
        let read_only = random.data(0x1000);
        sides.prepare(&cases, 0..cases.len(), &data, &read_only);
        sides.run()?;
        outcome.instructions += cases.iter().map(|case| case.instructions.len() as u64).sum::<u64>();
        let differing = sides.differing(&cases, &mut outcome);
        if !differing.is_empty() || sides.native.read(DATA, DATA_LEN) != sides.guest.read(DATA, DATA_LEN) {
            sides.narrow(&cases, &data, &read_only, &mut known, &mut outcome)?;
            if outcome.mismatches.len() >= TOO_MANY {
                break;
            }
        }
        if options.progress != 0 && outcome.instructions / options.progress > shown {
            shown = outcome.instructions / options.progress;
            let seconds = started.elapsed().as_secs_f64();
            eprintln!(
                "xtask: {} instructions, {seconds:.0} s, {} differ",
                outcome.instructions,
                outcome.mismatches.len()
            );
        }
    }
    outcome.seconds = started.elapsed().as_secs_f64();
    Ok(outcome)
}

impl Sides {
    fn write(&self, at: u64, bytes: &[u8]) {
        self.native.write(at, bytes);
        self.guest.write(at, bytes);
    }

    /// Puts some of the cases and memory into both windows.
    fn prepare(&self, cases: &[Case], which: std::ops::Range<usize>, data: &[u8], read_only: &[u8]) {
        let mut before = Vec::with_capacity(which.len() * CONTEXT);
        for slot in which.clone() {
            let case = &cases[slot];
            let entry = CODE + (slot * SLOT) as u64 - case.bits.code_base();
            before.extend(case.context.to_bytes(entry));
        }
        let mut code = vec![0xcc; which.len() * SLOT];
        for (place, case) in code.chunks_exact_mut(SLOT).zip(&cases[which.clone()]) {
            place[..case.bytes.len()].copy_from_slice(&case.bytes);
        }
        self.write(CODE + (which.start * SLOT) as u64, &code);
        self.write(BEFORE, &before);
        self.write(AFTER, &vec![0; which.len() * CONTEXT]);
        self.write(DATA, data);
        self.write(READ_ONLY, read_only);
        self.write(NEXT, &BEFORE.to_le_bytes());
        self.write(RESULT, &AFTER.to_le_bytes());
        self.write(END, &(BEFORE + before.len() as u64).to_le_bytes());
    }

    fn run(&mut self) -> Result<(), DiffError> {
        self.native.run()?;
        self.guest.run().map_err(DiffError::Engine)
    }

    /// Results of the first cases, made comparable.
    fn results(&self, cases: &[Case]) -> (Vec<Context>, Vec<Context>) {
        let read = |bytes: Vec<u8>| {
            let contexts = bytes.chunks_exact(CONTEXT).zip(cases);
            contexts
                .map(|(bytes, case)| {
                    let mut context = Context::from_bytes(bytes);
                    compare::normalise(case, &mut context);
                    context
                })
                .collect()
        };
        let len = cases.len() * CONTEXT;
        (read(self.native.read(AFTER, len)), read(self.guest.read(AFTER, len)))
    }

    /// Numbers of the cases whose registers differ; counts faults that both raise.
    fn differing(&self, cases: &[Case], outcome: &mut Outcome) -> Vec<usize> {
        let (host, engine) = self.results(cases);
        let mut differing = Vec::new();
        for (index, (host, engine)) in host.iter().zip(&engine).enumerate() {
            if host != engine && compare::is_of_makers(&cases[index], host, engine) {
                outcome.makers += 1;
            } else if host != engine {
                differing.push(index);
            } else if host.fault[0] != 0 {
                *outcome.faults.entry(host.fault[0] - 1).or_default() += 1;
            }
        }
        differing
    }

    /// Runs the cases of a batch one by one, each with the memory that the processor had before it, and writes down the
    /// first difference of each encoding.
    fn narrow(
        &mut self,
        cases: &[Case],
        data: &[u8],
        read_only: &[u8],
        known: &mut BTreeMap<String, usize>,
        outcome: &mut Outcome,
    ) -> Result<(), DiffError> {
        let mut data = data.to_vec();
        for slot in 0..cases.len() {
            self.prepare(cases, slot..slot + 1, &data, read_only);
            self.run()?;
            let case = &cases[slot..=slot];
            let (host, engine) = self.results(case);
            let after = self.native.read(DATA, DATA_LEN);
            let guest_after = self.guest.read(DATA, DATA_LEN);
            let memory: Vec<(u64, u8, u8)> = after
                .iter()
                .zip(&guest_after)
                .enumerate()
                .filter(|(_, (real, soft))| real != soft)
                .map(|(at, (real, soft))| (DATA + at as u64, *real, *soft))
                .collect();
            let makers = compare::is_of_makers(&case[0], &host[0], &engine[0]);
            if !makers && (host != engine || !memory.is_empty()) {
                let names: BTreeSet<String> = case[0]
                    .instructions
                    .iter()
                    .map(|instruction| format!("{:?}", instruction.code()))
                    .collect();
                let seen = known.entry(names.into_iter().collect::<Vec<_>>().join(" ")).or_default();
                *seen += 1;
                if *seen <= KEPT {
                    outcome.mismatches.push(compare::describe(&case[0], slot, &host[0], &engine[0], &memory));
                }
            }
            data = after;
        }
        Ok(())
    }
}
