//! A worker behind a network that is cut.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::pool::{Pool, chain, chain_output, eventually};

/// Passes connections on, or swallows everything as a cut cable does.
struct Cable {
    address: String,
    cut: Arc<AtomicBool>,
}

impl Cable {
    fn to(target: &str) -> Self {
        let target = target.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let cut = Arc::new(AtomicBool::new(false));
        let is_cut = cut.clone();
        // Both end with the test's process.
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let far = TcpStream::connect(&target).unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to, cut) =
                        (from.try_clone().unwrap(), to.try_clone().unwrap(), is_cut.clone());
                    std::thread::spawn(move || copy(from, to, &cut));
                }
            }
        });
        Cable { address, cut }
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        // What was sent into a cut cable is lost, and with it the connection.
        if count == 0 || cut.load(Ordering::SeqCst) || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    while cut.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn a_worker_that_is_cut_off_pauses_goes_on_if_it_is_back_in_time_and_is_fenced_if_not() {
    let pool = Pool::new();
    let (_coordinator, url) = pool.coordinator(&["--listen", "127.0.0.1:0", "--lease", "12s"]);
    let cable = Cable::to(&url);
    pool.use_place(&["--queue", &cable.address]);
    let first = pool.worker("first", &["--jobs", "1"]);
    pool.use_place(&["--queue", &url]);
    let id = pool.submit(&["--checkpoint-interval", "never"], &chain(150, 50_000));
    let steps = || pool.logs(id).lines().count();
    eventually("it has begun", || steps() > 10);

    cable.cut.store(true, Ordering::SeqCst);
    eventually("it stands still before its lease ends", || first.said().contains("stands still"));
    cable.cut.store(false, Ordering::SeqCst);
    eventually("it goes on", || first.said().contains("goes on"));
    let before = steps();
    eventually("and works", || steps() > before + 5);
    assert_eq!(pool.job(id)["epoch"], 1, "nobody else has it: {}", pool.history(id));

    cable.cut.store(true, Ordering::SeqCst);
    eventually("the lease is over", || pool.history(id).contains("worker_lost"));
    // Given up, or ended all the same: where the engine is fast, the command comes to its end meanwhile.
    eventually("its holder has noticed", || first.said().contains("its lease is over"));
    let second = pool.worker("second", &["--jobs", "1"]);
    eventually("another has it", || pool.job(id)["host"] == "second");
    cable.cut.store(false, Ordering::SeqCst);
    assert_eq!(pool.exit_code(id), 0, "{}\n{}", second.said(), pool.history(id));
    assert_eq!(pool.logs(id), chain_output(150), "{}", pool.history(id));
    assert_eq!(pool.history(id).matches("succeeded").count(), 1);
}

#[test]
fn a_result_that_comes_after_its_lease_counts_for_nothing() {
    let pool = Pool::new();
    let (_coordinator, url) = pool.coordinator(&["--listen", "127.0.0.1:0", "--lease", "6s"]);
    let cable = Cable::to(&url);
    pool.use_place(&["--queue", &cable.address]);
    let first = pool.worker("first", &["--jobs", "1"]);
    pool.use_place(&["--queue", &url]);
    let id = pool.submit(&[], "echo begun; sleep 2; echo $HARRIER_ATTEMPT; exit $((HARRIER_ATTEMPT + 2))");
    eventually("it has begun", || pool.logs(id).contains("begun"));
    cable.cut.store(true, Ordering::SeqCst);
    pool.wait_for_event(id, "worker_lost");
    let _second = pool.worker("second", &["--jobs", "1"]);
    assert_eq!(pool.exit_code(id), 4, "the second attempt's: {}\n{}", first.said(), pool.history(id));
    cable.cut.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(pool.logs(id), "begun\n2\n");
    let job = pool.job(id);
    assert_eq!((job["exit_code"].as_u64(), job["epoch"].as_u64()), (Some(4), Some(2)), "{}", first.said());
}
