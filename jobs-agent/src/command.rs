//! A running command: its streams, what is kept of them, and when it is over.
//!
//! Output is kept until the host has acknowledged it, and sent again on a new connection from where the host stands. Without
//! a connection the command goes on until a window of its output is kept; then it waits, as at any full pipe.
//!
//! Output written before the end is never lost: once the main process has ended, its pipes are read to their
//! end, or, where a descendant holds them open, as far as they were filled then and for a short grace longer.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use harrier_agent_protocol::flow::{FlowError, ReceiveStream, SendStream};
use harrier_agent_protocol::{
    AgentMessage, Attached, Cause, CommandStatus, DATA_MAX, Kept, Outbox, Status, Stream, Usage, WindowSize,
};

use crate::limits::{self, Group};
use crate::spawn::Started;
use crate::sys;

/// How long output of left-over descendants is still taken after the main process has ended.
const GRACE_NS: u64 = 100_000_000;

/// Nothing more is said while this much waits to be sent.
const OUTBOX_FULL: usize = 128 * 1024;

/// Ends a line of input and then the input itself, at a terminal with the usual settings.
const END_OF_TRANSMISSION: u8 = 4;

/// One command from its start until the host has released it.
pub(crate) struct Command {
    id: u32,
    pid: libc::pid_t,
    started_ns: u64,
    has_terminal: bool,
    stdin: Option<File>,
    stdin_queue: VecDeque<u8>,
    stdin_stream: ReceiveStream,
    stdin_ends: bool,
    /// The command reads no more, although its input goes on.
    stdin_is_refused: bool,
    outputs: [Output; 2],
    /// The last signal's number in the host's count.
    signal: u32,
    /// What it may use, if that is limited.
    group: Option<Group>,
    /// What the machine had ended for want of memory before it.
    oom_kills_before: u64,
    end: Option<End>,
    said: Said,
}

/// What the host has been told on the present connection.
#[derive(Default)]
struct Said {
    started: bool,
    stdin_is_refused: bool,
    end: bool,
}

/// One of the two output streams.
struct Output {
    stream: Stream,
    file: Option<File>,
    kept: SendStream,
    /// After the main process's end, or before the machine's: bytes that were in the pipe at that moment and are not
    /// read yet.
    owed: u64,
}

/// How the main process ended.
struct End {
    status: Status,
    cause: Cause,
    usage: Usage,
    at_ns: u64,
    deadline_ns: u64,
}

/// Which of a command's files a poll result is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdin,
    Limits,
    Output(Stream),
}

/// What poll is to wait for on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    Write,
    /// An urgent event.
    Event,
    /// Only that the other side goes away, which poll always reports.
    Hangup,
}

impl Command {
    pub(crate) fn new(id: u32, started: Started, group: Option<Group>, oom_kills_before: u64) -> Self {
        let output = |stream, fd: Option<_>| Output {
            stream,
            file: fd.map(File::from),
            kept: SendStream::default(),
            owed: 0,
        };
        Self {
            id,
            pid: started.pid,
            started_ns: sys::monotonic_ns(),
            has_terminal: started.stderr.is_none(),
            stdin: Some(started.stdin.into()),
            stdin_queue: VecDeque::new(),
            stdin_stream: ReceiveStream::default(),
            stdin_ends: false,
            stdin_is_refused: false,
            outputs: [output(Stream::Stdout, Some(started.stdout)), output(Stream::Stderr, started.stderr)],
            signal: 0,
            group,
            oom_kills_before,
            end: None,
            said: Said::default(),
        }
    }

    /// The process to wait for, while there is one.
    pub(crate) fn pid(&self) -> Option<libc::pid_t> {
        self.end.is_none().then_some(self.pid)
    }

    /// Where the command stands, for the host to go on from. It counts as said.
    pub(crate) fn status(&mut self) -> CommandStatus {
        let stdin = self.stdin_stream.resume();
        let [stdout, stderr] = &self.outputs;
        let kept = |output: &Output| Kept { from: output.kept.acked(), to: output.kept.end() };
        CommandStatus { id: self.id, stdin, signal: self.signal, outputs: [kept(stdout), kept(stderr)] }
    }

    /// A new connection: the host stands here.
    pub(crate) fn resume(&mut self, host: &Attached) -> Result<(), FlowError> {
        self.said = Said::default();
        for (output, position) in self.outputs.iter_mut().zip(host.outputs) {
            output.kept.resume(position)?;
        }
        Ok(())
    }

    /// What to wait for. Output is left alone while no more of it can be kept.
    pub(crate) fn interests(&self) -> impl Iterator<Item = (Channel, BorrowedFd<'_>, Interest)> {
        let stdin = self.stdin.as_ref().and_then(|file| {
            // A terminal's hang-up shows in its output, and would be reported here over and over.
            let interest = match (self.stdin_queue.is_empty(), self.has_terminal) {
                (false, _) => Interest::Write,
                (true, false) => Interest::Hangup,
                (true, true) => return None,
            };
            Some((Channel::Stdin, file.as_fd(), interest))
        });
        let outputs = self.outputs.iter().filter(|output| output.kept.room() > 0);
        let events = self.group.as_ref().filter(|_| self.end.is_none()).and_then(Group::process_events);
        let events = events.map(|fd| (Channel::Limits, fd, Interest::Event));
        stdin.into_iter().chain(events).chain(
            outputs.filter_map(|o| {
                o.file.as_ref().map(|f| (Channel::Output(o.stream), f.as_fd(), Interest::Read))
            }),
        )
    }

    /// When the command has to be looked at again, if ever without an event.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        let end = self.end.as_ref()?;
        let is_open = self.outputs.iter().any(|output| output.file.is_some());
        (is_open && self.outputs.iter().all(|output| output.owed == 0)).then_some(end.deadline_ns)
    }

    /// Says what the host does not know yet, as far as there is room in `outbox`.
    pub(crate) fn pump(&mut self, now_ns: u64, outbox: &mut Outbox) {
        self.settle(now_ns);
        let id = self.id;
        if !std::mem::replace(&mut self.said.started, true) {
            let pid = u32::try_from(self.pid).unwrap_or(0);
            AgentMessage::Started { id, pid, at_ns: self.started_ns }.send(outbox);
        }
        for output in &mut self.outputs {
            while outbox.len() < OUTBOX_FULL {
                let Some((offset, bytes)) = output.kept.next_piece(DATA_MAX) else { break };
                AgentMessage::Output { id, stream: output.stream, offset, bytes }.send(outbox);
            }
        }
        if let Some(offset) = self.stdin_stream.ack_due() {
            AgentMessage::StdinAck { id, offset }.send(outbox);
        }
        if self.stdin_is_refused && !std::mem::replace(&mut self.said.stdin_is_refused, true) {
            AgentMessage::StdinClosed { id }.send(outbox);
        }
        let is_drained = self.outputs.iter().all(|output| output.file.is_none() && output.kept.is_sent());
        if let Some(end) = self.end.as_ref().filter(|_| is_drained && !self.said.end) {
            let End { status, cause, usage, at_ns, .. } = *end;
            AgentMessage::Exited { id, status, cause, usage, at_ns }.send(outbox);
            self.said.end = true;
        }
    }

    /// Closes the files of a command that is over.
    pub(crate) fn settle(&mut self, now_ns: u64) {
        let Some(end) = &self.end else { return };
        let is_drained =
            |output: &Output| output.file.is_none() || (output.owed == 0 && now_ns >= end.deadline_ns);
        if self.outputs.iter().all(is_drained) {
            self.outputs.iter_mut().for_each(Output::close);
            self.stdin = None;
            self.stdin_queue = VecDeque::new();
        }
    }

    pub(crate) fn receive_stdin(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FlowError> {
        self.stdin_stream.receive(offset, bytes.len())?;
        if self.stdin.is_some() && !self.stdin_ends {
            self.stdin_queue.extend(bytes);
            self.write_stdin();
        } else {
            self.stdin_stream.dispose(bytes.len());
        }
        Ok(())
    }

    pub(crate) fn end_stdin(&mut self) {
        if std::mem::replace(&mut self.stdin_ends, true) {
            return;
        }
        if self.has_terminal && self.stdin.is_some() {
            // The first ends a line that was begun, the second the input.
            self.stdin_queue.extend([END_OF_TRANSMISSION; 2]);
        }
        self.write_stdin();
    }

    /// Writes as much queued input as the command takes, and closes its stdin after the last.
    pub(crate) fn write_stdin(&mut self) {
        let Some(file) = &mut self.stdin else { return };
        let mut refused = false;
        while !self.stdin_queue.is_empty() {
            match file.write(self.stdin_queue.as_slices().0) {
                Ok(count) => {
                    self.stdin_queue.drain(..count.min(self.stdin_queue.len()));
                    self.stdin_stream.dispose(count);
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
            self.refuse_stdin();
        } else if self.stdin_ends && self.stdin_queue.is_empty() && !self.has_terminal {
            // A terminal stays: its hang-up would end the command.
            self.stdin = None;
        }
    }

    /// The command reads no more.
    pub(crate) fn refuse_stdin(&mut self) {
        self.stdin_stream.dispose(self.stdin_queue.len());
        self.stdin_queue.clear();
        if self.stdin.take().is_some() && !self.stdin_ends {
            self.stdin_is_refused = true;
        }
    }

    /// Reads once from an output stream and keeps what came.
    pub(crate) fn read_output(&mut self, stream: Stream, scratch: &mut [u8]) {
        let [stdout, stderr] = &mut self.outputs;
        let output = if stream == Stream::Stdout { stdout } else { stderr };
        let Some(file) = &mut output.file else { return };
        let room = output.kept.room().min(scratch.len());
        let Some(room) = scratch.get_mut(..room).filter(|room| !room.is_empty()) else { return };
        match file.read(room) {
            Ok(count @ 1..) => {
                output.owed = output.owed.saturating_sub(count as u64);
                output.kept.push(room.get(..count).unwrap_or_default());
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted) => {}
            // There is nothing after all, whatever was owed.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => output.owed = 0,
            // The end; a terminal whose last user has left says EIO instead.
            Ok(0) | Err(_) => output.close(),
        }
    }

    pub(crate) fn ack(&mut self, stream: Stream, offset: u64) -> Result<(), FlowError> {
        let [stdout, stderr] = &mut self.outputs;
        (if stream == Stream::Stdout { stdout } else { stderr }).kept.ack(offset)
    }

    /// Nobody reads this stream any more. A pipe answers the command's next write with SIGPIPE, a terminal hangs up.
    pub(crate) fn close_output(&mut self, stream: Stream) {
        let [stdout, stderr] = &mut self.outputs;
        (if stream == Stream::Stdout { stdout } else { stderr }).close();
        if self.has_terminal {
            self.stdin = None;
        }
    }

    /// Sends a signal, unless it was sent before; says that it is.
    pub(crate) fn signal(&mut self, sequence: u32, number: u8, outbox: &mut Outbox) {
        if sequence > self.signal {
            self.signal = sequence;
            self.kill(number);
        }
        AgentMessage::SignalAck { id: self.id, sequence }.send(outbox);
    }

    /// It may have reached its limit of processes.
    pub(crate) fn see_limits(&mut self) {
        if let Some(group) = &mut self.group {
            group.see_process_events();
        }
    }

    /// Ends it and its descendants at once, as far as they can be found.
    pub(crate) fn end_all(&self) {
        self.kill(libc::SIGKILL as u8);
        if let Some(group) = &self.group {
            group.kill();
        }
    }

    pub(crate) fn kill(&self, number: u8) {
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

    /// The machine is about to end: what is in the pipes now is owed to the host.
    pub(crate) fn owe(&mut self) {
        self.outputs.iter_mut().for_each(Output::owe);
    }

    /// Whether the host has been sent all that was owed.
    pub(crate) fn is_square(&self) -> bool {
        self.outputs.iter().all(|output| output.owed == 0 && output.kept.is_sent())
    }

    /// The main process has ended.
    pub(crate) fn main_ended(&mut self, status: Status, usage: Usage) {
        let at_ns = sys::monotonic_ns();
        // A process that could not be made may be the reason, and its event still be on its way.
        self.see_limits();
        let cause = match &self.group {
            _ if status == Status::Code(0) => Cause::Itself,
            Some(group) if group.cause() != Cause::Itself => group.cause(),
            Some(_) | None if limits::oom_kills() > self.oom_kills_before => Cause::Memory,
            Some(_) | None => Cause::Itself,
        };
        self.end = Some(End { status, cause, usage, at_ns, deadline_ns: at_ns.saturating_add(GRACE_NS) });
        self.owe();
    }
}

impl Output {
    fn owe(&mut self) {
        self.owed = self.file.as_ref().and_then(|file| sys::readable_bytes(file).ok()).unwrap_or(0);
    }

    fn close(&mut self) {
        self.file = None;
        self.owed = 0;
    }
}
