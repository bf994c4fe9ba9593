//! A worker behind a network that is cut.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use harrier_jobs::worker::lease_file::LeaseFile;

use crate::pool::{PATIENCE, Pool, Process, chain, chain_output, eventually};

/// Passes connections on, or swallows everything as a cut cable does.
struct Cable {
    address: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    cut: AtomicBool,
    trap: Mutex<Option<Trap>>,
    sprung: Mutex<Option<Instant>>,
}

/// Cuts the cable by itself when a worker calls this method of the store.
struct Trap {
    method: &'static str,
    lost: Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    Request,
    Answer,
}

impl Cable {
    fn to(target: &str) -> Self {
        let target = target.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let shared = state.clone();
        // Both end with the test's process.
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let far = TcpStream::connect(&target).unwrap();
                for (from, to, is_request) in [(&near, &far, true), (&far, &near, false)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let state = shared.clone();
                    std::thread::spawn(move || copy(from, to, &state, is_request));
                }
            }
        });
        Cable { address, state }
    }

    fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::SeqCst);
    }

    /// Lets the next call of this method cut the cable.
    fn cut_at(&self, method: &'static str, lost: Lost) {
        *self.state.trap.lock().unwrap() = Some(Trap { method, lost });
    }

    /// When it was cut by such a call.
    fn sprung(&self) -> Instant {
        let sprung = || *self.state.sprung.lock().unwrap();
        eventually("the worker calls the method that cuts the cable", || sprung().is_some());
        sprung().unwrap()
    }
}

impl State {
    /// Springs the trap if this is what it waits for.
    fn look(&self, request: &[u8]) -> Option<Lost> {
        let mut trap = self.trap.lock().unwrap();
        let words = format!("POST /v1/{}", trap.as_ref()?.method);
        if !request.starts_with(words.as_bytes()) {
            return None;
        }
        *self.sprung.lock().unwrap() = Some(Instant::now());
        trap.take().map(|trap| trap.lost)
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, state: &State, is_request: bool) {
    let cut = &state.cut;
    let mut buffer = vec![0; 64 << 10];
    // A request whose answer is to be lost arrives as a whole, in however many pieces it comes.
    let mut arrives = false;
    while let Ok(count) = from.read(&mut buffer) {
        // What was sent into a cut cable is lost, and with it the connection; no trap is sprung by it.
        if count == 0 || cut.load(Ordering::SeqCst) && !arrives {
            break;
        }
        let lost = if is_request { state.look(&buffer[..count]) } else { None };
        if lost.is_some() {
            cut.store(true, Ordering::SeqCst);
        }
        if lost == Some(Lost::Request) {
            break;
        }
        arrives |= lost == Some(Lost::Answer);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    while cut.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// A pool that everybody reaches by its coordinator, and a worker `first` for one job that has a cable to it.
fn behind_a_cable(lease: &str) -> (Pool, Process, Cable, Process) {
    let pool = Pool::new();
    let (coordinator, url) = pool.coordinator(&["--listen", "127.0.0.1:0", "--lease", lease]);
    let cable = Cable::to(&url);
    pool.use_place(&["--queue", &cable.address]);
    let first = pool.worker("first", &["--jobs", "1"]);
    pool.use_place(&["--queue", &url]);
    (pool, coordinator, cable, first)
}

#[test]
fn a_worker_that_is_cut_off_pauses_goes_on_if_it_is_back_in_time_and_is_fenced_if_not() {
    let (pool, _coordinator, cable, first) = behind_a_cable("12s");
    // Its first attempt takes longer than all of this on any engine.
    let script = chain(150, 50_000).replace("usleep 50000", "usleep $((HARRIER_ATTEMPT > 1 ? 0 : 200000))");
    let id = pool.submit(&["--checkpoint-interval", "never"], &script);
    let steps = || pool.logs(id).lines().count();
    eventually("it has begun", || steps() > 10);

    cable.cut(true);
    eventually("it stands still before its lease ends", || first.said().contains("stands still"));
    cable.cut(false);
    eventually("it goes on", || first.said().contains("goes on"));
    let before = steps();
    eventually("and works", || steps() > before + 5);
    assert_eq!(pool.job(id)["epoch"], 1, "nobody else has it: {}", pool.history(id));

    cable.cut(true);
    eventually("the lease is over", || pool.history(id).contains("worker_lost"));
    eventually("its holder has noticed", || first.said().contains("its lease is over"));
    let second = pool.worker("second", &["--jobs", "1"]);
    eventually("another has it", || pool.job(id)["host"] == "second");
    cable.cut(false);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", second.said(), pool.history(id));
    assert_eq!(pool.logs(id), chain_output(150), "{}", pool.history(id));
    assert_eq!(pool.history(id).matches("succeeded").count(), 1);
}

#[test]
fn a_result_that_comes_after_its_lease_counts_for_nothing() {
    let (pool, _coordinator, cable, first) = behind_a_cable("6s");
    let id = pool.submit(&[], "echo begun; sleep 2; echo $HARRIER_ATTEMPT; exit $((HARRIER_ATTEMPT + 2))");
    eventually("it has begun", || pool.logs(id).contains("begun"));
    cable.cut(true);
    pool.wait_for_event(id, "worker_lost");
    let _second = pool.worker("second", &["--jobs", "1"]);
    assert_eq!(pool.exit_code(id), 4, "the second attempt's: {}\n{}", first.said(), pool.history(id));
    cable.cut(false);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(pool.logs(id), "begun\n2\n");
    let job = pool.job(id);
    assert_eq!((job["exit_code"].as_u64(), job["epoch"].as_u64()), (Some(4), Some(2)), "{}", first.said());
}

/// The lease of the tests below; what their jobs print ends after two thirds of it.
const LEASE: Duration = Duration::from_secs(6);
/// A command that prints without end, so that it shows how long its machine runs.
const ENDLESS: &str = "while :; do echo line; usleep 20000; done";

/// Watches what a job prints until its lease is over, wherever that lies first, and answers when it last printed.
fn last_sign(since: Instant, find: impl Fn() -> Option<PathBuf>) -> Instant {
    let mut path = None;
    let (mut size, mut last) = (0, since);
    while since.elapsed() < LEASE + Duration::from_millis(500) {
        path = path.or_else(&find);
        let now = path.as_ref().and_then(|path| path.metadata().ok()).map_or(0, |file| file.len());
        if now > size {
            (size, last) = (now, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(size > 0, "it has run");
    last
}

/// Where the only attempt of a worker behind a coordinator prints to.
fn sent_from(pool: &Pool, worker: &str) -> impl Fn() -> Option<PathBuf> {
    let attempts = pool.path(worker).join("attempts");
    move || Some(attempts.read_dir().ok()?.next()?.ok()?.path().join("stdout"))
}

fn assert_stood_in_time(what: &str, since: Instant, last: Instant) {
    let ran = last.saturating_duration_since(since);
    // After the first third of a lease it ran on, and it had time to come to a stand.
    assert!(ran > LEASE / 3 && ran < LEASE * 5 / 6, "{what}: it ran for {ran:?}");
}

fn cut_at_a_call(method: &'static str, lost: Lost) {
    let (pool, _coordinator, cable, first) = behind_a_cable("6s");
    if method == "report" {
        // The first one says that the guest is up.
        cable.cut_at(method, lost);
    }
    let id = pool.submit(&["--checkpoint-interval", "never"], ENDLESS);
    if method != "report" {
        eventually("it has begun", || pool.logs(id).lines().count() > 10);
        cable.cut_at(method, lost);
    }
    let since = cable.sprung();
    let last = last_sign(since, sent_from(&pool, "first"));
    assert_stood_in_time(&format!("{method}, {lost:?} lost: {}", first.said()), since, last);
    pool.wait_for_event(id, "worker_lost");
    eventually("its holder has noticed", || first.said().contains("its lease is over"));
    assert!(pool.path("first").join("attempts").read_dir().unwrap().next().is_none());
    assert_eq!(pool.job(id)["epoch"], 1);
}

#[test]
fn a_worker_that_is_cut_off_while_it_says_that_the_guest_is_up_pauses_in_time() {
    cut_at_a_call("report", Lost::Request);
}

#[test]
fn a_worker_that_is_cut_off_while_it_sends_output_pauses_in_time() {
    cut_at_a_call("write_output", Lost::Request);
}

#[test]
fn a_worker_whose_renewal_is_not_answered_pauses_in_time() {
    cut_at_a_call("renew", Lost::Answer);
}

#[test]
fn a_claim_whose_answer_is_lost_runs_nowhere_and_its_job_once() {
    let (pool, _coordinator, cable, worker) = behind_a_cable("3s");
    eventually("it is there", || worker.said().contains("takes up to"));
    cable.cut(true);
    // A claim that was on its way must not find the job.
    std::thread::sleep(Duration::from_millis(500));
    let id = pool.submit(&[], "echo attempt $HARRIER_ATTEMPT");
    cable.cut_at("claim", Lost::Answer);
    cable.cut(false);
    pool.wait_for_event(id, "worker_lost");
    cable.cut(false);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", worker.said(), pool.history(id));
    assert_eq!(pool.logs(id), "attempt 2\n", "{}", pool.history(id));
    assert_eq!(worker.said().matches("starting sh").count(), 1, "{}", worker.said());
}

#[test]
fn a_machine_whose_worker_hangs_stands_still_in_time_and_ends_by_itself() {
    let pool = Pool::new();
    let (_coordinator, url) = pool.coordinator(&["--listen", "127.0.0.1:0", "--lease", "6s"]);
    pool.use_place(&["--queue", &url]);
    let first = pool.worker("first", &["--jobs", "1"]);
    let id = pool.submit(&["--checkpoint-interval", "never"], ENDLESS);
    eventually("it has begun", || pool.logs(id).lines().count() > 10);
    let since = Instant::now();
    first.signal("STOP");
    let last = last_sign(since, sent_from(&pool, "first"));
    assert_stood_in_time("a worker that hangs", since, last);
    let folder = pool.path("first").join("attempts").read_dir().unwrap().next().unwrap().unwrap().path();
    let lease = LeaseFile::open(&folder.join("lease")).unwrap();
    eventually("its monitor has ended", || lease.lock().unwrap());
    let log = std::fs::read_to_string(folder.join("monitor.log")).unwrap();
    assert!(log.contains("the lease is over: the machine ends"), "{log}");
    pool.wait_for_event(id, "worker_lost");
    drop(lease);
    first.signal("CONT");
    eventually("its worker has noticed", || first.said().contains("its lease is over"));
}

#[test]
fn a_coordinator_that_hangs_lets_jobs_stand_still_in_time() {
    let pool = Pool::new();
    let socket = format!("unix:{}", pool.text("socket"));
    let (coordinator, url) = pool.coordinator(&["--listen", &socket, "--lease", "6s"]);
    pool.use_place(&["--queue", &url]);
    let first = pool.worker("first", &["--jobs", "1"]);
    let id = pool.submit(&["--checkpoint-interval", "never"], ENDLESS);
    eventually("it has begun", || pool.logs(id).lines().count() > 10);
    let since = Instant::now();
    coordinator.signal("STOP");
    let last = last_sign(since, sent_from(&pool, "first"));
    assert_stood_in_time("a coordinator that hangs", since, last);
    eventually("its holder has noticed", || first.said().contains("its lease is over"));
    coordinator.signal("CONT");
    pool.wait_for_event(id, "worker_lost");
}

#[test]
fn a_queue_whose_file_somebody_keeps_lets_jobs_stand_still_in_time_and_go_on_afterwards() {
    let pool = Pool::new();
    let first = pool.worker("first", &["--jobs", "1", "--lease", "6s"]);
    let id = pool.submit(&["--checkpoint-interval", "never"], ENDLESS);
    eventually("it has begun", || pool.logs(id).lines().count() > 10);
    let keeper = rusqlite::Connection::open(pool.path("queue").join("queue.db")).unwrap();
    keeper.busy_timeout(PATIENCE).unwrap();
    keeper.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = Instant::now();
    let stdout = pool.path("queue").join(format!("output/0/{id}.1.stdout"));
    let mut last = since;
    let mut size = stdout.metadata().unwrap().len();
    eventually("it stands still", || {
        let now = stdout.metadata().unwrap().len();
        if now > size {
            (size, last) = (now, Instant::now());
        }
        last.elapsed() > Duration::from_secs(1)
    });
    assert_stood_in_time("a file that somebody keeps", since, last);
    keeper.execute_batch("ROLLBACK").unwrap();
    eventually("it goes on", || stdout.metadata().unwrap().len() > size + 50);
    assert_eq!(pool.job(id)["epoch"], 1, "{}\n{}", first.said(), pool.history(id));
}

#[test]
fn a_worker_that_is_started_again_before_its_coordinator_waits_for_it_and_goes_on_with_its_job() {
    let pool = Pool::new();
    let listen = format!("unix:{}", pool.text("socket"));
    let flags = ["--listen", &listen, "--lease", "30s"];
    let (mut coordinator, url) = pool.coordinator(&flags);
    pool.use_place(&["--queue", &url]);
    let mut first = pool.worker("first", &["--jobs", "1"]);
    let id = pool.submit(&["--checkpoint-interval", "never"], &chain(60, 50_000));
    eventually("it has begun", || pool.logs(id).lines().count() > 5);
    first.kill();
    coordinator.kill();
    let again = pool.worker("first", &["--jobs", "1"]);
    eventually("it misses the coordinator", || again.said().contains("the queue does not answer"));
    let _coordinator = pool.coordinator(&flags);
    assert_eq!(pool.exit_code(id), 0, "{}", again.said());
    assert_eq!(pool.logs(id), chain_output(60), "{}", pool.history(id));
    assert_eq!(pool.job(id)["epoch"], 1, "{}\n{}", again.said(), pool.history(id));
    // One that has nothing to wait for says at once that nobody is there.
    let mut stranger = {
        pool.use_place(&["--queue", "unix:/nowhere/socket"]);
        pool.worker("second", &[])
    };
    assert_eq!(stranger.wait(), 125);
    assert!(stranger.said().contains("cannot be reached"), "{}", stranger.said());
}
