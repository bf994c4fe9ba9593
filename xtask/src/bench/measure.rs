//! One child process, measured: wall time, processor time, and both at the lines that it marks.
//!
//! Every child has a time limit and ends with the value that owns it: a guest that does not switch itself off costs
//! its limit and no more.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A line that begins with this is a mark.
const MARK: &str = "@";
/// Of its output a child keeps this much at most; a guest that prints for ever ends at its time limit.
const OUTPUT_MAX: usize = 4 << 20;

/// A line of the child that began with `@`, and when it came.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    /// The line without the `@`.
    pub(crate) text: String,
    /// Since the child was started.
    pub(crate) wall: Duration,
    /// Processor time of all its threads so far.
    pub(crate) cpu: Duration,
}

/// What a child was from start to end.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) wall: Duration,
    /// User and system time, those of its own ended children included.
    pub(crate) cpu: Duration,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) marks: Vec<Mark>,
}

impl Ended {
    /// The mark of this text.
    pub(crate) fn mark(&self, text: &str) -> Result<&Mark> {
        self.marks
            .iter()
            .find(|mark| mark.text == text)
            .with_context(|| format!("the guest did not print '@{text}': {}", last_words(&self.stdout)))
    }
}

/// A running child.
pub(crate) struct Running {
    name: String,
    child: Child,
    /// Becomes readable when the child ends.
    end: OwnedFd,
    stdout: Option<ChildStdout>,
    stderr: File,
    started: Instant,
    deadline: Instant,
    output: Vec<u8>,
    /// Where the first line begins that has not been looked at.
    unread: usize,
    marks: Vec<Mark>,
    /// How many marks [`Running::next_mark`] has given.
    given: usize,
    children_before: Duration,
    reaped: bool,
}

/// Runs `command` to its end.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    Running::start(command, limit)?.finish()
}

impl Running {
    /// Starts `command` without input. It may take `limit`.
    pub(crate) fn start(command: &mut Command, limit: Duration) -> Result<Self> {
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let stderr = tempfile::tempfile().context("no temporary file for a child's messages")?;
        let children_before = children_cpu()?;
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let stdout = child.stdout.take();
        let pid = rustix::process::Pid::from_child(&child);
        let end = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(end) => end,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error).context("this kernel has no pidfd");
            }
        };
        Ok(Self {
            name,
            child,
            end,
            stdout,
            stderr,
            started,
            deadline: started + limit,
            output: Vec::new(),
            unread: 0,
            marks: Vec::new(),
            given: 0,
            children_before,
            reaped: false,
        })
    }

    /// The child's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time of the child so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        process_cpu(self.child.id())
    }

    /// Waits for the next mark; `None` when the child has ended.
    pub(crate) fn next_mark(&mut self) -> Result<Option<Mark>> {
        loop {
            if let Some(mark) = self.marks.get(self.given) {
                self.given += 1;
                return Ok(Some(mark.clone()));
            }
            if !self.step()? {
                return Ok(None);
            }
        }
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> Result<Ended> {
        while self.step()? {}
        let wall = self.started.elapsed();
        let status = self.child.wait()?;
        self.reaped = true;
        let cpu = children_cpu()?.saturating_sub(self.children_before);
        self.read_rest();
        let mut stderr = String::new();
        self.stderr.rewind()?;
        // What a program says in no known encoding is no reason to fail.
        let mut bytes = Vec::new();
        self.stderr.read_to_end(&mut bytes)?;
        stderr.push_str(&String::from_utf8_lossy(&bytes));
        Ok(Ended {
            status,
            wall,
            cpu,
            stdout: String::from_utf8_lossy(&self.output).into_owned(),
            stderr,
            marks: std::mem::take(&mut self.marks),
        })
    }

    /// Waits for output, the end or the limit. False at the end.
    fn step(&mut self) -> Result<bool> {
        let Some(left) = self.deadline.checked_duration_since(Instant::now()) else {
            let messages = self.messages();
            let said = format!("{}{messages}", String::from_utf8_lossy(&self.output));
            bail!(
                "{} did not end within {} s; its last words: {}",
                self.name,
                (self.deadline - self.started).as_secs(),
                last_words(&said)
            );
        };
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let ended = {
            let mut fds = vec![PollFd::new(&self.end, PollFlags::IN)];
            if let Some(stdout) = &self.stdout {
                fds.push(PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let readable = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if readable { false } else { fds.first().is_some_and(|fd| !fd.revents().is_empty()) }
        };
        if ended {
            return Ok(false);
        }
        self.read_some()?;
        Ok(true)
    }

    fn read_some(&mut self) -> Result<()> {
        let Some(stdout) = &mut self.stdout else { return Ok(()) };
        let readable = {
            let mut fds = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
        };
        if !readable {
            return Ok(());
        }
        let mut buffer = [0; 4096];
        let count = stdout.read(&mut buffer)?;
        if count == 0 {
            self.stdout = None;
            return Ok(());
        }
        let (wall, cpu) = (self.started.elapsed(), self.cpu().unwrap_or_default());
        if self.output.len() < OUTPUT_MAX {
            self.output.extend(buffer.iter().take(count));
        }
        self.note_marks(wall, cpu);
        Ok(())
    }

    fn note_marks(&mut self, wall: Duration, cpu: Duration) {
        while let Some(rest) = self.output.get(self.unread..)
            && let Some(length) = rest.iter().position(|byte| *byte == b'\n')
        {
            let line = String::from_utf8_lossy(rest.get(..length).unwrap_or_default());
            if let Some(text) = line.trim_end().strip_prefix(MARK) {
                self.marks.push(Mark { text: text.to_owned(), wall, cpu });
            }
            self.unread += length + 1;
        }
    }

    /// What is left in the pipe after the end. A grandchild may hold it open, so nothing is waited for.
    fn read_rest(&mut self) {
        let mut before = usize::MAX;
        while self.stdout.is_some() && before != self.output.len() {
            before = self.output.len();
            if self.read_some().is_err() {
                return;
            }
        }
    }

    fn messages(&mut self) -> String {
        let mut bytes = Vec::new();
        if self.stderr.rewind().is_ok() {
            let _ = self.stderr.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last line that says something.
pub(crate) fn last_words(text: &str) -> String {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("(nothing)");
    line.chars().take(200).collect()
}

/// Processor time of a process that has not been waited for.
pub(crate) fn process_cpu(pid: u32) -> Result<Duration> {
    let pid = Pid::from_raw(i32::try_from(pid)?);
    Ok(Duration::from(clock_gettime(clock_getcpuclockid(pid)?)?))
}

/// Processor time of all children that ended so far.
fn children_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(us).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn marks_output_and_status_are_kept() {
        let script = "echo one; echo @two; echo three >&2; printf @four; exit 3";
        let ended = run(&mut shell(script), Duration::from_secs(20)).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("one\n@two\n@four", "three\n"));
        let marks: Vec<_> = ended.marks.iter().map(|mark| mark.text.as_str()).collect();
        assert_eq!(marks, ["two"], "a line without its end is no mark");
        assert!(ended.mark("two").unwrap().wall <= ended.wall);
        assert!(ended.mark("none").is_err());
    }

    #[test]
    fn marks_that_come_together_are_given_one_by_one() {
        let mut command = shell("printf '@one\\n@two\\n'; printf '@three\\n'");
        let mut running = Running::start(&mut command, Duration::from_secs(20)).unwrap();
        let mut next = || running.next_mark().unwrap().map(|mark| mark.text);
        let marks: Vec<_> = (0..4).map(|_| next()).collect();
        assert_eq!(marks, [Some("one".into()), Some("two".into()), Some("three".into()), None]);
    }

    #[test]
    fn processor_time_is_that_of_the_child() {
        let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo @end";
        let busy = run(&mut shell(script), Duration::from_secs(60)).unwrap();
        let idle = run(&mut shell("sleep 0.1"), Duration::from_secs(20)).unwrap();
        assert!(busy.cpu > idle.cpu, "{:?} and {:?}", busy.cpu, idle.cpu);
        assert!(busy.mark("end").unwrap().cpu * 2 > busy.cpu);
    }

    #[test]
    fn a_child_that_does_not_end_is_ended_and_its_last_words_are_told() {
        let mut running =
            Running::start(&mut shell("echo @up; exec sleep 600"), Duration::from_millis(300)).unwrap();
        assert_eq!(running.next_mark().unwrap().unwrap().text, "up");
        let pid = running.pid();
        let error = running.finish().unwrap_err().to_string();
        assert!(error.contains("did not end within") && error.contains("@up"), "{error}");
        assert!(process_cpu(pid).is_err(), "the process is still there");
    }
}
