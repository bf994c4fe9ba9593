//! Group `memory`: the size of the program, what the monitor needs beside the guest's memory, and what an idle guest costs.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::boot::ms;
use super::measure::Running;
use super::monitors::{Guest, Monitor, Monitors, Sides};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;

const LIMIT: Duration = Duration::from_secs(60);
/// After its mark a guest gets this time to come to rest.
const SETTLE: Duration = Duration::from_secs(1);
/// How long an idle guest is watched.
const WATCH: Duration = Duration::from_secs(5);

/// Longer than it is looked at.
const SLEEP: &str = "echo @idle; sleep 50";
const MIB: f64 = 1024.0 * 1024.0;

#[derive(Default)]
struct Side {
    own: Samples,
    guest: Samples,
    idle: Samples,
}

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, runs: u32) -> Result<GroupReport> {
    let size = fs::metadata(monitors.harrier()).context("the binary is not there")?.len();
    let guest = Guest {
        command_line: format!("{} rdinit=/bin/sh -- -c \"{SLEEP}\"", guest.command_line),
        ..guest.clone()
    };
    let mut sides: Sides<Side> = Sides::default();
    for _ in 0..runs {
        for engine in monitors.engines() {
            let mut command = monitors.harrier_run(engine, &["--", "sh", "-c", SLEEP])?;
            watch(Running::start(&mut command, LIMIT)?, sides.of(engine))?;
        }
        watch(monitors.start(Monitor::QemuTcg, &guest, LIMIT)?, &mut sides.qemu)?;
    }
    let Sides { soft, kvm, qemu } = sides;
    let figures = vec![
        Figure::new("release binary", Unit::MiB, [size as f64 / MIB].into_iter().collect())
            .goal(Goal::AtMost(10.0)),
        Figure::new("the monitor's own memory, 512 MiB guest at rest", Unit::MiB, soft.own)
            .kvm(kvm.own)
            .peer(qemu.own)
            .goal(Goal::AtMost(5.0)),
        Figure::new("guest memory, without shared pages of files", Unit::MiB, soft.guest)
            .kvm(kvm.guest)
            .peer(qemu.guest),
        Figure::new("idle guest, over 5 s", Unit::CpuPercent, soft.idle)
            .kvm(kvm.idle)
            .peer(qemu.idle)
            .goal(Goal::AtMost(2.0)),
    ];
    Ok(GroupReport { name: "memory", figures, remarks: monitors.kvm_remark().into_iter().collect() })
}

fn watch(mut running: Running, side: &mut Side) -> Result<()> {
    match running.next_mark()? {
        Some(mark) if mark.text == "idle" => {}
        _ => bail!("the guest ended instead of resting"),
    }
    std::thread::sleep(SETTLE);
    let before = running.cpu()?;
    std::thread::sleep(WATCH);
    let used = running.cpu()?.saturating_sub(before);
    side.idle.push(ms(used) / ms(WATCH) * 100.0);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", running.pid()))
        .context("the process's memory map cannot be read")?;
    let resident = resident(&maps);
    side.own.push(resident.own_kib as f64 / 1024.0);
    side.guest.push(resident.guest_kib as f64 / 1024.0);
    Ok(())
}

/// Resident memory of the guest of this process, in MiB.
pub(crate) fn guest_mib(pid: u32) -> Result<f64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .context("the process's memory map cannot be read")?;
    Ok(resident(&maps).guest_kib as f64 / 1024.0)
}

/// Resident memory of a process in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
struct Resident {
    /// Without the guest's memory.
    own_kib: u64,
    /// The guest's memory, but for the pages of files that it shares with other machines.
    guest_kib: u64,
}

/// Adds up /proc/PID/smaps (proc_pid_smaps(5)). Both monitors keep guest memory, and nothing else, out of core dumps: the
/// kernel calls that "dd".
fn resident(smaps: &str) -> Resident {
    let mut resident = Resident::default();
    let (mut kib, mut anonymous_kib) = (0, 0);
    let number = |size: &str| size.trim().trim_end_matches("kB").trim().parse().unwrap_or_default();
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            kib = number(size);
        } else if let Some(size) = line.strip_prefix("Anonymous:") {
            anonymous_kib = number(size);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split(' ').any(|flag| flag == "dd") {
                resident.guest_kib += anonymous_kib;
            } else {
                resident.own_kib += kib;
            }
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_monitors_own() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 1 /usr/bin/harrier
Size:               1024 kB
Rss:                 300 kB
Pss:                 300 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd 
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 
Size:             262144 kB
Rss:               30000 kB
Anonymous:         30000 kB
VmFlags: rd wr mr mw me nr dd sd 
7f0010000000-7f0020000000 rw-p 00000000 08:01 7 /a/kernel
Rss:               10000 kB
Anonymous:          4000 kB
VmFlags: rd wr mr mw me nr dd sd 
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  12 kB
Anonymous:            12 kB
VmFlags: rd wr mr mw me gd ac 
";
        assert_eq!(resident(smaps), Resident { own_kib: 312, guest_kib: 34_000 });
    }
}
