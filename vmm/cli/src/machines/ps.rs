//! `harrier ps`: a line for each machine.

use std::io::Write;
use std::time::Duration;

use harrier_control::{Entry, ExitRecord, Life, MachineInfo, Registry, unix_ms};
use serde_json::{Value, json};

use super::client;
use crate::exit::Failure;
use crate::flags::PsFlags;
use crate::table;

/// Monitors that are asked at the same time.
const ASKED_AT_ONCE: usize = 16;
/// How long one may take before it counts as not answering.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Characters of a command in the table.
const COMMAND_MAX: usize = 30;

/// How it stands with a machine, as far as its monitor says.
pub(super) enum Status {
    Live(Box<MachineInfo>),
    /// The monitor lives and does not answer.
    Silent,
    Ended(ExitRecord),
    Lost,
}

impl Status {
    pub(super) fn word(&self) -> &'static str {
        match self {
            Status::Live(info) => info.state.as_str(),
            Status::Silent => "unresponsive",
            Status::Ended(_) => "exited",
            Status::Lost => "lost",
        }
    }

    fn is_live(&self) -> bool {
        matches!(self, Status::Live(_) | Status::Silent)
    }

    fn text(&self, now_ms: u64) -> String {
        match self {
            Status::Live(info) => {
                let since = info.started_ms.unwrap_or(info.created_ms);
                format!("{} {}", info.state.as_str(), table::span(now_ms.saturating_sub(since)))
            }
            Status::Ended(exit) => format!(
                "exited ({}) {} ago",
                exit.exit_code,
                table::span(now_ms.saturating_sub(exit.ended_ms))
            ),
            Status::Silent | Status::Lost => self.word().to_owned(),
        }
    }
}

/// Asks a machine's monitor, if it lives. `None` if the machine is being removed.
pub(super) fn status(entry: &Entry) -> Option<Status> {
    let over = |life: &Life| match life {
        Life::Alive => None,
        Life::Ended(exit) => Some(Status::Ended(exit.clone())),
        Life::Lost => Some(Status::Lost),
    };
    if let Some(status) = over(&entry.life) {
        return Some(status);
    }
    match client(entry).with_timeout(ANSWER_TIMEOUT).info() {
        Ok(info) => Some(Status::Live(Box::new(info))),
        // It may just have ended, or just begun.
        Err(_) => match entry.wait_within(Some(Duration::from_millis(200))) {
            Ok(Some(life)) => over(&life),
            Ok(None) => Some(Status::Silent),
            Err(_) => None,
        },
    }
}

fn statuses(entries: Vec<Entry>) -> Vec<(Entry, Status)> {
    let mut all = Vec::new();
    for group in entries.chunks(ASKED_AT_ONCE) {
        let asked: Vec<Option<Status>> = std::thread::scope(|scope| {
            let asking: Vec<_> = group.iter().map(|entry| scope.spawn(|| status(entry))).collect();
            asking.into_iter().map(|asked| asked.join().unwrap_or(None)).collect()
        });
        all.extend(group.iter().cloned().zip(asked).filter_map(|(entry, status)| Some((entry, status?))));
    }
    all
}

pub(super) fn run(flags: &PsFlags, registry: &Registry) -> Result<u8, Failure> {
    let filters: Vec<Filter> =
        flags.filter.iter().map(|text| text.parse()).collect::<Result<_, Failure>>()?;
    let asks_for_ended = filters.iter().any(Filter::is_about_ended);
    let mut machines = statuses(registry.list()?);
    machines.retain(|(entry, status)| {
        (flags.all || asks_for_ended || status.is_live())
            && filters.iter().all(|filter| filter.matches(entry, status))
    });
    let text = if flags.json {
        let list: Vec<Value> = machines.iter().map(|(entry, status)| to_json(entry, status)).collect();
        format!("{:#}\n", Value::Array(list))
    } else if flags.quiet {
        machines.iter().map(|(entry, _)| format!("{}\n", entry.record.id)).collect()
    } else {
        let now_ms = unix_ms();
        let head = ["ID", "NAME", "STATUS", "ENGINE", "CPUS", "MEMORY", "CREATED", "COMMAND"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(machines.iter().map(|(entry, status)| row(entry, status, now_ms, flags.no_trunc)));
        table::aligned(&rows)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|err| Failure::new(format!("stdout cannot be written ({err})")))?;
    Ok(0)
}

fn row(entry: &Entry, status: &Status, now_ms: u64, whole: bool) -> Vec<String> {
    let record = &entry.record;
    let (engine, cpus, memory) = match status {
        Status::Live(info) => (info.engine.clone(), info.cpus.to_string(), table::size(info.memory_bytes)),
        _ => ("-".to_owned(), "-".to_owned(), "-".to_owned()),
    };
    let command = crate::one_line(&record.command.join(" "));
    let command = match command.char_indices().nth(COMMAND_MAX) {
        Some((end, _)) if !whole => format!("{}...", command.get(..end).unwrap_or_default()),
        _ => command,
    };
    vec![
        record.id.to_string(),
        record.name.to_string(),
        status.text(now_ms),
        engine,
        cpus,
        memory,
        format!("{} ago", table::span(now_ms.saturating_sub(record.created_ms))),
        if record.command.is_empty() { "(kernel)".to_owned() } else { command },
    ]
}

/// Everything that is known about a machine: what it was made as, what its monitor says, how it ended.
pub(super) fn to_json(entry: &Entry, status: &Status) -> Value {
    let record = &entry.record;
    let mut object = json!({
        "id": record.id,
        "name": record.name,
        "state": status.word(),
        "created_ms": record.created_ms,
        "command": record.command,
        "detached": record.detached,
        "auto_remove": record.auto_remove,
        "folder": entry.folder.path().to_string_lossy(),
    });
    let more = match status {
        Status::Live(info) => serde_json::to_value(info).unwrap_or_default(),
        Status::Ended(exit) => serde_json::to_value(exit).unwrap_or_default(),
        Status::Lost => json!({ "exit_code": null, "error": super::LOST }),
        Status::Silent => json!({}),
    };
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

/// A condition of --filter.
#[derive(Debug, PartialEq, Eq)]
enum Filter {
    Name(String),
    Id(String),
    State(String),
    Exit(u8),
}

const STATES: &[&str] = &["starting", "running", "paused", "stopping", "unresponsive", "exited", "lost"];

impl std::str::FromStr for Filter {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let unusable =
            || Failure::new(format!("--filter '{text}' is no condition: use name=, id=, state= or exit="));
        let (key, value) = text.split_once('=').ok_or_else(unusable)?;
        match key {
            "name" => Ok(Filter::Name(value.to_owned())),
            "id" => Ok(Filter::Id(value.to_owned())),
            "state" | "status" if STATES.contains(&value) => Ok(Filter::State(value.to_owned())),
            "state" | "status" => Err(Failure::new(format!(
                "--filter: no machine is '{value}': use one of {}",
                STATES.join(", ")
            ))),
            "exit" | "exited" => value
                .parse()
                .map(Filter::Exit)
                .map_err(|_| Failure::new(format!("--filter: '{value}' is no exit code: give 0 to 255"))),
            _ => Err(unusable()),
        }
    }
}

impl Filter {
    fn is_about_ended(&self) -> bool {
        match self {
            Filter::Exit(_) => true,
            Filter::State(state) => state == "exited" || state == "lost",
            Filter::Name(_) | Filter::Id(_) => false,
        }
    }

    fn matches(&self, entry: &Entry, status: &Status) -> bool {
        match self {
            Filter::Name(text) => entry.record.name.as_str().contains(text),
            Filter::Id(prefix) => entry.record.id.as_str().starts_with(prefix),
            Filter::State(state) => status.word() == state,
            Filter::Exit(code) => matches!(status, Status::Ended(exit) if exit.exit_code == *code),
        }
    }
}
