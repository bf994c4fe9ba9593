//! The job commands as typed.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Put a command or a job file into the queue, and print the job's number.
    Submit(Box<SubmitFlags>),
    /// List the jobs that have not ended.
    Queue(QueueFlags),
    /// List the jobs that have ended, the latest first.
    History(HistoryFlags),
    /// Show everything about jobs.
    Status(JobsFlags),
    /// Copy the files that jobs have left to this host, and print their names.
    Fetch(FetchFlags),
    /// Say why jobs are where they are.
    Why(JobsFlags),
    /// Show what has happened to a job, or to all.
    Events(EventsFlags),
    /// End jobs.
    Cancel(JobsFlags),
    /// Keep jobs from running; those that run are given back first.
    Hold(JobsFlags),
    /// Undo a hold.
    Release(JobsFlags),
    /// Run jobs from their beginning again.
    Requeue(JobsFlags),
    /// Let the machines of running jobs stand still.
    Suspend(JobsFlags),
    /// Write down the state of running jobs, to which they go back if something happens.
    Checkpoint(JobsFlags),
    /// Take jobs from their hosts with their state; they go on elsewhere.
    Vacate(VacateFlags),
    /// Give jobs another priority.
    Prio(PrioFlags),
    /// List the hosts that run jobs.
    Hosts(HostsFlags),
    /// Show the queue in numbers.
    Stats(StatsFlags),
    /// Run jobs on this host.
    ///
    /// One signal lets the worker give its jobs back and end; a second ends it at once, and what it ran ends with its
    /// leases.
    Worker(Box<WorkerFlags>),
    /// Serve a queue to other hosts.
    ///
    /// Commands and workers elsewhere reach it with --queue and the address that it prints.
    Coordinator(CoordinatorFlags),
}

/// Which queue.
#[derive(Debug, Args)]
pub(crate) struct QueuePlace {
    /// The queue: a folder, or a coordinator's http://HOST:PORT, https://HOST:PORT or unix:PATH; the default is
    /// $HARRIER_QUEUE, else $XDG_STATE_HOME/harrier/queue, else ~/.local/state/harrier/queue.
    #[arg(long = "queue", value_name = "PLACE")]
    pub(crate) place: Option<String>,
    /// A file with the coordinator's token; the default is $HARRIER_TOKEN_FILE.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// PEM certificates that the coordinator's is to be signed by, instead of the usual ones; the default is
    /// $HARRIER_CA_FILE.
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
}

/// How a queue is served.
#[derive(Debug, Args)]
pub(crate) struct CoordinatorFlags {
    /// The queue's folder; the default is $HARRIER_QUEUE, else $XDG_STATE_HOME/harrier/queue, else
    /// ~/.local/state/harrier/queue.
    #[arg(long = "queue", value_name = "DIR")]
    pub(crate) folder: Option<String>,
    /// Where it listens: ADDRESS:PORT, or unix:PATH.
    #[arg(long, value_name = "PLACE", default_value = "127.0.0.1:7707")]
    pub(crate) listen: String,
    /// A file with the word that everybody has to know; needed unless it listens on this host only.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// PEM file with its certificate and those up to its authority.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's private key.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// How long a worker may be silent before others get its jobs; suffixes ms, s, m.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(crate) lease: String,
}

#[derive(Debug, Args)]
pub(crate) struct SubmitFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// A word for people.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Environment variable: NAME=VALUE, or NAME to pass this host's value. Repeatable.
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Working directory in the guest.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Root file system image; else the default guest.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) rootfs: Option<PathBuf>,
    /// A file that becomes the command's stdin; else it is empty.
    #[arg(long, value_name = "FILE")]
    pub(crate) stdin: Option<PathBuf>,
    /// A file or directory of this host that the job is given: by default in its working directory, under its own name. It is copied into
    /// the queue now. Repeatable.
    #[arg(long, value_name = "HOST[:GUEST]")]
    pub(crate) input: Vec<String>,
    /// A file that the job leaves, for 'harrier fetch'; NAME is what it is called there. Repeatable.
    #[arg(long, value_name = "GUEST[:NAME]")]
    pub(crate) output: Vec<String>,
    /// With this exit code the command says that its output files hold its state: it is started again, and given them.
    #[arg(long, value_name = "CODE", num_args = 0..=1, require_equals = true, default_missing_value = "85")]
    pub(crate) checkpoint_exit: Option<u8>,
    /// Run the command as this user: UID, UID:GID, or a name in the guest's /etc/passwd.
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Run the command in namespaces of its own.
    #[arg(long)]
    pub(crate) isolate: bool,
    /// Processor time of the command, in percent of one processor.
    #[arg(long, value_name = "PERCENT")]
    pub(crate) cpu_limit: Option<u32>,
    /// Memory of the command; suffixes K, M, G. If it needs more it is ended.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_limit: Option<String>,
    /// Processes and threads of the command; 2048 if nothing is said. If it makes more it is ended.
    #[arg(long, value_name = "N")]
    pub(crate) process_limit: Option<u32>,
    /// What fits each file system that the command can write; suffixes K, M, G.
    #[arg(long, alias = "disk", value_name = "SIZE")]
    pub(crate) disk_limit: Option<String>,
    /// It may run in a machine in which other such jobs of yours ran before, and find what they left: for many short jobs.
    #[arg(long)]
    pub(crate) reuse: bool,
    /// Number of virtual CPUs, 1 to 255.
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Guest memory; suffixes K, M, G.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// Processor: auto, kvm or soft.
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    /// CPU model: v1, v2, v3 or host.
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu_model: Option<String>,
    /// Higher goes first.
    #[arg(long, short, value_name = "N", allow_hyphen_values = true)]
    pub(crate) priority: Option<i64>,
    /// Hosts that may run it, like 'memory >= 8G && labels.room == "lab"'.
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) requirements: Option<String>,
    /// Which of these hosts it prefers: a number, higher is better, like 'memory' or 'labels.room == "lab"'.
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) rank: Option<String>,
    /// How often the command is run again if it fails.
    #[arg(long, value_name = "N")]
    pub(crate) retries: Option<u32>,
    /// The wait before the first retry, doubled each time; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME")]
    pub(crate) retry_delay: Option<String>,
    /// End it after so much running time; suffixes ms, s, m, h.
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<String>,
    /// Write its state down after so much running time each; suffixes s, m, h, or never. Else as often as is worth it.
    #[arg(long, value_name = "TIME")]
    pub(crate) checkpoint_interval: Option<String>,
    /// Start it when these jobs have succeeded. Repeatable, and ID,ID or ID-ID.
    #[arg(long, value_name = "ID")]
    pub(crate) after: Vec<String>,
    /// Start it when these jobs have ended, however that was.
    #[arg(long, value_name = "ID")]
    pub(crate) after_any: Vec<String>,
    /// One job for each number; HARRIER_ARRAY_INDEX tells them apart.
    #[arg(long, value_name = "FIRST-LAST")]
    pub(crate) array: Option<String>,
    /// A word for filters. Repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Do not start it before it is released.
    #[arg(long)]
    pub(crate) hold: bool,
    /// The same key again adds nothing, and answers with the first time's numbers.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// A job file; flags go before what it says. '-' is stdin.
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Which jobs are listed.
#[derive(Debug, Args)]
pub(crate) struct FilterFlags {
    /// Of this user.
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// In this state. Repeatable.
    #[arg(long, value_name = "STATE")]
    pub(crate) state: Vec<String>,
    /// With this label. Repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// On this host.
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// At most as many.
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct QueueFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    #[command(flatten)]
    pub(crate) filter: FilterFlags,
    /// Jobs that have ended too.
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Jobs and how they are shown.
#[derive(Debug, Args)]
pub(crate) struct JobsFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
    /// Jobs: ID, ID,ID or ID-ID.
    #[arg(required = true, value_name = "ID")]
    pub(crate) jobs: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FetchFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// The folder that they go to; with several jobs, into a folder each in it. The default is the working directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Only list them.
    #[arg(long)]
    pub(crate) list: bool,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
    /// Jobs: ID, ID,ID or ID-ID.
    #[arg(required = true, value_name = "ID")]
    pub(crate) jobs: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    #[command(flatten)]
    pub(crate) filter: FilterFlags,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Go on until the job ends; without a job, for ever.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Print one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// The job; else all.
    #[arg(value_name = "ID")]
    pub(crate) job: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VacateFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
    /// Jobs: ID, ID,ID or ID-ID. Or a host: all of its jobs.
    #[arg(required = true, value_name = "ID|HOST")]
    pub(crate) targets: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PrioFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
    /// Jobs: ID, ID,ID or ID-ID.
    #[arg(value_name = "ID")]
    pub(crate) jobs: String,
    /// Higher goes first.
    #[arg(value_name = "N", allow_negative_numbers = true)]
    pub(crate) priority: i64,
}

#[derive(Debug, Args)]
pub(crate) struct HostsFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Print one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StatsFlags {
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The owner's word to a worker.
#[derive(Debug, Subcommand)]
pub(crate) enum WorkerCommand {
    /// Say that the host is wanted: jobs stand still.
    Busy(OwnerFlags),
    /// Say that jobs may run.
    Idle(OwnerFlags),
}

#[derive(Debug, Args)]
pub(crate) struct OwnerFlags {
    /// The worker's folder, as it was given to the worker.
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct WorkerFlags {
    #[command(subcommand)]
    pub(crate) command: Option<WorkerCommand>,
    #[command(flatten)]
    pub(crate) place: QueuePlace,
    /// The worker's name, unique in the queue; else the host's name.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// A folder of its own; the default is $XDG_STATE_HOME/harrier/worker, else ~/.local/state/harrier/worker.
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Jobs at a time; else as many as there are processors.
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Processors for jobs; else all.
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory for jobs; else what is available now.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// What the owner allows: a TOML file, or 'dedicated' (the default: busy and idle decide) or 'desktop'.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// A word that requirements can ask for, as labels.NAME. Repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// End when nothing is left that can run here.
    #[arg(long)]
    pub(crate) drain: bool,
    /// End after so many jobs.
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<u64>,
    /// Checkpoints that are written, sent or fetched at a time.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) transfers: u32,
    /// Jobs begin in copies of machines that have booted; these templates take up to so much. 0 boots every machine.
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub(crate) warm: String,
    /// How long this worker may be silent before others get its jobs; suffixes ms, s, m. A coordinator decides itself.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(crate) lease: String,
    /// Kill the worker at a point of its way, for tests.
    #[arg(long, value_name = "POINT", hide = true, value_parser = harrier_jobs::worker::POINTS.to_vec())]
    pub(crate) die_at: Option<String>,
    /// Run machines without system-call filters.
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// No lines about what it does.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}
