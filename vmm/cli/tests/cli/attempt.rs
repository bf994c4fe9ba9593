//! `harrier run --attempt`, as workers start it: what the guest says of itself, and a guest that says nothing any more.

use std::path::Path;
use std::time::{Duration, Instant};

use harrier_jobs::worker::RunResult;
use harrier_jobs::worker::lease_file::{LeaseFile, now_ns};

use crate::support::{harrier, wait};

/// The folder of an attempt whose lease lasts for a while.
fn attempt() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    LeaseFile::create(&folder.path().join("lease"), now_ns() + 300_000_000_000).unwrap();
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
