//! The control socket's server: a thread that accepts, and a thread for each connection, of which there are few.
//!
//! Only the user whose process this is may connect. A client has a few seconds to say what it wants, and as long to take
//! the answer.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;

use crate::api::ApiError;
use crate::exec;
use crate::http::{Response, read_request};
use crate::routes::{Machine, Plan, plan};
use crate::stream::PROTOCOL;

/// Most connections at once.
pub const CONNECTIONS_MAX: usize = 64;
/// How long a request may take to arrive, and its answer to be taken.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Stack of a thread that serves a connection, in bytes.
pub(crate) const STACK: usize = 256 << 10;
/// How long to wait when the host has no descriptors or threads.
const BACK_OFF: Duration = Duration::from_millis(50);

/// What every thread of the server does first: the place for a system-call filter.
pub type OnThreadStart = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The running server; dropping it ends it. Connections that are being served go on to their end.
pub struct Server {
    listener: Arc<UnixListener>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What all threads of the server know.
struct Shared {
    machine: Arc<dyn Machine>,
    on_start: OnThreadStart,
    connections: AtomicUsize,
    timeout: Duration,
}

impl Server {
    /// Serves `machine` on `listener`.
    ///
    /// # Errors
    /// The host's, if it has no thread, and that of `on_start`.
    pub fn start(
        listener: UnixListener,
        machine: Arc<dyn Machine>,
        on_start: OnThreadStart,
    ) -> io::Result<Self> {
        Self::start_with(listener, machine, on_start, REQUEST_TIMEOUT)
    }

    /// [`Server::start`] with another limit on how long a client may take.
    ///
    /// # Errors
    /// As there.
    pub fn start_with(
        listener: UnixListener,
        machine: Arc<dyn Machine>,
        on_start: OnThreadStart,
        timeout: Duration,
    ) -> io::Result<Self> {
        let listener = Arc::new(listener);
        let ended = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared { machine, on_start, connections: AtomicUsize::new(0), timeout });
        let (accepting, seen) = (Arc::clone(&listener), Arc::clone(&ended));
        let serving = Arc::clone(&shared);
        let (told, started) = std::sync::mpsc::channel();
        let thread =
            std::thread::Builder::new().name("control".to_owned()).stack_size(STACK).spawn(move || {
                let result = (serving.on_start)();
                let good = result.is_ok();
                // Whoever starts the server waits for this.
                let _ = told.send(result);
                if good {
                    accept(&accepting, &serving, &seen);
                }
            })?;
        started.recv().map_err(|_| io::Error::other("the thread ended"))??;
        Ok(Self { listener, ended, thread: Some(thread), shared })
    }

    /// Gives the connections that there are this long to come to their end.
    pub fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.shared.connections.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // Makes accept return.
        if rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic in it has been said.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, ended: &AtomicBool) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if ended.load(Ordering::Acquire) => return,
            Err(err)
                if matches!(err.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) =>
            {
                continue;
            }
            Err(err) => {
                log::debug!("control socket: {err}");
                std::thread::sleep(BACK_OFF);
                continue;
            }
        };
        let Some(slot) = Slot::take(shared) else {
            refuse(stream, 503, "too many connections: try again");
            continue;
        };
        if !is_owner(&stream) {
            refuse(stream, 403, "only the owner of the machine may control it");
            continue;
        }
        let serving = Arc::clone(shared);
        let spawned =
            std::thread::Builder::new().name("control".to_owned()).stack_size(STACK).spawn(move || {
                serve(&serving, stream);
                drop(slot);
            });
        if let Err(err) = spawned {
            log::debug!("control socket: no thread: {err}");
            std::thread::sleep(BACK_OFF);
        }
    }
}

/// One of the connections that may be open.
struct Slot(Arc<Shared>);

impl Slot {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let slot = Self(Arc::clone(shared));
        (shared.connections.fetch_add(1, Ordering::AcqRel) < CONNECTIONS_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers without having listened. Nothing here waits: an answer fits the socket's buffer.
fn refuse(stream: UnixStream, status: u16, message: &str) {
    if stream.set_nonblocking(true).is_ok() {
        let response = Response::error(&ApiError { status, message: message.to_owned() });
        // A client that is gone needs no answer.
        let _ = response.write(&mut &stream);
        hang_up(&stream);
    }
}

fn serve(shared: &Shared, stream: UnixStream) {
    let mut connection = Timed { stream, deadline: Instant::now() + shared.timeout };
    let request = read_request(&mut connection);
    let plan = match &request {
        Ok(request) => plan(shared.machine.as_ref(), request),
        Err(err) => match err.answer() {
            Some(error) => Plan::Answer(Response::error(&error)),
            None => return,
        },
    };
    match (plan, request) {
        (Plan::Stream(handler), Ok(request)) => {
            let connected = exec::connect(connection.stream, |output, streams| {
                match handler(shared.machine.as_ref(), &request.body, streams) {
                    Ok(execution) => Response::write_switching(PROTOCOL, output).is_ok().then_some(execution),
                    Err(error) => {
                        let _ = Response::error(&error).write(output);
                        hang_up(output);
                        None
                    }
                }
            });
            match connected {
                Ok(Some(connection)) => connection.carry(),
                Ok(None) => {}
                Err(err) => log::debug!("control socket: {err}"),
            }
        }
        (Plan::Answer(response), _) => {
            // From now on: what was asked for may have taken long.
            connection.deadline = Instant::now() + shared.timeout;
            if let Err(err) = response.write(&mut connection) {
                log::debug!("control socket: the answer was not taken: {err}");
            }
            hang_up(&connection.stream);
        }
        (Plan::Stream(_), Err(_)) => {}
    }
}

/// Takes what the client has sent beyond its request. A socket that is closed with unread bytes is reset, and the client
/// may lose the answer.
fn hang_up(mut stream: &UnixStream) {
    let mut unread = [0; 4096];
    if stream.set_nonblocking(true).is_ok() {
        for _ in 0..64 {
            if !stream.read(&mut unread).is_ok_and(|count| count > 0) {
                return;
            }
        }
    }
}

/// Whether the other end is a process of the same user, by what the kernel says (SO_PEERCRED, unix(7)).
fn is_owner(stream: &UnixStream) -> bool {
    socket_peercred(stream).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// A connection whose reads and writes all together take no longer than until a deadline.
#[derive(Debug)]
pub struct Timed {
    pub(crate) stream: UnixStream,
    pub(crate) deadline: Instant,
}

impl Timed {
    /// Connects to a socket of this host; all that follows takes no longer than `timeout` either.
    ///
    /// # Errors
    /// Nobody listens there, or takes no connections in that time.
    pub fn connect(path: &Path, timeout: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + timeout;
        Ok(Self { stream: crate::socket::connect(path, timeout)?, deadline })
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        // A client that goes away is an error here, and no SIGPIPE: std's programs ignore it.
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
