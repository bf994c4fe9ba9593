//! Jobs that follow each other in one machine.

use crate::pool::{Pool, eventually};

/// Leaves its number where the next job in the machine finds it, and prints what it finds.
const TRACE: &str = "cat /tmp/trace 2>/dev/null; echo $HARRIER_JOB_ID >> /tmp/trace";

fn machines(pool: &Pool, worker: &str) -> usize {
    pool.path(worker).join("reuse").read_dir().map_or(0, |folder| folder.count())
}

#[test]
fn jobs_that_allow_it_follow_each_other_in_one_machine_and_others_never_see_it() {
    let pool = Pool::new();
    let mut worker = pool.worker("w", &["--slots", "1"]);
    let run = |flags: &[&str], script: &str| {
        let id = pool.submit(flags, script);
        let code = pool.exit_code(id);
        (id, code)
    };
    let (first, code) = run(&["--reuse"], TRACE);
    assert_eq!((code, pool.logs(first).as_str()), (0, ""), "{}", pool.history(first));
    let (other, _) = run(&[], TRACE);
    assert_eq!(pool.logs(other), "", "it has not asked for a machine that others used");
    eventually("a machine that waits makes room", || machines(&pool, "w") == 0);
    let (again, _) = run(&["--reuse"], TRACE);
    let (next, _) = run(
        &["--reuse", "-e", "A=b c", "-w", "/usr"],
        &format!("{TRACE}; echo $A $PWD; echo no >&2; exit 7"),
    );
    assert_eq!(pool.logs(next), format!("{again}\nb c /usr\n"), "{}", pool.history(next));
    let (code, _, stderr) = pool.run(&["logs", "--stderr", &next.to_string()]);
    assert_eq!((code, stderr.as_str()), (0, "no\n"));
    assert_eq!(pool.job(next)["exit_code"], 7, "a command that fails has come to its end");
    let (missing, code) =
        (pool.good(&["submit", "--reuse", "--memory", "128M", "--cpu-model", "v1", "--", "nowhere"]), 127);
    let missing: u64 = missing.trim().parse().unwrap();
    assert_eq!(pool.exit_code(missing), code, "{}", pool.history(missing));
    let (larger, _) = run(&["--reuse", "--cpus", "2"], TRACE);
    assert_eq!(pool.logs(larger), "", "another kind of machine");
    worker.signal("TERM");
    assert_eq!(worker.wait(), 0);
    assert_eq!(machines(&pool, "w"), 0, "{}", worker.said());
    let left = pool
        .command(&["--runtime-dir", &pool.text("w/machines"), "ps", "--all", "--quiet"])
        .output()
        .unwrap();
    assert_eq!((left.status.code(), String::from_utf8(left.stdout).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn a_machine_whose_job_was_ended_serves_no_other() {
    let pool = Pool::new();
    let worker = pool.worker("w", &["--slots", "1"]);
    let endless = format!("{TRACE}; while :; do sleep 1; done");
    for how in ["cancel", "timeout", "killed"] {
        let flags: &[&str] = if how == "timeout" { &["--reuse", "--timeout", "1s"] } else { &["--reuse"] };
        let id = pool.submit(flags, &endless);
        pool.wait_for_event(id, "started");
        match how {
            "cancel" => drop(pool.good(&["cancel", &id.to_string()])),
            "killed" => {
                // The process that holds its lease.
                let folder =
                    pool.path("w").join("attempts").read_dir().unwrap().next().unwrap().unwrap().path();
                let text = folder.to_str().unwrap();
                let found = std::process::Command::new("pgrep")
                    .args(["-f", &format!("exec --attempt {text}")])
                    .output()
                    .unwrap();
                let pid = String::from_utf8(found.stdout).unwrap();
                assert!(
                    std::process::Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success()
                );
                pool.wait_for_event(id, "machine_failed");
                pool.good(&["cancel", &id.to_string()]);
            }
            _ => {}
        }
        eventually("it is over", || ["cancelled", "failed"].contains(&pool.state(id).as_str()));
        let next = pool.submit(&["--reuse"], TRACE);
        assert_eq!(pool.exit_code(next), 0, "{}", worker.said());
        assert_eq!(pool.logs(next), "", "{how}: {}", pool.history(next));
        // Nobody may find what this one has left.
        pool.submit(&[], "true");
        eventually("it makes room", || machines(&pool, "w") == 0);
    }
}

#[test]
fn a_worker_that_dies_leaves_no_machine_and_no_job_in_one() {
    let pool = Pool::new();
    let mut worker = pool.worker("w", &["--slots", "1", "--lease", "6s"]);
    let id = pool.submit(&["--reuse"], "while :; do echo line; usleep 20000; done");
    eventually("it has begun", || pool.logs(id).lines().count() > 10);
    worker.kill();
    let machines = pool.path("w/machines");
    let stdout = pool.path("queue").join(format!("output/0/{id}.1.stdout"));
    eventually("its job has ended", || {
        let before = stdout.metadata().unwrap().len();
        std::thread::sleep(std::time::Duration::from_millis(300));
        stdout.metadata().unwrap().len() == before
    });
    eventually("its machine has ended", || {
        let listed = pool.command(&["--runtime-dir", machines.to_str().unwrap(), "ps"]).output().unwrap();
        !String::from_utf8(listed.stdout).unwrap().contains("reuse-")
    });
    pool.wait_for_event(id, "worker_lost");
    pool.good(&["cancel", &id.to_string()]);
}

#[test]
fn a_job_that_has_to_leave_while_its_machine_starts_has_not_failed() {
    let pool = Pool::new();
    std::fs::write(pool.path("policy.toml"), "evict = 'suspended_for >= 0s'\n").unwrap();
    let worker = pool.worker("w", &["--slots", "1", "--policy", &pool.text("policy.toml")]);
    let id = pool.submit(&["--reuse"], "sleep 100");
    for round in 1..=6 {
        eventually("it is claimed", || pool.job(id)["epoch"] == round);
        pool.owner("busy", "w");
        pool.wait_for_event(id, &format!("attempt {round}     queued     evicted"));
        pool.owner("idle", "w");
    }
    assert_eq!(pool.job(id)["failures"], 0, "{}\n{}", worker.said(), pool.history(id));
    pool.good(&["cancel", &id.to_string()]);
}
