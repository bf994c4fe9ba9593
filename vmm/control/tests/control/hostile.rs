//! Clients that are slow, many, rude or gone.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use harrier_control::api::SnapshotRequest;
use harrier_control::server::CONNECTIONS_MAX;

use crate::support::{answer, served};

const GET: &[u8] = b"GET /v1/machine HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn what_is_no_request_is_answered_and_costs_nothing() {
    let served = served();
    let long = [b"GET /".as_slice(), &[b'x'; 20_000]].concat();
    let headers = [b"GET / HTTP/1.1\r\n".as_slice(), &b"a: b\r\n".repeat(2000)].concat();
    let cases: [(&[u8], u16); 9] = [
        (b"\0\0\0\0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (&long, 431),
        (&headers, 431),
        (b"POST /v1/machine/stop HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]", 400),
        (b"POST /v1/machine/stop HTTP/1.1\r\nContent-Length: 8\r\n\r\n{\"x\": 1}", 400),
        (b"POST /v1/machine/kill HTTP/1.1\r\nContent-Length: 15\r\n\r\n{\"signal\": 300}", 400),
        (b"POST /v1/machine/stop HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /v1/machine/stop HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
    ];
    for (bytes, status) in cases {
        let (is, body) = served.raw(bytes);
        assert_eq!(is, status, "{}: {body}", String::from_utf8_lossy(&bytes[..bytes.len().min(60)]));
        assert!(body.contains("{\"error\":\""), "{body}");
    }
    assert!(served.machine.asked.lock().unwrap().is_empty());
    assert_eq!(served.raw(GET).0, 200);
}

/// Memory and disks may take minutes to write down, and the client hears of it all the same.
#[test]
fn what_takes_longer_than_a_client_may_is_answered() {
    let served = served();
    let request = SnapshotRequest {
        target: "/slow".to_owned(),
        diff: false,
        resume: false,
        image: false,
        compress: false,
    };
    let taken = served.client.with_timeout(Duration::from_secs(60)).snapshot(&request).unwrap();
    assert_eq!(taken.path, "/slow");
}

#[test]
fn a_client_that_says_nothing_or_too_little_is_sent_away() {
    let served = served();
    for bytes in [&b""[..], b"GET /v1/mach", b"POST /v1/machine/stop HTTP/1.1\r\nContent-Length: 5\r\n\r\n{"]
    {
        assert_eq!(served.raw(bytes).0, 408);
    }
    // A byte now and then does not buy more time.
    let mut stream = served.connect();
    let mut other = stream.try_clone().unwrap();
    let dripping = std::thread::spawn(move || {
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    });
    let (status, _) = answer(&mut other);
    assert_eq!(status, 408);
    drop(other);
    dripping.join().unwrap();
}

#[test]
fn clients_that_go_away_in_the_middle_leave_nothing_behind() {
    let served = served();
    for bytes in [&b""[..], b"GET", GET, b"POST /v1/machine/stop HTTP/1.1\r\nContent-Length: 5\r\n\r\n{"] {
        for _ in 0..20 {
            let mut stream = served.connect();
            let _ = stream.write_all(bytes);
        }
    }
    // On a busy host their connections may still be on their way out.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while served.raw(GET).0 != 200 {
        assert!(std::time::Instant::now() < deadline);
    }
}

#[test]
fn more_connections_than_there_may_be_are_turned_away_and_the_others_are_served() {
    let served = served();
    let held: Vec<UnixStream> = (0..CONNECTIONS_MAX).map(|_| served.connect()).collect();
    let (status, body) = served.raw(GET);
    assert_eq!(status, 503, "{body}");
    // The idle ones run out of time and make room.
    let statuses: Vec<u16> = held.into_iter().map(|mut stream| answer(&mut stream).0).collect();
    assert_eq!(statuses, [408; CONNECTIONS_MAX]);
    assert_eq!(served.raw(GET).0, 200);
}

#[test]
fn another_user_is_refused_even_where_the_folder_would_let_him_in() {
    use std::os::unix::fs::PermissionsExt as _;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be somebody else for a moment");
        return;
    }
    let served = served();
    let mut path = served.seat.folder().socket();
    loop {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        if !path.pop() || path == std::env::temp_dir() {
            break;
        }
    }
    let socket = served.seat.folder().socket();
    // Credentials are a thread's own, and go with it.
    let ask = move |uid: Option<u32>| {
        let socket = socket.clone();
        std::thread::spawn(move || {
            if let Some(uid) = uid.map(rustix::process::Uid::from_raw) {
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            }
            let mut stream = UnixStream::connect(socket).unwrap();
            let _ = stream.write_all(b"POST /v1/machine/pause HTTP/1.1\r\nHost: x\r\n\r\n");
            answer(&mut stream)
        })
        .join()
        .unwrap()
    };
    let (status, body) = ask(Some(65_534));
    assert_eq!(status, 403, "{body}");
    assert!(body.contains("only the owner"), "{body}");
    assert_eq!(*served.machine.state.lock().unwrap(), harrier_control::api::MachineState::Starting);
    assert_eq!(ask(None).0, 200);
}
