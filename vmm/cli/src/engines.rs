//! Which engine runs a machine.

use std::sync::Arc;

use harrier_engine::calibrate::Loop;
use harrier_engine::{CpuModel, Engine, EngineError};
use harrier_engine_kvm::{Calibration, KvmEngine};
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
    pub(crate) reason: Option<String>,
}

/// Picks the engine. One that is asked for by name is taken or refused, never replaced.
pub(crate) fn select(choice: EngineChoice) -> Result<Selected, EngineChoiceError> {
    match choice {
        EngineChoice::Soft => Ok(Selected { engine: Box::new(SoftEngine), reason: None }),
        EngineChoice::Kvm => {
            let engine = kvm();
            // A guest of a few instructions: a KVM that runs none is not quietly replaced by software.
            match engine.runs_kernel_mode() {
                Ok(_) => Ok(Selected { engine: Box::new(engine), reason: None }),
                Err(EngineError::Unavailable { reason, .. }) => Err(EngineChoiceError::NoKvm(reason)),
                Err(err) => Err(EngineChoiceError::NoKvm(err.to_string())),
            }
        }
        EngineChoice::Auto => {
            let engine = kvm();
            let choice = choose(engine.calibrate().map_err(|err| err.to_string()), soft_mips);
            let engine: Box<dyn Engine> = if choice.kvm { Box::new(engine) } else { Box::new(SoftEngine) };
            Ok(Selected { engine, reason: Some(choice.reason) })
        }
    }
}

fn kvm() -> KvmEngine {
    KvmEngine::default().with_software(Arc::new(SoftEngine))
}

/// Speed of the software processor at privilege level 3, in million instructions a second.
pub(crate) fn soft_mips() -> Result<f64, String> {
    Loop::new(&SoftEngine).and_then(|mut guest| guest.mips(3)).map_err(|err| err.to_string())
}

/// What `--engine auto` takes, and why.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) kvm: bool,
    pub(crate) reason: String,
}

/// Decides by what was measured just now; nothing is remembered from run to run.
pub(crate) fn choose(
    kvm: Result<Calibration, String>,
    soft_mips: impl FnOnce() -> Result<f64, String>,
) -> Choice {
    let taken = |kvm, reason: String| Choice {
        kvm,
        reason: format!("engine {}: {reason}", if kvm { "kvm" } else { "soft" }),
    };
    let found = match kvm {
        Ok(found) => found,
        Err(reason) => return taken(false, reason),
    };
    let Calibration { kernel_mips, user_mips, .. } = found;
    if found.kernel_mode_in_hardware {
        return taken(
            true,
            format!("it runs kernel mode on the processor ({kernel_mips:.0} million instructions/s)"),
        );
    }
    // Kernel mode is in software then, too; what is left to gain is user code.
    let soft = match soft_mips() {
        Ok(soft) => soft,
        Err(reason) => return taken(true, format!("software cannot run guests here: {reason}")),
    };
    let speeds = format!("{user_mips:.0} against {soft:.0} million instructions/s in software");
    if user_mips >= LENDING_PAYS * soft {
        return taken(
            true,
            format!(
                "it runs user code on the processor ({speeds}); kernel mode, which this KVM emulates, is in software"
            ),
        );
    }
    taken(false, format!("kvm emulates kernel mode here, and its user code is hardly faster ({speeds})"))
}

/// User code that is this much faster than in software is executed by the processor itself, then several times faster: other
/// programs may have had the processor while it was measured. Lending it pays then, and code for which it does not pay, since
/// it is soon back in kernel mode, stays in software by itself.
const LENDING_PAYS: f64 = 1.2;

/// The best model that is not bound to this host.
pub(crate) fn default_model(engine: &dyn Engine) -> CpuModel {
    engine.cpu_models().into_iter().filter(|model| *model != CpuModel::Host).max().unwrap_or(CpuModel::V1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calibration(kernel_mips: f64, user_mips: f64) -> Result<Calibration, String> {
        Ok(Calibration { kernel_mips, user_mips, kernel_mode_in_hardware: kernel_mips > 100.0 })
    }

    #[test]
    fn a_kvm_that_runs_kernel_mode_on_the_processor_is_taken_without_another_look() {
        let choice = choose(calibration(3000.0, 3000.0), || panic!("software need not be measured"));
        assert!(choice.kvm);
        assert_eq!(
            choice.reason,
            "engine kvm: it runs kernel mode on the processor (3000 million instructions/s)"
        );
    }

    #[test]
    fn a_kvm_that_emulates_kernel_mode_is_taken_where_its_user_code_is_fast() {
        let choice = choose(calibration(1.5, 5000.0), || Ok(480.0));
        assert!(choice.kvm, "{choice:?}");
        assert_eq!(
            choice.reason,
            "engine kvm: it runs user code on the processor (5000 against 480 million instructions/s in software); kernel \
             mode, which this KVM emulates, is in software"
        );
        let choice = choose(calibration(1.5, 500.0), || Ok(480.0));
        assert!(!choice.kvm, "{choice:?}");
        assert_eq!(
            choice.reason,
            "engine soft: kvm emulates kernel mode here, and its user code is hardly faster (500 against 480 million \
             instructions/s in software)"
        );
        assert!(choose(calibration(1.5, 500.0), || Err("no memory".to_owned())).kvm);
    }

    #[test]
    fn without_kvm_software_is_taken_and_the_reason_is_why() {
        let choice = choose(Err("no permission".to_owned()), || panic!("nothing to compare with"));
        assert_eq!(choice, Choice { kvm: false, reason: "engine soft: no permission".to_owned() });
    }
}
