//! Jobs that are taken from their hosts and go on where they were.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::pool::{Pool, chain, chain_output, eventually};

fn steps(pool: &Pool, id: u64) -> usize {
    pool.logs(id).lines().count()
}

/// The checkpoints of a job that lie in the queue's folder.
fn checkpoints(pool: &Pool, id: u64) -> Vec<PathBuf> {
    let folder = pool.path("queue").join("checkpoints").join(id.to_string());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.join("manifest.json").exists()).collect();
    found.sort();
    found
}

fn damage(checkpoint: &Path) {
    let memory = checkpoint.join("memory");
    std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&memory).unwrap();
    let mut byte = [0];
    let at = 16 << 20;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_job_that_is_vacated_goes_on_where_it_was_and_leaves_nothing_behind() {
    let pool = Pool::new();
    let id = pool.submit(&[], &chain(60, 50_000));
    let mut first = pool.worker("first", &["--jobs", "1"]);
    eventually("it has begun", || steps(&pool, id) > 25);
    pool.good(&["vacate", &id.to_string()]);
    assert_eq!(first.wait(), 0, "{}", first.said());
    assert_eq!(pool.state(id), "queued", "{}", pool.history(id));
    assert_eq!(checkpoints(&pool, id).len(), 1);
    let before = steps(&pool, id);
    assert!((25..60).contains(&before), "it was taken in the middle: {before}");
    let mut second = pool.worker("second", &["--drain"]);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", second.said(), pool.history(id));
    assert_eq!(pool.logs(id), chain_output(60), "{}", pool.history(id));
    assert_eq!(pool.run(&["logs", "--stderr", &id.to_string()]).2, "done\n");
    assert_eq!(second.wait(), 0, "{}", second.said());
    let job = pool.job(id);
    assert_eq!(job["epoch"], 2);
    assert_eq!(job["attempts"][1]["parent"], 1, "{job}");
    assert!(pool.history(id).contains("from checkpoint 1 of attempt 1"), "{}", pool.history(id));
    let kept = |index: usize| job["attempts"][index]["times"]["committed_ms"].as_u64().unwrap();
    assert!(kept(0) > 1000 && kept(1) > 500, "{job}");
    assert_eq!(checkpoints(&pool, id).len(), 0, "nobody needs them any more");
    for worker in ["first", "second"] {
        for folder in ["attempts", "machines"] {
            let left = std::fs::read_dir(pool.path(worker).join(folder)).unwrap().flatten();
            let left: Vec<_> = left.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[test]
fn who_asks_once_gets_one_checkpoint() {
    let pool = Pool::new();
    let id = pool.submit(&["--checkpoint-interval", "never"], &chain(100_000, 30_000));
    let _worker = pool.worker("w", &["--jobs", "1"]);
    for number in 1..=4 {
        let before = steps(&pool, id);
        eventually("it goes on", || steps(&pool, id) > before + 3);
        pool.good(&["checkpoint", &id.to_string()]);
        pool.wait_for_event(id, &format!("checkpoint {number} written"));
        // A second one would be begun at once.
        std::thread::sleep(std::time::Duration::from_millis(500));
        let written = pool.history(id).matches(" written").count();
        assert_eq!(written, number, "{}", pool.history(id));
    }
    pool.good(&["cancel", &id.to_string()]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before_and_then_the_job_begins_anew() {
    let pool = Pool::new();
    let id = pool.submit(&["--checkpoint-interval", "never"], &chain(400, 30_000));
    let mut worker = pool.worker("w", &["--jobs", "1"]);
    for number in 1..=3 {
        eventually("it goes on", || steps(&pool, id) > number * 6);
        pool.good(&["checkpoint", &id.to_string()]);
        pool.wait_for_event(id, &format!("checkpoint {number} written"));
    }
    assert_eq!(checkpoints(&pool, id).len(), 2, "the latest two are kept");
    // Nothing is said to the job any more: worker and machine die.
    let monitor = pool.path("w").join("attempts");
    worker.kill();
    assert_eq!(std::fs::read_dir(&monitor).unwrap().count(), 1, "the monitor lives on for now");
    let mut worker = pool.worker("w", &["--jobs", "1"]);
    eventually("it is found again", || worker.said().contains("found again"));
    pool.good(&["vacate", &id.to_string()]);
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    let kept = checkpoints(&pool, id);
    assert_eq!(kept.len(), 2, "{kept:?}");
    damage(&kept[1]);
    let mut worker = pool.worker("w", &["--jobs", "1"]);
    pool.wait_for_event(id, "restore_failed  checkpoint");
    eventually("it goes on from the one before", || pool.job(id)["state"] == "running");
    assert!(pool.history(id).contains("from checkpoint 3 of attempt 1"), "{}", pool.history(id));
    // It is lost a second time, and the last one is damaged too.
    pool.good(&["vacate", &id.to_string()]);
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    checkpoints(&pool, id).iter().for_each(|checkpoint| damage(checkpoint));
    let mut worker = pool.worker("w", &["--drain"]);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", worker.said(), pool.history(id));
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    assert_eq!(pool.logs(id), chain_output(400));
    assert_eq!(pool.job(id)["attempts"][2]["parent"], serde_json::Value::Null);
}

#[test]
fn a_job_moves_between_hosts_through_their_coordinator_with_its_stdin() {
    let pool = Pool::new();
    let socket = format!("unix:{}", pool.text("socket"));
    let (_coordinator, _) = pool.coordinator(&["--listen", &socket]);
    pool.use_place(&["--queue", &socket]);
    let lines: String = (0..2000).map(|line| format!("line {line} of the input\n")).collect();
    std::fs::write(pool.path("input"), &lines).unwrap();
    let script =
        "i=0; while read -r line; do echo \"$line\"; i=$((i+1)); [ $((i % 50)) = 0 ] && usleep 100000; done";
    let id = pool.submit(&["--stdin", &pool.text("input"), "--checkpoint-interval", "1s"], script);
    let mut first = pool.worker("first", &["--jobs", "1"]);
    pool.wait_for_event(id, "checkpoint 1 written");
    pool.good(&["vacate", &id.to_string()]);
    assert_eq!(first.wait(), 0, "{}", first.said());
    let mut second = pool.worker("second", &["--drain"]);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", second.said(), pool.history(id));
    assert_eq!(second.wait(), 0, "{}", second.said());
    assert!(pool.logs(id) == lines, "{}", pool.history(id));
    assert!(pool.history(id).contains("of attempt 1"), "{}", pool.history(id));
    assert_eq!(checkpoints(&pool, id).len(), 0);
}

#[test]
fn ten_evictions_lose_nothing_and_double_nothing() {
    let pool = Pool::new();
    let id = pool.submit(&[], &chain(150, 100_000));
    let _worker = pool.worker("w", &[]);
    let mut seen = 0;
    for eviction in 1..=10 {
        eventually("it does some work", || {
            let job = pool.job(id);
            job["state"] == "running" && job["epoch"] == eviction && steps(&pool, id) > seen + 10
        });
        seen = steps(&pool, id);
        pool.good(&["vacate", &id.to_string()]);
        eventually("it is given back", || pool.job(id)["epoch"].as_u64() > Some(eviction));
    }
    assert_eq!(pool.exit_code(id), 0, "{}", pool.history(id));
    assert_eq!(pool.logs(id), chain_output(150), "{}", pool.history(id));
    let job = pool.job(id);
    assert_eq!(job["epoch"], 11);
    let parents: Vec<_> =
        job["attempts"].as_array().unwrap().iter().map(|it| it["parent"].as_u64()).collect();
    assert_eq!(parents[..2], [None, Some(1)]);
    // Who has done too little leaves no checkpoint of its own, and the next one begins where that one began.
    let history = pool.history(id);
    let wrote = |attempt: u64| {
        let head = format!("attempt {attempt} ");
        history.lines().any(|line| line.contains(&head) && line.contains("checkpoint 1 written"))
    };
    let expected = (1..=11).scan(None, |last, attempt| {
        let parent = *last;
        if wrote(attempt) {
            *last = Some(attempt);
        }
        Some(parent)
    });
    assert_eq!(parents, expected.collect::<Vec<_>>(), "{history}");
    assert!(parents.iter().collect::<std::collections::BTreeSet<_>>().len() >= 4, "{history}");
}
