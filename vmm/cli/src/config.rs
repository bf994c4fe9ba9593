//! From flags to one validated configuration. What can be checked without touching the host's files is checked here;
//! files are opened by the parts that use them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use harrier_engine::CpuModel;
use harrier_engine::cpu_model::UnknownCpuModel;
use harrier_machine::MAX_VCPUS;
use harrier_machine::boot::ElfEntry;
use thiserror::Error;

use crate::engines::{EngineChoice, EngineChoiceError};
use crate::files::{FileFlagError, FilesConfig};
use crate::flags::RunFlags;
use crate::limits::{LimitFlagError, LimitsConfig};
use crate::units::{UnitError, parse_size, parse_time};

/// Kernel command line of a plain boot: a console, and an end instead of a hang when the kernel panics.
const PLAIN_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// Most of the guest's own snapshots that are kept.
const MAX_CHECKPOINTS: usize = 1000;

/// What runs in the machine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// A command under the agent.
    Command(CommandConfig),
    /// A kernel with its console on the terminal.
    Console,
}

/// A command and its surroundings.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CommandConfig {
    /// Program and arguments; at least one.
    pub(crate) argv: Vec<Vec<u8>>,
    pub(crate) env: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) workdir: Option<Vec<u8>>,
    pub(crate) rootfs: Option<PathBuf>,
}

/// An opened snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Restored {
    pub(crate) chain: std::sync::Arc<harrier_snapshot::Chain>,
    /// What it is to become.
    pub(crate) restoration: harrier_machine::snapshot::Restoration,
}

impl PartialEq for Restored {
    fn eq(&self, other: &Self) -> bool {
        self.chain.snapshot().manifest() == other.chain.snapshot().manifest()
    }
}

impl Eq for Restored {}

/// A disk besides the root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskConfig {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// How the result is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutputConfig {
    pub(crate) json: bool,
    pub(crate) timings: bool,
    /// Remarks for people are wanted on stderr.
    pub(crate) remarks: bool,
    /// Nothing but errors, not even which engine was taken.
    pub(crate) quiet: bool,
}

/// Everything about one run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RunConfig {
    /// The snapshot that the machine is made of, instead of booting.
    pub(crate) restore: Option<Restored>,
    /// How many of the guest's own snapshots are kept.
    pub(crate) checkpoints: usize,
    pub(crate) engine: EngineChoice,
    pub(crate) vcpu_count: u32,
    pub(crate) memory_bytes: u64,
    /// `None` takes the engine's best.
    pub(crate) cpu_model: Option<CpuModel>,
    pub(crate) timeout: Option<Duration>,
    /// `None` takes the default guest's.
    pub(crate) kernel: Option<PathBuf>,
    /// `None` takes the default guest's for a command, and none for a plain boot.
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) command_line: String,
    pub(crate) elf_entry: ElfEntry,
    pub(crate) disks: Vec<DiskConfig>,
    pub(crate) console: Option<PathBuf>,
    /// The folder through which a worker hears of this run.
    pub(crate) attempt: Option<PathBuf>,
    /// How long its guest may give no sign of life, while it runs.
    pub(crate) hang_limit: Duration,
    /// Where the command's stderr goes, if not to this program's.
    pub(crate) stderr: Option<PathBuf>,
    /// Nothing is to run: the machine becomes this template as soon as it could run something.
    pub(crate) template: Option<PathBuf>,
    /// What it is made of has no command yet.
    pub(crate) is_warm: bool,
    pub(crate) workload: Workload,
    /// Files of the command.
    pub(crate) files: FilesConfig,
    /// What the command may do; one that goes on in a snapshot has that in it.
    pub(crate) limits: LimitsConfig,
    /// Input of a detached machine stays open.
    pub(crate) interactive: bool,
    /// The command has a terminal wherever its streams go.
    pub(crate) tty: bool,
    pub(crate) output: OutputConfig,
    /// Filter the system calls of the process and its threads.
    pub(crate) seccomp: bool,
}

#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error("nothing to run: give a command after '--', or a kernel with --kernel")]
    Nothing,
    #[error(transparent)]
    Engine(#[from] EngineChoiceError),
    #[error("--cpus '{0}' is not a number of cpus: give 1 to {MAX_VCPUS}")]
    Cpus(String),
    #[error("--memory: {0}")]
    Memory(UnitError),
    #[error("--timeout: {0}")]
    Timeout(UnitError),
    #[error("--hang-limit: {0}")]
    HangLimit(UnitError),
    #[error("--log-limit: {0}")]
    LogLimit(UnitError),
    #[error("--cpu-model: {0}")]
    CpuModel(#[from] UnknownCpuModel),
    #[error("--env '{0}' has no name: write NAME=VALUE")]
    EnvName(String),
    #[error("--env '{0}' is not set here: write {0}=VALUE")]
    EnvNotSet(String),
    #[error("--workdir '{0}' is not an absolute path: start it with /")]
    Workdir(String),
    #[error("--disk '{0}' names no file: write PATH or PATH:ro")]
    Disk(String),
    #[error("--cmdline '{0}' is not text: use UTF-8")]
    CommandLine(String),
    #[error("{0} is for a command in the guest, and there is none: give one after '--'")]
    NeedsCommand(&'static str),
    #[error("the command name is empty: give a program")]
    EmptyCommand,
    #[error(transparent)]
    Limits(#[from] LimitFlagError),
    #[error(transparent)]
    Files(#[from] FileFlagError),
    #[error("--checkpoints '{0}' is not possible: give 0 to {MAX_CHECKPOINTS}")]
    Checkpoints(String),
    #[error("--elf-entry '{0}' is unknown: use auto, pvh or linux64")]
    ElfEntry(String),
}

impl RunConfig {
    /// Checks the flags. `host_env` looks up a variable of the host, `remarks` says whether stderr wants remarks.
    pub(crate) fn from_flags(
        flags: RunFlags,
        host_env: impl Fn(&OsStr) -> Option<OsString>,
        remarks: bool,
    ) -> Result<Self, ConfigError> {
        let engine = flags.engine.parse()?;
        let vcpu_count = parse_cpus(&flags.cpus)?;
        let memory_bytes = parse_size(&flags.memory).map_err(ConfigError::Memory)?;
        let cpu_model = flags.cpu_model.as_deref().map(str::parse).transpose()?;
        let timeout = flags.timeout.as_deref().map(parse_time).transpose().map_err(ConfigError::Timeout)?;
        let elf_entry = match flags.elf_entry.as_str() {
            "auto" => ElfEntry::Auto,
            "pvh" => ElfEntry::Pvh,
            "linux64" => ElfEntry::Linux64,
            other => return Err(ConfigError::ElfEntry(other.to_owned())),
        };
        let workload = if flags.command.is_empty() {
            let for_commands = [
                ("--env", !flags.env.is_empty()),
                ("--workdir", flags.workdir.is_some()),
                ("--rootfs", flags.rootfs.is_some()),
                ("--tty", flags.tty),
                ("--input", !flags.files.input.is_empty()),
                ("--output", !flags.files.output.is_empty()),
                ("--user", flags.limits.user.is_some()),
                ("--isolate", flags.limits.isolate),
            ];
            if flags.kernel.is_none() {
                return Err(ConfigError::Nothing);
            }
            if let Some((name, _)) = for_commands.iter().find(|(_, given)| *given) {
                return Err(ConfigError::NeedsCommand(name));
            }
            Workload::Console
        } else {
            Workload::Command(parse_command(&flags, host_env)?)
        };
        let mut command_line = match workload {
            Workload::Command(_) => crate::guest_files::COMMAND_LINE.trim().to_owned(),
            Workload::Console => PLAIN_COMMAND_LINE.to_owned(),
        };
        for words in &flags.cmdline {
            let words = words.to_str().ok_or_else(|| ConfigError::CommandLine(lossy(words)))?;
            if !words.is_empty() {
                command_line.push(' ');
                command_line.push_str(words);
            }
        }
        Ok(RunConfig {
            restore: None,
            checkpoints: parse_checkpoints(&flags.checkpoints)?,
            engine,
            vcpu_count,
            memory_bytes,
            cpu_model,
            timeout,
            kernel: flags.kernel,
            initrd: flags.initrd,
            command_line,
            elf_entry,
            disks: flags.disk.iter().map(|text| parse_disk(text)).collect::<Result<_, _>>()?,
            console: flags.console,
            attempt: flags.attempt,
            hang_limit: hang_limit(flags.hang_limit.as_deref())?,
            stderr: flags.stderr,
            limits: LimitsConfig::from_flags(&flags.limits)?,
            template: flags.template,
            is_warm: false,
            files: FilesConfig::from_flags(&flags.files, flags.workdir.as_ref().map(|dir| dir.as_bytes()))?,
            workload,
            interactive: flags.interactive,
            tty: flags.tty,
            output: OutputConfig { json: flags.json, timings: flags.timings, remarks, quiet: flags.quiet },
            seccomp: !flags.no_seccomp,
        })
    }
}

/// Checks `--checkpoints`.
pub(crate) fn parse_checkpoints(text: &str) -> Result<usize, ConfigError> {
    let count = text.parse().ok().filter(|count| *count <= MAX_CHECKPOINTS);
    count.ok_or_else(|| ConfigError::Checkpoints(text.to_owned()))
}

/// A time, or the default.
pub(crate) fn hang_limit(text: Option<&str>) -> Result<Duration, ConfigError> {
    let limit = text.map(parse_time).transpose().map_err(ConfigError::HangLimit)?;
    Ok(limit.unwrap_or(crate::attempt::HANG_LIMIT).max(crate::attempt::HEARTBEAT * 2))
}

/// A size, or the default.
pub(crate) fn log_limit(text: Option<&str>) -> Result<u64, ConfigError> {
    const DEFAULT: u64 = 16 << 30;
    Ok(text.map(parse_size).transpose().map_err(ConfigError::LogLimit)?.unwrap_or(DEFAULT))
}

fn lossy(text: &OsStr) -> String {
    text.to_string_lossy().into_owned()
}

fn parse_cpus(text: &str) -> Result<u32, ConfigError> {
    text.parse()
        .ok()
        .filter(|count| (1..=MAX_VCPUS).contains(count))
        .ok_or_else(|| ConfigError::Cpus(text.to_owned()))
}

fn parse_disk(text: &OsStr) -> Result<DiskConfig, ConfigError> {
    let bytes = text.as_bytes();
    let (path, read_only) = match bytes.strip_suffix(b":ro") {
        Some(path) => (path, true),
        None => (bytes.strip_suffix(b":rw").unwrap_or(bytes), false),
    };
    if path.is_empty() {
        return Err(ConfigError::Disk(lossy(text)));
    }
    Ok(DiskConfig { path: PathBuf::from(OsStr::from_bytes(path)), read_only })
}

fn parse_command(
    flags: &RunFlags,
    host_env: impl Fn(&OsStr) -> Option<OsString>,
) -> Result<CommandConfig, ConfigError> {
    let argv: Vec<Vec<u8>> = flags.command.iter().map(|arg| arg.as_bytes().to_vec()).collect();
    if argv.first().is_some_and(Vec::is_empty) {
        return Err(ConfigError::EmptyCommand);
    }
    let mut env = Vec::new();
    for text in &flags.env {
        let bytes = text.as_bytes();
        let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                let (name, value) = bytes.split_at(at);
                (name, value.get(1..).unwrap_or_default().to_vec())
            }
            None => {
                if text.is_empty() {
                    return Err(ConfigError::EnvName(lossy(text)));
                }
                let value = host_env(text).ok_or_else(|| ConfigError::EnvNotSet(lossy(text)))?;
                (bytes, value.into_vec())
            }
        };
        if name.is_empty() {
            return Err(ConfigError::EnvName(lossy(text)));
        }
        env.push((name.to_vec(), value));
    }
    let workdir = flags.workdir.as_ref().map(|dir| dir.as_bytes().to_vec());
    if let Some(dir) = flags.workdir.as_ref().filter(|dir| !dir.as_bytes().starts_with(b"/")) {
        return Err(ConfigError::Workdir(lossy(dir)));
    }
    Ok(CommandConfig { argv, env, workdir, rootfs: flags.rootfs.clone() })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::flags::{Command, Flags};

    fn parse(args: &[&str]) -> Result<RunConfig, String> {
        let args = ["harrier", "run"].iter().chain(args);
        let Command::Run(flags) = Flags::try_parse_from(args).map_err(|err| err.to_string())?.command else {
            return Err("not run".to_owned());
        };
        let host_env = |name: &OsStr| (name == "SET").then(|| OsString::from("host"));
        RunConfig::from_flags(*flags, host_env, false).map_err(|err| err.to_string())
    }

    #[test]
    fn the_shortest_run_has_the_documented_defaults() {
        let config = parse(&["--", "true"]).unwrap();
        assert_eq!((config.vcpu_count, config.memory_bytes, config.cpu_model), (1, 512 << 20, None));
        assert_eq!((config.engine, config.timeout), (EngineChoice::Auto, None));
        assert!(config.command_line.contains("console=ttyS0"), "{}", config.command_line);
        let Workload::Command(command) = config.workload else { panic!("no command") };
        assert_eq!(command.argv, [b"true"]);
    }

    #[test]
    fn the_command_keeps_its_own_options() {
        for args in [&["uname", "-a", "--json"][..], &["--", "uname", "-a", "--json"]] {
            let config = parse(args).unwrap();
            let Workload::Command(command) = config.workload else { panic!("no command") };
            assert_eq!(command.argv, [&b"uname"[..], b"-a", b"--json"]);
            assert!(!config.output.json);
        }
    }

    #[test]
    fn environment_disks_and_command_line_are_taken_apart() {
        let config = parse(&[
            "-e",
            "A=b=c",
            "--env",
            "SET",
            "--env",
            "E=",
            "--workdir",
            "/tmp",
            "--disk",
            "a:ro",
            "--disk",
            "b:x",
            "--cmdline",
            "debug",
            "--cmdline",
            "x=1 y",
            "--timeout",
            "2m",
            "--",
            "sh",
        ])
        .unwrap();
        assert!(config.command_line.ends_with(" debug x=1 y"));
        assert_eq!(
            config.disks,
            [
                DiskConfig { path: "a".into(), read_only: true },
                DiskConfig { path: "b:x".into(), read_only: false }
            ]
        );
        assert_eq!(config.timeout, Some(Duration::from_secs(120)));
        let Workload::Command(command) = config.workload else { panic!("no command") };
        let env: Vec<_> = command
            .env
            .iter()
            .map(|(name, value)| (String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
            .collect();
        assert_eq!(env, [("A".into(), "b=c".into()), ("SET".into(), "host".into()), ("E".into(), "".into())]);
        assert_eq!(command.workdir.as_deref(), Some(&b"/tmp"[..]));
    }

    #[test]
    fn a_kernel_without_a_command_is_a_plain_boot() {
        let config = parse(&["--kernel", "k", "--initrd", "i", "--cmdline", "root=/dev/vda"]).unwrap();
        assert_eq!(config.workload, Workload::Console);
        assert_eq!(config.command_line, "console=ttyS0 panic=-1 root=/dev/vda");
    }

    #[test]
    fn every_bad_value_is_named_with_its_remedy() {
        let cases: [(&[&str], &str); 21] = [
            (&[], "nothing to run: give a command after '--', or a kernel with --kernel"),
            (&["--engine", "xen", "x"], "unknown engine 'xen': use auto, kvm or soft"),
            (&["--cpus", "0", "x"], "--cpus '0' is not a number of cpus: give 1 to 255"),
            (&["--cpus", "256", "x"], "--cpus '256' is not a number of cpus: give 1 to 255"),
            (&["--cpus", "two", "x"], "--cpus 'two' is not a number of cpus: give 1 to 255"),
            (&["--cpus", "-1", "x"], "--cpus '-1' is not a number of cpus: give 1 to 255"),
            (
                &["--memory", "lots", "x"],
                "--memory: 'lots' is not a size: write a number with K, M or G, like 512M",
            ),
            (
                &["--memory", "-5M", "x"],
                "--memory: '-5M' is not a size: write a number with K, M or G, like 512M",
            ),
            (
                &["--timeout", "soon", "x"],
                "--timeout: 'soon' is not a time: write a number with ms, s, m or h, like 30s",
            ),
            (&["--timeout", "0", "x"], "--timeout: a time of '0' leaves no time to run: give more"),
            (&["--cpu-model", "486", "x"], "--cpu-model: unknown cpu model '486': use v1, v2, v3 or host"),
            (&["--env", "=v", "x"], "--env '=v' has no name: write NAME=VALUE"),
            (&["--env", "", "x"], "--env '' has no name: write NAME=VALUE"),
            (&["--env", "UNSET", "x"], "--env 'UNSET' is not set here: write UNSET=VALUE"),
            (&["--workdir", "tmp", "x"], "--workdir 'tmp' is not an absolute path: start it with /"),
            (&["--disk", ":ro", "x"], "--disk ':ro' names no file: write PATH or PATH:ro"),
            (&["--disk", "", "x"], "--disk '' names no file: write PATH or PATH:ro"),
            (
                &["--kernel", "k", "--env", "A=b"],
                "--env is for a command in the guest, and there is none: give one after '--'",
            ),
            (
                &["--kernel", "k", "--rootfs", "r"],
                "--rootfs is for a command in the guest, and there is none: give one after '--'",
            ),
            (&["--", ""], "the command name is empty: give a program"),
            (&["--elf-entry", "x", "x"], "--elf-entry 'x' is unknown: use auto, pvh or linux64"),
        ];
        for (args, text) in cases {
            assert_eq!(parse(args).unwrap_err(), text, "{args:?}");
        }
    }
}
