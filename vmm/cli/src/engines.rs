//! Which engine runs a machine.

use std::sync::Arc;

use harrier_engine::{CpuModel, Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use thiserror::Error;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum EngineChoice {
    #[default]
    Auto,
    Kvm,
    Soft,
}

#[derive(Debug, Error)]
pub(crate) enum EngineChoiceError {
    #[error("unknown engine '{0}': use auto, kvm or soft")]
    Unknown(String),
    #[error("engine kvm is not available: {0}: or use --engine soft")]
    NoKvm(String),
}

impl std::str::FromStr for EngineChoice {
    type Err = EngineChoiceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(EngineChoice::Auto),
            "kvm" => Ok(EngineChoice::Kvm),
            "soft" => Ok(EngineChoice::Soft),
            _ => Err(EngineChoiceError::Unknown(name.to_owned())),
        }
    }
}

/// An engine, and why it was taken where the user left the choice.
pub(crate) struct Selected {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) reason: Option<&'static str>,
}

/// Picks the engine. One that is asked for by name is taken or refused, never replaced.
pub(crate) fn select(choice: EngineChoice) -> Result<Selected, EngineChoiceError> {
    let soft = || Box::new(SoftEngine);
    match choice {
        EngineChoice::Soft => Ok(Selected { engine: soft(), reason: None }),
        EngineChoice::Kvm => {
            let engine = KvmEngine::default().with_software(Arc::new(SoftEngine));
            match engine.probe() {
                Probe::Available { .. } => Ok(Selected { engine: Box::new(engine), reason: None }),
                Probe::Unavailable { reason } => Err(EngineChoiceError::NoKvm(reason)),
            }
        }
        EngineChoice::Auto => Ok(Selected {
            engine: soft(),
            reason: Some("engine soft: kvm is taken when it is asked for, with --engine kvm"),
        }),
    }
}

/// The best model that is not bound to this host.
pub(crate) fn default_model(engine: &dyn Engine) -> CpuModel {
    engine.cpu_models().into_iter().filter(|model| *model != CpuModel::Host).max().unwrap_or(CpuModel::V1)
}
