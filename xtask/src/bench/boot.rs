//! Group `boot`: from the start of the process to the guest's init, and to its end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::measure::{self, Ended, last_words};
use super::monitors::{Guest, Monitor, Monitors, Sides};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;

const LIMIT: Duration = Duration::from_secs(60);
/// For a peer that is not known to come through on this host.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// What takes the place of the agent in a plain boot: it says that it is there, runs `true` and switches off.
pub(crate) const INIT: &str = "rdinit=/bin/sh -- -c \"echo @init; /bin/true; poweroff -f\"";

/// Phases of `harrier run --json`, and what they are called here.
const PHASES: &[(&str, &str)] = &[
    ("set_up", "set-up of the machine"),
    ("first_guest_instruction", "start of the machine to the first guest instruction"),
    ("kernel_entry_to_agent", "kernel entry to agent"),
    ("agent_to_command", "agent to command"),
    ("command", "command (`true`)"),
    ("end", "end of the command to end of the machine"),
];

/// Plain boots of one monitor.
#[derive(Default)]
struct Boot {
    init_wall: Samples,
    init_cpu: Samples,
    end_wall: Samples,
    end_cpu: Samples,
    /// Millions, where the monitor counts them.
    instructions: Samples,
    mips: Samples,
}

impl Boot {
    fn note(&mut self, ended: &Ended) -> Result<()> {
        let init = ended.mark("init")?;
        self.init_wall.push(ms(init.wall));
        self.init_cpu.push(ms(init.cpu));
        self.end_wall.push(ms(ended.wall));
        self.end_cpu.push(ms(ended.cpu));
        if let Some(retired) = timing(&ended.stderr, "instructions") {
            self.instructions.push(retired / 1e6);
            self.mips.push(retired / 1e6 / ended.cpu.as_secs_f64());
        }
        Ok(())
    }
}

/// Runs of a command on one of Harrier's engines.
#[derive(Default)]
struct CommandRun {
    wall: Samples,
    cpu: Samples,
    /// As in [`PHASES`].
    phases: Vec<Samples>,
    instructions: Samples,
}

impl CommandRun {
    fn note(&mut self, ended: &Ended) -> Result<()> {
        self.wall.push(ms(ended.wall));
        self.cpu.push(ms(ended.cpu));
        let record: Value =
            serde_json::from_str(&ended.stdout).context("the answer of harrier run --json is no JSON")?;
        self.phases.resize(PHASES.len(), Samples::default());
        for ((key, _), samples) in PHASES.iter().zip(&mut self.phases) {
            samples.push(record["timings_ms"][key].as_f64().with_context(|| format!("no phase '{key}'"))?);
        }
        if let Some(instructions) = record["instructions"].as_f64() {
            self.instructions.push(instructions / 1e6);
        }
        Ok(())
    }
}

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, runs: u32) -> Result<GroupReport> {
    let guest = Guest { command_line: format!("{} {INIT}", guest.command_line), ..guest.clone() };
    let mut boots: Sides<Boot> = Sides::default();
    let mut commands: Sides<CommandRun> = Sides::default();
    // The first round warms the page cache and is not counted.
    for round in 0..=runs {
        for side in monitors.sides() {
            let ended = monitors.run(side, &guest, LIMIT)?;
            if round > 0 {
                boots.of(side).note(&ended)?;
            }
        }
        for engine in monitors.engines() {
            let mut command = monitors.harrier_run(engine, &["--json", "--", "true"])?;
            let ended = measure::run(&mut command, LIMIT)?;
            if ended.status.code() != Some(0) {
                bail!("harrier run -- true ended with {}: {}", ended.status, last_words(&ended.stdout));
            }
            if round > 0 {
                commands.of(engine).note(&ended)?;
            }
        }
    }

    let figure = |name: &str, unit, part: fn(&Boot) -> &Samples| {
        Figure::new(name, unit, part(&boots.soft).clone())
            .kvm(part(&boots.kvm).clone())
            .peer(part(&boots.qemu).clone())
    };
    let mut figures = vec![
        figure("plain boot to init", Unit::WallMs, |boot| &boot.init_wall),
        figure("plain boot to init", Unit::CpuMs, |boot| &boot.init_cpu),
        figure("plain boot to power-off", Unit::WallMs, |boot| &boot.end_wall),
        figure("plain boot to power-off", Unit::CpuMs, |boot| &boot.end_cpu),
        Figure::new("`harrier run -- true`, whole process", Unit::WallMs, commands.soft.wall.clone())
            .kvm(commands.kvm.wall.clone())
            .peer(boots.qemu.end_wall.clone())
            .goal(Goal::PeerRatio(4.0)),
        Figure::new("`harrier run -- true`, whole process", Unit::CpuMs, commands.soft.cpu.clone())
            .kvm(commands.kvm.cpu.clone())
            .peer(boots.qemu.end_cpu.clone())
            .goal(Goal::PeerRatio(4.0)),
    ];
    for (index, (_, name)) in PHASES.iter().enumerate() {
        let phase = |run: &CommandRun| run.phases.get(index).cloned().unwrap_or_default();
        figures.push(
            Figure::new(format!("its {name}"), Unit::WallMs, phase(&commands.soft)).kvm(phase(&commands.kvm)),
        );
    }
    let instructions = Unit::MillionInstructions;
    figures.extend([
        Figure::new("instructions of a plain boot", instructions, boots.soft.instructions.clone())
            .kvm(boots.kvm.instructions.clone())
            .goal(Goal::AtMost(200.0)),
        Figure::new("instructions of `harrier run -- true`", instructions, commands.soft.instructions)
            .goal(Goal::AtMost(200.0)),
        Figure::new(
            "plain boot: instructions / cpu time of the process",
            Unit::Mips,
            boots.soft.mips.clone(),
        )
        .goal(Goal::AtLeast(100.0)),
    ]);
    Ok(GroupReport { name: "boot", figures, remarks: kvm_remarks(monitors, &guest) })
}

/// How KVM does here, in its users' own words: on a host without hardware under it nothing can be compared.
fn kvm_remarks(monitors: &Monitors, guest: &Guest) -> Vec<String> {
    if !Path::new("/dev/kvm").exists() {
        return vec!["There is no /dev/kvm here: nothing runs on KVM.".to_owned()];
    }
    let mut remarks: Vec<String> = monitors.kvm_remark().into_iter().collect();
    remarks.push(match monitors.run(Monitor::QemuKvm, guest, TRIAL_LIMIT) {
        Ok(ended) => format!("QEMU with KVM, plain boot: {:.0} ms, once.", ms(ended.wall)),
        Err(error) => format!("QEMU does not run on this host's KVM. {error:#}"),
    });
    remarks
}

/// A count that `--timings` prints, if it does.
fn timing(stderr: &str, name: &str) -> Option<f64> {
    stderr.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_found_among_the_timings() {
        let stderr = "total       2.5 ms\ninstructions                  31563627\nassists 0\n";
        assert_eq!(timing(stderr, "instructions"), Some(31_563_627.0));
        assert_eq!(timing(stderr, "total"), None, "a time is no count");
    }
}
