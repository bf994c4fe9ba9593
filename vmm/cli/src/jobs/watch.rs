//! `harrier wait`, `logs` and `events`: following jobs.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use harrier_jobs::queue::{Job, JobId, State};
use harrier_jobs::store::{EventQuery, JobFilter, OutputQuery, Store};

use super::flags::EventsFlags;
use super::{ids, place, print, print_json, text};
use crate::exit::{Failure, HARRIER_FAILED, TIMED_OUT};
use crate::flags::{LogsFlags, WaitFlags};
use crate::units::parse_time;

/// The wait between two looks at the queue: at first and at most.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// The most that one look at a job's output takes.
const PIECE: u64 = 256 << 10;

/// Sleeps longer and longer while nothing happens.
struct Patience(Duration);

impl Patience {
    fn new() -> Self {
        Patience(LOOKS.0)
    }

    fn sleep(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 3 / 2).min(LOOKS.1);
    }
}

pub(crate) fn wait(flags: &WaitFlags) -> Result<u8, Failure> {
    let store = place::open(&flags.place)?;
    let ids = ids::parse(&flags.targets)?;
    let timeout = flags.timeout.as_deref().map(parse_time).transpose();
    let timeout = timeout.map_err(|err| Failure::new(format!("--timeout: {err}")))?;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    for id in &ids {
        store.job(*id)?;
    }
    let mut open = ids.clone();
    let mut ended: Vec<Job> = Vec::new();
    let mut patience = Patience::new();
    let progress = Progress::new(ids.len());
    loop {
        let states = State::ALL.iter().copied().filter(|state| state.is_final()).collect();
        let filter = JobFilter { ids: Some(open.clone()), states: Some(states), ..JobFilter::default() };
        let news = store.jobs(&filter)?;
        if !news.is_empty() {
            patience = Patience::new();
        }
        open.retain(|id| !news.iter().any(|job| job.id == *id));
        ended.extend(news);
        progress.show(ended.len());
        if open.is_empty() || (flags.any && !ended.is_empty()) {
            break;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            progress.clear();
            return Err(Failure {
                code: TIMED_OUT,
                message: format!("{} have not ended in time: wait longer", ids::show(&open)),
            });
        }
        patience.sleep();
    }
    progress.clear();
    if flags.json {
        print_json(&ended)?;
    }
    // In the order in which they were named.
    let failed = ids
        .iter()
        .filter_map(|id| ended.iter().find(|job| job.id == *id))
        .find(|job| job.state != State::Succeeded);
    let Some(job) = failed else { return Ok(0) };
    match (job.state, job.exit_code) {
        (State::Failed, Some(code)) => Ok(code),
        _ => Err(Failure { code: HARRIER_FAILED, message: format!("job {} was {}", job.id, job.state) }),
    }
}

/// How far a wait has come, on a terminal.
struct Progress {
    total: usize,
    shown: bool,
}

impl Progress {
    fn new(total: usize) -> Self {
        Progress { total, shown: total > 1 && io::stderr().is_terminal() }
    }

    fn show(&self, done: usize) {
        if self.shown {
            // Without stderr there is nobody to tell.
            let _ = write!(io::stderr(), "\rharrier: {done} of {} jobs have ended ", self.total);
        }
    }

    fn clear(&self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// One stream of a job and where it goes.
struct Follower {
    stderr: bool,
    offset: u64,
    complete: bool,
}

pub(crate) fn logs(flags: &LogsFlags) -> Result<u8, Failure> {
    for (flag, given) in
        [("--timestamps", flags.timestamps), ("--tail", flags.tail.is_some()), ("--monitor", flags.monitor)]
    {
        if given {
            return Err(Failure::new(format!(
                "{flag} is for machines, and '{}' is a job: leave it out",
                flags.target
            )));
        }
    }
    let store = place::open(&flags.place)?;
    let [job] = ids::parse(std::slice::from_ref(&flags.target))?
        .try_into()
        .map_err(|_| Failure::new(format!("'{}' is more than one job: name one", flags.target)))?;
    store.job(job)?;
    let mut followers: Vec<Follower> = [(false, flags.stderr), (true, flags.stdout)]
        .into_iter()
        .filter(|(_, left_out)| !left_out)
        .map(|(stderr, _)| Follower { stderr, offset: 0, complete: false })
        .collect();
    let mut patience = Patience::new();
    let mut epoch = flags.attempt;
    loop {
        let mut moved = false;
        for follower in followers.iter_mut().filter(|follower| !follower.complete) {
            moved |= follow(store.as_ref(), job, &mut epoch, flags.attempt.is_some(), follower)?;
        }
        if moved {
            patience = Patience::new();
        } else if !flags.follow || followers.iter().all(|follower| follower.complete) {
            return Ok(0);
        } else {
            patience.sleep();
        }
        if flags.attempt.is_none() && !moved {
            // A new attempt that goes on from nothing prints from its beginning.
            let latest = store.attempts(job)?;
            if let Some(last) = latest.last()
                && epoch.is_some_and(|epoch| epoch != last.epoch)
            {
                if last.parent.is_none() && last.started_ms.is_some() {
                    let _ =
                        writeln!(io::stderr(), "harrier: job {job} was started anew: attempt {}", last.epoch);
                    followers.iter_mut().for_each(|follower| follower.offset = 0);
                    epoch = Some(last.epoch);
                } else if last.parent.is_some() {
                    // What it went on from is read through it, from wherever this reader stands.
                    epoch = Some(last.epoch);
                }
            }
        }
    }
}

/// Prints what there is of a stream. True: there was something.
fn follow(
    store: &dyn Store,
    job: JobId,
    epoch: &mut Option<u64>,
    fixed: bool,
    follower: &mut Follower,
) -> Result<bool, Failure> {
    let mut moved = false;
    loop {
        let query = OutputQuery {
            job,
            epoch: *epoch,
            stderr: follower.stderr,
            offset: follower.offset,
            limit: PIECE,
        };
        let piece = store.read_output(&query)?;
        if !fixed && epoch.is_none() && piece.epoch > 0 {
            *epoch = Some(piece.epoch);
        }
        if piece.bytes.is_empty() {
            follower.complete = piece.complete && (fixed || is_last(store, job, piece.epoch)?);
            return Ok(moved);
        }
        moved = true;
        follower.offset += piece.bytes.len() as u64;
        let written = if follower.stderr {
            io::stderr().write_all(&piece.bytes)
        } else {
            io::stdout().write_all(&piece.bytes)
        };
        match written {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::BrokenPipe => {
                follower.complete = true;
                return Ok(moved);
            }
            Err(err) => {
                return Err(Failure::new(format!(
                    "the output cannot be written ({err}): give it another place"
                )));
            }
        }
    }
}

/// Whether nothing comes after an attempt.
fn is_last(store: &dyn Store, job: JobId, epoch: u64) -> Result<bool, Failure> {
    Ok(store.job(job)?.state.is_final()
        && store.attempts(job)?.last().is_none_or(|attempt| attempt.epoch == epoch || epoch == 0))
}

/// Events that are read at a time.
const EVENTS: u64 = 1000;

pub(super) fn events(flags: &EventsFlags) -> Result<u8, Failure> {
    let store = place::open(&flags.place)?;
    let job = match &flags.job {
        None => None,
        Some(word) => {
            let [job] = ids::parse(std::slice::from_ref(word))?
                .try_into()
                .map_err(|_| Failure::new(format!("'{word}' is more than one job: name one")))?;
            Some(job)
        }
    };
    let mut query = EventQuery { job, after_seq: 0, limit: Some(EVENTS) };
    let mut patience = Patience::new();
    loop {
        // Looked at before the events: what is there then is all there is.
        let over = match job {
            Some(job) => store.job(job)?.state.is_final(),
            None => false,
        };
        let news = store.events(&query)?;
        for event in &news {
            query.after_seq = event.seq;
            if flags.json {
                print(&format!("{}\n", serde_json::to_string(event)?))?;
            } else {
                let detail = event.detail.as_ref().map(|detail| format!("  {detail}")).unwrap_or_default();
                let place = format!("job {} attempt {}", event.job, event.epoch);
                print(&format!(
                    "{}  {place:<18}  {:<9}  {}{detail}\n",
                    text::time(event.at_ms),
                    event.state,
                    event.reason
                ))?;
            }
        }
        if news.is_empty() {
            if !flags.follow || over {
                return Ok(0);
            }
            patience.sleep();
        } else {
            patience = Patience::new();
        }
    }
}
