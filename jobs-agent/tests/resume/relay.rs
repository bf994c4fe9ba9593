//! An agent whose connections to the host are cut as planned.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use harrier_jobs::Session;

/// After how many bytes a connection is cut, from the agent and to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) from_agent: u64,
    pub(crate) to_agent: u64,
}

pub(crate) const NEVER: Cut = Cut { from_agent: u64::MAX, to_agent: u64::MAX };

/// An agent that dials through a relay which cuts its connections as planned; the last one stays.
pub(crate) struct Relay {
    pub(crate) agent: Child,
    _folder: tempfile::TempDir,
    is_over: Arc<AtomicBool>,
    pub(crate) path: std::path::PathBuf,
    /// Where connections go at present.
    pub(crate) session: Arc<Mutex<Option<Session>>>,
    /// The last connection's agent end.
    pub(crate) last: Arc<Mutex<Option<UnixStream>>>,
}

impl Relay {
    pub(crate) fn new(session: &Session, cuts: impl IntoIterator<Item = Cut>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = start_agent(&path);
        let is_over = Arc::new(AtomicBool::new(false));
        let session = Arc::new(Mutex::new(Some(session.clone())));
        let last = Arc::new(Mutex::new(None));
        let mut cuts: VecDeque<Cut> = cuts.into_iter().collect();
        thread::spawn({
            let (is_over, session, last) = (Arc::clone(&is_over), Arc::clone(&session), Arc::clone(&last));
            move || {
                while let Ok((agent, _)) = listener.accept() {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let cut = cuts.pop_front().unwrap_or(NEVER);
                    *last.lock().unwrap() = Some(agent.try_clone().unwrap());
                    if let Some(session) = &*session.lock().unwrap() {
                        relay(agent, session, cut);
                    }
                }
            }
        });
        Self { agent, _folder: folder, is_over, path, session, last }
    }

    /// Ends the agent as a host does, and waits for it.
    pub(crate) fn end(mut self, session: &Session) {
        // The owner of a machine sees it end; here that is the agent's process.
        thread::scope(|scope| {
            let agent = &mut self.agent;
            scope.spawn(move || {
                assert!(agent.wait().unwrap().success());
                session.machine_ended();
            });
            session.shut_down(Duration::from_secs(60)).unwrap();
        });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Where a test has failed; otherwise it has ended.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // Its thread ends with the next connection, or with the test.
        self.is_over.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&self.path));
    }
}

fn start_agent(path: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_harrier-jobs-agent"))
        .arg("--redial-unix")
        .arg(path)
        .stdin(ProcessStdio::null())
        .spawn()
        .unwrap()
}

/// Connects the agent to the session until the cut.
fn relay(agent: UnixStream, session: &Session, cut: Cut) {
    let (near, host) = UnixStream::pair().unwrap();
    session.connect(host);
    for (from, to, limit) in [(&agent, &near, cut.from_agent), (&near, &agent, cut.to_agent)] {
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || pump(from, to, limit));
    }
}

fn pump(mut from: UnixStream, mut to: UnixStream, mut limit: u64) {
    let mut buffer = vec![0; 64 * 1024];
    while limit > 0 {
        let room = buffer.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        match from.read(&mut buffer[..room]) {
            Ok(count @ 1..) if to.write_all(&buffer[..count]).is_ok() => limit -= count as u64,
            _ => break,
        }
    }
    // Both ends see that it is over, whatever is still under way.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
