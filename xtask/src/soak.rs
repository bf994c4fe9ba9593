//! `cargo xtask soak`: thousands of jobs while workers, machines and the coordinator are killed at random. Afterwards every
//! job has succeeded exactly once, its output is whole, and nothing is left.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::pool::{Pool, Process};

/// Steps of a job: one in ten is long enough to be written down and moved.
const STEPS: [u32; 10] = [1, 2, 3, 5, 8, 2, 3, 1, 5, 60];
/// The next misfortune waits for a job's end, but no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);
/// Which of these follow each other in one machine.
const REUSED: [usize; 3] = [1, 4, 7];
const LEASE: &str = "5s";

/// How much.
#[derive(Debug, Args)]
pub(crate) struct SoakArguments {
    /// Jobs in all
    #[arg(long, default_value_t = 2000)]
    jobs: u64,
    /// Tells one soak's misfortunes from another's
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give up after so many minutes, and check what has ended until then
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// Soak this binary of Harrier
    #[arg(long, value_name = "FILE")]
    pub(crate) harrier: Option<PathBuf>,
}

/// Marsaglia's xorshift: misfortune that can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides.max(1)
    }
}

fn script(steps: u32) -> String {
    format!(
        "s=$HARRIER_JOB_ID; i=0; while [ $i -lt {steps} ]; do s=$(echo $s $i | md5sum | cut -c1-8); i=$((i+1)); \
         echo $i $s; usleep 40000; done"
    )
}

/// What the job prints, made on this host.
fn expected(job: u64, steps: u32) -> Result<String> {
    let script = script(steps).replace("usleep 40000", ":");
    let output = Command::new("sh").args(["-c", &script]).env("HARRIER_JOB_ID", job.to_string()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

struct Soak {
    pool: Pool,
    dice: Dice,
    address: String,
    coordinator: Process,
    workers: [Process; 2],
    /// Owners that are there, and until when.
    busy: [Option<Instant>; 2],
    done: [u64; 6],
}

const MISFORTUNES: [&str; 6] = [
    "worker killed",
    "machine killed",
    "coordinator killed",
    "job vacated",
    "owner came",
    "checkpoint asked for",
];

fn name(index: usize) -> &'static str {
    if index == 0 { "near" } else { "far" }
}

fn coordinator(pool: &Pool, address: &str) -> Result<Process> {
    pool.process("coordinator", &["coordinator", "--listen", address, "--lease", LEASE])
}

/// The first worker uses the folder itself, the second the coordinator.
fn worker(pool: &Pool, address: &str, index: usize) -> Result<Process> {
    let policy = pool.path("policy.toml");
    let policy = policy.to_str().context("not UTF-8")?;
    let flags = ["--policy", policy, "--slots", "2", "--cpus", "2", "--lease", LEASE];
    let far = ["--queue", address];
    pool.worker(name(index), &[&flags[..], if index == 0 { &[] } else { &far }].concat())
}

pub(crate) fn run(harrier: &Path, arguments: &SoakArguments) -> Result<()> {
    let pool = Pool::new(harrier)?;
    std::fs::write(pool.path("policy.toml"), "evict = 'suspended_for > 1s'\n")?;
    let address = format!("unix:{}", pool.path("socket").display());
    let coordinator = coordinator(&pool, &address)?;
    let workers = [worker(&pool, &address, 0)?, worker(&pool, &address, 1)?];
    let mut soak = Soak {
        pool,
        dice: Dice(arguments.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        address,
        coordinator,
        workers,
        busy: [None, None],
        done: [0; 6],
    };
    let begin = Instant::now();
    let limit = Duration::from_secs(arguments.minutes * 60);
    let mut steps = Vec::new();
    while (steps.len() as u64) < arguments.jobs {
        let kind = STEPS.get(steps.len() % STEPS.len()).copied().unwrap_or(1);
        // Some follow each other in one machine.
        let reuse: &[&str] = if REUSED.contains(&(steps.len() % STEPS.len())) { &["--reuse"] } else { &[] };
        soak.pool.submit(&[&["--memory", "128M"][..], reuse].concat(), &["sh", "-c", &script(kind)])?;
        steps.push(kind);
    }
    let ended = soak.suffer(arguments.jobs, begin, limit)?;
    for worker in &mut soak.workers {
        worker.end(Duration::from_secs(60))?;
    }
    let misfortunes: Vec<String> =
        MISFORTUNES.iter().zip(soak.done).map(|(what, times)| format!("{what} {times} times")).collect();
    eprintln!("xtask: {}", misfortunes.join(", "));
    soak.check(&steps, ended == arguments.jobs)?;
    println!(
        "{ended} of {} jobs have ended in {:.0?}, each once and with its whole output; nothing is left",
        arguments.jobs,
        begin.elapsed()
    );
    if ended < arguments.jobs {
        bail!("{} jobs had not ended after {} minutes", arguments.jobs - ended, arguments.minutes);
    }
    Ok(())
}

impl Soak {
    /// Lets misfortunes happen until all jobs have ended; answers how many have.
    fn suffer(&mut self, jobs: u64, begin: Instant, limit: Duration) -> Result<u64> {
        let mut told = Instant::now();
        // When the last misfortune came, and how many had ended by then.
        let mut last = (Instant::now(), 0);
        let mut ended = 0;
        loop {
            std::thread::sleep(Duration::from_millis(300 + self.dice.roll(1500)));
            // On a host that has other work nothing would come to its end else.
            if ended > last.1 || last.0.elapsed() > PATIENCE {
                self.misfortune()?;
                last = (Instant::now(), ended);
            }
            let stats = self.pool.json(&["stats"])?;
            let states = stats["states"].as_array().context("no states")?;
            ended = states
                .iter()
                .filter(|pair| matches!(pair[0].as_str(), Some("succeeded" | "failed" | "cancelled")))
                .filter_map(|pair| pair[1].as_u64())
                .sum();
            if told.elapsed() > Duration::from_secs(15) {
                told = Instant::now();
                eprintln!("xtask: {ended} of {jobs} jobs after {:.0?}", begin.elapsed());
            }
            if ended == jobs || begin.elapsed() > limit {
                return Ok(ended);
            }
            // Five failures in a row are possible where so much is killed; somebody looks at it and lets it go on.
            let held = self.pool.json(&["queue", "--state", "held"])?;
            for job in held.as_array().into_iter().flatten() {
                self.pool.good(&["release", &job["id"].to_string()])?;
            }
        }
    }

    fn misfortune(&mut self) -> Result<()> {
        for (index, busy) in self.busy.iter_mut().enumerate() {
            if busy.is_some_and(|until| until < Instant::now()) {
                *busy = None;
                self.pool.owner("idle", name(index))?;
            }
        }
        let which = self.dice.roll(MISFORTUNES.len() as u64) as usize;
        let side = self.dice.roll(2) as usize;
        let running = || self.pool.json(&["queue", "--state", "running"]);
        match which {
            0 => {
                if let Some(old) = self.workers.get_mut(side) {
                    old.kill()?;
                    *old = worker(&self.pool, &self.address, side)?;
                }
            }
            1 => {
                let monitors = self.monitors();
                let chosen = self.dice.roll(monitors.len() as u64) as usize;
                if let Some(pid) = monitors.get(chosen) {
                    // It may have ended meanwhile.
                    Command::new("kill").args(["-KILL", &pid.to_string()]).output()?;
                }
            }
            2 => {
                self.coordinator.kill()?;
                self.coordinator = coordinator(&self.pool, &self.address)?;
            }
            3 | 5 => {
                let jobs = running()?;
                let jobs = jobs.as_array().map(Vec::as_slice).unwrap_or_default();
                let chosen = self.dice.roll(jobs.len() as u64) as usize;
                if let Some(job) = jobs.get(chosen) {
                    let word = if which == 3 { "vacate" } else { "checkpoint" };
                    // It may have ended meanwhile.
                    self.pool.command(&[word, &job["id"].to_string()]).output()?;
                }
            }
            _ => {
                if let Some(busy) = self.busy.get_mut(side).filter(|busy| busy.is_none()) {
                    *busy = Some(Instant::now() + Duration::from_secs(2));
                    self.pool.owner("busy", name(side))?;
                }
            }
        }
        if let Some(count) = self.done.get_mut(which) {
            *count += 1;
        }
        Ok(())
    }

    /// Monitors of this pool's jobs.
    fn monitors(&self) -> Vec<u32> {
        let root = self.pool.path("");
        let root = root.as_os_str().as_encoded_bytes();
        let is_ours = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.clone().any(|word| word == b"--attempt") && words.any(|word| word.starts_with(root))
        };
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
    }

    fn check(&self, steps: &[u32], all: bool) -> Result<()> {
        let mut wrong = Vec::new();
        let jobs = self.pool.json(&["queue", "--all"])?;
        for job in jobs.as_array().context("no jobs")? {
            let id = job["id"].as_u64().context("no number")?;
            let state = job["state"].as_str().unwrap_or_default();
            if state == "queued" || state == "held" {
                continue;
            }
            if state != "succeeded" {
                wrong.push(format!("job {id} is {state}"));
                continue;
            }
            let events = self.pool.good(&["events", &id.to_string()])?;
            let ends = events.lines().filter(|line| line.contains(" succeeded ")).count();
            let steps = usize::try_from(id).ok().and_then(|id| steps.get(id - 1)).copied().unwrap_or(0);
            if ends != 1 {
                wrong.push(format!("job {id} has ended {ends} times"));
            }
            if self.pool.good(&["logs", &id.to_string()])? != expected(id, steps)? {
                wrong.push(format!("job {id}: its output is not whole:\n{events}"));
            }
        }
        let monitors = self.monitors();
        if !monitors.is_empty() {
            wrong.push(format!("monitors are left: {monitors:?}"));
        }
        let mut empty = vec!["near/attempts", "near/machines", "far/attempts", "far/machines"];
        if all {
            empty.push("queue/checkpoints");
        }
        for folder in empty {
            let path = self.pool.path(folder);
            // Beside machines there are locks and a folder for images.
            let left: Vec<_> = std::fs::read_dir(&path)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.path().is_dir() && entry.file_name() != "images")
                .map(|entry| entry.file_name())
                .collect();
            if !left.is_empty() {
                wrong.push(format!("in {folder} there is {left:?}"));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        for worker in &self.workers {
            eprintln!("{}", std::fs::read_to_string(&worker.log).unwrap_or_default());
        }
        bail!("{} things are wrong:\n{}", wrong.len(), wrong.join("\n"))
    }
}
