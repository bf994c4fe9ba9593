//! The bare-metal guests under QEMU's translator: an independent processor says that the guests themselves are right.
//! Ignored where QEMU is not installed.

use std::process::{Command, Stdio};

use harrier_conformance::{GUESTS, Guest, Transcript, program};
use libtest_mimic::{Arguments, Failed, Trial};

const QEMU: &str = "qemu-system-x86_64";
/// QEMU ends with twice the debug-exit code, plus one.
const SUCCESS: i32 = 1;

fn main() {
    let installed = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !installed {
        eprintln!("skipped: {QEMU} is not installed");
    }
    let trials = GUESTS
        .iter()
        .map(|guest| {
            Trial::test(format!("qemu::{}", guest.name), move || check(guest)).with_ignored_flag(!installed)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn check(guest: &Guest) -> Result<(), Failed> {
    let output = Command::new("timeout")
        .args(["60", QEMU, "-machine", "microvm,pit=off,pic=off,rtc=off", "-accel", "tcg"])
        .args(["-cpu", "Nehalem,+rdtscp,-spec-ctrl", "-m", "64", "-smp", &guest.cpus.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-append", &guest.command_line(), "-kernel"])
        .arg(program(guest))
        .stdin(Stdio::null())
        .output()?;
    let transcript = Transcript { text: String::from_utf8_lossy(&output.stdout).into_owned() };
    transcript.verdict()?;
    if output.status.code() != Some(SUCCESS) {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}
