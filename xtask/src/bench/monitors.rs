//! Harrier and its peers as commands that boot the same kernel, initramfs and command line.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::measure::{self, Ended, Running};
use crate::{packages, process};

/// What Harrier says when the guest switched itself off, and its code then (a plain boot has no code of its own).
const SWITCHED_OFF: &str = "the guest switched itself off";
const HARRIER_CODE: i32 = 125;

const QEMU: &str = "qemu-system-x86_64";
/// Memory of every guest.
pub(crate) const MEMORY_MIB: u64 = 512;

/// What is booted.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) command_line: String,
}

/// Where a guest's processor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    HarrierSoft,
    QemuTcg,
    QemuKvm,
}

/// The programs, and what they need to know of this host.
#[derive(Debug)]
pub(crate) struct Monitors {
    harrier: PathBuf,
    qemu: PathBuf,
    /// QEMU has no clock of KVM's kind without KVM: it is told the frequency, or its guest would measure it.
    tsc_khz: Option<u64>,
}

impl Monitors {
    /// Finds QEMU, installed from its package where that is allowed.
    pub(crate) fn find(harrier: PathBuf) -> Result<Self> {
        packages::require(&[packages::SUITES])?;
        let qemu = packages::find_program(QEMU).with_context(|| format!("{QEMU} is not installed"))?;
        Ok(Self { harrier, qemu, tsc_khz: host_khz() })
    }

    /// Harrier's binary.
    pub(crate) fn harrier(&self) -> &Path {
        &self.harrier
    }

    /// The first line of each program's own version.
    pub(crate) fn versions(&self) -> Result<Vec<(String, String)>> {
        let mut versions = Vec::new();
        for (name, program) in [("Harrier", &self.harrier), ("QEMU", &self.qemu)] {
            let said = process::output(Command::new(program).arg("--version"))?;
            let said = String::from_utf8_lossy(&said);
            versions.push((name.to_owned(), said.lines().next().unwrap_or_default().to_owned()));
        }
        Ok(versions)
    }

    /// `harrier run` on the software engine with these arguments behind it.
    pub(crate) fn harrier_run(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.harrier);
        command.args(["run", "--engine", "soft", "--memory", &format!("{MEMORY_MIB}M")]).args(arguments);
        command
    }

    /// The command that boots `guest` with its serial console on stdout.
    pub(crate) fn boot(&self, monitor: Monitor, guest: &Guest) -> Command {
        let accelerator = match monitor {
            Monitor::HarrierSoft => {
                let mut command = self.harrier_run(&["--timings", "--kernel"]);
                command.arg(&guest.kernel).arg("--initrd").arg(&guest.initramfs);
                command.args(["--cmdline", &guest.command_line]);
                return command;
            }
            Monitor::QemuTcg => "tcg",
            Monitor::QemuKvm => "kvm",
        };
        let mut command = Command::new(&self.qemu);
        let memory = format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on");
        command.args(["-machine", "microvm,memory-backend=memory", "-accel", accelerator, "-cpu", "max"]);
        command.args(["-object", &memory, "-m", &format!("{MEMORY_MIB}M"), "-smp", "1"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-serial", "stdio"]);
        command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initramfs);
        let clock = match self.tsc_khz {
            Some(khz) if monitor == Monitor::QemuTcg => format!("tsc_early_khz={khz} "),
            _ => String::new(),
        };
        command.arg("-append").arg(format!("{clock}{}", guest.command_line));
        command
    }

    /// Boots `guest`, which switches itself off.
    pub(crate) fn run(&self, monitor: Monitor, guest: &Guest, limit: Duration) -> Result<Ended> {
        let ended = measure::run(&mut self.boot(monitor, guest), limit)?;
        let well = match monitor {
            Monitor::HarrierSoft => {
                ended.status.code() == Some(HARRIER_CODE) && ended.stderr.contains(SWITCHED_OFF)
            }
            Monitor::QemuTcg | Monitor::QemuKvm => ended.status.success(),
        };
        if !well {
            let said = format!("{}\n{}", ended.stdout, ended.stderr);
            bail!("{monitor:?} ended with {}: {}", ended.status, measure::last_words(&said));
        }
        Ok(ended)
    }

    /// Boots `guest` and leaves it running.
    pub(crate) fn start(&self, monitor: Monitor, guest: &Guest, limit: Duration) -> Result<Running> {
        Running::start(&mut self.boot(monitor, guest), limit)
    }
}

/// Frequency of the host's time stamp counter in kHz, as far as its processor list tells it.
fn host_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let (whole, fraction) = line.rsplit(' ').next()?.split_once('.')?;
    let thousandths: String = fraction.chars().chain("000".chars()).take(3).collect();
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(thousandths.parse().ok()?)
}
