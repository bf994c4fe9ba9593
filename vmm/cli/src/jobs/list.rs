//! `harrier queue` and `harrier status`.

use harrier_jobs::queue::{Attempt, Dependency, Event, Job, State};
use harrier_jobs::store::{EventQuery, JobFilter};
use serde::Serialize;

use super::flags::{FilterFlags, QueueFlags, StatusFlags};
use super::submit::pairs;
use super::table::Table;
use super::{ids, place, print, print_json, text};
use crate::exit::Failure;

fn filter(flags: &FilterFlags) -> Result<JobFilter, Failure> {
    let states: Vec<State> = flags
        .state
        .iter()
        .map(|word| word.parse().map_err(|err| Failure::new(format!("--state: {err}"))))
        .collect::<Result<_, _>>()?;
    Ok(JobFilter {
        states: (!states.is_empty()).then_some(states),
        user: flags.user.clone(),
        host: flags.host.clone(),
        labels: pairs("label", &flags.label)?,
        limit: flags.limit,
        ..JobFilter::default()
    })
}

pub(super) fn queue(flags: &QueueFlags) -> Result<u8, Failure> {
    let mut filter = filter(&flags.filter)?;
    if filter.states.is_none() && !flags.all {
        filter.states = Some(State::ALL.iter().copied().filter(|state| !state.is_final()).collect());
    }
    let jobs = place::open(&flags.place)?.jobs(&filter)?;
    if flags.json {
        print_json(&jobs)?;
        return Ok(0);
    }
    let now = text::now_ms();
    let mut table = Table::new(&["ID", "USER", "STATE", "PRIO", "AGE", "RUN", "HOST", "REASON", "COMMAND"]);
    for job in &jobs {
        table.row(vec![
            job.id.to_string(),
            job.user.clone(),
            job.activity.map_or(job.state.as_str(), |activity| activity.as_str()).to_owned(),
            job.priority.to_string(),
            text::span(now.saturating_sub(job.submitted_ms)),
            job.started_ms
                .map_or("-".to_owned(), |at| text::span(job.ended_ms.unwrap_or(now).saturating_sub(at))),
            job.host.clone().unwrap_or_else(|| "-".to_owned()),
            job.reason.to_string(),
            name(job),
        ]);
    }
    print(&table.text())?;
    Ok(0)
}

/// The job's name, or its command.
pub(super) fn name(job: &Job) -> String {
    let name = job.spec.name.clone().unwrap_or_else(|| text::command(&job.spec.command));
    match job.array {
        Some(array) => format!("[{}] {name}", array.index),
        None => name,
    }
}

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    job: Job,
    dependencies: Vec<Dependency>,
    attempts: Vec<Attempt>,
    events: Vec<Event>,
}

pub(super) fn status(flags: &StatusFlags) -> Result<u8, Failure> {
    let store = place::open(&flags.place)?;
    let mut all = Vec::new();
    for id in ids::parse(&flags.jobs)? {
        let query = EventQuery { job: Some(id), ..EventQuery::default() };
        all.push(Status {
            job: store.job(id)?,
            dependencies: store.dependencies(id)?,
            attempts: store.attempts(id)?,
            events: store.events(&query)?,
        });
    }
    if flags.json {
        print_json(&all)?;
        return Ok(0);
    }
    for (index, status) in all.iter().enumerate() {
        if index > 0 {
            print("\n")?;
        }
        print(&describe(status))?;
    }
    Ok(0)
}

fn describe(status: &Status) -> String {
    let job = &status.job;
    let mut lines: Vec<(&str, String)> = Vec::new();
    let mut line = |name: &'static str, value: String| lines.push((name, value));
    line("job", job.id.to_string());
    if let Some(name) = &job.spec.name {
        line("name", name.clone());
    }
    line("command", text::command(&job.spec.command));
    line("user", job.user.clone());
    let reason = match &job.detail {
        Some(detail) => format!("{} ({}: {detail})", job.state, job.reason),
        None => format!("{} ({})", job.state, job.reason),
    };
    line("state", reason);
    if let Some(code) = job.exit_code {
        line("exit code", code.to_string());
    }
    if let Some(array) = job.array {
        line("array", format!("index {} of the array of job {}", array.index, array.first));
    }
    line("priority", job.priority.to_string());
    line("wants", format!("{} cpus, {}", job.spec.cpus, text::size(job.spec.memory_bytes)));
    if let Some(requirements) = &job.spec.requirements {
        line("requirements", requirements.clone());
    }
    if !status.dependencies.is_empty() {
        let needs: Vec<String> = status.dependencies.iter().map(|needs| needs.job.to_string()).collect();
        line("after", needs.join(", "));
    }
    line("submitted", text::time(job.submitted_ms));
    if let Some(at) = job.not_before_ms {
        line("not before", text::time(at));
    }
    if let Some(at) = job.started_ms {
        line("started", text::time(at));
    }
    if let Some(at) = job.ended_ms {
        line("ended", text::time(at));
    }
    if let Some(host) = &job.host {
        line("host", host.clone());
    }
    if !job.wanted.is_empty() {
        line("asked for", job.wanted.to_string());
    }
    let mut out = String::new();
    for (name, value) in lines {
        out.push_str(&format!("{:<14}{value}\n", format!("{name}:")));
    }
    if !status.attempts.is_empty() {
        let mut table = Table::new(&["ATTEMPT", "HOST", "ENGINE", "CLAIMED", "TOOK", "KEPT", "END"]);
        for attempt in &status.attempts {
            let end = match (attempt.reason, attempt.exit_code) {
                (Some(reason), Some(code)) => format!("{reason} {code}"),
                (Some(reason), None) => reason.to_string(),
                (None, _) => "-".to_owned(),
            };
            let ended = |span: u64| attempt.ended_ms.map_or("-".to_owned(), |_| text::span(span));
            table.row(vec![
                attempt.epoch.to_string(),
                attempt.host.clone(),
                attempt.engine.clone().unwrap_or_else(|| "-".to_owned()),
                text::time(attempt.claimed_ms),
                ended(attempt.times.allocated_ms),
                ended(attempt.times.committed_ms),
                match &attempt.detail {
                    Some(detail) => format!("{end}: {detail}"),
                    None => end,
                },
            ]);
        }
        out.push('\n');
        out.push_str(&table.text());
    }
    out
}
