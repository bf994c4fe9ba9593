//! Group `compute`: what user programs cost, beside the same programs under the peer and on the host itself.

use std::path::Path;

use anyhow::Result;

use super::monitors::{Guest, Monitors};
use super::programs::{self, Programs, Script};
use super::report::{Figure, Goal, GroupReport, Unit};
use crate::cache::Cache;
use crate::{packages, rootfs_images};

/// The loop whose rate has a goal.
const REGISTER_LOOP: &str = "register loop";

const SCRIPTS: &[Script] = &[
    Script::new(
        "busybox awk",
        "busybox awk 'BEGIN { for (i = 0; i < 150000; i++) { s += i * i % 7; a[i % 100] = s }; print s }'",
    ),
    Script::new("busybox sh, 20,000 turns", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"),
    Script::new("busybox sha256sum, 512 KiB", "busybox sha256sum data"),
    Script::new("busybox gzip, 512 KiB", "busybox gzip -c data"),
    Script::new("busybox sort, 512 KiB", "busybox sort data"),
];

/// With Debian's root on the guest's disk. The first one warms the page cache.
const DEBIAN_SCRIPTS: &[Script] = &[
    Script::on_disk("python3, start with a cold cache", "chroot /disk python3 -c pass"),
    Script::on_disk("python3, start", "chroot /disk python3 -c pass"),
    Script::on_disk(
        "python3, 200,000 turns",
        "chroot /disk python3 -c 'from functools import reduce; reduce(lambda s, i: (s * 31 + i) % 1000003, range(200000))'",
    ),
];

/// Measures.
pub(crate) fn run(
    cache: &Cache,
    monitors: &Monitors,
    guest: &Guest,
    root: &Path,
    runs: u32,
) -> Result<GroupReport> {
    let mut remarks: Vec<String> = monitors.kvm_remark().into_iter().collect();
    let debian = if packages::running_as_root() {
        Some(rootfs_images::build_debian(cache)?.join("debian.ext4"))
    } else {
        remarks.push("python3 was not measured: making its image needs root.".to_owned());
        None
    };
    let with_debian = debian.is_some();
    let scripts = SCRIPTS.iter().chain(DEBIAN_SCRIPTS.iter().filter(|_| with_debian)).copied().collect();
    let preparation = if with_debian { "mount -t ext4 -o ro /dev/vda /disk" } else { "" };
    let programs = Programs {
        loops: "compute",
        scripts,
        preparation,
        data: programs::text_data(),
        disk: debian,
        native: true,
    };
    let measured = programs::run(monitors, guest, root, runs, &programs)?;

    let mut figures = Vec::new();
    let mut rates: Vec<Figure> = Vec::new();
    for (name, program) in &measured {
        if program.work > 0 {
            let figure = program.figure(name, Unit::Mips, |ms| program.work as f64 / 1e3 / ms);
            rates.push(if name == REGISTER_LOOP { figure.goal(Goal::AtLeast(150.0)) } else { figure });
        }
        figures.push(program.figure(name, Unit::CpuMs, |ms| ms));
    }
    figures.extend(rates);
    Ok(GroupReport { name: "compute", figures, remarks })
}
