//! The types of the control API, version 1, as JSON has them. `resources/control-api.json` describes the same in OpenAPI;
//! a test compares the two. Readers skip members that they do not know, so that a later version may add some.

use serde::{Deserialize, Serialize};

use crate::name::{MachineId, MachineName};

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// It boots; its command does not run yet.
    Starting,
    /// Its command or kernel runs.
    Running,
    /// Its processors stand still.
    Paused,
    /// It has been told to end.
    Stopping,
}

impl MachineState {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        }
    }
}

/// What is known about a running machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its id.
    pub id: MachineId,
    /// Its name.
    pub name: MachineName,
    /// Whether its command has a terminal.
    pub tty: bool,
    /// Whether its command takes input from who attaches.
    pub interactive: bool,
    /// What it is doing.
    pub state: MachineState,
    /// The monitor's process.
    pub pid: u32,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When its command or kernel began to run, in milliseconds since 1970.
    pub started_ms: Option<u64>,
    /// Program and arguments; empty for a plain boot.
    pub command: Vec<String>,
    /// What executes its processors.
    pub engine: String,
    /// The processor that the guest sees.
    pub cpu_model: String,
    /// Number of processors.
    pub cpus: u32,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// What the machine uses of the host.
    pub usage: Usage,
    /// What is kept of the command's output, where it is kept.
    pub output: Option<OutputInfo>,
}

/// What a machine uses of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Memory of the monitor that is resident, guest memory included, in bytes.
    pub resident_bytes: u64,
    /// Processor time of the monitor, guest included, in milliseconds.
    pub cpu_ms: u64,
}

/// What is kept of a command's output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputInfo {
    /// Bytes of stdout that came.
    pub stdout_bytes: u64,
    /// Bytes of stderr that came.
    pub stderr_bytes: u64,
    /// Bytes of both that could not be kept.
    pub lost_bytes: u64,
    /// Why not, the last time.
    pub error: Option<String>,
}

/// The answer to what changes a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChange {
    /// The state after it.
    pub state: MachineState,
}

/// How a machine is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// After so many milliseconds it is ended at once.
    #[serde(default = "default_stop_timeout_ms")]
    pub timeout_ms: u64,
}

/// Ten seconds, as elsewhere.
#[must_use]
pub const fn default_stop_timeout_ms() -> u64 {
    10_000
}

impl Default for StopRequest {
    fn default() -> Self {
        Self { timeout_ms: default_stop_timeout_ms() }
    }
}

/// How a machine is ended, or its command sent a signal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KillRequest {
    /// A signal for the command, 1 to 64; without one, and for signal 9, the machine ends at once.
    #[serde(default)]
    pub signal: Option<u8>,
}

/// What snapshot is to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The folder that it is to be: an absolute path.
    pub target: String,
    /// Only what changed since the machine's last snapshot.
    #[serde(default)]
    pub diff: bool,
    /// Let a machine go on afterwards that was paused before.
    #[serde(default)]
    pub resume: bool,
    /// To be forked at once and not to be kept: it is not made durable, and is not the machine's last snapshot.
    #[serde(default)]
    pub image: bool,
    /// Memory is compressed.
    #[serde(default)]
    pub compress: bool,
}

/// What a snapshot was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its folder.
    pub path: String,
    /// Its id.
    pub id: String,
    /// How long the machine stood still for it, in microseconds.
    pub pause_us: u64,
    /// From the request until it was durable, in microseconds.
    pub total_us: u64,
    /// Pages of memory that were copied.
    pub pages: u64,
    /// Those of them that were copied while the machine stood still.
    pub pages_in_pause: u64,
    /// What the machine does now.
    pub state: MachineState,
}

/// A command to run in a machine that runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its environment, `NAME=VALUE` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// Its working directory; `None` is that of the machine's own command.
    #[serde(default)]
    pub workdir: Option<String>,
    /// The size of its terminal; `None` gives it none.
    #[serde(default)]
    pub tty: Option<TerminalSize>,
    /// Whether it has an input; it is empty otherwise.
    #[serde(default)]
    pub stdin: bool,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Rows; zero where it is not known.
    pub rows: u16,
    /// Columns; zero where it is not known.
    pub cols: u16,
}

/// A connection to a machine's own command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Whether input is to be sent.
    #[serde(default)]
    pub stdin: bool,
}

/// An answer that is not the one that was hoped for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One line for people.
    pub error: String,
}

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// One line for people.
    pub message: String,
}

impl ApiError {
    /// The request is malformed.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into() }
    }

    /// The machine's state does not allow it.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self { status: 409, message: message.into() }
    }

    /// It was tried and failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, message: message.into() }
    }
}
