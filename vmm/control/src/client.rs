//! Talking to a machine's control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{
    AttachRequest, ErrorBody, ExecRequest, KillRequest, MachineInfo, MachineState, SnapshotInfo,
    SnapshotRequest, StateChange, StopRequest,
};
use crate::http::{HttpError, Response, read_response};
use crate::registry::MachineFolder;
use crate::server::Timed;
use crate::socket;
use crate::stream::PROTOCOL;

/// How long a monitor may take to answer what it can answer at once.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer. Each is one line for people.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the monitor is gone, or ends.
    #[error("the machine does not run")]
    NotRunning,
    /// The monitor is there and does not answer.
    #[error("the machine's monitor does not answer ({0})")]
    NoAnswer(HttpError),
    /// It says no.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// One line.
        message: String,
    },
    /// It says something else.
    #[error(
        "the machine's monitor says what this harrier does not understand ({0}): use the harrier that started it"
    )]
    Answer(#[source] serde_json::Error),
}

/// A connection that speaks [`crate::stream`].
#[derive(Debug)]
pub struct StreamConnection {
    early: Vec<u8>,
    stream: UnixStream,
}

impl StreamConnection {
    /// Where [`crate::stream::FromMachine`] is read, and where [`crate::stream::ToMachine`] is written.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn split(self) -> io::Result<(impl Read + Send + use<>, UnixStream)> {
        let output = self.stream.try_clone()?;
        Ok((io::Cursor::new(self.early).chain(self.stream), output))
    }
}

/// The client of one machine; each call is a connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// For the machine of a folder.
    #[must_use]
    pub fn new(folder: &MachineFolder) -> Self {
        Self { socket: folder.socket(), timeout: ANSWER_TIMEOUT }
    }

    /// The same with another limit on how long an answer may take.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// What is known about the machine.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls here.
    pub fn info(&self) -> Result<MachineInfo, ClientError> {
        self.call("GET", "/v1/machine", None::<&()>)
    }

    /// Makes its processors stand still.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn pause(&self) -> Result<MachineState, ClientError> {
        self.change("/v1/machine/pause", &serde_json::Map::new())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn resume(&self) -> Result<MachineState, ClientError> {
        self.change("/v1/machine/resume", &serde_json::Map::new())
    }

    /// Asks it to end; [`crate::Entry::wait`] waits for that.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stop(&self, request: StopRequest) -> Result<MachineState, ClientError> {
        self.change("/v1/machine/stop", &request)
    }

    /// Ends it at once, or sends its command a signal.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn kill(&self, request: KillRequest) -> Result<MachineState, ClientError> {
        self.change("/v1/machine/kill", &request)
    }

    /// Takes a snapshot and waits until it is durable.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotInfo, ClientError> {
        self.call("POST", "/v1/machine/snapshot", Some(request))
    }

    fn change(&self, path: &str, body: &impl Serialize) -> Result<MachineState, ClientError> {
        self.call("POST", path, Some(body)).map(|change: StateChange| change.state)
    }

    /// Runs a command in the machine; its streams are the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn exec(&self, request: &ExecRequest) -> Result<StreamConnection, ClientError> {
        self.connect_streams("/v1/machine/exec", request)
    }

    /// Connects to the machine's own command.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn attach(&self, request: AttachRequest) -> Result<StreamConnection, ClientError> {
        self.connect_streams("/v1/machine/attach", &request)
    }

    /// A connection that speaks [`crate::stream`].
    fn connect_streams(&self, path: &str, body: &impl Serialize) -> Result<StreamConnection, ClientError> {
        let more = format!("Connection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n");
        let (response, stream) = self.exchange("POST", path, Some(body), &more)?;
        match response.status {
            101 => {
                let waits = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
                waits.map_err(failed)?;
                Ok(StreamConnection { early: response.body, stream })
            }
            _ => Err(refused(&response)),
        }
    }

    /// The process that listens, by what the kernel says (SO_PEERCRED, unix(7)); also one that does not answer.
    #[must_use]
    pub fn monitor(&self) -> Option<rustix::process::Pid> {
        let stream = socket::connect(&self.socket, self.timeout).ok()?;
        rustix::net::sockopt::socket_peercred(stream).ok().map(|peer| peer.pid)
    }

    /// One request with a JSON body, and its answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let (response, _) = self.exchange(method, path, body, "Connection: close\r\n")?;
        if (200..300).contains(&response.status) {
            serde_json::from_slice(&response.body).map_err(ClientError::Answer)
        } else {
            Err(refused(&response))
        }
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
        headers: &str,
    ) -> Result<(Response, UnixStream), ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Answer)?.unwrap_or_default();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: harrier\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             {headers}\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(&body);
        let mut connection = Timed::connect(&self.socket, self.timeout).map_err(failed)?;
        connection.write_all(&request).map_err(failed)?;
        let response = read_response(&mut connection).map_err(|err| match err {
            HttpError::Io(err) => failed(err),
            HttpError::Closed => ClientError::NotRunning,
            other => ClientError::NoAnswer(other),
        })?;
        Ok((response, connection.stream))
    }
}

fn failed(err: io::Error) -> ClientError {
    match err.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => ClientError::NotRunning,
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            ClientError::NoAnswer(HttpError::Io(io::ErrorKind::TimedOut.into()))
        }
        _ => ClientError::NoAnswer(HttpError::Io(err)),
    }
}

fn refused(response: &Response) -> ClientError {
    let message = serde_json::from_slice::<ErrorBody>(&response.body).map_or_else(
        |_| format!("the machine's monitor answers with status {}", response.status),
        |body| body.error,
    );
    ClientError::Refused { status: response.status, message }
}
