//! Lists: jobs, hosts, and the queue in numbers.

use harrier_jobs::queue::{Host, Job, State};
use harrier_jobs::store::{JobFilter, Stats};

use super::flags::{FilterFlags, HistoryFlags, HostsFlags, QueueFlags, StatsFlags};
use super::submit::pairs;
use super::table::Table;
use super::{place, print, print_json, text};
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

/// Jobs that `harrier history` shows unless it is told otherwise.
const HISTORY: u64 = 50;

pub(super) fn history(flags: &HistoryFlags) -> Result<u8, Failure> {
    let mut filter = filter(&flags.filter)?;
    if filter.states.is_none() {
        filter.states = Some(State::ALL.iter().copied().filter(|state| state.is_final()).collect());
    }
    filter.newest_first = true;
    filter.limit = filter.limit.or(Some(HISTORY));
    let jobs = place::open(&flags.place)?.jobs(&filter)?;
    if flags.json {
        print_json(&jobs)?;
        return Ok(0);
    }
    let mut table = Table::new(&["ID", "USER", "STATE", "EXIT", "TRIES", "ENDED", "TOOK", "COMMAND"]);
    for job in &jobs {
        let took = job.started_ms.zip(job.ended_ms).map(|(from, to)| text::span(to.saturating_sub(from)));
        table.row(vec![
            job.id.to_string(),
            job.user.clone(),
            job.state.to_string(),
            job.exit_code.map_or("-".to_owned(), |code| code.to_string()),
            job.epoch.to_string(),
            job.ended_ms.map_or("-".to_owned(), text::time),
            took.unwrap_or_else(|| "-".to_owned()),
            name(job),
        ]);
    }
    print(&table.text())?;
    Ok(0)
}

pub(super) fn hosts(flags: &HostsFlags) -> Result<u8, Failure> {
    let hosts = place::open(&flags.place)?.hosts()?;
    if flags.json {
        print_json(&hosts)?;
        return Ok(0);
    }
    let now = text::now_ms();
    let mut table =
        Table::new(&["HOST", "STATE", "JOBS", "SLOTS", "CPUS", "MEMORY", "ENGINES", "SEEN", "LABELS"]);
    for host in &hosts {
        let ad = &host.ad;
        let labels: Vec<String> = ad.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        table.row(vec![
            ad.host.clone(),
            host_state(host),
            host.jobs.to_string(),
            ad.slots.to_string(),
            ad.cpus.to_string(),
            text::size(ad.memory_bytes),
            ad.engines.join(","),
            format!("{} ago", text::span(now.saturating_sub(host.seen_ms))),
            labels.join(","),
        ]);
    }
    print(&table.text())?;
    Ok(0)
}

fn host_state(host: &Host) -> String {
    let state = if !host.alive {
        "silent"
    } else if host.ad.closed.is_some() {
        "closed"
    } else if host.ad.free.slots == 0 {
        "full"
    } else {
        "open"
    };
    state.to_owned()
}

pub(super) fn stats(flags: &StatsFlags) -> Result<u8, Failure> {
    let stats = place::open(&flags.place)?.stats()?;
    if flags.json {
        let mut value = serde_json::to_value(&stats)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("goodput".to_owned(), stats.goodput().into());
        }
        print_json(&value)?;
        return Ok(0);
    }
    print(&describe(&stats))?;
    Ok(0)
}

fn describe(stats: &Stats) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{:<14}{value}\n", format!("{name}:")));
    let words = |pairs: Vec<String>| if pairs.is_empty() { "none".to_owned() } else { pairs.join(", ") };
    line("jobs", words(stats.states.iter().map(|(state, count)| format!("{count} {state}")).collect()));
    line("attempts", stats.attempts.to_string());
    line("ends", words(stats.ends.iter().map(|(reason, count)| format!("{count} {reason}")).collect()));
    line("hosts", format!("{} of {} heard of lately", stats.hosts.0, stats.hosts.1));
    let times = &stats.times;
    for (name, ms) in [
        ("allocated", times.allocated_ms),
        ("committed", times.committed_ms),
        ("lost", times.lost_ms),
        ("suspended", times.suspended_ms),
        ("checkpoint", times.checkpoint_ms),
        ("restore", times.restore_ms),
        ("transfer", times.transfer_ms),
    ] {
        line(name, format!("{:.1} s", ms as f64 / 1000.0));
    }
    line("goodput", stats.goodput().map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0)));
    if !stats.users.is_empty() {
        let mut table = Table::new(&["USER", "RUNNING", "RECENT CPU SECONDS"]);
        for user in &stats.users {
            table.row(vec![
                user.user.clone(),
                user.running.to_string(),
                format!("{:.0}", user.recent_cpu_seconds),
            ]);
        }
        out.push('\n');
        out.push_str(&table.text());
    }
    out
}
