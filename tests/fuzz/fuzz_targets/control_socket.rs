//! What a client may say on a machine's control socket: requests, then frames. Whatever comes is answered with a status
//! that the API has, and an answer can be read back.

#![no_main]

use std::sync::Arc;

use harrier_control::api::{
    ApiError, AttachRequest, ExecRequest, KillRequest, MachineInfo, MachineState, SnapshotInfo,
    SnapshotRequest, StopRequest,
};
use harrier_control::exec::{ExecStreams, Execution};
use harrier_control::http::{HttpError, read_request, read_response};
use harrier_control::routes::{Machine, answer};
use harrier_control::stream::{FromMachine, PAYLOAD_MAX, ToMachine};
use libfuzzer_sys::fuzz_target;

struct Fake;

impl Machine for Fake {
    fn info(&self) -> MachineInfo {
        MachineInfo {
            id: "0123456789ab".to_owned().try_into().expect("an id"),
            name: "fuzz".parse().expect("a name"),
            tty: false,
            interactive: false,
            state: MachineState::Running,
            pid: 1,
            created_ms: 2,
            started_ms: Some(3),
            command: Vec::new(),
            engine: String::new(),
            cpu_model: String::new(),
            cpus: 1,
            memory_bytes: 1,
            usage: Default::default(),
            output: None,
        }
    }

    fn pause(&self) -> Result<MachineState, ApiError> {
        Ok(MachineState::Paused)
    }

    fn resume(&self) -> Result<MachineState, ApiError> {
        Ok(MachineState::Running)
    }

    fn stop(&self, _request: StopRequest) -> Result<MachineState, ApiError> {
        Ok(MachineState::Stopping)
    }

    fn kill(&self, _request: KillRequest) -> Result<MachineState, ApiError> {
        Ok(MachineState::Stopping)
    }

    fn snapshot(&self, _request: SnapshotRequest) -> Result<SnapshotInfo, ApiError> {
        Err(ApiError::conflict("no snapshots"))
    }

    fn exec(&self, _request: ExecRequest, _streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        Err(ApiError::conflict("no commands"))
    }

    fn attach(&self, _request: AttachRequest, _streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        Err(ApiError::conflict("no command"))
    }
}

fuzz_target!(|data: &[u8]| {
    let response = match read_request(&mut &*data) {
        Ok(request) => Some(answer(&Fake, &request)),
        Err(HttpError::Closed) => None,
        Err(err) => {
            let error = err.answer().expect("a request that came is answered");
            Some(harrier_control::http::Response::error(&error))
        }
    };
    if let Some(response) = response {
        assert!(
            matches!(response.status, 200 | 400 | 404 | 405 | 409 | 411 | 413 | 426 | 431 | 501),
            "{response:?}"
        );
        let mut bytes = Vec::new();
        response.write(&mut bytes).expect("a vector takes everything");
        let read = read_response(&mut bytes.as_slice()).expect("what is written is read");
        assert_eq!((read.status, read.body), (response.status, response.body));
    }
    // The client reads what a monitor of any version says.
    let _ = read_response(&mut &*data);
    let mut frames = data;
    while let Ok(Some(frame)) = ToMachine::read(&mut frames) {
        assert!(!matches!(&frame, ToMachine::Input(bytes) if bytes.len() > PAYLOAD_MAX));
    }
    let mut frames = data;
    while let Ok(Some(_)) = FromMachine::read(&mut frames) {}
});
