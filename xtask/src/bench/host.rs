//! The machine that a run was made on, without its name.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

use super::monitors::Monitors;
use crate::process;

/// What a reader needs to know to compare figures.
#[derive(Debug, Serialize)]
pub(crate) struct Host {
    date: String,
    processor: String,
    processors: usize,
    /// The host is itself a guest.
    virtualized: bool,
    memory_mib: u64,
    kernel: String,
    distribution: String,
    guest_kernel: String,
    /// Program and version.
    versions: Vec<(String, String)>,
    /// Processes that wanted to run when the measuring began, as an average over a minute.
    load: f64,
}

impl Host {
    /// Looks around. `guest` is the folder of the guest's files.
    pub(crate) fn look(monitors: &Monitors, guest: &Path) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let manifest: Value = serde_json::from_slice(
            &fs::read(guest.join("manifest.json")).context("the guest has no manifest")?,
        )?;
        let date = process::output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
        Ok(Self {
            date: String::from_utf8_lossy(&date).trim().to_owned(),
            processor: field(&cpuinfo, "model name", ':').unwrap_or_else(|| "unknown".to_owned()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            virtualized: field(&cpuinfo, "flags", ':')
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            memory_mib: field(&meminfo, "MemTotal", ':')
                .and_then(|size| size.split(' ').next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib / 1024),
            kernel: read("/proc/sys/kernel/osrelease")
                .trim()
                .split(['-', '+'])
                .next()
                .unwrap_or("")
                .to_owned(),
            distribution: field(&read("/etc/os-release"), "PRETTY_NAME", '=')
                .map_or_else(|| "unknown".to_owned(), |name| name.trim_matches('"').to_owned()),
            guest_kernel: manifest["kernel_release"].as_str().unwrap_or("unknown").to_owned(),
            versions: monitors.versions()?,
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or_default(),
        })
    }

    /// A list for the page.
    pub(crate) fn to_markdown(&self) -> String {
        let virtualized = if self.virtualized { ", itself a virtual machine" } else { "" };
        let mut text = format!(
            "- {}, load at the start {:.1}\n- {} processors, {}{virtualized}; {} MiB of memory; Linux {}, {}\n- guest kernel {}\n",
            self.date,
            self.load,
            self.processors,
            self.processor,
            self.memory_mib,
            self.kernel,
            self.distribution,
            self.guest_kernel
        );
        for (name, version) in &self.versions {
            text.push_str(&format!("- {name}: {version}\n"));
        }
        text
    }
}

/// The value of the first line that begins with `name`.
fn field(text: &str, name: &str, separator: char) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(separator)?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_what_follows_the_separator() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC: x\n";
        assert_eq!(field(text, "model name", ':').as_deref(), Some("AMD EPYC: x"));
        assert_eq!(field(text, "flags", ':'), None);
    }
}
