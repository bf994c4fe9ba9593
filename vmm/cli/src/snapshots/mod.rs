//! Snapshots as a user sees them: taken of a machine that runs ([`take`]), made into machines ([`restore`]), and looked
//! after where they lie ([`run`]). What the command line itself has to keep beside a machine is in [`kept`].

mod clone_process;
mod fork;
mod kept;
mod manage;
mod taker;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_control::api::SnapshotRequest;
use harrier_control::{Client, Registry, unix_ms};
use harrier_machine::boot::ElfEntry;
use harrier_machine::snapshot::{MachineState as SavedMachine, Restoration, Role};
use harrier_snapshot::{Chain, Snapshot};

use crate::config::{OutputConfig, Restored, RunConfig, Workload};
use crate::exit::Failure;
use crate::files::FilesConfig;
use crate::flags::{RestoreFlags, RunFlags, SnapshotFlags};
use crate::limits::LimitsConfig;
use crate::units::parse_time;

pub(crate) use fork::fork;
pub(crate) use kept::{KeptByHost, SESSION_VERSION, open_own_disk, read_session};
pub(crate) use manage::run;
pub(crate) use taker::{Checkpoints, Snapshots};

/// The program that writes snapshots.
pub(crate) const PRODUCER: &str = concat!("harrier ", env!("CARGO_PKG_VERSION"));
/// How long a monitor may take for one: as long as a large memory takes to a slow disk.
const TAKE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// How long a guest that wants to be asked may take to come to rest.
const QUIESCE_LIMIT: Duration = Duration::from_secs(1);

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
    let request = SnapshotRequest {
        target,
        diff: flags.diff,
        resume: flags.resume,
        image: false,
        compress: flags.compress,
    };
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
    if !flags.files.input.is_empty() || !flags.files.input_as.is_empty() {
        return Err(Failure::new("--input: the command runs already: copy files in when it is started"));
    }
    let workdir = match &workload {
        Workload::Command(command) => command.workdir.as_deref(),
        Workload::Console => None,
    };
    Ok(RunConfig {
        files: FilesConfig::from_flags(&flags.files, workdir)?,
        limits: LimitsConfig::default(),
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
        output: OutputConfig { json: flags.json, timings: flags.timings, remarks, quiet: flags.quiet },
        seccomp: !flags.no_seccomp,
        attempt: flags.attempt,
        hang_limit: crate::config::hang_limit(flags.hang_limit.as_deref())?,
        stderr: flags.stderr,
        template: None,
        is_warm: false,
        checkpoints: crate::config::parse_checkpoints(&flags.checkpoints)?,
        restore: Some(Restored { chain: Arc::new(chain), restoration }),
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
