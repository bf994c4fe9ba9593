//! Rows to values and back.

use std::str::FromStr;

use rusqlite::types::{FromSqlError, Type};
use rusqlite::{Result, Row, Transaction, params};

use crate::queue::{ArrayPlace, Attempt, Event, Job, JobId, Reason, State, StoredFile, Times, Wanted};

/// The columns that [`job`] reads.
pub(super) const JOB: &str = "id, user, spec, state, activity, reason, detail, priority, submitted_ms, not_before_ms, \
     epoch, retries_used, failures, array_first, array_index, open_dependencies, host, lease_until_ms, wanted, \
     started_ms, ended_ms, exit_code, progress, saved, (SELECT cpu_model FROM snapshots WHERE snapshots.job = jobs.id AND \
     usable = 1 ORDER BY snapshots.epoch DESC, number DESC LIMIT 1)";

/// The columns that [`attempt`] reads.
pub(super) const ATTEMPT: &str = "job, epoch, host, claimed_ms, started_ms, ended_ms, reason, detail, exit_code, \
     engine, parent, stdout_base, stderr_base, allocated_ms, suspended_ms, checkpoint_ms, restore_ms, transfer_ms, \
     committed_ms, lost_ms, files";

fn invalid(column: usize, message: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        column,
        Type::Text,
        Box::new(FromSqlError::other(WordError(message))),
    )
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct WordError(String);

fn word<T: FromStr<Err = String>>(row: &Row<'_>, column: usize) -> Result<T> {
    row.get_ref(column)?.as_str()?.parse().map_err(|message| invalid(column, message))
}

fn optional_word<T: FromStr<Err = String>>(row: &Row<'_>, column: usize) -> Result<Option<T>> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|message| invalid(column, message)),
    }
}

fn stored_files(row: &Row<'_>, column: usize) -> Result<Vec<StoredFile>> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(Vec::new()),
        Some(text) => serde_json::from_str(text).map_err(|err| invalid(column, err.to_string())),
    }
}

pub(super) fn job(row: &Row<'_>) -> Result<Job> {
    let spec = serde_json::from_str(row.get_ref(2)?.as_str()?).map_err(|err| invalid(2, err.to_string()))?;
    let array = match (row.get(13)?, row.get(14)?) {
        (Some(first), Some(index)) => Some(ArrayPlace { first, index }),
        _ => None,
    };
    Ok(Job {
        id: row.get(0)?,
        user: row.get(1)?,
        spec,
        state: word(row, 3)?,
        activity: optional_word(row, 4)?,
        reason: word(row, 5)?,
        detail: row.get(6)?,
        priority: row.get(7)?,
        submitted_ms: row.get(8)?,
        not_before_ms: row.get(9)?,
        epoch: row.get(10)?,
        retries_used: row.get(11)?,
        failures: row.get(12)?,
        array,
        open_dependencies: row.get(15)?,
        host: row.get(16)?,
        lease_until_ms: row.get(17)?,
        wanted: Wanted(row.get(18)?),
        started_ms: row.get(19)?,
        ended_ms: row.get(20)?,
        exit_code: row.get(21)?,
        progress: row.get(22)?,
        saved: stored_files(row, 23)?,
        checkpoint_cpu_model: row.get(24)?,
    })
}

pub(super) fn attempt(row: &Row<'_>) -> Result<Attempt> {
    Ok(Attempt {
        job: row.get(0)?,
        epoch: row.get(1)?,
        host: row.get(2)?,
        claimed_ms: row.get(3)?,
        started_ms: row.get(4)?,
        ended_ms: row.get(5)?,
        reason: optional_word(row, 6)?,
        detail: row.get(7)?,
        exit_code: row.get(8)?,
        engine: row.get(9)?,
        parent: row.get(10)?,
        output_base: [row.get(11)?, row.get(12)?],
        times: Times {
            allocated_ms: row.get(13)?,
            suspended_ms: row.get(14)?,
            checkpoint_ms: row.get(15)?,
            restore_ms: row.get(16)?,
            transfer_ms: row.get(17)?,
            committed_ms: row.get(18)?,
            lost_ms: row.get(19)?,
        },
        files: stored_files(row, 20)?,
    })
}

pub(super) fn event(row: &Row<'_>) -> Result<Event> {
    Ok(Event {
        seq: row.get(0)?,
        job: row.get(1)?,
        epoch: row.get(2)?,
        at_ms: row.get(3)?,
        state: word(row, 4)?,
        reason: word(row, 5)?,
        detail: row.get(6)?,
    })
}

pub(super) fn state_word(row: &Row<'_>, column: usize) -> Result<State> {
    word(row, column)
}

pub(super) fn reason_word(row: &Row<'_>, column: usize) -> Result<Reason> {
    word(row, column)
}

/// One job by its number.
pub(super) fn find_job(tx: &Transaction<'_>, id: JobId) -> Result<Option<Job>> {
    let mut statement = tx.prepare_cached(&format!("SELECT {JOB} FROM jobs WHERE id = ?"))?;
    let mut rows = statement.query([id])?;
    rows.next()?.map(job).transpose()
}

/// Adds an event.
pub(super) fn add_event(
    tx: &Transaction<'_>,
    (job, epoch): (JobId, u64),
    at_ms: u64,
    state: State,
    reason: Reason,
    detail: Option<&str>,
) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO events (job, epoch, at_ms, state, reason, detail) VALUES (?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![job, epoch, at_ms, state.as_str(), reason.as_str(), detail])?;
    Ok(())
}
