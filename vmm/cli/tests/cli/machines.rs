//! Machines with a name: started, found, paused, ended and killed as a user does it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Code, KernelFile, harrier, texts, wait};

/// A registry of its own; what still runs in it ends with it.
pub(crate) struct Machines {
    folder: tempfile::TempDir,
}

impl Machines {
    pub(crate) fn new() -> Self {
        Machines { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = harrier(args);
        command.env("HARRIER_RUNTIME_DIR", self.root());
        command.env("HARRIER_SNAPSHOTS", self.folder.path().join("snapshots"));
        command
    }

    pub(crate) fn root(&self) -> String {
        self.folder.path().join("machines").to_str().unwrap().to_owned()
    }

    /// Where a snapshot of this name is kept.
    pub(crate) fn snapshot(&self, name: &str) -> String {
        let folder = self.folder.path().join("snapshots");
        std::fs::create_dir_all(&folder).unwrap();
        folder.join(name).to_str().unwrap().to_owned()
    }

    /// What lies in the registry.
    pub(crate) fn leftovers(&self) -> BTreeSet<String> {
        let names = std::fs::read_dir(self.root()).unwrap().flatten();
        names.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }

    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        self.command(args).spawn().unwrap()
    }

    fn output(&self, args: &[&str]) -> Output {
        wait(self.spawn(args))
    }

    /// Exit code, stdout and stderr.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        texts(self.output(args))
    }

    /// Stdout of a command that has to succeed.
    pub(crate) fn good(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!((code, stderr.as_str()), (0, ""), "{args:?}: {stdout}");
        stdout
    }

    /// One line on stderr, and 125.
    pub(crate) fn bad(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (125, "", 1), "{args:?}: {stderr}");
        assert!(stderr.starts_with("harrier: "), "{stderr}");
        stderr
    }

    pub(crate) fn inspect(&self, name: &str) -> Value {
        serde_json::from_str::<Value>(&self.good(&["inspect", name])).unwrap()[0].take()
    }

    pub(crate) fn states(&self) -> Vec<(String, String)> {
        let list: Value = serde_json::from_str(&self.good(&["ps", "-a", "--json"])).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(|entry| (text(&entry["name"]), text(&entry["state"]))).collect()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let ids = self.command(&["ps", "-aq"]).output().unwrap().stdout;
        let ids = String::from_utf8_lossy(&ids).into_owned();
        for id in ids.lines() {
            let _ = self.command(&["rm", "-f", id]).output();
        }
    }
}

/// Sends a signal; false if there is no such process.
pub(crate) fn kill_process(pid: u64, signal: &str) -> bool {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{signal}"), &pid.to_string()]).stderr(std::process::Stdio::null());
    kill.status().unwrap().success()
}

/// Waits for what comes by itself.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn after_a_pause_the_date_is_right_and_the_guest_is_no_older() {
    const PAUSE: Duration = Duration::from_secs(3);
    let machines = Machines::new();
    for engine in crate::guest_kernel::engines() {
        machines.good(&["run", "-d", "--engine", engine, "--name", engine, "--", "sleep", "1000"]);
        let ask = |command: &str| -> f64 {
            let said = machines.good(&["exec", "--no-stdin", engine, "--", "sh", "-c", command]);
            said.trim().parse().unwrap_or_else(|_| panic!("{said}"))
        };
        let uptime = || ask("cut -d' ' -f1 /proc/uptime");
        let begin = Instant::now();
        let before = uptime();
        machines.good(&["pause", engine]);
        std::thread::sleep(PAUSE);
        machines.good(&["resume", engine]);
        let aged = uptime() - before;
        assert!(aged <= (begin.elapsed() - PAUSE).as_secs_f64() + 0.1, "{engine}: {aged} s");
        eventually("the date is right", || {
            let host = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
            (ask("date +%s") - host).abs() < 1.5
        });
        machines.good(&["rm", "-f", engine]);
    }
}

#[test]
fn a_detached_machine_is_found_paused_resumed_and_stopped() {
    let machines = Machines::new();
    let script = "trap 'echo bye; exit 9' TERM; echo out; echo err >&2; while :; do sleep 0.1; done";
    let id = machines.good(&["run", "-d", "--engine", "soft", "--name", "web", "--", "sh", "-c", script]);
    let id = id.trim();
    assert_eq!(id.len(), 12, "{id}");
    let info = machines.inspect("web");
    assert_eq!(
        (&info["id"], &info["state"], &info["engine"]),
        (&id.into(), &"running".into(), &"soft".into())
    );
    assert_eq!(info["command"][0], "sh");
    assert!(info["usage"]["resident_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(machines.good(&["ps"]).contains("web"));
    assert_eq!(machines.good(&["ps", "-q", "--filter", "name=we"]), format!("{id}\n"));
    eventually("both lines are kept", || {
        let (code, stdout, stderr) = machines.run(&["logs", &id[..6]]);
        (code, stdout.as_str(), stderr.as_str()) == (0, "out\n", "err\n")
    });

    for _ in 0..2 {
        assert_eq!(machines.good(&["pause", "web"]), "web\n");
        assert_eq!(machines.inspect("web")["state"], "paused");
    }
    for _ in 0..2 {
        assert_eq!(machines.good(&["resume", "web"]), "web\n");
        assert_eq!(machines.inspect("web")["state"], "running");
    }
    assert!(machines.bad(&["rm", "web"]).contains("runs"));
    machines.good(&["pause", "web"]);
    // A paused machine is stopped as well, and its command has its say.
    let follower = machines.spawn(&["logs", "-f", "web"]);
    let waiter = machines.spawn(&["wait", "web"]);
    assert_eq!(machines.good(&["stop", "web"]), "web\n");
    let (code, stdout, stderr) = texts(wait(follower));
    assert_eq!((code, stdout.as_str()), (0, "out\nbye\n"));
    assert!(stderr.starts_with("err\n"), "{stderr}");
    assert_eq!(texts(wait(waiter)), (9, "9\n".to_owned(), String::new()));
    assert_eq!(machines.inspect("web")["exit_code"], 9);
    assert_eq!(machines.good(&["ps", "-q"]), "");
    assert!(machines.bad(&["pause", "web"]).contains("has ended with code 9"));
    assert_eq!(machines.good(&["stop", "web"]), "web\n");
    assert_eq!(machines.good(&["rm", "web"]), "web\n");
    let (code, stdout, stderr) = machines.run(&["inspect", "web"]);
    assert_eq!((code, stdout.as_str()), (125, "[]\n"));
    assert!(stderr.contains("no machine 'web'"), "{stderr}");
    assert_eq!(machines.states(), []);
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let machines = Machines::new();
    let (code, stdout, stderr) = machines.run(&["run", "-d", "--name", "a", "--", "no-such-command"]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (127, "", 1), "{stderr}");
    assert!(stderr.contains("no-such-command"), "{stderr}");
    assert!(machines.bad(&["run", "-d", "--kernel", "/dev/null"]).contains("/dev/null"));
    assert!(machines.bad(&["run", "-d", "--cmdline", "rdinit=/none", "--", "true"]).contains("Kernel panic"));
    assert!(machines.bad(&["run", "-d", "--name", "-x", "--", "true"]).contains("'-x'"));
    assert!(machines.bad(&["run", "-d", "--name", "a b", "--", "true"]).contains("is not a name"));
    assert!(machines.bad(&["run", "-d"]).contains("nothing to run"));
    assert_eq!(machines.states(), []);
}

#[test]
fn a_killed_monitor_leaves_a_lost_machine_and_no_live_one() {
    let machines = Machines::new();
    machines.good(&["run", "-d", "--name", "a", "--", "sh", "-c", "echo kept; sleep 1000"]);
    machines.good(&["run", "-d", "--rm", "--name", "b", "--", "sleep", "1000"]);
    eventually("the line is kept", || machines.good(&["logs", "a"]) == "kept\n");
    let waiter = machines.spawn(&["wait", "a"]);
    for name in ["a", "b"] {
        assert!(kill_process(machines.inspect(name)["pid"].as_u64().unwrap(), "KILL"));
    }
    eventually("one is lost, the other gone", || machines.states() == [("a".to_owned(), "lost".to_owned())]);
    let (code, stdout, stderr) = texts(wait(waiter));
    assert_eq!((code, stdout.as_str()), (125, ""), "{stderr}");
    assert!(stderr.contains("its monitor was killed"), "{stderr}");
    assert!(machines.bad(&["pause", "a"]).contains("its monitor was killed"));
    assert!(machines.bad(&["run", "-d", "--name", "a", "--", "true"]).contains("already"));
    assert_eq!(machines.good(&["logs", "-f", "a"]), "kept\n");
    machines.good(&["rm", "a"]);
    assert_eq!(machines.states(), []);
}

#[test]
fn plain_boots_have_names_and_logs_too_and_kill_is_at_once() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    machines.good(&["run", "-d", "--name", "k", "--kernel", &kernel.path]);
    eventually("the console is kept", || machines.good(&["logs", "k"]) == "up\n");
    assert!(machines.bad(&["kill", "-s", "INT", "k"]).contains("no command"));
    machines.good(&["kill", "k"]);
    assert_eq!(machines.run(&["wait", "k"]), (137, "137\n".to_owned(), String::new()));
    // A foreground machine has a name as long as it runs.
    let mut child = machines.spawn(&["run", "--name", "f", "--kernel", &kernel.path]);
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    assert!(machines.states().contains(&("f".to_owned(), "running".to_owned())));
    assert!(machines.bad(&["logs", "f"]).contains("not kept"));
    // It does not know what a power button is.
    machines.good(&["stop", "-t", "100ms", "f"]);
    assert_eq!(wait(child).status.code(), Some(137));
    assert_eq!(machines.states(), [("k".to_owned(), "exited".to_owned())]);
}

#[test]
fn further_commands_run_in_a_machine_with_streams_and_codes_of_their_own() {
    let machines = Machines::new();
    machines.good(&["run", "-d", "--name", "a", "-e", "X=1", "-w", "/tmp", "--", "sleep", "1000"]);
    let shell = |script: &str| machines.run(&["exec", "a", "--", "sh", "-c", script]);
    assert_eq!(shell("echo $X; pwd; echo err >&2; exit 7"), (7, "1\n/tmp\n".to_owned(), "err\n".to_owned()));
    let with = ["exec", "-e", "X=2", "-w", "/", "a", "sh", "-c", "echo $X; pwd"];
    assert_eq!(machines.good(&with), "2\n/\n");
    let (code, _, stderr) = machines.run(&["exec", "a", "--", "no-such-command"]);
    assert_eq!((code, stderr.lines().count()), (127, 1), "{stderr}");

    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child = machines.command(&["exec", "a", "--", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, sent) = (child.stdin.take().unwrap(), data.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = wait(child);
    writer.join().unwrap().unwrap();
    assert!(output.stdout == data, "{} bytes", output.stdout.len());

    // A command whose client is killed ends; one that is left goes on.
    let mut child = machines.spawn(&["exec", "a", "--", "sh", "-c", "echo up; exec sleep 1001"]);
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the command is gone", || shell("ps | grep 'sleep 100[1]'").0 == 1);
    machines.good(&["exec", "-d", "a", "--", "sleep", "1002"]);
    eventually("the command runs", || shell("ps | grep 'sleep 100[2]'").0 == 0);

    machines.good(&["pause", "a"]);
    assert!(machines.bad(&["exec", "a", "--", "true"]).contains("is paused"));
    machines.good(&["resume", "a"]);
    let child = machines.spawn(&["exec", "a", "--", "sleep", "1000"]);
    machines.good(&["kill", "a"]);
    assert_eq!(wait(child).status.code(), Some(125));
    assert!(machines.bad(&["exec", "a", "--", "true"]).contains("has ended with code 137"));
}

#[test]
fn whoever_attaches_gives_a_machine_its_input_and_gets_its_output_and_code() {
    let machines = Machines::new();
    let script = "while read line; do echo got $line; done; exit 3";
    machines.good(&["run", "-d", "-i", "--name", "a", "--", "sh", "-c", script]);
    let mut child = machines.command(&["attach", "a"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"one\n").unwrap();
    let mut first = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"got one\n");
    stdin.write_all(b"two\n").unwrap();
    drop(stdin);
    assert_eq!(texts(wait(child)), (3, "got two\n".to_owned(), String::new()));
    assert_eq!(machines.good(&["logs", "a"]), "got one\ngot two\n");
    machines.good(&["run", "-d", "--name", "b", "--", "sleep", "1000"]);
    let child = machines.spawn(&["attach", "b"]);
    eventually("it is attached or not", || machines.inspect("b")["state"] == "running");
    machines.good(&["kill", "b"]);
    let code = wait(child).status.code();
    assert!(code == Some(137) || code == Some(125), "{code:?}");
}
