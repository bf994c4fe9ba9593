//! How many jobs a second a SQLite store hands out, to 1, 4 and 16 workers that ask for 32 at a time and end each job as
//! soon as they have it: `cargo bench -p harrier-jobs --bench claims [FOLDER]`. Claims are not synced, ends are; the two
//! are shown apart. One JSON object a line.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use harrier_jobs::queue::{Free, HostAd, NewJob, Reason, Times};
use harrier_jobs::store::{ClaimRequest, Ended, Report, SqliteStore, Store};

const JOBS: u64 = 10_000;
const BATCH: u32 = 32;
/// Ends are synced one by one, so fewer are measured.
const ENDS: u64 = 500;

fn main() {
    let folder = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).map(PathBuf::from);
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.unwrap_or_else(|| scratch.path().to_owned());
    for workers in [1, 4, 16] {
        measure(&folder.join(format!("queue-{workers}")), workers);
    }
}

fn measure(folder: &Path, workers: u64) {
    let mut job = NewJob::default();
    job.spec.command = vec!["true".to_owned()];
    job.array = Some((1, JOBS));
    let first = SqliteStore::open(folder).expect("a queue");
    let begin = Instant::now();
    first.submit("bench", None, &[job]).expect("room on the disk");
    let submitted = begin.elapsed();
    let free = Free { slots: BATCH, cpus: 1 << 20, memory_bytes: 1 << 60 };
    let claimed = AtomicU64::new(0);
    let ended = AtomicU64::new(0);
    let begin = Instant::now();
    let keys = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|number| {
                let claimed = &claimed;
                scope.spawn(move || {
                    // A connection of its own, as a process has.
                    let store = SqliteStore::open(folder).expect("a queue");
                    let host = format!("host-{number}");
                    let ad = HostAd {
                        host: host.clone(),
                        instance: host.clone(),
                        engines: vec!["soft".to_owned()],
                        ..HostAd::default()
                    };
                    store.advertise(&ad).expect("a queue");
                    let request = ClaimRequest { host: host.clone(), instance: host, count: BATCH, free };
                    let mut keys = Vec::new();
                    loop {
                        let claims = store.claim(&request).expect("a queue");
                        if claims.is_empty() {
                            return keys;
                        }
                        claimed.fetch_add(claims.len() as u64, Ordering::Relaxed);
                        keys.extend(claims.into_iter().map(|claim| claim.key));
                    }
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    let claiming = begin.elapsed();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for part in keys.chunks((ENDS / workers) as usize).take(workers as usize) {
            let ended = &ended;
            scope.spawn(move || {
                let store = SqliteStore::open(folder).expect("a queue");
                let end = Ended {
                    reason: Reason::Exited,
                    detail: None,
                    exit_code: Some(0),
                    times: Times::default(),
                };
                for key in part {
                    store.report(key, &Report::Ended(end.clone())).expect("a lease");
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let ending = begin.elapsed();
    let rate = |count: u64, time: std::time::Duration| (count as f64 / time.as_secs_f64()).round();
    println!(
        "{}",
        serde_json::json!({
            "workers": workers,
            "submitted_per_s": rate(JOBS, submitted),
            "claims_per_s": rate(claimed.into_inner(), claiming),
            "synced_ends_per_s": rate(ended.into_inner(), ending),
        })
    );
}
