//! Group `boot`: from the start of the process to the guest's init, and to its end.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::measure::{self, last_words};
use super::monitors::{Guest, Monitor, Monitors};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;

const LIMIT: Duration = Duration::from_secs(60);
/// For a peer that is not known to come through on this host.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// What takes the place of the agent in a plain boot: it says that it is there, runs `true` and switches off.
const INIT: &str = "rdinit=/bin/sh -- -c \"echo @init; /bin/true; poweroff -f\"";

/// Phases of `harrier run --json`, and what they are called here.
const PHASES: &[(&str, &str)] = &[
    ("set_up", "set-up of the machine"),
    ("first_guest_instruction", "start of the machine to the first guest instruction"),
    ("kernel_entry_to_agent", "kernel entry to agent"),
    ("agent_to_command", "agent to command"),
    ("command", "command (`true`)"),
    ("end", "end of the command to end of the machine"),
];

#[derive(Default)]
struct Side {
    init_wall: Samples,
    init_cpu: Samples,
    end_wall: Samples,
    end_cpu: Samples,
}

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, runs: u32) -> Result<GroupReport> {
    let guest = Guest { command_line: format!("{} {INIT}", guest.command_line), ..guest.clone() };
    let (mut harrier, mut qemu) = (Side::default(), Side::default());
    let (mut instructions, mut mips) = (Samples::default(), Samples::default());
    let (mut command_wall, mut command_cpu) = (Samples::default(), Samples::default());
    let mut phases = vec![Samples::default(); PHASES.len()];
    let mut to_command_instructions = Samples::default();

    // The first round warms the page cache and is not counted.
    for round in 0..=runs {
        let ours = monitors.run(Monitor::HarrierSoft, &guest, LIMIT)?;
        let theirs = monitors.run(Monitor::QemuTcg, &guest, LIMIT)?;
        let command = measure::run(&mut monitors.harrier_run(&["--json", "--", "true"]), LIMIT)?;
        if command.status.code() != Some(0) {
            bail!("harrier run -- true ended with {}: {}", command.status, last_words(&command.stdout));
        }
        if round == 0 {
            continue;
        }
        for (side, ended) in [(&mut harrier, &ours), (&mut qemu, &theirs)] {
            let init = ended.mark("init")?;
            side.init_wall.push(ms(init.wall));
            side.init_cpu.push(ms(init.cpu));
            side.end_wall.push(ms(ended.wall));
            side.end_cpu.push(ms(ended.cpu));
        }
        let retired = timing(&ours.stderr, "instructions")?;
        instructions.push(retired / 1e6);
        mips.push(retired / 1e6 / ours.cpu.as_secs_f64());

        command_wall.push(ms(command.wall));
        command_cpu.push(ms(command.cpu));
        let record: Value =
            serde_json::from_str(&command.stdout).context("the answer of harrier run --json is no JSON")?;
        for ((key, _), samples) in PHASES.iter().zip(&mut phases) {
            samples.push(record["timings_ms"][key].as_f64().with_context(|| format!("no phase '{key}'"))?);
        }
        to_command_instructions
            .push(record["instructions"].as_f64().context("no count of instructions")? / 1e6);
    }

    let mut figures = vec![
        Figure::new("plain boot to init", Unit::WallMs, harrier.init_wall).peer(qemu.init_wall),
        Figure::new("plain boot to init", Unit::CpuMs, harrier.init_cpu).peer(qemu.init_cpu),
        Figure::new("plain boot to power-off", Unit::WallMs, harrier.end_wall).peer(qemu.end_wall.clone()),
        Figure::new("plain boot to power-off", Unit::CpuMs, harrier.end_cpu).peer(qemu.end_cpu.clone()),
        Figure::new("`harrier run -- true`, whole process", Unit::WallMs, command_wall)
            .peer(qemu.end_wall)
            .goal(Goal::PeerRatio(4.0)),
        Figure::new("`harrier run -- true`, whole process", Unit::CpuMs, command_cpu)
            .peer(qemu.end_cpu)
            .goal(Goal::PeerRatio(4.0)),
    ];
    for ((_, name), samples) in PHASES.iter().zip(phases) {
        figures.push(Figure::new(format!("its {name}"), Unit::WallMs, samples));
    }
    figures.extend([
        Figure::new("instructions of a plain boot", Unit::MillionInstructions, instructions)
            .goal(Goal::AtMost(200.0)),
        Figure::new(
            "instructions of `harrier run -- true`",
            Unit::MillionInstructions,
            to_command_instructions,
        )
        .goal(Goal::AtMost(200.0)),
        Figure::new("plain boot: instructions / cpu time of the process", Unit::Mips, mips)
            .goal(Goal::AtLeast(100.0)),
    ]);
    Ok(GroupReport { name: "boot", figures, remarks: kvm_remarks(monitors, &guest) })
}

/// How KVM does here, once and in its own words: on a host without hardware under it nothing can be compared.
fn kvm_remarks(monitors: &Monitors, guest: &Guest) -> Vec<String> {
    if !Path::new("/dev/kvm").exists() {
        return vec!["There is no /dev/kvm here: nothing runs on KVM.".to_owned()];
    }
    let mut harrier = Command::new(monitors.harrier());
    harrier.args(["run", "--quiet", "--engine", "kvm", "--", "true"]);
    let ours = measure::run(&mut harrier, TRIAL_LIMIT).and_then(|ended| {
        if !ended.status.success() {
            bail!("it ended with {}: {}", ended.status, last_words(&ended.stderr));
        }
        Ok(ended)
    });
    let theirs = monitors.run(Monitor::QemuKvm, guest, TRIAL_LIMIT);
    let mut remarks = Vec::new();
    for (name, result) in [("Harrier, `run --engine kvm -- true`", ours), ("QEMU, plain boot", theirs)] {
        remarks.push(match result {
            Ok(ended) => format!("{name}: with KVM {:.0} ms, once.", ms(ended.wall)),
            Err(error) => format!("{name}: does not run on this host's KVM. {error:#}"),
        });
    }
    remarks
}

/// A count that `--timings` prints.
pub(crate) fn timing(stderr: &str, name: &str) -> Result<f64> {
    stderr
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .with_context(|| format!("harrier run --timings says nothing of '{name}'"))
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
        assert_eq!(timing(stderr, "instructions").unwrap(), 31_563_627.0);
        assert!(timing(stderr, "total").is_err(), "a time is no count");
    }
}
