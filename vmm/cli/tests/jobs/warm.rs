//! Jobs that begin in copies of a machine that has booted already.

use crate::pool::{Pool, chain, chain_output, eventually};

fn templates(pool: &Pool) -> usize {
    let entries = std::fs::read_dir(pool.path("w").join("warm")).into_iter().flatten().flatten();
    // One in the making has a name that begins with a dot.
    let complete = entries.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    complete.filter(|entry| entry.path().join("manifest.json").exists()).count()
}

#[test]
fn jobs_of_one_kind_share_a_template_and_nothing_else() {
    let pool = Pool::new();
    let worker = pool.worker("w", &["--slots", "2", "--cpus", "2"]);
    let first = pool.submit(&[], "echo cold");
    assert_eq!(pool.exit_code(first), 0);
    eventually("a template is made", || templates(&pool) == 1);
    let script = "cat /proc/sys/kernel/random/boot_id; head -c 8 /dev/urandom | od -An -tx1; echo $HARRIER_JOB_ID; \
                  [ ! -e /tmp/mark ] || echo shared; touch /tmp/mark; exit 5";
    let ids: Vec<u64> = (0..3).map(|_| pool.submit(&[], script)).collect();
    let mut random = std::collections::BTreeSet::new();
    for id in &ids {
        assert_eq!(pool.exit_code(*id), 5, "{}", pool.history(*id));
        let log = pool.logs(*id);
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!((lines.len(), lines[2]), (3, id.to_string().as_str()), "{log}");
        assert!(random.insert(lines[1].to_owned()), "the same randomness twice: {log}");
    }
    eventually("it says so", || worker.said().matches("from a template").count() == 3);
    // Another size is another kind; and what began in a copy can be written down and moved.
    let large = pool.good(&["submit", "--memory", "160M", "--cpu-model", "v1", "--", "true"]);
    assert_eq!(pool.exit_code(large.trim().parse().unwrap()), 0);
    eventually("a second template is made", || templates(&pool) == 2);
    let moved = pool.submit(&[], &chain(60, 50_000));
    eventually("it has begun", || pool.logs(moved).lines().count() > 25);
    pool.good(&["vacate", &moved.to_string()]);
    assert_eq!(pool.exit_code(moved), 0, "{}", pool.history(moved));
    assert_eq!(pool.logs(moved), chain_output(60), "{}", pool.history(moved));
    assert!(pool.history(moved).contains("from checkpoint 1 of attempt 1"), "{}", pool.history(moved));
    drop(worker);
}

#[test]
fn a_template_that_is_damaged_costs_one_try() {
    let pool = Pool::new();
    let worker = pool.worker("w", &["--slots", "1"]);
    let first = pool.submit(&[], "echo cold");
    assert_eq!(pool.exit_code(first), 0);
    eventually("a template is made", || templates(&pool) == 1);
    // The worker knows of it a moment later.
    eventually("a job begins in it", || {
        assert_eq!(pool.exit_code(pool.submit(&[], "echo warm")), 0);
        worker.said().contains("from a template")
    });
    let folder = std::fs::read_dir(pool.path("w").join("warm")).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(folder.join("state")).unwrap();
    let second = pool.submit(&[], "echo again");
    assert_eq!(pool.exit_code(second), 0, "{}", pool.history(second));
    assert_eq!(pool.logs(second), "again\n");
    assert!(pool.history(second).contains("machine_failed"), "{}", pool.history(second));
    assert_eq!(templates(&pool), 0);
}

#[test]
fn a_worker_may_boot_every_machine() {
    let pool = Pool::new();
    // A worker that drains ends when nothing waits.
    let ids: Vec<u64> = (0..2).map(|_| pool.submit(&[], "echo hello")).collect();
    let mut worker = pool.worker("w", &["--warm", "0", "--drain", "--slots", "1"]);
    ids.iter().for_each(|id| assert_eq!(pool.exit_code(*id), 0));
    worker.wait();
    assert!(templates(&pool) == 0 && !worker.said().contains("template"), "{}", worker.said());
}
