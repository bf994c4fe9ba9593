//! A job written down in TOML. Every mistake names its line.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use thiserror::Error;
use toml::de::DeTable;

use super::files::{InputFile, JobLimits, OutputFile};
use super::job::JobId;
use super::spec::{Dependency, DependencyKind, JobSpec, NewJob, SpecProblem};
use crate::units::{parse_size, parse_time};

/// A mistake in a job file.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {message}")]
pub struct JobFileError {
    /// From 1.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

/// The keys of a job file; [`JobSpec`] says what they mean.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobFile {
    name: Option<String>,
    command: Option<Command>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    workdir: Option<String>,
    rootfs: Option<PathBuf>,
    stdin: Option<PathBuf>,
    #[serde(default)]
    inputs: Vec<String>,
    #[serde(default)]
    outputs: Vec<String>,
    checkpoint_exit: Option<u8>,
    user: Option<String>,
    #[serde(default)]
    isolate: bool,
    cpu_limit: Option<u32>,
    memory_limit: Option<Size>,
    process_limit: Option<u32>,
    disk_limit: Option<Size>,
    #[serde(default)]
    reuse: bool,
    cpus: Option<u32>,
    memory: Option<Size>,
    engine: Option<String>,
    cpu_model: Option<String>,
    priority: Option<i64>,
    requirements: Option<String>,
    rank: Option<String>,
    retries: Option<u32>,
    retry_delay: Option<Time>,
    timeout: Option<Time>,
    checkpoint_interval: Option<Interval>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    array: Option<Range2>,
    #[serde(default)]
    after: Vec<JobId>,
    #[serde(default)]
    after_any: Vec<JobId>,
    #[serde(default)]
    hold: bool,
}

impl JobFile {
    /// Reads a job; relative paths of files on this host start at `folder`.
    pub fn parse(text: &str, folder: &Path) -> Result<NewJob, JobFileError> {
        let file: Self = toml::from_str(text).map_err(|err| JobFileError {
            line: line_of(text, err.span()),
            message: err.message().replace('\n', " "),
        })?;
        let job = file.into_job(folder).map_err(|problem| JobFileError {
            line: line_of(text, key_span(text, problem.key)),
            message: problem.to_string(),
        })?;
        job.check().map_err(|problem| JobFileError {
            line: line_of(text, key_span(text, problem.key)),
            message: problem.to_string(),
        })?;
        Ok(job)
    }

    fn into_job(self, folder: &Path) -> Result<NewJob, SpecProblem> {
        let default = JobSpec::default();
        let workdir = self.workdir.as_deref();
        let inputs = self.inputs.iter().map(|text| InputFile::parse(text, folder, workdir));
        let inputs = inputs.collect::<Result<_, _>>();
        let outputs = self.outputs.iter().map(|text| OutputFile::parse(text, workdir));
        let outputs = outputs.collect::<Result<_, _>>();
        let limits = JobLimits {
            user: self.user,
            isolate: self.isolate,
            cpu_percent: self.cpu_limit,
            memory_bytes: self.memory_limit.map(|size| size.0),
            processes: self.process_limit.or(default.limits.processes),
            disk_bytes: self.disk_limit.map(|size| size.0),
        };
        let path = |path: PathBuf| absolute(&folder.join(path)).to_string_lossy().into_owned();
        let spec = JobSpec {
            name: self.name,
            command: self.command.map(|command| command.0).unwrap_or_default(),
            env: self.env,
            workdir: self.workdir,
            rootfs: self.rootfs.map(path),
            stdin: self.stdin.map(path),
            inputs: inputs.map_err(|message| SpecProblem { key: "inputs", message })?,
            outputs: outputs.map_err(|message| SpecProblem { key: "outputs", message })?,
            limits,
            reuse: self.reuse,
            checkpoint_exit: self.checkpoint_exit,
            cpus: self.cpus.unwrap_or(default.cpus),
            memory_bytes: self.memory.map_or(default.memory_bytes, |size| size.0),
            engine: self.engine.unwrap_or(default.engine),
            cpu_model: self.cpu_model,
            priority: self.priority.unwrap_or_default(),
            requirements: self.requirements,
            rank: self.rank,
            retries: self.retries.unwrap_or_default(),
            retry_delay_ms: self.retry_delay.map_or(default.retry_delay_ms, |time| time.0),
            timeout_ms: self.timeout.map(|time| time.0),
            checkpoint_interval_ms: self.checkpoint_interval.map(|interval| interval.0),
            labels: self.labels,
        };
        let after = [(self.after, DependencyKind::Success), (self.after_any, DependencyKind::End)];
        Ok(NewJob {
            spec,
            array: self.array.map(|range| range.0),
            after: after
                .into_iter()
                .flat_map(|(jobs, kind)| jobs.into_iter().map(move |job| Dependency { job, kind }))
                .collect(),
            hold: self.hold,
        })
    }
}

/// Without `.` and `..`, as far as that needs no look at the disk.
fn absolute(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut path, part| {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                path.pop();
            }
            part => path.push(part),
        }
        path
    })
}

fn line_of(text: &str, span: Option<Range<usize>>) -> usize {
    let at = span.map_or(0, |span| span.start).min(text.len());
    text.as_bytes().get(..at).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count() + 1
}

fn key_span(text: &str, key: &str) -> Option<Range<usize>> {
    let table = DeTable::parse(text).ok()?;
    table.get_ref().iter().find(|(name, _)| name.get_ref() == key).map(|(name, _)| name.span())
}

/// Words, or a line for the guest's shell.
#[derive(Debug)]
struct Command(Vec<String>);

impl<'de> Deserialize<'de> for Command {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "write a list of words, or one string for the guest's shell")]
        enum Form {
            Line(String),
            Words(Vec<String>),
        }
        Ok(Self(match Form::deserialize(deserializer)? {
            Form::Line(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line],
            Form::Words(words) => words,
        }))
    }
}

/// A number, or text with a unit.
#[derive(Deserialize)]
#[serde(untagged, expecting = "write a number, or text with a unit")]
enum Quantity {
    Number(u64),
    Text(String),
}

#[derive(Debug)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Quantity::deserialize(deserializer)? {
            Quantity::Number(bytes) => Ok(Self(bytes)),
            Quantity::Text(text) => parse_size(&text).map(Self).map_err(de::Error::custom),
        }
    }
}

/// In milliseconds.
#[derive(Debug)]
struct Time(u64);

/// A time span, or `never`, which is 0.
#[derive(Debug)]
struct Interval(u64);

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match Quantity::deserialize(deserializer)? {
            Quantity::Number(seconds) => Ok(Self(seconds.saturating_mul(1000))),
            Quantity::Text(text) => {
                parse_interval(&text).map(|time| Self(ms(time))).map_err(de::Error::custom)
            }
        }
    }
}

/// A time span, or `never`, which is zero.
pub fn parse_interval(text: &str) -> Result<Duration, crate::units::UnitError> {
    if text.trim() == "never" { Ok(Duration::ZERO) } else { parse_time(text) }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match Quantity::deserialize(deserializer)? {
            Quantity::Number(seconds) => Ok(Self(seconds.saturating_mul(1000))),
            Quantity::Text(text) => parse_time(&text).map(|time| Self(ms(time))).map_err(de::Error::custom),
        }
    }
}

/// `FIRST-LAST`.
#[derive(Debug)]
struct Range2((u64, u64));

impl<'de> Deserialize<'de> for Range2 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_range(&text).map(Self).map_err(de::Error::custom)
    }
}

/// Reads the indices of an array, `FIRST-LAST`.
pub fn parse_range(text: &str) -> Result<(u64, u64), String> {
    text.split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
        .ok_or_else(|| format!("'{text}' is not a range: write FIRST-LAST, like 1-10"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NewJob, JobFileError> {
        JobFile::parse(text, Path::new("/jobs"))
    }

    #[test]
    fn a_full_file_is_read() {
        let job = parse(
            r#"
            name = "count"
            command = ["sh", "-c", "echo $A"]
            env = { A = "1" }
            rootfs = "../images/./debian.img"
            cpus = 2
            memory = "1G"
            engine = "soft"
            priority = -3
            reuse = true
            requirements = "memory >= 2G"
            retries = 2
            retry_delay = "1m"
            timeout = 90
            array = "1-10"
            after = [3, 4]
            after_any = [5]
            hold = true
            [labels]
            project = "x"
            "#,
        )
        .unwrap();
        assert_eq!(job.spec.command, ["sh", "-c", "echo $A"]);
        assert_eq!(job.spec.rootfs.as_deref(), Some("/images/debian.img"));
        assert_eq!((job.spec.cpus, job.spec.memory_bytes, job.spec.priority), (2, 1 << 30, -3));
        assert_eq!((job.spec.retry_delay_ms, job.spec.timeout_ms), (60_000, Some(90_000)));
        assert!(job.spec.reuse);
        let often = parse("command = 'x'\ncheckpoint_interval = '5m'").unwrap();
        assert_eq!(often.spec.checkpoint_interval_ms, Some(300_000));
        let never = parse("command = 'x'\ncheckpoint_interval = 'never'").unwrap();
        assert_eq!(never.spec.checkpoint_interval_ms, Some(0));
        assert_eq!((job.array, job.hold, job.after.len()), (Some((1, 10)), true, 3));
        assert_eq!(job.after[2], Dependency { job: 5, kind: DependencyKind::End });
        assert_eq!(parse("command = 'exit 3'").unwrap().spec.command, ["/bin/sh", "-c", "exit 3"]);
    }

    #[test]
    fn every_mistake_names_its_line() {
        for (text, line, part) in [
            ("command = ['a']\n\ncpuz = 3\n", 3, "cpuz"),
            ("command = ['a']\ncpus = 'x'", 2, "u32"),
            ("command = ['a']\ncpus = 0", 2, "cpus: 0 is not"),
            ("\ncommand = ['a']\nmemory = '5X'\n", 3, "'5X' is not a size"),
            ("command = ['a']\n[labels]\nx = 1", 3, "string"),
            ("command = ['a'\n", 1, "array"),
            ("command = ['a']\n\nrequirements = 'memory >'", 3, "column 9"),
            ("name = 'x'", 1, "command: there is none"),
            ("command = ['a']\narray = '5'", 2, "FIRST-LAST"),
            ("command = ['a']\narray = '5-1'", 2, "is empty"),
            ("command = ['a']\ntimeout = '0s'", 2, "leaves no time"),
            ("command = ['a']\ncheckpoint_interval = '10ms'", 2, "too short"),
            ("command = 5", 1, "list of words"),
            ("command = 'a'\noutputs = ['/x']\nreuse = true", 3, "does without outputs"),
            ("command = 'a'\nreuse = true\nuser = '5'", 2, "does without limits, user or isolate"),
            (
                "command = 'a'\nreuse = true\ncheckpoint_interval = '5m'",
                2,
                "does without checkpoint_interval",
            ),
        ] {
            let err = parse(text).unwrap_err();
            assert!(err.line == line && err.message.contains(part), "{text:?}: {err}");
            assert!(!err.message.contains('\n'));
        }
    }
}
