//! Machines whose monitors and starters are killed, stopped, many, or wanted by several at once.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use crate::machines::{Machines, eventually, kill_process};
use crate::support::{Code, KernelFile, texts, wait};

/// Processes that are monitors of machines in this registry.
fn monitors(machines: &Machines) -> Vec<u64> {
    let root = machines.root();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.get(1) == Some(&&b"monitor"[..])
            && words.get(2).is_some_and(|folder| folder.starts_with(root.as_bytes()))
        {
            found.push(pid);
        }
    }
    found
}

#[test]
fn a_monitor_that_is_killed_at_any_moment_leaves_a_lost_machine_or_nothing() {
    let machines = Machines::new();
    for delay_ms in [0, 2, 5, 10, 20, 40, 80, 160, 320, 640] {
        let starter = machines.spawn(&["run", "-d", "--name", "a", "--", "sleep", "1000"]);
        std::thread::sleep(Duration::from_millis(delay_ms));
        let mut killed = false;
        eventually("there is a monitor, or the starter has ended", || {
            for pid in monitors(&machines) {
                killed |= kill_process(pid, "KILL");
            }
            killed
        });
        let (code, stdout, stderr) = texts(wait(starter));
        let states = machines.states();
        if code == 0 {
            assert_eq!((stdout.len(), states), (13, vec![("a".to_owned(), "lost".to_owned())]));
            machines.good(&["rm", "a"]);
        } else {
            assert_eq!((code, stderr.lines().count(), states), (125, 1, vec![]), "{delay_ms} ms: {stderr}");
        }
        assert_eq!(machines.leftovers(), BTreeSet::from(["lock".to_owned()]), "{delay_ms} ms");
    }
}

#[test]
fn a_starter_that_is_killed_leaves_a_machine_that_is_found_or_none() {
    let machines = Machines::new();
    for delay_ms in [0, 2, 5, 10, 30, 100, 300] {
        let starter = machines.spawn(&["run", "-d", "--name", "a", "--", "sleep", "1000"]);
        std::thread::sleep(Duration::from_millis(delay_ms));
        assert!(kill_process(starter.id().into(), "KILL"));
        wait(starter);
        // A monitor that nobody waits for ends, unless the machine was said to run.
        eventually("the monitor has ended, or its machine runs", || {
            let states = machines.states();
            match monitors(&machines).as_slice() {
                [] => states.is_empty(),
                _ => states == [("a".to_owned(), "running".to_owned())],
            }
        });
        if !machines.states().is_empty() {
            machines.good(&["rm", "-f", "a"]);
        }
        // Even the registry's lock may not be there yet.
        let left = machines.leftovers();
        assert!(left.iter().all(|name| name == "lock"), "{delay_ms} ms: {left:?}");
    }
}

#[test]
fn of_many_starters_with_one_name_one_wins() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().halt());
    let start =
        || machines.spawn(&["run", "-d", "--name", "one", "--memory", "32M", "--kernel", &kernel.path]);
    let starters: Vec<_> = (0..8).map(|_| start()).collect();
    let ends: Vec<_> = starters.into_iter().map(|starter| texts(wait(starter))).collect();
    let won = ends.iter().filter(|(code, _, _)| *code == 0).count();
    assert_eq!(won, 1, "{ends:?}");
    for (code, _, stderr) in &ends {
        assert!(*code == 0 || (*code == 125 && stderr.contains("a machine 'one' already")), "{stderr}");
    }
    assert_eq!(machines.states(), [("one".to_owned(), "running".to_owned())]);
}

#[test]
fn fifty_machines_are_listed_and_ended_together() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().halt());
    let mut ids = BTreeSet::new();
    for _ in 0..5 {
        let start = || machines.spawn(&["run", "-d", "--memory", "32M", "--kernel", &kernel.path]);
        let starters: Vec<_> = (0..10).map(|_| start()).collect();
        for starter in starters {
            let (code, stdout, stderr) = texts(wait(starter));
            assert_eq!(code, 0, "{stderr}");
            ids.insert(stdout.trim().to_owned());
        }
    }
    let listed = machines.good(&["ps", "-q"]);
    assert_eq!(listed.lines().map(str::to_owned).collect::<BTreeSet<_>>(), ids);
    let names: BTreeSet<String> = machines.states().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 50, "names are unique");
    let all: Vec<&str> = ids.iter().map(String::as_str).collect();
    machines.good(&[&["kill"], all.as_slice()].concat());
    assert_eq!(machines.good(&["ps", "-q"]), "");
    assert_eq!(machines.good(&["ps", "-q", "--filter", "exit=137"]).lines().count(), 50);
    machines.good(&[&["rm"], all.as_slice()].concat());
    assert_eq!(machines.leftovers(), BTreeSet::from(["lock".to_owned()]));
}

#[test]
fn stop_kill_and_rm_at_the_same_time_leave_nothing_and_hang_nowhere() {
    let machines = Machines::new();
    machines.good(&["run", "-d", "--name", "a", "--", "sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
    let commands: [&[&str]; 8] = [
        &["stop", "-t", "1s", "a"],
        &["pause", "a"],
        &["kill", "a"],
        &["rm", "-f", "a"],
        &["stop", "a"],
        &["resume", "a"],
        &["kill", "a"],
        &["rm", "-f", "a"],
    ];
    let running: Vec<_> = commands.iter().map(|args| machines.spawn(args)).collect();
    for (child, args) in running.into_iter().zip(commands) {
        let (code, _, stderr) = texts(wait(child));
        assert!(code == 0 || (code == 125 && stderr.lines().count() == 1), "{args:?}: {code} {stderr}");
    }
    eventually("it is gone", || machines.states().is_empty());
    // The kernel gives a lock back a little before it forgets the process.
    eventually("its process is gone", || monitors(&machines).is_empty());
}

#[test]
fn a_monitor_that_stands_still_is_seen_to_and_can_be_removed() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().halt());
    machines.good(&["run", "-d", "--name", "a", "--memory", "32M", "--kernel", &kernel.path]);
    let pid = machines.inspect("a")["pid"].as_u64().unwrap();
    assert!(kill_process(pid, "STOP"));
    assert_eq!(machines.states(), [("a".to_owned(), "unresponsive".to_owned())]);
    machines.good(&["rm", "-f", "a"]);
    assert_eq!(machines.states(), []);
    assert_eq!(machines.leftovers(), BTreeSet::from(["lock".to_owned()]));
}

#[test]
fn a_monitor_is_not_started_by_hand() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().halt());
    machines.good(&["run", "-d", "--name", "a", "--memory", "32M", "--kernel", &kernel.path]);
    let folder = machines.inspect("a")["folder"].as_str().unwrap().to_owned();
    assert!(machines.bad(&["monitor", &folder, "run", "--", "true"]).contains("run --detach"));
    assert!(machines.bad(&["monitor", "/nowhere", "run", "--", "true"]).contains("run --detach"));
    assert_eq!(machines.states(), [("a".to_owned(), "running".to_owned())]);
    // It has a session of its own, and no terminal.
    let pid = machines.inspect("a")["pid"].as_u64().unwrap();
    let session =
        Command::new("ps").args(["-o", "sid=,tty=", "-p", &pid.to_string()]).output().unwrap().stdout;
    let session = String::from_utf8(session).unwrap();
    assert_eq!(session.split_whitespace().collect::<Vec<_>>(), [pid.to_string().as_str(), "?"]);
}
