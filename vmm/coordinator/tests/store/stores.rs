//! Stores with a clock that the test turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use harrier_coordinator::{Listen, Options, RemoteStore, serve};
use harrier_jobs::queue::{Free, HostAd, JobId, LeaseKey, NewJob, Reason, Times};
use harrier_jobs::store::{Claim, ClaimRequest, Clock, Ended, Report, SqliteStore, Store};
use tempfile::TempDir;

pub(crate) const LEASE_MS: u64 = 30_000;

#[derive(Clone)]
pub(crate) struct TestClock(Arc<AtomicU64>);

impl Clock for TestClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

pub(crate) enum Place {
    File,
    Unix,
    Tcp,
}

pub(crate) struct Fixture {
    pub(crate) store: Arc<dyn Store>,
    clock: TestClock,
    server: Option<(Sender<()>, JoinHandle<()>)>,
    _folder: TempDir,
}

/// A new store, and the way to it.
pub(crate) fn open(place: Place) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let clock = TestClock(Arc::new(AtomicU64::new(1_700_000_000_000)));
    let file: Arc<dyn Store> = Arc::new(
        SqliteStore::open_with(&folder.path().join("queue"), Arc::new(clock.clone()), LEASE_MS).unwrap(),
    );
    let listen = match place {
        Place::File => return Fixture { store: file, clock, server: None, _folder: folder },
        Place::Unix => Listen::Unix(folder.path().join("socket")),
        Place::Tcp => Listen::Tcp("127.0.0.1:0".parse().unwrap()),
    };
    let options = Options { listen, tls: None, token: Some("secret".to_owned()) };
    let (stop, stopped) = channel();
    let (ready, is_ready) = channel();
    let thread = std::thread::spawn(move || {
        let stopped = move || {
            // A test that has failed drops the sender, which is as good.
            let _: Result<(), _> = stopped.recv();
        };
        serve(file, options, |url| ready.send(url.to_owned()).unwrap(), stopped).unwrap();
    });
    let url = is_ready.recv().unwrap();
    let store = Arc::new(RemoteStore::new(&url, Some("secret".to_owned()), None).unwrap());
    Fixture { store, clock, server: Some((stop, thread)), _folder: folder }
}

/// The queue in a folder that outlives it, by the host's clock: others may open it too.
pub(crate) fn open_in(queue: &std::path::Path) -> Fixture {
    let clock = TestClock(Arc::default());
    let store = Arc::new(SqliteStore::open(queue).unwrap());
    Fixture { store, clock, server: None, _folder: tempfile::tempdir().unwrap() }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.server.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

pub(crate) fn free() -> Free {
    Free { slots: 4, cpus: 4, memory_bytes: 8 << 30 }
}

impl Fixture {
    pub(crate) fn pass(&self, ms: u64) {
        self.clock.0.fetch_add(ms, Ordering::SeqCst);
    }

    pub(crate) fn submit(&self, user: &str, change: impl Fn(&mut NewJob)) -> JobId {
        let mut job = NewJob::default();
        job.spec.command = vec!["true".to_owned()];
        change(&mut job);
        self.store.submit(user, None, &[job]).unwrap()[0]
    }

    pub(crate) fn plain(&self) -> JobId {
        self.submit("ann", |_| {})
    }

    pub(crate) fn host(&self, name: &str, change: impl Fn(&mut HostAd)) {
        let mut ad = HostAd {
            host: name.to_owned(),
            instance: format!("{name}-1"),
            slots: 4,
            cpus: 4,
            memory_bytes: 8 << 30,
            engines: vec!["soft".to_owned()],
            cpu_models: vec!["v1".to_owned(), "v2".to_owned()],
            free: free(),
            ..HostAd::default()
        };
        change(&mut ad);
        self.store.advertise(&ad).unwrap();
    }

    pub(crate) fn claim(&self, host: &str, count: u32) -> Vec<Claim> {
        let request =
            ClaimRequest { host: host.to_owned(), instance: format!("{host}-1"), count, free: free() };
        self.store.claim(&request).unwrap()
    }

    /// Claims the one job that has to be there.
    pub(crate) fn claim_one(&self, host: &str) -> Claim {
        let mut claims = self.claim(host, 1);
        assert_eq!(claims.len(), 1, "there is a job for {host}");
        claims.remove(0)
    }

    pub(crate) fn start(&self, key: &LeaseKey) {
        self.store
            .report(key, &Report::Started { engine: Some("soft".to_owned()), checkpoint: None })
            .unwrap();
    }

    pub(crate) fn end(&self, key: &LeaseKey, reason: Reason, exit_code: Option<u8>) {
        self.store.report(key, &ended(reason, exit_code)).unwrap();
    }
}

pub(crate) fn ended(reason: Reason, exit_code: Option<u8>) -> Report {
    Report::Ended(Ended { reason, detail: None, exit_code, times: Times::default() })
}
