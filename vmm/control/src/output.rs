//! What a command prints, kept in its machine's folder: stdout and stderr apart, as they came, and a file with the times.
//!
//! `times.log` has a line for each piece: the time in nanoseconds since 1970, `stdout` or `stderr`, where in that
//! stream's file the piece begins, and its length in bytes; or the time, `lost` and a number of bytes that could not be
//! kept. A line comes after the bytes that it is about.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use crate::api::OutputInfo;
use crate::registry::MachineFolder;
use crate::time::unix_ns;

const TIMES: &str = "times.log";
/// Longest line about a piece, in bytes.
const LINE_MAX: u64 = 80;
/// Longest piece that a reader gives at once, in bytes.
const PIECE_MAX: u64 = 256 << 10;

/// One of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output, the output of a terminal, or a console.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout.log",
            Self::Stderr => "stderr.log",
        }
    }
}

/// The writing side. A disk that is full costs output, and nothing else; so does output beyond a limit, of which the first part
/// is kept and the rest is told as lost.
#[derive(Debug)]
pub struct OutputLog {
    files: Mutex<Files>,
}

#[derive(Debug)]
struct Files {
    streams: [StreamFile; 2],
    times: File,
    times_len: u64,
    /// Bytes of all three files at most, but for what is told of losses.
    limit: u64,
    /// Bytes that `times.log` does not know to be lost yet.
    untold_loss: u64,
    /// Those that it knows of.
    told_loss: u64,
    lost: u64,
    error: Option<String>,
}

#[derive(Debug)]
struct StreamFile {
    file: File,
    len: u64,
    came: u64,
}

impl OutputLog {
    /// Makes the files, which may hold `limit_bytes` together.
    ///
    /// # Errors
    /// The host's.
    pub fn create(folder: &MachineFolder, limit_bytes: u64) -> io::Result<Arc<Self>> {
        let create = |name: &str| {
            File::options().write(true).create_new(true).mode(0o600).open(folder.path().join(name))
        };
        let stream = |stream: Stream| {
            Ok::<_, io::Error>(StreamFile { file: create(stream.file_name())?, len: 0, came: 0 })
        };
        let files = Files {
            streams: [stream(Stream::Stdout)?, stream(Stream::Stderr)?],
            times: create(TIMES)?,
            times_len: 0,
            limit: limit_bytes,
            untold_loss: 0,
            told_loss: 0,
            lost: 0,
            error: None,
        };
        Ok(Arc::new(Self { files: Mutex::new(files) }))
    }

    /// Where a stream is written to. Writing never fails.
    #[must_use]
    pub fn writer(self: &Arc<Self>, stream: Stream) -> OutputWriter {
        OutputWriter { log: Arc::clone(self), stream }
    }

    /// What has been kept so far.
    #[must_use]
    pub fn info(&self) -> OutputInfo {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let [stdout, stderr] = &files.streams;
        OutputInfo {
            stdout_bytes: stdout.came,
            stderr_bytes: stderr.came,
            lost_bytes: files.lost,
            error: files.error.clone(),
        }
    }

    fn keep(&self, stream: Stream, bytes: &[u8]) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err((kept, err)) = files.keep(stream, bytes) {
            let lost = (bytes.len() - kept.min(bytes.len())) as u64;
            files.lost += lost;
            files.untold_loss += lost;
            if files.error.is_none() {
                log::error!("the command's output cannot be kept ({err}): some of it is lost");
            }
            files.error = Some(err.to_string());
        }
    }
}

impl Drop for OutputLog {
    fn drop(&mut self) {
        self.files.get_mut().unwrap_or_else(PoisonError::into_inner).tell_loss(unix_ns());
    }
}

impl Files {
    /// Keeps a piece; otherwise says how much of it was kept.
    fn keep(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let now = unix_ns();
        let used = self.times_len + self.streams.iter().map(|stream| stream.len).sum::<u64>();
        let room = self.limit.saturating_sub(used + LINE_MAX);
        // Behind the limit nothing may come as often as pieces do, not even what is told of them.
        if room > 0 || self.untold_loss > self.told_loss {
            self.tell_loss(now);
        }
        let [stdout, stderr] = &mut self.streams;
        let target = if stream == Stream::Stdout { stdout } else { stderr };
        target.came += bytes.len() as u64;
        let fits = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        let (kept, result) = write_at(&target.file, target.len, bytes.get(..fits).unwrap_or(bytes));
        let result = if fits < bytes.len() && result.is_ok() {
            // From here on all is lost: a later piece that would fit would look as if nothing was missing before it.
            self.limit = 0;
            Err(io::Error::other("as much is kept as may be: give more with --log-limit"))
        } else {
            result
        };
        let line = format!("{now} {} {} {kept}\n", stream.as_str(), target.len);
        if kept > 0 {
            let (told, told_result) = write_at(&self.times, self.times_len, line.as_bytes());
            if told_result.is_err() {
                // Half a line, and bytes that no line tells of: as if they had not come. What cannot be cut off now is
                // written over later.
                let _ = self.times.set_len(self.times_len);
                let _ = target.file.set_len(target.len);
                return told_result.map_err(|err| (0, err));
            }
            self.times_len += told as u64;
            target.len += kept as u64;
        }
        result.map_err(|err| (kept, err))
    }

    fn tell_loss(&mut self, now: u64) {
        if self.untold_loss == 0 {
            return;
        }
        let line = format!("{now} lost {}\n", self.untold_loss);
        match write_at(&self.times, self.times_len, line.as_bytes()) {
            (told, Ok(())) => {
                self.times_len += told as u64;
                self.told_loss += std::mem::take(&mut self.untold_loss);
            }
            // The next piece tries again.
            (_, Err(_)) => drop(self.times.set_len(self.times_len)),
        }
    }
}

/// Writes as much as there is room for.
fn write_at(file: &File, offset: u64, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match file.write_at(rest, offset + done as u64) {
            Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return (done, Err(err)),
        }
    }
    (done, Ok(()))
}

/// See [`OutputLog::writer`].
#[derive(Debug, Clone)]
pub struct OutputWriter {
    log: Arc<OutputLog>,
    stream: Stream,
}

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.keep(self.stream, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// It was printed.
    Printed {
        /// When, in nanoseconds since 1970.
        time_ns: u64,
        /// On which stream.
        stream: Stream,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// So many bytes were printed and could not be kept.
    Lost {
        /// When this was noticed, in nanoseconds since 1970.
        time_ns: u64,
        /// How many.
        bytes: u64,
    },
}

/// Reads output back, in its order, also while it is being written and after the folder is gone.
#[derive(Debug)]
pub struct OutputReader {
    times: BufReader<File>,
    /// A line that is not complete yet.
    line: Vec<u8>,
    streams: [(File, u64); 2],
    /// A piece that is given in several.
    open: Option<(u64, Stream, u64, u64)>,
    watch: Option<rustix::fd::OwnedFd>,
}

impl OutputReader {
    /// Opens the files; `None` if the machine keeps no output.
    ///
    /// # Errors
    /// The host's.
    pub fn open(folder: &MachineFolder) -> io::Result<Option<Self>> {
        let times = match File::open(folder.path().join(TIMES)) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(err),
        };
        let [stdout, stderr] = Stream::BOTH.map(|stream| File::open(folder.path().join(stream.file_name())));
        Ok(Some(Self {
            times: BufReader::new(times),
            line: Vec::new(),
            streams: [(stdout?, 0), (stderr?, 0)],
            open: None,
            watch: watch(folder.path()).ok(),
        }))
    }

    /// The next piece, if there is one.
    ///
    /// # Errors
    /// The host's.
    pub fn next_piece(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if let Some((time_ns, stream, offset, len)) = self.open.take() {
                let bytes = self.read_at(stream, offset, len)?;
                let read = bytes.len() as u64;
                if read > 0 && read < len {
                    self.open = Some((time_ns, stream, offset + read, len - read));
                }
                if read > 0 {
                    return Ok(Some(Piece::Printed { time_ns, stream, bytes }));
                }
                continue;
            }
            self.times.read_until(b'\n', &mut self.line)?;
            if self.line.last() != Some(&b'\n') {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |text: &str| text.parse::<u64>().ok();
            match words.as_slice() {
                [time, "lost", bytes] => {
                    if let (Some(time_ns), Some(bytes)) = (number(time), number(bytes)) {
                        return Ok(Some(Piece::Lost { time_ns, bytes }));
                    }
                }
                [time, stream, offset, len] => {
                    let stream = Stream::BOTH.into_iter().find(|known| known.as_str() == *stream);
                    if let (Some(time), Some(stream), Some(offset), Some(len)) =
                        (number(time), stream, number(offset), number(len))
                        && offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok())
                    {
                        self.open = Some((time, stream, offset, len));
                    }
                }
                // A line that somebody else has written.
                _ => {}
            }
        }
    }

    /// What came after the last line of the times: a monitor that was killed has not written more.
    ///
    /// # Errors
    /// The host's.
    pub fn rest(&mut self) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for stream in Stream::BOTH {
            loop {
                let (file, offset) = self.stream(stream);
                let (time_ns, offset) = (modified_ns(&file.metadata()?), *offset);
                let bytes = self.read_at(stream, offset, PIECE_MAX)?;
                if bytes.is_empty() {
                    break;
                }
                pieces.push(Piece::Printed { time_ns, stream, bytes });
            }
        }
        Ok(pieces)
    }

    /// Waits until something in the folder has changed, or for a while.
    pub fn wait_for_more(&mut self, limit: Duration) {
        let Some(watch) = &self.watch else {
            std::thread::sleep(limit.min(Duration::from_millis(100)));
            return;
        };
        let timeout = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let mut entries = [PollFd::new(watch, PollFlags::IN)];
        // Woken too early costs one look too many.
        let _ = poll(&mut entries, Some(&timeout));
        let mut events = [0; 4096];
        while rustix::io::read(watch, &mut events).is_ok_and(|count| count == events.len()) {}
    }

    fn stream(&mut self, stream: Stream) -> &mut (File, u64) {
        let [stdout, stderr] = &mut self.streams;
        if stream == Stream::Stdout { stdout } else { stderr }
    }

    fn read_at(&mut self, stream: Stream, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let (file, end) = self.stream(stream);
        let mut bytes = vec![0; usize::try_from(len.min(PIECE_MAX)).unwrap_or(0)];
        let mut done = 0;
        while let Some(room) = bytes.get_mut(done..).filter(|room| !room.is_empty()) {
            match file.read_at(room, offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        bytes.truncate(done);
        *end = (*end).max(offset + done as u64);
        Ok(bytes)
    }
}

fn modified_ns(metadata: &Metadata) -> u64 {
    u64::try_from(metadata.mtime()).unwrap_or(0).saturating_mul(1_000_000_000)
        + u64::try_from(metadata.mtime_nsec()).unwrap_or(0)
}

fn watch(folder: &Path) -> io::Result<rustix::fd::OwnedFd> {
    let events =
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVE_SELF | inotify::WatchFlags::DELETE_SELF;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, folder, events)?;
    Ok(watch)
}

/// The last bytes of what the monitor itself has said.
///
/// # Errors
/// The host's.
pub fn monitor_log(folder: &MachineFolder) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(folder.monitor_log())?.take(1 << 20).read_to_end(&mut bytes)?;
    Ok(bytes)
}
