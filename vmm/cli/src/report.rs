//! What is known about a run: as one JSON object, and as a table of phases.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use harrier_engine::CpuModel;
use harrier_jobs::{Cause, Outcome, Status};
use harrier_machine::{Mark, RunReport};
use serde_json::{Map, Value, json};

use crate::config::RunConfig;
use crate::exit::Failure;
use crate::files::OutputEnd;

/// Bytes of each stream that --json keeps.
const CAPTURE_MAX: usize = 64 << 20;

/// Keeps output for the JSON object; clones share it.
#[derive(Clone, Default)]
pub(crate) struct CapturedOutput {
    captured: Arc<Mutex<Captured>>,
}

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    dropped: u64,
}

impl Write for CapturedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        let room = CAPTURE_MAX.saturating_sub(captured.bytes.len()).min(bytes.len());
        captured.bytes.extend(bytes.iter().take(room));
        captured.dropped += (bytes.len() - room) as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CapturedOutput {
    /// `name` as text where the bytes are UTF-8, else `name_base64`; `name_dropped_bytes` where not all was kept.
    fn add_to(&self, object: &mut Map<String, Value>, name: &str) {
        let captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        match std::str::from_utf8(&captured.bytes) {
            Ok(text) => object.insert(name.to_owned(), text.into()),
            Err(_) => {
                let text = base64::engine::general_purpose::STANDARD.encode(&captured.bytes);
                object.insert(format!("{name}_base64"), text.into())
            }
        };
        if captured.dropped > 0 {
            object.insert(format!("{name}_dropped_bytes"), captured.dropped.into());
        }
    }
}

/// What is known about a run so far.
pub(crate) struct RunRecord {
    /// When the process began.
    pub(crate) started: Instant,
    pub(crate) machine_started: Option<Instant>,
    /// Why this engine was taken, where the user left the choice.
    pub(crate) engine_reason: Option<String>,
    pub(crate) agent_connected: Option<Instant>,
    pub(crate) captured: Option<(CapturedOutput, CapturedOutput)>,
    finished: Option<Instant>,
    /// Since `agent_connected`: agent ready, command started, command ended.
    command_times: Option<[Duration; 3]>,
    description: Map<String, Value>,
    command: Map<String, Value>,
    /// Of a command that has ended.
    pub(crate) output_files: Vec<OutputEnd>,
    cause: Cause,
    /// The guest has given no sign of life for too long.
    pub(crate) hung: bool,
    /// The command has ended its machine, with the run's exit code.
    pub(crate) ended_machine: bool,
    report: Option<RunReport>,
}

impl RunRecord {
    pub(crate) fn new(started: Instant) -> Self {
        RunRecord {
            started,
            machine_started: None,
            engine_reason: None,
            agent_connected: None,
            captured: None,
            finished: None,
            command_times: None,
            description: Map::new(),
            command: Map::new(),
            output_files: Vec::new(),
            cause: Cause::Itself,
            hung: false,
            ended_machine: false,
            report: None,
        }
    }

    /// Notes why this engine was taken, where the user left the choice.
    pub(crate) fn set_engine_reason(&mut self, reason: &str) {
        self.engine_reason = Some(reason.to_owned());
        self.description.insert("engine_reason".to_owned(), reason.into());
    }

    /// Notes what is run on.
    pub(crate) fn describe(&mut self, config: &RunConfig, engine: &str, model: CpuModel) {
        let mut set = |name: &str, value: Value| self.description.insert(name.to_owned(), value);
        set("engine", engine.into());
        set("cpu_model", model.to_string().into());
        set("cpus", config.vcpu_count.into());
        set("memory_bytes", config.memory_bytes.into());
    }

    /// Notes the end of the machine.
    pub(crate) fn ended(&mut self, report: &RunReport) {
        self.finished = Some(Instant::now());
        self.report = Some(report.clone());
    }

    /// Notes the end of the command.
    pub(crate) fn outcome(&mut self, outcome: &Outcome) {
        let times = &outcome.timings;
        self.command_times = Some([times.host_ready, times.host_started, times.host_ended]);
        let mut set = |name: &str, value: Value| self.command.insert(name.to_owned(), value);
        match &outcome.status {
            Status::Exited(code) => {
                set("status", "exited".into());
                set("command_exit_code", (*code).into());
            }
            Status::Signaled(number) => {
                set("status", "signaled".into());
                set("signal", (*number).into());
            }
            // Of a file, which is no command.
            Status::Transferred(_) => {}
            Status::NotFound(_) => {
                set("status", "not found".into());
            }
            Status::NotExecutable(_) => {
                set("status", "not executable".into());
            }
            Status::Failed(_) => {
                set("status", "failed".into());
            }
        }
        set("user_us", outcome.usage.user_us.into());
        set("system_us", outcome.usage.system_us.into());
        set("max_rss_kib", outcome.usage.max_rss_kib.into());
        self.cause = outcome.cause;
        if let Some(cause) = self.cause() {
            self.command.insert("cause".to_owned(), cause.into());
        }
    }

    /// What has ended the command, in a word, if not it itself.
    pub(crate) fn cause(&self) -> Option<&'static str> {
        match self.cause {
            _ if self.hung => Some("hung"),
            Cause::Itself => None,
            Cause::Memory => Some("memory"),
            Cause::Processes => Some("processes"),
        }
    }

    /// Notes what became of the output files.
    pub(crate) fn outputs(&mut self, files: Vec<OutputEnd>) {
        let of_file = |file: &OutputEnd| {
            json!({
                "guest": String::from_utf8_lossy(&file.guest),
                "host": file.host.to_string_lossy(),
                "bytes": file.facts.map(|facts| facts.bytes),
                "sha256": file.facts.map(|facts| facts.sha256.to_string()),
            })
        };
        if !files.is_empty() {
            self.command.insert("outputs".to_owned(), files.iter().map(of_file).collect());
        }
        self.output_files = files;
    }

    /// Whether the command has run: it has ended, and not because it could not begin.
    pub(crate) fn has_run(&self) -> bool {
        self.command.get("status").is_some_and(|status| status == "exited" || status == "signaled")
    }

    /// How the command ended, in a word; `None` if it did not come to an end.
    pub(crate) fn status(&self) -> Option<&str> {
        self.command.get("status").and_then(Value::as_str)
    }

    fn first_instruction(&self) -> Option<Instant> {
        self.report.as_ref().and_then(|report| report.first_instruction)
    }

    /// The phases in their order, as far as the run came.
    fn phases(&self) -> Vec<(&'static str, Duration)> {
        let [ready, command_start, command_end] = match (self.agent_connected, self.command_times) {
            (Some(connected), Some(times)) => times.map(|time| connected.checked_add(time)),
            _ => [None; 3],
        };
        let steps = [
            ("set-up", Some(self.started), self.machine_started),
            ("first guest instruction", self.machine_started, self.first_instruction()),
            ("kernel entry to agent", self.first_instruction(), ready.or(self.agent_connected)),
            ("agent to command", ready, command_start),
            ("command", command_start, command_end),
            ("end", command_end, self.finished),
            ("total", Some(self.started), self.finished),
        ];
        steps
            .into_iter()
            .filter_map(|(name, from, to)| Some((name, to?.saturating_duration_since(from?))))
            .collect()
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let Some(report) = &self.report else { return Vec::new() };
        let sum = |count: fn(&harrier_engine::Counters) -> u64| report.counters.iter().map(count).sum();
        let mut counts = Vec::new();
        if let Some(instructions) = report.instructions() {
            counts.push(("instructions", instructions));
        }
        counts.push(("device accesses", sum(|counters| counters.io_accesses)));
        counts.push(("code invalidations", sum(|counters| counters.code_invalidations)));
        counts.push(("assists", sum(|counters| counters.assists)));
        counts.push(("loans", sum(|counters| counters.loans)));
        counts.push(("console calls", report.hypercalls.console_calls));
        counts.push(("parks", report.hypercalls.parks));
        counts.push(("released bytes", report.hypercalls.released_bytes));
        counts
    }

    /// What the guest has marked, with the time since its first instruction.
    fn marks(&self) -> Vec<(&Mark, Duration)> {
        let Some((report, start)) = self.report.as_ref().zip(self.first_instruction()) else {
            return Vec::new();
        };
        let since = |mark: &Mark| mark.at.saturating_duration_since(start);
        report.hypercalls.marks.iter().map(|mark| (mark, since(mark))).collect()
    }
}

/// Prints the phases and counts on stderr.
pub(crate) fn print_timings(record: &RunRecord) {
    let mut table = String::new();
    for (name, time) in record.phases() {
        table.push_str(&format!("{name:<24}{:>14.3} ms\n", time.as_secs_f64() * 1e3));
    }
    for (mark, time) in record.marks() {
        let name = format!("mark {}", mark.label());
        table.push_str(&format!("{name:<24}{:>14.3} ms\n", time.as_secs_f64() * 1e3));
    }
    for (name, count) in record.counts() {
        table.push_str(&format!("{name:<24}{count:>14}\n"));
    }
    // Without stderr there is nobody to tell.
    let _ = io::stderr().write_all(table.as_bytes());
}

/// Prints everything as one object on stdout.
pub(crate) fn print_json(record: &RunRecord, result: &Result<u8, Failure>) {
    let mut object = Map::new();
    let mut set = |name: &str, value: Value| object.insert(name.to_owned(), value);
    match result {
        Ok(code) => set("exit_code", (*code).into()),
        Err(failure) => {
            set("exit_code", failure.code.into());
            set("error", failure.message.clone().into())
        }
    };
    object.extend(record.command.clone());
    if let Some((stdout, stderr)) = &record.captured {
        stdout.add_to(&mut object, "stdout");
        stderr.add_to(&mut object, "stderr");
    }
    object.extend(record.description.clone());
    if let Some(report) = &record.report {
        object.insert("machine_end".to_owned(), report.end.to_string().into());
    }
    let key = |name: &str| name.replace([' ', '-'], "_");
    let phases: Map<String, Value> = record
        .phases()
        .into_iter()
        .map(|(name, time)| (key(name), json!(time.as_secs_f64() * 1e3)))
        .collect();
    object.insert("timings_ms".to_owned(), phases.into());
    let marks: Vec<Value> = record
        .marks()
        .into_iter()
        .map(|(mark, time)| {
            json!({
                "phase": mark.phase,
                "label": mark.label(),
                "value": mark.value,
                "since_first_instruction_ms": time.as_secs_f64() * 1e3,
            })
        })
        .collect();
    object.insert("marks".to_owned(), marks.into());
    for (name, count) in record.counts() {
        object.insert(key(name), count.into());
    }
    // Whoever closed stdout does not want it.
    let _ = writeln!(io::stdout(), "{}", Value::Object(object));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_output_is_text_where_it_can_be() {
        let mut object = Map::new();
        let mut text = CapturedOutput::default();
        text.write_all("grün\n".as_bytes()).unwrap();
        text.add_to(&mut object, "stdout");
        let mut bytes = CapturedOutput::default();
        bytes.write_all(&[0xff, 0]).unwrap();
        bytes.add_to(&mut object, "stderr");
        assert_eq!(Value::Object(object), json!({"stdout": "grün\n", "stderr_base64": "/wA="}));
    }

    #[test]
    fn phases_end_where_the_run_ended() {
        let started = Instant::now();
        let mut record = RunRecord::new(started);
        assert!(record.phases().is_empty());
        record.machine_started = Some(started + Duration::from_millis(5));
        assert_eq!(record.phases(), [("set-up", Duration::from_millis(5))]);
    }
}
