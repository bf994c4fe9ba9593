//! Hosts whose owners come back.

use std::process::Command;

use crate::pool::{Pool, chain, chain_output, eventually, texts};

#[test]
fn the_script_in_resources_moves_a_job_from_one_worker_to_the_other() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../resources/two-workers.sh");
    let mut command = Command::new(script);
    command.env("HARRIER", env!("CARGO_BIN_EXE_harrier"));
    let (code, said, err) = texts(command.output().unwrap());
    assert_eq!(code, 0, "{said}{err}");
    assert!(said.ends_with("has moved, and its log of 200 lines is whole\n"), "{said}{err}");
    assert!(said.contains("evicted"), "{said}");
    for part in [
        "the owner wants the host: busy",
        "stands still",
        "checkpoint 1 written",
        "goes on from checkpoint 1",
    ] {
        assert!(err.contains(part), "{part}: {err}");
    }
}

#[test]
fn a_job_stands_still_while_its_owner_is_there_and_kill_takes_what_cannot_be_saved_in_time() {
    let pool = Pool::new();
    let policy = pool.text("policy.toml");
    // Once it is to leave, it has no time at all.
    std::fs::write(&policy, "evict = 'suspended_for > 4s'\nkill = 'evicting_for >= 0s'\n").unwrap();
    let id = pool.submit(&[], &chain(100, 50_000));
    let worker = pool.worker("w", &["--policy", &policy]);
    let steps = || pool.logs(id).lines().count();
    eventually("it has begun", || steps() > 10);
    pool.owner("busy", "w");
    eventually("it stands still", || pool.state(id) == "paused");
    let before = steps();
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert_eq!(steps(), before);
    pool.owner("idle", "w");
    eventually("it goes on", || steps() > before + 5);
    pool.owner("busy", "w");
    eventually("it is given back", || pool.state(id) == "queued");
    assert!(worker.said().contains("is ended without its state"), "{}", worker.said());
    assert!(!pool.history(id).contains("checkpoint"), "{}", pool.history(id));
    assert!(pool.good(&["why", &id.to_string()]).contains("its owner wants it"));
    pool.owner("idle", "w");
    assert_eq!(pool.exit_code(id), 0, "{}", worker.said());
    assert_eq!(pool.logs(id), chain_output(100));
    let job = pool.job(id);
    assert_eq!(
        (job["epoch"].as_u64(), job["attempts"][1]["parent"].as_u64()),
        (Some(2), None),
        "it began anew"
    );
    assert!(job["attempts"][0]["times"]["suspended_ms"].as_u64() > Some(4000), "{job}");
    assert!(job["attempts"][0]["times"]["lost_ms"].as_u64() > Some(500), "{job}");
}
