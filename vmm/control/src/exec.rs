//! The machine's side of a stream connection: a command's streams as frames.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::stream::{CommandEnd, FromMachine, INPUT_WINDOW, PAYLOAD_MAX, ToMachine};

/// How long a client may take to hang up after the end.
const HANG_UP: Duration = Duration::from_secs(5);

/// A command that a client is connected to. Calls come from the connection's threads; none may block but `wait`.
pub trait Execution: Send + Sync {
    /// Sends it a signal, 1 to 64.
    fn signal(&self, number: u8);
    /// Gives its terminal a size.
    fn resize(&self, rows: u16, cols: u16);
    /// The client is gone without a word.
    fn client_gone(&self);
    /// Waits for its end, after which nothing is written any more. Called once.
    fn wait(&self) -> CommandEnd;
}

/// A command's streams, as a machine is to use them.
pub struct ExecStreams {
    /// What the client sends; ends when the client says so, or is gone.
    pub stdin: FrameInput,
    /// To the client. After the client has left with the word that the command is to go on, what is written is dropped.
    pub stdout: FrameOutput,
    /// To the client.
    pub stderr: FrameOutput,
}

struct Shared {
    stream: Mutex<UnixStream>,
    /// The client has left, and does not want to be missed.
    detached: AtomicBool,
    /// Input that has come and is not read, in bytes.
    unread: AtomicUsize,
    /// The HTTP answer is written, and frames may be.
    greeted: AtomicBool,
    /// Nobody reads the input any more.
    input_closed: AtomicBool,
    /// The client has said that no more input comes.
    input_ended: AtomicBool,
}

impl Shared {
    fn send(&self, frame: &FromMachine) -> io::Result<()> {
        if self.detached.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        match frame.write(&mut *stream) {
            Err(_) if self.detached.load(Ordering::Acquire) => Ok(()),
            result => result,
        }
    }
}

/// Input from frames.
pub struct FrameInput {
    chunks: Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    read: usize,
    shared: Arc<Shared>,
}

impl FrameInput {
    /// Whether the client has said that no more input comes, as opposed to being gone.
    #[must_use]
    pub fn ended_by_client(&self) -> bool {
        self.shared.input_ended.load(Ordering::Acquire)
    }
}

impl Read for FrameInput {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.read == self.chunk.len() {
            match self.chunks.recv() {
                Ok(chunk) => (self.chunk, self.read) = (chunk, 0),
                Err(_) => return Ok(0),
            }
        }
        let rest = self.chunk.get(self.read..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.read += count;
        self.shared.unread.fetch_sub(count, Ordering::AcqRel);
        // A client that is gone sends no more anyway.
        let _ = self.shared.send(&FromMachine::InputCredit(u32::try_from(count).unwrap_or(0)));
        Ok(count)
    }
}

impl Drop for FrameInput {
    fn drop(&mut self) {
        self.shared.input_closed.store(true, Ordering::SeqCst);
        if self.shared.greeted.load(Ordering::SeqCst) {
            // A client that is gone knows.
            let _ = self.shared.send(&FromMachine::InputClosed);
        }
    }
}

/// Output to frames.
pub struct FrameOutput {
    shared: Arc<Shared>,
    frame: fn(Vec<u8>) -> FromMachine,
}

impl Write for FrameOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(PAYLOAD_MAX)).unwrap_or_default();
        if !piece.is_empty() {
            self.shared.send(&(self.frame)(piece.to_vec()))?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection and the command on it.
pub(crate) struct Connection {
    stream: UnixStream,
    shared: Arc<Shared>,
    input: Sender<Vec<u8>>,
    execution: Arc<dyn Execution>,
}

/// Starts a command with the streams of a connection. `greet` starts it and writes the HTTP answer; what the command
/// writes waits until it has returned.
pub(crate) fn connect(
    stream: UnixStream,
    greet: impl FnOnce(&mut UnixStream, ExecStreams) -> Option<Arc<dyn Execution>>,
) -> io::Result<Option<Connection>> {
    let (input, chunks) = channel();
    let shared = Arc::new(Shared {
        stream: Mutex::new(stream.try_clone()?),
        detached: AtomicBool::new(false),
        unread: AtomicUsize::new(0),
        greeted: AtomicBool::new(false),
        input_closed: AtomicBool::new(false),
        input_ended: AtomicBool::new(false),
    });
    let streams = ExecStreams {
        stdin: FrameInput { chunks, chunk: Vec::new(), read: 0, shared: Arc::clone(&shared) },
        stdout: FrameOutput { shared: Arc::clone(&shared), frame: FromMachine::Stdout },
        stderr: FrameOutput { shared: Arc::clone(&shared), frame: FromMachine::Stderr },
    };
    let mut held = shared.stream.lock().unwrap_or_else(PoisonError::into_inner);
    let greeted = greet(&mut held, streams);
    drop(held);
    let Some(execution) = greeted else { return Ok(None) };
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    shared.greeted.store(true, Ordering::SeqCst);
    if shared.input_closed.load(Ordering::SeqCst) {
        // The second time, if its reader was dropped just now, says nothing new.
        let _ = shared.send(&FromMachine::InputClosed);
    }
    Ok(Some(Connection { stream, shared, input, execution }))
}

impl Connection {
    /// Carries frames until the command has ended or the client is gone.
    pub(crate) fn carry(self) {
        let Connection { stream, shared, input, execution } = self;
        let (told, reached) = (Arc::clone(&shared), Arc::clone(&execution));
        let reader = stream.try_clone().and_then(|mut frames| {
            std::thread::Builder::new().name("control".to_owned()).stack_size(crate::server::STACK).spawn(
                move || {
                    if read_frames(&mut frames, input, &told, reached.as_ref()) {
                        told.detached.store(true, Ordering::Release);
                        // Whoever writes at this moment is woken.
                        let _ = frames.shutdown(Shutdown::Both);
                    } else {
                        reached.client_gone();
                    }
                },
            )
        });
        if let Err(err) = reader {
            log::debug!("control socket: no thread: {err}");
            execution.client_gone();
        }
        let end = execution.wait();
        let _ = shared.send(&FromMachine::Ended(end));
        let _ = stream.shutdown(Shutdown::Write);
        // A connection that is closed with something unread in it is reset, and the client might lose the end.
        let mut entries = [PollFd::new(&stream, PollFlags::RDHUP)];
        let limit = Timespec { tv_sec: i64::try_from(HANG_UP.as_secs()).unwrap_or(0), tv_nsec: 0 };
        let _ = poll(&mut entries, Some(&limit));
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Hands on what the client sends. True: it has left, and the command is to go on.
fn read_frames(
    frames: &mut UnixStream,
    input: Sender<Vec<u8>>,
    shared: &Shared,
    execution: &dyn Execution,
) -> bool {
    let mut input = Some(input);
    loop {
        match ToMachine::read(frames) {
            Ok(Some(ToMachine::Input(bytes))) => {
                let unread = shared.unread.fetch_add(bytes.len(), Ordering::AcqRel) + bytes.len();
                let count = bytes.len();
                match &input {
                    Some(_) if unread > INPUT_WINDOW => return false,
                    Some(open) if open.send(bytes).is_ok() => {}
                    _ => drop(shared.unread.fetch_sub(count, Ordering::AcqRel)),
                }
            }
            Ok(Some(ToMachine::InputEnd)) => {
                shared.input_ended.store(true, Ordering::Release);
                input = None;
            }
            Ok(Some(ToMachine::Resize(rows, cols))) => execution.resize(rows, cols),
            Ok(Some(ToMachine::Signal(number))) => execution.signal(number),
            Ok(Some(ToMachine::Detach)) => return true,
            Ok(None) | Err(_) => return false,
        }
    }
}
