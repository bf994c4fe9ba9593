//! The thread that takes the snapshots of the machine of this process: those that clients ask for, and those that the guest
//! asks for by CHECKPOINT.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use harrier_control::api::{ApiError, MachineState, SnapshotInfo, SnapshotRequest};
use harrier_control::unix_ms;
use harrier_jobs::Session;
use harrier_machine::snapshot::{self, GuestRest, Kind, Quiesced, Request, TakeError};
use harrier_machine::{Machine, MachineHandle, WorkingSet};
use harrier_snapshot::Chain;

use super::kept::BegunCopy;
use super::{KeptByHost, PRODUCER, QUIESCE_LIMIT, store};
use crate::exit::Failure;

type Answer = Result<SnapshotInfo, ApiError>;

/// How long after a restore it is noted which pages were used.
const FIRST_MOMENTS: Duration = Duration::from_millis(500);
/// How long after that the machine may have settled, and how long after that it has.
const SETTLED: [Duration; 2] = [Duration::from_millis(1500), Duration::from_secs(10)];

/// Snapshots that the guest asks for by CHECKPOINT.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoints {
    /// Begins their names: the machine's name.
    pub(crate) prefix: String,
    /// How many are kept; the oldest goes when there is one more. Zero offers the guest none.
    pub(crate) keep: usize,
}

/// What the thread is asked for.
enum Wish {
    /// By a client.
    Client(SnapshotRequest, Sender<Answer>),
    /// By the guest.
    Guest,
}

/// Takes the snapshots of the machine of this process, in a thread that may open files.
pub(crate) struct Snapshots {
    wishes: Mutex<Sender<Wish>>,
}

impl Snapshots {
    /// Starts the thread, and offers the guest its checkpoints. The machine has not been started.
    pub(crate) fn start(
        machine: &mut Machine,
        mut kept: KeptByHost,
        checkpoints: Checkpoints,
        restored: Option<Arc<Chain>>,
    ) -> std::io::Result<Self> {
        machine.vm().on_idle(Box::new(crate::own_memory::give_back));
        let (wishes, taken) = channel::<Wish>();
        if checkpoints.keep > 0 {
            let guest = Mutex::new(wishes.clone());
            machine.on_checkpoint(Box::new(move || {
                guest.lock().unwrap_or_else(PoisonError::into_inner).send(Wish::Guest).is_ok()
            }));
        }
        let machine = machine.handle();
        std::thread::Builder::new().name("snapshots".to_owned()).spawn(move || {
            let mut made = VecDeque::new();
            let mut to_watch = restored.filter(|chain| WorkingSet::load(chain.snapshot()).is_none());
            let mut moments = [FIRST_MOMENTS].into_iter().chain(SETTLED);
            let mut next = moments.next();
            loop {
                let wish = match next {
                    None => taken.recv().map_err(|_| RecvTimeoutError::Disconnected),
                    Some(moment) => taken.recv_timeout(moment),
                };
                match wish {
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        next = moments.next();
                        match to_watch.take() {
                            Some(chain) => note_working_set(&machine, &chain),
                            None => crate::own_memory::give_back(),
                        }
                    }
                    Ok(wish) => serve(wish, &machine, &mut kept, &checkpoints, &mut made),
                }
            }
        })?;
        Ok(Snapshots { wishes: Mutex::new(wishes) })
    }

    /// Waits until the snapshot is durable. The state in the answer is left to the caller.
    pub(crate) fn take(&self, request: SnapshotRequest) -> Answer {
        let (answer, answered) = channel();
        let wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || ApiError::internal("the snapshot thread has ended: this is a bug in harrier");
        wishes.send(Wish::Client(request, answer)).map_err(|_| gone())?;
        drop(wishes);
        answered.recv().map_err(|_| gone())?
    }
}

fn serve(
    wish: Wish,
    machine: &MachineHandle,
    kept: &mut KeptByHost,
    checkpoints: &Checkpoints,
    made: &mut VecDeque<PathBuf>,
) {
    match wish {
        // Whoever asked may be gone; the snapshot is taken all the same.
        Wish::Client(request, answer) => {
            let _ = answer.send(take_one(machine, kept, &request));
        }
        Wish::Guest => checkpoint(machine, kept, checkpoints, made),
    }
}

/// Keeps which pages the machine has used so far, for its next restore.
fn note_working_set(machine: &MachineHandle, chain: &Chain) {
    let noted = match machine.working_set() {
        Ok(Some(set)) => set.store(chain.snapshot()),
        Ok(None) => Ok(()),
        Err(err) => Err(err),
    };
    // Where it cannot be kept, the next restore is no faster.
    if let Err(err) = noted {
        log::debug!("the pages that were used first are not kept: {err}");
    }
}

/// Takes the snapshot that the guest has asked for, removes those that are too many, and lets the guest go on.
fn checkpoint(
    machine: &MachineHandle,
    kept: &mut KeptByHost,
    checkpoints: &Checkpoints,
    made: &mut VecDeque<PathBuf>,
) {
    let target = store().and_then(|store| {
        std::fs::create_dir_all(&store)
            .map_err(|err| Failure::new(format!("'{}' cannot be made ({err})", store.display())))?;
        let target = store.join(format!("{}-checkpoint-{}", checkpoints.prefix, unix_ms()));
        target.into_os_string().into_string().map_err(|path| Failure::new(format!("{path:?} is not text")))
    });
    let taken = target.map_err(|err| err.message).and_then(|target| {
        let request = SnapshotRequest { target, diff: false, resume: false, image: false, compress: false };
        take_one(machine, kept, &request).map_err(|err| err.message)
    });
    machine.checkpoint_done(taken.is_ok());
    match taken {
        Ok(taken) => {
            log::info!("the guest has taken the snapshot '{}'", taken.path);
            made.push_back(PathBuf::from(taken.path));
        }
        Err(err) => log::warn!("the snapshot that the guest asked for is not taken: {err}"),
    }
    while made.len() > checkpoints.keep
        && let Some(oldest) = made.pop_front()
    {
        // One that others need, or that is gone, is nobody's trouble here.
        if let Err(err) = harrier_snapshot::remove(&oldest) {
            log::debug!("{err}");
        }
    }
}

/// The guest's agent brings it to rest where its kernel knows nothing of that: one that is not Harrier's own.
struct AgentRest(Session);

impl GuestRest for AgentRest {
    fn begin(&self, limit: Duration) -> Quiesced {
        self.0.quiesce(limit).map_or(Quiesced::TooLate, |()| Quiesced::AtRest)
    }

    fn end(&self) {
        self.0.thaw();
    }
}

fn take_one(machine: &MachineHandle, kept: &mut KeptByHost, request: &SnapshotRequest) -> Answer {
    let target = Path::new(&request.target);
    if !target.is_absolute() {
        return Err(ApiError::bad_request(format!("'{}' is no absolute path", request.target)));
    }
    let kind = match (request.image, request.diff) {
        (true, true) => return Err(ApiError::bad_request("an image is no difference: ask for one of them")),
        (true, false) if request.compress => {
            return Err(ApiError::bad_request("an image is mapped at once: it cannot be compressed"));
        }
        (true, false) => Kind::Image,
        (false, true) => Kind::Difference,
        (false, false) => Kind::Full,
    };
    let copies = RefCell::new(Vec::new());
    let rest = kept.session().map(AgentRest);
    let report = machine.snapshot(Request {
        target,
        kind,
        stay_paused: false,
        compress: request.compress,
        quiesce_limit: QUIESCE_LIMIT,
        rest: rest.as_ref().map(|rest| rest as &dyn GuestRest),
        producer: PRODUCER,
        owner: &mut |writer| {
            *copies.borrow_mut() = kept.add_to(writer, kind)?;
            Ok(())
        },
        settle: &mut || copies.borrow().iter().try_for_each(BegunCopy::finish),
        progress: &mut |_| true,
    });
    let report: snapshot::Report = report.map_err(|err| match err {
        TakeError::Ended | TakeError::Busy | TakeError::NoParent => ApiError::conflict(err.to_string()),
        _ => ApiError::internal(err.to_string()),
    })?;
    copies.take().into_iter().for_each(BegunCopy::keep);
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Ok(SnapshotInfo {
        path: report.snapshot.path().display().to_string(),
        id: report.snapshot.manifest().id.to_string(),
        pause_us: micros(report.pause),
        total_us: micros(report.total),
        pages: report.pages_copied,
        pages_in_pause: report.pages_in_pause,
        state: MachineState::Running,
    })
}
