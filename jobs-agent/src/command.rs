//! A running command: its streams, their windows, and when it is over.
//!
//! Output written before the end is never lost: once the main process has ended, its pipes are read to their
//! end, or, where a descendant holds them open, as far as they were filled then and for a short grace longer.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use harrier_agent_protocol::flow::{FlowError, ReceiveWindow, SendWindow};
use harrier_agent_protocol::{AgentMessage, DATA_MAX, Outbox, Status, Stream, Usage, WindowSize};

use crate::spawn::Started;
use crate::sys;

/// How long output of left-over descendants is still taken after the main process has ended.
const GRACE_NS: u64 = 100_000_000;

/// No more output is read while this much waits to be sent.
const OUTBOX_FULL: usize = 128 * 1024;

/// Ends a line of input and then the input itself, at a terminal with the usual settings.
const END_OF_TRANSMISSION: u8 = 4;

/// One command from its start to the report of its end.
pub(crate) struct Command {
    id: u32,
    pid: libc::pid_t,
    has_terminal: bool,
    stdin: Option<File>,
    stdin_queue: VecDeque<u8>,
    stdin_window: ReceiveWindow,
    stdin_ends: bool,
    outputs: [Output; 2],
    end: Option<End>,
}

/// One of the two output streams.
struct Output {
    stream: Stream,
    file: Option<File>,
    window: SendWindow,
    /// After the main process's end: bytes that were in the pipe at that moment and are not read yet.
    owed: u64,
}

/// How the main process ended.
struct End {
    status: Status,
    usage: Usage,
    at_ns: u64,
    deadline_ns: u64,
}

/// Which of a command's files a poll result is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdin,
    Output(Stream),
}

/// What poll is to wait for on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    Write,
    /// Only that the other side goes away, which poll always reports.
    Hangup,
}

impl Command {
    pub(crate) fn new(id: u32, started: Started) -> Self {
        let output = |stream, fd: Option<_>| Output {
            stream,
            file: fd.map(File::from),
            window: SendWindow::default(),
            owed: 0,
        };
        Self {
            id,
            pid: started.pid,
            has_terminal: started.stderr.is_none(),
            stdin: Some(started.stdin.into()),
            stdin_queue: VecDeque::new(),
            stdin_window: ReceiveWindow::default(),
            stdin_ends: false,
            outputs: [output(Stream::Stdout, Some(started.stdout)), output(Stream::Stderr, started.stderr)],
            end: None,
        }
    }

    pub(crate) fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// What to wait for. Output is left alone without credit or room in `outbox`: the command then waits, as at
    /// any full pipe.
    pub(crate) fn interests(
        &self,
        outbox: &Outbox,
    ) -> impl Iterator<Item = (Channel, BorrowedFd<'_>, Interest)> {
        let stdin = self.stdin.as_ref().and_then(|file| {
            // A terminal's hang-up shows in its output, and would be reported here over and over.
            let interest = match (self.stdin_queue.is_empty(), self.has_terminal) {
                (false, _) => Interest::Write,
                (true, false) => Interest::Hangup,
                (true, true) => return None,
            };
            Some((Channel::Stdin, file.as_fd(), interest))
        });
        let has_room = outbox.len() < OUTBOX_FULL;
        let outputs = self.outputs.iter().filter(move |output| has_room && output.window.available() > 0);
        stdin.into_iter().chain(
            outputs.filter_map(|o| {
                o.file.as_ref().map(|f| (Channel::Output(o.stream), f.as_fd(), Interest::Read))
            }),
        )
    }

    /// When the command has to be looked at again, if ever without an event.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        let end = self.end.as_ref()?;
        self.outputs.iter().all(|output| output.owed == 0).then_some(end.deadline_ns)
    }

    pub(crate) fn receive_stdin(
        &mut self,
        offset: u64,
        bytes: &[u8],
        outbox: &mut Outbox,
    ) -> Result<(), FlowError> {
        self.stdin_window.receive(offset, bytes.len())?;
        if self.stdin.is_some() && !self.stdin_ends {
            self.stdin_queue.extend(bytes);
            self.write_stdin(outbox);
        } else {
            self.stdin_window.dispose(bytes.len());
        }
        Ok(())
    }

    pub(crate) fn end_stdin(&mut self, outbox: &mut Outbox) {
        if std::mem::replace(&mut self.stdin_ends, true) {
            return;
        }
        if self.has_terminal && self.stdin.is_some() {
            // The first ends a line that was begun, the second the input.
            self.stdin_queue.extend([END_OF_TRANSMISSION; 2]);
        }
        self.write_stdin(outbox);
    }

    /// Writes as much queued input as the command takes, and closes its stdin after the last.
    pub(crate) fn write_stdin(&mut self, outbox: &mut Outbox) {
        let Some(file) = &mut self.stdin else { return };
        let mut refused = false;
        while !self.stdin_queue.is_empty() {
            match file.write(self.stdin_queue.as_slices().0) {
                Ok(count) => {
                    self.stdin_queue.drain(..count.min(self.stdin_queue.len()));
                    self.stdin_window.dispose(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    refused = true;
                    break;
                }
            }
        }
        if refused {
            self.refuse_stdin(outbox);
        } else {
            if let Some(bytes) = self.stdin_window.credit_due() {
                AgentMessage::StdinCredit { id: self.id, bytes }.send(outbox);
            }
            // A terminal stays: its hang-up would end the command.
            if self.stdin_ends && self.stdin_queue.is_empty() && !self.has_terminal {
                self.stdin = None;
            }
        }
    }

    /// The command reads no more: tell the host, once.
    pub(crate) fn refuse_stdin(&mut self, outbox: &mut Outbox) {
        self.stdin_window.dispose(self.stdin_queue.len());
        self.stdin_queue.clear();
        if self.stdin.take().is_some() && !self.stdin_ends {
            AgentMessage::StdinClosed { id: self.id }.send(outbox);
        }
    }

    /// Reads once from an output stream and sends what came.
    pub(crate) fn read_output(&mut self, stream: Stream, scratch: &mut [u8], outbox: &mut Outbox) {
        let [stdout, stderr] = &mut self.outputs;
        let output = if stream == Stream::Stdout { stdout } else { stderr };
        let Some(file) = &mut output.file else { return };
        let room = output.window.available().min(DATA_MAX).min(scratch.len());
        let Some(room) = scratch.get_mut(..room).filter(|room| !room.is_empty()) else { return };
        match file.read(room) {
            Ok(count @ 1..) => {
                let offset = output.window.send(count);
                output.owed = output.owed.saturating_sub(count as u64);
                let bytes = room.get(..count).unwrap_or_default();
                AgentMessage::Output { id: self.id, stream, offset, bytes }.send(outbox);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted) => {}
            // There is nothing after all, whatever was owed.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => output.owed = 0,
            // The end; a terminal whose last user has left says EIO instead.
            Ok(0) | Err(_) => output.close(),
        }
    }

    pub(crate) fn credit(&mut self, stream: Stream, bytes: u32) -> Result<(), FlowError> {
        let [stdout, stderr] = &mut self.outputs;
        (if stream == Stream::Stdout { stdout } else { stderr }).window.credit(bytes)
    }

    /// Nobody reads this stream any more. A pipe answers the command's next write with SIGPIPE, a terminal hangs up.
    pub(crate) fn close_output(&mut self, stream: Stream) {
        let [stdout, stderr] = &mut self.outputs;
        (if stream == Stream::Stdout { stdout } else { stderr }).close();
        if self.has_terminal {
            self.stdin = None;
        }
    }

    pub(crate) fn signal(&self, number: u8) {
        if self.end.is_none() {
            // It may have ended just now, and that is no failure.
            let _ = sys::kill_group(self.pid, number);
        }
    }

    pub(crate) fn resize(&self, size: WindowSize) {
        if let Some(terminal) =
            self.outputs.iter().find_map(|output| output.file.as_ref()).filter(|_| self.has_terminal)
        {
            // A terminal that is hung up has no size to set.
            let _ = sys::set_window_size(terminal, size);
        }
    }

    /// The main process has ended.
    pub(crate) fn main_ended(&mut self, status: Status, usage: Usage) {
        let at_ns = sys::monotonic_ns();
        self.end = Some(End { status, usage, at_ns, deadline_ns: at_ns.saturating_add(GRACE_NS) });
        for output in &mut self.outputs {
            output.owed = output.file.as_ref().and_then(|file| sys::readable_bytes(file).ok()).unwrap_or(0);
        }
    }

    /// Reports the end once all output is sent; the command is then over and has no files left.
    pub(crate) fn report_end(&self, now_ns: u64, outbox: &mut Outbox) -> bool {
        let Some(end) = &self.end else { return false };
        let drained = self
            .outputs
            .iter()
            .all(|output| output.file.is_none() || (output.owed == 0 && now_ns >= end.deadline_ns));
        if drained {
            AgentMessage::Exited { id: self.id, status: end.status, usage: end.usage, at_ns: end.at_ns }
                .send(outbox);
        }
        drained
    }
}

impl Output {
    fn close(&mut self) {
        self.file = None;
        self.owed = 0;
    }
}
