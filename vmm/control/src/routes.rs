//! What can be asked of a machine, and under which path.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::api::{
    ApiError, KillRequest, MachineInfo, MachineState, SnapshotInfo, SnapshotRequest, StateChange, StopRequest,
};
use crate::http::{Request, Response};

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
}

type Handler = fn(&dyn Machine, &[u8]) -> Result<Response, ApiError>;

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
    Route { method: "GET", path: "/v1/machine", handler: |machine, _| Ok(Response::ok(&machine.info())) },
    Route { method: "POST", path: "/v1/machine/pause", handler: |machine, _| changed(machine.pause()) },
    Route { method: "POST", path: "/v1/machine/resume", handler: |machine, _| changed(machine.resume()) },
    Route {
        method: "POST",
        path: "/v1/machine/stop",
        handler: |machine, body| changed(machine.stop(parse(body)?)),
    },
    Route {
        method: "POST",
        path: "/v1/machine/kill",
        handler: |machine, body| changed(machine.kill(parse(body)?)),
    },
    Route {
        method: "POST",
        path: "/v1/machine/snapshot",
        handler: |machine, body| machine.snapshot(parse(body)?).map(|taken| Response::ok(&taken)),
    },
];

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

/// Does what a request asks for.
#[must_use]
pub fn answer(machine: &dyn Machine, request: &Request) -> Response {
    let mut here = ROUTES.iter().filter(|route| route.path == request.path).peekable();
    let Some(first) = here.peek() else {
        let message = "there is nothing under this path: see resources/control-api.json".to_owned();
        return Response::error(&ApiError { status: 404, message });
    };
    let allow = first.method;
    let Some(route) = here.find(|route| route.method == request.method) else {
        let message = format!("this path has another method: use {allow}");
        return Response { allow: Some(allow), ..Response::error(&ApiError { status: 405, message }) };
    };
    (route.handler)(machine, &request.body).unwrap_or_else(|error| Response::error(&error))
}
