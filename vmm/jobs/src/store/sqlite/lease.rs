//! What workers do: advertise, renew, report; and what becomes of jobs whose worker is silent.

use rusqlite::{OptionalExtension, Result, Transaction, params};

use super::rows::{JOB, add_event, find_job, job as job_row};
use super::{Moment, Refusal, ends};
use crate::queue::{HostAd, Job, JobId, LeaseKey, Reason, State, Times, Wanted};
use crate::store::{Ended, Renewal, RenewedLease, Report, StoreError};

/// The longest line about a job's progress, in characters.
const PROGRESS_MAX: usize = 512;

pub(super) fn any_due(tx: &Transaction<'_>, moment: Moment) -> Result<bool> {
    tx.prepare_cached("SELECT EXISTS (SELECT 1 FROM jobs WHERE lease_until_ms <= ?)")?
        .query_row([moment.now_ms], |row| row.get(0))
}

/// Takes back the jobs whose lease is over, and answers which.
pub(super) fn expire(tx: &Transaction<'_>, moment: Moment) -> Result<Vec<JobId>> {
    if !any_due(tx, moment)? {
        return Ok(Vec::new());
    }
    let due: Vec<Job> = tx
        .prepare_cached(&format!("SELECT {JOB} FROM jobs WHERE lease_until_ms <= ?"))?
        .query_map([moment.now_ms], job_row)?
        .collect::<Result<_>>()?;
    for job in &due {
        let host = job.host.clone().unwrap_or_default();
        let ended = Ended {
            reason: Reason::WorkerLost,
            detail: Some(format!("the worker on {host} has not renewed its lease")),
            exit_code: None,
            times: Times::default(),
        };
        let at_ms = job.lease_until_ms.unwrap_or(moment.now_ms);
        ends::end_attempt(tx, moment, job, at_ms, &ended)?;
    }
    Ok(due.iter().map(|job| job.id).collect())
}

pub(super) fn advertise(tx: &Transaction<'_>, moment: Moment, ad: &HostAd) -> Result<()> {
    let text = serde_json::to_string(ad).unwrap_or_default();
    tx.prepare_cached("INSERT OR REPLACE INTO hosts (name, ad, seen_ms) VALUES (?, ?, ?)")?
        .execute(params![ad.host, text, moment.now_ms])?;
    Ok(())
}

pub(super) fn host_ad(tx: &Transaction<'_>, host: &str) -> Result<Option<HostAd>> {
    let text: Option<String> = tx
        .prepare_cached("SELECT ad FROM hosts WHERE name = ?")?
        .query_row([host], |row| row.get(0))
        .optional()?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// The job of a lease that is still its holder's.
pub(super) fn check(tx: &Transaction<'_>, key: &LeaseKey) -> std::result::Result<Job, Refusal> {
    let token: Option<Option<String>> = tx
        .prepare_cached("SELECT token FROM jobs WHERE id = ? AND epoch = ?")?
        .query_row(params![key.job, key.epoch], |row| row.get(0))
        .optional()?;
    let job = if token.flatten().as_deref() == Some(&key.token) { find_job(tx, key.job)? } else { None };
    match job {
        Some(job) if job.state.is_leased() => Ok(job),
        _ => Err(StoreError::Fenced(key.to_string()).into()),
    }
}

pub(super) fn renew(
    tx: &Transaction<'_>,
    moment: Moment,
    host: &str,
    keys: &[LeaseKey],
) -> Result<Vec<Renewal>> {
    expire(tx, moment)?;
    tx.execute("UPDATE hosts SET seen_ms = ? WHERE name = ?", params![moment.now_ms, host])?;
    let mut renewals = Vec::new();
    for key in keys {
        let wanted: Option<u32> = tx
            .prepare_cached(
                "UPDATE jobs SET lease_until_ms = ? WHERE id = ? AND epoch = ? AND token = ? \
                 AND lease_until_ms IS NOT NULL RETURNING wanted",
            )?
            .query_row(params![moment.now_ms + moment.lease_ms, key.job, key.epoch, key.token], |row| {
                row.get(0)
            })
            .optional()?;
        let lease = wanted.map(|wanted| RenewedLease { lease_ms: moment.lease_ms, wanted: Wanted(wanted) });
        renewals.push(Renewal { key: key.clone(), lease });
    }
    Ok(renewals)
}

pub(super) fn report(
    tx: &Transaction<'_>,
    moment: Moment,
    key: &LeaseKey,
    report: &Report,
) -> std::result::Result<(), Refusal> {
    expire(tx, moment)?;
    let job = check(tx, key)?;
    // Once its end is wanted, a job does not go back to running.
    let stopping = job.state == State::Stopping;
    let set = |state: State, reason: Reason, detail: Option<&str>| -> Result<()> {
        let state = if stopping { State::Stopping } else { state };
        tx.prepare_cached("UPDATE jobs SET state = ?, reason = ?, detail = ? WHERE id = ?")?
            .execute(params![state.as_str(), reason.as_str(), detail, job.id])?;
        add_event(tx, (job.id, job.epoch), moment.now_ms, state, reason, detail)
    };
    match report {
        Report::Started { engine, checkpoint } => {
            tx.execute(
                "UPDATE attempts SET started_ms = coalesce(started_ms, ?), engine = ? WHERE job = ? AND epoch = ?",
                params![moment.now_ms, engine, job.id, job.epoch],
            )?;
            tx.execute(
                "UPDATE jobs SET started_ms = coalesce(started_ms, ?), activity = NULL WHERE id = ?",
                params![moment.now_ms, job.id],
            )?;
            let mut detail = engine.as_ref().map(|engine| format!("engine {engine}"));
            if let Some((epoch, number)) = checkpoint {
                tx.execute(
                    "UPDATE attempts SET parent = s.epoch, stdout_base = s.stdout_offset, \
                     stderr_base = s.stderr_offset, work_base_ms = s.work_ms FROM snapshots AS s \
                     WHERE attempts.job = ?1 AND attempts.epoch = ?2 AND s.job = ?1 AND s.epoch = ?3 AND s.number = ?4",
                    params![job.id, job.epoch, epoch, number],
                )?;
                let from = format!("from checkpoint {number} of attempt {epoch}");
                detail = Some(detail.map_or(from.clone(), |engine| format!("{engine}, {from}")));
            }
            set(State::Running, Reason::Started, detail.as_deref())?;
        }
        Report::BadCheckpoint { epoch, number, detail } => {
            tx.execute(
                "UPDATE snapshots SET usable = 0 WHERE job = ? AND epoch = ? AND number = ?",
                params![job.id, epoch, number],
            )?;
            let detail = format!("checkpoint {number} of attempt {epoch}: {detail}");
            set(job.state, Reason::RestoreFailed, Some(&detail))?;
        }
        Report::Paused { reason, detail } => set(State::Paused, *reason, detail.as_deref())?,
        Report::Continued => set(State::Running, Reason::Continued, None)?,
        Report::Activity(activity) => {
            tx.execute(
                "UPDATE jobs SET activity = ? WHERE id = ?",
                params![activity.map(|activity| activity.as_str()), job.id],
            )?;
        }
        Report::Checkpointed(checkpoint) => {
            tx.execute(
                "INSERT OR REPLACE INTO snapshots (job, epoch, number, host, place, size_bytes, stdout_offset, \
                 stderr_offset, work_ms, at_ms, cpu_model) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                params![
                    job.id,
                    job.epoch,
                    checkpoint.number,
                    checkpoint.host,
                    checkpoint.place,
                    checkpoint.size_bytes,
                    checkpoint.output[0],
                    checkpoint.output[1],
                    checkpoint.work_ms,
                    moment.now_ms,
                    checkpoint.cpu_model,
                ],
            )?;
            // Two are enough: the latest, and the one before should that be damaged.
            tx.execute(
                "UPDATE snapshots SET usable = 0 WHERE job = ?1 AND usable = 1 AND (epoch, number) NOT IN (SELECT epoch, \
                 number FROM snapshots WHERE job = ?1 AND usable = 1 ORDER BY epoch DESC, number DESC LIMIT 2)",
                [job.id],
            )?;
            let wanted = job.wanted.without(Wanted::CHECKPOINT);
            tx.execute(
                "UPDATE jobs SET wanted = ?, activity = NULL, failures = 0 WHERE id = ?",
                params![wanted.0, job.id],
            )?;
            let detail = format!("checkpoint {} written", checkpoint.number);
            add_event(tx, (job.id, job.epoch), moment.now_ms, job.state, job.reason, Some(&detail))?;
        }
        Report::Stopping { reason } => set(State::Stopping, *reason, None)?,
        Report::Files(files) => {
            tx.execute(
                "UPDATE attempts SET files = ? WHERE job = ? AND epoch = ?",
                params![serde_json::to_string(files).unwrap_or_default(), job.id, job.epoch],
            )?;
        }
        Report::Progress(text) => {
            let line: String = text.chars().filter(|c| !c.is_control()).take(PROGRESS_MAX).collect();
            tx.execute("UPDATE jobs SET progress = ? WHERE id = ?", params![line, job.id])?;
        }
        Report::Ended(ended) => ends::end_attempt(tx, moment, &job, moment.now_ms, ended)?,
    }
    Ok(())
}
