//! Group `snapshot`: how long a machine stands still for a snapshot, how soon it is back, and what clones cost.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::boot::ms;
use super::monitors::{Guest, Monitor, Monitors, Sides};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::snapshot_qemu;
use super::statistics::Samples;
use crate::process;

const MIB: f64 = 1024.0 * 1024.0;
/// Idle clones whose memory is looked at.
const CLONES: u32 = 100;
/// How long a guest may take to come up.
const LIMIT: Duration = Duration::from_secs(60);

/// Writes 64 MiB and says so, and the same again for each line that it reads.
const WRITER: &str = "while :; do busybox dd if=/dev/urandom of=/tmp/written bs=1M count=64 conv=notrunc 2>/dev/null; \
                      echo written; read line || exit 0; done";

/// Harrier's machines of one engine, in a registry of their own.
struct Machines<'a> {
    monitors: &'a Monitors,
    side: Monitor,
    folder: tempfile::TempDir,
}

impl<'a> Machines<'a> {
    fn new(monitors: &'a Monitors, side: Monitor) -> Result<Self> {
        let folder = tempfile::tempdir().context("no temporary folder")?;
        Ok(Machines { monitors, side, folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.monitors.harrier());
        command.env("HARRIER_RUNTIME_DIR", self.path("machines")).args(arguments).stdin(Stdio::null());
        command
    }

    fn answer(&self, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&process::output(&mut self.command(arguments))?).into_owned())
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.answer(arguments)?).context("an answer that is no JSON")
    }

    fn number(value: &Value, name: &str) -> Result<f64> {
        value[name].as_f64().with_context(|| format!("no '{name}' in {value}"))
    }

    /// Starts a detached machine.
    fn start(&self, name: &str, memory: &str, more: &[&str]) -> Result<()> {
        let engine = self.side.engine().context("not Harrier's")?;
        let run = ["run", "-d", "--name", name, "--engine", engine, "--memory", memory];
        self.answer(&[&run[..], more].concat()).map(drop)
    }

    /// Waits until a machine has printed so many lines.
    fn wait_for_lines(&self, name: &str, count: usize) -> Result<()> {
        let give_up = Instant::now() + LIMIT;
        while self.answer(&["logs", name])?.lines().count() < count {
            if Instant::now() > give_up {
                bail!("{:?}: the guest has not printed {count} lines", self.side);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Machines<'_> {
    fn drop(&mut self) {
        for id in self.answer(&["ps", "-aq"]).unwrap_or_default().lines() {
            // What is gone already needs no removal.
            let _ = self.answer(&["rm", "-f", id]);
        }
    }
}

#[derive(Default)]
struct Measured {
    full_pause: Samples,
    diff_pause: Samples,
    full_rate: Samples,
    copy_rate: Samples,
    first_instruction: Samples,
    restored_answer: Samples,
    fork: Samples,
    forked_answer: Samples,
    clone_memory: Samples,
}

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, runs: u32) -> Result<GroupReport> {
    let mut all: Sides<Measured> = Sides::default();
    let mut process_alone = Samples::default();
    for side in monitors.engines() {
        writing_machine(&Machines::new(monitors, side)?, runs, all.of(side))?;
        waiting_machine(&Machines::new(monitors, side)?, runs, all.of(side))?;
        clones(&Machines::new(monitors, side)?, all.of(side))?;
    }
    for _ in 0..runs {
        let begun = Instant::now();
        process::output(Command::new(monitors.harrier()).arg("--version"))?;
        process_alone.push(ms(begun.elapsed()));
    }
    let qemu = snapshot_qemu::run(monitors, guest, runs)?;
    let Sides { soft, kvm, .. } = all;
    let figure = |name: &str, unit, soft, kvm| Figure::new(name, unit, soft).kvm(kvm);
    let figures = vec![
        figure(
            "pause, full, 1 GiB with 64 MiB written; QEMU migrates to a file",
            Unit::WallMs,
            soft.full_pause.clone(),
            kvm.full_pause.clone(),
        )
        .peer(qemu.migration_pause)
        .goal(Goal::AtMost(10.0)),
        figure("the same pause; QEMU saves by savevm", Unit::WallMs, soft.full_pause, kvm.full_pause)
            .peer(qemu.savevm),
        figure("pause, difference of 64 MiB, 1 GiB", Unit::WallMs, soft.diff_pause, kvm.diff_pause)
            .goal(Goal::AtMost(10.0)),
        figure("a full one, to the disk", Unit::MiBPerSecond, soft.full_rate, kvm.full_rate)
            .peer(qemu.migration_rate)
            .native(soft.copy_rate),
        figure(
            "restore to the first instruction",
            Unit::WallMs,
            soft.first_instruction,
            kvm.first_instruction,
        )
        .goal(Goal::AtMost(5.0)),
        figure(
            "restore to the command's answer; QEMU from a file",
            Unit::WallMs,
            soft.restored_answer.clone(),
            kvm.restored_answer.clone(),
        )
        .peer(qemu.incoming)
        .goal(Goal::AtMost(12.0)),
        figure("the same; QEMU by loadvm", Unit::WallMs, soft.restored_answer, kvm.restored_answer)
            .peer(qemu.loadvm),
        figure("`harrier fork`, 512 MiB", Unit::WallMs, soft.fork, kvm.fork),
        figure("`harrier fork; harrier exec`, 512 MiB", Unit::WallMs, soft.forked_answer, kvm.forked_answer),
        figure("memory of a clone, one of 100 that are idle", Unit::MiB, soft.clone_memory, kvm.clone_memory)
            .goal(Goal::AtMost(3.0)),
        Figure::new("`harrier --version`", Unit::WallMs, process_alone),
    ];
    Ok(GroupReport { name: "snapshot", figures, remarks: monitors.kvm_remark().into_iter().collect() })
}

/// Pauses, and how fast a snapshot is written, of a machine that has written 64 MiB since the last one.
fn writing_machine(machines: &Machines<'_>, runs: u32, measured: &mut Measured) -> Result<()> {
    machines.start("writer", "1G", &["--interactive", "--", "sh", "-c", WRITER])?;
    machines.wait_for_lines("writer", 1)?;
    let mut lines = 1;
    let mut write_again = || -> Result<()> {
        let mut attach = machines.command(&["attach", "writer"]);
        let mut child = attach.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        child.stdin.as_mut().context("no stdin")?.write_all(b"again\n")?;
        lines += 1;
        machines.wait_for_lines("writer", lines)?;
        // Its input stays open for the next one.
        child.kill()?;
        child.wait()?;
        Ok(())
    };
    for round in 0..runs {
        write_again()?;
        let (full, diff) = (machines.path(&format!("full-{round}")), machines.path(&format!("diff-{round}")));
        let take = |target: &Path, more: &[&str]| {
            let target = target.to_str().context("a path that is no text")?;
            machines.json(&[&["snapshot", "writer", "--json", "--to", target][..], more].concat())
        };
        let taken = take(&full, &[])?;
        measured.full_pause.push(Machines::number(&taken, "pause_us")? / 1e3);
        let stored = stored_bytes(&full)?;
        measured.full_rate.push(stored / MIB / (Machines::number(&taken, "total_us")? / 1e6));
        measured.copy_rate.push(stored / MIB / copy(&full, &machines.path("copy"))?.as_secs_f64());
        write_again()?;
        let taken = take(&diff, &["--diff"])?;
        measured.diff_pause.push(Machines::number(&taken, "pause_us")? / 1e3);
        for done in [&diff, &full] {
            machines.answer(&["snapshots", "rm", done.to_str().context("a path that is no text")?])?;
        }
    }
    Ok(())
}

fn stored_bytes(folder: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes as f64)
}

/// Copies a snapshot's folder as `cp` does, holes as holes, and makes the copy durable.
fn copy(from: &Path, to: &Path) -> Result<Duration> {
    let begun = Instant::now();
    process::output(Command::new("cp").args(["-r", "--reflink=never"]).args([from, to]))?;
    process::output(Command::new("sync").arg(to.join("memory")))?;
    let taken = begun.elapsed();
    // The files of a snapshot are read-only, their folder is not.
    std::fs::remove_dir_all(to)?;
    Ok(taken)
}

/// Restores of a machine whose command waits for its input, and forks of it.
fn waiting_machine(machines: &Machines<'_>, runs: u32, measured: &mut Measured) -> Result<()> {
    machines.start("waiter", "512M", &["--interactive", "--", "sh", "-c", "echo up; exec cat"])?;
    machines.wait_for_lines("waiter", 1)?;
    // A clone has no input, and `cat` would end.
    machines.start("sleeper", "512M", &["--", "sleep", "1000"])?;
    let kept = machines.path("kept");
    let kept = kept.to_str().context("a path that is no text")?;
    machines.answer(&["snapshot", "waiter", "--to", kept])?;
    let engine = machines.side.engine().context("not Harrier's")?;
    for round in 0..runs {
        let restored = machines.json(&["restore", kept, "--engine", engine, "--json", "--timeout", "1m"])?;
        let phases = &restored["timings_ms"];
        measured
            .first_instruction
            .push(Machines::number(phases, "set_up")? + Machines::number(phases, "first_guest_instruction")?);

        let mut restore =
            machines.command(&["restore", kept, "--engine", engine, "--quiet", "--timeout", "1m"]);
        let begun = Instant::now();
        let mut child = restore.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut to = child.stdin.take().context("no stdin")?;
        to.write_all(b"x")?;
        child.stdout.as_mut().context("no stdout")?.read_exact(&mut [0]).context("no answer")?;
        measured.restored_answer.push(ms(begun.elapsed()));
        drop(to);
        let status = child.wait()?;
        if !status.success() {
            bail!("{:?}: a restored cat ended with {status}", machines.side);
        }

        let name = format!("clone-{round}");
        let begun = Instant::now();
        machines.answer(&["fork", "sleeper", "--engine", engine, "--rm", "--name", &name])?;
        measured.fork.push(ms(begun.elapsed()));
        machines.answer(&["exec", "--no-stdin", &name, "--", "true"])?;
        measured.forked_answer.push(ms(begun.elapsed()));
        machines.answer(&["kill", &name])?;
    }
    Ok(())
}

/// Resident memory of clones, where what several share is each one's in equal parts.
fn clones(machines: &Machines<'_>, measured: &mut Measured) -> Result<()> {
    let engine = machines.side.engine().context("not Harrier's")?;
    machines.start("base", "512M", &["--", "sleep", "1000"])?;
    let count = CLONES.to_string();
    machines.answer(&["fork", "base", "-n", &count, "--rm", "--name", "clone", "--engine", engine])?;
    // Monitors give memory back when their machines have settled.
    std::thread::sleep(Duration::from_secs(4));
    let listed = machines.json(&["ps", "--json"])?;
    for machine in listed.as_array().context("no list")? {
        if !machine["name"].as_str().is_some_and(|name| name.starts_with("clone-")) {
            continue;
        }
        let pid = machine["pid"].as_u64().context("no process id")?;
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let kib =
            text.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse().ok());
        measured.clone_memory.push(kib.map(|kib: f64| kib / 1024.0).context("no Pss")?);
    }
    Ok(())
}
