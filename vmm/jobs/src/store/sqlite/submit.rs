//! Adding jobs.

use rusqlite::{OptionalExtension, Transaction, params};

use super::rows::add_event;
use super::{Moment, Refusal};
use crate::queue::{Dependency, DependencyKind, JobId, NewJob, Reason, State};
use crate::store::StoreError;

/// Jobs in one submission.
const MAX_JOBS: u64 = 200_000;

pub(super) fn submit(
    tx: &Transaction<'_>,
    moment: Moment,
    user: &str,
    key: Option<&str>,
    jobs: &[NewJob],
) -> Result<Vec<JobId>, Refusal> {
    if let Some(key) = key {
        let known = tx
            .query_row("SELECT first, last FROM submissions WHERE user = ? AND key = ?", [user, key], |row| {
                Ok((row.get::<_, JobId>(0)?, row.get::<_, JobId>(1)?))
            })
            .optional()?;
        if let Some((first, last)) = known {
            return Ok((first..=last).collect());
        }
    }
    let count: u64 = jobs.iter().map(|job| job.array.map_or(1, |(first, last)| last - first + 1)).sum();
    if count == 0 || count > MAX_JOBS {
        return Err(StoreError::Invalid(format!(
            "{count} jobs cannot be submitted at once: 1 to {MAX_JOBS}"
        ))
        .into());
    }
    let mut ids = Vec::new();
    for job in jobs {
        match job.array {
            None => ids.push(insert(tx, moment, user, job, None)?),
            Some((first, last)) => {
                let mut array_first = None;
                for index in first..=last {
                    let id = insert(tx, moment, user, job, Some((array_first, index)))?;
                    array_first.get_or_insert(id);
                    ids.push(id);
                }
            }
        }
    }
    if let (Some(key), Some(first), Some(last)) = (key, ids.first(), ids.last()) {
        tx.execute("INSERT INTO submissions VALUES (?, ?, ?, ?)", params![user, key, first, last])?;
    }
    Ok(ids)
}

/// Adds one job; `array` is the array's first job, if that is not this one, and the index.
fn insert(
    tx: &Transaction<'_>,
    moment: Moment,
    user: &str,
    job: &NewJob,
    array: Option<(Option<JobId>, u64)>,
) -> Result<JobId, Refusal> {
    let spec = &job.spec;
    let text = serde_json::to_string(spec).map_err(|err| StoreError::Invalid(err.to_string()))?;
    let state = if job.hold { State::Held } else { State::Queued };
    let reason = if job.hold { Reason::HeldByUser } else { Reason::Waiting };
    tx.prepare_cached(
        "INSERT INTO jobs (user, spec, state, reason, priority, submitted_ms, array_first, array_index, cpus, \
         memory_bytes, engine, cpu_model, requirements, rank) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![
        user,
        text,
        state.as_str(),
        reason.as_str(),
        spec.priority,
        moment.now_ms,
        array.and_then(|(first, _)| first),
        array.map(|(_, index)| index),
        spec.cpus,
        spec.memory_bytes,
        spec.engine,
        spec.cpu_model,
        spec.requirements,
        spec.rank,
    ])?;
    let id = JobId::try_from(tx.last_insert_rowid()).unwrap_or_default();
    if let Some((None, _)) = array {
        tx.execute("UPDATE jobs SET array_first = id WHERE id = ?", [id])?;
    }
    add_event(tx, (id, 0), moment.now_ms, state, reason, None)?;
    let mut failed = None;
    let mut open = 0u32;
    for dependency in &job.after {
        match add_dependency(tx, id, dependency)? {
            Answer::Open => open += 1,
            Answer::Met => {}
            Answer::Failed => failed = Some(dependency.job),
        }
    }
    if open > 0 || failed.is_some() {
        let (state, reason) = match failed {
            Some(_) => (State::Held, Reason::DependencyFailed),
            None if job.hold => (State::Held, Reason::HeldByUser),
            None => (State::Queued, Reason::Dependency),
        };
        let detail = failed.map(|failed| format!("job {failed} has not succeeded"));
        tx.execute(
            "UPDATE jobs SET open_dependencies = ?, state = ?, reason = ?, detail = ? WHERE id = ?",
            params![open, state.as_str(), reason.as_str(), detail, id],
        )?;
        add_event(tx, (id, 0), moment.now_ms, state, reason, detail.as_deref())?;
    }
    Ok(id)
}

enum Answer {
    Open,
    Met,
    Failed,
}

fn add_dependency(tx: &Transaction<'_>, job: JobId, dependency: &Dependency) -> Result<Answer, Refusal> {
    let state: Option<State> = tx
        .query_row("SELECT state FROM jobs WHERE id = ?", [dependency.job], |row| {
            super::rows::state_word(row, 0)
        })
        .optional()?;
    let state = state.filter(|_| dependency.job != job).ok_or(StoreError::NoJob(dependency.job))?;
    let answer = match (state.is_final(), dependency.kind, state) {
        (false, ..) => Answer::Open,
        (true, DependencyKind::End, _) | (true, _, State::Succeeded) => Answer::Met,
        (true, DependencyKind::Success, _) => Answer::Failed,
    };
    let kind = match dependency.kind {
        DependencyKind::Success => "success",
        DependencyKind::End => "end",
    };
    let open = matches!(answer, Answer::Open);
    let added = tx.execute(
        "INSERT OR IGNORE INTO dependencies (job, needs, kind, open) VALUES (?, ?, ?, ?)",
        params![job, dependency.job, kind, open],
    )?;
    // The same twice counts once.
    Ok(if added == 0 { Answer::Met } else { answer })
}
