//! Commands in the default guest, as a user runs them. They need what `cargo xtask test` makes: the guest, the images of
//! root file systems and the distribution's kernel.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

use crate::support::{cache, harrier, output, signal, talkative, texts, wait};

/// The exit code, stdout and stderr of a command in the guest.
fn run(args: &[&str]) -> (i32, String, String) {
    texts(output(&[&["run", "--quiet"], args].concat()))
}

fn shell(script: &str) -> (i32, String, String) {
    run(&["--", "sh", "-c", script])
}

/// A shell in the guest that has set its traps and said so; signals reach it from here on.
fn running_shell(traps: &str, script: &str) -> Child {
    let script = format!("{traps}; echo up; {script}");
    let mut child = harrier(&["run", "--quiet", "--", "sh", "-c", &script]).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::with_capacity(1, child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    child.stdout = Some(stdout.into_inner());
    child
}

#[test]
fn the_exit_code_is_the_commands() {
    assert_eq!(run(&["--", "true"]), (0, String::new(), String::new()));
    assert_eq!(run(&["false"]).0, 1);
    assert_eq!(shell("exit 42").0, 42);
    assert_eq!(shell("kill -9 $$").0, 137);
}

#[test]
fn commands_that_cannot_start_have_their_codes_and_a_line() {
    let (code, stdout, stderr) = run(&["--", "no-such-command"]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (127, "", 1), "{stderr}");
    assert!(stderr.starts_with("harrier: ") && stderr.contains("no-such-command"), "{stderr}");
    let (code, stdout, stderr) = run(&["--", "/proc/version"]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (126, "", 1), "{stderr}");
}

#[test]
fn stdout_and_stderr_stay_apart() {
    assert_eq!(shell("echo out; echo err >&2; exit 3"), (3, "out\n".to_owned(), "err\n".to_owned()));
}

#[test]
fn environment_and_directory_reach_the_command() {
    let (code, stdout, stderr) =
        run(&["-e", "A=b c", "--workdir", "/tmp", "--", "sh", "-c", "echo \"$A\"; pwd; uname -s"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "b c\n/tmp\nLinux\n", ""));
}

#[test]
fn megabytes_of_any_bytes_pass_in_both_directions() {
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child = harrier(&["run", "--quiet", "--", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = data.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let mut received = Vec::new();
    child.stdout.as_mut().unwrap().read_to_end(&mut received).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(wait(child).status.code(), Some(0));
    assert!(received == data, "{} of {} bytes", received.len(), data.len());
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let mut child = harrier(&["run", "--quiet", "--", "yes"]).spawn().unwrap();
    let mut some = [0; 4096];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    drop(child.stdout.take());
    let (code, _, stderr) = texts(wait(child));
    assert_eq!((code, stderr.as_str()), (141, ""));
}

#[test]
fn timeout_and_signals_end_everything() {
    let (code, _, stderr) = run(&["--timeout", "5s", "--", "sleep", "1000"]);
    assert_eq!((code, stderr.lines().count()), (124, 1), "{stderr}");
    for (name, code) in [("TERM", 143), ("HUP", 129)] {
        let child = running_shell("trap '' TERM HUP", "sleep 1000");
        signal(&child, name);
        let (exit, _, stderr) = texts(wait(child));
        assert_eq!((exit, stderr.as_str()), (code, ""), "{name}");
    }
}

#[test]
fn the_first_interrupt_reaches_the_command_and_the_second_ends_the_machine() {
    let child = running_shell("trap 'exit 7' INT", "while :; do sleep 0.1; done");
    signal(&child, "INT");
    assert_eq!(wait(child).status.code(), Some(7));
    let mut child = running_shell("trap 'echo caught' INT", "while :; do sleep 0.1; done");
    signal(&child, "INT");
    let mut line = String::new();
    let mut stdout = BufReader::with_capacity(1, child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "caught\n");
    signal(&child, "INT");
    assert_eq!(wait(child).status.code(), Some(130));
}

#[test]
fn json_is_one_object_with_the_output_in_it() {
    // Instructions are counted in software only.
    let script = "echo out; printf '\\377' >&2; exit 5";
    let output = output(&["run", "--json", "--engine", "soft", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(5));
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["exit_code"], 5);
    assert_eq!(object["status"], "exited");
    assert_eq!(object["stdout"], "out\n");
    assert_eq!(object["stderr_base64"], "/w==");
    for phase in ["set_up", "kernel_entry_to_agent", "agent_to_command", "command", "total"] {
        assert!(object["timings_ms"][phase].as_f64().is_some(), "{phase}");
    }
    assert!(object["instructions"].as_u64().unwrap() > 1_000_000);
}

#[test]
fn several_processors_and_more_disks_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, [b'd'; 8192]).unwrap();
    let disk = disk.to_str().unwrap();
    let read_only = format!("{disk}:ro");
    let (code, stdout, stderr) = run(&[
        "--cpus",
        "3",
        "--disk",
        &read_only,
        "--",
        "sh",
        "-c",
        "nproc; head -c 4 /dev/vda; blockdev --getsize64 /dev/vda",
    ]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "3\ndddd8192\n", ""));
    let (code, _, stderr) = run(&["--disk", disk, "--", "sh", "-c", "echo changed > /dev/vda; sync"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(std::fs::read(disk).unwrap().starts_with(b"changed\n"));
}

#[test]
fn a_guest_that_dies_under_the_command_is_told() {
    let (code, _, stderr) = run(&["--cmdline", "rdinit=/none", "--", "true"]);
    assert_eq!((code, stderr.lines().count()), (125, 1), "{stderr}");
    assert!(stderr.contains("the guest kernel panicked: its console says 'Kernel panic"), "{stderr}");
    let (code, _, stderr) = shell("poweroff -f; sleep 1000");
    assert_eq!(code, 125);
    assert!(stderr.contains("the guest switched itself off"), "{stderr}");
    let (code, _, stderr) = shell("reboot -f; sleep 1000");
    assert_eq!(code, 125);
    assert!(stderr.contains("the guest reset itself"), "{stderr}");
}

#[test]
fn root_file_systems_are_used_unmodified_below_a_writable_overlay() {
    for name in ["busybox.ext4", "busybox.squashfs"] {
        let image = cache().join("rootfs/current").join(name);
        let before = std::fs::read(&image).unwrap();
        let script = "cat /etc/os-release; echo changed > /etc/os-release; cat /etc/os-release";
        let (code, stdout, stderr) = run(&["--rootfs", image.to_str().unwrap(), "--", "sh", "-c", script]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{name}");
        assert!(stdout.starts_with("ID=") && stdout.ends_with("\nchanged\n"), "{name}: {stdout}");
        assert!(std::fs::read(&image).unwrap() == before, "{name} was changed");
    }
}

fn is_device(file: &std::fs::File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device())
}

#[test]
fn a_debian_runs_its_own_programs() {
    let image = cache().join("rootfs-debian/current/debian.ext4");
    let args = ["--rootfs", image.to_str().unwrap(), "--", "python3", "-c", "print(2**100)"];
    let expected = (0, "1267650600228229401496703205376\n".to_owned(), String::new());
    assert_eq!(run(&[&["--engine", "soft"][..], &args].concat()), expected);
    if std::fs::File::open("/dev/kvm").map_or(true, |file| !is_device(&file)) {
        eprintln!("skipped: /dev/kvm is not usable: a dynamically linked program was run in software only");
        return;
    }
    // Its C library saves the processor's state by what CPUID says of it.
    assert_eq!(run(&[&["--engine", "kvm"][..], &args].concat()), expected);
}

#[test]
fn an_unmodified_distribution_kernel_boots_as_bzimage_and_as_vmlinux() {
    let root = cache().join("rootfs/current/busybox.ext4");
    let folder = cache().join("debian-kernel/agent-3");
    let initrd = folder.join("initramfs.cpio");
    for name in ["bzImage", "vmlinux"] {
        let kernel = folder.join(name);
        let (code, stdout, stderr) = run(&[
            "--kernel",
            kernel.to_str().unwrap(),
            "--initrd",
            initrd.to_str().unwrap(),
            "--rootfs",
            root.to_str().unwrap(),
            "--",
            "uname",
            "-r",
        ]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{name}");
        assert!(stdout.trim_end().ends_with("-cloud-amd64"), "{name}: {stdout}");
    }
}

/// `harrier` in a terminal of its own; `input` is what the user types.
fn in_terminal(args: &str) -> std::process::Command {
    let mut command = std::process::Command::new("script");
    let inner = format!("{} {args}", env!("CARGO_BIN_EXE_harrier"));
    command.args(["-q", "-e", "-c", &inner, "/dev/null"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn in_a_terminal_the_command_has_one_and_keys_reach_it() {
    let mut child =
        in_terminal("run --quiet -- sh -c 'tty; read line; echo got $line; exit 3'").spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"keys\n").unwrap();
    let (code, stdout, stderr) = texts(wait(child));
    drop(stdin);
    assert_eq!(code, 3, "{stdout} {stderr}");
    assert!(stdout.contains("/dev/pts/") && stdout.contains("got keys"), "{stdout}");
}

#[test]
fn a_terminal_that_goes_away_ends_the_machine() {
    let mark = format!("MARK={}", std::process::id());
    let mut child =
        in_terminal(&format!("run --quiet -e {mark} -- sh -c 'echo up; sleep 1000'")).spawn().unwrap();
    let mut seen = Vec::new();
    let mut stdout = child.stdout.take().unwrap();
    while !seen.ends_with(b"up") {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    signal(&child, "KILL");
    child.wait().unwrap();
    let runs = || {
        std::fs::read_dir("/proc").unwrap().filter_map(Result::ok).any(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == mark.as_bytes())
        })
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while runs() {
        assert!(std::time::Instant::now() < deadline, "harrier still runs");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn which_engine_was_taken_and_why_is_one_line_unless_nobody_wants_it() {
    let run = |args: &[&str]| texts(wait(talkative(args).spawn().unwrap()));
    let (code, stdout, stderr) = run(&["run", "--", "echo", "here"]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (0, "here\n", 1), "{stderr}");
    assert!(
        stderr.starts_with("harrier: engine kvm: it runs ") || stderr.starts_with("harrier: engine soft: "),
        "{stderr}"
    );
    for options in [&["--quiet"][..], &["--engine", "soft"]] {
        let (code, _, stderr) = run(&[&["run"], options, &["--", "true"]].concat());
        assert_eq!((code, stderr.as_str()), (0, ""), "{options:?}");
    }
}
