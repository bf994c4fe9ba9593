//! Commands over the control socket: streams, signals, and clients that leave in every way.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use harrier_control::api::ExecRequest;
use harrier_control::client::ClientError;
use harrier_control::stream::{CommandEnd, FromMachine, INPUT_WINDOW, ToMachine};

use crate::support::{Served, served};

fn exec(served: &Served, command: &str) -> (impl Read + Send + use<>, UnixStream) {
    let request = ExecRequest { command: vec![command.to_owned()], stdin: true, ..ExecRequest::default() };
    served.client.exec(&request).unwrap().split().unwrap()
}

fn ended(exit_code: u8) -> FromMachine {
    FromMachine::Ended(CommandEnd { exit_code, error: None })
}

fn eventually(served: &Served, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !served.machine.asked.lock().unwrap().iter().any(|said| said == what) {
        assert!(Instant::now() < deadline, "{what}: {:?}", served.machine.asked.lock().unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    served.machine.asked.lock().unwrap().clear();
}

#[test]
fn streams_pass_in_both_directions_and_the_end_comes_last() {
    let served = served();
    let (mut from, mut to) = exec(&served, "echo");
    let sent: Vec<u8> = (0..3 * INPUT_WINDOW).map(|i| (i % 251) as u8).collect();
    let mut rest = sent.as_slice();
    let mut credit = INPUT_WINDOW;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        while credit > 0 && !rest.is_empty() {
            let (piece, tail) = rest.split_at(rest.len().min(credit).min(10_000));
            ToMachine::Input(piece.to_vec()).write(&mut to).unwrap();
            (rest, credit) = (tail, credit - piece.len());
            if rest.is_empty() {
                ToMachine::InputEnd.write(&mut to).unwrap();
            }
        }
        match FromMachine::read(&mut from).unwrap().unwrap() {
            FromMachine::Stdout(bytes) => stdout.extend(bytes),
            FromMachine::Stderr(bytes) => stderr.extend(bytes),
            FromMachine::InputCredit(count) => credit += count as usize,
            FromMachine::InputClosed => {}
            end => break assert_eq!(end, ended(0)),
        }
    }
    assert_eq!(stderr, b"echo begins\n");
    assert!(stdout == sent);
    assert!(FromMachine::read(&mut from).unwrap().is_none_or(|frame| frame == FromMachine::InputClosed));
}

#[test]
fn signals_and_sizes_reach_the_command() {
    let served = served();
    let (mut from, mut to) = exec(&served, "wait");
    ToMachine::Resize(24, 80).write(&mut to).unwrap();
    ToMachine::Signal(15).write(&mut to).unwrap();
    while FromMachine::read(&mut from).unwrap() != Some(ended(143)) {}
    eventually(&served, "resize 24 80");
}

#[test]
fn a_command_whose_client_vanishes_is_told_and_one_that_is_left_goes_on() {
    let served = served();
    drop(exec(&served, "wait"));
    eventually(&served, "gone");
    // Too much input, and what is no frame, are a vanished client.
    let request = ExecRequest { command: vec!["silent".to_owned()], stdin: true, ..ExecRequest::default() };
    let (_from, mut to) = served.client.exec(&request).unwrap().split().unwrap();
    std::io::Write::write_all(&mut to, b"\xff\0\0\0\0").unwrap();
    eventually(&served, "gone");
    // Left with a word, while it writes and nobody reads.
    let (from, mut to) = exec(&served, "flood");
    std::thread::sleep(Duration::from_millis(100));
    ToMachine::Detach.write(&mut to).unwrap();
    drop((from, to));
    std::thread::sleep(Duration::from_millis(100));
    assert!(served.machine.asked.lock().unwrap().is_empty());
    // Vanished while it writes and nobody reads.
    drop(exec(&served, "flood"));
    eventually(&served, "gone");
}

#[test]
fn more_input_than_there_is_credit_for_ends_the_connection() {
    let served = served();
    // It reads nothing, and keeps its input open.
    let (_from, mut to) = exec(&served, "flood");
    let _ =
        (0..=INPUT_WINDOW / 50_000 + 1).try_for_each(|_| ToMachine::Input(vec![0; 50_000]).write(&mut to));
    eventually(&served, "gone");
}

#[test]
fn refusals_are_answers_and_streams_have_to_be_asked_for() {
    let served = served();
    let none = served.client.exec(&ExecRequest::default()).unwrap_err();
    assert!(matches!(none, ClientError::Refused { status: 400, .. }), "{none}");
    let attached = served.client.attach(harrier_control::api::AttachRequest { stdin: true }).unwrap_err();
    assert!(matches!(attached, ClientError::Refused { status: 409, .. }), "{attached}");
    let plain = b"POST /v1/machine/exec HTTP/1.1\r\nContent-Length: 20\r\n\r\n{\"command\":[\"wait\"]}";
    assert_eq!(served.raw(plain).0, 426);
}
