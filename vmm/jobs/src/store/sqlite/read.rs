//! What clients see.

use rusqlite::types::Value;
use rusqlite::{Result, Transaction, params_from_iter};

use super::rows::{self, ATTEMPT, JOB};
use super::{Moment, Refusal, claim};
use crate::queue::{Attempt, Checkpoint, Dependency, DependencyKind, Event, Host, Job, JobId, Times};
use crate::store::{EventQuery, JobFilter, Stats, StoreError, UserStats};

/// A host that has not spoken for so long is taken for gone.
const SILENCE_MS: u64 = 60_000;
/// Checkpoints that a worker is offered.
const OFFERED: u32 = 8;

pub(super) fn exists(tx: &Transaction<'_>, job: JobId) -> std::result::Result<(), Refusal> {
    let found = tx.prepare_cached("SELECT 1 FROM jobs WHERE id = ?")?.exists([job])?;
    if found { Ok(()) } else { Err(StoreError::NoJob(job).into()) }
}

pub(super) fn is_over(tx: &Transaction<'_>, job: JobId) -> Result<bool> {
    let state = tx
        .prepare_cached("SELECT state FROM jobs WHERE id = ?")?
        .query_row([job], |row| rows::state_word(row, 0))?;
    Ok(state.is_final())
}

/// Whether there is such a job, and it has ended.
pub(super) fn is_known_over(tx: &Transaction<'_>, job: JobId) -> Result<bool> {
    Ok(rows::find_job(tx, job)?.is_some_and(|job| job.state.is_final()))
}

pub(super) fn jobs(tx: &Transaction<'_>, filter: &JobFilter) -> Result<Vec<Job>> {
    let mut conditions = vec!["1".to_owned()];
    let mut values: Vec<Value> = Vec::new();
    let mut list = |column: &str, items: Vec<Value>| {
        let marks = vec!["?"; items.len()].join(", ");
        conditions.push(format!("{column} IN ({marks})"));
        values.extend(items);
    };
    if let Some(ids) = &filter.ids {
        // SQLite takes 32,766 parameters.
        if ids.len() > 10_000 {
            let mut found = Vec::new();
            for part in ids.chunks(10_000) {
                found.extend(jobs(tx, &JobFilter { ids: Some(part.to_vec()), ..filter.clone() })?);
            }
            return Ok(found);
        }
        list("id", ids.iter().map(|id| Value::Integer(i64::try_from(*id).unwrap_or(i64::MAX))).collect());
    }
    if let Some(states) = &filter.states {
        list("state", states.iter().map(|state| Value::Text(state.as_str().to_owned())).collect());
        if states.iter().all(|state| !state.is_final()) {
            // So that the index of open jobs serves.
            conditions.push("state NOT IN ('succeeded', 'failed', 'cancelled')".to_owned());
        }
    }
    for (column, value) in [("user", &filter.user), ("host", &filter.host)] {
        if let Some(value) = value {
            conditions.push(format!("{column} = ?"));
            values.push(Value::Text(value.clone()));
        }
    }
    for (name, value) in &filter.labels {
        conditions.push(
            "EXISTS (SELECT 1 FROM json_each(spec, '$.labels') AS l WHERE l.key = ? AND l.value = ?)"
                .to_owned(),
        );
        values.extend([Value::Text(name.clone()), Value::Text(value.clone())]);
    }
    let mut sql = format!("SELECT {JOB} FROM jobs WHERE {} ORDER BY id", conditions.join(" AND "));
    if filter.newest_first {
        sql.push_str(" DESC");
    }
    if let Some(limit) = filter.limit {
        sql.push_str(&format!(" LIMIT {}", i64::try_from(limit).unwrap_or(i64::MAX)));
    }
    tx.prepare_cached(&sql)?.query_map(params_from_iter(values), rows::job)?.collect()
}

pub(super) fn attempts(tx: &Transaction<'_>, job: JobId) -> Result<Vec<Attempt>> {
    tx.prepare_cached(&format!("SELECT {ATTEMPT} FROM attempts WHERE job = ? ORDER BY epoch"))?
        .query_map([job], rows::attempt)?
        .collect()
}

pub(super) fn events(tx: &Transaction<'_>, query: &EventQuery) -> Result<Vec<Event>> {
    let of_job = if query.job.is_some() { "job = ?2" } else { "?2 IS NULL" };
    let limit = query.limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
    tx.prepare_cached(&format!(
        "SELECT seq, job, epoch, at_ms, state, reason, detail FROM events WHERE seq > ?1 AND {of_job} \
         ORDER BY seq LIMIT ?3"
    ))?
    .query_map(rusqlite::params![query.after_seq, query.job, limit], rows::event)?
    .collect()
}

pub(super) fn dependencies(tx: &Transaction<'_>, job: JobId) -> Result<Vec<Dependency>> {
    tx.prepare_cached("SELECT needs, kind FROM dependencies WHERE job = ? ORDER BY needs")?
        .query_map([job], |row| {
            let kind = match row.get_ref(1)?.as_str()? {
                "success" => DependencyKind::Success,
                _ => DependencyKind::End,
            };
            Ok(Dependency { job: row.get(0)?, kind })
        })?
        .collect()
}

pub(super) fn checkpoints(tx: &Transaction<'_>, job: JobId) -> Result<Vec<Checkpoint>> {
    tx.prepare_cached(&format!(
        "SELECT epoch, number, place, host, size_bytes, stdout_offset, stderr_offset, work_ms, at_ms, cpu_model \
         FROM snapshots \
         WHERE job = ? AND usable = 1 ORDER BY epoch DESC, number DESC LIMIT {OFFERED}"
    ))?
    .query_map([job], |row| {
        Ok(Checkpoint {
            epoch: row.get(0)?,
            number: row.get(1)?,
            place: row.get(2)?,
            host: row.get(3)?,
            size_bytes: row.get(4)?,
            output: [row.get(5)?, row.get(6)?],
            work_ms: row.get(7)?,
            at_ms: row.get(8)?,
            cpu_model: row.get(9)?,
        })
    })?
    .collect()
}

/// An attempt and a number.
type CheckpointPlace = (u64, u32);

/// A job's checkpoints that may be needed again, and its present attempt with the last number that it has reported.
pub(super) fn needed_checkpoints(
    tx: &Transaction<'_>,
    job: JobId,
) -> Result<(Vec<CheckpointPlace>, Option<CheckpointPlace>)> {
    let Some(job) = rows::find_job(tx, job)? else { return Ok((Vec::new(), None)) };
    if job.state.is_final() {
        return Ok((Vec::new(), None));
    }
    let keep = tx
        .prepare_cached("SELECT epoch, number FROM snapshots WHERE job = ? AND usable = 1")?
        .query_map([job.id], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_>>()?;
    if !job.state.is_leased() {
        return Ok((keep, None));
    }
    let last = tx
        .prepare_cached("SELECT coalesce(max(number), 0) FROM snapshots WHERE job = ? AND epoch = ?")?
        .query_row(rusqlite::params![job.id, job.epoch], |row| row.get(0))?;
    Ok((keep, Some((job.epoch, last))))
}

pub(super) fn hosts(tx: &Transaction<'_>, moment: Moment) -> Result<Vec<Host>> {
    let mut statement = tx.prepare_cached(
        "SELECT h.ad, h.seen_ms, (SELECT count(*) FROM jobs j WHERE j.host = h.name AND j.lease_until_ms IS NOT NULL) \
         FROM hosts h ORDER BY h.name",
    )?;
    let rows = statement.query_map([], |row| {
        let seen_ms = row.get(1)?;
        let Ok(ad) = serde_json::from_str(row.get_ref(0)?.as_str()?) else { return Ok(None) };
        let alive = moment.now_ms.saturating_sub(seen_ms) < SILENCE_MS;
        Ok(Some(Host { ad, seen_ms, alive, jobs: row.get(2)? }))
    })?;
    rows.filter_map(Result::transpose).collect()
}

pub(super) fn stats(tx: &Transaction<'_>, moment: Moment) -> Result<Stats> {
    let states = tx
        .prepare("SELECT state, count(*) FROM jobs GROUP BY state ORDER BY state")?
        .query_map([], |row| Ok((rows::state_word(row, 0)?, row.get(1)?)))?
        .collect::<Result<_>>()?;
    let ends = tx
        .prepare(
            "SELECT reason, count(*) FROM attempts WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason",
        )?
        .query_map([], |row| Ok((rows::reason_word(row, 0)?, row.get(1)?)))?
        .collect::<Result<_>>()?;
    let (attempts, times) = tx.query_row(
        "SELECT count(*), total(allocated_ms), total(suspended_ms), total(checkpoint_ms), total(restore_ms), \
         total(transfer_ms), total(committed_ms), total(lost_ms) FROM attempts",
        [],
        |row| {
            let total = |column: usize| row.get::<_, f64>(column).map(|total| total as u64);
            let times = Times {
                allocated_ms: total(1)?,
                suspended_ms: total(2)?,
                checkpoint_ms: total(3)?,
                restore_ms: total(4)?,
                transfer_ms: total(5)?,
                committed_ms: total(6)?,
                lost_ms: total(7)?,
            };
            Ok((row.get(0)?, times))
        },
    )?;
    let mut users: Vec<UserStats> = claim::shares(tx, moment)?
        .into_iter()
        .map(|(user, cpu_ms)| UserStats { user, recent_cpu_seconds: cpu_ms / 1000.0, running: 0 })
        .collect();
    users.sort_by(|left, right| right.recent_cpu_seconds.total_cmp(&left.recent_cpu_seconds));
    for user in &mut users {
        user.running = tx
            .prepare_cached("SELECT count(*) FROM jobs WHERE lease_until_ms IS NOT NULL AND user = ?")?
            .query_row([&user.user], |row| row.get(0))?;
    }
    let hosts = hosts(tx, moment)?;
    let alive = hosts.iter().filter(|host| host.alive).count() as u64;
    Ok(Stats { states, attempts, ends, times, users, hosts: (alive, hosts.len() as u64) })
}
