//! `cargo xtask rootfs-images`: root file systems for tests: a small one of busybox, as ext4 and as squashfs, and a Debian
//! with Python, as ext4.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Cache, Key};
use crate::{initramfs, packages, process};

/// Raise when the steps below change what they make.
const RECIPE: u32 = 1;

/// Compressions of squashfs that the guest kernel unpacks, each in an image of its own.
const SQUASHFS_COMPRESSIONS: &[&str] = &["gzip", "xz", "zstd", "lz4"];

/// Size of the busybox image: two megabytes of programs and room to write.
const BUSYBOX_EXT4_SIZE: &str = "16M";

/// Folders that every root has and something is mounted on.
const MOUNT_POINTS: &[&str] = &["dev", "proc", "sys", "tmp", "run"];

/// Builds `<cache>/rootfs/current` with `busybox.ext4`, and `busybox.squashfs` and `busybox-<compression>.squashfs`.
pub(crate) fn build_busybox(cache: &Cache) -> Result<PathBuf> {
    packages::require(&[packages::INITRAMFS, packages::IMAGES])?;
    let busybox = packages::find_program("busybox").context("busybox is not installed")?;
    let key = Key::new("rootfs", RECIPE).file("busybox", &busybox)?.finish();
    cache.artifact("rootfs", &key, |dir| {
        let tree = tempfile::tempdir()?;
        busybox_tree(tree.path(), &busybox)?;
        make_ext4(tree.path(), &dir.join("busybox.ext4"), BUSYBOX_EXT4_SIZE)?;
        for compression in SQUASHFS_COMPRESSIONS {
            let image = dir.join(format!("busybox-{compression}.squashfs"));
            process::run(Command::new("mksquashfs").arg(tree.path()).arg(&image).args([
                "-all-root",
                "-no-progress",
                "-quiet",
                "-noappend",
                "-comp",
                compression,
            ]))?;
        }
        let name = dir.join("busybox.squashfs");
        symlink("busybox-gzip.squashfs", &name).map_err(|error| cache::explain(error, &name))
    })?;
    cache.set_current("rootfs", &key)
}

fn busybox_tree(tree: &Path, busybox: &Path) -> Result<()> {
    let explain = |error| cache::explain(error, tree);
    for name in MOUNT_POINTS.iter().chain(&["bin", "etc", "root"]) {
        fs::create_dir(tree.join(name)).map_err(explain)?;
    }
    fs::copy(busybox, tree.join("bin/busybox")).map_err(explain)?;
    for name in initramfs::applets(busybox)? {
        symlink("busybox", tree.join("bin").join(name)).map_err(explain)?;
    }
    symlink("bin", tree.join("sbin")).map_err(explain)?;
    for (path, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/os-release", "ID=harrier-test\nPRETTY_NAME=\"busybox for Harrier's tests\"\n"),
    ] {
        fs::write(tree.join(path), text).map_err(explain)?;
    }
    Ok(())
}

/// Builds `<cache>/rootfs-debian/current` with `debian.ext4`: this system's Debian release, minimal, with python3.
pub(crate) fn build_debian(cache: &Cache) -> Result<PathBuf> {
    debian(cache, &Debian { name: "rootfs-debian", include: "python3-minimal", size: "1G" })
}

/// Builds `<cache>/rootfs-programs/current` with `debian.ext4`: the same with Python's tests, a C compiler, openssl and perl.
pub(crate) fn build_debian_programs(cache: &Cache) -> Result<PathBuf> {
    let include = format!("python3,{},gcc,libc6-dev,openssl,perl", python_tests()?);
    debian(cache, &Debian { name: "rootfs-programs", include: &include, size: "2G" })
}

/// An image of a Debian.
struct Debian<'a> {
    /// Of its folder in the cache.
    name: &'static str,
    /// Packages besides the essential ones.
    include: &'a str,
    /// Of the file system.
    size: &'static str,
}

/// The package with the test modules of this release's Python.
fn python_tests() -> Result<String> {
    let shown = process::output(Command::new("apt-cache").args(["show", "--no-all-versions", "python3"]))?;
    let shown = String::from_utf8_lossy(&shown);
    let version = shown.lines().find_map(|line| {
        let depends = line.strip_prefix("Depends: ")?;
        depends
            .split([',', ' '])
            .find_map(|word| word.strip_prefix("python").filter(|rest| rest.starts_with("3.")))
    });
    let version = version.context("apt does not say which version python3 has: run `apt-get update`")?;
    Ok(format!("libpython{version}-testsuite"))
}

fn debian(cache: &Cache, image: &Debian<'_>) -> Result<PathBuf> {
    packages::require(&[packages::IMAGES, packages::DEBOOTSTRAP])?;
    let (suite, mirror) = debian_archive()?;
    let key = Key::new(image.name, RECIPE).text("suite", &suite).finish();
    let log = cache.root().join("debootstrap.log");
    let mut scratch = None;
    cache.artifact(image.name, &key, |dir| {
        if !packages::running_as_root() {
            bail!("debootstrap needs root: run this command as root, or with `sudo -E`");
        }
        cache::check_free_space(dir, 4 << 30)?;
        let tree = scratch.insert(cache.scratch(image.name)?).path().join("tree");
        process::run_with_progress(
            Command::new(packages::find_program("debootstrap").context("debootstrap is not installed")?)
                .args(["--variant=minbase", &format!("--include={}", image.include), &suite])
                .arg(&tree)
                .arg(&mirror),
            &format!("debootstrap of {suite}"),
            &log,
        )?;
        let archives = tree.join("var/cache/apt/archives");
        fs::remove_dir_all(&archives).map_err(|error| cache::explain(error, &archives))?;
        make_ext4(&tree, &dir.join("debian.ext4"), image.size)
    })?;
    cache.set_current(image.name, &key)
}

/// The release that this system runs and the mirror that it is configured to use.
fn debian_archive() -> Result<(String, String)> {
    let os_release = fs::read_to_string("/etc/os-release").context("this system does not say what it is")?;
    let suite = os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .filter(|_| os_release.lines().any(|line| line == "ID=debian"))
        .context("the Debian image is made on Debian only")?
        .trim_matches('"')
        .to_owned();
    let targets = process::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let mirror = String::from_utf8_lossy(&targets)
        .lines()
        .find_map(|line| {
            line.split_once(' ').filter(|(codename, _)| *codename == suite).map(|(_, uri)| uri.to_owned())
        })
        .with_context(|| format!("apt has no mirror of {suite}: run `apt-get update`"))?;
    Ok((suite, mirror))
}

/// Makes an ext4 image of `size` from the files in `tree`, without mounting anything.
fn make_ext4(tree: &Path, image: &Path, size: &str) -> Result<()> {
    let mke2fs = packages::find_program("mke2fs").context("mke2fs is not installed (Debian: e2fsprogs)")?;
    process::run(
        Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
            .arg(tree)
            .arg(image)
            .arg(size),
    )
}
