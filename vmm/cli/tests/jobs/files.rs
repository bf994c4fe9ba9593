//! Files that jobs are given and leave, what their commands may do, and commands that save their state themselves.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::pool::{Pool, eventually};

/// Each test on each engine that can run here.
macro_rules! on_engines {
    ($($name:ident,)*) => {
        mod soft {
            $(#[test] fn $name() { super::$name("soft"); })*
        }
        mod kvm {
            $(
                #[test]
                fn $name() {
                    match std::path::Path::new("/dev/kvm").exists() {
                        true => super::$name("kvm"),
                        false => eprintln!("skipped: nothing runs on KVM, there is no /dev/kvm"),
                    }
                }
            )*
        }
    };
}

on_engines! {
    files_go_with_a_job_and_come_back,
    files_go_through_a_coordinator,
    a_job_that_does_not_leave_what_it_was_to_leave_has_not_succeeded,
    limits_end_a_job_with_their_reason_and_its_machine_lives_to_say_so,
    a_command_that_saves_its_state_is_started_again_with_it,
    a_job_that_ends_its_machine_has_ended_with_that_code,
    a_directory_stands_for_the_files_in_it,
    a_job_says_how_far_it_has_come_from_inside,
}

/// Submits and answers the job's number.
fn submit(pool: &Pool, engine: &str, flags: &[&str], script: &str) -> u64 {
    let words = [&["submit"], flags, &["--engine", engine, "--", "sh", "-c", script]].concat();
    pool.good(&words).trim().parse().unwrap()
}

fn drain(pool: &Pool) {
    let mut worker = pool.worker("w", &["--drain"]);
    assert_eq!(worker.wait(), 0, "{}", worker.said());
}

fn goes_through(pool: &Pool, engine: &str) {
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (input, program) = (pool.text("in put"), pool.text("program"));
    fs::write(&input, &data).unwrap();
    fs::write(&program, "#!/bin/sh\ncat '/data/in put' '/data/in put' > twice; pwd > /where; env\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let as_program = format!("{program}:/bin/program");
    let flags = [
        "--workdir",
        "/tmp",
        "--input",
        &format!("{input}:/data/"),
        "--input",
        &as_program,
        "--output",
        "twice:results/double",
        "--output",
        "/where",
    ];
    let id = submit(pool, engine, &flags, "program");
    // What was submitted counts.
    fs::write(&input, "changed").unwrap();
    fs::remove_file(&program).unwrap();
    let status = pool.good(&["status", &id.to_string()]);
    let said = format!("inputs:       {input}, {program}\noutputs:      /tmp/twice, /where\n");
    assert!(status.contains(&said), "{status}");
    let (code, _, err) = pool.run(&["fetch", &id.to_string()]);
    assert!(code == 125 && err.contains("its files are there when it has ended"), "{err}");
    drain(pool);
    assert_eq!(pool.exit_code(id), 0, "{}", pool.good(&["status", &id.to_string()]));
    let to = pool.text("fetched");
    let said = pool.good(&["fetch", "--to", &to, &id.to_string()]);
    assert_eq!(said, format!("{to}/results/double\n{to}/where\n"));
    assert!(fs::read(pool.path("fetched/results/double")).unwrap() == [data.clone(), data].concat());
    assert_eq!(fs::read_to_string(pool.path("fetched/where")).unwrap(), "/tmp\n");
    let names: Vec<_> =
        fs::read_dir(pool.path("fetched")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let env = pool.good(&["logs", "--stdout", &id.to_string()]);
    for variable in [format!("HARRIER_JOB_ID={id}\n"), "HARRIER_ATTEMPT=1\n".into()] {
        assert!(env.contains(&variable), "{env}");
    }
    assert!(env.contains(&format!("HARRIER_IDEMPOTENCY_KEY={id}-")), "{env}");
}

fn files_go_with_a_job_and_come_back(engine: &str) {
    goes_through(&Pool::new(), engine);
}

fn files_go_through_a_coordinator(engine: &str) {
    let pool = Pool::new();
    let socket = format!("unix:{}", pool.text("socket"));
    let (_coordinator, address) = pool.coordinator(&["--listen", &socket]);
    pool.use_place(&["--queue", &address]);
    goes_through(&pool, engine);
}

fn a_job_that_does_not_leave_what_it_was_to_leave_has_not_succeeded(engine: &str) {
    let pool = Pool::new();
    let missing = submit(&pool, engine, &["--output", "/there", "--output", "/missing"], "echo x > /there");
    let failed =
        submit(&pool, engine, &["--output", "/there", "--output", "/missing"], "echo x > /there; exit 4");
    drain(&pool);
    let job = pool.job(missing);
    assert_eq!((&job["state"], &job["reason"]), (&"failed".into(), &"missing_output".into()), "{job}");
    assert_eq!(job["detail"], "it ended without having written /missing");
    assert_eq!(pool.job(failed)["reason"], "exited");
    // What is there can be looked at all the same.
    for id in [missing, failed] {
        let listed = pool.good(&["fetch", "--list", "--to", "x", &id.to_string()]);
        assert_eq!(listed, "x/there\n");
    }
    let (code, _, err) = pool.run(&["submit", "--input", &pool.text("none"), "--", "true"]);
    assert!(code == 125 && err.contains("none' cannot be read"), "{err}");
    assert_eq!(pool.json(&["queue", "--all"]).as_array().unwrap().len(), 2, "nothing was submitted");
}

fn limits_end_a_job_with_their_reason_and_its_machine_lives_to_say_so(engine: &str) {
    let pool = Pool::new();
    let bomb =
        submit(&pool, engine, &["--process-limit", "64"], "f() { f | f & }; f; while :; do sleep 1; done");
    let memory = submit(&pool, engine, &["--memory-limit", "12M"], "tail /dev/zero");
    let user = submit(&pool, engine, &["--user", "nobody", "--isolate"], "id -u; ls -d /proc/[0-9]* | wc -l");
    drain(&pool);
    for (id, reason) in [(bomb, "process_limit"), (memory, "out_of_memory")] {
        let job = pool.job(id);
        assert_eq!((&job["state"], &job["reason"]), (&"failed".into(), &reason.into()), "{job}");
        assert_eq!(job["exit_code"], 137, "{job}");
    }
    let said = pool.good(&["logs", "--stdout", &user.to_string()]);
    assert!(said.starts_with("65534\n") && said.lines().nth(1).unwrap().trim().len() == 1, "{said}");
}

fn a_command_that_saves_its_state_is_started_again_with_it(engine: &str) {
    let pool = Pool::new();
    let state = pool.text("state");
    fs::write(&state, "0\n").unwrap();
    let script = "n=$(cat /data/state); n=$((n + 1)); echo $n > /data/state; echo attempt $HARRIER_ATTEMPT made $n; \
                  [ $n -lt 3 ] && exit 85; exit 0";
    let input = format!("{state}:/data/state");
    let id =
        submit(&pool, engine, &["--input", &input, "--output", "/data/state", "--checkpoint-exit"], script);
    // An exit code that stands for nothing here is a failure.
    let other = submit(&pool, engine, &[], "exit 85");
    drain(&pool);
    assert_eq!(pool.exit_code(id), 0);
    let log = "attempt 1 made 1\nattempt 2 made 2\nattempt 3 made 3\n";
    assert_eq!(pool.good(&["logs", "--stdout", &id.to_string()]), log);
    let to = pool.text("to");
    fs::create_dir(&to).unwrap();
    pool.good(&["fetch", "--to", &to, &id.to_string()]);
    assert_eq!(fs::read_to_string(pool.path("to/state")).unwrap(), "3\n");
    let job = pool.job(id);
    assert_eq!((&job["failures"], &job["retries_used"]), (&0.into(), &0.into()), "{job}");
    let reasons: Vec<_> = job["attempts"].as_array().unwrap().iter().map(|it| it["reason"].clone()).collect();
    assert_eq!(reasons, ["self_checkpointed", "self_checkpointed", "exited"]);
    let kept = |index: usize| job["attempts"][index]["times"]["lost_ms"].as_u64().unwrap();
    assert_eq!((kept(0), kept(1)), (0, 0), "what was saved is not lost");
    assert_eq!((&pool.job(other)["state"], pool.exit_code(other)), (&"failed".into(), 85));
    // From its beginning is from its beginning.
    pool.good(&["requeue", &id.to_string()]);
    eventually("it is queued", || pool.job(id)["state"] == "queued");
    drain(&pool);
    assert_eq!(
        pool.good(&["logs", "--stdout", &id.to_string()]),
        "attempt 4 made 1\nattempt 5 made 2\nattempt 6 made 3\n"
    );
}

fn a_job_that_ends_its_machine_has_ended_with_that_code(engine: &str) {
    let pool = Pool::new();
    let plain = submit(&pool, engine, &[], "seq 20000; harrier-guest exit 7");
    let lacking = submit(&pool, engine, &["--output", "/tmp/x"], "echo x > /tmp/x; harrier-guest exit 0");
    drain(&pool);
    assert_eq!(pool.exit_code(plain), 7, "{}", pool.history(plain));
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert!(pool.logs(plain) == numbers, "its output is whole");
    let job = pool.job(lacking);
    assert_eq!((&job["state"], &job["reason"]), (&"failed".into(), &"missing_output".into()), "{job}");
}

fn a_directory_stands_for_the_files_in_it(engine: &str) {
    let pool = Pool::new();
    let tree = pool.path("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("top"), "one").unwrap();
    fs::write(tree.join("deep/er/leaf"), "two").unwrap();
    let text = pool.text("tree");
    let script = "cat /data/top /data/deep/er/leaf tree/top";
    let id = submit(
        &pool,
        engine,
        &["--workdir", "/tmp", "--input", &format!("{text}:/data"), "--input", &text],
        script,
    );
    // What was submitted counts.
    fs::remove_dir_all(tree.join("deep")).unwrap();
    drain(&pool);
    assert_eq!((pool.exit_code(id), pool.logs(id).as_str()), (0, "onetwoone"), "{}", pool.history(id));
    std::os::unix::fs::symlink("top", tree.join("link")).unwrap();
    let refused = |what: &str| {
        let (code, _, stderr) = pool.run(&["submit", "--input", &text, "--", "true"]);
        assert!(code == 125 && stderr.contains(what) && stderr.lines().count() == 1, "{stderr}");
    };
    refused("neither a file nor a directory");
    fs::remove_file(tree.join("link")).unwrap();
    fs::remove_file(tree.join("top")).unwrap();
    refused("a directory without files");
    for number in 0..1001 {
        fs::write(tree.join(number.to_string()), "").unwrap();
    }
    refused("1001 are too many: 1000 at most");
}

fn a_job_says_how_far_it_has_come_from_inside(engine: &str) {
    let pool = Pool::new();
    let _worker = pool.worker("w", &[]);
    let id = submit(&pool, engine, &[], "harrier-guest progress 'step 3 of 10' && sleep 100");
    eventually("status shows it", || pool.job(id)["progress"] == "step 3 of 10");
    pool.good(&["cancel", &id.to_string()]);
}
