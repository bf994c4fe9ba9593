//! The real agent as an ordinary process whose connection is cut, at every point and again and again: the session goes on
//! as if nothing had happened, nothing is lost and nothing comes twice.

mod files;
mod relay;

use std::io::{self, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use harrier_jobs::session::Restored;
use harrier_jobs::{CommandSpec, Outcome, Session, SessionOptions, SessionState, Status, Stdin, Stdio};
use proptest::prelude::*;
use relay::{Cut, NEVER, Relay};

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Capture {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// Bytes of all values without a short period.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

struct Ended {
    outcome: Outcome,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Runs a command with this input over connections that are cut.
fn run(spec: &CommandSpec, input: Vec<u8>, cuts: &[Cut]) -> Ended {
    let session = Session::new(SessionOptions::default()).unwrap();
    let relay = Relay::new(&session, cuts.iter().copied());
    let (stdout, stderr) = (Capture::default(), Capture::default());
    let stdio = Stdio {
        stdin: Stdin::Reader(Box::new(io::Cursor::new(input))),
        stdout: Box::new(stdout.clone()),
        stderr: Box::new(stderr.clone()),
    };
    let outcome = session.run(spec, stdio).unwrap().wait().unwrap();
    relay.end(&session);
    let take = |capture: &Capture| std::mem::take(&mut *capture.0.lock().unwrap());
    Ended { outcome, stdout: take(&stdout), stderr: take(&stderr) }
}

fn sh(script: &str) -> CommandSpec {
    CommandSpec::new(["sh", "-c", script])
}

#[test]
fn a_short_command_survives_a_cut_at_every_byte() {
    let script = "read line; echo \"got $line\"; echo told >&2; exit 3";
    let whole = 360;
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            thread::spawn(move || {
                for at in (worker..whole).step_by(8) {
                    for cut in [Cut { from_agent: at, ..NEVER }, Cut { to_agent: at, ..NEVER }] {
                        let ended = run(&sh(script), b"input\n".to_vec(), &[cut]);
                        let found = (ended.outcome.status, &*ended.stdout, &*ended.stderr);
                        let expected = (Status::Exited(3), b"got input\n".as_slice(), b"told\n".as_slice());
                        assert_eq!(found, expected, "{cut:?}");
                    }
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn streams_arrive_whole_over_any_number_of_cuts(
        length in 0_usize..1_500_000,
        cuts in prop::collection::vec((0_u64..400_000, 0_u64..400_000), 0..8),
    ) {
        let data = pattern(length);
        let cuts: Vec<Cut> =
            cuts.into_iter().map(|(from_agent, to_agent)| Cut { from_agent, to_agent }).collect();
        // Everything goes through stdin and comes back on both outputs.
        let ended = run(&sh("tee /proc/self/fd/2"), data.clone(), &cuts);
        prop_assert_eq!(ended.outcome.status, Status::Exited(0));
        prop_assert!(ended.stdout == data, "stdout: {} of {} bytes", ended.stdout.len(), data.len());
        prop_assert!(ended.stderr == data, "stderr: {} of {} bytes", ended.stderr.len(), data.len());
        prop_assert_eq!(ended.outcome.stdin_bytes, length as u64);
    }
}

#[test]
fn signals_are_sent_once_however_often_the_connection_is_cut() {
    let session = Session::new(SessionOptions::default()).unwrap();
    // Each cut falls among the signals.
    let relay = Relay::new(&session, (0..20).map(|index| Cut { from_agent: 300 + 7 * index, ..NEVER }));
    let stdout = Capture::default();
    let stdio = Stdio { stdin: Stdin::Empty, stdout: Box::new(stdout.clone()), stderr: Box::new(io::sink()) };
    let script =
        "n=0; trap 'n=$((n+1)); echo $n' USR1; echo ready; while [ $n -lt 12 ]; do sleep 0.01; done; exit 0";
    let command = session.run(&sh(script), stdio).unwrap();
    let wait_for = |lines: usize| {
        while stdout.text().lines().count() < lines {
            thread::sleep(Duration::from_millis(1));
        }
    };
    wait_for(1);
    for sent in 1..=12 {
        command.controller().signal(10);
        wait_for(1 + sent);
    }
    assert_eq!(command.wait().unwrap().status, Status::Exited(0));
    assert_eq!(stdout.text(), "ready\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n");
    relay.end(&session);
}

/// Waits for a condition that another thread or process brings about.
fn until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn commands_go_on_without_a_host_and_another_process_takes_over_where_output_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("mark");
    let original = Session::new(SessionOptions::default()).unwrap();
    let relay = Relay::new(&original, []);
    let before = Capture::default();
    let stdio = |capture: &Capture| Stdio {
        stdin: Stdin::Empty,
        stdout: Box::new(capture.clone()),
        stderr: Box::new(io::sink()),
    };
    let script = format!(
        "echo first; while ! [ -e {0} ]; do sleep 0.01; done; seq 300000; rm {0}; exit 4",
        mark.display()
    );
    let command = original.run(&sh(&script), stdio(&before)).unwrap();
    until(|| before.text() == "first\n");
    let state = loop {
        let state = original.state().unwrap();
        if state.commands[0].stdout.offset == 6 {
            break state;
        }
    };
    let state: SessionState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    // The host goes away, without a word to the agent; the agent finds nobody.
    *relay.session.lock().unwrap() = None;
    drop((original, command));
    relay.last.lock().unwrap().take().unwrap().shutdown(Shutdown::Both).unwrap();
    std::fs::write(&mark, "").unwrap();
    // It has written all that fits the window and the pipe, and ends only when someone reads.
    thread::sleep(Duration::from_millis(50));
    assert!(mark.exists() && before.len() == 6);

    let after = Capture::default();
    let (session, mut commands) =
        Session::resume(&state, &Restored::default(), SessionOptions::default(), |_| stdio(&after)).unwrap();
    *relay.session.lock().unwrap() = Some(session.clone());
    if let Some(waiting) = relay.last.lock().unwrap().take() {
        // An attempt of the agent's that nobody took.
        let _ = waiting.shutdown(Shutdown::Both);
    }
    let outcome = commands.remove(0).wait().unwrap();
    assert_eq!(outcome.status, Status::Exited(4));
    let expected: String = (1..=300_000).map(|line| format!("{line}\n")).collect();
    assert!(after.text() == expected, "{} of {} bytes", after.len(), expected.len());
    assert_eq!(outcome.stdout_bytes, 6 + expected.len() as u64);
    relay.session.lock().unwrap().take();
    relay.end(&session);
}

#[test]
fn an_agent_without_a_host_ends_when_its_time_is_over() {
    let options = SessionOptions { linger: Some(Duration::from_millis(30)), ..SessionOptions::default() };
    let session = Session::new(options).unwrap();
    let mut relay = Relay::new(&session, []);
    let stdout = Capture::default();
    let stdio = Stdio { stdin: Stdin::Empty, stdout: Box::new(stdout.clone()), stderr: Box::new(io::sink()) };
    let command = session.run(&sh("echo $$; sleep 1000"), stdio).unwrap();
    until(|| stdout.len() > 0);
    // No more connections, and the present one is gone.
    std::fs::remove_file(&relay.path).unwrap();
    relay.last.lock().unwrap().take().unwrap().shutdown(Shutdown::Both).unwrap();
    assert!(relay.agent.wait().unwrap().success());
    session.machine_ended();
    assert!(command.wait().is_err());
    let process = format!("/proc/{}/stat", stdout.text().trim());
    let is_gone = || {
        let state = std::fs::read_to_string(&process).unwrap_or_default();
        state.is_empty() || state.contains(") Z ") || state.contains(") X ")
    };
    until(is_gone);
}

#[test]
fn a_machine_that_is_quiet_begins_nothing_until_it_may_and_says_that_it_lives() {
    let options = SessionOptions { heartbeat: Some(Duration::from_millis(10)), ..SessionOptions::default() };
    let session = Session::new(options).unwrap();
    let relay = Relay::new(&session, []);
    let stdio = || Stdio { stdin: Stdin::Empty, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    assert_eq!(session.run(&sh("exit 1"), stdio()).unwrap().wait().unwrap().status, Status::Exited(1));
    until(|| session.health().heartbeats > 3);
    session.quiesce(Duration::from_secs(60)).unwrap();
    let waiting = session.run(&sh("exit 2"), stdio()).unwrap();
    assert!(waiting.wait_for(Duration::from_millis(200)).is_none());
    // It is asked again on a new connection, and still lives.
    let before = session.health().heartbeats;
    relay.last.lock().unwrap().take().unwrap().shutdown(Shutdown::Both).unwrap();
    until(|| session.health().heartbeats > before + 3);
    assert!(waiting.wait_for(Duration::from_millis(200)).is_none());
    session.thaw();
    assert_eq!(waiting.wait().unwrap().status, Status::Exited(2));
    // Nobody is there to be quiet.
    let alone = Session::new(SessionOptions::default()).unwrap();
    let refused = alone.quiesce(Duration::from_millis(20)).unwrap_err().to_string();
    assert!(refused.contains("did not answer within"), "{refused}");
    relay.end(&session);
}
