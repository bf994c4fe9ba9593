//! The peer's side of group `snapshot`: QEMU's migration into a file, and its savevm.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::boot::ms;
use super::monitors::{Guest, Monitor, Monitors};
use super::statistics::Samples;
use crate::process;

/// No guest takes longer, in seconds.
const LIMIT: &str = "120";

/// Writes 64 MiB, or answers, as the line that comes in says.
const PROGRAM: &str = "busybox mount -t devtmpfs dev /dev; busybox stty -F /dev/ttyS0 -echo; exec </dev/ttyS0; echo @up; \
                       while read line; do case $line in write) busybox dd if=/dev/urandom of=/written bs=1M count=64 \
                       conv=notrunc 2>/dev/null; echo @written;; *) echo @answer;; esac; done";

/// What was measured.
#[derive(Default)]
pub(crate) struct Measured {
    /// How long migration into a file let the guest stand still, in ms.
    pub(crate) migration_pause: Samples,
    /// How long savevm took, during which the guest stands still, in ms.
    pub(crate) savevm: Samples,
    /// How fast migration writes the file, in MiB/s.
    pub(crate) migration_rate: Samples,
    /// From exec with the file to the guest's answer, in ms.
    pub(crate) incoming: Samples,
    /// From exec with the saved state to the guest's answer, in ms.
    pub(crate) loadvm: Samples,
}

/// Measures: pauses of a guest of 1 GiB that has written 64 MiB, restores of one of 512 MiB that waits.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, runs: u32) -> Result<Measured> {
    let folder = tempfile::tempdir().context("no temporary folder")?;
    let place = Place { monitors, guest, folder: folder.path() };
    let mut measured = Measured::default();
    let mut writer = place.start("1G", &[])?;
    writer.wait_for("@up")?;
    for _ in 0..runs {
        writer.say("write", "@written")?;
        let (pause, total, bytes) = writer.migrate(&place.file())?;
        measured.migration_pause.push(pause);
        measured.migration_rate.push(bytes / (1 << 20) as f64 / (total / 1e3));
        writer.say("write", "@written")?;
        measured.savevm.push(ms(writer.savevm()?));
    }
    drop(writer);
    let mut waiter = place.start("512M", &[])?;
    waiter.wait_for("@up")?;
    waiter.migrate(&place.file())?;
    waiter.savevm()?;
    drop(waiter);
    let from_file = format!("exec:cat {}", place.file().display());
    for _ in 0..runs {
        for (how, samples) in
            [(["-incoming", &from_file], &mut measured.incoming), (["-loadvm", STATE], &mut measured.loadvm)]
        {
            let begun = Instant::now();
            place.start("512M", &how)?.say(QUESTION, "@answer")?;
            samples.push(ms(begun.elapsed()));
        }
    }
    Ok(measured)
}

/// Longer than the serial port's buffer of 16 bytes: what is in there when the state is loaded is lost.
const QUESTION: &str = "it does not matter what is asked, if it is long enough";

/// Name of the state that savevm keeps.
const STATE: &str = "state";

struct Place<'a> {
    monitors: &'a Monitors,
    guest: &'a Guest,
    folder: &'a Path,
}

impl Place<'_> {
    fn file(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Starts a guest; the disk is where savevm keeps states.
    fn start(&self, memory: &str, more: &[&str]) -> Result<Qemu> {
        let disk = self.folder.join(format!("{memory}.qcow2"));
        if !disk.exists() {
            process::output(
                Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("4G"),
            )?;
        }
        let socket = self.folder.join("monitor");
        // Of the last guest.
        let _ = std::fs::remove_file(&socket);
        let guest = Guest {
            command_line: format!("{} rdinit=/bin/sh -- -c \"{PROGRAM}\"", self.guest.command_line),
            ..self.guest.clone()
        };
        let boot = self.monitors.boot(Monitor::QemuTcg, &guest)?;
        let mut command = Command::new("timeout");
        command.arg(LIMIT).arg(boot.get_program()).args(boot.get_args()).args(["-m", memory]);
        command.arg("-drive").arg(format!("id=states,if=none,format=qcow2,file={}", disk.display()));
        command.args(["-device", "virtio-blk-device,drive=states"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut child = command
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot run QEMU")?;
        let to = child.stdin.take().context("no stdin")?;
        let from = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Qemu { child, to, from, socket })
    }
}

struct Qemu {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl Qemu {
    fn wait_for(&mut self, mark: &str) -> Result<()> {
        let mut line = String::new();
        while !line.contains(mark) {
            line.clear();
            if self.from.read_line(&mut line)? == 0 {
                bail!("QEMU ended before its guest printed {mark}");
            }
        }
        Ok(())
    }

    fn say(&mut self, line: &str, answer: &str) -> Result<()> {
        writeln!(self.to, "{line}")?;
        self.wait_for(answer)
    }

    /// Pause and total in ms, and the bytes of the file; the guest goes on.
    fn migrate(&self, file: &Path) -> Result<(f64, f64, f64)> {
        let mut monitor = Qmp::connect(&self.socket)?;
        monitor.call(
            &json!({"execute": "migrate", "arguments": {"uri": format!("exec:cat > {}", file.display())}}),
        )?;
        loop {
            let state = monitor.call(&json!({"execute": "query-migrate"}))?;
            match state["status"].as_str() {
                Some("completed") => {
                    monitor.call(&json!({"execute": "cont"}))?;
                    let number =
                        |name: &str| state[name].as_f64().with_context(|| format!("no {name}: {state}"));
                    let bytes = std::fs::metadata(file)?.len() as f64;
                    return Ok((number("downtime")?, number("total-time")?, bytes));
                }
                Some("failed") => bail!("QEMU did not migrate: {state}"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn savevm(&self) -> Result<Duration> {
        let mut monitor = Qmp::connect(&self.socket)?;
        let begun = Instant::now();
        let line = format!("savevm {STATE}");
        let said = monitor
            .call(&json!({"execute": "human-monitor-command", "arguments": {"command-line": line}}))?;
        if said.as_str().is_some_and(|said| !said.is_empty()) {
            bail!("QEMU did not save: {said}");
        }
        Ok(begun.elapsed())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if let Ok(mut monitor) = Qmp::connect(&self.socket) {
            // It ends without an answer at times.
            let _ = monitor.call(&json!({"execute": "quit"}));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection of QEMU's machine protocol (docs/interop/qmp-spec in its documentation).
struct Qmp {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(socket: &Path) -> Result<Self> {
        let to = UnixStream::connect(socket).context("QEMU's monitor socket")?;
        to.set_read_timeout(Some(Duration::from_secs(60)))?;
        let from = BufReader::new(to.try_clone()?);
        let mut qmp = Qmp { to, from };
        qmp.read()?;
        qmp.call(&json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        serde_json::from_str(&line).context("QEMU's monitor said something that is no JSON")
    }

    fn call(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.to, "{command}")?;
        loop {
            let mut said = self.read()?;
            if let Some(error) = said.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // Between them come events.
            if let Some(answer) = said.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }
}
