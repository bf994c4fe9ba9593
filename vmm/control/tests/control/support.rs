//! A machine that is none, and its server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harrier_control::api::{
    ApiError, AttachRequest, ExecRequest, KillRequest, MachineInfo, MachineState, OutputInfo, SnapshotInfo,
    SnapshotRequest, StopRequest, Usage,
};
use harrier_control::exec::{ExecStreams, Execution};
use harrier_control::stream::CommandEnd;
use harrier_control::{Claim, Client, Machine, MachineRecord, NewMachine, Registry, Seat, Server};

/// How long clients of [`served`] may take.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(500);

/// Notes what it is asked for; a snapshot to `/slow` takes longer than a client may.
pub(crate) struct FakeMachine {
    record: MachineRecord,
    pub(crate) state: Mutex<MachineState>,
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
}

impl FakeMachine {
    fn enter(&self, state: MachineState) -> Result<MachineState, ApiError> {
        *self.state.lock().unwrap() = state;
        Ok(state)
    }
}

impl Machine for FakeMachine {
    fn info(&self) -> MachineInfo {
        MachineInfo {
            id: self.record.id.clone(),
            name: self.record.name.clone(),
            tty: false,
            interactive: false,
            state: *self.state.lock().unwrap(),
            pid: std::process::id(),
            created_ms: self.record.created_ms,
            started_ms: None,
            command: self.record.command.clone(),
            engine: "soft".to_owned(),
            cpu_model: "v1".to_owned(),
            cpus: 1,
            memory_bytes: 512 << 20,
            usage: Usage { resident_bytes: 1, cpu_ms: 2 },
            output: Some(OutputInfo::default()),
        }
    }

    fn pause(&self) -> Result<MachineState, ApiError> {
        if *self.state.lock().unwrap() == MachineState::Stopping {
            return Err(ApiError::conflict("the machine is ending"));
        }
        self.enter(MachineState::Paused)
    }

    fn resume(&self) -> Result<MachineState, ApiError> {
        self.enter(MachineState::Running)
    }

    fn stop(&self, request: StopRequest) -> Result<MachineState, ApiError> {
        self.asked.lock().unwrap().push(format!("{request:?}"));
        self.enter(MachineState::Stopping)
    }

    fn kill(&self, request: KillRequest) -> Result<MachineState, ApiError> {
        self.asked.lock().unwrap().push(format!("{request:?}"));
        self.enter(MachineState::Stopping)
    }

    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotInfo, ApiError> {
        self.asked.lock().unwrap().push(format!("{request:?}"));
        if request.target == "/slow" {
            std::thread::sleep(TIMEOUT * 2);
        }
        Ok(SnapshotInfo {
            path: request.target,
            id: "00".repeat(16),
            pause_us: 1,
            total_us: 2,
            pages: 3,
            pages_in_pause: 4,
            state: *self.state.lock().unwrap(),
        })
    }

    /// `echo` copies its input, `wait` waits for a signal and ends with it, `flood` writes until it is told to end.
    fn exec(&self, request: ExecRequest, streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        let [command] = request.command.as_slice() else {
            return Err(ApiError::bad_request("no command"));
        };
        let (told, hears) = channel();
        let ends = told.clone();
        let command = command.clone();
        let asked = Arc::clone(&self.asked);
        std::thread::spawn(move || {
            let ExecStreams { mut stdin, mut stdout, mut stderr } = streams;
            match command.as_str() {
                "echo" => {
                    stderr.write_all(b"echo begins\n").unwrap();
                    let result = std::io::copy(&mut stdin, &mut stdout);
                    asked.lock().unwrap().push(format!("echo {result:?}"));
                    let _ = ends.send(0);
                }
                "flood" => {
                    while stdout.write_all(&[b'x'; 50_000]).is_ok() {}
                    let _ = ends.send(141);
                }
                _ => {}
            }
        });
        Ok(Arc::new(FakeExecution {
            told: Mutex::new(told),
            hears: Mutex::new(hears),
            asked: Arc::clone(&self.asked),
        }))
    }

    fn attach(&self, request: AttachRequest, _streams: ExecStreams) -> Result<Arc<dyn Execution>, ApiError> {
        Err(ApiError::conflict(format!("{request:?}")))
    }
}

struct FakeExecution {
    told: Mutex<Sender<u8>>,
    hears: Mutex<Receiver<u8>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Execution for FakeExecution {
    fn signal(&self, number: u8) {
        let _ = self.told.lock().unwrap().send(128 + number);
    }

    fn resize(&self, rows: u16, cols: u16) {
        self.asked.lock().unwrap().push(format!("resize {rows} {cols}"));
    }

    fn client_gone(&self) {
        self.asked.lock().unwrap().push("gone".to_owned());
        let _ = self.told.lock().unwrap().send(1);
    }

    fn wait(&self) -> CommandEnd {
        CommandEnd { exit_code: self.hears.lock().unwrap().recv().unwrap(), error: None }
    }
}

/// A machine in a registry of its own.
pub(crate) struct Served {
    pub(crate) machine: Arc<FakeMachine>,
    pub(crate) client: Client,
    pub(crate) seat: Seat,
    _server: Server,
    _folder: tempfile::TempDir,
}

pub(crate) fn registry() -> (tempfile::TempDir, Registry) {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path().join("machines")).unwrap();
    (folder, registry)
}

pub(crate) fn claim(registry: &Registry, name: &str) -> Claim {
    let command = vec!["true".to_owned()];
    registry
        .create(NewMachine { name: Some(name.parse().unwrap()), command, detached: true, auto_remove: false })
        .unwrap()
}

pub(crate) fn served() -> Served {
    let (folder, registry) = registry();
    let seat = claim(&registry, "m").sit_down().unwrap();
    let machine = Arc::new(FakeMachine {
        record: seat.record().clone(),
        state: Mutex::new(MachineState::Starting),
        asked: Arc::default(),
    });
    let server = Server::start_with(
        seat.listen().unwrap(),
        Arc::clone(&machine) as Arc<dyn Machine>,
        Arc::new(|| Ok(())),
        TIMEOUT,
    )
    .unwrap();
    let client = Client::new(seat.folder());
    Served { machine, client, seat, _server: server, _folder: folder }
}

impl Served {
    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.seat.folder().socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Status and body of the answer to these bytes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        answer(&mut stream)
    }
}

pub(crate) fn answer(stream: &mut UnixStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).unwrap_or_default().parse().unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status, body)
}
