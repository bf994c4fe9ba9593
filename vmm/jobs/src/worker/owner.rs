//! Looking at what the host's owner does: load, input, power, memory, and the flag that the owner sets.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::policy::Owner;

/// How often the slower things are looked at. The flag is looked at every time.
const LOOK: Duration = Duration::from_secs(1);
/// The kernel's load average of the first column decays over so many seconds (proc_loadavg(5)).
const LOAD_SECONDS: f64 = 60.0;

/// The owner's flag of a worker: a file in its folder.
pub fn busy_flag(state: &Path) -> PathBuf {
    state.join("busy")
}

/// Looks at the host again and again.
pub(super) struct OwnerWatch {
    flag: PathBuf,
    looked: Option<Instant>,
    last: Owner,
    /// What our jobs add to the load average.
    own_load: f64,
    /// Interrupts of the keyboard controller, and when their number last changed.
    key_presses: Option<(u64, Instant)>,
}

impl OwnerWatch {
    pub(super) fn new(state: &Path) -> Self {
        Self {
            flag: busy_flag(state),
            looked: None,
            last: Owner::default(),
            own_load: 0.0,
            key_presses: None,
        }
    }

    /// What the host does now. `pids` are this worker's monitors.
    pub(super) fn look(&mut self, pids: &[u32]) -> Owner {
        let now = Instant::now();
        let since = self.looked.map(|looked| now - looked);
        if since.is_none_or(|since| since >= LOOK) {
            let share = since.map_or(1.0, |since| 1.0 - (-since.as_secs_f64() / LOAD_SECONDS).exp());
            let busy_threads: usize = pids.iter().map(|pid| runnable_threads(*pid)).sum();
            self.own_load += (busy_threads as f64 - self.own_load) * share;
            self.looked = Some(now);
            self.last = self.sample(now);
        }
        Owner { busy: self.flag.exists(), running: pids.len() as f64, ..self.last }
    }

    fn sample(&mut self, now: Instant) -> Owner {
        let zoned = jiff::ZonedDateTime::now();
        let (battery, on_battery) = power(Path::new("/sys/class/power_supply"));
        Owner {
            load: (load_average().unwrap_or(0.0) - self.own_load).max(0.0),
            idle: self.input_idle(now),
            hour: f64::from(zoned.hour()) + f64::from(zoned.minute()) / 60.0,
            weekday: f64::from(zoned.weekday().to_monday_one_offset()),
            battery,
            on_battery,
            memory_free: available_memory(),
            cpus: std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64),
            ..Owner::default()
        }
    }

    /// Seconds since the last input at a terminal or keyboard; where there is neither, since the host started.
    fn input_idle(&mut self, now: Instant) -> f64 {
        let mut idle = uptime().unwrap_or(f64::MAX);
        if let Some(at) = last_terminal_input() {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() - at;
            idle = idle.min(since.max(0.0));
        }
        if let Some(count) = keyboard_interrupts(&fs::read_to_string("/proc/interrupts").unwrap_or_default())
        {
            match &mut self.key_presses {
                Some((known, at)) => {
                    if *known != count {
                        (*known, *at) = (count, now);
                    }
                    idle = idle.min((now - *at).as_secs_f64());
                }
                // The first look says nothing about when.
                None => self.key_presses = now.checked_sub(LOOK * 86_400).map(|at| (count, at)),
            }
        }
        idle
    }
}

/// The state column of every thread's stat file (proc_pid_stat(5)).
fn runnable_threads(pid: u32) -> usize {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let runs = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        text.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('R'))
    };
    tasks.flatten().map(runs).filter(|runs| *runs).count()
}

fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn uptime() -> Option<f64> {
    fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()
}

/// `MemAvailable` in bytes (proc_meminfo(5)).
fn available_memory() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: f64 =
        line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0.0);
    kib * 1024.0
}

/// When a terminal was last read from, as w(1) takes it: seconds since 1970.
fn last_terminal_input() -> Option<f64> {
    let terminals = |folder: &str, digits_after: &str| {
        let after = digits_after.to_owned();
        fs::read_dir(folder).into_iter().flatten().flatten().filter(move |entry| {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(after.as_str()));
            number
                .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    terminals("/dev/pts", "")
        .chain(terminals("/dev", "tty"))
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.atime() as f64)
        .reduce(f64::max)
}

/// The interrupts of the keyboard controller over all processors (proc_interrupts(5)).
fn keyboard_interrupts(text: &str) -> Option<u64> {
    let lines = text.lines().filter(|line| line.trim_end().ends_with("i8042"));
    lines
        .map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum())
        .reduce(|left: u64, right| left + right)
}

/// Charge and mains, as the kernel's power supply class has them.
fn power(folder: &Path) -> (Option<f64>, bool) {
    let (mut battery, mut mains, mut has_mains) = (None, false, false);
    for supply in fs::read_dir(folder).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(supply.path().join(name)).unwrap_or_default();
        match read("type").trim() {
            "Battery" if read("scope").trim() != "Device" => {
                let charge = read("capacity").trim().parse::<f64>().ok().map(|percent| percent / 100.0);
                battery = battery.or(charge);
            }
            "Mains" | "USB" => {
                has_mains = true;
                mains |= read("online").trim() == "1";
            }
            _ => {}
        }
    }
    (battery, battery.is_some() && has_mains && !mains)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_read_and_the_flag_is_seen_at_once() {
        let state = tempfile::tempdir().unwrap();
        let mut watch = OwnerWatch::new(state.path());
        let owner = watch.look(&[]);
        assert!(!owner.busy && owner.cpus >= 1.0 && owner.memory_free > 0.0 && owner.idle >= 0.0);
        assert!((0.0..24.0).contains(&owner.hour) && (1.0..=7.0).contains(&owner.weekday));
        fs::write(busy_flag(state.path()), "").unwrap();
        assert!(watch.look(&[]).busy);
    }

    #[test]
    fn batteries_and_keyboards_are_read() {
        let folder = tempfile::tempdir().unwrap();
        for (name, file, text) in [
            ("BAT0", "type", "Battery\n"),
            ("BAT0", "capacity", "42\n"),
            ("AC", "type", "Mains\n"),
            ("AC", "online", "0\n"),
        ] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join(file), text).unwrap();
        }
        assert_eq!(power(folder.path()), (Some(0.42), true));
        assert_eq!(power(Path::new("/nowhere")), (None, false));
        let text = "  0:  9  9  IO-APIC  2-edge  timer\n  1:  3  4  IO-APIC  1-edge  i8042\n 12:  1  0  IO-APIC  12-edge  i8042\n";
        assert_eq!(keyboard_interrupts(text), Some(8));
        assert_eq!(keyboard_interrupts(""), None);
        assert!(runnable_threads(std::process::id()) >= 1);
    }
}
