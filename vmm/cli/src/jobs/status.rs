//! `harrier status` and `harrier why`: everything about single jobs.

use harrier_jobs::queue::{Attempt, Dependency, Event, Job};
use harrier_jobs::store::{self, EventQuery};
use serde::Serialize;

use super::flags::JobsFlags;
use super::table::Table;
use super::{ids, place, print, print_json, text};
use crate::exit::Failure;

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    job: Job,
    dependencies: Vec<Dependency>,
    attempts: Vec<Attempt>,
    events: Vec<Event>,
}

pub(super) fn status(flags: &JobsFlags) -> Result<u8, Failure> {
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
    if let Some(progress) = &job.progress {
        line("progress", progress.clone());
    }
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
    if !job.spec.labels.is_empty() {
        let labels = job.spec.labels.iter().map(|(name, value)| format!("{name}={value}"));
        line("labels", labels.collect::<Vec<_>>().join(", "));
    }
    if !job.spec.inputs.is_empty() {
        let inputs = job.spec.inputs.iter().map(|file| file.host.as_str());
        line("inputs", inputs.collect::<Vec<_>>().join(", "));
    }
    if !job.spec.outputs.is_empty() {
        let outputs = job.spec.outputs.iter().map(|file| file.guest.as_str());
        line("outputs", outputs.collect::<Vec<_>>().join(", "));
    }
    if let Some(limit) = job.spec.timeout_ms {
        line("timeout", text::span(limit));
    }
    if job.spec.retries > 0 {
        line("retries", format!("{} of {} used", job.retries_used, job.spec.retries));
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

pub(super) fn why(flags: &JobsFlags) -> Result<u8, Failure> {
    let opened = place::open(&flags.place)?;
    let mut all = Vec::new();
    for id in ids::parse(&flags.jobs)? {
        all.push(store::why(opened.as_ref(), id, text::now_ms())?);
    }
    if flags.json {
        print_json(&all)?;
        return Ok(0);
    }
    let mut out = String::new();
    for why in &all {
        out.push_str(&format!("job {} is {}\n", why.job, why.summary));
        for note in &why.notes {
            out.push_str(&format!("  {note}\n"));
        }
        for host in &why.hosts {
            let verdict =
                if host.reasons.is_empty() { "could run it".to_owned() } else { host.reasons.join("; ") };
            out.push_str(&format!("  host {}: {verdict}\n", host.host));
        }
    }
    print(&out)?;
    Ok(0)
}
