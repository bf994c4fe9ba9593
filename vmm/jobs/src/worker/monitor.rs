//! One monitor process: `harrier run` with an attempt's folder.
//!
//! The folder holds `attempt.json` (what is run, for a worker that finds it after a crash), `lease`, `started` (the
//! engine's name, once the guest is up), `result.json` (once it is over) and `monitor.log`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use harrier_control::api::{KillRequest, MachineState};
use harrier_control::{Client, Registry};
use serde::{Deserialize, Serialize};

use super::checkpoint::Source;
use super::lease_file::{Deadlines, LeaseFile};
use crate::files::FileFacts;
use crate::queue::{Job, JobLimits, LeaseKey};

/// Names in an attempt's folder.
pub mod names {
    /// The lease's end.
    pub const LEASE: &str = "lease";
    /// There once the guest is up.
    pub const STARTED: &str = "started";
    /// How far the command says it has come; there once it has.
    pub const SAID: &str = "said";
    /// There once the run is over.
    pub const RESULT: &str = "result.json";
    pub(super) const ATTEMPT: &str = "attempt.json";
    pub(in crate::worker) const LOG: &str = "monitor.log";
}

/// How a run ended, as the monitor writes it down.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct RunResult {
    /// `exited`, `signaled`, `not found`, `not executable` or `failed`; nothing if the command did not come to an end.
    pub status: Option<String>,
    /// The exit code of `harrier run`.
    pub exit_code: u8,
    /// What went wrong, in words.
    pub error: Option<String>,
    /// `memory` or `processes`, where the lack of that has ended the command; `hung` where the guest gave no sign of life.
    #[serde(default)]
    pub cause: Option<String>,
    /// The output files, in the order in which they were asked for.
    #[serde(default)]
    pub outputs: Vec<RunOutput>,
}

/// An output file of a run.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct RunOutput {
    /// Where it was in the guest.
    pub guest: String,
    /// What it is; `None` if the command has not written it.
    pub facts: Option<FileFacts>,
}

/// A file that a run is given.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub(super) struct RunInput {
    /// On this host.
    pub(super) host: PathBuf,
    pub(super) guest: String,
    pub(super) mode: u32,
}

/// What a worker writes down before it starts a monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct AttemptRecord {
    /// The files that the job is given, on this host.
    #[serde(default)]
    pub(super) inputs: Vec<RunInput>,
    pub(super) key: LeaseKey,
    pub(super) output: [PathBuf; 2],
    pub(super) job: Job,
    /// The checkpoint that it goes on from.
    #[serde(default)]
    pub(super) from: Option<Source>,
    /// The template that its machine is a copy of.
    #[serde(default)]
    pub(super) warm: Option<PathBuf>,
}

/// A monitor process, our child or one that an earlier worker has left.
#[derive(Debug)]
pub(super) struct Monitor {
    folder: PathBuf,
    child: Option<Child>,
    lease: Arc<LeaseFile>,
    /// Where its machine is registered, and under which name.
    registry: PathBuf,
    name: String,
}

impl Monitor {
    /// Starts one.
    pub(super) fn start(
        program: &Path,
        folder: &Path,
        registry: &Path,
        record: &AttemptRecord,
        deadlines: Deadlines,
        run_flags: &[OsString],
    ) -> io::Result<Self> {
        let lease = prepare(folder, record, deadlines)?;
        let spec = &record.job.spec;
        let stderr = &record.output[1];
        let name = machine_name(&record.key);
        let mut command = Command::new(program);
        command.arg("--runtime-dir").arg(registry);
        match &record.from {
            Some(from) => command.arg("restore").arg(&from.folder),
            None => command.arg("run"),
        };
        command.args(["--name", &name, "--quiet", "--attempt"]).arg(folder).arg("--stderr").arg(stderr);
        command.args(run_flags);
        command.args(["--engine", &spec.engine]);
        for (index, file) in spec.outputs.iter().enumerate() {
            let place = output_place(folder, index);
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut words = OsString::from(format!("{}:", file.guest));
            words.push(place);
            command.arg("--output").arg(words);
        }
        // A machine that goes on has the rest in it.
        if record.from.is_none() {
            command.args(["--cpus", &spec.cpus.to_string(), "--memory", &spec.memory_bytes.to_string()]);
            if let Some(model) = &spec.cpu_model {
                command.args(["--cpu-model", model]);
            }
            for (name, value) in environment(&record.job, &record.key) {
                command.args(["--env", &format!("{name}={value}")]);
            }
            if let Some(workdir) = &spec.workdir {
                command.args(["--workdir", workdir]);
            }
            if let Some(rootfs) = &spec.rootfs {
                command.args(["--rootfs", rootfs]);
            }
            for file in &record.inputs {
                let mut words = OsString::from(format!("{:o}:", file.mode));
                words.push(&file.host);
                words.push(format!(":{}", file.guest));
                command.arg("--input-as").arg(words);
            }
            command.args(limits(&spec.limits));
            if let Some(template) = &record.warm {
                command.arg("--warm").arg(template);
            }
            command.arg("--").args(&spec.command);
        }
        let child = spawn(command, folder, record)?;
        let (folder, registry) = (folder.to_owned(), registry.to_owned());
        Ok(Self { folder, child: Some(child), lease, registry, name })
    }

    /// Starts one that runs its command in a machine that is there.
    pub(super) fn start_in(
        machine: &str,
        program: &Path,
        folder: &Path,
        registry: &Path,
        record: &AttemptRecord,
        deadlines: Deadlines,
    ) -> io::Result<Self> {
        let lease = prepare(folder, record, deadlines)?;
        let spec = &record.job.spec;
        let mut command = Command::new(program);
        command.arg("--runtime-dir").arg(registry).args(["exec", "--attempt"]).arg(folder);
        command.arg("--stderr").arg(&record.output[1]);
        for (name, value) in environment(&record.job, &record.key) {
            command.args(["--env", &format!("{name}={value}")]);
        }
        if let Some(workdir) = &spec.workdir {
            command.args(["--workdir", workdir]);
        }
        command.args([machine, "--"]).args(&spec.command);
        let child = spawn(command, folder, record)?;
        let (folder, registry, name) = (folder.to_owned(), registry.to_owned(), machine.to_owned());
        Ok(Self { folder, child: Some(child), lease, registry, name })
    }

    /// Takes over what an earlier worker has left in a folder; `None` if it is no attempt.
    pub(super) fn adopt(folder: &Path, registry: &Path) -> Option<(Self, AttemptRecord)> {
        let record: AttemptRecord =
            serde_json::from_slice(&fs::read(folder.join(names::ATTEMPT)).ok()?).ok()?;
        let lease = Arc::new(LeaseFile::open(&folder.join(names::LEASE)).ok()?);
        let (folder, registry) = (folder.to_owned(), registry.to_owned());
        let name = machine_name(&record.key);
        Some((Self { folder, child: None, lease, registry, name }, record))
    }

    /// Our child's process id.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The machine's control socket; an error while it has none.
    pub(super) fn control(&self) -> Result<Client, String> {
        let registry = Registry::open(&self.registry).map_err(|err| err.to_string())?;
        let entry = registry.find(&self.name).map_err(|err| err.to_string())?;
        Ok(Client::new(&entry.folder))
    }

    /// The attempt's folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the machine stands still.
    pub(super) fn is_paused(&self) -> bool {
        let info = self.control().and_then(|client| client.info().map_err(|err| err.to_string()));
        info.is_ok_and(|info| info.state == MachineState::Paused)
    }

    /// Makes the machine stand still, or lets it go on, and waits at most so long for that. Both may be said again.
    pub(super) fn pause(&self, pause: bool, timeout: Duration) -> Result<(), String> {
        let client = self.control()?.with_timeout(timeout);
        let changed = if pause { client.pause() } else { client.resume() };
        changed.map(drop).map_err(|err| err.to_string())
    }

    /// Where it reads how long it may run.
    pub(super) fn lease(&self) -> &Arc<LeaseFile> {
        &self.lease
    }

    /// The engine's name, once the guest is up.
    pub(super) fn started(&self) -> Option<String> {
        fs::read_to_string(self.folder.join(names::STARTED)).ok().map(|text| text.trim().to_owned())
    }

    /// How far the command says it has come.
    pub(super) fn said(&self) -> Option<String> {
        fs::read_to_string(self.folder.join(names::SAID)).ok()
    }

    /// Whether the process has ended.
    pub(super) fn has_ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            // Not our child: it holds a lock while it lives.
            None => self.lease.lock().unwrap_or(true),
        }
    }

    /// Waits a little for the process to end.
    pub(super) fn wait(&mut self, time: Duration) {
        if let Some(child) = &self.child
            && let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed())
            && let Ok(fd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        {
            let timeout = rustix::time::Timespec {
                tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: time.subsec_nanos().into(),
            };
            let mut entries = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            // A signal only makes the wait shorter.
            let _ = rustix::event::poll(&mut entries, Some(&timeout));
        } else {
            std::thread::sleep(time);
        }
    }

    /// How the run ended, once the process has; `None` if it did not come to say so.
    pub(super) fn result(&self) -> Option<RunResult> {
        serde_json::from_slice(&fs::read(self.folder.join(names::RESULT)).ok()?).ok()
    }

    /// What the process said last, for people.
    pub(super) fn last_words(&self) -> Option<String> {
        let log = fs::read(self.folder.join(names::LOG)).ok()?;
        let text = String::from_utf8_lossy(&log);
        text.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.chars().take(500).collect())
    }

    /// Ends the run in good order: output that has come is written.
    pub(super) fn terminate(&self) {
        if self.child.is_some() {
            self.signal(rustix::process::Signal::TERM);
        } else if let Ok(client) = self.control() {
            // Somebody else's child is asked; one that does not listen is killed later.
            let _ = client.kill(KillRequest::default());
        }
    }

    /// Ends the process at once.
    pub(super) fn kill(&self) {
        // For one that is not our child, and for ours should the signal fail.
        let _ = self.lease.revoke();
        self.signal(rustix::process::Signal::KILL);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        if let Some(child) = &self.child
            && let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed())
        {
            // It may have ended by itself; it has not been waited for, so its number is still its own.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Removes the folder, and what is left of the machine.
    pub(super) fn remove(self) -> io::Result<()> {
        if let Ok(registry) = Registry::open(&self.registry) {
            // A look is enough: what has ended and nobody wants goes with it.
            let _ = registry.list();
        }
        fs::remove_dir_all(&self.folder)
    }
}

/// Makes an attempt's folder and files. Those of its output are there for readers from now on.
fn prepare(folder: &Path, record: &AttemptRecord, deadlines: Deadlines) -> io::Result<Arc<LeaseFile>> {
    fs::create_dir_all(folder)?;
    let text = serde_json::to_vec(record)?;
    write_durably(&folder.join(names::ATTEMPT), &text)?;
    let lease = LeaseFile::create(&folder.join(names::LEASE), deadlines)?;
    for path in &record.output {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        File::create(path)?;
    }
    Ok(Arc::new(lease))
}

/// Starts a monitor with its job's streams.
fn spawn(mut command: Command, folder: &Path, record: &AttemptRecord) -> io::Result<Child> {
    let stdin = match &record.job.spec.stdin {
        Some(path) => {
            let mut file = File::open(path)?;
            if let Some(from) = &record.from {
                file.seek(SeekFrom::Start(from.stdin))?;
            }
            Stdio::from(file)
        }
        None => Stdio::null(),
    };
    let log = File::options().create(true).append(true).open(folder.join(names::LOG))?;
    command.stdin(stdin).stdout(File::create(&record.output[0])?).stderr(log).current_dir("/").spawn()
}

/// Where the monitor puts an output file.
pub(super) fn output_place(folder: &Path, index: usize) -> PathBuf {
    folder.join("outputs").join(index.to_string())
}

/// The flags of what the command may do.
fn limits(limits: &JobLimits) -> Vec<String> {
    let mut flags = Vec::new();
    let values = [
        ("user", limits.user.clone()),
        ("cpu-limit", limits.cpu_percent.map(|percent| percent.to_string())),
        ("memory-limit", limits.memory_bytes.map(|bytes| bytes.to_string())),
        ("process-limit", limits.processes.map(|count| count.to_string())),
        ("disk-limit", limits.disk_bytes.map(|bytes| bytes.to_string())),
    ];
    flags.extend(values.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value?))));
    if limits.isolate {
        flags.push("--isolate".to_owned());
    }
    flags
}

/// The machine's name in the worker's registry.
fn machine_name(key: &LeaseKey) -> String {
    let token: String = key.token.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
    format!("job-{}-{}-{token}", key.job, key.epoch)
}

/// The job's environment: its own variables and those that say which job it is.
fn environment(job: &Job, key: &LeaseKey) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> =
        job.spec.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let mut set = |name: &str, value: String| variables.push((name.to_owned(), value));
    set("HARRIER_JOB_ID", job.id.to_string());
    set("HARRIER_ATTEMPT", key.epoch.to_string());
    // The same in every attempt of the job, another in every other job.
    set("HARRIER_IDEMPOTENCY_KEY", format!("{}-{}", job.id, job.submitted_ms));
    if let Some(array) = job.array {
        set("HARRIER_ARRAY_ID", array.first.to_string());
        set("HARRIER_ARRAY_INDEX", array.index.to_string());
    }
    variables
}

/// Writes a file that is complete or not there.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
