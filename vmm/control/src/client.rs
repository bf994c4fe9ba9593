//! Talking to a machine's control socket.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{
    ErrorBody, KillRequest, MachineInfo, MachineState, SnapshotInfo, SnapshotRequest, StateChange,
    StopRequest,
};
use crate::http::{HttpError, read_response};
use crate::registry::MachineFolder;
use crate::server::Timed;
use crate::socket;

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
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Answer)?.unwrap_or_default();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: harrier\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(&body);
        let response = self.exchange(&request)?;
        if (200..300).contains(&response.status) {
            return serde_json::from_slice(&response.body).map_err(ClientError::Answer);
        }
        let message = serde_json::from_slice::<ErrorBody>(&response.body).map_or_else(
            |_| format!("the machine's monitor answers with status {}", response.status),
            |body| body.error,
        );
        Err(ClientError::Refused { status: response.status, message })
    }

    fn exchange(&self, request: &[u8]) -> Result<crate::http::Response, ClientError> {
        let failed = |err: io::Error| match err.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => ClientError::NotRunning,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                ClientError::NoAnswer(HttpError::Io(io::ErrorKind::TimedOut.into()))
            }
            _ => ClientError::NoAnswer(HttpError::Io(err)),
        };
        let stream = socket::connect(&self.socket, self.timeout).map_err(failed)?;
        let mut connection = Timed { stream, deadline: Instant::now() + self.timeout };
        connection.write_all(request).map_err(failed)?;
        read_response(&mut connection).map_err(|err| match err {
            HttpError::Io(err) => failed(err),
            HttpError::Closed => ClientError::NotRunning,
            other => ClientError::NoAnswer(other),
        })
    }
}
