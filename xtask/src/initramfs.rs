//! `cargo xtask initramfs`: the guest's first file system: the agent as /init, busybox, and what a kernel's modules need.
//!
//! A plain cpio: unpacking a compressed one costs a software CPU more than reading it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Cache, Key};
use crate::cpio::Archive;
use crate::{checks, packages, process};

/// Raise when the layout below changes.
const RECIPE: u32 = 3;

/// The agent's limit, so that it stays quick to unpack and small in every guest's memory.
const AGENT_MAX_BYTES: usize = 3 << 20;

/// A loadable kernel module: its path in the guest, without a leading slash, and its contents, not compressed.
pub(crate) struct Module {
    pub(crate) path: String,
    pub(crate) contents: Vec<u8>,
}

/// An initramfs in the cache.
pub(crate) struct Initramfs {
    /// The archive.
    pub(crate) file: PathBuf,
    /// Hash of everything it was made from.
    pub(crate) key: String,
}

/// Builds the initramfs with `modules`, which the agent loads in this order, unless the cache has it.
pub(crate) fn build(cache: &Cache, root: &Path, modules: &[Module]) -> Result<Initramfs> {
    packages::require(&[packages::INITRAMFS])?;
    let agent_path = build_agent(root)?;
    let agent = fs::read(&agent_path).with_context(|| format!("cannot read {}", agent_path.display()))?;
    if agent.len() > AGENT_MAX_BYTES {
        bail!("the agent has {} bytes, more than its limit of {AGENT_MAX_BYTES}", agent.len());
    }
    check_static(&agent, "the agent")?;
    let busybox_path = packages::find_program("busybox").context("busybox is not installed")?;
    let busybox =
        fs::read(&busybox_path).with_context(|| format!("cannot read {}", busybox_path.display()))?;
    check_static(&busybox, &busybox_path.display().to_string())?;

    let mut key = Key::new("initramfs", RECIPE).bytes("agent", &agent).bytes("busybox", &busybox);
    for module in modules {
        key = key.text("module", &module.path).bytes("contents", &module.contents);
    }
    let key = key.finish();
    let dir = cache.artifact("initramfs", &key, |dir| {
        let applets = applets(&busybox_path)?;
        let archive = assemble(&agent, &busybox, &applets, modules);
        let file = dir.join("initramfs.cpio");
        fs::write(&file, archive).map_err(|error| cache::explain(error, &file))
    })?;
    Ok(Initramfs { file: dir.join("initramfs.cpio"), key })
}

/// Builds the agent: static, for any x86-64, small.
fn build_agent(root: &Path) -> Result<PathBuf> {
    build_static(root, "harrier-jobs-agent", "agent").context("cannot build the agent")
}

/// Builds the program of the package of the same name, static and for any x86-64. It has a target folder of its own,
/// because its compiler flags would make cargo rebuild everything else.
pub(crate) fn build_static(root: &Path, package: &str, profile: &str) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let target_dir = target_dir(root).join("agent");
    let cargo_home = std::env::var("CARGO_HOME")
        .or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))
        .unwrap_or_default();
    // Paths of this machine would end up in panic messages, and make the binary depend on where it was built.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        // At a fixed address: as process 1 it would relocate itself in every boot, and take copies of the pages it touches.
        "-Crelocation-model=static".to_owned(),
        "-Ctarget-cpu=x86-64".to_owned(),
        format!("--remap-path-prefix={}=harrier", root.display()),
        format!("--remap-path-prefix={cargo_home}=cargo"),
    ];
    process::run_visibly(
        checks::cargo()
            .current_dir(root)
            .args(["build", "--quiet", "--package", package, "--bin", package])
            .args(["--profile", profile, "--target", TARGET, "--target-dir"])
            .arg(&target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}")),
    )?;
    Ok(target_dir.join(TARGET).join(profile).join(package))
}

/// Cargo's target folder for this workspace.
pub(crate) fn target_dir(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// Refuses a program that needs a dynamic linker: there is none in the initramfs.
fn check_static(program: &[u8], name: &str) -> Result<()> {
    match needs_interpreter(program) {
        Some(false) => Ok(()),
        Some(true) => {
            bail!("{name} is dynamically linked, the guest needs a static one (Debian: busybox-static)")
        }
        None => bail!("{name} is not an x86-64 program"),
    }
}

/// Whether a 64-bit x86-64 ELF file names an interpreter (System V ABI, program header of type PT_INTERP).
fn needs_interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    const EM_X86_64: u16 = 62;
    let u16_at = |at: usize| elf.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes);
    let u32_at = |at: usize| elf.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes);
    let u64_at = |at: usize| elf.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes);
    if elf.get(..5)? != b"\x7fELF\x02" || u16_at(18)? != EM_X86_64 {
        return None;
    }
    let table = usize::try_from(u64_at(32)?).ok()?;
    let (entry_size, entries) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    for index in 0..entries {
        if u32_at(table.checked_add(index.checked_mul(entry_size)?)?)? == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

/// The names of busybox's commands.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>> {
    let list = process::output(Command::new(busybox).arg("--list"))?;
    let list = String::from_utf8(list).context("busybox lists its commands in an unknown way")?;
    Ok(list.lines().filter(|name| !name.is_empty() && *name != "busybox").map(str::to_owned).collect())
}

fn assemble(agent: &[u8], busybox: &[u8], applets: &[String], modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.dir("dev");
    // The kernel opens it for the agent's standard streams before anything is mounted.
    archive.char_device("dev/console", 5, 1);
    archive.file("init", 0o755, agent);
    archive.dir("bin");
    archive.file("bin/busybox", 0o755, busybox);
    for name in applets {
        archive.symlink(&format!("bin/{name}"), "busybox");
    }
    archive.symlink("bin/harrier-guest", "../init");
    archive.symlink("sbin", "bin");
    archive.dir("usr");
    archive.symlink("usr/bin", "../bin");
    archive.symlink("usr/sbin", "../bin");
    archive.dir("etc");
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    );
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
    archive.dir("root");
    if !modules.is_empty() {
        let mut made = std::collections::BTreeSet::new();
        for module in modules {
            for (end, _) in module.path.match_indices('/') {
                let parent = module.path.get(..end).unwrap_or_default();
                if made.insert(parent.to_owned()) {
                    archive.dir(parent);
                }
            }
            archive.file(&module.path, 0o644, &module.contents);
        }
        let list: String = modules.iter().map(|module| format!("/{}\n", module.path)).collect();
        archive.file("modules.list", 0o644, list.as_bytes());
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let this_test = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(needs_interpreter(&this_test), Some(true));
        let busybox = fs::read(packages::find_program("busybox").unwrap()).unwrap();
        assert_eq!(needs_interpreter(&busybox), Some(false));
        assert_eq!(needs_interpreter(b"#!/bin/sh\n"), None);
        assert_eq!(needs_interpreter(&busybox[..70]), None);
    }

    #[test]
    fn the_same_inputs_give_the_same_archive_and_modules_are_listed_in_order() {
        let module = |path: &str| Module { path: path.to_owned(), contents: vec![1, 2, 3] };
        let modules = [module("lib/modules/x/b.ko"), module("lib/modules/x/a.ko")];
        let make = || assemble(b"agent", b"busybox", &["sh".to_owned()], &modules);
        let bytes = make();
        assert_eq!(bytes, make());
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.contains("/lib/modules/x/b.ko\n/lib/modules/x/a.ko\n"));
    }
}
