//! `harrier worker`.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use harrier_engine::{CpuModel, Engine};
use harrier_jobs::files::Sha256Digest;
use harrier_jobs::worker::{self, Config, Policy};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::flags::{OwnerFlags, WorkerCommand, WorkerFlags};
use super::place;
use super::submit::pairs;
use crate::engines::{self, EngineChoice};
use crate::exit::Failure;
use crate::units::parse_size;

/// Memory that stays for the host when the worker decides by itself: a sixteenth.
const KEPT_SHARE: u64 = 16;

pub(super) fn run(flags: WorkerFlags) -> Result<u8, Failure> {
    match &flags.command {
        Some(WorkerCommand::Busy(owner)) => return set_busy(owner, true),
        Some(WorkerCommand::Idle(owner)) => return set_busy(owner, false),
        None => {}
    }
    let store = place::open_for_worker(&flags.place, place::lease(&flags.lease)?)?;
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    let processors = u32::try_from(processors).unwrap_or(u32::MAX);
    let memory_bytes = match &flags.memory {
        Some(text) => parse_size(text).map_err(|err| Failure::new(format!("--memory: {err}")))?,
        None => available_memory() / KEPT_SHARE * (KEPT_SHARE - 1),
    };
    for (name, value) in [("slots", flags.slots), ("cpus", flags.cpus)] {
        if value == Some(0) {
            return Err(Failure::new(format!("--{name} 0 leaves nothing for jobs: give 1 or more")));
        }
    }
    let found = engines();
    let config = Config {
        name: flags.name.unwrap_or_else(place::host_name),
        state: state(flags.state.as_deref())?,
        program: std::env::current_exe()?,
        run_flags: if flags.no_seccomp { vec![OsString::from("--no-seccomp")] } else { Vec::new() },
        slots: flags.slots.unwrap_or(processors),
        cpus: flags.cpus.unwrap_or(processors.max(flags.slots.unwrap_or(1))),
        memory_bytes,
        engines: found.iter().map(|engine| engine.name().to_owned()).collect(),
        cpu_models: models(&found),
        labels: pairs("label", &flags.label)?.into_iter().collect(),
        transfers: flags.transfers,
        warm_bytes: match flags.warm.as_str() {
            "0" => 0,
            text => parse_size(text).map_err(|err| Failure::new(format!("--warm: {err}")))?,
        },
        policy: policy(flags.policy.as_deref())?,
        drain: flags.drain,
        jobs: flags.jobs,
        die_at: flags.die_at,
    };
    let stop = Arc::new(AtomicU32::new(0));
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let handle = signals.handle();
    let counter = stop.clone();
    let listener = std::thread::spawn(move || {
        for _ in signals.forever() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let quiet = flags.quiet;
    let say = Arc::new(move |line: &str| {
        if !quiet {
            // Without stderr there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "harrier: {line}");
        }
    });
    let result = worker::run(store, &config, say, &stop);
    handle.close();
    // Nothing in it panics.
    let _ = listener.join();
    result?;
    Ok(0)
}

fn state(folder: Option<&Path>) -> Result<PathBuf, Failure> {
    Ok(match folder {
        Some(folder) => std::path::absolute(folder)?,
        None => place::state_dir()?.join("worker"),
    })
}

/// Sets or removes the owner's flag; a worker sees it at once.
fn set_busy(flags: &OwnerFlags, busy: bool) -> Result<u8, Failure> {
    let folder = state(flags.state.as_deref())?;
    let flag = worker::busy_flag(&folder);
    let done = if busy {
        std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&flag, ""))
    } else {
        match std::fs::remove_file(&flag) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    };
    done.map_err(|err| {
        Failure::new(format!("'{}' cannot be written ({err}): give another --state", flag.display()))
    })?;
    Ok(0)
}

fn policy(file: Option<&Path>) -> Result<Policy, Failure> {
    let Some(file) = file else { return Ok(Policy::default()) };
    if let Some(policy) = file.to_str().and_then(Policy::named) {
        return Ok(policy);
    }
    let name = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|err| Failure::new(format!("the policy '{name}' cannot be read ({err}): check its name")))?;
    Policy::parse(&text).map_err(|err| Failure::new(format!("the policy '{name}', {err}")))
}

/// The engines that can run here, the one that `auto` takes first.
fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<_> = [EngineChoice::Auto, EngineChoice::Kvm, EngineChoice::Soft]
        .into_iter()
        .filter_map(|choice| engines::select(choice).ok())
        .map(|selected| selected.engine)
        .collect();
    let auto = engines.first().map_or("", |engine| engine.name());
    let mut position = 0;
    engines.retain(|engine| {
        position += 1;
        position == 1 || engine.name() != auto
    });
    engines
}

/// The models that every engine here offers.
fn models(engines: &[Box<dyn Engine>]) -> Vec<String> {
    let offered = |model: &CpuModel| engines.iter().all(|engine| engine.cpu_models().contains(model));
    let all = engines.first().map(|engine| engine.cpu_models()).unwrap_or_default();
    let mut models: Vec<String> =
        all.iter().filter(|model| offered(model)).map(ToString::to_string).collect();
    if all.contains(&CpuModel::Host) && offered(&CpuModel::Host) {
        models.push(host_model(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()));
    }
    models
}

/// The host's own processor as a CPU model that no unlike host offers: what decides which instructions there are, as the
/// kernel shows it (proc_cpuinfo(5)).
fn host_model(cpuinfo: &str) -> String {
    let keys = ["vendor_id", "cpu family", "model\t", "flags"];
    let line = |key: &str| cpuinfo.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    let digest = Sha256Digest::of(keys.map(line).join("\n").as_bytes()).to_string();
    format!("host:{}", digest.chars().take(12).collect::<String>())
}

/// `MemAvailable` of /proc/meminfo, see proc_meminfo(5).
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0);
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_apart_by_what_their_processors_can_do_and_by_nothing_else() {
        let text = |speed: &str, flags: &str| {
            format!("vendor_id\t: X\ncpu family\t: 6\nmodel\t\t: 9\ncpu MHz\t: {speed}\nflags\t\t: {flags}\n")
        };
        let one = host_model(&text("1000", "sse avx"));
        assert!(one.starts_with("host:") && one.len() == 17, "{one}");
        assert_eq!(one, host_model(&text("2000", "sse avx")));
        assert_ne!(one, host_model(&text("1000", "sse avx avx2")));
    }
}
