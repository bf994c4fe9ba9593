//! A file that is copied into the machine or out of it. Its content goes through the same streams as a command's, so that a
//! lost connection or a restored machine goes on where it stood.
//!
//! A file that comes in is written under another name in its folder and gets its own once length and digest are right: nobody
//! in the machine ever sees half of it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use harrier_agent_protocol::flow::{FlowError, ReceiveStream, SendStream};
use harrier_agent_protocol::{
    AgentMessage, Attached, CommandStatus, DATA_MAX, FailureKind, GetSpec, Kept, Outbox, PutSpec, Stream,
    Transferred,
};
use sha2::{Digest, Sha256};

use crate::spawn::StartError;
use crate::sys;
use crate::users;

/// Nothing more is said while this much waits to be sent.
const OUTBOX_FULL: usize = 128 * 1024;

/// One file on its way.
pub(crate) struct Transfer {
    id: u32,
    started_ns: u64,
    stdin: ReceiveStream,
    stdout: SendStream,
    way: Way,
    state: State,
    is_announced: bool,
    end_is_said: bool,
}

enum Way {
    In(Incoming),
    Out(Outgoing),
}

enum State {
    Going,
    Done(Transferred),
    Failed(StartError),
}

/// A file that is written.
struct Incoming {
    spec: PutSpec,
    path: PathBuf,
    /// Until it has its own name.
    temporary: Option<(PathBuf, File)>,
    hash: Sha256,
    bytes: u64,
}

/// A file that is read.
struct Outgoing {
    path: PathBuf,
    max_bytes: u64,
    /// Until its end.
    file: Option<File>,
    mode: u32,
    hash: Sha256,
    bytes: u64,
}

impl Transfer {
    /// Begins to write a file.
    pub(crate) fn put(id: u32, spec: PutSpec) -> Result<Self, StartError> {
        let path = PathBuf::from(OsStr::from_bytes(&spec.path));
        let failed = |error: io::Error| failed("written", &path, &error);
        let owner = spec.owner.as_ref().map(users::find).transpose().map_err(StartError::other)?;
        let folder = path.parent().filter(|_| path.file_name().is_some());
        let folder = folder.ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
        make_folders(folder, owner.as_ref().map(|owner| (owner.uid, owner.gid))).map_err(failed)?;
        let temporary =
            folder.join(format!(".harrier-{id}-{:016x}", u64::from_le_bytes(sys::random_bytes())));
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
        let incoming = |file| Incoming {
            spec,
            path: path.clone(),
            temporary: Some((temporary.clone(), file)),
            hash: Sha256::new(),
            bytes: 0,
        };
        if let Some(owner) = owner
            && let Err(error) = std::os::unix::fs::chown(&temporary, Some(owner.uid), Some(owner.gid))
        {
            drop(incoming(file));
            return Err(failed(error));
        }
        Ok(Self::new(id, Way::In(incoming(file))))
    }

    /// Begins to read a file.
    pub(crate) fn get(id: u32, spec: &GetSpec) -> Result<Self, StartError> {
        let path = PathBuf::from(OsStr::from_bytes(&spec.path));
        let failed = |error: io::Error| failed("read", &path, &error);
        // Whatever it is, opening it must not wait.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a folder" } else { "not a regular file" };
            return Err(StartError::other(format!("{path:?} in the guest is {what}: name a file")));
        }
        if metadata.len() > spec.max_bytes {
            return Err(too_long(&path, spec.max_bytes));
        }
        let mode = metadata.mode() & 0o7777;
        let max_bytes = spec.max_bytes;
        let outgoing = Outgoing { path, max_bytes, file: Some(file), mode, hash: Sha256::new(), bytes: 0 };
        Ok(Self::new(id, Way::Out(outgoing)))
    }

    fn new(id: u32, way: Way) -> Self {
        Self {
            id,
            started_ns: sys::monotonic_ns(),
            stdin: ReceiveStream::default(),
            stdout: SendStream::default(),
            way,
            state: State::Going,
            is_announced: false,
            end_is_said: false,
        }
    }

    /// Where it stands, for the host to go on from.
    pub(crate) fn status(&mut self) -> CommandStatus {
        let stdout = Kept { from: self.stdout.acked(), to: self.stdout.end() };
        let stdin = self.stdin.resume();
        CommandStatus { id: self.id, stdin, signal: 0, outputs: [stdout, Kept::default()] }
    }

    /// A new connection: the host stands here.
    pub(crate) fn resume(&mut self, host: &Attached) -> Result<(), FlowError> {
        (self.is_announced, self.end_is_said) = (false, false);
        let [stdout, _] = host.outputs;
        self.stdout.resume(stdout)
    }

    pub(crate) fn receive_stdin(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FlowError> {
        self.stdin.receive(offset, bytes.len())?;
        if let (Way::In(incoming), State::Going) = (&mut self.way, &self.state)
            && let Err(error) = incoming.write(bytes)
        {
            incoming.discard();
            self.state = State::Failed(error);
        }
        self.stdin.dispose(bytes.len());
        Ok(())
    }

    /// The file that comes in is complete. May be said again.
    pub(crate) fn end_stdin(&mut self) {
        if let (Way::In(incoming), State::Going) = (&mut self.way, &self.state) {
            self.state = match incoming.finish() {
                Ok(file) => State::Done(file),
                Err(error) => {
                    incoming.discard();
                    State::Failed(error)
                }
            };
        }
    }

    pub(crate) fn ack(&mut self, stream: Stream, offset: u64) -> Result<(), FlowError> {
        if stream == Stream::Stdout { self.stdout.ack(offset) } else { Ok(()) }
    }

    /// The host does not want it any more.
    pub(crate) fn close_output(&mut self) {
        if let (Way::Out(_), State::Going) = (&self.way, &self.state) {
            self.state = State::Failed(StartError::other("nobody takes the file"));
        }
    }

    /// Reads as much as can be kept, and says what the host does not know yet.
    pub(crate) fn pump(&mut self, scratch: &mut [u8], outbox: &mut Outbox) {
        let id = self.id;
        if !std::mem::replace(&mut self.is_announced, true) {
            AgentMessage::Started { id, pid: 0, at_ns: self.started_ns }.send(outbox);
        }
        if let (Way::Out(outgoing), State::Going) = (&mut self.way, &self.state) {
            match outgoing.read(&mut self.stdout, scratch) {
                Ok(None) => {}
                Ok(Some(file)) => self.state = State::Done(file),
                Err(error) => self.state = State::Failed(error),
            }
        }
        while outbox.len() < OUTBOX_FULL {
            let Some((offset, bytes)) = self.stdout.next_piece(DATA_MAX) else { break };
            AgentMessage::Output { id, stream: Stream::Stdout, offset, bytes }.send(outbox);
        }
        if let Some(offset) = self.stdin.ack_due() {
            AgentMessage::StdinAck { id, offset }.send(outbox);
        }
        match &self.state {
            State::Done(file) if !self.end_is_said && self.stdout.is_sent() => {
                AgentMessage::Transferred { id, file: *file }.send(outbox);
                self.end_is_said = true;
            }
            State::Failed(StartError { kind, message }) if !self.end_is_said => {
                AgentMessage::Failed { id, kind: *kind, message: message.as_bytes() }.send(outbox);
                self.end_is_said = true;
            }
            State::Going | State::Done(_) | State::Failed(_) => {}
        }
    }
}

impl Incoming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StartError> {
        let Some((_, file)) = &mut self.temporary else { return Ok(()) };
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        if self.bytes > self.spec.bytes {
            let Self { path, spec, .. } = self;
            return Err(StartError::other(format!(
                "{path:?} is longer than the {} bytes announced",
                spec.bytes
            )));
        }
        file.write_all(bytes).map_err(|error| failed("written", &self.path, &error))?;
        self.hash.update(bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<Transferred, StartError> {
        let Some((temporary, file)) = &self.temporary else {
            return Err(StartError::other("the file is complete already"));
        };
        let path = &self.path;
        let sha256: [u8; 32] = self.hash.clone().finalize().into();
        if self.bytes != self.spec.bytes || sha256 != self.spec.sha256 {
            let message = format!(
                "{path:?} did not arrive as it was sent ({} of {} bytes, another SHA-256): it has changed meanwhile",
                self.bytes, self.spec.bytes
            );
            return Err(StartError::other(message));
        }
        // A mode that chown would have taken away comes last.
        file.set_permissions(fs::Permissions::from_mode(self.spec.mode))
            .and_then(|()| fs::rename(temporary, path))
            .map_err(|error| failed("written", path, &error))?;
        self.temporary = None;
        Ok(Transferred { bytes: self.bytes, sha256, mode: self.spec.mode })
    }
}

impl Incoming {
    /// Removes what has come so far, before anybody hears that it failed.
    fn discard(&mut self) {
        if let Some((path, _)) = self.temporary.take() {
            // It has never had its name; a machine that cannot remove it soon ends.
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.discard();
    }
}

impl Outgoing {
    /// Reads while there is room for it; the file once all is read.
    fn read(
        &mut self,
        stream: &mut SendStream,
        scratch: &mut [u8],
    ) -> Result<Option<Transferred>, StartError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        loop {
            let room = stream.room().min(scratch.len());
            let Some(room) = scratch.get_mut(..room).filter(|room| !room.is_empty()) else { return Ok(None) };
            match file.read(room) {
                Ok(0) => break,
                Ok(count) => {
                    let bytes = room.get(..count).unwrap_or_default();
                    self.bytes = self.bytes.saturating_add(count as u64);
                    if self.bytes > self.max_bytes {
                        return Err(too_long(&self.path, self.max_bytes));
                    }
                    self.hash.update(bytes);
                    stream.push(bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", &self.path, &error)),
            }
        }
        self.file = None;
        let sha256 = self.hash.clone().finalize().into();
        Ok(Some(Transferred { bytes: self.bytes, sha256, mode: self.mode }))
    }
}

/// Makes the folders that are missing on the way to a file, for its owner.
fn make_folders(folder: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut missing = Vec::new();
    for ancestor in folder.ancestors() {
        match fs::metadata(ancestor) {
            Ok(metadata) if metadata.is_dir() => break,
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(ancestor),
            Err(error) => return Err(error),
        }
    }
    for folder in missing.into_iter().rev() {
        DirBuilder::new().mode(0o755).create(folder)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::chown(folder, Some(uid), Some(gid))?;
        }
    }
    Ok(())
}

fn failed(what: &str, path: &Path, error: &io::Error) -> StartError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FailureKind::NotFound,
        _ => FailureKind::Other,
    };
    StartError { kind, message: format!("{path:?} in the guest cannot be {what}: {error}") }
}

fn too_long(path: &Path, max_bytes: u64) -> StartError {
    StartError::other(format!("{path:?} in the guest is longer than the {max_bytes} bytes that are taken"))
}
