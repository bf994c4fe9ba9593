//! The command line as typed. Values are checked in [`crate::config`], where the messages can name a remedy.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::jobs::flags::QueuePlace;

/// Runs commands and kernels in microVMs.
#[derive(Debug, Parser)]
#[command(name = "harrier", version, about, max_term_width = 110, disable_help_subcommand = true)]
pub(crate) struct Flags {
    /// Where machines are kept: a private directory; the default is $HARRIER_RUNTIME_DIR, else
    /// $XDG_RUNTIME_DIR/harrier, else a directory of the user's in /run or /tmp.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a microVM, run a command in it and return the command's exit code.
    ///
    /// Without a command and with --kernel, the kernel boots with its serial console on the terminal.
    ///
    /// Exit codes: the command's own, or the one that a kernel without a command gives by hypercall; 128+n if signal n
    /// ended it; 124 after --timeout; 125 if Harrier or the guest failed; 126 if the command is not executable; 127 if it
    /// is not found.
    Run(Box<RunFlags>),
    /// List machines.
    Ps(PsFlags),
    /// Show everything about machines, as JSON.
    Inspect(InspectFlags),
    /// Show what a job, or a detached machine's command, has printed.
    Logs(LogsFlags),
    /// Run a further command in a machine and return its exit code.
    ///
    /// Its streams are those of this command; it has a terminal when stdin and stdout are terminals, or with --tty.
    Exec(ExecFlags),
    /// Connect to the command of a detached machine: its output from now on, and its input if it was started with
    /// --interactive. Returns its exit code.
    Attach(AttachFlags),
    /// Make machines stand still; their memory stays.
    Pause(NamesFlags),
    /// Let suspended jobs or paused machines go on.
    Resume(ResumeFlags),
    /// Take a snapshot of a machine; it goes on as it was, after a short pause.
    Snapshot(SnapshotFlags),
    /// Make a machine of a snapshot, on any engine; it goes on where it was.
    ///
    /// Exit codes are those of 'harrier run'.
    Restore(Box<RestoreFlags>),
    /// Make clones of a machine that runs, or of a snapshot, and print their ids.
    ///
    /// They go on where the machine was, beside it, and share the memory that none of them writes. A command knows its own
    /// clone by /run/harrier/identity in the guest.
    Fork(ForkFlags),
    /// List, check, show and remove snapshots.
    #[command(subcommand)]
    Snapshots(SnapshotsCommand),
    /// Ask machines to end, and end them if they do not.
    Stop(StopFlags),
    /// End machines at once, or send their commands a signal.
    Kill(KillFlags),
    /// Wait for the end of jobs or machines.
    ///
    /// For jobs, the exit code is that of the first that did not succeed. For machines, the exit codes are printed, and
    /// the exit code is that of the last one.
    Wait(WaitFlags),
    /// Remove what is left of machines that have ended.
    Rm(RmFlags),
    /// Show what this host offers, and what follows from it.
    Doctor(DoctorFlags),
    /// Try every engine that this host has: guests that check the processor, and Linux. A report for people or as JSON.
    ///
    /// Exit codes: 0 if all checks passed or had to be skipped, 1 if one failed, 125 if they could not be run.
    Selftest(SelftestFlags),
    /// The process of a detached machine; started by `run --detach` and of no use by hand.
    #[command(hide = true)]
    Monitor(MonitorFlags),
    #[command(flatten)]
    Job(crate::jobs::flags::JobCommand),
}

#[derive(Debug, Args, Default)]
pub(crate) struct RunFlags {
    /// Name of the machine, by which the other commands find it.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Run in the background, print the machine's id and keep its output for 'harrier logs'.
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Remove a detached machine when it ends, with its output.
    #[arg(long, requires = "detach")]
    pub(crate) rm: bool,
    /// Keep the input of a detached machine open, for 'harrier attach'.
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Give the command a terminal; without --detach it has one when stdin and stdout are terminals.
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Processor: auto, kvm or soft.
    #[arg(long, default_value = "auto", value_name = "ENGINE")]
    pub(crate) engine: String,
    /// Number of virtual CPUs, 1 to 255.
    #[arg(long, default_value = "1", value_name = "N", allow_hyphen_values = true)]
    pub(crate) cpus: String,
    /// Guest memory; suffixes K, M, G.
    #[arg(long, default_value = "512M", value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) memory: String,
    /// CPU model that the guest sees: v1, v2, v3 or host; the default is the best of v1 to v3 that the engine has.
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu_model: Option<String>,
    /// Environment variable of the command: NAME=VALUE, or NAME to pass the host's value. Repeatable.
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub(crate) env: Vec<OsString>,
    /// Working directory of the command in the guest.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    #[command(flatten)]
    pub(crate) files: FileFlags,
    #[command(flatten)]
    pub(crate) limits: LimitFlags,
    /// End the machine after this time; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) timeout: Option<String>,
    /// Root file system for the command: an ext4 or squashfs image, used read-only below a writable overlay in memory.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) rootfs: Option<PathBuf>,
    /// A further disk: a raw image or block device; with ':ro' at the end read-only. Repeatable.
    #[arg(long, value_name = "PATH[:ro]")]
    pub(crate) disk: Vec<OsString>,
    /// Kernel to boot: an x86-64 vmlinux or bzImage.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial ramdisk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Added to the kernel command line. Repeatable.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) cmdline: Vec<OsString>,
    /// Write what the guest prints on its serial console to a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
    /// How many of the snapshots that the guest takes of itself are kept; 0 lets it take none.
    #[arg(long, default_value = "1", value_name = "COUNT", allow_hyphen_values = true)]
    pub(crate) checkpoints: String,
    /// Print one JSON object on stdout, with the output of the command in it, instead of streaming.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print on stderr how long each phase took.
    #[arg(long)]
    pub(crate) timings: bool,
    /// Run without system-call filters, for kernels that lack them and for debugging.
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// No remarks on stderr, only errors.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Log more: -v what Harrier does, -vv all details.
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// The folder of a job's attempt, for workers.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) attempt: Option<PathBuf>,
    /// How long the guest of an attempt may give no sign of life; suffixes s, m, h.
    #[arg(long, value_name = "TIME", hide = true)]
    pub(crate) hang_limit: Option<String>,
    /// Where the command's stderr goes, for workers.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) stderr: Option<PathBuf>,
    /// Make a template for warm starts instead of running the command, for workers.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) template: Option<PathBuf>,
    /// Start in a copy of this template, for workers.
    #[arg(long, value_name = "DIR", hide = true, conflicts_with = "template")]
    pub(crate) warm: Option<PathBuf>,
    /// The snapshot that the machine is made of; set by `harrier restore`.
    #[arg(skip)]
    pub(crate) restore: Option<PathBuf>,
    /// Which clone of a fork it is; set by `harrier fork`.
    #[arg(skip)]
    pub(crate) clone_index: Option<u32>,
    /// The image that the snapshot is in, which goes away with the last clone.
    #[arg(skip)]
    pub(crate) image: Option<PathBuf>,
    /// Entry of an ELF kernel: auto, pvh or linux64.
    #[arg(long, default_value = "auto", value_name = "ENTRY", hide = true)]
    pub(crate) elf_entry: String,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// Files of the command.
#[derive(Debug, Args, Default, Clone)]
pub(crate) struct FileFlags {
    /// A file of this host that is copied into the machine before the command runs: by default into the command's working
    /// directory, under its own name. Repeatable.
    #[arg(long, value_name = "HOST[:GUEST]")]
    pub(crate) input: Vec<OsString>,
    /// A file of the guest that is copied to this host when the command has ended: by default into the working directory,
    /// under its own name. If the command succeeds without having written it, the run fails. Repeatable.
    #[arg(long, value_name = "GUEST[:HOST]")]
    pub(crate) output: Vec<OsString>,
    /// An input with permission bits of its own, for workers.
    #[arg(long, value_name = "MODE:HOST:GUEST", hide = true)]
    pub(crate) input_as: Vec<OsString>,
    /// The longest output file that is taken; suffixes K, M, G. The default is 16G.
    #[arg(long, value_name = "SIZE")]
    pub(crate) output_limit: Option<String>,
    /// How much of what a detached machine prints is kept for 'harrier logs'; suffixes K, M, G. What comes later is lost, and told
    /// to be. The default is 16G.
    #[arg(long, value_name = "SIZE")]
    pub(crate) log_limit: Option<String>,
}

/// What the command may do in its machine.
#[derive(Debug, Args, Default, Clone)]
pub(crate) struct LimitFlags {
    /// Run the command as this user: UID, UID:GID, or a name in the guest's /etc/passwd.
    #[arg(long, short, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Run the command in namespaces of its own: it sees no process, mount or host name of the machine.
    #[arg(long)]
    pub(crate) isolate: bool,
    /// Processor time of the command, in percent of one processor.
    #[arg(long, value_name = "PERCENT")]
    pub(crate) cpu_limit: Option<String>,
    /// Memory of the command, with its files in memory; suffixes K, M, G. If it needs more it is ended.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_limit: Option<String>,
    /// Processes and threads of the command. If it makes more it is ended.
    #[arg(long, value_name = "N")]
    pub(crate) process_limit: Option<String>,
    /// What fits each file system that the command can write without a disk of its own; suffixes K, M, G.
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_limit: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorFlags {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SelftestFlags {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Only this engine, kvm or soft; the default is every one that is here.
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    /// Only checks whose names begin so. Repeatable.
    #[arg(long, value_name = "NAME")]
    pub(crate) only: Vec<String>,
    /// The longest that a check may take; suffixes ms, s, m, h.
    #[arg(long, default_value = "2m", value_name = "TIME")]
    pub(crate) timeout: String,
}

#[derive(Debug, Args)]
pub(crate) struct PsFlags {
    /// Machines that have ended as well.
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Only ids.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Only machines for which this holds: name=TEXT, id=PREFIX, state=STATE or exit=CODE. Repeatable.
    #[arg(long, short, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Print whole commands.
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Print one JSON array.
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NamesFlags {
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectFlags {
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
    /// Accepted for symmetry: the answer is JSON in any case.
    #[arg(long, hide = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsFlags {
    /// Go on until the machine ends.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Begin each line with its time, in UTC.
    #[arg(long, short)]
    pub(crate) timestamps: bool,
    /// Only the last lines of what there is now.
    #[arg(long, short = 'n', value_name = "LINES")]
    pub(crate) tail: Option<usize>,
    /// Show what the monitor itself has said, not the command.
    #[arg(long, conflicts_with_all = ["follow", "timestamps", "tail"])]
    pub(crate) monitor: bool,
    /// Of a job: only its stdout.
    #[arg(long, conflicts_with = "stderr")]
    pub(crate) stdout: bool,
    /// Of a job: only its stderr.
    #[arg(long)]
    pub(crate) stderr: bool,
    /// Of a job: this attempt; else the last.
    #[arg(long, value_name = "N", conflicts_with = "follow")]
    pub(crate) attempt: Option<u64>,
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// A job's number, or a machine's name, id or beginning of an id.
    #[arg(value_name = "ID")]
    pub(crate) target: String,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// For jobs: print one JSON array of what was done.
    #[arg(long)]
    pub(crate) json: bool,
    /// Jobs: ID, ID,ID or ID-ID. Or machines: names, ids or beginnings of ids.
    #[arg(required = true, value_name = "ID")]
    pub(crate) targets: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct WaitFlags {
    /// For jobs: until one of them has ended.
    #[arg(long)]
    pub(crate) any: bool,
    /// For jobs: give up after this time, with exit code 124; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<String>,
    /// For jobs: print one JSON array of those that have ended.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Jobs: ID, ID,ID or ID-ID. Or machines: names, ids or beginnings of ids.
    #[arg(required = true, value_name = "ID")]
    pub(crate) targets: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecFlags {
    /// Accepted for those who know it from docker: the input is passed in any case.
    #[arg(long, short, hide = true)]
    pub(crate) interactive: bool,
    /// Give the command a terminal.
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Leave the command alone in the machine once it is on its way.
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Give the command no input.
    #[arg(long, short = 'n')]
    pub(crate) no_stdin: bool,
    /// Environment variable of the command: NAME=VALUE, or NAME to pass the host's value. Repeatable.
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub(crate) env: Vec<OsString>,
    /// Working directory of the command; the default is that of the machine's own.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// Keys that leave the command alone, in a terminal.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: String,
    /// The folder of a job's attempt, for workers.
    #[arg(long, value_name = "DIR", hide = true, requires = "stderr")]
    pub(crate) attempt: Option<PathBuf>,
    /// Where an attempt's stderr goes.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) stderr: Option<PathBuf>,
    /// Name, id or beginning of an id.
    #[arg(value_name = "MACHINE")]
    pub(crate) machine: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct AttachFlags {
    /// Send no input.
    #[arg(long, short = 'n')]
    pub(crate) no_stdin: bool,
    /// Keys that leave the command alone, in a terminal.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: String,
    /// Name, id or beginning of an id.
    #[arg(value_name = "MACHINE")]
    pub(crate) machine: String,
}

#[derive(Debug, Args)]
pub(crate) struct StopFlags {
    /// How long a machine may take to end by itself; suffixes ms, s, m, h.
    #[arg(long, short = 't', default_value = "10s", value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) timeout: String,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KillFlags {
    /// Send this signal to the command instead of ending the machine: a name like INT, or a number.
    #[arg(long, short, value_name = "SIGNAL")]
    pub(crate) signal: Option<String>,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmFlags {
    /// End machines that run.
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Names, ids or beginnings of ids.
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct MonitorFlags {
    /// The machine's folder.
    pub(crate) folder: PathBuf,
    /// The command line of the machine.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotFlags {
    /// The machine: its name or id.
    pub(crate) machine: String,
    /// The folder that the snapshot is to be; the default is a new one where snapshots are kept.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Only what changed since the machine's last snapshot, beside which it will stand.
    #[arg(long)]
    pub(crate) diff: bool,
    /// Compress memory: less to store, and every restore has to unpack it.
    #[arg(long)]
    pub(crate) compress: bool,
    /// Let a machine that is paused go on afterwards.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreFlags {
    /// The snapshot's folder, or the name of one where snapshots are kept.
    pub(crate) snapshot: PathBuf,
    /// Name of the machine, by which the other commands find it.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Run in the background, print the machine's id and keep its output for 'harrier logs'.
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Remove a detached machine when it ends, with its output.
    #[arg(long, requires = "detach")]
    pub(crate) rm: bool,
    /// Keep the input of a detached machine open, for 'harrier attach'.
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Processor: auto, kvm or soft.
    #[arg(long, default_value = "auto", value_name = "ENGINE")]
    pub(crate) engine: String,
    /// End the machine after this time; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) timeout: Option<String>,
    #[command(flatten)]
    pub(crate) files: FileFlags,
    /// Write what the guest prints on its serial console to a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
    /// How many of the snapshots that the guest takes of itself are kept; 0 lets it take none.
    #[arg(long, default_value = "1", value_name = "COUNT", allow_hyphen_values = true)]
    pub(crate) checkpoints: String,
    /// Print one JSON object on stdout, with the output in it, instead of streaming.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print on stderr how long each phase took.
    #[arg(long)]
    pub(crate) timings: bool,
    /// Run without system-call filters, for kernels that lack them and for debugging.
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// No remarks on stderr, only errors.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Log more: -v what Harrier does, -vv all details.
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Which clone of a fork it is, for `harrier fork`.
    #[arg(long, value_name = "N", hide = true)]
    pub(crate) clone_index: Option<u32>,
    /// The image that the snapshot is in, for `harrier fork`.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) image: Option<PathBuf>,
    /// The folder of a job's attempt, for workers.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) attempt: Option<PathBuf>,
    /// Where the command's stderr goes, for workers.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) stderr: Option<PathBuf>,
}

impl RestoreFlags {
    /// The run that goes on.
    pub(crate) fn into_run(self, snapshot: PathBuf) -> RunFlags {
        RunFlags {
            restore: Some(snapshot),
            clone_index: self.clone_index,
            image: self.image,
            name: self.name,
            detach: self.detach,
            interactive: self.interactive,
            rm: self.rm,
            engine: self.engine,
            cpus: "1".to_owned(),
            memory: "512M".to_owned(),
            checkpoints: self.checkpoints,
            timeout: self.timeout,
            files: self.files,
            console: self.console,
            json: self.json,
            timings: self.timings,
            no_seccomp: self.no_seccomp,
            quiet: self.quiet,
            verbose: self.verbose,
            attempt: self.attempt,
            stderr: self.stderr,
            elf_entry: "auto".to_owned(),
            ..RunFlags::default()
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ForkFlags {
    /// A machine that runs, by name or id; or a snapshot: a folder, or a name where snapshots are kept.
    #[arg(value_name = "MACHINE|SNAPSHOT")]
    pub(crate) source: String,
    /// Number of clones.
    #[arg(long, short = 'n', default_value = "1", value_name = "COUNT", allow_hyphen_values = true)]
    pub(crate) count: String,
    /// Name of the clone; several are NAME-0, NAME-1 and so on.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Keep the input of each clone open, for 'harrier attach'; without it a command that reads its input finds the end.
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Remove each clone when it ends, with its output.
    #[arg(long)]
    pub(crate) rm: bool,
    /// Processor of the clones: auto, kvm or soft.
    #[arg(long, default_value = "auto", value_name = "ENGINE")]
    pub(crate) engine: String,
    /// End each clone after this time; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) timeout: Option<String>,
    /// Print one JSON object: the clones, and how long the machine stood still for them.
    #[arg(long)]
    pub(crate) json: bool,
    /// Run the clones without system-call filters, for kernels that lack them and for debugging.
    #[arg(long)]
    pub(crate) no_seccomp: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotsCommand {
    /// List snapshots, with their parents.
    Ls(SnapshotsLsFlags),
    /// Remove snapshots that no other one needs.
    Rm(SnapshotNamesFlags),
    /// Check every checksum; damage is told by part and offset.
    Verify(SnapshotsVerifyFlags),
    /// Show everything about snapshots, as JSON.
    Inspect(SnapshotNamesFlags),
    /// Make full snapshots of differences: they need their parents no longer.
    Compact(SnapshotNamesFlags),
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotsLsFlags {
    /// The folder that the snapshots are in; the default is where they are kept.
    #[arg(value_name = "DIR")]
    pub(crate) folder: Option<PathBuf>,
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotNamesFlags {
    /// Snapshots: folders, or names where they are kept.
    #[arg(required = true, value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotsVerifyFlags {
    /// Snapshots: folders, or names where they are kept.
    #[arg(required = true, value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<PathBuf>,
    /// Print a JSON array of what is damaged.
    #[arg(long)]
    pub(crate) json: bool,
}
