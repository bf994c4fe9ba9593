//! Group `compute`: what user programs cost, beside the same programs under the peer and on the host itself.
//!
//! One boot runs all of them, and between the marks that they print the processor time of the whole monitor is taken.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::boot::ms;
use super::measure::{self, Mark};
use super::monitors::{Guest, Monitor, Monitors};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;
use crate::cpio::Archive;
use crate::initramfs;

const LIMIT: Duration = Duration::from_secs(300);

/// The package with the loops.
const LOOPS: &str = "harrier-bench-guest";
/// The loop whose rate has a goal.
const REGISTER_LOOP: &str = "register loop";

/// Name, and a shell command that runs beside the file `data`; its output is thrown away.
const COMMANDS: &[(&str, &str)] = &[
    (
        "busybox awk",
        "busybox awk 'BEGIN { for (i = 0; i < 150000; i++) { s += i * i % 7; a[i % 100] = s }; print s }'",
    ),
    ("busybox sh, 20,000 turns", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"),
    ("busybox sha256sum, 512 KiB", "busybox sha256sum data"),
    ("busybox gzip, 512 KiB", "busybox gzip -c data"),
    ("busybox sort, 512 KiB", "busybox sort data"),
    (
        "30 times fork and exec",
        "for i in 1 2 3 4 5 6 7 8 9 10; do busybox true; busybox true; busybox true; done",
    ),
];

/// Processor time of each program by its name, and instructions where they are known.
type Times = BTreeMap<String, (Duration, u64)>;

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, root: &Path, runs: u32) -> Result<GroupReport> {
    let loops = initramfs::build_static(root, LOOPS, "release").context("cannot build the loops")?;
    let folder = tempfile::tempdir().context("no temporary folder for the guest's programs")?;
    let data = data();
    fs::write(folder.path().join("data"), &data)?;
    fs::write(folder.path().join("commands"), commands())?;
    let archive = folder.path().join("initramfs.cpio");
    let mut bytes = fs::read(&guest.initramfs).context("cannot read the guest's initramfs")?;
    bytes.extend(programs(&fs::read(&loops)?, &data));
    fs::write(&archive, bytes)?;
    let guest = Guest {
        initramfs: archive,
        command_line: format!("{} rdinit=/bench/run", guest.command_line),
        ..guest.clone()
    };

    let mut rounds: Vec<[Times; 3]> = Vec::new();
    for _ in 0..runs {
        let ours = monitors.run(Monitor::HarrierSoft, &guest, LIMIT)?;
        let theirs = monitors.run(Monitor::QemuTcg, &guest, LIMIT)?;
        rounds.push([
            times(&ours.marks, Clock::Monitor)?,
            times(&theirs.marks, Clock::Monitor)?,
            native(&loops, folder.path())?,
        ]);
    }
    Ok(GroupReport { name: "compute", figures: figures(&rounds)?, remarks: Vec::new() })
}

fn figures(rounds: &[[Times; 3]]) -> Result<Vec<Figure>> {
    let first = rounds.first().context("no runs")?;
    let [ours, ..] = first;
    let mut figures = Vec::new();
    let mut rates = Vec::new();
    // Loops first, and all in the order of their names: the same order each time.
    for (name, (_, instructions)) in ours {
        let mut samples = [Samples::default(), Samples::default(), Samples::default()];
        for round in rounds {
            for (times, samples) in round.iter().zip(&mut samples) {
                let (time, _) =
                    times.get(name).with_context(|| format!("'{name}' did not run everywhere"))?;
                samples.push(ms(*time));
            }
        }
        let [harrier, peer, native] = samples;
        if *instructions > 0 {
            let rate = |samples: &Samples| {
                samples.values().iter().map(|ms| *instructions as f64 / 1e3 / ms).collect::<Samples>()
            };
            let figure =
                Figure::new(name.clone(), Unit::Mips, rate(&harrier)).peer(rate(&peer)).native(rate(&native));
            rates.push(if name == REGISTER_LOOP { figure.goal(Goal::AtLeast(150.0)) } else { figure });
        }
        figures.push(Figure::new(name.clone(), Unit::CpuMs, harrier).peer(peer).native(native));
    }
    figures.extend(rates);
    Ok(figures)
}

/// The part of the initramfs that belongs to this group. The kernel unpacks archives that follow each other.
fn programs(loops: &[u8], data: &[u8]) -> Vec<u8> {
    let script =
        "#!/bin/sh\nexport PATH=/bin\ncd /bench\nmount -t devtmpfs dev /dev\n./loops commands\npoweroff -f\n";
    let mut archive = Archive::new();
    archive.dir("bench");
    archive.file("bench/run", 0o755, script.as_bytes());
    archive.file("bench/loops", 0o755, loops);
    archive.file("bench/commands", 0o644, commands().as_bytes());
    archive.file("bench/data", 0o644, data);
    archive.finish()
}

/// The commands as the program takes them.
fn commands() -> String {
    COMMANDS.iter().map(|(name, command)| format!("{name}\t{command}\n")).collect()
}

/// Words in lines, with the repetitions that text has.
fn data() -> Vec<u8> {
    const SIZE: usize = 512 << 10;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut text = Vec::with_capacity(SIZE + 16);
    while text.len() < SIZE {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = state >> 54;
        let end = if state >> 32 & 7 == 0 { '\n' } else { ' ' };
        text.extend_from_slice(format!("{:x}{end}", word * word).as_bytes());
    }
    text.truncate(SIZE);
    text
}

/// Whose count of processor time is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clock {
    /// The host's count for the whole monitor.
    Monitor,
    /// The program's own kernel's.
    Own,
}

/// Pairs the marks of begin and end.
fn times(marks: &[Mark], clock: Clock) -> Result<Times> {
    let mut times = Times::new();
    let mut begun: Option<(&str, Duration)> = None;
    for mark in marks {
        if let Some(name) = mark.text.strip_prefix("begin ") {
            begun = Some((name, mark.cpu));
        } else if let Some(name) = mark.text.strip_prefix("failed ") {
            bail!("'{name}' failed");
        } else if let Some(end) = mark.text.strip_prefix("end ") {
            let mut parts = end.split('|');
            let (Some(name), Some(instructions), Some(own_ns)) = (parts.next(), parts.next(), parts.next())
            else {
                bail!("a mark is incomplete: '{end}'");
            };
            let Some((_, before)) = begun.take().filter(|(begun, _)| *begun == name) else {
                bail!("'{name}' ended without having begun");
            };
            let time = match clock {
                Clock::Monitor => mark.cpu.saturating_sub(before),
                Clock::Own => Duration::from_nanos(own_ns.parse()?),
            };
            times.insert(name.to_owned(), (time, instructions.parse()?));
        }
    }
    if times.is_empty() {
        bail!("the guest ran none of the programs");
    }
    Ok(times)
}

/// The same on the host itself.
fn native(loops: &Path, folder: &Path) -> Result<Times> {
    let ended = measure::run(Command::new(loops).arg("commands").current_dir(folder), LIMIT)?;
    if !ended.status.success() {
        bail!("the programs on the host: {}", measure::last_words(&ended.stderr));
    }
    times(&ended.marks, Clock::Own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(text: &str, cpu_ms: u64) -> Mark {
        Mark { text: text.to_owned(), wall: Duration::ZERO, cpu: Duration::from_millis(cpu_ms) }
    }

    #[test]
    fn a_time_lies_between_begin_and_end_of_the_same_name() {
        let marks = [
            mark("begin a b", 5),
            mark("end a b|70|3000000", 9),
            mark("begin c", 20),
            mark("end c|0|2000", 21),
        ];
        let outside = times(&marks, Clock::Monitor).unwrap();
        assert_eq!(outside["a b"], (Duration::from_millis(4), 70));
        assert_eq!(outside["c"], (Duration::from_millis(1), 0));
        let inside = times(&marks, Clock::Own).unwrap();
        assert_eq!(inside["a b"], (Duration::from_millis(3), 70));
        for damaged in
            [&["begin a", "end b|0|1"][..], &["begin a", "end a|0"], &["begin a", "failed a"], &["init"]]
        {
            let marks: Vec<_> = damaged.iter().map(|text| mark(text, 1)).collect();
            assert!(times(&marks, Clock::Own).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn a_rate_is_by_the_time_and_has_the_goal_of_its_loop() {
        let times = |ms| Times::from([(REGISTER_LOOP.to_owned(), (Duration::from_millis(ms), 160_000_000))]);
        let figures = figures(&[[times(1000), times(500), times(100)]]).unwrap();
        let rate = figures.iter().find(|figure| figure.unit == Unit::Mips).unwrap();
        assert_eq!(rate.harrier.values(), [160.0]);
        assert_eq!(rate.goal, Some(Goal::AtLeast(150.0)));
    }
}
