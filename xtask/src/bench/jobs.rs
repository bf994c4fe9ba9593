//! Group `jobs`: the queue, jobs from end to end, checkpoints, and a day of owners who come and go.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::monitors::{Monitors, Sides};
use super::report::{Figure, Goal, GroupReport, Unit};
use super::statistics::Samples;
use crate::pool::Pool;
use crate::{checks, process};

/// Claims in a second that a pool of workers is to get.
const CLAIMS_GOAL: f64 = 5000.0;
/// No-op jobs of one measurement of their rate, and of their latency.
const JOBS: u64 = 24;
const SINGLE_JOBS: u64 = 20;
const LIMIT: Duration = Duration::from_secs(300);
/// What a small job is submitted with.
const SMALL: [&str; 2] = ["--memory", "128M"];
/// How long a host is taken to last without a failure, as the worker takes it.
const MEAN_LIFE_S: f64 = 6.0 * 3600.0;

/// An hour of the simulated day.
const HOUR: Duration = Duration::from_secs(2);
/// The hours in which each owner is there. The first works from nine to five with a break, the second comes and goes.
const OWNERS: [&[(u32, u32)]; 2] =
    [&[(9, 12), (13, 17)], &[(2, 3), (8, 9), (11, 12), (15, 16), (19, 21), (22, 23)]];
/// Jobs of the day, and the turns of each: about an hour and a half, or three seconds.
const DAY_JOBS: u64 = 40;
const DAY_SCRIPT: &str = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); usleep 50000; done";

fn one(value: f64) -> Samples {
    [value].into_iter().collect()
}

pub(crate) fn run(monitors: &Monitors, root: &Path, runs: u32) -> Result<GroupReport> {
    let mut figures = store(root, runs)?;
    figures.extend(no_ops(monitors, runs)?);
    figures.extend(checkpoints(monitors.harrier())?);
    figures.extend(day(monitors.harrier())?);
    Ok(GroupReport { name: "jobs", figures, remarks: Vec::new() })
}

/// The SQLite store alone.
fn store(root: &Path, runs: u32) -> Result<Vec<Figure>> {
    let mut rates: Vec<(u64, [Samples; 3])> = Vec::new();
    for _ in 0..runs {
        let mut command = checks::cargo();
        command.current_dir(root).args(["bench", "--quiet", "-p", "harrier-jobs", "--bench", "claims"]);
        let text = String::from_utf8(process::output(&mut command)?).context("the benchmark's answer")?;
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let line: Value = serde_json::from_str(line)?;
            let workers = line["workers"].as_u64().context("no workers")?;
            if !rates.iter().any(|(known, _)| *known == workers) {
                rates.push((workers, Default::default()));
            }
            let Some((_, samples)) = rates.iter_mut().find(|(known, _)| *known == workers) else { continue };
            for (key, samples) in ["claims_per_s", "synced_ends_per_s", "submitted_per_s"].iter().zip(samples)
            {
                samples.push(line[key].as_f64().with_context(|| format!("no {key}"))?);
            }
        }
    }
    let mut figures = Vec::new();
    for (workers, [claims, ends, submitted]) in rates {
        if workers == 1 {
            figures.push(Figure::new("jobs submitted in one array", Unit::PerSecond, submitted));
        }
        let who = if workers == 1 { "1 worker".to_owned() } else { format!("{workers} workers") };
        let claims = Figure::new(format!("claims, {who}"), Unit::PerSecond, claims);
        figures.push(claims.goal(Goal::AtLeast(CLAIMS_GOAL)));
        figures.push(Figure::new(format!("synced ends, {who}"), Unit::PerSecond, ends));
    }
    Ok(figures)
}

/// What was measured of jobs that do nothing.
#[derive(Default)]
struct NoOps {
    rate: Samples,
    start: Samples,
    result: Samples,
}

fn no_ops(monitors: &Monitors, runs: u32) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for way in [Way::Cold, Way::Warm, Way::Reused] {
        let mut sides: Sides<NoOps> = Sides::default();
        for _ in 0..runs {
            for side in monitors.engines() {
                let engine = side.engine().unwrap_or("auto");
                no_op_round(monitors.harrier(), engine, way, sides.of(side))?;
            }
        }
        let (soft, kvm) = (sides.soft, sides.kvm);
        let what = match way {
            Way::Cold => "a boot each",
            Way::Warm => "a warm clone each",
            Way::Reused => "machines used again",
        };
        figures.push(Figure::new(format!("no-op jobs, {what}"), Unit::PerSecond, soft.rate).kvm(kvm.rate));
        for (name, soft, kvm) in [("start", &soft.start, &kvm.start), ("result", &soft.result, &kvm.result)] {
            for (share, label) in [(0.5, "p50"), (0.99, "p99")] {
                let figure = Figure::new(
                    format!("submit to {name}, {what}, {label}"),
                    Unit::WallMs,
                    one(soft.quantile(share)),
                );
                figures.push(figure.kvm(if kvm.values().is_empty() {
                    Samples::default()
                } else {
                    one(kvm.quantile(share))
                }));
            }
        }
    }
    Ok(figures)
}

/// How machines come to their jobs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Cold,
    Warm,
    Reused,
}

fn no_op_round(harrier: &Path, engine: &str, way: Way, found: &mut NoOps) -> Result<()> {
    let pool = Pool::new(harrier)?;
    let size = if way == Way::Warm { "1G" } else { "0" };
    let _worker = pool.worker("w", &["--slots", "2", "--cpus", "2", "--quiet", "--warm", size])?;
    let mut flags = [&SMALL[..], &["--engine", engine]].concat();
    if way == Way::Reused {
        flags.push("--reuse");
    }
    // The page cache is warm, and the template there.
    pool.wait(&pool.submit(&flags, &["true"])?, LIMIT)?;
    let begin = Instant::now();
    while way == Way::Warm && !pool.path("w/warm/1/manifest.json").exists() {
        anyhow::ensure!(begin.elapsed() < LIMIT, "no template is made");
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..SINGLE_JOBS {
        let jobs = pool.submit(&flags, &["true"])?;
        pool.wait(&jobs, LIMIT)?;
        let (submitted, started, ended) = times(&pool, jobs.first().copied().unwrap_or(0))?;
        found.start.push(started - submitted);
        found.result.push(ended - submitted);
    }
    let array = format!("1-{JOBS}");
    let jobs = pool.submit(&[&flags[..], &["--array", &array]].concat(), &["true"])?;
    pool.wait(&jobs, LIMIT)?;
    let mut first = f64::MAX;
    let mut last: f64 = 0.0;
    for job in jobs {
        let (submitted, _, ended) = times(&pool, job)?;
        first = first.min(submitted);
        last = last.max(ended);
    }
    found.rate.push(JOBS as f64 / ((last - first) / 1000.0));
    Ok(())
}

/// When a job was submitted, started and ended, in milliseconds.
fn times(pool: &Pool, job: u64) -> Result<(f64, f64, f64)> {
    let status = pool.json(&["status", &job.to_string()])?;
    let time = |key: &str| status[0][key].as_f64().with_context(|| format!("job {job} has no {key}"));
    Ok((time("submitted_ms")?, time("started_ms")?, time("ended_ms")?))
}

/// What checkpoints of a job that computes cost.
fn checkpoints(harrier: &Path) -> Result<Vec<Figure>> {
    let pool = Pool::new(harrier)?;
    let worker = pool.worker("w", &["--slots", "1"])?;
    let script = "i=0; while [ $i -lt 60 ]; do seq 1 2000 | md5sum; i=$((i+1)); usleep 100000; done";
    let jobs = pool.submit(&["--checkpoint-interval", "2s"], &["sh", "-c", script])?;
    pool.wait(&jobs, LIMIT)?;
    let said = std::fs::read_to_string(&worker.log)?;
    let took: Samples = said
        .lines()
        .filter_map(|line| line.split_once(" written in "))
        .filter_map(|(_, time)| seconds(time))
        .collect();
    let status = pool.json(&["status", &jobs.first().copied().unwrap_or(0).to_string()])?;
    let stood = status[0]["attempts"][0]["times"]["checkpoint_ms"].as_f64().context("no checkpoint_ms")?;
    let count = took.values().len().max(1) as f64;
    let interval = (2.0 * took.median() * MEAN_LIFE_S).sqrt().max(60.0);
    let share = 100.0 * took.median() / interval;
    let stood_share = 100.0 * stood / count / 1000.0 / interval;
    Ok(vec![
        Figure::new("a checkpoint of 512 MiB, until it is durable", Unit::Seconds, took),
        Figure::new("the machine stands still for it", Unit::WallMs, one(stood / count)),
        Figure::new("interval that the worker chooses", Unit::Seconds, one(interval)),
        Figure::new("checkpoints, share of that interval", Unit::Percent, one(share)),
        Figure::new("standing still, share of that interval", Unit::Percent, one(stood_share)),
    ])
}

/// `1.2s` and `350.0ms`, as Rust prints durations.
fn seconds(text: &str) -> Option<f64> {
    match text.trim().strip_suffix("ms") {
        Some(ms) => ms.parse::<f64>().ok().map(|ms| ms / 1000.0),
        None => text.trim().strip_suffix('s')?.parse().ok(),
    }
}

/// A day on two hosts: with checkpoints, and with jobs that begin anew when they have to leave.
fn day(harrier: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (what, policy) in [
        ("moved with a checkpoint", "evict = 'suspended_for > 0.3s'\n"),
        ("begun anew", "evict = 'suspended_for > 0.3s'\nkill = 'evicting_for >= 0s'\n"),
    ] {
        let (goodput, done) = one_day(harrier, policy)?;
        figures.push(Figure::new(format!("a day's goodput, jobs {what}"), Unit::Percent, one(goodput)));
        figures.push(Figure::new(format!("work kept that day, jobs {what}"), Unit::Seconds, one(done)));
    }
    Ok(figures)
}

/// The share of the allocated time that was kept in per cent, and the work that was kept.
fn one_day(harrier: &Path, policy: &str) -> Result<(f64, f64)> {
    let pool = Pool::new(harrier)?;
    let file = pool.path("policy.toml");
    std::fs::write(&file, policy)?;
    let file = file.to_str().context("not UTF-8")?;
    let array = format!("1-{DAY_JOBS}");
    pool.submit(&[&SMALL[..], &["--array", &array]].concat(), &["sh", "-c", DAY_SCRIPT])?;
    let names = ["first", "second"];
    let flags = ["--policy", file, "--slots", "1", "--quiet"];
    let mut workers = names.map(|name| pool.worker(name, &flags)).into_iter().collect::<Result<Vec<_>>>()?;
    let begin = Instant::now();
    for hour in 0..24 {
        for (name, there) in names.iter().zip(OWNERS) {
            if there.iter().any(|(from, _)| *from == hour) {
                pool.owner("busy", name)?;
            }
            if there.iter().any(|(_, to)| *to == hour) {
                pool.owner("idle", name)?;
            }
        }
        let next = begin + HOUR * (hour + 1);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    // The day ends as it went: who leaves takes its state along, or does not.
    for name in names {
        pool.owner("busy", name)?;
    }
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(20) {
        let running =
            pool.json(&["queue", "--state", "running", "--state", "paused", "--state", "stopping"])?;
        if running.as_array().is_none_or(Vec::is_empty) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for worker in &mut workers {
        worker.end(Duration::from_secs(30))?;
    }
    let stats = pool.json(&["stats"])?;
    let ms = |key: &str| stats["times"][key].as_f64().with_context(|| format!("no {key}"));
    let (kept, allocated) = (ms("committed_ms")?, ms("allocated_ms")?);
    Ok((100.0 * kept / allocated.max(1.0), kept / 1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_rust_prints_them() {
        assert_eq!(seconds("1.2s"), Some(1.2));
        assert_eq!(seconds("350.0ms\n"), Some(0.35));
        assert_eq!(seconds("soon"), None);
        assert_eq!(seconds(&format!("{:.1?}", Duration::from_millis(1500))), Some(1.5));
    }
}
