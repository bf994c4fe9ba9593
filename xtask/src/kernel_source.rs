//! Finding and unpacking the source of the guest kernel: Debian's package, or an archive or folder that the user names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache::Key;
use crate::process;

/// Where Debian's linux-source packages put their archives.
const DEBIAN_FOLDER: &str = "/usr/src";

/// A kernel source tree, packed or not.
pub(crate) enum KernelSource {
    /// A tar archive with one folder in it.
    Archive(PathBuf),
    /// A folder with the kernel's Makefile.
    Folder(PathBuf),
}

/// A kernel version as its Makefile gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KernelVersion {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) patch: u32,
}

impl KernelVersion {
    /// "6.1": names the version's own configuration and patches.
    pub(crate) fn series(&self) -> String {
        format!("{}.{}", self.major, self.minor)
    }

    fn read(tree: &Path) -> Result<Self> {
        let makefile = tree.join("Makefile");
        let text = fs::read_to_string(&makefile)
            .ok()
            .with_context(|| format!("{} is not a Linux source tree: it has no Makefile", tree.display()))?;
        Self::parse(&text).with_context(|| {
            format!(
                "{} is not a Linux source tree: no VERSION, PATCHLEVEL, SUBLEVEL in its Makefile",
                tree.display()
            )
        })
    }

    fn parse(makefile: &str) -> Option<Self> {
        let value = |name: &str| {
            let line =
                makefile.lines().take(20).find(|line| line.split('=').next().map(str::trim) == Some(name))?;
            line.split_once('=')?.1.trim().parse().ok()
        };
        Some(Self { major: value("VERSION")?, minor: value("PATCHLEVEL")?, patch: value("SUBLEVEL")? })
    }
}

impl KernelSource {
    /// The source to build: `named` by the user, else the newest that Debian's packages installed.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self> {
        let Some(path) = named else {
            return installed_archive().map(Self::Archive).context(
                "no kernel source in /usr/src: install linux-source or name one with --source FOLDER|ARCHIVE",
            );
        };
        let metadata =
            fs::metadata(path).with_context(|| format!("cannot read kernel source {}", path.display()))?;
        if metadata.is_dir() {
            KernelVersion::read(path)?;
            return Ok(Self::Folder(path.to_owned()));
        }
        Ok(Self::Archive(path.to_owned()))
    }

    /// The version of the source, without unpacking more than that takes.
    pub(crate) fn version(&self) -> Result<KernelVersion> {
        match self {
            Self::Folder(path) => KernelVersion::read(path),
            Self::Archive(path) => {
                let makefile = process::output(
                    Command::new("tar")
                        .args(["--wildcards", "--no-wildcards-match-slash", "--occurrence=1", "-xOf"])
                        .arg(path)
                        .arg("*/Makefile"),
                )
                .with_context(|| format!("cannot unpack {}", path.display()))?;
                KernelVersion::parse(&String::from_utf8_lossy(&makefile)).with_context(|| {
                    format!("{} holds no Linux source: no version in its Makefile", path.display())
                })
            }
        }
    }

    /// Adds the identity of the source to a key: an archive's bytes, or the names, sizes and times of a folder's files.
    pub(crate) fn add_to(&self, key: Key) -> Result<Key> {
        match self {
            Self::Archive(path) => key.file("source archive", path),
            Self::Folder(path) => {
                let listing = process::output(
                    Command::new("find")
                        .arg(".")
                        .args(["-type", "f", "-printf", "%P %s %T@\n"])
                        .current_dir(path),
                )?;
                let mut lines: Vec<_> = listing.split(|byte| *byte == b'\n').collect();
                lines.sort_unstable();
                Ok(key.bytes("source folder", &lines.join(&b'\n')))
            }
        }
    }

    /// Unpacks or copies the source to `tree`, which must not exist yet.
    pub(crate) fn unpack(&self, tree: &Path) -> Result<()> {
        match self {
            Self::Archive(path) => {
                eprintln!("xtask: unpacking {}", path.display());
                crate::cache::make_dir(tree)?;
                process::run(
                    Command::new("tar").arg("-xf").arg(path).args(["--strip-components=1", "-C"]).arg(tree),
                )
                .with_context(|| format!("cannot unpack {}", path.display()))
            }
            Self::Folder(path) => {
                eprintln!("xtask: copying {}", path.display());
                process::run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(path).arg(tree))?;
                // The folder may hold a build of its own configuration.
                process::run(Command::new("make").arg("-C").arg(tree).args(["-s", "mrproper"]))
            }
        }
    }
}

/// The newest linux-source archive of the system.
pub(crate) fn installed_archive() -> Option<PathBuf> {
    newest_archive(Path::new(DEBIAN_FOLDER))
}

fn newest_archive(folder: &Path) -> Option<PathBuf> {
    let series = |path: &PathBuf| -> Option<(u32, u32)> {
        let name = path.file_name()?.to_str()?;
        let (major, minor) = name
            .strip_prefix("linux-source-")?
            .split_once(".tar")
            .map(|(version, _)| version)?
            .split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && series(path).is_some())
        .max_by_key(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_comes_from_the_head_of_the_makefile() {
        let version =
            KernelVersion::parse("# x\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 57\nEXTRAVERSION =\n")
                .unwrap();
        assert_eq!(version, KernelVersion { major: 6, minor: 12, patch: 57 });
        assert_eq!(version.series(), "6.12");
        assert_eq!(KernelVersion::parse("all:\n\ttrue\n"), None);
    }

    #[test]
    fn the_newest_archive_is_found_by_number_not_by_letter() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["linux-source-6.1.tar.xz", "linux-source-6.12.tar.xz", "linux-source-6.9.tar.xz", "notes.tar.xz"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(newest_archive(dir.path()).unwrap().file_name().unwrap(), "linux-source-6.12.tar.xz");
    }

    #[test]
    fn a_folder_without_a_kernel_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = KernelSource::find(Some(dir.path())).err().unwrap().to_string();
        assert!(error.contains("not a Linux source tree"), "{error}");
    }

    #[test]
    fn a_damaged_archive_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("linux.tar.xz");
        fs::write(&archive, "not an archive").unwrap();
        let source = KernelSource::find(Some(&archive)).unwrap();
        for error in [source.version().unwrap_err(), source.unpack(&dir.path().join("tree")).unwrap_err()] {
            let error = format!("{error:#}");
            assert!(error.starts_with("cannot unpack") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_version_of_an_archive_is_that_of_its_topmost_makefile() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("linux-6.1");
        fs::create_dir_all(tree.join("Documentation")).unwrap();
        fs::write(tree.join("Documentation/Makefile"), "VERSION = 9\nPATCHLEVEL = 9\nSUBLEVEL = 9\n")
            .unwrap();
        fs::write(tree.join("Makefile"), "VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 7\n").unwrap();
        let archive = dir.path().join("linux.tar.xz");
        process::run(
            Command::new("tar")
                .arg("-C")
                .arg(dir.path())
                .arg("-cJf")
                .arg(&archive)
                .args(["linux-6.1/Documentation", "linux-6.1/Makefile"]),
        )
        .unwrap();
        let source = KernelSource::find(Some(&archive)).unwrap();
        assert_eq!(source.version().unwrap(), KernelVersion { major: 6, minor: 1, patch: 7 });
        let unpacked = dir.path().join("unpacked");
        source.unpack(&unpacked).unwrap();
        assert_eq!(KernelVersion::read(&unpacked).unwrap(), source.version().unwrap());
    }

    #[test]
    fn a_changed_file_in_a_source_folder_changes_the_key() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("Makefile"), "VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 0\n").unwrap();
        let source = KernelSource::find(Some(dir.path())).unwrap();
        let key = || source.add_to(Key::new("r", 1)).unwrap().finish();
        let before = key();
        assert_eq!(before, key());
        fs::write(dir.path().join("file.c"), "int x;").unwrap();
        assert_ne!(before, key());
    }
}
