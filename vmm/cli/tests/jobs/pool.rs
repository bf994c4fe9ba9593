//! A queue with its workers and coordinators, all of which end with it.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Everything that a test waits for comes within this time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);

/// A process that ends with this value; what it says on stderr is kept.
pub(crate) struct Process {
    pub(crate) child: Child,
    said: Arc<Mutex<String>>,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (mut stderr, copy) = (BufReader::new(child.stderr.take().unwrap()), said.clone());
        std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|count| count > 0) {
                copy.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        Process { child, said }
    }

    pub(crate) fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Ends it and waits for that.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> i32 {
        let mut code = None;
        eventually("the process ends", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("process {} has said:\n{}", self.child.id(), self.said());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A queue in a folder of its own.
pub(crate) struct Pool {
    folder: tempfile::TempDir,
    /// What commands and workers are given as their queue.
    place: RefCell<Vec<String>>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.use_place(&["--queue", &self.text("queue")]);
            eprintln!("what has happened:\n{}", self.run(&["events"]).1);
        }
    }
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

impl Pool {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let queue = folder.path().join("queue").to_str().unwrap().to_owned();
        Pool { folder, place: RefCell::new(vec!["--queue".to_owned(), queue]) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Commands and workers are told to use this queue from now on.
    pub(crate) fn use_place(&self, words: &[&str]) {
        *self.place.borrow_mut() = words.iter().map(|word| (*word).to_owned()).collect();
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_harrier"));
        for name in ["HARRIER_QUEUE", "HARRIER_TOKEN_FILE", "HARRIER_CA_FILE"] {
            command.env_remove(name);
        }
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A command that takes `--queue`.
    pub(crate) fn on_queue(&self, args: &[&str]) -> Command {
        let (name, rest) = args.split_first().unwrap();
        let place = self.place.borrow();
        let words: Vec<&str> =
            [*name].into_iter().chain(place.iter().map(String::as_str)).chain(rest.iter().copied()).collect();
        self.command(&words)
    }

    /// Exit code, stdout and stderr.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        texts(self.on_queue(args).output().unwrap())
    }

    /// Stdout of a command that has to succeed.
    pub(crate) fn good(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stdout}{stderr}");
        stdout
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.good(&[args, &["--json"]].concat())).unwrap()
    }

    /// Submits a shell script for a small machine, with further flags, and answers its number.
    pub(crate) fn submit(&self, flags: &[&str], script: &str) -> u64 {
        let base = ["submit", "--memory", "128M", "--cpu-model", "v1"];
        self.good(&[&base[..], flags, &["--", "sh", "-c", script]].concat()).trim().parse().unwrap()
    }

    pub(crate) fn job(&self, id: u64) -> Value {
        self.json(&["status", &id.to_string()])[0].take()
    }

    pub(crate) fn state(&self, id: u64) -> String {
        self.job(id)["state"].as_str().unwrap().to_owned()
    }

    /// Waits until something has been said of a job.
    pub(crate) fn wait_for_event(&self, id: u64, words: &str) {
        eventually(&format!("'{words}' happens to job {id}"), || self.history(id).contains(words));
    }

    /// What `harrier wait` says of a job.
    pub(crate) fn exit_code(&self, id: u64) -> i32 {
        self.run(&["wait", "--timeout", "100s", &id.to_string()]).0
    }

    pub(crate) fn logs(&self, id: u64) -> String {
        self.good(&["logs", &id.to_string()])
    }

    /// Everything that has happened to a job, in words.
    pub(crate) fn history(&self, id: u64) -> String {
        self.good(&["events", &id.to_string()])
    }

    /// A worker with a name and a folder of its own.
    pub(crate) fn worker(&self, name: &str, flags: &[&str]) -> Process {
        let state = self.text(name);
        let args = ["worker", "--name", name, "--state", &state];
        Process::start(self.on_queue(&[&args[..], flags].concat()))
    }

    /// `harrier worker busy` or `idle`.
    pub(crate) fn owner(&self, word: &str, name: &str) {
        let state = self.text(name);
        let (code, _, stderr) = texts(self.command(&["worker", word, "--state", &state]).output().unwrap());
        assert_eq!(code, 0, "{stderr}");
    }

    /// A coordinator of the pool's folder, and the address that it prints.
    pub(crate) fn coordinator(&self, flags: &[&str]) -> (Process, String) {
        let queue = self.text("queue");
        let mut process =
            Process::start(self.command(&[&["coordinator", "--queue", &queue][..], flags].concat()));
        let mut line = String::new();
        let mut stdout = BufReader::new(process.child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        if line.is_empty() {
            process.child.wait().unwrap();
            eventually("it says why", || !process.said().is_empty());
        }
        // Kept open: a coordinator whose stdout is closed has nobody to tell.
        std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        (process, line.trim().to_owned())
    }
}

/// Exit code, stdout and stderr as text.
pub(crate) fn texts(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// A job whose every line depends on all before it: what is lost, doubled or wrong shows.
pub(crate) fn chain(steps: u32, pause_us: u32) -> String {
    format!(
        "s=0; i=0; while [ $i -lt {steps} ]; do s=$(echo $s $i | md5sum | cut -c1-8); i=$((i+1)); echo step $i $s; \
         usleep {pause_us}; done; echo done >&2"
    )
}

/// What it prints, made here.
pub(crate) fn chain_output(steps: u32) -> String {
    let script = chain(steps, 0).replace("usleep 0", ":");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.lines().count(), steps as usize, "{said}");
    said
}
