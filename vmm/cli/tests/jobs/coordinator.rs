//! `harrier coordinator`, and everything else through it.

use crate::pool::{Pool, eventually};

fn tls(name: &str) -> String {
    format!("{}/tests/jobs/tls/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn two_coordinators_serve_one_queue_by_socket_and_by_tls_with_a_token() {
    let pool = Pool::new();
    let token = pool.text("token");
    std::fs::write(&token, "open sesame\n").unwrap();
    let (refused, _) = pool.coordinator(&["--listen", "127.0.0.1:0", "--token-file", &token]);
    assert!(refused.said().contains("has no token"), "{}", refused.said());
    std::fs::write(&token, "sesame\n").unwrap();
    let socket = format!("unix:{}", pool.text("socket"));
    let (mut by_socket, address) = pool.coordinator(&["--listen", &socket]);
    assert_eq!(address, socket);
    let (cert, key, ca) = (tls("cert.pem"), tls("key.pem"), tls("ca.pem"));
    let secure = ["--listen", "127.0.0.1:0", "--tls-cert", &cert, "--tls-key", &key, "--token-file", &token];
    let (_by_tls, url) = pool.coordinator(&secure);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");

    // Submitted through one, run through the other, seen through both.
    pool.use_place(&["--queue", &socket]);
    let id = pool.submit(&["--name", "far"], "echo out; echo err >&2; exit 3");
    let by_token = ["--queue", &url, "--token-file", &token, "--ca-file", &ca];
    pool.use_place(&by_token);
    let mut worker = pool.worker("w", &["--drain"]);
    assert_eq!(pool.exit_code(id), 3);
    assert_eq!(worker.wait(), 0, "{}", worker.said());
    for place in [&["--queue", &socket][..], &by_token] {
        pool.use_place(place);
        assert_eq!(pool.run(&["logs", &id.to_string()]), (0, "out\n".into(), "err\n".into()));
        assert_eq!(pool.job(id)["state"], "failed");
        assert_eq!(pool.json(&["hosts"])[0]["host"], "w");
        assert_eq!(pool.json(&["history"])[0]["spec"]["name"], "far");
    }

    // Who does not know the word, or cannot check the certificate, is told so.
    let (code, _, err) = pool.run(&["queue"]);
    assert_eq!(code, 0, "{err}");
    pool.use_place(&["--queue", &url, "--ca-file", &ca]);
    let (code, _, err) = pool.run(&["queue"]);
    assert!(code == 125 && err.contains("refuses the token"), "{err}");
    pool.use_place(&["--queue", &url, "--token-file", &token]);
    let (code, _, err) = pool.run(&["queue"]);
    assert!(code == 125 && err.contains("cannot be reached safely") && err.contains("--ca-file"), "{err}");
    // One of them ends in good order, and takes its socket with it.
    by_socket.signal("TERM");
    assert_eq!(by_socket.wait(), 0, "{}", by_socket.said());
    assert!(!pool.path("socket").exists());
    pool.use_place(&["--queue", &socket]);
    let (code, _, err) = pool.run(&["queue"]);
    assert!(
        code == 125 && err.lines().count() == 1 && err.contains("is 'harrier coordinator' running"),
        "{err}"
    );
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let pool = Pool::new();
    for (flags, part) in [
        (&["--listen", "0.0.0.0:0"][..], "has no TLS"),
        (&["--listen", "everywhere"], "'everywhere'"),
        (&["--lease", "0.1s"], "--lease 0.1s"),
        (&["--tls-cert", "x"], "--tls-key"),
        (&["--token-file", "/nowhere/token"], "/nowhere/token"),
    ] {
        let (mut process, address) = pool.coordinator(flags);
        assert_eq!((process.wait(), address.as_str()), (125, ""), "{flags:?}");
        let said = process.said();
        assert!(said.contains(part) && said.lines().count() == 1, "{flags:?}: {said}");
    }
    pool.use_place(&["--queue", "ftp://pool"]);
    let (code, _, err) = pool.run(&["queue"]);
    assert!(code == 125 && err.contains("'ftp://pool'"), "{err}");
    pool.use_place(&["--queue", &pool.text("queue"), "--token-file", "x"]);
    let (code, _, err) = pool.run(&["queue"]);
    assert!(code == 125 && err.contains("--token-file is for coordinators"), "{err}");
}

#[test]
fn a_job_goes_on_while_its_coordinator_is_killed_and_comes_back() {
    let pool = Pool::new();
    let socket = format!("unix:{}", pool.text("socket"));
    let (mut coordinator, _) = pool.coordinator(&["--listen", &socket]);
    pool.use_place(&["--queue", &socket]);
    let id = pool.submit(&[], "i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); usleep 100000; done");
    let mut worker = pool.worker("w", &["--jobs", "1"]);
    eventually("it says something", || pool.logs(id).lines().count() > 3);
    coordinator.kill();
    eventually("the worker notices", || worker.said().contains("does not answer"));
    let (_again, _) = pool.coordinator(&["--listen", &socket]);
    assert_eq!(pool.exit_code(id), 0);
    let numbers: Vec<String> = (0..40).map(|i| i.to_string()).collect();
    assert_eq!(pool.logs(id).lines().collect::<Vec<_>>(), numbers);
    assert_eq!(pool.job(id)["epoch"], 1, "nothing was run twice: {}", pool.history(id));
    assert_eq!(worker.wait(), 0, "{}", worker.said());
}
