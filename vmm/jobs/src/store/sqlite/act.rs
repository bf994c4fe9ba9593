//! What users do to jobs. Doing it twice is doing it once.

use rusqlite::{Transaction, params};

use super::rows::{add_event, find_job};
use super::{Moment, Refusal, ends};
use crate::queue::{Job, JobId, Reason, State, Wanted};
use crate::store::{Action, ActionResult, StoreError};

pub(super) fn act(
    tx: &Transaction<'_>,
    moment: Moment,
    action: &Action,
    id: JobId,
) -> Result<ActionResult, Refusal> {
    let job = find_job(tx, id)?.ok_or(StoreError::NoJob(id))?;
    let actor = Actor { tx, moment, job: &job };
    let (what, message) = match action {
        Action::Cancel => actor.cancel()?,
        Action::Hold => actor.hold()?,
        Action::Release => actor.release()?,
        Action::Requeue => actor.requeue()?,
        Action::Suspend => actor.suspend()?,
        Action::Resume => actor.resume()?,
        Action::Checkpoint => actor.checkpoint()?,
        Action::Vacate => actor.vacate()?,
        Action::Priority(priority) => actor.priority(*priority)?,
    };
    let state = find_job(tx, id)?.map_or(job.state, |job| job.state);
    Ok(ActionResult {
        job: id,
        changed: what == What::Changed,
        refused: what == What::Refused,
        state,
        message,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Changed,
    Unchanged,
    Refused,
}

type Done = rusqlite::Result<(What, String)>;

fn changed(message: impl Into<String>) -> Done {
    Ok((What::Changed, message.into()))
}

fn unchanged(message: impl Into<String>) -> Done {
    Ok((What::Unchanged, message.into()))
}

fn refused(message: impl Into<String>) -> Done {
    Ok((What::Refused, message.into()))
}

struct Actor<'a> {
    tx: &'a Transaction<'a>,
    moment: Moment,
    job: &'a Job,
}

impl Actor<'_> {
    fn cancel(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Cancelled => unchanged("is cancelled already"),
            state if state.is_final() => unchanged(format!("has {state} already")),
            State::Queued | State::Held => {
                ends::cancel_waiting(self.tx, self.moment, job)?;
                changed("cancelled")
            }
            _ if job.wanted.has(Wanted::CANCEL) => unchanged("is being cancelled already"),
            _ => {
                // Nothing else counts any more.
                self.want(Wanted::CANCEL)?;
                self.set(State::Stopping, Reason::Cancelled, None)?;
                changed("is being cancelled")
            }
        }
    }

    fn hold(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Held => unchanged("is held already"),
            State::Queued => {
                self.set(State::Held, Reason::HeldByUser, None)?;
                changed("held")
            }
            state if state.is_final() => refused(format!("has {state}: requeue it to run it again")),
            _ if job.wanted.has(Wanted::CANCEL) => refused("is being cancelled"),
            _ if job.wanted.has(Wanted::HOLD) => unchanged("will be held as soon as its host gives it back"),
            _ => {
                self.want(job.wanted.with(Wanted::HOLD))?;
                changed("will be held as soon as its host gives it back")
            }
        }
    }

    fn release(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Held => {
                // Whoever releases a job whose dependency has failed wants it to run all the same.
                let open = job.open_dependencies > 0 && job.reason != Reason::DependencyFailed;
                let reason = if open { Reason::Dependency } else { Reason::Released };
                self.tx.execute(
                    "UPDATE jobs SET failures = 0, not_before_ms = NULL, open_dependencies = ? WHERE id = ?",
                    params![if open { job.open_dependencies } else { 0 }, job.id],
                )?;
                self.set(State::Queued, reason, None)?;
                changed("queued")
            }
            state if state.is_leased() && job.wanted.has(Wanted::HOLD) => {
                self.want(job.wanted.without(Wanted::HOLD))?;
                changed("will not be held")
            }
            state => unchanged(format!("is not held: it is {state}")),
        }
    }

    fn requeue(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Queued => unchanged("is queued already"),
            state if state.is_leased() => {
                if job.wanted.has(Wanted::CANCEL) {
                    return refused("is being cancelled: wait for that, then requeue it");
                }
                if job.wanted.has(Wanted::REQUEUE) {
                    return unchanged("will be started anew");
                }
                self.want(job.wanted.with(Wanted::REQUEUE))?;
                changed("will be started anew")
            }
            _ => {
                ends::forget_checkpoints(self.tx, job.id)?;
                self.tx.execute(
                    "UPDATE jobs SET retries_used = 0, failures = 0, not_before_ms = NULL, exit_code = NULL, \
                     ended_ms = NULL, started_ms = NULL WHERE id = ?",
                    [job.id],
                )?;
                let reason = if job.open_dependencies > 0 { Reason::Dependency } else { Reason::Requeued };
                self.set(State::Queued, reason, None)?;
                changed("queued")
            }
        }
    }

    fn suspend(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Queued | State::Held => {
                refused(format!("is {}, so there is nothing to suspend: hold it", job.state))
            }
            state if state.is_final() => refused(format!("has {state}")),
            _ if job.wanted.has(Wanted::CANCEL) => refused("is being cancelled"),
            _ if job.wanted.has(Wanted::SUSPEND) => unchanged("is suspended already"),
            _ => {
                self.want(job.wanted.with(Wanted::SUSPEND))?;
                changed("will be suspended")
            }
        }
    }

    fn resume(&self) -> Done {
        let job = self.job;
        if !job.wanted.has(Wanted::SUSPEND) {
            if job.state == State::Paused && job.reason == Reason::SuspendedByUser {
                return unchanged("will go on already");
            }
            return unchanged(format!("is not suspended: it is {}", job.state));
        }
        self.want(job.wanted.without(Wanted::SUSPEND))?;
        changed("will go on")
    }

    fn checkpoint(&self) -> Done {
        let job = self.job;
        match job.state {
            State::Running | State::Paused | State::Starting if job.spec.reuse => {
                refused("uses a machine that others use after it, so its state is not saved")
            }
            State::Running | State::Paused | State::Starting if job.wanted.has(Wanted::CHECKPOINT) => {
                unchanged("a checkpoint is asked for already")
            }
            State::Running | State::Paused | State::Starting => {
                self.want(job.wanted.with(Wanted::CHECKPOINT))?;
                changed("a checkpoint will be written")
            }
            state => refused(format!("is {state}, so it has no state to save")),
        }
    }

    fn vacate(&self) -> Done {
        let job = self.job;
        match job.state {
            state if !state.is_leased() => unchanged(format!("is on no host: it is {state}")),
            _ if job.wanted.has(Wanted::CANCEL) => unchanged("is being cancelled"),
            _ if job.wanted.has(Wanted::VACATE) => unchanged("is being given back already"),
            _ => {
                self.want(job.wanted.with(Wanted::VACATE))?;
                changed("will be given back")
            }
        }
    }

    fn priority(&self, priority: i64) -> Done {
        let job = self.job;
        if job.state.is_final() {
            return refused(format!("has {}", job.state));
        }
        if job.priority == priority {
            return unchanged(format!("has priority {priority} already"));
        }
        self.tx.execute("UPDATE jobs SET priority = ? WHERE id = ?", params![priority, job.id])?;
        let detail = format!("priority {priority}");
        add_event(self.tx, (job.id, job.epoch), self.moment.now_ms, job.state, job.reason, Some(&detail))?;
        changed(format!("has priority {priority}"))
    }

    fn want(&self, wanted: Wanted) -> rusqlite::Result<()> {
        self.tx.execute("UPDATE jobs SET wanted = ? WHERE id = ?", params![wanted.0, self.job.id])?;
        Ok(())
    }

    fn set(&self, state: State, reason: Reason, detail: Option<&str>) -> rusqlite::Result<()> {
        self.tx.execute(
            "UPDATE jobs SET state = ?, reason = ?, detail = ? WHERE id = ?",
            params![state.as_str(), reason.as_str(), detail, self.job.id],
        )?;
        add_event(self.tx, (self.job.id, self.job.epoch), self.moment.now_ms, state, reason, detail)
    }
}
