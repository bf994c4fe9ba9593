//! exec and attach: a command in a machine, with its streams on this process's own.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use harrier_control::api::{AttachRequest, ExecRequest, TerminalSize};
use harrier_control::output::{OutputReader, Piece, Stream};
use harrier_control::stream::{CommandEnd, FromMachine, INPUT_WINDOW, PAYLOAD_MAX, ToMachine};
use harrier_control::{Client, Entry, Life, Registry};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::{about, ask, not_alive};
use crate::attempt::Attempt;
use crate::exit::{Failure, signal_code};
use crate::flags::{AttachFlags, ExecFlags};
use crate::terminal;

/// How often the end of kept output is looked for, when nothing else wakes.
const LOOK: Duration = Duration::from_millis(500);

pub(super) fn exec(flags: &ExecFlags, registry: &Registry) -> Result<u8, Failure> {
    let Some(folder) = &flags.attempt else { return exec_in(flags, registry, None) };
    let attempt = Attempt::enter(folder)?;
    let result = exec_in(flags, registry, Some(&attempt));
    attempt.finish_command(&result);
    result
}

fn exec_in(flags: &ExecFlags, registry: &Registry, attempt: Option<&Attempt>) -> Result<u8, Failure> {
    let keys = DetachKeys::parse(&flags.detach_keys)?;
    let entry = registry.find(&flags.machine)?;
    let tty = flags.tty || (terminal::is_interactive() && !flags.detach);
    let stdin = !flags.no_stdin && !flags.detach;
    let mut request = ExecRequest { stdin, ..ExecRequest::default() };
    for word in &flags.command {
        request.command.push(utf8(word)?);
    }
    request.workdir = flags.workdir.as_ref().map(utf8).transpose()?;
    for text in &flags.env {
        let text = utf8(text)?;
        let host_value = || std::env::var(&text).ok().map(|value| format!("{text}={value}"));
        let variable = if text.contains('=') { Some(text.clone()) } else { host_value() };
        request
            .env
            .push(variable.ok_or_else(|| {
                Failure::new(format!("--env '{text}' is not set here: write {text}=VALUE"))
            })?);
    }
    if tty {
        let (rows, cols) = terminal::size();
        request.tty = Some(TerminalSize { rows, cols });
        if let Ok(term) = std::env::var("TERM") {
            request.env.insert(0, format!("TERM={term}"));
        }
    }
    let mut engine = String::new();
    if let Some(attempt) = attempt {
        let failed = |err| about(&entry, not_alive(&entry, err));
        engine = ask(&entry, |client| client.info()).map_err(failed)?.engine;
        let client = Client::new(&entry.folder);
        attempt.stand_by(move |hold| if hold { client.pause() } else { client.resume() }.is_ok());
    }
    let connection =
        ask(&entry, |client| client.exec(&request)).map_err(|err| about(&entry, not_alive(&entry, err)))?;
    let (from, mut to) = connection.split()?;
    if flags.detach {
        ToMachine::Detach.write(&mut to).map_err(|err| about(&entry, err))?;
        return Ok(0);
    }
    let mut session = Session::new(to);
    match attempt {
        // A signal ends this process, and the machine's monitor then ends the command of a client that is gone.
        Some(attempt) => {
            let stderr = flags.stderr.as_deref().unwrap_or(Path::new("/dev/null"));
            session.stderr = Some(File::options().append(true).open(stderr)?);
            attempt.mark_started(&engine);
        }
        None => session.start_signals(tty)?,
    }
    session.start(&entry, stdin, tty, keys)?;
    let end = session.carry(from, true)?;
    session.conclude(&entry, end)
}

pub(super) fn attach(flags: &AttachFlags, registry: &Registry) -> Result<u8, Failure> {
    let keys = DetachKeys::parse(&flags.detach_keys)?;
    let entry = registry.find(&flags.machine)?;
    let failed = |err| about(&entry, not_alive(&entry, err));
    let info = ask(&entry, |client| client.info()).map_err(failed)?;
    let read = |err: io::Error| about(&entry, format!("its output cannot be read ({err})"));
    let Some(output) = OutputReader::open(&entry.folder).map_err(read)? else {
        return Err(about(&entry, "it is attached to where it was started from"));
    };
    let stdin = info.interactive && !flags.no_stdin;
    let connection = ask(&entry, |client| client.attach(AttachRequest { stdin })).map_err(failed)?;
    let (from, mut to) = connection.split()?;
    let tty = info.tty && terminal::is_interactive();
    if tty {
        // A program that draws a whole screen draws it again when the size changes.
        let (rows, cols) = terminal::size();
        for cols in [cols.saturating_sub(1), cols] {
            ToMachine::Resize(rows, cols).write(&mut to).map_err(|err| about(&entry, err))?;
        }
    }
    let session = Session::new(to);
    session.start_signals(tty)?;
    session.start(&entry, stdin, tty, keys)?;
    let watched = entry.clone();
    let printer =
        std::thread::Builder::new().name("output".to_owned()).spawn(move || follow(output, &watched))?;
    let end = session.carry(from, false)?;
    if end.is_some() {
        // All of it: the machine's end is near, and with it the last of its output.
        let _ = printer.join();
        return session.conclude(&entry, end);
    }
    if session.is_left() {
        return session.conclude(&entry, None);
    }
    // The monitor went without a word; what it has written down counts.
    let end = match entry.wait_within(Some(Duration::from_secs(5))) {
        Ok(Some(Life::Ended(exit))) => Some(CommandEnd { exit_code: exit.exit_code, error: exit.error }),
        _ => None,
    };
    let _ = printer.join();
    session.conclude(&entry, end)
}

fn utf8(text: &std::ffi::OsString) -> Result<String, Failure> {
    let shown = || Failure::new(format!("'{}' is not text: use UTF-8", text.to_string_lossy()));
    text.clone().into_string().map_err(|_| shown())
}

/// Prints what is kept from now on, and the line that has been begun: a prompt. Ends with the machine.
fn follow(mut output: OutputReader, entry: &Entry) -> io::Result<()> {
    let mut begun: Vec<u8> = Vec::new();
    while let Some(piece) = output.next_piece()? {
        if let Piece::Printed { stream: Stream::Stdout, bytes, .. } = piece {
            begun.extend_from_slice(&bytes);
            if let Some(at) = begun.iter().rposition(|byte| *byte == b'\n') {
                begun.drain(..=at);
            }
        }
    }
    write_to(Stream::Stdout, &begun)?;
    loop {
        let over = entry.is_over();
        let mut pieces = Vec::new();
        while let Some(piece) = output.next_piece()? {
            pieces.push(piece);
        }
        if over {
            pieces.extend(output.rest()?);
        }
        for piece in pieces {
            if let Piece::Printed { stream, bytes, .. } = piece {
                write_to(stream, &bytes)?;
            }
        }
        if over {
            return Ok(());
        }
        output.wait_for_more(LOOK);
    }
}

fn write_to(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
        Stream::Stderr => io::stderr().write_all(bytes),
    }
}

/// How much input may be sent.
#[derive(Default)]
struct Credit {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Credit {
    fn add(&self, bytes: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 += bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }

    /// Waits until some may be sent; `None` when nobody wants any.
    fn wait(&self) -> Option<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *state {
                (_, true) => return None,
                (0, false) => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                (bytes, false) => return Some(bytes),
            }
        }
    }

    fn take(&self, bytes: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = state.0.saturating_sub(bytes);
    }
}

#[derive(Default)]
struct Ends {
    /// The user has typed the detach keys.
    detached: bool,
    /// A signal came twice.
    signal: Option<i32>,
}

/// This process's side of a stream connection.
struct Session {
    to: Arc<Mutex<UnixStream>>,
    credit: Arc<Credit>,
    ends: Arc<Mutex<Ends>>,
    /// Where the command's stderr goes, if not to this process's.
    stderr: Option<File>,
}

impl Session {
    fn new(to: UnixStream) -> Self {
        let session = Session {
            to: Arc::new(Mutex::new(to)),
            credit: Arc::new(Credit::default()),
            ends: Arc::default(),
            stderr: None,
        };
        session.credit.add(INPUT_WINDOW);
        session
    }

    /// Prepares the terminal, and starts the thread that sends input.
    fn start(&self, entry: &Entry, stdin: bool, tty: bool, keys: DetachKeys) -> Result<(), Failure> {
        if tty && io::stdin().is_terminal() {
            terminal::set_raw().map_err(|err| {
                about(entry, format!("the terminal cannot be set to raw mode ({err}): redirect stdin"))
            })?;
        }
        if stdin {
            let (to, credit, ends) = (Arc::clone(&self.to), Arc::clone(&self.credit), Arc::clone(&self.ends));
            let keys = tty.then_some(keys);
            // It may outlast the command in a read; the process does not wait for it.
            std::thread::Builder::new()
                .name("input".to_owned())
                .spawn(move || send_input(&to, &credit, keys, &ends))?;
        }
        Ok(())
    }

    /// Starts the thread that passes on signals and sizes.
    fn start_signals(&self, tty: bool) -> Result<(), Failure> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH])?;
        let (to, ends) = (Arc::clone(&self.to), Arc::clone(&self.ends));
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let mut seen = 0;
            for signal in signals.forever() {
                if signal == SIGWINCH {
                    if tty {
                        let (rows, cols) = terminal::size();
                        send(&to, &ToMachine::Resize(rows, cols));
                    }
                    continue;
                }
                seen += 1;
                // The first is for the command; whoever asks again does not want to wait for it.
                if seen == 1 && signal != SIGHUP {
                    send(&to, &ToMachine::Signal(u8::try_from(signal).unwrap_or(0)));
                } else {
                    ends.lock().unwrap_or_else(PoisonError::into_inner).signal = Some(signal);
                    hang_up(&to);
                }
            }
        })?;
        Ok(())
    }

    /// Takes frames until the end; `None` if the connection ends before that.
    fn carry(&self, mut from: impl Read, print: bool) -> Result<Option<CommandEnd>, Failure> {
        let mut wanted = [print; 2];
        loop {
            let frame = match FromMachine::read(&mut from) {
                Ok(Some(frame)) => frame,
                Ok(None) | Err(_) => return Ok(None),
            };
            let (stream, bytes) = match frame {
                FromMachine::Ended(end) => return Ok(Some(end)),
                FromMachine::InputCredit(bytes) => {
                    self.credit.add(usize::try_from(bytes).unwrap_or(0));
                    continue;
                }
                FromMachine::InputClosed => {
                    self.credit.close();
                    continue;
                }
                FromMachine::Stdout(bytes) => (Stream::Stdout, bytes),
                FromMachine::Stderr(bytes) => (Stream::Stderr, bytes),
            };
            let [stdout, stderr] = &mut wanted;
            let wanted = if stream == Stream::Stdout { stdout } else { stderr };
            let write = || match &self.stderr {
                Some(file) if stream == Stream::Stderr => (&mut &*file).write_all(&bytes),
                _ => write_to(stream, &bytes),
            };
            if *wanted && let Err(err) = write() {
                if err.kind() != io::ErrorKind::BrokenPipe {
                    hang_up(&self.to);
                    return Err(Failure::new(format!("{} cannot be written ({err})", stream.as_str())));
                }
                // Nobody reads it: as for any command in a pipe.
                *wanted = false;
                send(&self.to, &ToMachine::Signal(u8::try_from(libc::SIGPIPE).unwrap_or(0)));
            }
        }
    }

    /// Whether the user has ended the connection.
    fn is_left(&self) -> bool {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.detached || ends.signal.is_some()
    }

    fn conclude(&self, entry: &Entry, end: Option<CommandEnd>) -> Result<u8, Failure> {
        terminal::restore();
        hang_up(&self.to);
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        match (end, ends.signal) {
            (Some(CommandEnd { exit_code, error: Some(message) }), _) => {
                Err(Failure { code: exit_code, message })
            }
            (Some(end), _) => Ok(end.exit_code),
            (None, _) if ends.detached => Ok(0),
            (None, Some(signal)) => Ok(signal_code(signal)),
            (None, None) => Err(about(entry, "it ended, and the command with it")),
        }
    }
}

fn send(to: &Mutex<UnixStream>, frame: &ToMachine) -> bool {
    // A connection that is gone is noticed where it is read.
    frame.write(&mut *to.lock().unwrap_or_else(PoisonError::into_inner)).is_ok()
}

fn hang_up(to: &Mutex<UnixStream>) {
    let _ = to.lock().unwrap_or_else(PoisonError::into_inner).shutdown(std::net::Shutdown::Both);
}

fn send_input(to: &Mutex<UnixStream>, credit: &Credit, mut keys: Option<DetachKeys>, ends: &Mutex<Ends>) {
    let mut buf = vec![0; PAYLOAD_MAX];
    let mut stdin = io::stdin().lock();
    while let Some(room) = credit.wait() {
        // Keys that were held back come with the next ones.
        let room = room.min(PAYLOAD_MAX).saturating_sub(DetachKeys::MAX).max(1);
        let count = match stdin.read(buf.get_mut(..room).unwrap_or_default()) {
            Ok(0) => break,
            Ok(count) => count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let read = buf.get(..count).unwrap_or_default();
        let (bytes, detach) = match &mut keys {
            Some(keys) => keys.filter(read),
            None => (read.to_vec(), false),
        };
        credit.take(bytes.len());
        if !bytes.is_empty() && !send(to, &ToMachine::Input(bytes)) {
            return;
        }
        if detach {
            ends.lock().unwrap_or_else(PoisonError::into_inner).detached = true;
            send(to, &ToMachine::Detach);
            hang_up(to);
            return;
        }
    }
    send(to, &ToMachine::InputEnd);
}

/// The keys that leave a command alone, as docker has them: `ctrl-p,ctrl-q`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DetachKeys {
    keys: Vec<u8>,
    typed: usize,
}

impl DetachKeys {
    /// Most keys.
    const MAX: usize = 16;

    fn parse(text: &str) -> Result<Self, Failure> {
        let unusable = || {
            Failure::new(format!(
                "--detach-keys '{text}' cannot be typed: write letters or ctrl-LETTER, with commas"
            ))
        };
        let key = |word: &str| match word.as_bytes() {
            [key] if key.is_ascii_graphic() => Some(*key),
            [b'c', b't', b'r', b'l', b'-', key @ (b'a'..=b'z' | b'@' | b'['..=b'_')] => Some(key & 0x1f),
            _ => None,
        };
        if text.is_empty() {
            return Ok(DetachKeys { keys: Vec::new(), typed: 0 });
        }
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        let keys = keys.filter(|keys| keys.len() <= Self::MAX).ok_or_else(unusable)?;
        Ok(DetachKeys { keys, typed: 0 })
    }

    /// The keys for the command, and whether the user wants to leave. Keys that may become the way out are held back.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len() + self.typed);
        for byte in typed {
            if self.keys.get(self.typed) != Some(byte) {
                passed.extend(self.keys.iter().take(self.typed));
                self.typed = 0;
            }
            if self.keys.get(self.typed) == Some(byte) {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    self.typed = 0;
                    return (passed, true);
                }
            } else {
                passed.push(*byte);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_written_as_for_docker() {
        assert_eq!(DetachKeys::parse("ctrl-p,ctrl-q").unwrap().keys, [16, 17]);
        assert_eq!(DetachKeys::parse("a,ctrl-@,ctrl-\\").unwrap().keys, [b'a', 0, 28]);
        for bad in ["ctrl-", "ctrl-1", "ab", ",", "ctrl-p,", "ä"] {
            assert!(DetachKeys::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_pass_except_the_way_out() {
        let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
        assert_eq!(keys.filter(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.filter(b"\x10"), (vec![], false));
        assert_eq!(keys.filter(b"\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.filter(b"x"), (b"\x10x".to_vec(), false));
        assert_eq!(keys.filter(b"a\x10\x11b"), (b"a".to_vec(), true));
        let mut none = DetachKeys::parse("").unwrap();
        assert_eq!(none.filter(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }
}
