//! `cargo xtask debian-kernel`: Debian's own cloud kernel, unmodified, ready to boot in Harrier: the bzImage, the vmlinux
//! inside it, and an initramfs with the modules that it needs to find its disks and the agent's connection.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use harrier_agent_protocol::VERSION_TAG;

use crate::bzimage;
use crate::cache::{self, Cache, Key};
use crate::guest::link_or_copy;
use crate::initramfs::{self, Module};
use crate::{packages, process};

/// Raise when the steps below change what they make.
const RECIPE: u32 = 2;

/// The package that depends on the current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// What a guest needs, in this order, before what these depend on is put in front. A kernel that has one built in needs
/// nothing; crc32c is what ext4 asks for by an algorithm's name, which no dependency shows.
const WANTED_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "squashfs",
    "overlay",
    "pvpanic_mmio",
];

/// Builds `<cache>/debian-kernel/<agent version>`.
pub(crate) fn build(cache: &Cache, root: &Path) -> Result<PathBuf> {
    packages::require(&[packages::DEBIAN_KERNEL])?;
    let (package, version) = newest_package()?;
    let key = Key::new("debian-package", RECIPE).text("package", &package).text("version", &version).finish();
    let unpacked = cache.artifact("debian-package", &key, |dir| {
        eprintln!("xtask: downloading {package} {version}");
        process::run(
            Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
                .arg(format!("{package}={version}"))
                .current_dir(dir),
        )?;
        let archive = only_file(dir, |name| name.ends_with(".deb"))?;
        process::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(dir))?;
        fs::remove_file(&archive).map_err(|error| cache::explain(error, &archive))?;
        // The package brings no modules.dep: it is made at installation.
        let (base, release) = modules_folder(dir)?;
        let depmod = packages::find_program("depmod").context("depmod is not installed (Debian: kmod)")?;
        process::run(Command::new(depmod).arg("-b").arg(&base).arg(&release))
    })?;

    let modules = modules(&unpacked)?;
    let initramfs = initramfs::build(cache, root, &modules)?;
    let key =
        Key::new("debian-kernel", RECIPE).text("package", &key).text("initramfs", &initramfs.key).finish();
    cache.artifact("debian-kernel", &key, |dir| {
        let image = only_file(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
        link_or_copy(&image, &dir.join("bzImage"))?;
        bzimage::extract(&image, &dir.join("vmlinux"))?;
        link_or_copy(&initramfs.file, &dir.join("initramfs.cpio"))
    })?;
    cache.set_link("debian-kernel", VERSION_TAG, &key)
}

/// The package that the meta package depends on, and its version.
fn newest_package() -> Result<(String, String)> {
    let show =
        || process::output(Command::new("apt-cache").args(["show", "--no-all-versions", META_PACKAGE]));
    let mut text = show().unwrap_or_default();
    if text.is_empty() && packages::running_as_root() {
        // The package lists may be missing.
        process::run(Command::new("apt-get").args(["-q", "update"]))?;
        text = show()?;
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    parse_dependency(&text).with_context(|| {
        format!("the package lists have no {META_PACKAGE}: run `apt-get update`, this needs a Debian system")
    })
}

/// Reads the line `Depends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.4-1)`.
fn parse_dependency(control: &str) -> Option<(String, String)> {
    let depends = control.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let (name, version) = depends.split(',').next()?.trim().split_once(" (= ")?;
    name.starts_with("linux-image-").then(|| (name.to_owned(), version.trim_end_matches(')').to_owned()))
}

fn only_file(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut found = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| wanted(&name.to_string_lossy())));
    match (found.next(), found.next()) {
        (Some(path), None) => Ok(path),
        _ => bail!("{} should hold exactly one file of its kind", dir.display()),
    }
}

/// Where an unpacked kernel package has `lib/modules/<release>`, and the release. Debian 13 has it under /usr.
fn modules_folder(unpacked: &Path) -> Result<(PathBuf, String)> {
    let base = [unpacked.join("usr"), unpacked.to_owned()]
        .into_iter()
        .find(|base| base.join("lib/modules").is_dir());
    let base = base.context("the kernel package has no modules")?;
    let folder = only_file(&base.join("lib/modules"), |_| true)?;
    Ok((base, folder.file_name().unwrap_or_default().to_string_lossy().into_owned()))
}

/// The modules of an unpacked kernel package, in load order and not compressed.
fn modules(unpacked: &Path) -> Result<Vec<Module>> {
    let (base, release) = modules_folder(unpacked)?;
    let folder = base.join("lib/modules").join(&release);
    let dependencies =
        fs::read_to_string(folder.join("modules.dep")).context("depmod wrote no modules.dep")?;
    let built_in =
        fs::read_to_string(folder.join("modules.builtin")).context("the package has no modules.builtin")?;
    load_order(&dependencies, &built_in, WANTED_MODULES)?
        .into_iter()
        .map(|path| {
            let contents = decompressed(&folder.join(&path))?;
            let path = path.trim_end_matches(".xz").trim_end_matches(".zst");
            Ok(Module { path: format!("lib/modules/{release}/{path}"), contents })
        })
        .collect()
}

/// The paths of `wanted` modules with everything they need in front of them. `dependencies` is a modules.dep: a module,
/// a colon, and all it needs, directly or not, the first to be loaded last.
fn load_order(dependencies: &str, built_in: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let is_built_in = |name: &str| built_in.lines().any(|path| module_name(path) == name);
    let mut order = Vec::new();
    let mut listed = BTreeSet::new();
    for name in wanted {
        let Some((path, needs)) = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == *name)
        else {
            if is_built_in(name) {
                continue;
            }
            bail!("the kernel has no module {name}");
        };
        for path in needs.split_whitespace().rev().chain([path]) {
            if listed.insert(path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// "kernel/drivers/char/hw_random/virtio-rng.ko.xz" is module virtio_rng.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => process::output(Command::new("xz").arg("-dc").arg(path)),
        Some("zst") => process::output(Command::new("zstd").arg("-qdc").arg(path)),
        _ => fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/a/virtio-rng.ko.xz: kernel/v/virtio.ko.xz kernel/v/virtio_ring.ko.xz\n\
         kernel/b/virtio_blk.ko.xz: kernel/v/virtio.ko.xz kernel/v/virtio_ring.ko.xz\n\
         kernel/v/virtio.ko.xz: kernel/v/virtio_ring.ko.xz\nkernel/v/virtio_ring.ko.xz:\n";

    #[test]
    fn a_module_comes_after_all_that_it_needs_and_once() {
        let order =
            load_order(DEPENDENCIES, "kernel/fs/ext4/ext4.ko\n", &["virtio_rng", "ext4", "virtio_blk"])
                .unwrap();
        assert_eq!(
            order,
            [
                "kernel/v/virtio_ring.ko.xz",
                "kernel/v/virtio.ko.xz",
                "kernel/a/virtio-rng.ko.xz",
                "kernel/b/virtio_blk.ko.xz"
            ]
        );
    }

    #[test]
    fn a_module_that_is_neither_there_nor_built_in_is_named() {
        let error = load_order(DEPENDENCIES, "", &["overlay"]).unwrap_err().to_string();
        assert!(error.contains("overlay"), "{error}");
    }

    #[test]
    fn the_kernel_package_is_read_from_the_meta_package() {
        let control =
            "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-5-cloud-amd64 (= 6.1.9-1)\n";
        let expected = ("linux-image-6.1.0-5-cloud-amd64".to_owned(), "6.1.9-1".to_owned());
        assert_eq!(parse_dependency(control), Some(expected));
        assert_eq!(parse_dependency("Package: x\n"), None);
    }
}
