//! `harrier fork`: clones of a machine that runs, or of a snapshot. What they do not write, they share.
//!
//! A machine that runs is frozen into an image with a short pause; the clones map it, and the last of them takes it
//! away. Every clone is a machine like others, with a monitor of its own, which is a copy of this process ([`clone_process`]).

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use harrier_control::api::{KillRequest, SnapshotRequest};
use harrier_control::{
    Client, Entry, Image, MachineName, NewMachine, Registry, RegistryError, StartError, Started, Starting,
};
use harrier_snapshot::{Chain, Snapshot, unpack};
use serde_json::json;

use super::{TAKE_TIMEOUT, clone_process, find};
use crate::exit::Failure;
use crate::flags::ForkFlags;

/// Clones of one fork at most: each takes a process.
const MAX_CLONES: u32 = 10_000;

/// What the clones are made of.
struct Origin {
    snapshot: PathBuf,
    /// Held until the clones hold it.
    image: Option<Image>,
    /// How long the machine stood still for it.
    pause_us: Option<u64>,
}

/// Makes the clones and prints their ids.
pub(crate) fn fork(flags: &ForkFlags, registry: &Registry) -> Result<u8, Failure> {
    let count: u32 = flags
        .count
        .parse()
        .ok()
        .filter(|count| (1..=MAX_CLONES).contains(count))
        .ok_or_else(|| Failure::new(format!("-n {}: give 1 to {MAX_CLONES}", flags.count)))?;
    let names = names(flags, count)?;
    let origin = match registry.find(&flags.source) {
        Ok(entry) => image_of(&entry, registry)?,
        Err(RegistryError::NotFound(_)) => snapshot_of(&flags.source, registry)?,
        Err(err) => return Err(Failure::new(err)),
    };
    // What is wrong with it is said once, and before anything is started.
    let chain = Chain::open(&origin.snapshot)?;
    let command = super::command_words(chain.snapshot());
    let started = start_all(flags, &origin, &names, command, registry)?;
    let clones: Vec<_> = started.iter().map(|started| &started.record).collect();
    let text = if flags.json {
        let clones: Vec<_> = (0u32..)
            .zip(&clones)
            .map(|(index, clone)| json!({ "id": clone.id, "name": clone.name, "clone_index": index }))
            .collect();
        json!({ "pause_us": origin.pause_us, "clones": clones }).to_string()
    } else {
        clones.iter().map(|clone| clone.id.as_str()).collect::<Vec<_>>().join("\n")
    };
    writeln!(std::io::stdout(), "{text}")
        .map_err(|err| Failure::new(format!("the clones run, and stdout cannot be written ({err})")))?;
    Ok(0)
}

/// A name for each clone, if they are to have them.
fn names(flags: &ForkFlags, count: u32) -> Result<Vec<Option<MachineName>>, Failure> {
    let Some(name) = &flags.name else { return Ok(vec![None; count as usize]) };
    let numbered = |index| if count == 1 { name.clone() } else { format!("{name}-{index}") };
    (0..count).map(|index| Ok(Some(numbered(index).parse()?))).collect()
}

fn image_of(entry: &Entry, registry: &Registry) -> Result<Origin, Failure> {
    let about = |err: &dyn std::fmt::Display| Failure::new(format!("machine '{}': {err}", entry.record.name));
    let image = registry.create_image()?;
    let snapshot = image.snapshot();
    let target =
        snapshot.to_str().ok_or_else(|| about(&"the directory of machines is not text: use UTF-8"))?;
    let request = SnapshotRequest {
        target: target.to_owned(),
        diff: false,
        resume: false,
        image: true,
        compress: false,
    };
    let taken = Client::new(&entry.folder).with_timeout(TAKE_TIMEOUT).snapshot(&request);
    let taken = taken.map_err(|err| about(&err))?;
    Ok(Origin { snapshot, image: Some(image), pause_us: Some(taken.pause_us) })
}

fn snapshot_of(name: &str, registry: &Registry) -> Result<Origin, Failure> {
    let folder = find(Path::new(name))?;
    if !folder.exists() {
        return Err(Failure::new(format!(
            "there is neither a machine nor a snapshot '{name}': 'harrier ps' and 'harrier snapshots ls' list them"
        )));
    }
    let snapshot = Snapshot::open(&folder)?.path().to_owned();
    let snapshot = std::path::absolute(&snapshot).unwrap_or(snapshot);
    let chain = Chain::open(&snapshot)?;
    if chain.is_packed() {
        // Unpacked once, and not by each clone for itself.
        let image = registry.create_image()?;
        unpack(&chain, &image.snapshot(), super::PRODUCER)?;
        return Ok(Origin { snapshot: image.snapshot(), image: Some(image), pause_us: None });
    }
    Ok(Origin { snapshot, image: None, pause_us: None })
}

/// Starts all clones, a few at a time; if one does not start, none is left.
fn start_all(
    flags: &ForkFlags,
    origin: &Origin,
    names: &[Option<MachineName>],
    command: Vec<String>,
    registry: &Registry,
) -> Result<Vec<Started>, Failure> {
    clone_process::prepare();
    let begin = |index: u32, name: &Option<MachineName>| {
        let new = NewMachine {
            name: name.clone(),
            command: command.clone(),
            detached: true,
            auto_remove: flags.rm,
        };
        let claim = registry.create(new)?;
        let args = arguments(flags, origin, index);
        claim.begin(|handover| clone_process::start(handover, args)).map_err(failure_of)
    };
    let at_a_time = std::thread::available_parallelism().map_or(2, NonZeroUsize::get).saturating_mul(2);
    let mut starting = VecDeque::new();
    let mut started = Vec::new();
    let mut failed: Option<Failure> = None;
    let mut next = (0u32..).zip(names);
    loop {
        while failed.is_none()
            && starting.len() < at_a_time
            && let Some((index, name)) = next.next()
        {
            match begin(index, name) {
                Ok(clone) => starting.push_back(clone),
                Err(failure) => failed = Some(failure),
            }
        }
        let Some(clone): Option<Starting> = starting.pop_front() else { break };
        match clone.wait() {
            Ok(clone) => started.push(clone),
            Err(err) => {
                failed.get_or_insert(failure_of(err));
            }
        }
    }
    match failed {
        None => Ok(started),
        Some(failure) => {
            for clone in started {
                undo(clone, registry);
            }
            Err(failure)
        }
    }
}

fn failure_of(err: StartError) -> Failure {
    match err {
        StartError::Failed { exit_code, message } => Failure { code: exit_code, message },
        other => Failure::new(other),
    }
}

/// The command line of a clone's monitor.
fn arguments(flags: &ForkFlags, origin: &Origin, index: u32) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["restore", "--detach", "--engine", &flags.engine].map(Into::into).into();
    arguments.extend(["--clone-index".into(), index.to_string().into()]);
    if let Some(image) = &origin.image {
        arguments.extend(["--image".into(), image.folder().into()]);
    }
    if let Some(timeout) = &flags.timeout {
        arguments.extend(["--timeout".into(), timeout.into()]);
    }
    if flags.interactive {
        arguments.push("--interactive".into());
    }
    if flags.no_seccomp {
        arguments.push("--no-seccomp".into());
    }
    arguments.extend(["--".into(), origin.snapshot.clone().into()]);
    arguments
}

/// Ends a clone and leaves nothing of it.
fn undo(mut clone: Started, registry: &Registry) {
    // One that has ended meanwhile is as good.
    let _ = Client::new(&clone.folder).kill(KillRequest::default());
    let _ = clone.monitor.wait();
    if let Ok(entry) = registry.find(clone.record.id.as_str())
        && let Err(err) = registry.remove(&entry)
    {
        log::warn!("{err}");
    }
}
