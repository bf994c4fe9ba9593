//! What the command line keeps in a snapshot beside the machine: which disks it has, with the content of those that the
//! guest can write, what runs in it, and how far the session with its agent has come.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use harrier_devices::virtio::block::Block;
use harrier_devices::virtio::block_copy::{DiskCopies, DiskCopy};
use harrier_devices::virtio::disk::{Base, BlockMap, DiskFile, Layer};
use harrier_jobs::{Session, SessionState};
use harrier_machine::snapshot::{HOST_PREFIX, Kind};
use harrier_snapshot::{
    Chain, DiskLayer, Section, Snapshot, SnapshotId, SnapshotWriter, layer_name, nameless_beside, seal_layer,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{CommandConfig, DiskConfig, RunConfig, Workload};
use crate::exit::Failure;

const VERSION: u32 = 1;

fn section_name() -> String {
    format!("{HOST_PREFIX}run")
}

/// The session's state has a version of its own inside.
pub(crate) const SESSION_VERSION: u32 = 1;

fn session_section_name() -> String {
    harrier_jobs::session::SECTION.to_owned()
}

/// The section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostState {
    /// What runs under the agent; none for a plain boot.
    command: Option<HostCommand>,
    /// The image of the root file system, which nobody writes.
    rootfs: Option<PathBuf>,
    /// Further disks in their order.
    disks: Vec<HostDisk>,
}

/// The command that the machine was started for, as far as it is text. The agent knows it better: this is for people and for
/// what is executed beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostCommand {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    workdir: Option<String>,
    /// It has a terminal.
    tty: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostDisk {
    /// Where it was. A read-only disk is opened there again; one that is written is in the snapshot.
    path: PathBuf,
    read_only: bool,
}

impl HostState {
    fn of(config: &RunConfig) -> Self {
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let command = match &config.workload {
            Workload::Command(command) => Some(command),
            Workload::Console => None,
        };
        HostState {
            command: command.map(|command| HostCommand {
                argv: command.argv.iter().map(text).collect(),
                env: command.env.iter().map(|(name, value)| (text(name), text(value))).collect(),
                workdir: command.workdir.as_ref().map(text),
                tty: config.tty,
            }),
            rootfs: command.and_then(|command| command.rootfs.as_deref()).map(absolute),
            disks: config
                .disks
                .iter()
                .map(|disk| HostDisk { path: absolute(&disk.path), read_only: disk.read_only })
                .collect(),
        }
    }

    pub(crate) fn read(snapshot: &Snapshot) -> Result<Self, Failure> {
        read_section(snapshot, &section_name(), VERSION)
    }

    pub(crate) fn disks(&self) -> Vec<DiskConfig> {
        let disk = |disk: &HostDisk| DiskConfig { path: disk.path.clone(), read_only: disk.read_only };
        self.disks.iter().map(disk).collect()
    }

    pub(crate) fn workload(&self, snapshot: &Snapshot) -> Result<Workload, Failure> {
        let Some(command) = &self.command else { return Ok(Workload::Console) };
        if command.argv.is_empty() {
            let path = snapshot.path().display();
            return Err(Failure::new(format!("snapshot '{path}': it has an empty command")));
        }
        let bytes = |text: &String| text.as_bytes().to_vec();
        Ok(Workload::Command(CommandConfig {
            argv: command.argv.iter().map(bytes).collect(),
            env: command.env.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
            workdir: command.workdir.as_ref().map(bytes),
            rootfs: self.rootfs.clone(),
        }))
    }

    /// Whether the command has a terminal.
    pub(crate) fn tty(&self) -> bool {
        self.command.as_ref().is_some_and(|command| command.tty)
    }
}

/// How far the session with the agent of a snapshot's machine had come.
pub(crate) fn read_session(snapshot: &Snapshot) -> Result<SessionState, Failure> {
    read_section(snapshot, &session_section_name(), SESSION_VERSION)
}

fn read_section<T: DeserializeOwned>(snapshot: &Snapshot, name: &str, known: u32) -> Result<T, Failure> {
    let section = snapshot.section(name)?;
    let wrong = |reason: String| {
        Failure::new(format!("snapshot '{}': section '{name}': {reason}", snapshot.path().display()))
    };
    if section.version != known {
        return Err(wrong(format!("version {} is unknown, this harrier has {known}", section.version)));
    }
    serde_json::from_slice(&section.bytes).map_err(|err| wrong(err.to_string()))
}

/// What a snapshot of the machine of this process keeps.
pub(crate) struct KeptByHost {
    state: HostState,
    /// Disks that the guest writes: their number, and who copies them.
    disks: Vec<(usize, DiskCopies)>,
    /// With the agent, if there is one.
    session: Option<Session>,
}

impl KeptByHost {
    pub(crate) fn new(config: &RunConfig) -> Self {
        KeptByHost { state: HostState::of(config), disks: Vec::new(), session: None }
    }

    /// Has the session with the agent kept.
    pub(crate) fn keep_session(&mut self, session: Session) {
        self.session = Some(session);
    }

    /// The session with the agent, if there is one.
    pub(crate) fn session(&self) -> Option<Session> {
        self.session.clone()
    }

    /// Has the content of a disk kept, unless it is read-only.
    pub(crate) fn keep_disk(&mut self, index: usize, block: &Block) {
        if let Some(copies) = block.copies() {
            self.disks.push((index, copies));
        }
    }

    /// Adds it to a snapshot. The machine stands still, so that memory and disks agree; copies of disks are only begun, and to
    /// be finished when it goes on.
    pub(crate) fn add_to(
        &mut self,
        writer: &mut SnapshotWriter<'_>,
        kind: Kind,
    ) -> Result<Vec<BegunCopy>, String> {
        let bytes = serde_json::to_vec(&self.state).map_err(|err| err.to_string())?;
        writer.add_section(Section { name: section_name(), version: VERSION, bytes });
        if let Some(session) = &self.session {
            let state = session.state().map_err(|err| err.to_string())?;
            if state.commands.is_empty() {
                return Err("the machine's command has not started yet, or has ended".to_owned());
            }
            let bytes = serde_json::to_vec(&state).map_err(|err| err.to_string())?;
            writer.add_section(Section { name: session_section_name(), version: SESSION_VERSION, bytes });
        }
        let mut begun = Vec::new();
        for (index, copies) in &self.disks {
            begun.push(
                BegunCopy::begin(*index, copies, writer, kind).map_err(|err| cannot_copy(*index, &err))?,
            );
        }
        Ok(begun)
    }
}

/// A copy of a disk that is begun.
pub(crate) struct BegunCopy {
    index: usize,
    /// None where the file system has shared its blocks: then it is there already.
    copy: Option<Arc<DiskCopy>>,
    /// Of a difference, the file that is to be sealed.
    layer: Option<(File, SnapshotId)>,
    disk_bytes: u64,
    copies: DiskCopies,
    /// What had changed before; it counts again if there is no snapshot after all.
    changed: Option<Vec<(u64, u64)>>,
}

impl BegunCopy {
    fn begin(
        index: usize,
        copies: &DiskCopies,
        writer: &mut SnapshotWriter<'_>,
        kind: Kind,
    ) -> io::Result<Self> {
        let mut begun = BegunCopy {
            index,
            copy: None,
            layer: None,
            disk_bytes: copies.file().len(),
            copies: copies.clone(),
            // An image is never a parent.
            changed: (kind != Kind::Image).then(|| copies.take_changed()),
        };
        let name = disk_file(index);
        if kind == Kind::Difference {
            let to = writer.create_file(&layer_name(&name)).map_err(io::Error::other)?;
            begun.copy = Some(copies.begin(to.try_clone()?, begun.changed.as_deref())?);
            begun.layer = Some((to, writer.id()));
        } else {
            let to = writer.create_file(&name).map_err(io::Error::other)?;
            // Where the file system shares blocks, the copy is there at once.
            let shared =
                copies.file().as_whole().is_some_and(|from| rustix::fs::ioctl_ficlone(&to, from).is_ok());
            if !shared {
                begun.copy = Some(copies.begin(to, None)?);
            }
        }
        Ok(begun)
    }

    /// Copies what the guest has not made it copy.
    pub(crate) fn finish(&self) -> Result<(), String> {
        let finish = || {
            self.copy.as_ref().map_or(Ok(()), |copy| copy.finish())?;
            match &self.layer {
                Some((file, id)) => {
                    let changed = self.changed.as_deref().unwrap_or_default();
                    seal_layer(file, *id, self.disk_bytes, changed.iter().copied())
                }
                None => Ok(()),
            }
        };
        finish().map_err(|err| cannot_copy(self.index, &err))
    }

    /// The snapshot is there: the next difference is one to it.
    pub(crate) fn keep(mut self) {
        self.changed = None;
    }
}

impl Drop for BegunCopy {
    fn drop(&mut self) {
        if let Some(changed) = self.changed.take() {
            self.copies.put_back_changed(&changed);
        }
    }
}

fn cannot_copy(index: usize, err: &io::Error) -> String {
    format!("disk {index} cannot be copied: {err}")
}

/// Name of a disk in a snapshot.
fn disk_file(index: usize) -> String {
    format!("disk-{index}")
}

/// A disk of a machine that is made of a snapshot: this machine's alone, and it goes with it. Where the file system can share
/// blocks with one file it is a copy; else what the guest writes goes to a file that lies over those of the snapshots.
pub(crate) fn open_own_disk(chain: &Chain, index: usize, disk: &DiskConfig) -> Result<Block, Failure> {
    let kept = chain.disk(&disk_file(index))?;
    let failed = |err: io::Error| {
        Failure::new(format!("disk {index} gets no file of its own ({err}): make room beside the snapshot"))
    };
    let own = nameless_beside(chain.snapshot().path()).map_err(failed)?;
    let name = disk.path.file_name().map(|name| name.as_encoded_bytes().to_owned()).unwrap_or_default();
    let is_shared = kept.layers.is_empty() && rustix::fs::ioctl_ficlone(&own, &kept.base).is_ok();
    let file = if is_shared {
        DiskFile::whole(own)
    } else {
        let layer = |layer: DiskLayer| {
            let blocks = BlockMap::from_words(layer.disk_bytes, layer.blocks.words());
            Layer { file: layer.file, blocks }
        };
        let layers = kept.layers.into_iter().map(layer).collect();
        DiskFile::over(Base { layers, bottom: kept.base }, own, kept.bytes)
    };
    Ok(Block::from_disk(file.map_err(failed)?, false, &name))
}
