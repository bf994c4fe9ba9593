//! `cargo xtask guest-kernel`: builds the guest's Linux from source, reproducibly, into the cache.
//!
//! The configuration is a fragment over `allnoconfig` (`guest-kernel/config`); a line that Kconfig did not honour ends the
//! build. Timestamps, user, host and build number are fixed and the environment is cleared, so that the same source,
//! configuration, patches and compiler give the same bytes.
//!
//! `guest-kernel/patches/<series>` makes it call the monitor; without them the same configuration builds too, to compare.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Cache, Key};
use crate::kernel_source::KernelSource;
use crate::{packages, process};

/// Raise when the steps below change what they make.
const RECIPE: u32 = 1;

/// Where the patched source finds the headers of `guest-kernel/include`.
const HEADER_FOLDER: &str = "include/uapi/linux";

/// Unpacked source and objects, with room to spare.
const SPACE_NEEDED_BYTES: u64 = 3 << 30;

/// The kernel in the cache.
pub(crate) struct GuestKernel {
    /// Holds `vmlinux`, `bzImage`, `System.map`, `config` and `release`.
    pub(crate) dir: PathBuf,
    /// Hash of everything it was made from.
    pub(crate) key: String,
}

/// Whether a kernel is built with this repository's patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patches {
    /// All that there are for its series.
    Applied,
    /// The source as it is.
    None,
}

/// Builds the kernel from `named` (a folder or an archive), else from Debian's package, unless the cache has it.
pub(crate) fn build(
    cache: &Cache,
    root: &Path,
    named: Option<&Path>,
    patches: Patches,
) -> Result<GuestKernel> {
    packages::require(&[packages::KERNEL_BUILD])?;
    if named.is_none() {
        packages::require(&[packages::KERNEL_SOURCE])?;
    }
    let source = KernelSource::find(named)?;
    let version = source.version()?;
    let recipe = Recipe::read(&root.join("guest-kernel"), &version.series(), patches)?;
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
    /// The fragment that all series share, the series' own, and that of the patches.
    fragment: String,
    /// In order of application.
    patches: Vec<PathBuf>,
    /// Files of [`HEADER_FOLDER`] that the patched source includes.
    headers: Vec<PathBuf>,
}

impl Recipe {
    /// Reads `config/x86_64.config` and `config/x86_64-<series>.config`, and where the series has patches that are
    /// wanted, `patches/<series>/*.patch`, `config/patched.config` and `include/*.h`.
    fn read(folder: &Path, series: &str, wanted: Patches) -> Result<Self> {
        let read =
            |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let mut fragment = read(&folder.join("config/x86_64.config"))?;
        let own = folder.join(format!("config/x86_64-{series}.config"));
        let known = own.exists();
        if known {
            fragment.push_str(&read(&own)?);
        }
        let (mut patches, mut headers) = (Vec::new(), Vec::new());
        let patch_folder = folder.join("patches").join(series);
        if wanted == Patches::Applied && patch_folder.is_dir() {
            patches = sorted_files(&patch_folder, "patch")?;
            headers = sorted_files(&folder.join("include"), "h")?;
            fragment.push_str(&read(&folder.join("config/patched.config"))?);
        }
        Ok(Self { series: series.to_owned(), known, fragment, patches, headers })
    }

    /// Adds settings, patches and headers to a key. Comments and order of the settings make no other kernel, nor do
    /// comments of the headers.
    fn add_to(&self, mut key: Key) -> Result<Key> {
        let mut settings: Vec<_> = self.fragment.lines().filter_map(setting).collect();
        settings.sort_unstable();
        for (name, value) in settings {
            key = key.text(name, value.unwrap_or("n"));
        }
        for path in &self.patches {
            key = key.file("patch", path)?;
        }
        for path in &self.headers {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            key = key.text("header", &without_comments(&text));
        }
        Ok(key)
    }

    /// Applies the patches to `tree` and puts their headers into it.
    fn patch(&self, tree: &Path) -> Result<()> {
        for path in &self.patches {
            process::run(
                Command::new("patch")
                    .args(["-p1", "-s", "--forward", "--no-backup-if-mismatch", "-r", "-", "-d"])
                    .arg(tree)
                    .arg("-i")
                    .arg(path),
            )
            .with_context(|| {
                format!("{} does not apply to this source of Linux {}", path.display(), self.series)
            })?;
        }
        for path in &self.headers {
            let to = tree.join(HEADER_FOLDER).join(path.file_name().unwrap_or_default());
            fs::copy(path, &to).map_err(|error| cache::explain(error, &to))?;
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

/// The files of `folder` whose names end in `.extension`.
fn sorted_files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    Ok(files)
}

/// A C header without its comments and empty lines.
fn without_comments(header: &str) -> String {
    let mut text = String::new();
    let mut rest = header;
    while let Some((code, comment)) = rest.split_once("/*") {
        text.push_str(code);
        rest = comment.split_once("*/").map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
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

    fn recipe(fragment: &str, patches: &[PathBuf]) -> Recipe {
        Recipe {
            series: "6.1".into(),
            known: true,
            fragment: fragment.into(),
            patches: patches.into(),
            headers: Vec::new(),
        }
    }

    fn repository() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel")
    }

    #[test]
    fn the_configuration_of_each_debian_release_has_no_option_twice() {
        for series in ["6.1", "6.12"] {
            let recipe = Recipe::read(&repository(), series, Patches::Applied).unwrap();
            assert!(recipe.known && !recipe.patches.is_empty());
            let mut names: Vec<_> =
                recipe.fragment.lines().filter_map(setting).map(|(name, _)| name).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            assert_eq!(names.len(), count, "an option stands twice for Linux {series}");
        }
        assert!(!Recipe::read(&repository(), "5.10", Patches::Applied).unwrap().known);
        let plain = Recipe::read(&repository(), "6.1", Patches::None).unwrap();
        assert!(plain.patches.is_empty() && plain.headers.is_empty() && !plain.fragment.contains("HARRIER"));
    }

    #[test]
    fn comments_and_order_make_no_other_kernel_but_a_value_does() {
        let key = |fragment: &str| recipe(fragment, &[]).add_to(Key::new("r", 1)).unwrap().finish();
        assert_eq!(key("# why\nCONFIG_A=y\nCONFIG_B=2\n"), key("CONFIG_B=2\n# other words\nCONFIG_A=y\n"));
        assert_ne!(key("CONFIG_A=y\n"), key("# CONFIG_A is not set\n"));
    }

    #[test]
    fn comments_of_a_header_make_no_other_kernel_but_a_number_does() {
        let plain = without_comments(
            "/* a */\n#define A 1 /* one */\n\nstruct s {\n\t/*\n\t * x\n\t */\n\tint x;\n};\n",
        );
        assert_eq!(plain, "#define A 1\nstruct s {\nint x;\n};");
        assert_eq!(without_comments("int x; /* no end"), "int x;");
    }

    #[test]
    fn a_patch_that_does_not_apply_is_named_and_leaves_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let file = tree.join("a.c");
        fs::write(&file, "one\ntwo\nthree\n").unwrap();
        let patch = |name: &str, from: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("--- a/a.c\n+++ b/a.c\n@@ -1,3 +1,3 @@\n one\n-{from}\n+TWO\n three\n"))
                .unwrap();
            path
        };
        let (good, bad) = (patch("0001-good.patch", "two"), patch("0002-bad.patch", "2"));
        let error = recipe("", std::slice::from_ref(&bad)).patch(&tree).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("0002-bad.patch") && text.contains("Linux 6.1"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "one\ntwo\nthree\n");
        recipe("", std::slice::from_ref(&good)).patch(&tree).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "one\nTWO\nthree\n");
        assert!(recipe("", &[good]).patch(&tree).is_err(), "applied twice");
    }
}
