//! What a user asks for, and whether it makes sense.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::expr::Expr;
use super::files::{self, InputFile, JobLimits, OutputFile};
use super::job::JobId;
use super::matching;

/// Jobs in one array.
pub const MAX_ARRAY: u64 = 100_000;
/// A memory that no host has.
const MAX_MEMORY: u64 = 1 << 50;
/// Arguments, environment and names together.
const MAX_TEXT: usize = 128 << 10;

/// One job as it was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobSpec {
    /// A word for people.
    pub name: Option<String>,
    /// Program and arguments; at least one.
    pub command: Vec<String>,
    /// Its environment, besides the guest's and `HARRIER_*`.
    pub env: BTreeMap<String, String>,
    /// Its working directory in the guest.
    pub workdir: Option<String>,
    /// Root file system image, an absolute path on the host that runs it; else the default guest.
    pub rootfs: Option<String>,
    /// A file that is its stdin, an absolute path; else empty.
    pub stdin: Option<String>,
    /// Files that it is given.
    pub inputs: Vec<InputFile>,
    /// Files that it leaves.
    pub outputs: Vec<OutputFile>,
    /// What its command may do.
    pub limits: JobLimits,
    /// It may run in a machine in which other such jobs of its user ran before, and leaves it to the next.
    pub reuse: bool,
    /// An exit code that means: the output files hold my state, start me again with them.
    pub checkpoint_exit: Option<u8>,
    /// Virtual processors.
    pub cpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// auto, kvm or soft.
    pub engine: String,
    /// v1, v2, v3 or host.
    pub cpu_model: Option<String>,
    /// Higher goes first.
    pub priority: i64,
    /// Which hosts may run it, see [`expr`](super::expr).
    pub requirements: Option<String>,
    /// Which of these it prefers: a number, higher is better.
    pub rank: Option<String>,
    /// How often a failed command is run again.
    pub retries: u32,
    /// The first wait before that, doubled each time.
    pub retry_delay_ms: u64,
    /// Its running time, without suspensions, per attempt.
    pub timeout_ms: Option<u64>,
    /// Running time between two checkpoints; 0 is never, `None` leaves it to the worker.
    pub checkpoint_interval_ms: Option<u64>,
    /// Words for people and filters.
    pub labels: BTreeMap<String, String>,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self {
            name: None,
            command: Vec::new(),
            env: BTreeMap::new(),
            workdir: None,
            rootfs: None,
            stdin: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
            limits: JobLimits::default(),
            reuse: false,
            checkpoint_exit: None,
            cpus: 1,
            memory_bytes: 512 << 20,
            engine: "auto".to_owned(),
            cpu_model: None,
            priority: 0,
            requirements: None,
            rank: None,
            retries: 0,
            retry_delay_ms: 10_000,
            timeout_ms: None,
            checkpoint_interval_ms: None,
            labels: BTreeMap::new(),
        }
    }
}

/// When a job may start after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DependencyKind {
    /// It has succeeded.
    Success,
    /// It has ended.
    End,
}

/// A job that another waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    /// The job waited for.
    pub job: JobId,
    /// What has to happen to it.
    pub kind: DependencyKind,
}

/// What is submitted: one job, or an array of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewJob {
    /// The job, or each of the array.
    pub spec: JobSpec,
    /// First and last index of an array.
    pub array: Option<(u64, u64)>,
    /// What it waits for.
    pub after: Vec<Dependency>,
    /// It is held until somebody releases it.
    pub hold: bool,
}

/// Something that makes no sense, under the key of a job file.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{key}: {message}")]
pub struct SpecProblem {
    /// The key.
    pub key: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

impl NewJob {
    /// Checks everything that can be checked without a host.
    pub fn check(&self) -> Result<(), SpecProblem> {
        let spec = &self.spec;
        let problem = |key: &'static str, message: String| Err(SpecProblem { key, message });
        match spec.command.first() {
            None => return problem("command", "there is none: name a program".to_owned()),
            Some(program) if program.is_empty() => {
                return problem("command", "the program's name is empty: name a program".to_owned());
            }
            Some(_) => {}
        }
        for word in &spec.command {
            if word.contains('\0') {
                return problem("command", format!("{word:?} holds a zero byte: remove it"));
            }
        }
        for (name, value) in &spec.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return problem("env", format!("{name:?} cannot be a variable: use a name without '='"));
            }
            if name.starts_with("HARRIER_") {
                return problem("env", format!("'{name}' is set by harrier: use another name"));
            }
        }
        for (key, path) in [("workdir", &spec.workdir), ("rootfs", &spec.rootfs), ("stdin", &spec.stdin)] {
            if let Some(path) = path
                && (!path.starts_with('/') || path.contains('\0'))
            {
                return problem(key, format!("{path:?} is not an absolute path: start it with /"));
            }
        }
        files::check(spec)?;
        if !(1..=255).contains(&spec.cpus) {
            return problem("cpus", format!("{} is not a number of cpus: give 1 to 255", spec.cpus));
        }
        if spec.memory_bytes < 16 << 20 {
            return problem(
                "memory",
                format!("{} bytes are too little for a guest: give 16M or more", spec.memory_bytes),
            );
        }
        if spec.memory_bytes > MAX_MEMORY {
            return problem(
                "memory",
                format!("{} bytes are more than any host has: give less", spec.memory_bytes),
            );
        }
        if !["auto", "kvm", "soft"].contains(&spec.engine.as_str()) {
            return problem("engine", format!("'{}' is unknown: use auto, kvm or soft", spec.engine));
        }
        if let Some(model) = &spec.cpu_model
            && !["v1", "v2", "v3", "host"].contains(&model.as_str())
        {
            return problem("cpu_model", format!("'{model}' is unknown: use v1, v2, v3 or host"));
        }
        for (key, text) in [("requirements", &spec.requirements), ("rank", &spec.rank)] {
            if let Some(text) = text
                && let Err(err) = Expr::parse_with(text, matching::NAMES)
            {
                return problem(key, err.to_string());
            }
        }
        if spec.retries > 1000 {
            return problem("retries", format!("{} are too many: give up to 1000", spec.retries));
        }
        if let Some(interval) = spec.checkpoint_interval_ms
            && (1..1000).contains(&interval)
        {
            let message = format!("{interval} ms are too short: give 1s or more, or never");
            return problem("checkpoint_interval", message);
        }
        if spec.reuse {
            let extras = [
                ("inputs", !spec.inputs.is_empty()),
                ("outputs", !spec.outputs.is_empty()),
                ("limits, user or isolate", spec.limits != JobLimits::default()),
                ("checkpoint_interval", spec.checkpoint_interval_ms.is_some_and(|interval| interval > 0)),
            ];
            if let Some((what, _)) = extras.iter().find(|(_, given)| *given) {
                let message =
                    format!("a machine that others use does without {what}: leave one of the two out");
                return problem("reuse", message);
            }
        }
        if let Some((first, last)) = self.array {
            if last < first {
                return problem("array", format!("{first}-{last} is empty: write FIRST-LAST"));
            }
            if last - first >= MAX_ARRAY {
                return problem(
                    "array",
                    format!("{first}-{last} is too long: an array has up to {MAX_ARRAY} jobs"),
                );
            }
        }
        let text: usize = spec.command.iter().map(String::len).sum::<usize>()
            + spec
                .env
                .iter()
                .chain(&spec.labels)
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>()
            + spec.inputs.iter().map(|file| file.host.len() + file.guest.len()).sum::<usize>()
            + spec.outputs.iter().map(|file| file.name.len() + file.guest.len()).sum::<usize>()
            + spec.name.as_ref().map_or(0, String::len);
        if text > MAX_TEXT {
            return problem(
                "command",
                format!("command, environment and labels have {text} bytes: {MAX_TEXT} at most, use a file"),
            );
        }
        Ok(())
    }
}
