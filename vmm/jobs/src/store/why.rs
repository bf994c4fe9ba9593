//! Why a job is where it is, worked out from what a store says.

use serde::Serialize;

use super::{JobFilter, Result, Store};
use crate::queue::{DependencyKind, Job, JobId, State, unsuitable_for};

/// An explanation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Why {
    /// The job.
    pub job: JobId,
    /// Where it stands.
    pub state: State,
    /// In one line.
    pub summary: String,
    /// What it waits for or has met, besides hosts.
    pub notes: Vec<String>,
    /// Each host, and what keeps the job from it.
    pub hosts: Vec<HostVerdict>,
}

/// What a host means for a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostVerdict {
    /// The host.
    pub host: String,
    /// Whether it could run the job at some time.
    pub suits: bool,
    /// What is in the way, now or for good.
    pub reasons: Vec<String>,
}

/// Explains a job.
pub fn why(store: &dyn Store, id: JobId, now_ms: u64) -> Result<Why> {
    let job = store.job(id)?;
    let mut why =
        Why { job: id, state: job.state, summary: summary(&job), notes: Vec::new(), hosts: Vec::new() };
    if !matches!(job.state, State::Queued | State::Held) {
        if !job.wanted.is_empty() {
            why.notes.push(format!("its worker has been asked for: {}", job.wanted));
        }
        return Ok(why);
    }
    for dependency in store.dependencies(id)? {
        let other = store.job(dependency.job)?;
        let met = match dependency.kind {
            DependencyKind::Success => other.state == State::Succeeded,
            DependencyKind::End => other.state.is_final(),
        };
        if !met {
            let what = if dependency.kind == DependencyKind::Success { "succeed" } else { "end" };
            why.notes.push(format!("job {} has to {what}: it is {}", other.id, other.state));
        }
    }
    if let Some(at) = job.not_before_ms.filter(|at| *at > now_ms) {
        why.notes.push(format!("it is tried again in {} s", (at - now_ms).div_ceil(1000)));
    }
    for host in store.hosts()? {
        let mut reasons = unsuitable_for(&host.ad, &job);
        let suits = reasons.is_empty() && host.alive;
        if !host.alive {
            reasons.push("its worker has not been heard of lately".to_owned());
        }
        if let Some(closed) = &host.ad.closed {
            reasons.push(format!("takes no jobs now: {closed}"));
        }
        let free = &host.ad.free;
        if suits
            && (free.slots == 0 || free.cpus < job.spec.cpus || free.memory_bytes < job.spec.memory_bytes)
        {
            reasons.push("has no room for it now".to_owned());
        }
        why.hosts.push(HostVerdict { host: host.ad.host, suits, reasons });
    }
    if job.state == State::Queued && why.notes.is_empty() {
        if why.hosts.is_empty() {
            why.notes.push("no worker has ever taken part in this queue: start 'harrier worker'".to_owned());
        } else if !why.hosts.iter().any(|host| host.suits) {
            why.notes.push("no host that could run it takes part".to_owned());
        } else {
            let filter = JobFilter { states: Some(vec![State::Queued]), ..JobFilter::default() };
            let before = |other: &Job| {
                (other.priority, std::cmp::Reverse(other.id)) > (job.priority, std::cmp::Reverse(job.id))
            };
            let ahead = store.jobs(&filter)?.iter().filter(|other| before(other)).count();
            why.notes.push(format!("{ahead} queued jobs are older or have a higher priority"));
        }
    }
    Ok(why)
}

fn summary(job: &Job) -> String {
    let mut text = format!("{}: {}", job.state, job.reason);
    if let Some(detail) = &job.detail {
        text.push_str(&format!(" ({detail})"));
    }
    if job.state == State::Held {
        text.push_str(&format!(": 'harrier release {}' lets it run", job.id));
    }
    text
}
