//! The same program under QEMU's translator, started as the suite's own script does it.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::config::Entry;
use super::{Ended, Run, SuiteError, command_line, environment};

const QEMU: &str = "qemu-system-x86_64";

pub(super) fn run(entry: &Entry, program: &Path) -> Result<Run, SuiteError> {
    let mut initrd = tempfile::NamedTempFile::new().map_err(SuiteError::Temporary)?;
    initrd.write_all(environment(entry).as_bytes()).map_err(SuiteError::Temporary)?;
    // QEMU puts the program's name in front by itself.
    let line = command_line(entry);
    let arguments = line.split_once(' ').map_or("", |(_, arguments)| arguments);
    let mut child = Command::new(QEMU)
        .args(["-no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio"])
        .args(["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
        .args(["-device", "pci-testdev", "-machine", "accel=tcg"])
        .args(["-smp", &entry.cpus.to_string(), "-append", arguments])
        .args(&entry.qemu)
        .arg("-kernel")
        .arg(program)
        .arg("-initrd")
        .arg(initrd.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| SuiteError::Program { program: QEMU, source })?;
    let collect = |mut from: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = child.stdout.take().map(|pipe| collect(Box::new(pipe)));
    let errors = child.stderr.take().map(|pipe| collect(Box::new(pipe)));
    let deadline = Instant::now() + Duration::from_secs(entry.timeout_s);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
        }
    };
    let text = |thread: Option<std::thread::JoinHandle<String>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    };
    let (said, complaint) = (text(output), text(errors));
    let ended = match status.map(|status| status.code()) {
        // The exit device makes 2n + 1 of n, in a byte.
        Some(Some(code)) if code & 1 == 1 && !said.is_empty() => {
            Ended::Code(u32::try_from(code).unwrap_or_default() >> 1)
        }
        Some(code) => Ended::Otherwise(format!(
            "QEMU ended ({}): {}",
            code.map_or("by a signal".to_owned(), |code| code.to_string()),
            complaint.lines().next().unwrap_or("without a word")
        )),
        None => Ended::Timeout,
    };
    Ok(Run { ended, said })
}
