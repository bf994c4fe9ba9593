//! `cargo xtask test`: everything that must hold before a change goes in.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::cache::Cache;
use crate::{bare_metal, debian_kernel, guest, packages, process, rootfs_images};

/// Packages that need other compiler flags than the workspace and are built apart.
const OTHER_WORKSPACES: &[&str] = &["guest-kernel/bare-metal/Cargo.toml", "tests/fuzz/Cargo.toml"];

/// Prepares everything that any test boots, then checks format, lints and tests.
pub(crate) fn run(cache: &Cache, root: &Path) -> Result<()> {
    let started = Instant::now();
    packages::require(&[packages::SUITES])?;
    guest::set_up(cache, root, None)?;
    bare_metal::build(cache, root)?;
    rootfs_images::build_busybox(cache)?;
    rootfs_images::build_debian(cache)?;
    debian_kernel::build(cache, root)?;

    step(root, "format", &["fmt", "--all", "--check"])?;
    for manifest in OTHER_WORKSPACES {
        step(root, "format", &["fmt", "--check", "--manifest-path", manifest])?;
    }
    step(root, "lints", &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    if has_nextest() {
        // nextest leaves examples in documentation out. Its summary is the last thing that a reader sees.
        step(root, "documentation examples", &["test", "--quiet", "--workspace", "--doc"])?;
        step(root, "tests", &["nextest", "run", "--workspace", "--no-fail-fast"])?;
    } else {
        step(root, "tests", &["test", "--quiet", "--workspace"])?;
    }
    eprintln!("xtask: every check passed, {} s", started.elapsed().as_secs());
    Ok(())
}

fn step(root: &Path, what: &str, arguments: &[&str]) -> Result<()> {
    eprintln!("xtask: checking {what}");
    process::run_visibly(cargo().current_dir(root).args(arguments))
}

fn has_nextest() -> bool {
    process::run(cargo().args(["nextest", "--version"])).is_ok()
}

/// The cargo that started this program.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
