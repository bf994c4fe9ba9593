//! Plain boots of guests that are a few instructions long: the console, and every way in which a run ends.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Code, KernelFile, harrier, output, signal, texts, wait};

#[test]
fn the_console_is_on_stdout_and_each_end_has_its_message() {
    let cases: [(Code, &str); 5] = [
        (Code::default().out(0x600, 0x34), "harrier: the guest switched itself off\n"),
        (Code::default().out(0x602, 1), "harrier: the guest reset itself\n"),
        (Code::default().out(0x64, 0xfe), "harrier: the guest reset itself\n"),
        (Code::default().out(0x505, 1), "harrier: the guest kernel panicked\n"),
        (Code::default().fault(), "harrier: the guest crashed: triple fault on cpu 0 at 0x1000000\n"),
    ];
    for (code, message) in cases {
        let kernel = KernelFile::new(code);
        let (exit, stdout, stderr) = texts(output(&["run", "--kernel", &kernel.path]));
        assert_eq!((exit, stdout.as_str(), stderr.as_str()), (125, "", message));
    }
    let kernel = KernelFile::new(Code::default().print("hello\n").out(0x600, 0x34));
    let (exit, stdout, stderr) = texts(output(&["run", "--kernel", &kernel.path]));
    assert_eq!((exit, stdout.as_str(), stderr.lines().count()), (125, "hello\n", 1));
}

#[test]
fn a_crash_is_told_with_the_last_words_of_the_console() {
    let kernel =
        KernelFile::new(Code::default().print("Kernel panic - not syncing: test\nmore\n").out(0x505, 1));
    let (exit, _, stderr) = texts(output(&["run", "--kernel", &kernel.path]));
    assert_eq!(exit, 125);
    assert_eq!(
        stderr,
        "harrier: the guest kernel panicked: its console says 'Kernel panic - not syncing: test'\n"
    );
}

#[test]
fn stdin_reaches_the_serial_port() {
    let kernel = KernelFile::new(Code::default().echo_line().out(0x600, 0x34));
    let mut child = harrier(&["run", "--kernel", &kernel.path]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a line for the guest\n").unwrap();
    let (exit, stdout, _) = texts(wait(child));
    assert_eq!((exit, stdout.as_str()), (125, "a line for the guest\n"));
}

#[test]
fn the_console_can_go_to_a_file_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("console");
    let kernel = KernelFile::new(Code::default().print("kept\n").out(0x600, 0x34));
    output(&["run", "--kernel", &kernel.path, "--console", file.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "kept\n");
}

#[test]
fn guests_that_hang_are_ended_by_timeout_with_124() {
    for code in [Code::default().spin(), Code::default().halt()] {
        let kernel = KernelFile::new(code);
        let (exit, _, stderr) =
            texts(output(&["run", "--kernel", &kernel.path, "--timeout", "300ms", "--cpus", "2"]));
        assert_eq!(exit, 124);
        assert_eq!(
            stderr,
            "harrier: the run was ended after 300ms (--timeout): give it more time if it needs it\n"
        );
    }
}

#[test]
fn signals_end_the_run_with_their_code_and_in_silence() {
    for (name, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let kernel = KernelFile::new(Code::default().print("up\n").spin());
        let mut child = harrier(&["run", "--kernel", &kernel.path]).spawn().unwrap();
        let mut first = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        signal(&child, name);
        let (exit, _, stderr) = texts(wait(child));
        assert_eq!((exit, stderr.as_str()), (code, ""), "{name}");
    }
}

#[test]
fn a_console_that_nobody_reads_ends_the_run() {
    let kernel = KernelFile::new((0..2000).fold(Code::default(), |code, _| code.print("x")).spin());
    let mut child = harrier(&["run", "--kernel", &kernel.path]).spawn().unwrap();
    drop(child.stdout.take());
    let (exit, _, stderr) = texts(wait(child));
    assert_eq!(exit, 125);
    assert!(stderr.starts_with("harrier: stdout is closed"), "{stderr}");
}

#[test]
fn json_holds_console_end_and_counts() {
    let kernel = KernelFile::new(Code::default().print("hi\n").out(0x600, 0x34));
    let output = output(&["run", "--json", "--engine", "soft", "--kernel", &kernel.path, "--memory", "64M"]);
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["exit_code"], 125);
    assert_eq!(object["stdout"], "hi\n");
    assert_eq!(object["machine_end"], "the guest switched itself off");
    assert_eq!(object["engine"], "soft");
    assert_eq!(object["memory_bytes"], 64 << 20);
    assert_eq!(object["device_accesses"], 4);
    assert!(object["timings_ms"]["total"].as_f64().unwrap() > 0.0);
}

#[test]
fn timings_are_a_table_on_stderr() {
    let kernel = KernelFile::new(Code::default().out(0x600, 0x34));
    let (_, stdout, stderr) =
        texts(output(&["run", "--engine", "soft", "--timings", "--kernel", &kernel.path]));
    assert_eq!(stdout, "");
    for name in ["set-up", "first guest instruction", "total", "instructions"] {
        assert!(stderr.lines().any(|line| line.starts_with(name)), "{stderr}");
    }
}

#[test]
fn an_idle_guest_costs_no_processor_time() {
    let kernel = KernelFile::new(Code::default().print("up\n").halt());
    let mut child = harrier(&["run", "--kernel", &kernel.path, "--cpus", "4"]).spawn().unwrap();
    let mut first = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let ticks = |id: u32| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks(child.id());
    let until = Instant::now() + Duration::from_secs(1);
    std::thread::sleep(until - Instant::now());
    let used = ticks(child.id()) - before;
    signal(&child, "TERM");
    wait(child);
    // A busy loop of one thread would be 100 ticks.
    assert!(used <= 20, "{used} ticks of 10 ms in a second");
}
