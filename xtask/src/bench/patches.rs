//! Group `patches`: the guest's kernel with and without `guest-kernel/patches`, in turns on each engine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::boot::{INIT, ms};
use super::measure::{self, Running, last_words};
use super::memory;
use super::monitors::{Guest, Monitor, Monitors, Sides};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;

const LIMIT: Duration = Duration::from_secs(120);
/// How long an idle guest is watched.
const WATCH: Duration = Duration::from_secs(10);
/// After its mark a guest gets this time: free pages are reported for the first time two seconds after the boot, then
/// every two seconds as long as there are any.
const SETTLE: Duration = Duration::from_secs(6);
/// After a job, the same for what it has freed.
const AFTER_JOB: Duration = Duration::from_secs(12);

/// 1 MiB in lines of 63 bytes and a newline, to which the terminal adds a carriage return each.
const PRINT: &str = "l=$(printf %063d 0); i=0; while [ $i -lt 256 ]; do echo $l; i=$((i+1)); done > /tmp/l; \
                     i=0; while [ $i -lt 64 ]; do cat /tmp/l; i=$((i+1)); done > /dev/ttyS0";
const REST: &str = "echo @rest; sleep 100";
const JOB: &str = "echo @before; sleep 8; dd if=/dev/zero of=/tmp/a bs=1M count=256 2>/dev/null; echo @touched; \
                   rm /tmp/a; echo @freed; sleep 100";

/// A kernel, and how it idles.
#[derive(Clone)]
struct Variant {
    name: &'static str,
    kernel: PathBuf,
    /// A word of the command line for the idle measurement.
    idle: &'static str,
}

#[derive(Default)]
struct Taken {
    instructions: Sides<Samples>,
    to_agent: Sides<Samples>,
    whole: Sides<Samples>,
    print_accesses: Sides<Samples>,
    print_time: Sides<Samples>,
    idle: Sides<Samples>,
    before: Sides<Samples>,
    touched: Sides<Samples>,
    freed: Sides<Samples>,
}

/// Measures `guest`'s kernel, which is patched, and `unpatched`.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, unpatched: &Path, runs: u32) -> Result<GroupReport> {
    let initramfs = guest.initramfs.as_deref().context("the guest has no initramfs")?;
    let patched = Variant { name: "patched", kernel: guest.kernel.clone(), idle: "" };
    let variants = [
        Variant { name: "patched, harrier_park", idle: "harrier_park", ..patched.clone() },
        patched,
        Variant { name: "unpatched", kernel: unpatched.to_owned(), idle: "" },
    ];
    // The peer boots what anybody has: the kernel without patches, to its power-off.
    let qemu_guest = Guest {
        kernel: unpatched.to_owned(),
        command_line: format!("{} {INIT}", guest.command_line),
        ..guest.clone()
    };
    let mut qemu = Samples::default();
    let mut taken: [Taken; 3] = Default::default();
    for _ in 0..runs {
        qemu.push(ms(monitors.run(Monitor::QemuTcg, &qemu_guest, LIMIT)?.wall));
        for engine in monitors.engines() {
            for (variant, taken) in variants.iter().zip(&mut taken) {
                let machine = Machine { monitors, engine, variant, initramfs };
                machine.idle(taken)?;
                if variant.idle.is_empty() {
                    machine.boot(taken)?;
                    machine.print(taken)?;
                    machine.memory(taken)?;
                }
            }
        }
    }
    let [_, _, without] = &taken;
    let (half_of_instructions, half_of_time) =
        (without.instructions.soft.median() / 2.0, without.to_agent.soft.median() / 2.0);
    let mut figures = Vec::new();
    let mut add = |what: &str, unit, of: fn(&Taken) -> &Sides<Samples>, goal: Option<Goal>| {
        for (variant, taken) in variants.iter().zip(&taken) {
            let Sides { soft, kvm, .. } = of(taken).clone();
            if soft.values().is_empty() {
                continue;
            }
            let mut figure = Figure::new(format!("{what}, {}", variant.name), unit, soft).kvm(kvm);
            if matches!(goal, Some(Goal::PeerRatio(_))) {
                figure = figure.peer(qemu.clone());
            }
            let goal = goal.filter(|_| variant.name != "unpatched");
            figures.push(match goal {
                Some(goal) => figure.goal(goal),
                None => figure,
            });
        }
    };
    add(
        "instructions of `run -- true`",
        Unit::MillionInstructions,
        |t| &t.instructions,
        Some(Goal::AtMost(half_of_instructions)),
    );
    add("kernel entry to agent", Unit::WallMs, |t| &t.to_agent, Some(Goal::AtMost(half_of_time)));
    add("`run -- true`, whole process", Unit::WallMs, |t| &t.whole, Some(Goal::PeerRatio(1.0)));
    add("1 MiB to ttyS0: device accesses", Unit::Accesses, |t| &t.print_accesses, None);
    add("1 MiB to ttyS0", Unit::WallMs, |t| &t.print_time, None);
    add("idle guest, over 10 s", Unit::CpuPercent, |t| &t.idle, Some(Goal::AtMost(0.2)));
    add("guest memory resident before a job", Unit::MiB, |t| &t.before, None);
    add("after it touched 256 MiB", Unit::MiB, |t| &t.touched, None);
    add("12 s after it freed them", Unit::MiB, |t| &t.freed, None);
    Ok(GroupReport { name: "patches", figures, remarks: monitors.kvm_remark().into_iter().collect() })
}

/// One kernel on one engine.
struct Machine<'a> {
    monitors: &'a Monitors,
    engine: Monitor,
    variant: &'a Variant,
    initramfs: &'a Path,
}

impl Machine<'_> {
    /// `harrier run` with this kernel and `arguments`.
    fn command(&self, arguments: &[&str], script: &str) -> Result<std::process::Command> {
        let mut command = self.monitors.harrier_run(self.engine, arguments)?;
        command.arg("--kernel").arg(&self.variant.kernel).arg("--initrd").arg(self.initramfs);
        command.args(["--", "sh", "-c", script]);
        Ok(command)
    }

    /// What is known about a run that ends by itself, and how long the process took.
    fn record(&self, script: &str) -> Result<(Value, Duration)> {
        let ended = measure::run(&mut self.command(&["--json"], script)?, LIMIT)?;
        if ended.status.code() != Some(0) {
            bail!("{}: it ended with {}: {}", self.variant.name, ended.status, last_words(&ended.stdout));
        }
        Ok((
            serde_json::from_str(&ended.stdout).context("the answer of harrier run --json is no JSON")?,
            ended.wall,
        ))
    }

    fn boot(&self, taken: &mut Taken) -> Result<()> {
        let (record, wall) = self.record("true")?;
        // Nobody counts the instructions that KVM's processor executes.
        if let Some(instructions) = record["instructions"].as_f64() {
            taken.instructions.of(self.engine).push(instructions / 1e6);
        }
        taken.to_agent.of(self.engine).push(number(&record["timings_ms"], "kernel_entry_to_agent")?);
        taken.whole.of(self.engine).push(ms(wall));
        Ok(())
    }

    fn print(&self, taken: &mut Taken) -> Result<()> {
        let (without, _) = self.record("true")?;
        let (with, _) = self.record(PRINT)?;
        let accesses = number(&with, "device_accesses")? - number(&without, "device_accesses")?;
        taken.print_accesses.of(self.engine).push(accesses.max(1.0));
        taken.print_time.of(self.engine).push(number(&with["timings_ms"], "command")?);
        Ok(())
    }

    fn idle(&self, taken: &mut Taken) -> Result<()> {
        let mut running = Running::start(&mut self.command(&["--cmdline", self.variant.idle], REST)?, LIMIT)?;
        reach(&mut running, "rest")?;
        std::thread::sleep(SETTLE);
        let before = running.cpu()?;
        std::thread::sleep(WATCH);
        let used = running.cpu()?.saturating_sub(before);
        taken.idle.of(self.engine).push(ms(used) / ms(WATCH) * 100.0);
        Ok(())
    }

    fn memory(&self, taken: &mut Taken) -> Result<()> {
        let mut running = Running::start(&mut self.command(&[], JOB)?, LIMIT)?;
        reach(&mut running, "before")?;
        std::thread::sleep(SETTLE);
        taken.before.of(self.engine).push(memory::guest_mib(running.pid())?);
        reach(&mut running, "touched")?;
        taken.touched.of(self.engine).push(memory::guest_mib(running.pid())?);
        reach(&mut running, "freed")?;
        std::thread::sleep(AFTER_JOB);
        taken.freed.of(self.engine).push(memory::guest_mib(running.pid())?);
        Ok(())
    }
}

fn reach(running: &mut Running, wanted: &str) -> Result<()> {
    match running.next_mark()? {
        Some(mark) if mark.text == wanted => Ok(()),
        other => bail!("the guest did not come to '@{wanted}': {other:?}"),
    }
}

fn number(record: &Value, name: &str) -> Result<f64> {
    record[name].as_f64().with_context(|| format!("harrier run --json says nothing of '{name}'"))
}
