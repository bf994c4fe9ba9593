//! Warm starts: a machine is snapshotted right after its agent came up (`harrier run --template DIR`), and jobs of the
//! same size begin in copies of it (`harrier run --warm DIR`). Workers do this; by hand it is of no use.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_devices::virtio::vsock::VsockListener;
use harrier_jobs::session::{Restored as RestoredSession, SECTION};
use harrier_jobs::{CommandSpec, Session, SessionOptions, Stdin, Stdio};
use harrier_machine::MachineHandle;
use harrier_machine::snapshot::{self, Kind, MachineState, Request, Restoration};
use harrier_snapshot::{Chain, Section, Snapshot};

use crate::config::{Restored, RunConfig};
use crate::exit::Failure;
use crate::snapshots::{PRODUCER, SESSION_VERSION, read_session};

/// How long the guest may take until it runs commands.
const LIMIT: Duration = Duration::from_secs(60);
/// It reads what most commands need, and shows that the agent runs commands.
const FIRST: [&str; 3] = ["/bin/sh", "-c", ":"];

/// The machine of `config` is made of a template instead of booting.
pub(crate) fn from_template(config: RunConfig, folder: &Path) -> Result<RunConfig, Failure> {
    let chain = Chain::open(folder)?;
    let machine = MachineState::read(chain.snapshot())?.config(chain.snapshot())?;
    let wanted = (config.vcpu_count, config.memory_bytes);
    if (machine.vcpu_count, machine.memory_bytes) != wanted
        || config.cpu_model.is_some_and(|model| model != machine.cpu_model)
    {
        return Err(Failure::new(format!("the template '{}' is another kind of machine", folder.display())));
    }
    let restoration = Restoration { role: snapshot::Role::Clone, clone_index: 0, is_parent: false };
    Ok(RunConfig {
        cpu_model: Some(machine.cpu_model),
        restore: Some(Restored { chain: Arc::new(chain), restoration }),
        is_warm: true,
        ..config
    })
}

/// A session with the agent of a template's copy: it has no commands yet.
pub(crate) fn session(
    snapshot: &Snapshot,
    restored: &RestoredSession,
    heartbeat: Option<Duration>,
) -> Result<Session, Failure> {
    let state = read_session(snapshot)?;
    let options = SessionOptions { reconnect: None, heartbeat, ..SessionOptions::default() };
    let none = |_: &harrier_jobs::session::CommandState| empty();
    let (session, commands) = Session::resume(&state, restored, options, none)
        .map_err(|err| Failure::new(format!("the template '{}': {err}", snapshot.path().display())))?;
    if !commands.is_empty() {
        return Err(Failure::new(format!("the template '{}' runs a command", snapshot.path().display())));
    }
    Ok(session)
}

fn empty() -> Stdio {
    Stdio { stdin: Stdin::Empty, stdout: Box::new(std::io::sink()), stderr: Box::new(std::io::sink()) }
}

/// Snapshots a machine whose agent has just come up, and leaves its end to the caller.
pub(crate) fn make(
    target: &Path,
    session: &Session,
    agent: Option<VsockListener>,
    handle: &MachineHandle,
) -> Result<(), Failure> {
    let failed = |err: &dyn std::fmt::Display| Failure::new(format!("no template can be made: {err}"));
    let deadline = Instant::now() + LIMIT;
    let agent = agent.ok_or_else(|| failed(&"the machine has no agent"))?;
    let connection = loop {
        match agent.accept(Duration::from_millis(100)) {
            Ok(connection) => break connection,
            Err(err) if err.kind() == std::io::ErrorKind::TimedOut && Instant::now() < deadline => {
                if handle.wait_for_end(Some(Instant::now())).is_some() {
                    return Err(failed(&"the machine has ended"));
                }
            }
            Err(err) => return Err(failed(&err)),
        }
    };
    session.connect(connection);
    let command = session.run(&CommandSpec::new(FIRST), empty()).map_err(|err| failed(&err))?;
    command
        .wait_for(deadline.saturating_duration_since(Instant::now()))
        .ok_or_else(|| failed(&"its first command does not end"))?
        .map_err(|err| failed(&err))?;
    let session = session.clone();
    let request = Request {
        target,
        kind: Kind::Full,
        compress: false,
        quiesce_limit: Duration::from_secs(1),
        rest: None,
        stay_paused: false,
        producer: PRODUCER,
        owner: &mut |writer| {
            let state = session.state().map_err(|err| err.to_string())?;
            let bytes = serde_json::to_vec(&state).map_err(|err| err.to_string())?;
            writer.add_section(Section { name: SECTION.to_owned(), version: SESSION_VERSION, bytes });
            Ok(())
        },
        settle: &mut || Ok(()),
        progress: &mut |_| true,
    };
    handle.snapshot(request).map(drop).map_err(|err| failed(&err))
}
