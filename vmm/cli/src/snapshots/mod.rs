//! Snapshots as a user sees them: taken of a machine that runs ([`take`]), made into machines ([`restore`]), and looked
//! after where they lie ([`run`]). What the command line itself has to keep beside a machine is in [`kept`].

mod fork;
mod kept;
mod manage;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use harrier_control::api::{ApiError, MachineState, SnapshotInfo, SnapshotRequest};
use harrier_control::{Client, Registry, unix_ms};
use harrier_machine::MachineHandle;
use harrier_machine::boot::ElfEntry;
use harrier_machine::snapshot::{
    self, Kind, MachineState as SavedMachine, Request, Restoration, Role, TakeError,
};
use harrier_snapshot::{Chain, Snapshot};

use crate::config::{OutputConfig, Restored, RunConfig, Workload};
use crate::exit::Failure;
use crate::files::FilesConfig;
use crate::flags::{RestoreFlags, RunFlags, SnapshotFlags};
use crate::units::parse_time;

pub(crate) use fork::fork;
pub(crate) use kept::{KeptByHost, open_for_copies, open_own_disk, read_session};
pub(crate) use manage::run;

/// The program that writes snapshots.
const PRODUCER: &str = concat!("harrier ", env!("CARGO_PKG_VERSION"));
/// How long a monitor may take for one: as long as a large memory takes to a slow disk.
const TAKE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Where snapshots are kept, unless a folder is given.
fn store() -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HARRIER_SNAPSHOTS")
        .or_else(|| set("XDG_STATE_HOME").map(|state| state.join("harrier/snapshots")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/harrier/snapshots")))
        .ok_or_else(|| Failure::new("no place for snapshots: set HARRIER_SNAPSHOTS, or name a folder"))
}

/// The folder of a snapshot that the user named: a path, or a name where snapshots are kept.
pub(crate) fn find(name: &Path) -> Result<PathBuf, Failure> {
    let is_plain_name = name.components().count() == 1 && !name.as_os_str().is_empty();
    if is_plain_name && !name.exists() {
        let kept = store()?.join(name);
        if kept.exists() {
            return Ok(kept);
        }
    }
    Ok(name.to_owned())
}

/// `harrier snapshot`.
pub(crate) fn take(flags: &SnapshotFlags, registry: &Registry) -> Result<u8, Failure> {
    let entry = registry.find(&flags.machine)?;
    let about = |err: &dyn std::fmt::Display| Failure::new(format!("machine '{}': {err}", entry.record.name));
    let target = match &flags.to {
        Some(target) => std::path::absolute(target)
            .map_err(|err| Failure::new(format!("--to '{}' is no folder ({err})", target.display())))?,
        None => {
            let store = store()?;
            std::fs::create_dir_all(&store).map_err(|err| {
                Failure::new(format!("'{}' cannot be made ({err}): give a folder with --to", store.display()))
            })?;
            store.join(format!("{}-{}", entry.record.name, unix_ms()))
        }
    };
    let target = target
        .into_os_string()
        .into_string()
        .map_err(|target| Failure::new(format!("--to {target:?} is not text: use UTF-8")))?;
    let request = SnapshotRequest { target, diff: flags.diff, resume: flags.resume, image: false };
    let client = Client::new(&entry.folder).with_timeout(TAKE_TIMEOUT);
    let taken = client.snapshot(&request).map_err(|err| about(&err))?;
    let text =
        if flags.json { serde_json::to_string(&taken).map_err(|err| about(&err))? } else { taken.path };
    writeln!(std::io::stdout(), "{text}").map_err(|err| {
        Failure::new(format!("the snapshot is taken, and stdout cannot be written ({err})"))
    })?;
    Ok(0)
}

/// `harrier restore`.
pub(crate) fn restore(
    flags: RestoreFlags,
    runtime_dir: Option<&Path>,
    started: Instant,
) -> Result<u8, Failure> {
    let folder = find(&flags.snapshot)?;
    crate::run::run(flags.into_run(folder), runtime_dir, started)
}

/// The configuration of a machine that is made of the snapshot in `folder`.
pub(crate) fn restored_config(flags: RunFlags, folder: &Path, remarks: bool) -> Result<RunConfig, Failure> {
    let chain = Chain::open(folder)?;
    let saved = SavedMachine::read(chain.snapshot())?;
    let machine = saved.config(chain.snapshot())?;
    let host = kept::HostState::read(chain.snapshot())?;
    let workload = host.workload(chain.snapshot())?;
    let restoration = Restoration {
        role: if flags.clone_index.is_some() { Role::Clone } else { Role::Restored },
        clone_index: flags.clone_index.unwrap_or(0),
        is_parent: flags.image.is_none(),
    };
    let timeout = flags.timeout.as_deref().map(parse_time).transpose();
    if !flags.files.input.is_empty() {
        return Err(Failure::new("--input: the command runs already: copy files in when it is started"));
    }
    let workdir = match &workload {
        Workload::Command(command) => command.workdir.as_deref(),
        Workload::Console => None,
    };
    Ok(RunConfig {
        files: FilesConfig::from_flags(&flags.files, workdir)?,
        interactive: flags.interactive,
        tty: host.tty(),
        engine: flags.engine.parse()?,
        vcpu_count: machine.vcpu_count,
        memory_bytes: machine.memory_bytes,
        cpu_model: Some(machine.cpu_model),
        timeout: timeout.map_err(|err| Failure::new(format!("--timeout: {err}")))?,
        kernel: None,
        initrd: None,
        command_line: String::new(),
        elf_entry: ElfEntry::Auto,
        disks: host.disks(),
        console: flags.console,
        workload,
        output: OutputConfig { json: flags.json, timings: flags.timings, remarks },
        seccomp: !flags.no_seccomp,
        attempt: flags.attempt,
        stderr: flags.stderr,
        restore: Some(Restored { chain: Arc::new(chain), restoration }),
    })
}

type Answer = Result<SnapshotInfo, ApiError>;

/// Takes the snapshots of the machine of this process, in a thread that may open files.
pub(crate) struct Snapshots {
    requests: Mutex<Sender<(SnapshotRequest, Sender<Answer>)>>,
}

impl Snapshots {
    pub(crate) fn start(machine: MachineHandle, mut kept: KeptByHost) -> std::io::Result<Self> {
        let (requests, taken) = channel::<(SnapshotRequest, Sender<Answer>)>();
        std::thread::Builder::new().name("snapshots".to_owned()).spawn(move || {
            for (request, answer) in taken {
                // Whoever asked may be gone; the snapshot is taken all the same.
                let _ = answer.send(take_one(&machine, &mut kept, &request));
            }
        })?;
        Ok(Snapshots { requests: Mutex::new(requests) })
    }

    /// Waits until the snapshot is durable. The state in the answer is left to the caller.
    pub(crate) fn take(&self, request: SnapshotRequest) -> Answer {
        let (answer, answered) = channel();
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || ApiError::internal("the snapshot thread has ended: this is a bug in harrier");
        requests.send((request, answer)).map_err(|_| gone())?;
        drop(requests);
        answered.recv().map_err(|_| gone())?
    }
}

fn take_one(machine: &MachineHandle, kept: &mut KeptByHost, request: &SnapshotRequest) -> Answer {
    let target = Path::new(&request.target);
    if !target.is_absolute() {
        return Err(ApiError::bad_request(format!("'{}' is no absolute path", request.target)));
    }
    let kind = match (request.image, request.diff) {
        (true, true) => return Err(ApiError::bad_request("an image is no difference: ask for one of them")),
        (true, false) => Kind::Image,
        (false, true) => Kind::Difference,
        (false, false) => Kind::Full,
    };
    let report = machine.snapshot(Request {
        target,
        kind,
        stay_paused: false,
        producer: PRODUCER,
        owner: &mut |writer| kept.add_to(writer),
        progress: &mut |_| true,
    });
    let report: snapshot::Report = report.map_err(|err| match err {
        TakeError::Ended | TakeError::Busy | TakeError::NoParent => ApiError::conflict(err.to_string()),
        _ => ApiError::internal(err.to_string()),
    })?;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Ok(SnapshotInfo {
        path: report.snapshot.path().display().to_string(),
        id: report.snapshot.manifest().id.to_string(),
        pause_us: micros(report.pause),
        total_us: micros(report.total),
        pages: report.pages_copied,
        pages_in_pause: report.pages_in_pause,
        state: MachineState::Running,
    })
}

/// What runs in the machine of a snapshot: program and arguments, or nothing.
pub(crate) fn command_words(snapshot: &Snapshot) -> Vec<String> {
    let workload = kept::HostState::read(snapshot).and_then(|host| host.workload(snapshot));
    match workload {
        Ok(Workload::Command(command)) => {
            command.argv.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
        }
        Ok(Workload::Console) => Vec::new(),
        Err(_) => vec!["?".to_owned()],
    }
}
