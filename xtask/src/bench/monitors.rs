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
    pub(crate) initramfs: Option<PathBuf>,
    /// A raw disk, which is the guest's first.
    pub(crate) disk: Option<PathBuf>,
    pub(crate) command_line: String,
}

/// Where a guest's processor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    HarrierSoft,
    HarrierKvm,
    QemuTcg,
    QemuKvm,
}

impl Monitor {
    /// The engine's name, if it is Harrier's.
    pub(crate) fn engine(self) -> Option<&'static str> {
        match self {
            Monitor::HarrierSoft => Some("soft"),
            Monitor::HarrierKvm => Some("kvm"),
            Monitor::QemuTcg | Monitor::QemuKvm => None,
        }
    }
}

/// Measurements of the same thing on each side.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sides<T> {
    pub(crate) soft: T,
    pub(crate) kvm: T,
    pub(crate) qemu: T,
}

impl<T> Sides<T> {
    /// The side of this monitor.
    pub(crate) fn of(&mut self, monitor: Monitor) -> &mut T {
        match monitor {
            Monitor::HarrierSoft => &mut self.soft,
            Monitor::HarrierKvm => &mut self.kvm,
            Monitor::QemuTcg | Monitor::QemuKvm => &mut self.qemu,
        }
    }
}

/// The programs, and what they need to know of this host.
#[derive(Debug)]
pub(crate) struct Monitors {
    harrier: PathBuf,
    qemu: PathBuf,
    /// QEMU has no clock of KVM's kind without KVM: it is told the frequency, or its guest would measure it.
    tsc_khz: Option<u64>,
    /// Why Harrier's KVM engine does not run here, in its own words.
    kvm_refusal: Option<String>,
}

/// How long Harrier may take to find out whether its KVM engine runs.
const KVM_TRIAL: Duration = Duration::from_secs(60);

impl Monitors {
    /// Finds QEMU, installed from its package where that is allowed.
    pub(crate) fn find(harrier: PathBuf) -> Result<Self> {
        packages::require(&[packages::SUITES])?;
        let qemu = packages::find_program(QEMU).with_context(|| format!("{QEMU} is not installed"))?;
        let mut monitors = Self { harrier, qemu, tsc_khz: host_khz(), kvm_refusal: None };
        let trial = monitors.harrier_run(Monitor::HarrierKvm, &["--quiet", "--", "true"])?;
        let ended = measure::run(&mut { trial }, KVM_TRIAL);
        monitors.kvm_refusal = match ended {
            Ok(ended) if ended.status.success() => None,
            Ok(ended) => Some(measure::last_words(&ended.stderr)),
            Err(error) => Some(format!("{error:#}")),
        };
        Ok(monitors)
    }

    /// The monitors that take part in every group: Harrier's engines and QEMU's translator.
    pub(crate) fn sides(&self) -> Vec<Monitor> {
        let kvm = self.kvm_refusal.is_none().then_some(Monitor::HarrierKvm);
        [Some(Monitor::HarrierSoft), kvm, Some(Monitor::QemuTcg)].into_iter().flatten().collect()
    }

    /// Harrier's engines that run here.
    pub(crate) fn engines(&self) -> Vec<Monitor> {
        self.sides().into_iter().filter(|side| side.engine().is_some()).collect()
    }

    /// Why there is no column for KVM, if there is none.
    pub(crate) fn kvm_remark(&self) -> Option<String> {
        self.kvm_refusal.as_ref().map(|words| format!("Harrier's KVM engine does not run here: {words}"))
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

    /// `harrier run` on one of its engines with these arguments behind it.
    pub(crate) fn harrier_run(&self, monitor: Monitor, arguments: &[&str]) -> Result<Command> {
        let engine = monitor.engine().with_context(|| format!("{monitor:?} is not Harrier"))?;
        let mut command = Command::new(&self.harrier);
        command.args(["run", "--engine", engine, "--memory", &format!("{MEMORY_MIB}M")]).args(arguments);
        Ok(command)
    }

    /// The command that boots `guest` with its serial console on stdout.
    pub(crate) fn boot(&self, monitor: Monitor, guest: &Guest) -> Result<Command> {
        let accelerator = match monitor {
            Monitor::HarrierSoft | Monitor::HarrierKvm => {
                let mut command = self.harrier_run(monitor, &["--timings", "--kernel"])?;
                command.arg(&guest.kernel).args(["--cmdline", &guest.command_line]);
                if let Some(initramfs) = &guest.initramfs {
                    command.arg("--initrd").arg(initramfs);
                }
                if let Some(disk) = &guest.disk {
                    command.arg("--disk").arg(disk);
                }
                return Ok(command);
            }
            Monitor::QemuTcg => "tcg",
            Monitor::QemuKvm => "kvm",
        };
        let mut command = Command::new(&self.qemu);
        command.args(["-machine", "microvm,dump-guest-core=off", "-accel", accelerator, "-cpu", "max"]);
        command.args(["-m", &format!("{MEMORY_MIB}M"), "-smp", "1"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-serial", "stdio"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.arg("-kernel").arg(&guest.kernel);
        if let Some(initramfs) = &guest.initramfs {
            command.arg("-initrd").arg(initramfs);
        }
        if let Some(disk) = &guest.disk {
            command.arg("-drive").arg(format!("id=disk,if=none,format=raw,file={}", disk.display()));
            command.args(["-device", "virtio-blk-device,drive=disk"]);
        }
        let clock = match self.tsc_khz {
            Some(khz) if monitor == Monitor::QemuTcg => format!("tsc_early_khz={khz} "),
            _ => String::new(),
        };
        command.arg("-append").arg(format!("{clock}{}", guest.command_line));
        Ok(command)
    }

    /// Boots `guest`, which switches itself off.
    pub(crate) fn run(&self, monitor: Monitor, guest: &Guest, limit: Duration) -> Result<Ended> {
        let ended = measure::run(&mut self.boot(monitor, guest)?, limit)?;
        let well = match monitor {
            Monitor::HarrierSoft | Monitor::HarrierKvm => {
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
        Running::start(&mut self.boot(monitor, guest)?, limit)
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
