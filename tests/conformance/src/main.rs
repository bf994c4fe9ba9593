//! `cargo xtask conformance`: other people's test suites on Harrier's engines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use harrier_conformance::suites::report::Table;
use harrier_conformance::suites::{
    EngineName, SuiteError, engine, fex, kvm_unit_tests, programs, selftests, test386,
};
use harrier_conformance::{coverage, diff, kernel_diff};
use harrier_engine_kvm::KvmEngine;

/// Runs a test suite of others, which lies in a directory of its own, and prints what passed.
#[derive(Parser)]
#[command(bin_name = "cargo xtask conformance")]
struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// Which instructions each CPU model has: docs/instructions.md on standard output
    Coverage,
    /// Random instructions, beside the processor that this runs on
    Diff(DiffArguments),
    /// Generated cases of kernel mode on the software processor, beside KVM
    KernelDiff(KernelDiffArguments),
    /// FEX's unittests/ASM in DIR
    Fex(FexArguments),
    /// test386.asm in DIR, a ROM for real and protected mode
    Test386 {
        /// The suite's directory; nasm assembles it
        dir: PathBuf,
        #[command(flatten)]
        how: How,
    },
    /// Linux's tools/testing/selftests/x86, built in DIR, in a guest and on this host
    SelftestsX86 {
        /// The directory with the programs
        dir: PathBuf,
        #[command(flatten)]
        guest: selftests::Guest,
        #[command(flatten)]
        how: How,
    },
    /// Python's test modules, gcc, openssl, perl and threads, of a Debian root in a guest
    Programs {
        #[command(flatten)]
        guest: programs::Guest,
        #[command(flatten)]
        how: How,
    },
    /// kvm-unit-tests, built for x86_64 in DIR
    KvmUnitTests {
        /// The suite's directory, after `./configure && make`
        dir: PathBuf,
        #[command(flatten)]
        how: How,
        /// Run each entry under QEMU's translator too, and print both results side by side
        #[arg(long)]
        qemu: bool,
        /// Run only entries with one of these names
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        only: Vec<String>,
        /// Print what each failing entry said last
        #[arg(long)]
        output: bool,
    },
}

#[derive(clap::Args)]
struct FexArguments {
    /// Directory with the sources of FEX; nasm assembles the tests
    dir: PathBuf,
    #[command(flatten)]
    how: How,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// List the tests that passed too
    #[arg(long)]
    all: bool,
}

#[derive(clap::Args)]
struct DiffArguments {
    /// Where the random numbers begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instructions to compare
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Only encodings whose name contains this, as iced-x86 writes them: Add_rm32_r32
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Mode that the instructions are executed in: 64 bits, or 32 or 16 in compatibility mode
    #[arg(long, value_enum, default_value_t = diff::Bits::Long)]
    bits: diff::Bits,
    #[command(flatten)]
    how: How,
}

#[derive(clap::Args)]
struct KernelDiffArguments {
    /// Where the random numbers begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cases to compare
    #[arg(long, default_value_t = 100_000)]
    count: u64,
    /// Only this topic
    #[arg(long, value_name = "TOPIC")]
    only: Option<String>,
    /// Only this mode
    #[arg(long, value_enum)]
    mode: Option<kernel_diff::Mode>,
    /// Only the case with this number, and what becomes of it; seed, topic and mode choose too
    #[arg(long, value_name = "NUMBER")]
    case: Option<u64>,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct How {
    /// Engine to test
    #[arg(long, value_enum, default_value_t = EngineName::Soft)]
    engine: EngineName,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse().suite) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing failed.
fn run(suite: Suite) -> Result<bool, SuiteError> {
    match suite {
        Suite::Coverage => {
            let survey = coverage::survey().map_err(SuiteError::Coverage)?;
            print!("{}", coverage::page(&survey));
            let disagreements = survey.disagreements();
            disagreements.iter().for_each(|line| eprintln!("xtask: {line}"));
            Ok(disagreements.is_empty())
        }
        Suite::Diff(DiffArguments { seed, count, only, bits, how }) => {
            let engine = engine(how.engine)?;
            let options = diff::Options { seed, count, only, bits, progress: 5_000_000 };
            let outcome = diff::run(engine.as_ref(), &options)?;
            if how.json {
                println!("{}", serde_json::to_string_pretty(&outcome).unwrap_or_default());
            } else {
                print!("{outcome}");
            }
            Ok(outcome.mismatches.is_empty())
        }
        Suite::KernelDiff(KernelDiffArguments { seed, count, only, mode, case, json }) => {
            let soft = engine(EngineName::Soft)?;
            let options = kernel_diff::Options { seed, count, only, mode, case, progress: 50_000 };
            let outcome = kernel_diff::run(soft.as_ref(), &KvmEngine::default(), &options)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&outcome).unwrap_or_default());
            } else {
                print!("{outcome}");
            }
            Ok(outcome.mismatches.is_empty())
        }
        Suite::Fex(FexArguments { dir, how, only, all }) => {
            let table = fex::run(&dir, how.engine, only.as_deref())?;
            if how.json || all {
                return print(&table, how.json);
            }
            print!("{}", table.without_passes());
            Ok(table.succeeded())
        }
        Suite::Test386 { dir, how } => print(&test386::run(&dir, how.engine)?, how.json),
        Suite::Programs { guest, how } => print(&programs::run(how.engine, &guest)?, how.json),
        Suite::SelftestsX86 { dir, guest, how } => {
            print(&selftests::run(&dir, how.engine, &guest)?, how.json)
        }
        Suite::KvmUnitTests { dir, how, qemu, only, output } => {
            let options = kvm_unit_tests::Options { engine: how.engine, qemu, only, output };
            print(&kvm_unit_tests::run(&dir, &options)?, how.json)
        }
    }
}

fn print(table: &Table, json: bool) -> Result<bool, SuiteError> {
    if json {
        println!("{}", table.to_json());
    } else {
        print!("{table}");
    }
    Ok(table.succeeded())
}
