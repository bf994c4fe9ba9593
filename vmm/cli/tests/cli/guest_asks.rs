//! What a job asks of the monitor by `harrier-guest`, and what the guest's kernel does when its machine becomes another.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use crate::guest_kernel::{engines, lends};
use crate::machines::{Machines, eventually};
use crate::support::{cache, harrier, output, texts, wait};

fn marked(record: &Value, label: &str, value: u64) -> bool {
    record["marks"].as_array().unwrap().iter().any(|mark| mark["label"] == label && mark["value"] == value)
}

#[test]
fn a_job_marks_a_moment_and_ends_its_machine() {
    for engine in engines() {
        let script = "harrier-guest features; harrier-guest mark 'half way' 78; echo $?; harrier-guest mark ''; echo $?; \
                      harrier-guest exit 300; echo $?; harrier-guest exit 42 enough; echo never";
        let output = output(&["run", "--json", "--engine", engine, "--", "sh", "-c", script]);
        let record: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(record["exit_code"], 42, "{engine}: {record}");
        let lines: Vec<_> = record["stdout"].as_str().unwrap().lines().collect();
        let features = u64::from_str_radix(lines[0].strip_prefix("0x").unwrap(), 16).unwrap();
        assert_eq!((features & 0x3f, &lines[1..]), (0x3f, ["0", "1", "1"].as_slice()), "{engine}: {record}");
        assert!(marked(&record, "half way", 78), "{engine}: {record}");
        let stderr = record["stderr"].as_str().unwrap();
        assert!(stderr.contains("harrier-guest: '300' is not an exit code"), "{engine}: {stderr}");
    }
}

/// More than is under way at once, to whoever reads slowly, and from a job that was restored.
#[test]
fn what_a_job_wrote_before_it_ended_its_machine_arrives() {
    let all: String = (1..=60_000).map(|number| format!("{number}\n")).collect();
    for engine in engines() {
        for _ in 0..3 {
            let script = "seq 60000; echo last >&2; harrier-guest exit 9 done";
            let args = ["run", "--quiet", "--engine", engine, "--", "sh", "-c", script];
            let mut child = harrier(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(Duration::from_secs(1));
            let mut found = Vec::new();
            child.stdout.take().unwrap().read_to_end(&mut found).unwrap();
            let (code, _, stderr) = texts(wait(child));
            assert_eq!((code, stderr.as_str()), (9, "last\n"), "{engine}");
            assert!(found == all.as_bytes(), "{engine}: {} of {} bytes", found.len(), all.len());
        }
        let machines = Machines::new();
        let folder = tempfile::tempdir().unwrap();
        let snapshot = folder.path().join("snapshot");
        let script = "echo waits; while ! [ -s /run/harrier/identity ]; do usleep 10000; done; seq 60000; \
                      harrier-guest exit 9";
        machines.good(&["run", "-d", "--name", "m", "--engine", engine, "--", "sh", "-c", script]);
        eventually("it waits", || machines.good(&["logs", "m"]) == "waits\n");
        machines.good(&["snapshot", "m", "--to", snapshot.to_str().unwrap()]);
        machines.good(&["kill", "m"]);
        let (code, stdout, stderr) = texts(output(&["restore", snapshot.to_str().unwrap(), "--quiet"]));
        assert_eq!((code, stderr.as_str()), (9, ""), "{engine}");
        assert!(stdout == all, "{engine}: {} of {} bytes", stdout.len(), all.len());
    }
}

#[test]
fn only_root_ends_the_machine() {
    let script = "harrier-guest exit 3; echo $?; exit 4";
    let args = ["run", "--quiet", "--engine", "soft", "--user", "1000", "--", "sh", "-c", script];
    let (code, stdout, stderr) = texts(output(&args));
    assert_eq!((code, stdout.as_str()), (4, "1\n"), "{stderr}");
    assert!(stderr.starts_with("harrier-guest: "), "{stderr}");
}

#[test]
fn harrier_guest_is_there_in_a_root_of_ones_own() {
    let image = cache().join("rootfs-debian/current/debian.ext4");
    let script = "/run/harrier/harrier-guest mark outside 5 && exec /run/harrier/harrier-guest exit 43";
    let args =
        ["run", "--json", "--engine", "soft", "--rootfs", image.to_str().unwrap(), "--", "sh", "-c", script];
    let record: Value = serde_json::from_slice(&output(&args).stdout).unwrap();
    assert_eq!(record["exit_code"], 43, "{record}");
    assert!(marked(&record, "outside", 5), "{record}");
}

/// Role, generation, seconds of the wall clock and a random number, as the script below says them.
fn said(stdout: &str) -> (String, u64, u64, String) {
    let value = |name: &str| {
        let line = stdout.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {stdout}")).to_owned()
    };
    (
        value("HARRIER_ROLE="),
        value("HARRIER_GENERATION=").parse().unwrap(),
        value("CLOCK=").parse().unwrap(),
        value("RANDOM="),
    )
}

#[test]
fn a_job_takes_a_checkpoint_and_goes_on_in_each_machine_that_is_made_of_it() {
    let script = "kept=yes; harrier-guest checkpoint; echo CLOCK=$(date +%s); \
                  echo RANDOM=$(cat /proc/sys/kernel/random/uuid); [ $kept = yes ] && exit 7";
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let run = |args: &[&str]| {
            let mut command = harrier(args);
            texts(wait(command.env("HARRIER_SNAPSHOTS", folder.path()).spawn().unwrap()))
        };
        let original =
            ["run", "--engine", engine, "--cpu-model", "v2", "--memory", "128M", "--", "sh", "-c", script];
        let (code, stdout, stderr) = run(&original);
        assert_eq!((code, stderr.as_str()), (7, ""), "{engine}: {stdout}");
        let (role, generation, _, random) = said(&stdout);
        assert_eq!((role.as_str(), generation), ("original", 0), "{engine}: {stdout}");
        let mut numbers = BTreeSet::from([random]);
        let taken: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [snapshot] = taken.as_slice() else { panic!("{engine}: {taken:?}") };
        // A clock that nobody corrects would stay behind by this.
        std::thread::sleep(Duration::from_secs(3));
        let mut restores = 0;
        for other in engines().into_iter().chain([engine]) {
            let before = UNIX_EPOCH.elapsed().unwrap().as_secs();
            let (code, stdout, stderr) = run(&["restore", snapshot.to_str().unwrap(), "--engine", other]);
            assert_eq!((code, stderr.as_str()), (7, ""), "{engine} to {other}: {stdout}");
            let (role, generation, clock, random) = said(&stdout);
            assert_eq!((role.as_str(), generation), ("restored", 1), "{engine} to {other}: {stdout}");
            assert!(clock >= before, "{engine} to {other}: {clock} after {before}");
            numbers.insert(random);
            restores += 1;
        }
        assert_eq!(numbers.len(), 1 + restores, "{engine}: each has random numbers of its own");
        assert_eq!(enforced(snapshot), engine == "soft" || !lends(engine), "{engine}");
    }
}

/// What a snapshot says of its machine's CPU model.
fn enforced(snapshot: &Path) -> bool {
    let inspected = output(&["snapshots", "inspect", snapshot.to_str().unwrap()]);
    let text = String::from_utf8(inspected.stdout).unwrap();
    let line = text.lines().find(|line| line.contains("\"cpu_model_enforced\"")).expect(&text);
    line.contains("true")
}

#[test]
fn a_program_waits_until_its_machine_is_another_one() {
    let machines = Machines::new();
    let script =
        "echo waits; harrier-guest identity --wait; dmesg | grep -c 'harrier: this machine is of generation'";
    let run =
        ["run", "-d", "--name", "base", "--memory", "128M", "--cpu-model", "v1", "--", "sh", "-c", script];
    machines.good(&run);
    eventually("it waits", || machines.good(&["logs", "base"]).contains("waits\n"));
    machines.good(&["fork", "base", "-n", "2", "--name", "kid"]);
    for (name, index) in [("kid-0", 0), ("kid-1", 1)] {
        assert_eq!(machines.run(&["wait", name]).1.trim(), "0", "{name}");
        let logs = machines.good(&["logs", name]);
        let expected = format!("HARRIER_ROLE=clone\nHARRIER_GENERATION=1\nHARRIER_CLONE_INDEX={index}\n1\n");
        assert!(logs.ends_with(&expected), "{name}: {logs}");
    }
    assert_eq!(machines.good(&["logs", "base"]), "waits\n", "the machine that was forked is the same one");
    machines.good(&["kill", "base"]);
}

#[test]
fn marks_beyond_the_cap_are_refused_by_name_and_the_first_ones_kept() {
    let script = "i=0; while harrier-guest mark m$i $i; do i=$((i + 1)); done; echo $i";
    let record: Value = serde_json::from_slice(
        &output(&["run", "--json", "--engine", "soft", "--", "sh", "-c", script]).stdout,
    )
    .unwrap();
    let marks = record["marks"].as_array().unwrap();
    // Eight are the boot's own.
    assert_eq!((marks.len(), record["stdout"].as_str().unwrap()), (256, "248\n"), "{record}");
    assert!(marked(&record, "m247", 247));
    let stderr = record["stderr"].as_str().unwrap();
    assert_eq!(stderr, "harrier-guest: the monitor keeps no more marks of this machine\n");
}

#[test]
fn what_programs_have_written_is_on_the_disks_before_a_snapshot() {
    for engine in engines() {
        is_written_before_a_snapshot(engine, &[]);
    }
}

/// Such a kernel cannot be asked for quiet: there the agent sees to it.
#[test]
fn under_an_unmodified_kernel_it_is_too_and_the_agent_begins_new_commands_afterwards() {
    let folder = cache().join("debian-kernel/agent-3");
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    is_written_before_a_snapshot(
        "soft",
        &["--kernel", &file("vmlinux"), "--initrd", &file("initramfs.cpio")],
    );
}

fn is_written_before_a_snapshot(engine: &str, kernel: &[&str]) {
    let machines = Machines::new();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (disk, snapshot) = (path("disk"), path("snapshot"));
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let first_bytes = || std::fs::read(&disk).unwrap()[..5].to_vec();
    // As long as the file is open nobody has reason to write it through, for half a minute.
    let script = "exec 3>/dev/vda; echo hello >&3; echo written; sleep 100";
    let run = ["run", "-d", "--name", "m", "--engine", engine, "--memory", "128M", "--disk", &disk];
    machines.good(&[run.as_slice(), kernel, &["--", "sh", "-c", script]].concat());
    eventually("it is written", || machines.good(&["logs", "m"]) == "written\n");
    assert_eq!(first_bytes(), [0; 5], "{engine}: it was on the disk without being asked");
    machines.good(&["snapshot", "m", "--to", &snapshot]);
    assert_eq!(first_bytes(), b"hello", "{engine}");
    assert_eq!(machines.good(&["exec", "m", "--", "echo", "on"]), "on\n", "{engine}");
    machines.good(&["kill", "m"]);
    // Whatever it was asked for is over in the machine that is made of it.
    machines.good(&["restore", &snapshot, "-d", "--name", "again"]);
    assert_eq!(machines.good(&["exec", "again", "--", "echo", "on"]), "on\n", "{engine}");
    machines.good(&["kill", "again"]);
}
