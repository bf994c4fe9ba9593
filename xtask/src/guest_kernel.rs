//! `cargo xtask guest-kernel`: builds the guest's Linux from source, reproducibly, into the cache.
//!
//! The configuration is a fragment over `allnoconfig` (`guest-kernel/config`); a line that Kconfig did not honour ends the
//! build. Timestamps, user, host and build number are fixed and the environment is cleared, so that the same source,
//! configuration, patches and compiler give the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Cache, Key};
use crate::kernel_source::KernelSource;
use crate::{packages, process};

/// Raise when the steps below change what they make.
const RECIPE: u32 = 1;

/// Unpacked source and objects, with room to spare.
const SPACE_NEEDED_BYTES: u64 = 3 << 30;

/// The kernel in the cache.
pub(crate) struct GuestKernel {
    /// Holds `vmlinux`, `bzImage`, `System.map`, `config` and `release`.
    pub(crate) dir: PathBuf,
    /// Hash of everything it was made from.
    pub(crate) key: String,
}

/// Builds the kernel from `named` (a folder or an archive), else from Debian's package, unless the cache has it.
pub(crate) fn build(cache: &Cache, root: &Path, named: Option<&Path>) -> Result<GuestKernel> {
    packages::require(&[packages::KERNEL_BUILD])?;
    if named.is_none() {
        packages::require(&[packages::KERNEL_SOURCE])?;
    }
    let source = KernelSource::find(named)?;
    let version = source.version()?;
    let recipe = Recipe::read(&root.join("guest-kernel"), &version.series())?;
    if !recipe.known && named.is_none() {
        bail!("Linux {} has no guest configuration: name another source with --source", version.series());
    }
    let compiler = process::output(Command::new("gcc").arg("--version").env("LC_ALL", "C"))?;
    let key = recipe
        .add_to(source.add_to(Key::new("guest-kernel", RECIPE))?)?
        .bytes("compiler", &compiler)
        .finish();
    let log = cache.root().join("guest-kernel.log");
    let mut scratch = None;
    let dir = cache.artifact("kernel", &key, |dir| {
        cache::check_free_space(dir, SPACE_NEEDED_BYTES)?;
        let tree = scratch.insert(cache.scratch("kernel")?).path().join("tree");
        source.unpack(&tree)?;
        recipe.patch(&tree)?;
        recipe.configure(&tree)?;
        process::run_with_progress(
            make(&tree).arg(format!("-j{}", parallelism())).args(["vmlinux", "bzImage"]),
            &format!("building Linux {}.{}", version.series(), version.patch),
            &log,
        )?;
        collect(&tree, dir)
    })?;
    Ok(GuestKernel { dir, key })
}

/// Moves the products out of the build tree. Symbols go into System.map only: a monitor loads less, and no section of
/// vmlinux depends on the place it was built at.
fn collect(tree: &Path, dir: &Path) -> Result<()> {
    process::run(Command::new("strip").arg("-o").arg(dir.join("vmlinux")).arg(tree.join("vmlinux")))?;
    for (from, to) in
        [("arch/x86/boot/bzImage", "bzImage"), ("System.map", "System.map"), (".config", "config")]
    {
        let from = tree.join(from);
        fs::copy(&from, dir.join(to)).map_err(|error| cache::explain(error, &from))?;
    }
    let release = process::output(make(tree).args(["-s", "kernelrelease"]))?;
    fs::write(dir.join("release"), release.trim_ascii()).map_err(|error| cache::explain(error, dir))
}

fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A make of the kernel in `tree` in which nothing of this machine shows, and nothing of the caller's environment
/// (CROSS_COMPILE, KCFLAGS, MAKEFLAGS, a jobserver of cargo's) takes part.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("-C").arg(tree).env_clear();
    for name in ["PATH", "HOME", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.envs([
        ("LC_ALL", "C"),
        ("TZ", "UTC"),
        ("ARCH", "x86_64"),
        ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
        ("KBUILD_BUILD_USER", "harrier"),
        ("KBUILD_BUILD_HOST", "harrier"),
        ("KBUILD_BUILD_VERSION", "1"),
        ("SOURCE_DATE_EPOCH", "0"),
    ]);
    command
}

/// What this repository adds to the source of one kernel series.
struct Recipe {
    series: String,
    /// Whether the series has a fragment of its own, and with it the promise that it builds.
    known: bool,
    /// The fragment that all series share, and the series' own.
    fragment: String,
    /// In order of application.
    patches: Vec<PathBuf>,
}

impl Recipe {
    /// Reads `config/x86_64.config`, `config/x86_64-<series>.config` and `patches/<series>/*.patch`.
    fn read(folder: &Path, series: &str) -> Result<Self> {
        let read =
            |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let mut fragment = read(&folder.join("config/x86_64.config"))?;
        let own = folder.join(format!("config/x86_64-{series}.config"));
        let known = own.exists();
        if known {
            fragment.push_str(&read(&own)?);
        }
        let patches = folder.join("patches").join(series);
        let patches = if patches.is_dir() { sorted_files(&patches)? } else { Vec::new() };
        Ok(Self { series: series.to_owned(), known, fragment, patches })
    }

    /// Adds settings and patches to a key. Comments and order of the settings make no other kernel.
    fn add_to(&self, mut key: Key) -> Result<Key> {
        let mut settings: Vec<_> = self.fragment.lines().filter_map(setting).collect();
        settings.sort_unstable();
        for (name, value) in settings {
            key = key.text(name, value.unwrap_or("n"));
        }
        for path in &self.patches {
            key = key.file("patch", path)?;
        }
        Ok(key)
    }

    fn patch(&self, tree: &Path) -> Result<()> {
        for path in &self.patches {
            process::run(Command::new("patch").args(["-p1", "-s", "-d"]).arg(tree).arg("-i").arg(path))
                .with_context(|| format!("{} does not apply to Linux {}", path.display(), self.series))?;
        }
        Ok(())
    }

    /// Writes the configuration and checks that Kconfig kept all of it. For a series that is not known, what it did
    /// not keep is only told.
    fn configure(&self, tree: &Path) -> Result<()> {
        let path = tree.join("harrier.config");
        fs::write(&path, &self.fragment).map_err(|error| cache::explain(error, &path))?;
        process::run(make(tree).env("KCONFIG_ALLCONFIG", &path).args(["-s", "allnoconfig"]))?;
        let dot_config = fs::read_to_string(tree.join(".config")).context("no configuration was written")?;
        let lost = lost_settings(&self.fragment, &dot_config).join(" ");
        if lost.is_empty() {
            return Ok(());
        }
        if !self.known {
            eprintln!("xtask: Linux {} does not take these options: {lost}", self.series);
            return Ok(());
        }
        bail!("Kconfig of Linux {} did not keep these lines of guest-kernel/config: {lost}", self.series)
    }
}

fn sorted_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    Ok(files)
}

/// The settings of `fragment` that do not hold in `dot_config`. An option that is off may also be absent.
fn lost_settings(fragment: &str, dot_config: &str) -> Vec<String> {
    let value_of = |name: &str| {
        dot_config
            .lines()
            .find_map(|line| line.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value))
    };
    fragment
        .lines()
        .filter_map(setting)
        .filter(|(name, wanted)| value_of(name) != *wanted)
        .map(|(name, wanted)| format!("{name}={}", wanted.unwrap_or("n")))
        .collect()
}

/// Reads a line of a configuration: `CONFIG_X=value`, or `# CONFIG_X is not set` (no value).
fn setting(line: &str) -> Option<(&str, Option<&str>)> {
    if let Some(name) = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set")) {
        return name.starts_with("CONFIG_").then_some((name, None));
    }
    let (name, value) = line.split_once('=')?;
    name.starts_with("CONFIG_").then_some((name, Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_kconfig_dropped_or_changed_is_found() {
        let fragment =
            "# why\nCONFIG_A=y\nCONFIG_B=64\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_E=\"x\"\n";
        let kept = "CONFIG_A=y\nCONFIG_B=64\n# CONFIG_C is not set\nCONFIG_E=\"x\"\n";
        assert!(lost_settings(fragment, kept).is_empty());
        let lost = lost_settings(fragment, "CONFIG_B=8\nCONFIG_C=y\nCONFIG_E=\"x\"\n");
        assert_eq!(lost, ["CONFIG_A=y", "CONFIG_B=64", "CONFIG_C=n"]);
    }

    fn repository() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel")
    }

    #[test]
    fn the_configuration_of_each_debian_release_has_no_option_twice() {
        for series in ["6.1", "6.12"] {
            let recipe = Recipe::read(&repository(), series).unwrap();
            assert!(recipe.known);
            let mut names: Vec<_> =
                recipe.fragment.lines().filter_map(setting).map(|(name, _)| name).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            assert_eq!(names.len(), count, "an option stands twice for Linux {series}");
        }
        assert!(!Recipe::read(&repository(), "5.10").unwrap().known);
    }

    #[test]
    fn comments_and_order_make_no_other_kernel_but_a_value_does() {
        let key = |fragment: &str| {
            let recipe =
                Recipe { series: "6.1".into(), known: true, fragment: fragment.into(), patches: Vec::new() };
            recipe.add_to(Key::new("r", 1)).unwrap().finish()
        };
        assert_eq!(key("# why\nCONFIG_A=y\nCONFIG_B=2\n"), key("CONFIG_B=2\n# other words\nCONFIG_A=y\n"));
        assert_ne!(key("CONFIG_A=y\n"), key("# CONFIG_A is not set\n"));
    }
}
