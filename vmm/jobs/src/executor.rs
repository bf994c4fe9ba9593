//! Running one command on one connection, in the calling thread.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use harrier_agent_protocol::CommandSpec;

use crate::control::{ControlReceiver, FIRST_COMMAND, NewCommand};
use crate::outcome::{ExecuteError, Outcome};
use crate::session::SessionOptions;
use crate::session::core::{Core, Request};
use crate::session::driver::Driver;
use crate::stdio::Stdio;

/// How a command is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long the agent, once connected, may take to be ready for a command.
    pub handshake_timeout: Duration,
    /// How long [`execute`] waits after the command until the agent has written everything back. The machine may be
    /// dropped as soon as `execute` has returned.
    pub shutdown: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(30), shutdown: Duration::from_secs(5) }
    }
}

/// Runs a command through the agent at the other end of `connection`, ends the machine and gives the command's outcome.
/// Blocks until all output is written; other threads steer by the [`Controller`](crate::Controller) that belongs to
/// `control`.
///
/// A stdout or stderr that its reader has closed is closed for the command too, which gets SIGPIPE, as in any pipe.
pub fn execute(
    connection: UnixStream,
    spec: &CommandSpec,
    stdio: Stdio,
    options: &Options,
    control: ControlReceiver,
) -> Result<Outcome, ExecuteError> {
    let request = Some(Request::Run(spec.encode()?));
    let (done, result) = channel();
    let begin = Instant::now();
    let session = SessionOptions {
        handshake_timeout: options.handshake_timeout,
        reconnect: None,
        ..SessionOptions::default()
    };
    let mut driver = Driver::new(control, session, Core::default());
    driver.last_command = Some(options.shutdown);
    driver.run_once(connection, NewCommand { id: FIRST_COMMAND, request, stdio, begin, done });
    result.recv().unwrap_or(Err(ExecuteError::Cancelled))
}
