//! Programs that run in a guest on every side, and on the host itself: the shared part of the groups that consist of them.
//!
//! One boot runs all programs of a group. They print marks (`tests/benches`), and between the marks of begin and end the
//! processor time of the whole monitor is taken; on the host the program's own kernel counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::boot::ms;
use super::measure::{self, Mark, last_words};
use super::monitors::{Guest, Monitors, Sides};
use super::report::{Figure, Unit};
use super::statistics::Samples;
use crate::cpio::Archive;
use crate::initramfs;

const LIMIT: Duration = Duration::from_secs(600);

/// The package with the loops.
const LOOPS: &str = "harrier-bench-guest";

/// A shell command that is measured; its output is thrown away. It finds the file `data` in its folder.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Script {
    pub(crate) name: &'static str,
    pub(crate) command: &'static str,
    /// Not on the host: what it uses is on the guest's disk.
    pub(crate) guest_only: bool,
}

impl Script {
    /// One that runs everywhere.
    pub(crate) const fn new(name: &'static str, command: &'static str) -> Self {
        Self { name, command, guest_only: false }
    }

    /// One that needs the guest's disk.
    pub(crate) const fn on_disk(name: &'static str, command: &'static str) -> Self {
        Self { name, command, guest_only: true }
    }
}

/// What a group runs.
pub(crate) struct Programs<'a> {
    /// The group's loops in `tests/benches`.
    pub(crate) loops: &'a str,
    pub(crate) scripts: Vec<Script>,
    /// Shell commands before them, in the guest.
    pub(crate) preparation: &'a str,
    /// The file `data`.
    pub(crate) data: Vec<u8>,
    /// The guest's disk.
    pub(crate) disk: Option<PathBuf>,
    /// Whether the host runs them too.
    pub(crate) native: bool,
}

/// What one program took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) time: Duration,
    /// Instructions, or other units of work; 0 where they are not known.
    pub(crate) work: u64,
}

/// What each program took, by its name.
pub(crate) type Times = BTreeMap<String, Taken>;

/// Measurements of one program.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    /// Milliseconds of processor time.
    pub(crate) sides: Sides<Samples>,
    pub(crate) native: Samples,
    /// Instructions, or other units of work; 0 where they are not known.
    pub(crate) work: u64,
}

impl Measured {
    /// A figure of the times, or of what `convert` makes of them.
    pub(crate) fn figure(&self, name: &str, unit: Unit, convert: impl Fn(f64) -> f64) -> Figure {
        let of = |samples: &Samples| samples.values().iter().map(|ms| convert(*ms)).collect::<Samples>();
        Figure::new(name, unit, of(&self.sides.soft))
            .kvm(of(&self.sides.kvm))
            .peer(of(&self.sides.qemu))
            .native(of(&self.native))
    }
}

/// Runs the programs on every side and on the host, in turns.
pub(crate) fn run(
    monitors: &Monitors,
    guest: &Guest,
    root: &Path,
    runs: u32,
    programs: &Programs<'_>,
) -> Result<BTreeMap<String, Measured>> {
    let loops = initramfs::build_static(root, LOOPS, "release").context("cannot build the loops")?;
    let folder = tempfile::tempdir().context("no temporary folder for the guest's programs")?;
    let native_scripts = programs.scripts.iter().filter(|script| !script.guest_only);
    fs::write(folder.path().join("data"), &programs.data)?;
    fs::write(folder.path().join("commands"), commands(native_scripts))?;
    let archive = folder.path().join("initramfs.cpio");
    let initramfs = guest.initramfs.as_ref().context("the guest has no initramfs")?;
    let mut bytes = fs::read(initramfs).context("cannot read the guest's initramfs")?;
    bytes.extend(programs.archive(&fs::read(&loops)?));
    fs::write(&archive, bytes)?;
    let guest = Guest {
        initramfs: Some(archive),
        disk: programs.disk.clone(),
        command_line: format!("{} rdinit=/bench/run", guest.command_line),
        ..guest.clone()
    };

    let mut all: BTreeMap<String, Measured> = BTreeMap::new();
    for _ in 0..runs {
        for side in monitors.sides() {
            let ended = monitors.run(side, &guest, LIMIT)?;
            let times = times(&ended.marks, Clock::Monitor)
                .with_context(|| format!("under {side:?}, which said:\n{}", last_words(&ended.stdout)))?;
            for (name, taken) in times {
                let measured = all.entry(name).or_default();
                measured.sides.of(side).push(ms(taken.time));
                measured.work = taken.work;
            }
        }
        if programs.native {
            for (name, taken) in native(&loops, programs.loops, folder.path())? {
                all.entry(name).or_default().native.push(ms(taken.time));
            }
        }
    }
    Ok(all)
}

impl Programs<'_> {
    /// The part of the initramfs that belongs to this group. The kernel unpacks archives that follow each other.
    fn archive(&self, loops: &[u8]) -> Vec<u8> {
        let script = format!(
            "#!/bin/sh\nexport PATH=/bin\ncd /bench\nmkdir -p /dev /proc /tmp\nmount -t devtmpfs dev /dev\nmount -t proc proc /proc\n{}\n\
            ./loops {} commands\npoweroff -f\n",
            self.preparation, self.loops
        );
        let mut archive = Archive::new();
        for folder in ["bench", "disk"] {
            archive.dir(folder);
        }
        archive.file("bench/run", 0o755, script.as_bytes());
        archive.file("bench/loops", 0o755, loops);
        archive.file("bench/commands", 0o644, commands(self.scripts.iter()).as_bytes());
        archive.file("bench/data", 0o644, &self.data);
        archive.finish()
    }
}

/// The commands as the program takes them.
fn commands<'a>(scripts: impl Iterator<Item = &'a Script>) -> String {
    let line = |script: &Script| {
        assert!(!script.command.contains('\n'), "'{}' has more than a line", script.name);
        format!("{}\t{}\n", script.name, script.command)
    };
    scripts.map(line).collect()
}

/// Words in lines, with the repetitions that text has.
pub(crate) fn text_data() -> Vec<u8> {
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
pub(crate) enum Clock {
    /// The host's count for the whole monitor.
    Monitor,
    /// The program's own kernel's.
    Own,
}

/// Pairs the marks of begin and end.
pub(crate) fn times(marks: &[Mark], clock: Clock) -> Result<Times> {
    let mut times = Times::new();
    let mut begun: Option<(&str, Duration)> = None;
    for mark in marks {
        if let Some(name) = mark.text.strip_prefix("begin ") {
            begun = Some((name, mark.cpu));
        } else if let Some(name) = mark.text.strip_prefix("failed ") {
            bail!("'{name}' failed");
        } else if let Some(end) = mark.text.strip_prefix("end ") {
            let mut parts = end.split('|');
            let (Some(name), Some(work), Some(own_ns)) = (parts.next(), parts.next(), parts.next()) else {
                bail!("a mark is incomplete: '{end}'");
            };
            let Some((_, before)) = begun.take().filter(|(begun, _)| *begun == name) else {
                bail!("'{name}' ended without having begun");
            };
            let time = match clock {
                Clock::Monitor => mark.cpu.saturating_sub(before),
                Clock::Own => Duration::from_nanos(own_ns.parse()?),
            };
            times.insert(name.to_owned(), Taken { time, work: work.parse()? });
        }
    }
    if times.is_empty() {
        bail!("the guest ran none of the programs");
    }
    Ok(times)
}

/// The same on the host itself.
fn native(program: &Path, loops: &str, folder: &Path) -> Result<Times> {
    let ended = measure::run(Command::new(program).args([loops, "commands"]).current_dir(folder), LIMIT)?;
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
        let taken = |us, work| Taken { time: Duration::from_micros(us), work };
        let outside = times(&marks, Clock::Monitor).unwrap();
        assert_eq!((outside["a b"], outside["c"]), (taken(4000, 70), taken(1000, 0)));
        let inside = times(&marks, Clock::Own).unwrap();
        assert_eq!((inside["a b"], inside["c"]), (taken(3000, 70), taken(2, 0)));
    }

    #[test]
    fn what_failed_or_never_began_is_an_error() {
        for marks in [
            vec![mark("begin a", 1), mark("failed a", 2)],
            vec![mark("end a|0|1", 2)],
            vec![mark("begin a", 1), mark("end b|0|1", 2)],
            vec![mark("begin a", 1), mark("end a|0", 2)],
            vec![],
        ] {
            assert!(times(&marks, Clock::Monitor).is_err(), "{marks:?}");
        }
    }
}
