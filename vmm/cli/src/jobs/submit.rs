//! `harrier submit`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harrier_jobs::files;
use harrier_jobs::queue::{Dependency, DependencyKind, InputFile, JobFile, NewJob, OutputFile};
use harrier_jobs::store::Store;
use harrier_jobs::store::files::upload;
use serde_json::json;

use super::flags::SubmitFlags;
use super::{ids, place, print, print_json};
use crate::exit::Failure;
use crate::units::{parse_size, parse_time};

pub(super) fn run(flags: SubmitFlags) -> Result<u8, Failure> {
    let (job, place_flags, key, as_json) = (job(&flags)?, &flags.place, flags.key.as_deref(), flags.json);
    let store = place::open(place_flags)?;
    let mut job = job;
    put_inputs(store.as_ref(), &mut job)?;
    let ids = store.submit(&place::user(), key, &[job])?;
    if as_json {
        print_json(&json!({ "jobs": ids }))?;
    } else {
        print(&format!("{}\n", ids::show(&ids)))?;
    }
    Ok(0)
}

/// A job file, if one is named, with the flags over it.
fn job(flags: &SubmitFlags) -> Result<NewJob, Failure> {
    let mut job = match &flags.file {
        Some(file) => read_file(file)?,
        None if flags.command.is_empty() => {
            return Err(Failure::new("nothing to submit: give a command after '--', or a job file"));
        }
        None => NewJob::default(),
    };
    let spec = &mut job.spec;
    if !flags.command.is_empty() {
        spec.command = flags.command.clone();
    }
    let flag =
        |name: &'static str| move |err: &dyn std::fmt::Display| Failure::new(format!("--{name}: {err}"));
    for text in &flags.env {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let value = std::env::var(text).map_err(|_| {
                    Failure::new(format!("--env '{text}' is not set here: write {text}=VALUE"))
                })?;
                (text.clone(), value)
            }
        };
        spec.env.insert(name, value);
    }
    spec.labels.extend(pairs("label", &flags.label)?);
    let absolute = |path: &PathBuf| -> Result<String, Failure> {
        std::path::absolute(path)?
            .into_os_string()
            .into_string()
            .map_err(|path| Failure::new(format!("'{}' is not UTF-8: rename it", path.display())))
    };
    if let Some(path) = &flags.rootfs {
        spec.rootfs = Some(absolute(path)?);
    }
    if let Some(path) = &flags.stdin {
        spec.stdin = Some(absolute(path)?);
    }
    let workdir = flags.workdir.clone().or_else(|| spec.workdir.clone());
    let here = std::env::current_dir()?;
    for text in &flags.input {
        let file = InputFile::parse(text, &here, workdir.as_deref()).map_err(|err| flag("input")(&err))?;
        spec.inputs.push(file);
    }
    for text in &flags.output {
        let file = OutputFile::parse(text, workdir.as_deref()).map_err(|err| flag("output")(&err))?;
        spec.outputs.push(file);
    }
    let limits = &mut spec.limits;
    for (name, limit, text) in [
        ("memory-limit", &mut limits.memory_bytes, &flags.memory_limit),
        ("disk-limit", &mut limits.disk_bytes, &flags.disk_limit),
    ] {
        if let Some(text) = text {
            *limit = Some(parse_size(text).map_err(|err| flag(name)(&err))?);
        }
    }
    spec.reuse |= flags.reuse;
    let limits = &mut spec.limits;
    limits.isolate |= flags.isolate;
    limits.cpu_percent = flags.cpu_limit.or(limits.cpu_percent);
    limits.processes = flags.process_limit.or(limits.processes);
    if flags.user.is_some() {
        limits.user.clone_from(&flags.user);
    }
    spec.checkpoint_exit = flags.checkpoint_exit.or(spec.checkpoint_exit);
    if let Some(text) = &flags.memory {
        spec.memory_bytes = parse_size(text).map_err(|err| flag("memory")(&err))?;
    }
    if let Some(text) = &flags.retry_delay {
        spec.retry_delay_ms = milliseconds(parse_time(text).map_err(|err| flag("retry-delay")(&err))?);
    }
    if let Some(text) = &flags.timeout {
        spec.timeout_ms = Some(milliseconds(parse_time(text).map_err(|err| flag("timeout")(&err))?));
    }
    if let Some(text) = &flags.checkpoint_interval {
        let interval = harrier_jobs::queue::parse_interval(text);
        spec.checkpoint_interval_ms =
            Some(milliseconds(interval.map_err(|err| flag("checkpoint-interval")(&err))?));
    }
    replace(&mut spec.cpus, &flags.cpus);
    replace(&mut spec.priority, &flags.priority);
    replace(&mut spec.retries, &flags.retries);
    replace(&mut spec.engine, &flags.engine);
    for (old, new) in [
        (&mut spec.name, &flags.name),
        (&mut spec.workdir, &flags.workdir),
        (&mut spec.cpu_model, &flags.cpu_model),
        (&mut spec.requirements, &flags.requirements),
        (&mut spec.rank, &flags.rank),
    ] {
        if new.is_some() {
            old.clone_from(new);
        }
    }
    for (words, kind) in [(&flags.after, DependencyKind::Success), (&flags.after_any, DependencyKind::End)] {
        job.after.extend(ids::parse(words)?.into_iter().map(|job| Dependency { job, kind }));
    }
    if let Some(text) = &flags.array {
        job.array = Some(harrier_jobs::queue::parse_range(text).map_err(|err| flag("array")(&err))?);
    }
    job.hold |= flags.hold;
    expand_inputs(&mut job)?;
    job.check()?;
    Ok(job)
}

/// Names the files of every directory among the inputs, each at its place below where that is to be.
fn expand_inputs(job: &mut NewJob) -> Result<(), Failure> {
    let mut inputs = Vec::new();
    for input in std::mem::take(&mut job.spec.inputs) {
        let root = Path::new(&input.host);
        if !root.is_dir() {
            inputs.push(input);
            continue;
        }
        let before = inputs.len();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            let unreadable = |err: std::io::Error| {
                Failure::new(format!("input '{}' cannot be read ({err}): check its rights", folder.display()))
            };
            let mut entries: Vec<_> =
                std::fs::read_dir(&folder).and_then(|entries| entries.collect()).map_err(unreadable)?;
            entries.sort_by_key(std::fs::DirEntry::path);
            for entry in entries {
                let (path, kind) = (entry.path(), entry.file_type().map_err(unreadable)?);
                let within = path.strip_prefix(root).ok().and_then(Path::to_str);
                match (within, path.to_str()) {
                    _ if kind.is_dir() => folders.push(path),
                    (Some(within), Some(host)) if kind.is_file() => inputs.push(InputFile {
                        host: host.to_owned(),
                        guest: format!("{}/{within}", input.guest.trim_end_matches('/')),
                        facts: None,
                    }),
                    (None, _) | (_, None) => {
                        let name = path.display();
                        return Err(Failure::new(format!("input '{name}' is not UTF-8: rename it")));
                    }
                    _ => {
                        return Err(Failure::new(format!(
                            "input '{}' is neither a file nor a directory: remove it, or pack the directory with tar",
                            path.display()
                        )));
                    }
                }
            }
        }
        if inputs.len() == before {
            let name = root.display();
            return Err(Failure::new(format!("input '{name}' is a directory without files: leave it out")));
        }
    }
    job.spec.inputs = inputs;
    Ok(())
}

/// Copies a job's input files into the queue.
fn put_inputs(store: &dyn Store, job: &mut NewJob) -> Result<(), Failure> {
    for file in &mut job.spec.inputs {
        let path = Path::new(&file.host);
        let facts = files::facts(path).map_err(|err| Failure::new(format!("input {err}")))?;
        upload(store, path, &facts)?;
        file.facts = Some(facts);
    }
    Ok(())
}

fn replace<T: Clone>(old: &mut T, new: &Option<T>) {
    if let Some(new) = new {
        old.clone_from(new);
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Reads `NAME=VALUE` words.
pub(super) fn pairs(flag: &str, words: &[String]) -> Result<Vec<(String, String)>, Failure> {
    let pair = |word: &String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(Failure::new(format!("--{flag} '{word}' has no value: write NAME=VALUE"))),
    };
    words.iter().map(pair).collect()
}

fn read_file(file: &Path) -> Result<NewJob, Failure> {
    let name = file.display();
    let unreadable =
        |err| Failure::new(format!("the job file '{name}' cannot be read ({err}): check its name"));
    let (text, folder) = if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(unreadable)?;
        (text, std::env::current_dir()?)
    } else {
        let path = std::path::absolute(file)?;
        let text = std::fs::read_to_string(&path).map_err(unreadable)?;
        (text, path.parent().map(Path::to_owned).unwrap_or_default())
    };
    JobFile::parse(&text, &folder).map_err(|err| Failure::new(format!("the job file '{name}', {err}")))
}
