//! What follows from the end of an attempt: the job's next state, its users' shares, the jobs that wait for it.

use rusqlite::{OptionalExtension, Result, Transaction, params};

use super::Moment;
use super::rows::{add_event, find_job};
use crate::queue::{DependencyKind, Job, JobId, Reason, ReasonKind, State, Times, Wanted};
use crate::store::Ended;

/// Half of what a user has used is forgotten in this time.
const HALF_LIFE_MS: f64 = 24.0 * 3600.0 * 1000.0;
/// System failures in a row after which a person has to look.
const MAX_FAILURES: u32 = 5;
/// The wait after the first system failure, doubled with each further one.
const FAILURE_DELAY_MS: u64 = 2_000;
/// No wait is longer.
const MAX_DELAY_MS: u64 = 3_600_000;

/// What is left of a use after some time.
pub(super) fn decayed(cpu_ms: f64, at_ms: u64, now_ms: u64) -> f64 {
    cpu_ms * 0.5f64.powf(now_ms.saturating_sub(at_ms) as f64 / HALF_LIFE_MS)
}

/// Where a job goes.
struct Next {
    state: State,
    reason: Reason,
    detail: Option<String>,
    not_before_ms: Option<u64>,
    retries_used: u32,
    failures: u32,
    /// What was done up to now is of no use.
    anew: bool,
}

/// Ends the present attempt of a job. `at_ms` is when it ended.
pub(super) fn end_attempt(
    tx: &Transaction<'_>,
    moment: Moment,
    job: &Job,
    at_ms: u64,
    ended: &Ended,
) -> Result<()> {
    let next = next(moment, job, ended);
    let times = account(tx, job, at_ms, ended, &next)?;
    tx.prepare_cached(
        "UPDATE attempts SET ended_ms = ?, reason = ?, detail = ?, exit_code = ?, allocated_ms = ?, suspended_ms = ?, \
         checkpoint_ms = ?, restore_ms = ?, transfer_ms = ?, committed_ms = ?, lost_ms = ? WHERE job = ? AND epoch = ?",
    )?
    .execute(params![
        at_ms,
        ended.reason.as_str(),
        ended.detail,
        ended.exit_code,
        times.allocated_ms,
        times.suspended_ms,
        times.checkpoint_ms,
        times.restore_ms,
        times.transfer_ms,
        times.committed_ms,
        times.lost_ms,
        job.id,
        job.epoch,
    ])?;
    charge(tx, moment, job, at_ms, times.allocated_ms)?;
    if next.anew {
        forget_checkpoints(tx, job.id)?;
    } else if ended.reason == Reason::SelfCheckpointed {
        // It is started again, not restored.
        forget_checkpoints(tx, job.id)?;
        tx.execute(
            "UPDATE jobs SET saved = (SELECT files FROM attempts WHERE job = ?1 AND epoch = ?2) WHERE id = ?1",
            params![job.id, job.epoch],
        )?;
    }
    let exit_code = if next.state.is_final() { ended.exit_code } else { None };
    tx.prepare_cached(
        "UPDATE jobs SET state = ?, reason = ?, detail = ?, not_before_ms = ?, retries_used = ?, failures = ?, \
         activity = NULL, token = NULL, host = NULL, claimed_ms = NULL, lease_until_ms = NULL, wanted = 0, \
         exit_code = ?, ended_ms = ? WHERE id = ?",
    )?
    .execute(params![
        next.state.as_str(),
        next.reason.as_str(),
        next.detail,
        next.not_before_ms,
        next.retries_used,
        next.failures,
        exit_code,
        next.state.is_final().then_some(at_ms),
        job.id,
    ])?;
    add_event(tx, (job.id, job.epoch), moment.now_ms, next.state, next.reason, next.detail.as_deref())?;
    if next.state.is_final() { settle_dependents(tx, moment, job.id, next.state) } else { Ok(()) }
}

/// A job that ends without an attempt: cancelled while it waited.
pub(super) fn cancel_waiting(tx: &Transaction<'_>, moment: Moment, job: &Job) -> Result<()> {
    tx.execute(
        "UPDATE jobs SET state = 'cancelled', reason = 'cancelled', detail = NULL, not_before_ms = NULL, ended_ms = ? \
         WHERE id = ?",
        params![moment.now_ms, job.id],
    )?;
    add_event(tx, (job.id, job.epoch), moment.now_ms, State::Cancelled, Reason::Cancelled, None)?;
    settle_dependents(tx, moment, job.id, State::Cancelled)
}

pub(super) fn forget_checkpoints(tx: &Transaction<'_>, job: JobId) -> Result<()> {
    tx.execute("UPDATE snapshots SET usable = 0 WHERE job = ?", [job])?;
    tx.execute("UPDATE jobs SET saved = NULL, progress = NULL WHERE id = ?", [job])?;
    Ok(())
}

fn doubled(first_ms: u64, times: u32) -> u64 {
    first_ms.saturating_mul(1u64.checked_shl(times).unwrap_or(u64::MAX)).min(MAX_DELAY_MS)
}

fn next(moment: Moment, job: &Job, ended: &Ended) -> Next {
    let stay = |state, reason| Next {
        state,
        reason,
        detail: ended.detail.clone(),
        not_before_ms: None,
        retries_used: job.retries_used,
        failures: job.failures,
        anew: false,
    };
    let mut next = match ended.reason {
        Reason::Exited if ended.exit_code == Some(0) => stay(State::Succeeded, Reason::Exited),
        Reason::Exited
        | Reason::Signalled
        | Reason::TimedOut
        | Reason::OutOfMemory
        | Reason::ProcessLimit
        | Reason::MissingOutput => {
            if job.retries_used < job.spec.retries {
                let delay = doubled(job.spec.retry_delay_ms, job.retries_used);
                let what = match ended.exit_code {
                    Some(code) => format!("exit code {code}"),
                    None => ended.reason.to_string(),
                };
                Next {
                    not_before_ms: Some(moment.now_ms + delay),
                    retries_used: job.retries_used + 1,
                    detail: Some(format!("{what}: retry {} of {}", job.retries_used + 1, job.spec.retries)),
                    anew: true,
                    ..stay(State::Queued, Reason::Retry)
                }
            } else {
                stay(State::Failed, ended.reason)
            }
        }
        Reason::SelfCheckpointed => Next { failures: 0, ..stay(State::Queued, Reason::SelfCheckpointed) },
        Reason::Cancelled => stay(State::Cancelled, Reason::Cancelled),
        reason if reason.kind() == ReasonKind::System => {
            let failures = job.failures + 1;
            if failures >= MAX_FAILURES {
                let last = ended.detail.clone().unwrap_or_else(|| reason.to_string());
                Next {
                    failures,
                    detail: Some(format!("{failures} failures in a row, the last: {last}")),
                    ..stay(State::Held, Reason::SystemFailures)
                }
            } else {
                let not_before_ms = Some(moment.now_ms + doubled(FAILURE_DELAY_MS, failures - 1));
                Next { failures, not_before_ms, ..stay(State::Queued, reason) }
            }
        }
        reason if reason.kind() == ReasonKind::Person => stay(State::Held, reason),
        reason => stay(State::Queued, reason),
    };
    // What users have asked for meanwhile.
    let wanted = job.wanted;
    if wanted.has(Wanted::CANCEL) && !next.state.is_final() {
        next = Next { detail: None, ..stay(State::Cancelled, Reason::Cancelled) };
    } else if wanted.has(Wanted::REQUEUE) && next.state != State::Cancelled {
        next = Next {
            anew: true,
            detail: None,
            retries_used: 0,
            failures: 0,
            ..stay(State::Queued, Reason::Requeued)
        };
    }
    if wanted.has(Wanted::HOLD) && next.state == State::Queued {
        next = Next { state: State::Held, reason: Reason::HeldByUser, not_before_ms: None, ..next };
    } else if wanted.has(Wanted::SUSPEND) && next.state == State::Queued {
        next = Next {
            state: State::Held,
            reason: Reason::HeldByUser,
            not_before_ms: None,
            detail: Some("it was suspended when its host gave it back: release it".to_owned()),
            ..next
        };
    }
    next
}

/// Works out what of an attempt's time was kept.
fn account(tx: &Transaction<'_>, job: &Job, at_ms: u64, ended: &Ended, next: &Next) -> Result<Times> {
    let (claimed, started, work_base): (u64, Option<u64>, u64) = tx
        .prepare_cached(
            "SELECT claimed_ms, started_ms, work_base_ms FROM attempts WHERE job = ? AND epoch = ?",
        )?
        .query_row(params![job.id, job.epoch], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let mut times = ended.times;
    times.allocated_ms = at_ms.saturating_sub(claimed);
    let work = started.map_or(0, |started| {
        at_ms
            .saturating_sub(started)
            .saturating_sub(times.suspended_ms)
            .saturating_sub(times.checkpoint_ms)
            .saturating_sub(times.transfer_ms)
    });
    let has_saved = ended.reason == Reason::SelfCheckpointed && !next.anew;
    let kept = if has_saved || matches!(next.state, State::Succeeded | State::Failed) {
        work
    } else if next.anew || next.state == State::Cancelled {
        0
    } else {
        let up_to: Option<u64> = tx
            .prepare_cached(
                "SELECT work_ms FROM snapshots WHERE job = ? AND epoch = ? AND usable = 1 ORDER BY number DESC LIMIT 1",
            )?
            .query_row(params![job.id, job.epoch], |row| row.get(0))
            .optional()?;
        up_to.map_or(0, |up_to| up_to.saturating_sub(work_base).min(work))
    };
    times.committed_ms = kept;
    times.lost_ms = work - kept;
    Ok(times)
}

/// Adds to a user's use what an attempt that ended at a time has used.
fn charge(tx: &Transaction<'_>, moment: Moment, job: &Job, at_ms: u64, allocated_ms: u64) -> Result<()> {
    let cpu_ms = decayed(allocated_ms as f64 * f64::from(job.spec.cpus), at_ms, moment.now_ms);
    let known: Option<(f64, u64)> = tx
        .prepare_cached("SELECT cpu_ms, at_ms FROM usage WHERE user = ?")?
        .query_row([&job.user], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let old = known.map_or(0.0, |(cpu_ms, at_ms)| decayed(cpu_ms, at_ms, moment.now_ms));
    tx.prepare_cached("INSERT OR REPLACE INTO usage (user, cpu_ms, at_ms) VALUES (?, ?, ?)")?
        .execute(params![job.user, old + cpu_ms, moment.now_ms])?;
    Ok(())
}

/// Tells the jobs that wait for one that it has ended.
fn settle_dependents(tx: &Transaction<'_>, moment: Moment, ended: JobId, state: State) -> Result<()> {
    let mut statement =
        tx.prepare_cached("SELECT job, kind FROM dependencies WHERE needs = ? AND open = 1")?;
    let waiting: Vec<(JobId, DependencyKind)> = statement
        .query_map([ended], |row| {
            let kind = match row.get_ref(1)?.as_str()? {
                "success" => DependencyKind::Success,
                _ => DependencyKind::End,
            };
            Ok((row.get(0)?, kind))
        })?
        .collect::<Result<_>>()?;
    if waiting.is_empty() {
        return Ok(());
    }
    tx.execute("UPDATE dependencies SET open = 0 WHERE needs = ?", [ended])?;
    for (id, kind) in waiting {
        tx.execute("UPDATE jobs SET open_dependencies = max(open_dependencies - 1, 0) WHERE id = ?", [id])?;
        let Some(job) = find_job(tx, id)? else { continue };
        let (state, reason, detail) = if kind == DependencyKind::Success && state != State::Succeeded {
            (State::Held, Reason::DependencyFailed, Some(format!("job {ended} has {state}")))
        } else if job.open_dependencies == 0 && job.state == State::Queued {
            (State::Queued, Reason::Waiting, None)
        } else {
            continue;
        };
        if !matches!(job.state, State::Queued | State::Held) {
            continue;
        }
        tx.execute(
            "UPDATE jobs SET state = ?, reason = ?, detail = ? WHERE id = ?",
            params![state.as_str(), reason.as_str(), detail, id],
        )?;
        add_event(tx, (id, job.epoch), moment.now_ms, state, reason, detail.as_deref())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_halved_by_each_half_life_and_waits_are_bounded() {
        let day = 24 * 3600 * 1000;
        assert_eq!(decayed(8.0, 0, day), 4.0);
        assert_eq!(decayed(8.0, 0, 3 * day), 1.0);
        assert_eq!(decayed(8.0, day, 0), 8.0);
        assert_eq!([0, 1, 5].map(|times| doubled(1000, times)), [1000, 2000, 32_000]);
        assert_eq!(doubled(1000, 200), MAX_DELAY_MS);
    }
}
