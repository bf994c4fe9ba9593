//! What a command may do in its machine: limits, user, namespaces. They need what `cargo xtask setup` makes.

use crate::support::{output, texts};

fn run(args: &[&str]) -> (i32, String, String) {
    texts(output(&[&["run", "--quiet"], args].concat()))
}

/// The answer of a run with --json.
fn json(args: &[&str]) -> serde_json::Value {
    let (_, stdout, stderr) = run(&[&["--json"], args].concat());
    serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stdout}{stderr}"))
}

#[test]
fn a_command_that_forks_without_end_is_ended_by_its_limit() {
    let script = "f() { f | f & }; f; while :; do sleep 1; done";
    let found = json(&["--process-limit", "50", "--timeout", "60s", "--", "sh", "-c", script]);
    assert_eq!((&found["signal"], &found["cause"]), (&9.into(), &"processes".into()), "{found}");
    assert_eq!(found["exit_code"], 137);
    // One that stays below it is left alone.
    let found =
        json(&["--process-limit", "50", "--", "sh", "-c", "for i in 1 2 3; do sleep 0.1 & done; wait"]);
    assert_eq!((&found["exit_code"], &found["cause"]), (&0.into(), &serde_json::Value::Null), "{found}");
}

#[test]
fn a_command_that_needs_too_much_memory_is_ended_and_says_so() {
    let eat = "exec tail /dev/zero";
    for flags in [&["--memory-limit", "12M"][..], &["--memory", "48M", "--process-limit", "100"]] {
        let found = json(&[flags, &["--", "sh", "-c", eat]].concat());
        assert_eq!((&found["signal"], &found["cause"]), (&9.into(), &"memory".into()), "{flags:?}: {found}");
    }
    // A child's end is the command's, and the machine goes on to say it.
    let found = json(&["--memory-limit", "12M", "--", "sh", "-c", "tail /dev/zero; echo not reached"]);
    assert_eq!((&found["cause"], &found["stdout"]), (&"memory".into(), &"".into()), "{found}");
    let found = json(&[
        "--memory-limit",
        "12M",
        "--",
        "sh",
        "-c",
        "head -c 5000000 /dev/zero > /tmp/x; wc -c < /tmp/x",
    ]);
    assert_eq!((&found["exit_code"], &found["stdout"]), (&0.into(), &"5000000\n".into()), "{found}");
}

#[test]
fn disk_and_processor_are_limited() {
    let script = "for f in /x /tmp/x /dev/shm/x; do head -c 5000000 /dev/zero > $f 2>/dev/null; wc -c < $f; done; \
                  cat /sys/fs/cgroup/command-1/cpu.max";
    let (code, stdout, stderr) = run(&["--disk-limit", "4M", "--cpu-limit", "150", "--", "sh", "-c", script]);
    assert_eq!(code, 0, "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    // The initramfs is in the root, too.
    let root: u64 = lines[0].parse().unwrap();
    assert!(root < 4 << 20, "{stdout}");
    assert_eq!(lines[1..], ["4194304", "4194304", "150000 100000"]);
    // How fast the loop goes depends on the engine: it ends when it was seen to be held back.
    let burn = "stat=/sys/fs/cgroup/command-1/cpu.stat; i=0; while [ $i -lt 1000000 ]; do i=$((i+1)); \
                [ $((i % 500)) = 0 ] && ! grep -q '^nr_throttled 0$' $stat && break; done; cat $stat";
    let (code, stdout, stderr) = run(&["--cpu-limit", "20", "--", "sh", "-c", burn]);
    assert_eq!(code, 0, "{stderr}");
    let throttled = stdout.lines().find_map(|line| line.strip_prefix("nr_throttled ")).unwrap();
    assert_ne!(throttled, "0", "{stdout}");
}

#[test]
fn a_command_has_its_own_user() {
    let script =
        "id; echo $HOME; touch /tmp/mine && ls -ln /tmp/mine; touch /etc/x 2>&1; cat /in; ls -ln /in";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("in");
    std::fs::write(&file, "given\n").unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let input = file.to_str().unwrap();
    let (code, stdout, stderr) = run(&["--user", "1234:99", "--input", input, "--", "sh", "-c", script]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.starts_with("uid=1234 gid=99"), "{stdout}");
    assert!(stdout.contains("/etc/x: Permission denied"), "{stdout}");
    // Its input files are its own.
    assert!(stdout.contains("given\n") && stdout.matches(" 1234 ").count() >= 2, "{stdout}");
    let (code, stdout, _) = run(&["--user", "nobody", "--", "id", "-u"]);
    assert_eq!((code, stdout.as_str()), (0, "65534\n"));
    let (code, _, stderr) = run(&["--user", "no-such-user", "--", "id"]);
    assert_eq!(code, 125);
    assert!(stderr.contains("the user \"no-such-user\" is not in the guest's /etc/passwd"), "{stderr}");
}

#[test]
fn an_isolated_command_sees_its_own_processes_only_and_ends_like_any_other() {
    let script = "ls -d /proc/[0-9]* | wc -l; hostname inside; mount -t tmpfs x /mnt 2>/dev/null; \
                  ls /sys/fs/cgroup/command-1 2>&1 | head -n 1; sh -c 'kill -9 $$'; echo $?; exit 7";
    let (code, stdout, stderr) = run(&["--isolate", "--", "sh", "-c", script]);
    assert_eq!(code, 7, "{stdout}{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    let processes: u32 = lines[0].trim().parse().unwrap();
    assert!(processes <= 5, "{stdout}");
    assert!(lines[1].contains("No such file") && lines[2] == "137", "{stdout}");
    let (code, _, _) = run(&["--isolate", "--", "sh", "-c", "kill -15 $$"]);
    assert_eq!(code, 128 + 15);
    assert_eq!(run(&["--isolate", "--", "no-such-program"]).0, 127);
    let (code, stdout, _) = run(&["--isolate", "--", "cat", "/proc/sys/kernel/hostname"]);
    assert_eq!((code, stdout.as_str()), (0, "harrier\n"));
    // Left-over processes go with it, and output is whole.
    let (code, stdout, _) =
        run(&["--isolate", "--user", "nobody", "--", "sh", "-c", "sleep 1000 & seq 20000"]);
    assert_eq!((code, stdout.lines().count()), (0, 20000));
}

#[test]
fn limits_that_are_none_are_refused() {
    for (flags, text) in [
        (["--cpu-limit", "0"], "--cpu-limit '0'"),
        (["--process-limit", "many"], "--process-limit 'many'"),
        (["--memory-limit", "x"], "--memory-limit"),
        (["--disk-limit", ""], "--disk-limit"),
        (["--user", ":"], "--user ':'"),
    ] {
        let (code, _, stderr) = run(&[&flags[..], &["--", "true"]].concat());
        assert_eq!((code, stderr.lines().count()), (125, 1), "{stderr}");
        assert!(stderr.contains(text), "{stderr}");
    }
}
