//! `harrier run`: opens what the configuration names, builds the machine, lets the workload run in it and turns the end
//! into an exit code.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use harrier_control::{Seat, image};
use harrier_devices::virtio::rng::Rng;
use harrier_devices::virtio::vsock::{InProcess, Vsock, VsockListener};
use harrier_engine::{CpuModel, Engine};
use harrier_jobs::{AGENT_PORT, ROOT_DISK_SERIAL};
use harrier_machine::EXIT_DONE;
use harrier_machine::boot::{Boot, FileImage, Image, ImageError, InitrdError, KernelError};
use harrier_machine::snapshot::Role;
use harrier_machine::{Machine, MachineBuilder, MachineConfig, MachineEnd, RunReport, WorkingSet};

use crate::attempt::Attempt;
use crate::config::{RunConfig, Workload};
use crate::console::{ConsoleSink, ConsoleTail};
use crate::exit::{Failure, TIMED_OUT, signal_code};
use crate::flags::RunFlags;
use crate::monitor::{self, Monitor};
use crate::report::{self, RunRecord};
use crate::signals::{Interrupter, Interruption, SignalThread};
use crate::snapshots::{self, Checkpoints, KeptByHost, Snapshots};
use crate::{disks, engines, guest_files, run_command, run_console, runtime_dir, warm};

/// The context id of a guest; 0 to 2 have meanings of their own (virtio 1.2, section 5.10.4).
const GUEST_CID: u32 = 3;
/// Where those of clones begin.
const FIRST_CLONE_CID: u32 = 1 << 16;

/// A clone has a context id of its own, at random: nobody counts the clones of a host.
fn guest_cid(config: &RunConfig) -> Result<u32, Failure> {
    let is_clone = config.restore.as_ref().is_some_and(|restored| restored.restoration.role == Role::Clone);
    if !is_clone {
        return Ok(GUEST_CID);
    }
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|err| Failure::new(format!("the host gives no random numbers ({err})")))?;
    // Below the sign bit: some programs take it for a signed number.
    Ok(FIRST_CLONE_CID + u32::from_le_bytes(bytes) % (i32::MAX as u32 - FIRST_CLONE_CID))
}

/// A machine before its start, and what belongs to it.
pub(crate) struct Prepared {
    pub(crate) machine: Machine,
    pub(crate) console: ConsoleTail,
    /// Where the agent will connect, for a command.
    pub(crate) agent: Option<VsockListener>,
    /// What a snapshot keeps beside the machine.
    pub(crate) kept: Option<KeptByHost>,
}

/// What goes around with a run besides its configuration: who may end it, who is told, what is noted.
pub(crate) struct Run<'a> {
    pub(crate) interrupter: Interrupter,
    /// For a machine that others can find.
    pub(crate) monitor: Option<&'a Monitor>,
    pub(crate) record: RunRecord,
}

/// Runs what the flags say and answers the exit code.
pub(crate) fn run(flags: RunFlags, runtime_dir: Option<&Path>, started: Instant) -> Result<u8, Failure> {
    if flags.detach {
        return monitor::start_detached(flags, &runtime_dir::open(runtime_dir)?);
    }
    let seat = if flags.name.is_some() {
        Some(monitor::sit_down(&flags, &runtime_dir::open(runtime_dir)?)?)
    } else {
        None
    };
    run_in(flags, started, seat)
}

/// Runs what the flags say as the monitor of a detached machine.
pub(crate) fn run_seated(flags: RunFlags, started: Instant, seat: Seat) -> Result<u8, Failure> {
    // What it writes is the machine's log, for which remarks are not meant.
    run_in(RunFlags { json: false, quiet: true, ..flags }, started, Some(seat))
}

fn run_in(flags: RunFlags, started: Instant, seat: Option<Seat>) -> Result<u8, Failure> {
    crate::own_memory::share_between_threads();
    let json = flags.json;
    let attempt = flags.attempt.as_deref().map(Attempt::enter).transpose().inspect_err(|failure| {
        if let Some(seat) = &seat {
            seat.finish(&monitor::never_ran(failure));
        }
    })?;
    let interrupter = Interrupter::default();
    let monitor = match seat {
        Some(seat) => {
            let log_limit = crate::config::log_limit(flags.files.log_limit.as_deref())?;
            Some(Monitor::new(seat, interrupter.clone(), log_limit)?)
        }
        None => None,
    };
    if let (Some(attempt), Some(monitor)) = (&attempt, &monitor) {
        attempt.stand_by(monitor.holder());
    }
    let mut run = Run { interrupter, monitor: monitor.as_ref(), record: RunRecord::new(started) };
    let result = run_recorded(flags, &mut run);
    let record = run.record;
    if let Some(attempt) = attempt {
        attempt.finish(&record, &result);
    }
    if json {
        report::print_json(&record, &result);
    }
    if let Some(monitor) = monitor {
        monitor.finish(&result, record.has_run());
    }
    result
}

fn run_recorded(flags: RunFlags, run: &mut Run<'_>) -> Result<u8, Failure> {
    let remarks = crate::remarks_wanted(flags.quiet, flags.verbose);
    // Held until the machine is gone.
    let _image = flags.image.as_deref().map(image::Image::hold).transpose().map_err(|err| {
        Failure::new(format!("the image that the clone is made of cannot be held ({err}): fork again"))
    })?;
    let config = match flags.restore.clone() {
        Some(folder) => snapshots::restored_config(flags, &folder, remarks)?,
        None => {
            let template = flags.warm.clone();
            let config = RunConfig::from_flags(flags, |name| std::env::var_os(name), remarks)?;
            match template {
                Some(folder) => warm::from_template(config, &folder)?,
                None => config,
            }
        }
    };
    let interrupter = run.interrupter.clone();
    let signals = SignalThread::start(interrupter.clone()).map_err(|err| {
        Failure::new(format!("signals cannot be handled ({err}): raise the limit of open files"))
    })?;
    let selected = engines::select(config.engine)?;
    if let Some(reason) = &selected.reason {
        run.record.set_engine_reason(reason);
    }
    let engine = selected.engine.as_ref();
    let model = config.cpu_model.unwrap_or_else(|| engines::default_model(engine));
    run.record.describe(&config, engine.name(), model);
    if let Some(monitor) = run.monitor {
        monitor.describe(&config, engine.name(), &model.to_string());
    }
    let result = match &config.workload {
        Workload::Command(command) => run_command::run(&config, command, engine, model, run),
        Workload::Console => run_console::run(&config, engine, model, run),
    };
    crate::terminal::restore();
    drop(signals);
    if config.output.timings {
        report::print_timings(&run.record);
    }
    result
}

/// Opens every file and builds the machine.
pub(crate) fn prepare(
    config: &RunConfig,
    engine: &dyn Engine,
    model: CpuModel,
    console_stream: Option<Box<dyn Write + Send>>,
    console_input: Option<OwnedFd>,
) -> Result<Prepared, Failure> {
    let is_command = matches!(config.workload, Workload::Command(_));
    let default_files =
        if config.restore.is_none() && is_command && (config.kernel.is_none() || config.initrd.is_none()) {
            Some(guest_files::find()?)
        } else {
            None
        };
    let kernel_path = config.kernel.as_deref().or(default_files.as_ref().map(|files| files.kernel.as_path()));
    let initrd_path =
        config.initrd.as_deref().or(default_files.as_ref().map(|files| files.initramfs.as_path()));
    let kernel = kernel_path
        .map(|path| open_image(path, config.kernel.is_none()))
        .transpose()
        .map_err(KernelError::Image)?;
    let initrd = initrd_path
        .map(|path| open_image(path, config.initrd.is_none()))
        .transpose()
        .map_err(InitrdError::Image)?;
    let mut blocks = Vec::new();
    let mut kept = KeptByHost::new(config);
    if let Workload::Command(command) = &config.workload
        && let Some(path) = &command.rootfs
    {
        blocks.push(disks::open_root(path, ROOT_DISK_SERIAL)?);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let block = match &config.restore {
            Some(restored) if !disk.read_only => snapshots::open_own_disk(&restored.chain, index, disk)?,
            _ => disks::open(disk)?,
        };
        kept.keep_disk(index, &block);
        blocks.push(block);
    }

    let machine_config =
        MachineConfig { vcpu_count: config.vcpu_count, memory_bytes: config.memory_bytes, cpu_model: model };
    let mut builder = match &config.restore {
        Some(restored) => {
            let builder = MachineBuilder::restoring(engine, &restored.chain)?;
            if let Some(set) = WorkingSet::load(restored.chain.snapshot()) {
                builder.prefetch(set);
            }
            builder
        }
        None => MachineBuilder::new(engine, &machine_config)?,
    };
    builder.add_platform_devices()?;
    for block in blocks {
        builder.add_virtio(Box::new(block))?;
    }
    builder.add_virtio(Box::new(Rng::new()))?;
    let mut agent = None;
    if is_command {
        let host = InProcess::new();
        agent = Some(host.listen(AGENT_PORT)?);
        let vsock = Vsock::new(guest_cid(config)?, Box::new(host))
            .map_err(|err| Failure::new(format!("vsock device: {err}: raise the limit of open files")))?;
        builder.add_virtio(Box::new(vsock))?;
    }
    let console = ConsoleTail::default();
    let file = config.console.as_deref().map(create_console_file).transpose()?;
    let sink = ConsoleSink { file, stream: console_stream, tail: console.clone() };
    builder.add_serial(Box::new(sink), console_input)?;
    builder.add_doorbell()?;
    let machine = match (&config.restore, &kernel) {
        (Some(restored), _) => builder.restore(&restored.chain, &restored.restoration)?,
        (None, Some(kernel)) => builder.build(&Boot::Kernel {
            kernel,
            initrd: initrd.as_ref().map(|image| image as &dyn Image),
            command_line: &config.command_line,
            elf_entry: config.elf_entry,
        })?,
        (None, None) => return Err(Failure::new("no kernel: give one with --kernel")),
    };
    Ok(Prepared { machine, console, agent, kept: Some(kept) })
}

/// A file of the cache is never written to again once it is there; a user's own may be built anew while a machine runs.
fn open_image(path: &Path, is_of_cache: bool) -> Result<FileImage, ImageError> {
    if is_of_cache { FileImage::open_unchanging(path) } else { FileImage::open(path) }
}

fn create_console_file(path: &Path) -> Result<File, Failure> {
    // Opening a pipe that nobody reads would wait for ever; this way it is an error.
    let opened = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .and_then(|file| {
            let flags = rustix::fs::fcntl_getfl(&file)?;
            rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
            Ok(file)
        });
    opened.map_err(|err| {
        Failure::new(format!("--console '{}' cannot be written ({err}): give another file", path.display()))
    })
}

/// Starts the machine; the interrupter can end it from here on, --timeout does, and others can find it.
pub(crate) fn start(config: &RunConfig, prepared: &mut Prepared, run: &mut Run<'_>) -> Result<(), Failure> {
    let machine = &mut prepared.machine;
    if config.seccomp {
        crate::sandbox::enter(machine)?;
    }
    let checkpoints = Checkpoints {
        prefix: match run.monitor {
            Some(monitor) => monitor.name().to_owned(),
            None => format!("harrier-{}", std::process::id()),
        },
        // A job's are its worker's to take.
        keep: if config.attempt.is_some() { 0 } else { config.checkpoints },
    };
    // The snapshot of an image is restored once and together with the others.
    let unknown = config.restore.as_ref().filter(|restored| restored.restoration.is_parent);
    let unknown = unknown.map(|restored| Arc::clone(&restored.chain));
    let snapshots = prepared.kept.take().map(|kept| Snapshots::start(machine, kept, checkpoints, unknown));
    let snapshots = snapshots.transpose().map_err(|err| {
        Failure::new(format!("no thread for snapshots ({err}): raise the limit of processes"))
    })?;
    if !config.output.quiet
        && let Some(reason) = run.record.engine_reason.as_deref()
    {
        // A remark that nobody can read is no failure. It stands alone, and not before an error.
        let _ = writeln!(io::stderr(), "harrier: {reason}");
    }
    run.record.machine_started = Some(Instant::now());
    machine.start()?;
    let handle = machine.handle();
    let interrupter = &run.interrupter;
    interrupter.set_machine(handle.clone());
    if let (Some(monitor), Some(snapshots)) = (run.monitor, snapshots) {
        monitor.serve(handle.clone(), snapshots, config.seccomp)?;
    }
    if let Some(timeout) = config.timeout {
        // A time beyond the clock's end never comes.
        if let Some(deadline) = run.record.started.checked_add(timeout) {
            let interrupter = interrupter.clone();
            std::thread::Builder::new()
                .name("timeout".to_owned())
                .spawn(move || {
                    if handle.wait_for_end(Some(deadline)).is_none() {
                        interrupter.end(Interruption::TimedOut);
                    }
                })
                .map_err(|err| {
                    Failure::new(format!("no thread for --timeout ({err}): raise the limit of processes"))
                })?;
        }
    }
    Ok(())
}

/// The exit of a run that the owner ended.
pub(crate) fn interrupted(why: Interruption, config: &RunConfig) -> Result<u8, Failure> {
    match why {
        Interruption::TimedOut => {
            let timeout = config.timeout.unwrap_or_default();
            Err(Failure {
                code: TIMED_OUT,
                message: format!(
                    "the run was ended after {timeout:?} (--timeout): give it more time if it needs it"
                ),
            })
        }
        Interruption::Signal(signal) => Ok(signal_code(signal)),
        Interruption::GuestHung => Err(Failure::new(format!(
            "the guest hangs: its agent has given no sign of life for {:?} of its running time",
            config.hang_limit
        ))),
        Interruption::OutputClosed => Err(Failure::new(
            "stdout is closed, so the console has nowhere to go: keep the reader, or use --console FILE",
        )),
    }
}

/// The exit of a run that the guest ended by a hypercall, if it did.
pub(crate) fn guest_exit(report: &RunReport) -> Option<Result<u8, Failure>> {
    let MachineEnd::GuestExit { code, reason, .. } = report.end else { return None };
    Some(match reason {
        EXIT_DONE => Ok(code),
        _ => Err(Failure { code, message: report.end.to_string() }),
    })
}

/// The failure of a run that the guest or the monitor ended.
pub(crate) fn ended(report: &RunReport, console: &ConsoleTail) -> Failure {
    let mut message = report.end.to_string();
    let guest_failed = !matches!(report.end, MachineEnd::Failed(_) | MachineEnd::Stopped);
    if guest_failed && let Some(reason) = console.reason() {
        message = format!("{message}: its console says '{reason}'");
    }
    Failure::new(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_pipe_that_nobody_reads_is_an_error_and_not_a_wait() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let refused = create_console_file(&pipe).unwrap_err();
        assert!(refused.message.contains("cannot be written"), "{}", refused.message);
        assert!(create_console_file(&folder.path().join("file")).is_ok());
    }
}
