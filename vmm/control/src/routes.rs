//! What can be asked of a machine, and under which path.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::api::{
    ApiError, AttachRequest, ExecRequest, KillRequest, MachineInfo, MachineState, SnapshotInfo,
    SnapshotRequest, StateChange, StopRequest,
};
use crate::exec::{ExecStreams, Execution};
use crate::http::{Request, Response};
use crate::stream::PROTOCOL;

/// A running machine, as its control socket needs it. Calls come from several threads at once.
pub trait Machine: Send + Sync {
    /// What is known about it.
    fn info(&self) -> MachineInfo;

    /// Makes its processors stand still; returns when they do. A machine that is paused already stays so.
    ///
    /// # Errors
    /// Status 409 if it is ending.
    fn pause(&self) -> Result<MachineState, ApiError>;

    /// Takes back all pauses. A machine that runs goes on running.
    ///
    /// # Errors
    /// Status 409 if it is ending.
    fn resume(&self) -> Result<MachineState, ApiError>;

    /// Asks it to end, and ends it if it has not after the time that is given. Does not wait for the end.
    ///
    /// # Errors
    /// Status 500 if the host refuses what this needs.
    fn stop(&self, request: StopRequest) -> Result<MachineState, ApiError>;

    /// Ends it at once, or sends its command a signal. Does not wait.
    ///
    /// # Errors
    /// Status 400 for a signal that does not exist, 409 if there is nobody to send it to.
    fn kill(&self, request: KillRequest) -> Result<MachineState, ApiError>;

    /// Takes a snapshot; returns when it is durable. The machine goes on as it was.
    ///
    /// # Errors
    /// Status 409 if it is ending or a snapshot is being taken, 500 if it cannot be taken; the text says why.
    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotInfo, ApiError>;

    /// Runs a command with these streams.
    ///
    /// # Errors
    /// Status 400 for what is no command, 409 if the machine is paused or ending.
    fn exec(&self, request: ExecRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError>;

    /// Connects a client to the machine's own command. Its output is not written to the streams: whoever wants it reads
    /// what is kept (see [`crate::output`]).
    ///
    /// # Errors
    /// Status 409 if the command takes no input and some is to be sent.
    fn attach(&self, request: AttachRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError>;
}

#[derive(Clone, Copy)]
enum Handler {
    /// Answers with an object.
    Answer(fn(&dyn Machine, &[u8]) -> Result<Response, ApiError>),
    /// Goes on as a stream connection.
    Stream(StreamHandler),
}

/// A path of the API.
pub struct Route {
    /// The method.
    pub method: &'static str,
    /// The path.
    pub path: &'static str,
    handler: Handler,
}

/// All of them. `resources/control-api.json` has the same.
pub const ROUTES: &[Route] = &[
    answering("GET", "/v1/machine", |machine, _| Ok(Response::ok(&machine.info()))),
    answering("POST", "/v1/machine/pause", |machine, _| changed(machine.pause())),
    answering("POST", "/v1/machine/resume", |machine, _| changed(machine.resume())),
    answering("POST", "/v1/machine/stop", |machine, body| changed(machine.stop(parse(body)?))),
    answering("POST", "/v1/machine/kill", |machine, body| changed(machine.kill(parse(body)?))),
    streaming("/v1/machine/exec", |machine, body, streams| machine.exec(parse(body)?, streams)),
    streaming("/v1/machine/attach", |machine, body, streams| machine.attach(parse(body)?, streams)),
    answering("POST", "/v1/machine/snapshot", |machine, body| {
        machine.snapshot(parse(body)?).map(|taken| Response::ok(&taken))
    }),
];

const fn answering(
    method: &'static str,
    path: &'static str,
    handler: fn(&dyn Machine, &[u8]) -> Result<Response, ApiError>,
) -> Route {
    Route { method, path, handler: Handler::Answer(handler) }
}

const fn streaming(path: &'static str, handler: StreamHandler) -> Route {
    Route { method: "POST", path, handler: Handler::Stream(handler) }
}

fn changed(result: Result<MachineState, ApiError>) -> Result<Response, ApiError> {
    result.map(|state| Response::ok(&StateChange { state }))
}

/// A body: an object; none at all is one without members.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.trim_ascii().is_empty() { b"{}" } else { body };
    serde_json::from_slice::<Map<String, Value>>(body)
        .and_then(|members| serde_json::from_value(Value::Object(members)))
        .map_err(|err| ApiError::bad_request(format!("the body is not what it should be: {err}")))
}

/// What is to be done about a request.
pub(crate) enum Plan {
    /// This is the answer.
    Answer(Response),
    /// The connection becomes one of streams.
    Stream(StreamHandler),
}

pub(crate) type StreamHandler = fn(&dyn Machine, &[u8], ExecStreams) -> Result<Arc<dyn Execution>, ApiError>;

/// Does what a request asks for, unless it asks for streams.
pub(crate) fn plan(machine: &dyn Machine, request: &Request) -> Plan {
    let mut here = ROUTES.iter().filter(|route| route.path == request.path).peekable();
    let Some(first) = here.peek() else {
        let message = "there is nothing under this path: see resources/control-api.json".to_owned();
        return Plan::Answer(Response::error(&ApiError { status: 404, message }));
    };
    let allow = first.method;
    let Some(route) = here.find(|route| route.method == request.method) else {
        let message = format!("this path has another method: use {allow}");
        let response = Response::error(&ApiError { status: 405, message });
        return Plan::Answer(Response { header: Some(("Allow", allow)), ..response });
    };
    match route.handler {
        Handler::Answer(handler) => {
            Plan::Answer(handler(machine, &request.body).unwrap_or_else(|error| Response::error(&error)))
        }
        Handler::Stream(handler) if request.upgrade.as_deref() == Some(PROTOCOL) => Plan::Stream(handler),
        Handler::Stream(_) => {
            let message = format!("this path carries streams: ask for 'Upgrade: {PROTOCOL}'");
            let response = Response::error(&ApiError { status: 426, message });
            Plan::Answer(Response { header: Some(("Upgrade", PROTOCOL)), ..response })
        }
    }
}

/// The answer to a request that does not ask for streams; for one that does, what a machine that has none to give
/// would answer.
#[must_use]
pub fn answer(machine: &dyn Machine, request: &Request) -> Response {
    match plan(machine, request) {
        Plan::Answer(response) => response,
        Plan::Stream(_) => Response::error(&ApiError { status: 501, message: "no streams here".to_owned() }),
    }
}
