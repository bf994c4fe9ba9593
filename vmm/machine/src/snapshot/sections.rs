//! What a machine's state consists of: a section for the machine, one for each vCPU, one for each unit.
//!
//! Sections that begin with [`HOST_PREFIX`] belong to whoever owns the machine; they are kept and not looked at.

use harrier_engine::CpuState;
use harrier_snapshot::Section;
use serde::{Deserialize, Serialize};

use super::TakeError;
use crate::machine::Parts;

/// How names of the owner's sections begin.
pub const HOST_PREFIX: &str = "host.";
/// The machine's own section.
pub(crate) const MACHINE: &str = "machine";
/// 1 had no generation, nor whether the model was enforced.
pub(crate) const MACHINE_VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;
pub(crate) const CPU_VERSION: u32 = 1;

/// The section of the machine itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Number of processors.
    pub vcpu_count: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// The processor that the guest sees, as [`harrier_engine::CpuModel`] writes it.
    pub cpu_model: String,
    /// The guest's TSC frequency when it booted, in kHz.
    pub boot_tsc_khz: u32,
    /// The paravirtual clock, in nanoseconds.
    pub clock_ns: u64,
    /// The engine that ran the machine. For people: any engine may go on.
    pub engine: String,
    /// The restores that led to the machine.
    #[serde(default)]
    pub generation: u64,
    /// Whether that engine held the guest to its CPU model. For people: one that did not asked the guest to keep to it.
    #[serde(default = "yes")]
    pub cpu_model_enforced: bool,
}

/// What was not written down before an engine could say it.
fn yes() -> bool {
    true
}

/// Name of a vCPU's section.
pub(crate) fn cpu_name(index: usize) -> String {
    format!("cpu-{index}")
}

pub(crate) fn json<T: Serialize>(name: &str, version: u32, value: &T) -> Result<Section, TakeError> {
    let bytes = serde_json::to_vec(value)
        .map_err(|err| TakeError::Unit { unit: name.to_owned(), reason: err.to_string() })?;
    Ok(Section { name: name.to_owned(), version, bytes })
}

/// The state of a machine that stands.
pub(crate) fn save(parts: &Parts) -> Result<Vec<Section>, TakeError> {
    let machine = MachineState {
        vcpu_count: parts.config.vcpu_count,
        memory_bytes: parts.config.memory_bytes,
        cpu_model: parts.config.cpu_model.to_string(),
        boot_tsc_khz: parts.boot_tsc_khz,
        clock_ns: parts.vm.clock_ns()?,
        engine: parts.engine.to_owned(),
        generation: parts.identity.generation,
        cpu_model_enforced: parts.cpu_model_enforced,
    };
    let mut sections = vec![json(MACHINE, *MACHINE_VERSIONS.end(), &machine)?];
    let states: Vec<CpuState> = parts.cpu_states()?;
    for (index, state) in states.iter().enumerate() {
        sections.push(json(&cpu_name(index), CPU_VERSION, state)?);
    }
    for unit in &parts.units {
        let name = unit.name().to_owned();
        let bytes = unit.save().map_err(|err| TakeError::Unit { unit: name.clone(), reason: err.0 })?;
        sections.push(Section { name, version: unit.version(), bytes });
    }
    Ok(sections)
}
