//! Machines that serve one job after another, for jobs that allow it: those of one user that ask for the same kind of
//! machine. Each is a `harrier run` whose own command only waits; jobs are further commands in it.
//!
//! Such a machine ends with its worker: its command's stdin is a pipe that the worker holds, and its lease is the
//! worker's to move on. It is used again only after a job that came to its own end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use harrier_control::Registry;

use super::lease_file::{Deadlines, LeaseFile, now_ns};
use super::monitor::names;
use super::warm::{Kind, Warm};
use crate::queue::{Job, JobSpec};
use crate::store::random_word;

/// How long a machine without a job is kept.
const IDLE: Duration = Duration::from_secs(60);
/// How long a machine outlives a worker that hangs.
const LEASE: Duration = Duration::from_secs(30);
/// How often its lease is moved on.
const RENEWAL: Duration = Duration::from_secs(1);
/// How long one may take to come up, and how often that is looked at.
const START: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(3);
/// What waits for the end of its stdin, in any image.
const WAITING: [&str; 3] = ["/bin/sh", "-c", "read line"];

/// Whose jobs a machine may serve.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner {
    user: String,
    kind: Kind,
}

impl Owner {
    fn of(job: &Job) -> Option<Self> {
        Some(Self { user: job.user.clone(), kind: Kind::of(&job.spec)? })
    }
}

/// A machine; it ends when this is dropped.
pub(super) struct Machine {
    owner: Owner,
    name: String,
    folder: PathBuf,
    registry: PathBuf,
    lease: Arc<LeaseFile>,
    child: Child,
    /// Open as long as it may live.
    _stdin: Option<ChildStdin>,
    memory_bytes: u64,
    idle_since: Instant,
}

impl Machine {
    /// Its name in the worker's registry.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The process of its monitor.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.lease.revoke();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Ok(registry) = Registry::open(&self.registry) {
            // A look is enough: what has ended and nobody wants goes with it.
            let _ = registry.list();
        }
        // The next worker looks at what is left.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A worker's machines for jobs that follow each other.
pub(super) struct Machines {
    program: PathBuf,
    run_flags: Vec<OsString>,
    folder: PathBuf,
    registry: PathBuf,
    warm: Arc<Warm>,
    idle: Mutex<Vec<Machine>>,
    leases: Mutex<(Option<Instant>, Vec<Weak<LeaseFile>>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machines {
    /// Machines below `state`.
    pub(super) fn new(
        program: &Path,
        state: &Path,
        registry: &Path,
        run_flags: &[OsString],
        warm: &Arc<Warm>,
    ) -> io::Result<Arc<Self>> {
        // Those of an earlier worker have ended with it.
        let folder = super::empty_folder(state.join("reuse"))?;
        Ok(Arc::new(Self {
            program: program.to_owned(),
            run_flags: run_flags.to_owned(),
            folder,
            registry: registry.to_owned(),
            warm: warm.clone(),
            idle: Mutex::default(),
            leases: Mutex::default(),
        }))
    }

    /// A machine that is free for a job.
    pub(super) fn take(&self, job: &Job) -> Option<Machine> {
        let owner = Owner::of(job)?;
        let mut idle = lock(&self.idle);
        let place = idle.iter().rposition(|machine| machine.owner == owner)?;
        Some(idle.remove(place))
    }

    /// Starts a machine for a job, and waits until its guest is up.
    pub(super) fn start(&self, job: &Job, given_up: &dyn Fn() -> bool) -> Result<Machine, String> {
        let owner = Owner::of(job).ok_or("its root file system is not there")?;
        let mut machine = self.spawn(owner, &job.spec).map_err(|err| err.to_string())?;
        let begun = Instant::now();
        let started = machine.folder.join(names::STARTED);
        while !started.exists() {
            if given_up() || begun.elapsed() > START {
                return Err(format!("the machine is not up after {:.0?}", begun.elapsed()));
            }
            if !matches!(machine.child.try_wait(), Ok(None)) {
                let log = fs::read_to_string(machine.folder.join(names::LOG)).unwrap_or_default();
                let last = log.lines().rfind(|line| !line.trim().is_empty());
                return Err(last.unwrap_or("its monitor ended without a word").to_owned());
            }
            thread::sleep(LOOK);
        }
        Ok(machine)
    }

    fn spawn(&self, owner: Owner, spec: &JobSpec) -> io::Result<Machine> {
        let name = format!("reuse-{}", random_word());
        let folder = self.folder.join(&name);
        fs::create_dir_all(&folder)?;
        let lease = Arc::new(LeaseFile::create(&folder.join(names::LEASE), kept())?);
        lock(&self.leases).1.push(Arc::downgrade(&lease));
        let mut command = Command::new(&self.program);
        command.arg("--runtime-dir").arg(&self.registry).args(["run", "--name", &name, "--quiet"]);
        command.arg("--attempt").arg(&folder).args(&self.run_flags).args(["--engine", &spec.engine]);
        command.args(["--cpus", &spec.cpus.to_string(), "--memory", &spec.memory_bytes.to_string()]);
        if let Some(model) = &spec.cpu_model {
            command.args(["--cpu-model", model]);
        }
        if let Some(rootfs) = &spec.rootfs {
            command.args(["--rootfs", rootfs]);
        }
        if let Some(template) = self.warm.template(spec) {
            command.arg("--warm").arg(template);
        }
        let log = File::create(folder.join(names::LOG))?;
        command.arg("--").args(WAITING).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let mut child = command.current_dir("/").spawn()?;
        Ok(Machine {
            owner,
            name,
            folder,
            registry: self.registry.clone(),
            lease,
            _stdin: child.stdin.take(),
            child,
            memory_bytes: spec.memory_bytes,
            idle_since: Instant::now(),
        })
    }

    /// A job has come to its end in a machine, which waits for the next.
    pub(super) fn put(&self, mut machine: Machine) {
        if matches!(machine.child.try_wait(), Ok(None)) {
            machine.idle_since = Instant::now();
            lock(&self.idle).push(machine);
        }
    }

    /// Moves the leases on.
    pub(super) fn keep(&self) {
        let mut leases = lock(&self.leases);
        if leases.0.is_some_and(|at| at.elapsed() < RENEWAL) {
            return;
        }
        leases.0 = Some(Instant::now());
        leases.1.retain(|lease| {
            // One that cannot be written ends its machine, and the job in it is tried again.
            lease.upgrade().is_some_and(|lease| lease.set(kept()).is_ok())
        });
    }

    /// Ends machines without a job: those that have waited for long, and the oldest of more than there is room for.
    pub(super) fn shrink(&self, slots: u32, memory_bytes: u64) {
        let mut ended = Vec::new();
        let mut idle = lock(&self.idle);
        // The last one was used last.
        while idle.first().is_some_and(|machine| machine.idle_since.elapsed() > IDLE)
            || idle.len() > usize::try_from(slots).unwrap_or(usize::MAX)
            || idle.iter().map(|machine| machine.memory_bytes).sum::<u64>() > memory_bytes
        {
            ended.push(idle.remove(0));
        }
        drop(idle);
        // Their processes are waited for here, where nobody waits for the lock.
        drop(ended);
    }
}

/// A machine stands still for no lease but its job's.
fn kept() -> Deadlines {
    let until_ns = Deadlines::of(now_ns(), LEASE).until_ns;
    Deadlines { stand_ns: until_ns, until_ns }
}
