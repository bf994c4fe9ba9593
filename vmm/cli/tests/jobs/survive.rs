//! What jobs survive: processes that die at any moment, hosts that stand still, disks that are full.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::pool::{Pool, Process, chain, chain_output, eventually, texts};

/// The monitors of a pool's jobs: processes that were started with an attempt's folder below the pool's.
fn monitors(pool: &Pool) -> Vec<u32> {
    let root = pool.text("");
    let is_ours = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.contains(&&b"--attempt"[..]) && words.iter().any(|word| word.starts_with(root.as_bytes()))
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
}

fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).output();
}

/// The job has succeeded once, its output is whole, and nothing of it is left.
fn is_done_once(pool: &Pool, id: u64, output: &str, context: &str) {
    assert_eq!(pool.exit_code(id), 0, "{context}: {}", pool.history(id));
    assert!(pool.logs(id) == output, "{context}: {}\n{}", pool.history(id), pool.logs(id));
    assert_eq!(pool.history(id).matches("succeeded").count(), 1, "{context}: {}", pool.history(id));
    let checkpoints = pool.path("queue").join("checkpoints").join(id.to_string());
    eventually("its checkpoints go", || !checkpoints.exists());
}

#[test]
fn a_worker_may_die_at_every_point_of_its_way() {
    let points: Vec<&str> = harrier_jobs::worker::POINTS.to_vec();
    let next = std::sync::Mutex::new(points.iter());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let Some(point) = next.lock().unwrap().next() else { break };
                    die_at(point);
                }
            });
        }
    });
}

fn die_at(point: &str) {
    let pool = Pool::new();
    let id = pool.submit(&[], &chain(60, 50_000));
    let flags = ["--lease", "3s"];
    let mut worker = pool.worker("w", &[&flags[..], &["--die-at", point]].concat());
    let begun = || pool.logs(id).lines().count() > 30;
    match point {
        "paused" | "pause told" => {
            eventually("it has begun", begun);
            pool.owner("busy", "w");
        }
        "checkpoint written" | "checkpoint told" => {
            eventually("it has begun", begun);
            pool.good(&["checkpoint", &id.to_string()]);
        }
        "stop told" => {
            eventually("it has begun", begun);
            pool.good(&["vacate", &id.to_string()]);
        }
        _ => {}
    }
    assert_eq!(worker.wait(), -1, "{point}: {}", worker.said());
    pool.owner("idle", "w");
    let mut again = pool.worker("w", &flags);
    is_done_once(&pool, id, &chain_output(60), point);
    again.signal("TERM");
    assert_eq!(again.wait(), 0, "{point}: {}", again.said());
    let left: Vec<_> = std::fs::read_dir(pool.path("w").join("attempts")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{point}: {left:?}");
    eventually("no monitor is left", || monitors(&pool).is_empty());
}

#[test]
fn a_machine_may_be_killed_while_it_starts_runs_stands_still_or_is_written_down() {
    let pool = Pool::new();
    let _worker = pool.worker("w", &["--slots", "4", "--cpus", "4"]);
    let kill_all = || monitors(&pool).into_iter().for_each(|pid| signal(pid, "KILL"));
    let id = pool.submit(&[], &chain(60, 50_000));
    eventually("it starts", || !monitors(&pool).is_empty());
    kill_all();
    pool.wait_for_event(id, "machine_failed");
    eventually("it runs", || pool.logs(id).lines().count() > 10);
    pool.good(&["checkpoint", &id.to_string()]);
    pool.wait_for_event(id, "checkpoint 1 written");
    kill_all();
    eventually("it runs again", || pool.history(id).contains("from checkpoint 1 of attempt 2"));
    pool.good(&["suspend", &id.to_string()]);
    eventually("it stands still", || pool.state(id) == "paused");
    kill_all();
    // Whoever has suspended it does not want it to run elsewhere.
    eventually("it is held", || pool.state(id) == "held");
    pool.good(&["release", &id.to_string()]);
    eventually("it runs again", || pool.history(id).matches("from checkpoint 1 of attempt 2").count() == 2);
    pool.good(&["checkpoint", &id.to_string()]);
    eventually("a checkpoint is being written", || {
        pool.job(id)["activity"] == "checkpointing"
            || pool.history(id).contains("attempt 4  running    started  c")
    });
    kill_all();
    is_done_once(&pool, id, &chain_output(60), "machines were killed");
    assert!(pool.job(id)["epoch"].as_u64() >= Some(4), "{}", pool.history(id));
}

#[test]
fn a_host_that_stood_still_past_its_lease_is_fenced() {
    let pool = Pool::new();
    let flags = ["--lease", "3s"];
    let id = pool.submit(&[], &chain(80, 50_000));
    let worker = pool.worker("first", &[&flags[..], &["--jobs", "1"]].concat());
    eventually("it has begun", || pool.logs(id).lines().count() > 10);
    let stopped = monitors(&pool);
    assert_eq!(stopped.len(), 1);
    worker.signal("STOP");
    signal(stopped[0], "STOP");
    // Nobody asks for that: whoever looks at the queue sees it.
    pool.wait_for_event(id, "worker_lost");
    let _second = pool.worker("second", &flags);
    eventually("it runs there", || pool.job(id)["host"] == "second" && pool.logs(id).lines().count() > 10);
    worker.signal("CONT");
    signal(stopped[0], "CONT");
    eventually("the old machine ends itself", || !monitors(&pool).contains(&stopped[0]));
    is_done_once(&pool, id, &chain_output(80), "one host stood still");
    let job = pool.job(id);
    assert_eq!(
        (job["epoch"].as_u64(), job["attempts"][0]["reason"].as_str()),
        (Some(2), Some("worker_lost"))
    );
}

#[test]
fn jobs_may_be_cancelled_in_every_state() {
    let pool = Pool::new();
    let forever = || pool.submit(&[], "while :; do usleep 50000; done");
    let cancel = |id: u64| {
        pool.good(&["cancel", &id.to_string()]);
        pool.good(&["cancel", &id.to_string()]);
        eventually(&format!("job {id} is cancelled"), || pool.state(id) == "cancelled");
    };
    let queued = forever();
    let held = pool.submit(&["--hold"], "true");
    cancel(queued);
    cancel(held);
    let _worker = pool.worker("w", &["--slots", "1"]);
    for state in ["starting", "running", "paused", "checkpointing", "stopping"] {
        let id = forever();
        match state {
            "starting" => eventually("it starts", || pool.state(id) != "queued"),
            _ => eventually("it runs", || pool.state(id) == "running"),
        }
        match state {
            "paused" => {
                pool.good(&["suspend", &id.to_string()]);
                eventually("it stands still", || pool.state(id) == "paused");
            }
            "checkpointing" => {
                pool.good(&["checkpoint", &id.to_string()]);
            }
            "stopping" => {
                std::thread::sleep(Duration::from_millis(1500));
                pool.good(&["vacate", &id.to_string()]);
            }
            _ => {}
        }
        cancel(id);
    }
    assert_eq!(pool.good(&["queue", "--json"]).trim(), "[]");
    eventually("no monitor is left", || monitors(&pool).is_empty());
}

#[test]
fn jobs_that_end_while_they_are_suspended_end_once() {
    let pool = Pool::new();
    let _worker = pool.worker("w", &["--slots", "2", "--cpus", "2"]);
    for round in 0..6u32 {
        let id = pool.submit(&[], &format!("usleep {}; echo over", 40_000 * round));
        eventually("it runs", || pool.state(id) != "queued" && pool.state(id) != "starting");
        let (_, _, refused) = pool.run(&["suspend", &id.to_string()]);
        assert!(refused.is_empty() || refused.contains("has succeeded"), "{refused}");
        std::thread::sleep(Duration::from_millis(100));
        pool.good(&["resume", &id.to_string()]);
        is_done_once(&pool, id, "over\n", "suspended at its end");
        assert_eq!(pool.job(id)["epoch"], 1);
    }
}

#[test]
fn ten_thousand_queued_jobs_are_no_burden() {
    let pool = Pool::new();
    let begin = Instant::now();
    let jobs = pool.good(&["submit", "--array", "1-10000", "--memory", "128M", "--", "echo", "hello"]);
    assert_eq!(jobs.trim(), "1-10000");
    let last = pool.submit(&["--priority", "5"], "echo first");
    assert_eq!(pool.good(&["queue"]).lines().count(), 10_002);
    let mut worker = pool.worker("w", &["--jobs", "2"]);
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    assert_eq!(pool.logs(last), "first\n");
    assert_eq!(pool.logs(1), "hello\n");
    pool.good(&["cancel", "2-10000"]);
    assert_eq!(pool.good(&["queue"]).lines().count(), 1, "only the headings");
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
}

#[test]
fn a_job_that_forks_without_end_is_ended_and_hurts_nobody() {
    let pool = Pool::new();
    let bomb = pool.submit(&["--process-limit", "100"], "f() { f | f & }; f; while :; do sleep 1; done");
    let good = pool.submit(&[], &chain(20, 50_000));
    let mut worker = pool.worker("w", &["--slots", "2", "--cpus", "2", "--drain"]);
    is_done_once(&pool, good, &chain_output(20), "beside a fork bomb");
    assert_eq!(pool.exit_code(bomb), 137, "{}", pool.history(bomb));
    assert_eq!(pool.job(bomb)["reason"], "process_limit");
    assert_eq!(worker.wait(), 0, "{}", worker.said());
}

fn prints(pieces: usize) {
    // No power of two: a piece that is lost, doubled or elsewhere shows.
    const LINE: &str = "0123456789abcdefghijklmnopqrstuvwxyz";
    let pool = Pool::new();
    let script = format!("yes {LINE} | dd bs=64k count={pieces} iflag=fullblock 2>/dev/null; echo end >&2");
    let id = pool.submit(&[], &script);
    let mut worker = pool.worker("w", &["--drain"]);
    assert_eq!(pool.exit_code(id), 0, "{}", pool.history(id));
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    let logs = pool.on_queue(&["logs", "--stdout", &id.to_string()]).output().unwrap().stdout;
    assert_eq!(logs.len(), pieces << 16);
    let line = format!("{LINE}\n");
    assert!(logs.chunks(line.len()).all(|chunk| line.as_bytes().starts_with(chunk)));
    assert_eq!(pool.run(&["logs", "--stderr", &id.to_string()]).2, "end\n");
}

#[test]
fn a_job_may_print_a_lot() {
    prints(1 << 10);
}

#[test]
#[ignore = "takes a minute; cargo nextest run --run-ignored all"]
fn a_job_may_print_a_gibibyte() {
    prints(1 << 14);
}

#[test]
fn a_full_disk_loses_nothing_that_was_promised() {
    // A file system of its own, in a mount namespace of its own.
    let script = r#"
        set -e
        mount -t tmpfs -o size=6m tmpfs "$DIR"
        export HARRIER_QUEUE="$DIR/queue"
        h() { "$HARRIER" "$@"; }
        first=$(h submit --memory 128M -- sh -c 'echo first')
        # It is filled up to the last byte.
        dd if=/dev/zero of="$DIR/filler" bs=1k 2>/dev/null || true
        if h submit --array 1-20000 -- true 2>"$STATE/err"; then echo 'that fits'; exit 1; fi
        grep -q 'no space left' "$STATE/err" || { cat "$STATE/err"; exit 1; }
        [ "$(wc -l < "$STATE/err")" = 1 ]
        # Looking needs room too, unless somebody has the queue open.
        h queue 2>"$STATE/err" || grep -q 'no space left' "$STATE/err" || { cat "$STATE/err"; exit 1; }
        rm "$DIR/filler"
        second=$(h submit --memory 128M -- sh -c 'echo second')
        [ "$second" = $((first+1)) ]
        h worker --drain --quiet --state "$STATE/w"
        h logs "$first"; h logs "$second"
    "#;
    let folder = tempfile::tempdir().unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount"]);
    if !unshare.arg("true").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no user namespaces here");
        return;
    }
    let dir = folder.path().join("disk");
    let state = folder.path().join("state");
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(&state).unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    unshare.env("DIR", &dir).env("STATE", &state).env("HARRIER", env!("CARGO_BIN_EXE_harrier"));
    let (code, said, err) = texts(unshare.output().unwrap());
    assert_eq!(code, 0, "{said}{err}");
    assert!(said.ends_with("first\nsecond\n"), "{said}{err}");
}

#[test]
fn a_coordinator_that_is_killed_again_and_again_costs_no_job() {
    let pool = Pool::new();
    let socket = format!("unix:{}", pool.text("socket"));
    let (mut coordinator, _) = pool.coordinator(&["--listen", &socket, "--lease", "10s"]);
    pool.use_place(&["--queue", &socket]);
    let ids: Vec<u64> = (0..6).map(|_| pool.submit(&[], &chain(20, 50_000))).collect();
    let _worker: Process = pool.worker("w", &["--slots", "3", "--cpus", "3"]);
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(700));
        coordinator.kill();
        (coordinator, _) = pool.coordinator(&["--listen", &socket, "--lease", "10s"]);
    }
    for id in ids {
        is_done_once(&pool, id, &chain_output(20), "the coordinator was killed");
    }
    drop(coordinator);
}
