//! Starting one program: pipes or a pseudo-terminal, fork, and in the child session, user, working directory, PATH
//! search and exec. What fails in the child before its exec comes back through a pipe and becomes a [`StartError`].

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use harrier_agent_protocol::{CommandSpec, FailureKind, WindowSize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, Gid, Uid};

use crate::isolate;
use crate::limits::Group;
use crate::sys::{self, Fork};
use crate::users::{self, Account};

/// PATH where the host gives none.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that runs, and the agent's ends of its streams, all non-blocking.
pub(crate) struct Started {
    pub(crate) pid: libc::pid_t,
    pub(crate) stdin: OwnedFd,
    /// stdout, or with a terminal all output.
    pub(crate) stdout: OwnedFd,
    /// None with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
}

/// Why a program did not start.
#[derive(Debug)]
pub(crate) struct StartError {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
}

impl StartError {
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Other, message: message.into() }
    }
}

/// The child's ends of its streams.
struct ChildEnds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// What the child was at when it failed.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Limits,
    Session,
    Isolation,
    Terminal,
    Streams,
    User,
    Workdir,
    Exec,
    /// The file is there and yet exec says that something is not: what the file names to be run by.
    Interpreter,
}

impl Stage {
    const ALL: [Self; 9] = [
        Self::Limits,
        Self::Session,
        Self::Isolation,
        Self::Terminal,
        Self::Streams,
        Self::User,
        Self::Workdir,
        Self::Exec,
        Self::Interpreter,
    ];
}

/// Starts `spec`'s program in the agent's root file system.
/// `group` is what its limits need.
pub(crate) fn spawn(spec: &CommandSpec, group: Option<&Group>) -> Result<Started, StartError> {
    let resources =
        |error: io::Error| StartError::other(format!("cannot set up the command's streams: {error}"));
    let account = spec.user.as_ref().map(users::find).transpose().map_err(StartError::other)?;
    let (stdin, stdout, stderr, ends) = match spec.tty {
        Some(size) => open_terminal(size, account.as_ref()).map_err(resources)?,
        None => open_pipes(account.as_ref()).map_err(resources)?,
    };
    let (report, report_in_child) =
        unistd::pipe2(OFlag::O_CLOEXEC).map_err(|error| resources(error.into()))?;
    let program = Program::new(spec, account.as_ref());
    match sys::fork() {
        Err(error) => Err(StartError::other(format!("cannot fork: {error}"))),
        Ok(Fork::Child) => {
            let (stage, errno) = run_child(spec, account.as_ref(), group, &program, &ends);
            let mut message = vec![stage as u8];
            message.extend_from_slice(&(errno as i32).to_le_bytes());
            // Nobody could be told that the parent cannot be told.
            let _ = unistd::write(&report_in_child, &message);
            sys::exit_now(127)
        }
        Ok(Fork::Parent(pid)) => {
            drop((report_in_child, ends));
            let mut message = Vec::new();
            // The end comes with the child's exec, or its exit.
            File::from(report).take(16).read_to_end(&mut message).map_err(resources)?;
            match message.as_slice() {
                [] => Ok(Started { pid, stdin, stdout, stderr }),
                [stage, errno @ ..] => {
                    let errno = errno.try_into().map(i32::from_le_bytes).unwrap_or(0);
                    let stage = Stage::ALL.into_iter().find(|known| *known as u8 == *stage);
                    Err(describe(spec, &program, stage.unwrap_or(Stage::Session), Errno::from_raw(errno)))
                }
            }
        }
    }
}

type Streams = (OwnedFd, OwnedFd, Option<OwnedFd>, ChildEnds);

fn open_pipes(user: Option<&Account>) -> io::Result<Streams> {
    let (stdin, agent_stdin) = unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (agent_stdout, stdout) = unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (agent_stderr, stderr) = unistd::pipe2(OFlag::O_CLOEXEC)?;
    for fd in [&agent_stdin, &agent_stdout, &agent_stderr] {
        set_nonblocking(fd)?;
    }
    // So that the user may open /dev/stdout, that is /proc/self/fd/1, too.
    for fd in [&stdin, &stdout, &stderr] {
        own(fd, user)?;
    }
    Ok((agent_stdin, agent_stdout, Some(agent_stderr), ChildEnds { stdin, stdout, stderr }))
}

fn open_terminal(size: WindowSize, user: Option<&Account>) -> io::Result<Streams> {
    let window = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&window), None)?;
    for fd in [&pty.master, &pty.slave] {
        fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    set_nonblocking(&pty.master)?;
    own(&pty.slave, user)?;
    let ends = ChildEnds { stdin: pty.slave.try_clone()?, stdout: pty.slave.try_clone()?, stderr: pty.slave };
    Ok((pty.master.try_clone()?, pty.master, None, ends))
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn own(fd: &OwnedFd, user: Option<&Account>) -> io::Result<()> {
    match user {
        Some(user) => std::os::unix::fs::fchown(fd, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

/// Arguments, environment and the places where the program may be.
struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
    candidates: Vec<CString>,
    path: Vec<u8>,
}

impl Program {
    fn new(spec: &CommandSpec, account: Option<&Account>) -> Self {
        let name = spec.argv.first().map(Vec::as_slice).unwrap_or_default();
        let env = environment(spec, account);
        let path =
            env.iter().find(|(name, _)| name == b"PATH").map(|(_, value)| value.clone()).unwrap_or_default();
        let candidates = if name.contains(&b'/') {
            vec![c_string(name.to_vec())]
        } else {
            // An empty entry is the working directory, as for the shell.
            path.split(|byte| *byte == b':').map(|folder| c_string(join(folder, name))).collect()
        };
        Self {
            argv: spec.argv.iter().cloned().map(c_string).collect(),
            env: env.into_iter().map(|(name, value)| c_string([name, value].join(&b'='))).collect(),
            candidates,
            path,
        }
    }

    /// Executes the first candidate that can be, as execvp(3) goes along PATH.
    fn execute(&self) -> (Stage, Errno) {
        let mut denied = None;
        let mut failure = (Stage::Exec, Errno::ENOENT);
        for candidate in &self.candidates {
            let Err(errno) = unistd::execve(candidate, &self.argv, &self.env);
            match errno {
                Errno::ENOENT | Errno::ENOTDIR => {
                    let there = Path::new(OsStr::from_bytes(candidate.as_bytes())).is_file();
                    if there {
                        return (Stage::Interpreter, errno);
                    }
                    failure = (Stage::Exec, errno);
                }
                Errno::EACCES => denied = Some((Stage::Exec, errno)),
                other => return (Stage::Exec, other),
            }
        }
        denied.unwrap_or(failure)
    }
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, name].join(&b'/') }
}

/// The protocol refuses strings with a NUL byte (`CommandSpec::decode`); one that slipped through becomes empty.
fn c_string(bytes: Vec<u8>) -> CString {
    CString::new(bytes).unwrap_or_default()
}

/// The command's variables: the host's, and those that no program should have to do without.
fn environment(spec: &CommandSpec, account: Option<&Account>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut env: Vec<(Vec<u8>, Vec<u8>)> = Vec::with_capacity(spec.env.len() + 4);
    // The last of several wins.
    for (name, value) in spec.env.iter().rev() {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.clone(), value.clone()));
        }
    }
    env.reverse();
    let is_root = account.is_none_or(|account| account.uid == 0);
    let home = match account.and_then(|account| account.home.as_deref()) {
        Some(home) => home,
        None if is_root && Path::new("/root").is_dir() => b"/root",
        None => b"/",
    };
    let mut default = |name: &[u8], value: &[u8]| {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.to_vec(), value.to_vec()));
        }
    };
    default(b"PATH", DEFAULT_PATH);
    default(b"HOME", home);
    if spec.tty.is_some() {
        default(b"TERM", b"linux");
    }
    // Set on the kernel's command line where the machine needs it (CPU features that the C library must not use).
    if let Some(tunables) = std::env::var_os("GLIBC_TUNABLES") {
        default(b"GLIBC_TUNABLES", tunables.as_bytes());
    }
    env
}

/// All that happens between fork and exec. Comes back only when it fails.
fn run_child(
    spec: &CommandSpec,
    account: Option<&Account>,
    group: Option<&Group>,
    program: &Program,
    ends: &ChildEnds,
) -> (Stage, Errno) {
    let attempt = || -> Result<(), (Stage, Errno)> {
        if let Some(group) = group {
            unistd::write(group.members(), b"0").map_err(|errno| (Stage::Limits, errno))?;
        }
        unistd::setsid().map_err(|errno| (Stage::Session, errno))?;
        if spec.isolate {
            isolate::enter().map_err(|errno| (Stage::Isolation, errno))?;
        }
        if spec.tty.is_some() {
            sys::set_controlling_terminal(&ends.stdin)
                .map_err(|error| (Stage::Terminal, errno_of(&error)))?;
        }
        let streams = |errno| (Stage::Streams, errno);
        unistd::dup2_stdin(ends.stdin.as_fd()).map_err(streams)?;
        unistd::dup2_stdout(ends.stdout.as_fd()).map_err(streams)?;
        unistd::dup2_stderr(ends.stderr.as_fd()).map_err(streams)?;
        sys::default_signals();
        SigSet::empty().thread_set_mask().map_err(|errno| (Stage::Session, errno))?;
        umask(Mode::from_bits_truncate(0o022));
        if let Some(user) = account {
            let failed = |errno| (Stage::User, errno);
            let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
            unistd::setgroups(&groups).map_err(failed)?;
            unistd::setgid(Gid::from_raw(user.gid)).map_err(failed)?;
            unistd::setuid(Uid::from_raw(user.uid)).map_err(failed)?;
        }
        unistd::chdir(workdir(spec).as_path()).map_err(|errno| (Stage::Workdir, errno))
    };
    match attempt() {
        Ok(()) => program.execute(),
        Err(failure) => failure,
    }
}

fn workdir(spec: &CommandSpec) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(spec.workdir.as_deref().unwrap_or(b"/")))
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// What failed, for people, and of which kind it is.
fn describe(spec: &CommandSpec, program: &Program, stage: Stage, errno: Errno) -> StartError {
    let name = String::from_utf8_lossy(spec.argv.first().map(Vec::as_slice).unwrap_or_default()).into_owned();
    let reason = errno.desc();
    let (kind, message) = match (stage, errno) {
        (Stage::Exec, Errno::ENOENT | Errno::ENOTDIR) if !name.contains('/') => {
            let path = String::from_utf8_lossy(&program.path).into_owned();
            (FailureKind::NotFound, format!("{name:?} is not found in the guest along PATH={path}"))
        }
        (Stage::Exec, Errno::ENOENT | Errno::ENOTDIR) => {
            (FailureKind::NotFound, format!("{name:?} is not found in the guest: {reason}"))
        }
        (Stage::Interpreter, _) => (
            FailureKind::NotFound,
            format!(
                "{name:?} is there, but the interpreter or loader that it names is not in the guest's file system"
            ),
        ),
        (Stage::Exec, Errno::ENOEXEC) => (
            FailureKind::NotExecutable,
            format!(
                "{name:?} is not a program for this machine (a script must begin with #! and its interpreter)"
            ),
        ),
        (Stage::Exec, Errno::E2BIG | Errno::ENOMEM | Errno::EAGAIN) => {
            (FailureKind::Other, format!("cannot start {name:?}: {reason}"))
        }
        (Stage::Exec, _) => (FailureKind::NotExecutable, format!("{name:?} cannot be executed: {reason}")),
        (Stage::Workdir, _) => (
            FailureKind::Other,
            format!("cannot enter the working directory {:?} in the guest: {reason}", workdir(spec)),
        ),
        (Stage::User, _) => (FailureKind::Other, format!("cannot become the user of the command: {reason}")),
        (Stage::Limits, _) => {
            (FailureKind::Other, format!("cannot keep the command to its limits: {reason}"))
        }
        (Stage::Isolation, _) => {
            (FailureKind::Other, format!("cannot give the command namespaces of its own: {reason}"))
        }
        (Stage::Session, _) => (FailureKind::Other, format!("cannot start a session: {reason}")),
        (Stage::Terminal, _) => (FailureKind::Other, format!("cannot take the terminal: {reason}")),
        (Stage::Streams, _) => (FailureKind::Other, format!("cannot hand over the streams: {reason}")),
    };
    StartError { kind, message }
}
