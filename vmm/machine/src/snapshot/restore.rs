//! Making a machine of a snapshot.
//!
//! [`MachineBuilder::restoring`] makes memory, VM and vCPUs as the snapshot wants them; the owner adds the same devices
//! as when the machine was first built; [`MachineBuilder::restore`] puts everything into its state. Any engine that
//! offers the CPU model will do.

use std::ops::RangeInclusive;
use std::sync::Arc;

use harrier_engine::cpu_state::{CpuState, msr};
use harrier_engine::{CpuModel, Engine, EngineError};
use harrier_snapshot::{Chain, Section, Snapshot, SnapshotError};

use super::sections::{CPU_VERSION, HOST_PREFIX, MACHINE, MACHINE_VERSIONS, MachineState, cpu_name};
use super::{Identity, Restoration, Written};
use crate::builder::{BuildError, MachineBuilder, MachineConfig};
use crate::machine::Machine;
use crate::memory::GuestRam;

/// Why a snapshot does not become a machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The container's.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine that it wants is not possible here.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A section cannot be taken up.
    #[error("snapshot '{path}': section '{section}': {reason}")]
    Section {
        /// The snapshot's folder.
        path: String,
        /// The section.
        section: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The snapshot has a section that nothing here knows.
    #[error(
        "snapshot '{path}' has a section '{section}' that this machine has no device for: give it the same devices"
    )]
    UnknownSection {
        /// The snapshot's folder.
        path: String,
        /// The section.
        section: String,
    },
}

fn wrong(snapshot: &Snapshot, section: &str, reason: impl ToString) -> RestoreError {
    RestoreError::Section {
        path: snapshot.path().display().to_string(),
        section: section.to_owned(),
        reason: reason.to_string(),
    }
}

/// A section that is JSON of a known version.
fn read<T: serde::de::DeserializeOwned>(
    snapshot: &Snapshot,
    name: &str,
    versions: &RangeInclusive<u32>,
) -> Result<T, RestoreError> {
    let Section { version: found, bytes, .. } = snapshot.section(name)?;
    if !versions.contains(&found) {
        let reason = format!("version {found} is unknown, this harrier has {}", versions.end());
        return Err(wrong(snapshot, name, reason));
    }
    serde_json::from_slice(&bytes).map_err(|err| wrong(snapshot, name, err))
}

impl MachineState {
    /// The section of a snapshot.
    ///
    /// # Errors
    /// [`RestoreError`] if it is not there or not one.
    pub fn read(snapshot: &Snapshot) -> Result<Self, RestoreError> {
        let state: MachineState = read(snapshot, MACHINE, &MACHINE_VERSIONS)?;
        if state.memory_bytes != snapshot.manifest().memory_bytes() {
            let reason = format!("{} bytes of memory are not what the memory file has", state.memory_bytes);
            return Err(wrong(snapshot, MACHINE, reason));
        }
        Ok(state)
    }

    /// The configuration of the machine.
    ///
    /// # Errors
    /// [`RestoreError`] if the CPU model is unknown.
    pub fn config(&self, snapshot: &Snapshot) -> Result<MachineConfig, RestoreError> {
        let cpu_model: CpuModel = self.cpu_model.parse().map_err(|err| wrong(snapshot, MACHINE, err))?;
        Ok(MachineConfig { vcpu_count: self.vcpu_count, memory_bytes: self.memory_bytes, cpu_model })
    }
}

impl MachineBuilder {
    /// Creates memory, virtual machine, processors and interrupt controller as a snapshot wants them. Memory is mapped,
    /// not read.
    ///
    /// # Errors
    /// [`RestoreError`] if the snapshot is damaged or the machine is not possible on this engine or host.
    pub fn restoring(engine: &dyn Engine, chain: &Arc<Chain>) -> Result<Self, RestoreError> {
        let snapshot = chain.snapshot();
        let state = MachineState::read(snapshot)?;
        let config = state.config(snapshot)?;
        if config.vcpu_count as usize > snapshot.manifest().sections.len() {
            return Err(wrong(snapshot, MACHINE, format!("{} vCPUs have no sections", config.vcpu_count)));
        }
        Ok(Self::with_memory(engine, &config, Some(state.boot_tsc_khz), || GuestRam::from_snapshot(chain))?)
    }

    /// Takes up the snapshot that [`MachineBuilder::restoring`] was given; the same devices have been added as when the
    /// machine was first built. It stands until it is started. `restoration` says what is to become of it.
    ///
    /// # Errors
    /// [`RestoreError`] if a section is missing, unknown, damaged, or not one that its device or the engine can be in.
    pub fn restore(mut self, chain: &Chain, restoration: &Restoration) -> Result<Machine, RestoreError> {
        let snapshot = chain.snapshot();
        let state = MachineState::read(snapshot)?;
        let identity = Identity {
            role: restoration.role,
            generation: state.generation.saturating_add(1),
            clone_index: restoration.clone_index,
        };
        // Set once: a builder restores once.
        let _ = self.lives.identity.set(identity);
        let units = self.all_units();
        for entry in &snapshot.manifest().sections {
            let name = entry.name.as_str();
            let is_cpu = (0..self.vcpus.len()).any(|index| cpu_name(index) == name);
            let is_unit = units.iter().any(|unit| unit.name() == name);
            if !(name == MACHINE || is_cpu || is_unit || name.starts_with(HOST_PREFIX)) {
                return Err(RestoreError::UnknownSection {
                    path: snapshot.path().display().to_string(),
                    section: name.to_owned(),
                });
            }
        }
        for unit in units {
            let section = snapshot.section(unit.name())?;
            unit.restore(section.version, &section.bytes).map_err(|err| wrong(snapshot, unit.name(), err))?;
        }
        let engine = |err: EngineError| wrong(snapshot, MACHINE, err);
        self.vm.set_clock_ns(state.clock_ns).map_err(engine)?;
        let tsc_khz = self.vm.tsc_khz();
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            let name = cpu_name(index);
            let mut cpu: CpuState = read(snapshot, &name, &(CPU_VERSION..=CPU_VERSION))?;
            rebase_tsc(&mut cpu, tsc_khz);
            vcpu.set_state(&cpu).map_err(|err| wrong(snapshot, &name, err))?;
        }
        if let Some(id) = &self.generation_id {
            id.renew().map_err(|err| wrong(snapshot, MACHINE, format!("no new generation id: {err}")))?;
        }
        let parent = restoration.is_parent.then(|| snapshot.path().to_owned());
        Ok(self.finish(state.boot_tsc_khz, Written::since_restore(parent), identity))
    }
}

/// Where the TSC has another frequency here, a deadline stays as far away in time as it was. The counter itself goes on
/// from its value: the clock page carries guest time.
fn rebase_tsc(cpu: &mut CpuState, to: u32) {
    let from = cpu.tsc.frequency_khz;
    if from == to || from == 0 {
        return;
    }
    let now = cpu.tsc.value;
    for (index, value) in &mut cpu.msrs {
        if *index == msr::IA32_TSC_DEADLINE && *value != 0 {
            let left = u128::from(value.saturating_sub(now)) * u128::from(to) / u128::from(from);
            *value = now.saturating_add(u64::try_from(left).unwrap_or(u64::MAX));
        }
    }
    cpu.tsc.frequency_khz = to;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_stays_as_far_away_as_it_was() {
        let mut cpu = CpuState::default();
        cpu.tsc.value = 1_000;
        cpu.tsc.frequency_khz = 2_000_000;
        cpu.msrs = vec![(msr::IA32_TSC_DEADLINE, 5_000), (msr::TSC_AUX, 5_000)];
        rebase_tsc(&mut cpu, 1_000_000);
        assert_eq!(cpu.msrs, [(msr::IA32_TSC_DEADLINE, 3_000), (msr::TSC_AUX, 5_000)]);
        assert_eq!((cpu.tsc.value, cpu.tsc.frequency_khz), (1_000, 1_000_000));
        cpu.tsc.frequency_khz = 2_000_000;
        cpu.msrs = vec![(msr::IA32_TSC_DEADLINE, 10)];
        rebase_tsc(&mut cpu, 1_000_000);
        assert_eq!(cpu.msrs, [(msr::IA32_TSC_DEADLINE, 1_000)]);
    }
}
