//! Which jobs a worker gets: by priority, then fair share between users, then age.
//!
//! A job with a rank is left to the best host that has room for it, for as long as [`RANK_PATIENCE_MS`].
//!
//! Within a priority the user goes first who has used least: what was used lately, half of it forgotten every half-life,
//! and what runs now. So that nobody waits for ever behind higher priorities or lighter users, every
//! [`OLDEST_EVERY`]th claim is of the oldest job instead.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, Result, Row, Transaction, params};

use super::ends::decayed;
use super::rows::{add_event, find_job};
use super::{Moment, Refusal, lease};
use crate::queue::expr::Expr;
use crate::queue::{AdScope, Free, HostAd, JobId, LeaseKey, Needs, Reason, State, unsuitable};
use crate::store::{Claim, ClaimRequest, StoreError};

/// One claim in so many takes the oldest job that fits.
const OLDEST_EVERY: u64 = 16;
/// Jobs that one call hands out.
const MAX_COUNT: u32 = 256;
/// How long a job waits for a host that it prefers, from when it could have been taken.
const RANK_PATIENCE_MS: u64 = 10_000;
/// Candidates read at a time.
const PAGE: u32 = 64;
/// What a running job counts for at least, so that users alternate from the first job on: a processor minute.
const LEAST_CHARGE_MS: f64 = 60_000.0;

/// Whether any job waits for a host.
pub(super) fn any_ready(tx: &Transaction<'_>) -> Result<bool> {
    tx.prepare_cached("SELECT EXISTS (SELECT 1 FROM jobs WHERE state = 'queued' AND open_dependencies = 0)")?
        .query_row([], |row| row.get(0))
}

pub(super) fn claim(
    tx: &Transaction<'_>,
    moment: Moment,
    request: &ClaimRequest,
) -> std::result::Result<Vec<Claim>, Refusal> {
    lease::expire(tx, moment)?;
    let ad = lease::host_ad(tx, &request.host)?.ok_or_else(|| StoreError::NoHost(request.host.clone()))?;
    if ad.instance != request.instance {
        let message = format!(
            "another worker called '{}' uses this queue: give one of them another --name",
            request.host
        );
        return Err(StoreError::Invalid(message).into());
    }
    let mut chooser = Chooser {
        tx,
        moment,
        ad: &ad,
        free: request.free,
        matches: HashMap::new(),
        hosts: None,
        better: HashMap::new(),
        shares: shares(tx, moment)?,
        taken: Vec::new(),
    };
    let count = request.count.min(MAX_COUNT);
    let claims_before: u64 =
        tx.query_row("SELECT value FROM counters WHERE name = 'claims'", [], |row| row.get(0))?;
    let mut claims = Vec::new();
    let mut ranked = Ranked::default();
    while claims.len() < count as usize {
        let turn = claims_before + claims.len() as u64 + 1;
        let mut next = None;
        if turn.is_multiple_of(OLDEST_EVERY) {
            next = chooser.oldest()?;
        }
        if next.is_none() {
            next = chooser.next(&mut ranked)?;
        }
        let Some(candidate) = next else { break };
        chooser.take(&candidate);
        claims.push(take(tx, moment, &ad.host, candidate.id)?);
    }
    if !claims.is_empty() {
        tx.execute("UPDATE counters SET value = value + ? WHERE name = 'claims'", [claims.len()])?;
    }
    Ok(claims)
}

/// What each user has used lately and uses now, in processor milliseconds.
pub(super) fn shares(tx: &Transaction<'_>, moment: Moment) -> Result<HashMap<String, f64>> {
    let mut shares = HashMap::new();
    let mut statement = tx.prepare_cached("SELECT user, cpu_ms, at_ms FROM usage")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        shares.insert(row.get(0)?, decayed(row.get(1)?, row.get(2)?, moment.now_ms));
    }
    let mut statement =
        tx.prepare_cached("SELECT user, cpus, claimed_ms FROM jobs WHERE lease_until_ms IS NOT NULL")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (cpus, since): (f64, u64) = (row.get(1)?, row.get(2)?);
        let used = cpus * (moment.now_ms.saturating_sub(since) as f64).max(LEAST_CHARGE_MS);
        *shares.entry(row.get(0)?).or_default() += used;
    }
    Ok(shares)
}

#[derive(Clone, Debug)]
struct Candidate {
    id: JobId,
    user: String,
    cpus: u32,
    memory_bytes: u64,
    engine: String,
    cpu_model: Option<String>,
    /// What its latest checkpoint needs.
    checkpoint_cpu_model: Option<String>,
    requirements: Option<String>,
    not_before_ms: Option<u64>,
    rank: Option<String>,
    submitted_ms: u64,
}

const CANDIDATE: &str = "id, user, cpus, memory_bytes, engine, jobs.cpu_model, requirements, not_before_ms, rank, submitted_ms, (SELECT \
    cpu_model FROM snapshots WHERE snapshots.job = jobs.id AND usable = 1 ORDER BY snapshots.epoch DESC, number DESC \
    LIMIT 1)";

fn candidate(row: &Row<'_>) -> Result<Candidate> {
    Ok(Candidate {
        id: row.get(0)?,
        user: row.get(1)?,
        cpus: row.get(2)?,
        memory_bytes: row.get(3)?,
        engine: row.get(4)?,
        cpu_model: row.get(5)?,
        requirements: row.get(6)?,
        not_before_ms: row.get(7)?,
        rank: row.get(8)?,
        submitted_ms: row.get(9)?,
        checkpoint_cpu_model: row.get(10)?,
    })
}

/// Where the walk through the priorities stands: each user's next candidates in the present one.
#[derive(Default)]
struct Ranked {
    priority: Option<i64>,
    users: Vec<UserQueue>,
}

struct UserQueue {
    user: String,
    page: std::collections::VecDeque<Candidate>,
    last: JobId,
    exhausted: bool,
}

struct Chooser<'a> {
    tx: &'a Transaction<'a>,
    moment: Moment,
    ad: &'a HostAd,
    free: Free,
    /// Whether the host suits jobs with the same wishes.
    matches: HashMap<Wishes, bool>,
    /// The other hosts that take jobs, once somebody has asked.
    hosts: Option<Vec<HostAd>>,
    /// Whether another host is better for jobs with the same wishes and this rank.
    better: HashMap<(Wishes, String), bool>,
    shares: HashMap<String, f64>,
    taken: Vec<JobId>,
}

type Wishes = (u32, u64, String, [Option<String>; 3]);

fn wishes(candidate: &Candidate) -> Wishes {
    (
        candidate.cpus,
        candidate.memory_bytes,
        candidate.engine.clone(),
        [candidate.cpu_model.clone(), candidate.checkpoint_cpu_model.clone(), candidate.requirements.clone()],
    )
}

fn suits(ad: &HostAd, candidate: &Candidate) -> bool {
    let needs = Needs {
        engine: &candidate.engine,
        cpu_model: candidate.cpu_model.as_deref(),
        checkpoint_cpu_model: candidate.checkpoint_cpu_model.as_deref(),
        requirements: candidate.requirements.as_deref(),
    };
    unsuitable(ad, &needs).is_empty()
}

impl Chooser<'_> {
    fn take(&mut self, candidate: &Candidate) {
        self.taken.push(candidate.id);
        self.free.cpus = self.free.cpus.saturating_sub(candidate.cpus);
        self.free.memory_bytes = self.free.memory_bytes.saturating_sub(candidate.memory_bytes);
        *self.shares.entry(candidate.user.clone()).or_default() +=
            f64::from(candidate.cpus) * LEAST_CHARGE_MS;
    }

    /// Whether the host may have a job now.
    fn may_take(&mut self, candidate: &Candidate) -> Result<bool> {
        Ok(self.fits(candidate) && !self.is_left_to_another(candidate)?)
    }

    /// Whether a job has not waited long enough for a host that it prefers.
    fn is_left_to_another(&mut self, candidate: &Candidate) -> Result<bool> {
        let Some(rank) = &candidate.rank else { return Ok(false) };
        let since = candidate.submitted_ms.max(candidate.not_before_ms.unwrap_or(0));
        if self.moment.now_ms.saturating_sub(since) >= RANK_PATIENCE_MS {
            let ended: Option<u64> = self
                .tx
                .prepare_cached("SELECT max(ended_ms) FROM attempts WHERE job = ?")?
                .query_row([candidate.id], |row| row.get(0))?;
            if ended.is_none_or(|ended| self.moment.now_ms.saturating_sub(ended) >= RANK_PATIENCE_MS) {
                return Ok(false);
            }
        }
        let key = (wishes(candidate), rank.clone());
        if let Some(known) = self.better.get(&key) {
            return Ok(*known);
        }
        // What cannot be read prefers nobody: it was checked when it was submitted.
        let Ok(rank) = Expr::parse(rank) else { return Ok(false) };
        let hosts = match self.hosts.take() {
            Some(hosts) => hosts,
            None => super::read::hosts(self.tx, self.moment)?
                .into_iter()
                .filter(|host| host.alive && host.ad.closed.is_none() && host.ad.host != self.ad.host)
                .map(|host| host.ad)
                .collect(),
        };
        let own = rank.number(&AdScope(self.ad));
        let better = hosts.iter().any(|ad| {
            rank.number(&AdScope(ad)) > own
                && ad.free.slots > 0
                && ad.free.cpus >= candidate.cpus
                && ad.free.memory_bytes >= candidate.memory_bytes
                && suits(ad, candidate)
        });
        self.hosts = Some(hosts);
        self.better.insert(key, better);
        Ok(better)
    }

    fn fits(&mut self, candidate: &Candidate) -> bool {
        if self.taken.contains(&candidate.id)
            || candidate.not_before_ms.is_some_and(|time| time > self.moment.now_ms)
            || candidate.cpus > self.free.cpus
            || candidate.memory_bytes > self.free.memory_bytes
        {
            return false;
        }
        let ad = self.ad;
        *self.matches.entry(wishes(candidate)).or_insert_with(|| suits(ad, candidate))
    }

    fn oldest(&mut self) -> Result<Option<Candidate>> {
        let mut last = 0;
        loop {
            let sql = format!(
                "SELECT {CANDIDATE} FROM jobs WHERE state = 'queued' AND open_dependencies = 0 AND id > ? \
                 ORDER BY id LIMIT {PAGE}"
            );
            let tx = self.tx;
            let mut statement = tx.prepare_cached(&sql)?;
            let page: Vec<Candidate> = statement.query_map([last], candidate)?.collect::<Result<_>>()?;
            for candidate in &page {
                if self.may_take(candidate)? {
                    return Ok(Some(candidate.clone()));
                }
                last = candidate.id;
            }
            if page.len() < PAGE as usize {
                return Ok(None);
            }
        }
    }

    /// The next job by priority, fair share and age.
    fn next(&mut self, ranked: &mut Ranked) -> Result<Option<Candidate>> {
        loop {
            while let Some(index) = self.lightest(&ranked.users) {
                let Some(queue) = ranked.users.get_mut(index) else { break };
                if let Some(candidate) = self.next_of(ranked.priority.unwrap_or_default(), queue)? {
                    return Ok(Some(candidate));
                }
                queue.exhausted = true;
            }
            if !self.next_priority(ranked)? {
                return Ok(None);
            }
        }
    }

    fn lightest(&self, users: &[UserQueue]) -> Option<usize> {
        let share = |queue: &UserQueue| self.shares.get(&queue.user).copied().unwrap_or_default();
        users
            .iter()
            .enumerate()
            .filter(|(_, queue)| !queue.exhausted)
            .min_by(|(_, left), (_, right)| share(left).total_cmp(&share(right)))
            .map(|(index, _)| index)
    }

    fn next_of(&mut self, priority: i64, queue: &mut UserQueue) -> Result<Option<Candidate>> {
        loop {
            while let Some(candidate) = queue.page.pop_front() {
                if self.may_take(&candidate)? {
                    return Ok(Some(candidate));
                }
            }
            let sql = format!(
                "SELECT {CANDIDATE} FROM jobs WHERE state = 'queued' AND open_dependencies = 0 AND priority = ? \
                 AND user = ? AND id > ? ORDER BY id LIMIT {PAGE}"
            );
            let tx = self.tx;
            let mut statement = tx.prepare_cached(&sql)?;
            queue.page = statement
                .query_map(params![priority, queue.user, queue.last], candidate)?
                .collect::<Result<_>>()?;
            match queue.page.back() {
                Some(candidate) => queue.last = candidate.id,
                None => return Ok(None),
            }
        }
    }

    /// Goes down to the next priority that any job has.
    fn next_priority(&self, ranked: &mut Ranked) -> Result<bool> {
        const READY: &str = "FROM jobs WHERE state = 'queued' AND open_dependencies = 0";
        let below = ranked.priority.unwrap_or(i64::MAX);
        let first = ranked.priority.is_none();
        let found: Option<i64> = self
            .tx
            .prepare_cached(&format!(
                "SELECT priority {READY} AND (priority < ?1 OR ?2) ORDER BY priority DESC LIMIT 1"
            ))?
            .query_row(params![below, first], |row| row.get(0))
            .optional()?;
        let Some(priority) = found else { return Ok(false) };
        ranked.priority = Some(priority);
        ranked.users.clear();
        let mut statement = self.tx.prepare_cached(&format!(
            "SELECT user {READY} AND priority = ? AND user > ? ORDER BY user LIMIT 1"
        ))?;
        let mut user = String::new();
        while let Some(next) =
            statement.query_row(params![priority, user], |row| row.get::<_, String>(0)).optional()?
        {
            ranked.users.push(UserQueue {
                user: next.clone(),
                page: Default::default(),
                last: 0,
                exhausted: false,
            });
            user = next;
        }
        Ok(true)
    }
}

/// Gives a job to a host.
fn take(tx: &Transaction<'_>, moment: Moment, host: &str, id: JobId) -> std::result::Result<Claim, Refusal> {
    let token = crate::store::random_word();
    let until = moment.now_ms + moment.lease_ms;
    tx.prepare_cached(
        "UPDATE jobs SET state = 'starting', reason = 'claimed', detail = NULL, activity = NULL, epoch = epoch + 1, \
         token = ?, host = ?, claimed_ms = ?, lease_until_ms = ?, wanted = 0, not_before_ms = NULL WHERE id = ?",
    )?
    .execute(params![token, host, moment.now_ms, until, id])?;
    let job = find_job(tx, id)?.ok_or(StoreError::NoJob(id))?;
    // What a command has saved itself, it goes on from, and so does its output.
    tx.prepare_cached(
        "INSERT INTO attempts (job, epoch, host, claimed_ms, parent) VALUES (?1, ?2, ?3, ?4, \
         (SELECT max(a.epoch) FROM attempts a JOIN jobs j ON j.id = a.job \
          WHERE a.job = ?1 AND a.reason = 'self_checkpointed' AND j.saved IS NOT NULL))",
    )?
    .execute(params![id, job.epoch, host, moment.now_ms])?;
    add_event(tx, (id, job.epoch), moment.now_ms, State::Starting, Reason::Claimed, Some(host))?;
    let key = LeaseKey { job: id, epoch: job.epoch, token };
    let checkpoints = super::read::checkpoints(tx, id)?;
    Ok(Claim { key, lease_ms: moment.lease_ms, job, checkpoints })
}
