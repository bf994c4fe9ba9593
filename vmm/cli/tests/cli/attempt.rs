//! `harrier run --attempt`, as workers start it: what the guest says of itself, and a guest that says nothing any more.

use std::path::Path;
use std::time::{Duration, Instant};

use harrier_jobs::worker::RunResult;
use harrier_jobs::worker::lease_file::{Deadlines, LeaseFile, now_ns};

use crate::support::{harrier, wait};

/// The folder of an attempt whose lease lasts for a while.
fn attempt() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let deadlines = Deadlines::of(now_ns(), Duration::from_secs(300));
    LeaseFile::create(&folder.path().join("lease"), deadlines).unwrap();
    folder
}

fn start(folder: &Path, flags: &[&str], script: &str) -> std::process::Child {
    let place = folder.to_str().unwrap();
    let runtime = folder.join("machines");
    let head =
        ["--runtime-dir", runtime.to_str().unwrap(), "run", "--quiet", "--name", "m", "--attempt", place];
    let words = [&head[..], flags, &["--", "sh", "-c", script]].concat();
    harrier(&words).spawn().unwrap()
}

fn result(folder: &Path) -> RunResult {
    serde_json::from_slice(&std::fs::read(folder.join("result.json")).unwrap()).unwrap()
}

#[test]
fn a_guest_that_gives_no_sign_of_life_is_ended() {
    let folder = attempt();
    // The agent itself stands still, and the machine runs on.
    let script = "mkdir /sys/fs/cgroup/ice && echo 1 > /sys/fs/cgroup/ice/cgroup.procs && echo 1 > \
                  /sys/fs/cgroup/ice/cgroup.freeze; while :; do sleep 1; done";
    let begin = Instant::now();
    let output = wait(start(folder.path(), &["--hang-limit", "6s"], script));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("the guest hangs: its agent has given no sign of life for 6s"), "{stderr}");
    assert!(begin.elapsed() > Duration::from_secs(6));
    let result = result(folder.path());
    assert_eq!((result.cause.as_deref(), result.status), (Some("hung"), None));
}

#[test]
fn a_guest_that_lives_is_left_alone_and_says_how_far_it_has_come() {
    let folder = attempt();
    let script = "echo begun > /run/harrier/progress; sleep 8; printf 'one\\nlast \\033[2J word\\n' > /run/harrier/progress; exit 3";
    let mut child = start(folder.path(), &["--hang-limit", "4s"], script);
    let said = folder.path().join("said");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !said.exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "begun");
    let output = wait(child);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    // The command's last word comes before its end, and cannot steer a terminal.
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "last \u{fffd}[2J word");
}

#[test]
fn a_machine_stands_still_before_its_lease_ends_goes_on_when_it_is_renewed_and_ends_with_it() {
    let folder = attempt();
    let lease = LeaseFile::open(&folder.path().join("lease")).unwrap();
    let (stdout, second) = (folder.path().join("out"), Duration::from_secs(1));
    let machines = folder.path().join("machines");
    let place = folder.path().to_str().unwrap();
    let mut child = harrier(&["--runtime-dir", machines.to_str().unwrap(), "run", "--quiet", "--name", "m"])
        .args(["--attempt", place, "--", "sh", "-c", "while :; do echo line; usleep 20000; done"])
        .stdout(std::fs::File::create(&stdout).unwrap())
        .spawn()
        .unwrap();
    let size = || stdout.metadata().unwrap().len();
    let state = || {
        let output =
            harrier(&["--runtime-dir", machines.to_str().unwrap(), "inspect", "m"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let eventually = |what: &str, holds: &mut dyn FnMut() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let grows = |what: &str| {
        let before = size();
        eventually(what, &mut || size() > before + 50);
    };
    grows("it runs");
    // A lease whose last third has begun, and which lasts.
    let now = now_ns();
    lease.set(Deadlines { stand_ns: now, until_ns: now + 300_000_000_000 }).unwrap();
    eventually("it stands", &mut || state().contains("\"paused\""));
    std::thread::sleep(second / 2);
    let stood = size();
    std::thread::sleep(second);
    assert_eq!(size(), stood, "nothing runs");
    // Whoever lets it go on from outside does not know of its lease.
    let resumed = harrier(&["--runtime-dir", machines.to_str().unwrap(), "resume", "m"]).output().unwrap();
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    std::thread::sleep(second);
    assert_eq!(size(), stood, "its lease counts more");
    lease.set(Deadlines::of(now_ns(), Duration::from_secs(300))).unwrap();
    grows("it goes on");
    lease.set(Deadlines { stand_ns: u64::MAX, until_ns: now_ns() }).unwrap();
    eventually("it ends with its lease", &mut || child.try_wait().unwrap().is_some());
    let output = wait(child);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the lease is over: the machine ends"));
}
