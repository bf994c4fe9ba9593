//! CPUID: what each model shows.

use harrier_engine::{CpuModel, EngineError};

/// Models that this engine offers on this host.
pub(crate) fn supported_models() -> Vec<CpuModel> {
    vec![CpuModel::V1, CpuModel::V2]
}

/// Refuses a model that this engine or host cannot offer.
pub(crate) fn check_model(model: CpuModel) -> Result<(), EngineError> {
    if supported_models().contains(&model) {
        Ok(())
    } else {
        Err(EngineError::ModelUnsupported { model, missing: "avx avx2 bmi1 bmi2 fma".to_owned() })
    }
}
