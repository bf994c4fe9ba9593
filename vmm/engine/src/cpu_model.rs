//! The processor that the guest sees: a named feature baseline, fixed at boot.

use std::fmt;
use std::str::FromStr;

/// A feature baseline of the x86-64 psABI, or the host's own processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CpuModel {
    /// x86-64-v1: SSE2.
    V1,
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    V3,
    /// What the host and the engine both have; not for moving between hosts.
    Host,
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CpuModel::V1 => "v1",
            CpuModel::V2 => "v2",
            CpuModel::V3 => "v3",
            CpuModel::Host => "host",
        })
    }
}

/// A name that is no CPU model.
#[derive(Debug, thiserror::Error)]
#[error("unknown cpu model '{0}': use v1, v2, v3 or host")]
pub struct UnknownCpuModel(pub String);

impl FromStr for CpuModel {
    type Err = UnknownCpuModel;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name.strip_prefix("x86-64-").unwrap_or(name) {
            "v1" => Ok(CpuModel::V1),
            "v2" => Ok(CpuModel::V2),
            "v3" => Ok(CpuModel::V3),
            "host" => Ok(CpuModel::Host),
            _ => Err(UnknownCpuModel(name.to_owned())),
        }
    }
}
