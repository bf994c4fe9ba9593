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
use crate::kernel_source::{self, KernelSource, KernelVersion};
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
    let recipe = Recipe::read(&root.join("guest-kernel"))?;
    let compiler = process::output(Command::new("gcc").arg("--version").env("LC_ALL", "C"))?;
    let key =
        recipe.add_to(source.add_to(Key::new("guest-kernel", RECIPE))?).bytes("compiler", &compiler).finish();
    let log = cache.root().join("guest-kernel.log");
    let dir = cache.artifact("kernel", &key, |dir| {
        cache::check_free_space(dir, SPACE_NEEDED_BYTES)?;
        let tree = dir.join("tree");
        let version = source.unpack(&tree)?;
        kernel_source::check_series(&version, named.is_some(), &recipe.known_series())?;
        recipe.patch(&tree, &version)?;
        recipe.configure(&tree, &version)?;
        process::run_with_progress(
            make(&tree).arg(format!("-j{}", parallelism())).args(["vmlinux", "bzImage"]),
            &format!("building Linux {}.{}", version.series(), version.patch),
            &log,
        )?;
        collect(&tree, dir)?;
        fs::remove_dir_all(&tree).map_err(|error| cache::explain(error, &tree))
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

/// What this repository adds to the source: configuration and patches, for every kernel series it knows.
struct Recipe {
    /// The fragment that all series share.
    common: String,
    /// Name of a series, its own fragment, its patches in order of application.
    series: Vec<(String, String, Vec<PathBuf>)>,
}

impl Recipe {
    /// Reads `config/x86_64.config`, `config/x86_64-<series>.config` and `patches/<series>/*.patch`.
    fn read(folder: &Path) -> Result<Self> {
        let config = folder.join("config");
        let read =
            |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let mut series = Vec::new();
        for path in sorted_files(&config)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(name) = name.strip_prefix("x86_64-").and_then(|name| name.strip_suffix(".config"))
            else {
                continue;
            };
            let patches = folder.join("patches").join(name);
            let patches = if patches.is_dir() { sorted_files(&patches)? } else { Vec::new() };
            series.push((name.to_owned(), read(&path)?, patches));
        }
        Ok(Self { common: read(&config.join("x86_64.config"))?, series })
    }

    fn known_series(&self) -> Vec<String> {
        self.series.iter().map(|(name, ..)| name.clone()).collect()
    }

    /// The version is known only once the source is unpacked, so the key covers every series.
    fn add_to(&self, mut key: Key) -> Key {
        key = key.text("configuration", &self.common);
        for (name, config, patches) in &self.series {
            key = key.text("series", name).text("its configuration", config);
            for path in patches {
                key = key.bytes("patch", &fs::read(path).unwrap_or_default());
            }
        }
        key
    }

    fn patch(&self, tree: &Path, version: &KernelVersion) -> Result<()> {
        let series = version.series();
        for (_, _, patches) in self.series.iter().filter(|(name, ..)| *name == series) {
            for path in patches {
                process::run(Command::new("patch").args(["-p1", "-s", "-d"]).arg(tree).arg("-i").arg(path))
                    .with_context(|| format!("{} does not apply to Linux {series}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Writes the configuration and checks that Kconfig kept all of it. For a series that is not known, what it did
    /// not keep is only told.
    fn configure(&self, tree: &Path, version: &KernelVersion) -> Result<()> {
        let series = version.series();
        let own = self.series.iter().find(|(name, ..)| *name == series).map(|(_, config, _)| config.as_str());
        let fragment = [self.common.as_str(), own.unwrap_or_default()].join("\n");
        let path = tree.join("harrier.config");
        fs::write(&path, &fragment).map_err(|error| cache::explain(error, &path))?;
        process::run(make(tree).env("KCONFIG_ALLCONFIG", &path).args(["-s", "allnoconfig"]))?;
        let dot_config = fs::read_to_string(tree.join(".config")).context("no configuration was written")?;
        let lost = lost_settings(&fragment, &dot_config);
        if lost.is_empty() {
            return Ok(());
        }
        if own.is_none() {
            eprintln!("xtask: Linux {series} does not take these options: {}", lost.join(" "));
            return Ok(());
        }
        bail!("Kconfig of Linux {series} did not keep these lines of guest-kernel/config: {}", lost.join(" "))
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

    #[test]
    fn the_repositorys_configuration_has_no_option_twice() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel");
        let recipe = Recipe::read(&folder).unwrap();
        assert!(recipe.known_series().contains(&"6.1".to_owned()));
        for (name, own, _) in &recipe.series {
            let mut names: Vec<_> = recipe.common.lines().chain(own.lines()).filter_map(setting).collect();
            let count = names.len();
            names.sort();
            names.dedup_by_key(|(name, _)| *name);
            assert_eq!(
                names.len(),
                count,
                "an option stands twice in x86_64.config with x86_64-{name}.config"
            );
        }
    }
}
