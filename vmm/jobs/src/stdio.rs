//! The host's endpoints of a command's streams, each on a thread of its own: a reader or writer that stands still holds
//! up nothing but its stream.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use harrier_agent_protocol::{DATA_MAX, Stream};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::control::{CommandEvent as Event, CommandSender};

/// Where output goes. It is written on a thread of its own.
pub type Output = Box<dyn Write + Send>;

/// Where a command's input comes from.
pub enum Stdin {
    /// Nothing: the command sees the end of its input at once.
    Empty,
    /// A file descriptor, read as the command takes it, and no longer than it does.
    Fd(OwnedFd),
    /// Anything else. A read that blocks may outlast the command, and then leaves its thread behind.
    Reader(Box<dyn Read + Send>),
}

/// The endpoints of a command's three streams.
pub struct Stdio {
    /// Read for the command.
    pub stdin: Stdin,
    /// What the command writes to stdout, or to its terminal.
    pub stdout: Output,
    /// What the command writes to stderr.
    pub stderr: Output,
}

impl Stdio {
    /// This process's own standard streams, duplicated.
    pub fn inherit() -> io::Result<Self> {
        let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        Ok(Self {
            stdin: Stdin::Fd(duplicate(io::stdin().as_fd())?),
            stdout: Box::new(FdOutput::new(duplicate(io::stdout().as_fd())?)),
            stderr: Box::new(FdOutput::new(duplicate(io::stderr().as_fd())?)),
        })
    }
}

/// Writes to a file descriptor, also to one that another process has made non-blocking.
#[derive(Debug)]
pub struct FdOutput(File);

impl FdOutput {
    /// Takes over the descriptor; its mode is left as it is, since others may share it.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl Write for FdOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_for(&self.0, PollFlags::OUT)?,
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait_for(fd: impl AsFd, events: PollFlags) -> io::Result<()> {
    let mut entries = [PollFd::from_borrowed_fd(fd.as_fd(), events)];
    match poll(&mut entries, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The writing thread of one output stream.
pub(crate) struct Sink {
    chunks: Option<Sender<Vec<u8>>>,
    /// What the thread has said at its end.
    pub(crate) ended: bool,
    pub(crate) error: Option<io::Error>,
}

impl Sink {
    pub(crate) fn start(stream: Stream, output: Output, events: CommandSender) -> io::Result<Self> {
        let (chunks, queue) = channel();
        let name = if stream == Stream::Stdout { "stdout" } else { "stderr" };
        thread::Builder::new().name(name.into()).spawn(move || {
            let result = write_chunks(stream, output, &queue, &events);
            // From here on `Sink::write` drops what comes.
            drop(queue);
            events.send(Event::OutputEnd(stream, result.err()));
        })?;
        Ok(Self { chunks: Some(chunks), ended: false, error: None })
    }

    /// Hands over a chunk. How much is on its way is bounded by the stream's window.
    pub(crate) fn write(&self, bytes: &[u8]) {
        if let Some(chunks) = &self.chunks {
            // A thread that has ended has said why.
            let _ = chunks.send(bytes.to_vec());
        }
    }

    /// No more comes; the thread ends once all is written.
    pub(crate) fn finish(&mut self) {
        self.chunks = None;
    }
}

fn write_chunks(
    stream: Stream,
    mut output: Output,
    queue: &Receiver<Vec<u8>>,
    events: &CommandSender,
) -> io::Result<()> {
    while let Ok(chunk) = queue.recv() {
        output.write_all(&chunk)?;
        output.flush()?;
        events.send(Event::Written(stream, chunk.len()));
    }
    Ok(())
}

/// The reading thread of stdin. It reads what there is credit for, and nothing ahead of it.
pub(crate) struct Source {
    credits: Sender<usize>,
    stop: Option<Arc<OwnedFd>>,
}

impl Source {
    pub(crate) fn start(stdin: Stdin, events: CommandSender) -> io::Result<Self> {
        let (credits, queue) = channel();
        let mut stop = None;
        let mut input = match stdin {
            Stdin::Empty => Input::Reader(Box::new(io::empty())),
            Stdin::Reader(reader) => Input::Reader(reader),
            Stdin::Fd(fd) => {
                let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
                stop = Some(Arc::clone(&event));
                Input::Fd { file: fd.into(), stop: event }
            }
        };
        thread::Builder::new().name("stdin".into()).spawn(move || {
            let end = read_chunks(&mut input, &queue, &events);
            if let Some(end) = end {
                events.send(Event::InputEnd(end.err()));
            }
        })?;
        Ok(Self { credits, stop })
    }

    /// Lets the thread read so many bytes more.
    pub(crate) fn credit(&self, bytes: usize) {
        // A thread that has ended needs none.
        let _ = self.credits.send(bytes);
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(stop) = &self.stop {
            // The counter is zero until this one write.
            let _ = rustix::io::write(stop, &1_u64.to_ne_bytes());
        }
    }
}

/// Reads until the input ends (`Some`) or nobody wants it any more (`None`).
fn read_chunks(
    input: &mut Input,
    credits: &Receiver<usize>,
    events: &CommandSender,
) -> Option<io::Result<()>> {
    let mut buffer = vec![0; DATA_MAX];
    let mut credit = 0_usize;
    loop {
        // Reading nothing would look like the end.
        while credit == 0 {
            credit = credits.recv().ok()?;
        }
        credit = credits.try_iter().fold(credit, usize::saturating_add);
        let room = buffer.get_mut(..credit.min(DATA_MAX)).unwrap_or_default();
        match input.read(room) {
            Ok(None) => return None,
            Ok(Some(0)) => return Some(Ok(())),
            Ok(Some(count)) => {
                credit = credit.saturating_sub(count);
                events.send(Event::Input(room.get(..count).unwrap_or_default().to_vec()));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Some(Err(error)),
        }
    }
}

/// What the reading thread reads.
enum Input {
    Reader(Box<dyn Read + Send>),
    Fd { file: File, stop: Arc<OwnedFd> },
}

impl Input {
    /// Reads once, blocking; zero is the end, `None` says that nobody wants any more.
    fn read(&mut self, room: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Self::Reader(reader) => reader.read(room).map(Some),
            Self::Fd { file, stop } => read_unless_stopped(file, stop, room),
        }
    }
}

fn read_unless_stopped(file: &mut File, stop: &OwnedFd, room: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        let mut entries = [
            PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut entries, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        let [input, stopped] = entries.map(|entry| !entry.revents().is_empty());
        if stopped {
            return Ok(None);
        }
        if input {
            match file.read(room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result.map(Some),
            }
        }
    }
}
