//! Test suites that others wrote. Each module runs one from the directory where it lies; nothing of a suite is part
//! of this repository.

pub mod fex;
pub mod kvm_unit_tests;
pub mod programs;
pub mod report;
pub mod selftests;
pub mod test386;

use std::path::PathBuf;
use std::sync::Arc;

use harrier_engine::{Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;

/// An engine by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineName {
    /// The software processor.
    Soft,
    /// KVM, with the software processor's help where it needs some.
    Kvm,
}

impl EngineName {
    /// The name, as `harrier run --engine` takes it.
    fn word(self) -> &'static str {
        match self {
            EngineName::Soft => "soft",
            EngineName::Kvm => "kvm",
        }
    }
}

/// What programs of a Debian root run in.
#[derive(Debug, Clone, clap::Args)]
pub struct Debian {
    /// The `harrier` program
    #[arg(long, value_name = "FILE")]
    pub harrier: PathBuf,
    /// An ext4 image of a Debian, which stays as it is
    #[arg(long, value_name = "FILE")]
    pub rootfs: PathBuf,
}

/// Why a suite cannot be run at all.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum SuiteError {
    /// The directory is not what it should be.
    #[error("'{}' is no directory of {suite}: there is no {missing}", .dir.display())]
    NotThere { dir: PathBuf, suite: &'static str, missing: String },
    /// A file cannot be read.
    #[error("'{}' cannot be read ({source}): check the suite's directory", .file.display())]
    Unreadable { file: PathBuf, source: std::io::Error },
    /// The engine cannot be used.
    #[error("engine {engine} is not available: {reason}")]
    Engine { engine: &'static str, reason: String },
    /// A program that is needed does not run.
    #[error("{program} cannot be run ({source}): install it")]
    Program { program: &'static str, source: std::io::Error },
    /// The assembler does not take the suite.
    #[error("'{}' cannot be assembled: {reason}", .file.display())]
    Assembly { file: PathBuf, reason: String },
    /// No machine for the suite.
    #[error("the guest cannot be run: {0}")]
    Guest(String),
    /// The host refuses a temporary file.
    #[error("no temporary file ({0}): make room")]
    Temporary(std::io::Error),
    /// The survey of instructions.
    #[error("instructions cannot be executed one by one: {0}")]
    Coverage(String),
    /// The comparison with the processor.
    #[error(transparent)]
    Diff(#[from] crate::diff::DiffError),
    /// The comparison with KVM.
    #[error(transparent)]
    KernelDiff(#[from] crate::kernel_diff::KernelDiffError),
    /// Nothing is left to run.
    #[error("no entry is called {0}")]
    NoEntry(String),
}

/// The engine of this name, if it runs here.
///
/// # Errors
/// [`SuiteError::Engine`] says why it does not.
pub fn engine(name: EngineName) -> Result<Box<dyn Engine>, SuiteError> {
    let engine: Box<dyn Engine> = match name {
        EngineName::Soft => Box::new(SoftEngine),
        EngineName::Kvm => Box::new(KvmEngine::default().with_software(Arc::new(SoftEngine))),
    };
    match engine.probe() {
        Probe::Available { .. } => Ok(engine),
        Probe::Unavailable { reason } => Err(SuiteError::Engine { engine: engine.name(), reason }),
    }
}
