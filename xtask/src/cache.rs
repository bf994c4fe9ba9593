//! The cache of built artifacts, shared with `harrier run`.
//!
//! An artifact is a directory `<cache>/<kind>/<key>` that exists completely or not at all: it is built under a
//! temporary name, synchronised and renamed. The key is a hash of everything the artifact depends on. A lock file per
//! kind keeps two builds apart, and whoever holds it may clear away what a killed build left.
//! `guest-kernel/README.md` writes down what lies where.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use sha2::{Digest as _, Sha256};

/// Prefix of a build that has not finished. Cleared by the next build of the same kind.
const PARTIAL_PREFIX: &str = ".partial-";

/// The cache directory.
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Finds the cache: `$HARRIER_CACHE`, else `$XDG_CACHE_HOME/harrier`, else `$HOME/.cache/harrier`.
    pub(crate) fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = set("HARRIER_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("harrier")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/harrier")))
            .ok_or_else(|| anyhow!("no place for the cache: set HARRIER_CACHE to a directory"))?;
        Self::at(root)
    }

    /// Uses `root`, which is made if it does not exist.
    pub(crate) fn at(root: PathBuf) -> Result<Self> {
        let root = std::path::absolute(root)?;
        make_dir(&root)?;
        Ok(Self { root })
    }

    /// The directory itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the artifact `kind`/`key`, calling `build` with an empty directory to fill if it is not there yet.
    pub(crate) fn artifact(
        &self,
        kind: &str,
        key: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let folder = self.root.join(kind);
        let artifact = folder.join(key);
        if artifact.is_dir() {
            return Ok(artifact);
        }
        make_dir(&folder)?;
        let _lock = lock(&folder.join(".lock"), kind)?;
        if artifact.is_dir() {
            return Ok(artifact);
        }
        remove_partial_builds(&folder);
        let partial = self.scratch(kind)?;
        build(partial.path())?;
        sync_files(partial.path()).map_err(|error| explain(error, partial.path()))?;
        // From here on the directory is no longer temporary: it has its final name or stays as a partial build.
        let partial = partial.keep();
        set_mode_755(&partial)?;
        fs::rename(&partial, &artifact).map_err(|error| explain(error, &artifact))?;
        sync_dir(&folder).map_err(|error| explain(error, &folder))?;
        Ok(artifact)
    }

    /// A scratch folder for a build of `kind`, beside its artifacts. For the holder of the kind's lock, within `artifact`.
    /// Kept until after it, so that an artifact need not wait for the removal of what it was built in.
    pub(crate) fn scratch(&self, kind: &str) -> Result<tempfile::TempDir> {
        let folder = self.root.join(kind);
        tempfile::Builder::new()
            .prefix(PARTIAL_PREFIX)
            .tempdir_in(&folder)
            .map_err(|error| explain(error, &folder))
    }

    /// Makes `<cache>/<kind>/current` lead to the artifact `key` of the same kind, replacing it in one step.
    pub(crate) fn set_current(&self, kind: &str, key: &str) -> Result<PathBuf> {
        self.set_link(kind, "current", key)
    }

    /// The same with a link of another name.
    pub(crate) fn set_link(&self, kind: &str, name: &str, key: &str) -> Result<PathBuf> {
        let folder = self.root.join(kind);
        let current = folder.join(name);
        if fs::read_link(&current).is_ok_and(|target| target == Path::new(key)) {
            return Ok(current);
        }
        let _lock = lock(&folder.join(".lock"), kind)?;
        let staging = self.scratch(kind)?;
        let link = staging.path().join(name);
        std::os::unix::fs::symlink(key, &link).map_err(|error| explain(error, &link))?;
        fs::rename(&link, &current).map_err(|error| explain(error, &current))?;
        sync_dir(&folder).map_err(|error| explain(error, &folder))?;
        Ok(current)
    }
}

/// Hashes what an artifact depends on into its key. Every part is labelled and length-prefixed, so that no two
/// different lists of parts run together into the same bytes.
pub(crate) struct Key(Sha256);

impl Key {
    /// A key of the given recipe; raise `version` when the recipe's own code changes what it makes.
    pub(crate) fn new(recipe: &str, version: u32) -> Self {
        Self(Sha256::new()).text("recipe", recipe).text("version", &version.to_string())
    }

    /// Adds bytes.
    pub(crate) fn bytes(mut self, label: &str, bytes: &[u8]) -> Self {
        for part in [label.as_bytes(), bytes] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds text.
    pub(crate) fn text(self, label: &str, text: &str) -> Self {
        self.bytes(label, text.as_bytes())
    }

    /// Adds the contents of a file.
    pub(crate) fn file(self, label: &str, path: &Path) -> Result<Self> {
        let digest = digest_file(path)?;
        Ok(self.bytes(label, &digest))
    }

    /// The key: 24 hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        self.0.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect()
    }
}

fn digest_file(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        let Some(read) = buffer.get(..n).filter(|read| !read.is_empty()) else { break };
        hash.update(read);
    }
    Ok(hash.finalize().to_vec())
}

/// Waits for the exclusive lock on `path`. The lock ends with the returned file, also when the process is killed.
fn lock(path: &Path, kind: &str) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|error| explain(error, path))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(fs::TryLockError::WouldBlock) => {}
        Err(fs::TryLockError::Error(error)) => return Err(explain(error, path)),
    }
    eprintln!("xtask: waiting for another build of {kind}");
    file.lock().map_err(|error| explain(error, path))?;
    Ok(file)
}

/// Removes what killed builds left. Only for the holder of the lock. What cannot be removed costs space, nothing else.
fn remove_partial_builds(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PARTIAL_PREFIX) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn sync_files(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A temporary directory is private to its maker; an artifact may be read by anyone who can reach the cache.
fn set_mode_755(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(|error| explain(error, dir))
}

/// Makes a directory with its parents.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| explain(error, path))
}

/// Checks that the file system of `dir` has `needed_bytes` free.
pub(crate) fn check_free_space(dir: &Path, needed_bytes: u64) -> Result<()> {
    let output = std::process::Command::new("df").arg("-Pk").arg(dir).env("LC_ALL", "C").output();
    let Ok(output) = output else { return Ok(()) };
    let text = String::from_utf8_lossy(&output.stdout);
    let available_kib =
        text.lines().nth(1).and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    match available_kib {
        Some(kib) if kib.saturating_mul(1024) < needed_bytes => bail!(
            "{} has {} MiB free and {} MiB are needed: free some space or set HARRIER_CACHE to another file system",
            dir.display(),
            kib / 1024,
            needed_bytes >> 20
        ),
        _ => Ok(()),
    }
}

/// Words for a failure to write in the cache, with the remedy.
pub(crate) fn explain(error: io::Error, path: &Path) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            anyhow!("no permission to write {path}: set HARRIER_CACHE to a directory that you may write")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            anyhow!("no space left for {path}: free some or set HARRIER_CACHE to another file system")
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            anyhow!(
                "{path} is in the way, it is not a directory: remove it or set HARRIER_CACHE to another place"
            )
        }
        _ => anyhow!("cannot write {path}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    #[test]
    fn an_artifact_is_built_once() {
        let (_dir, cache) = cache();
        let mut builds = 0;
        for _ in 0..2 {
            let path = cache
                .artifact("thing", "key", |dir| {
                    builds += 1;
                    Ok(fs::write(dir.join("file"), "made")?)
                })
                .unwrap();
            assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "made");
        }
        assert_eq!(builds, 1);
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_dir, cache) = cache();
        let result = cache.artifact("thing", "key", |dir| {
            fs::write(dir.join("file"), "half")?;
            bail!("stopped half-way")
        });
        assert_eq!(result.unwrap_err().to_string(), "stopped half-way");
        let left: Vec<_> = fs::read_dir(cache.root().join("thing"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn what_a_killed_build_left_is_cleared_by_the_next() {
        let (_dir, cache) = cache();
        let stale = cache.root().join("thing").join(format!("{PARTIAL_PREFIX}dead"));
        fs::create_dir_all(&stale).unwrap();
        cache.artifact("thing", "key", |_| Ok(())).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn two_builds_at_once_make_one_artifact() {
        let (_dir, cache) = cache();
        let builds = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    cache
                        .artifact("thing", "key", |_| {
                            builds.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn current_follows_the_last_artifact_named() {
        let (_dir, cache) = cache();
        for key in ["first", "second"] {
            let artifact = cache.artifact("thing", key, |_| Ok(())).unwrap();
            let current = cache.set_current("thing", key).unwrap();
            assert_eq!(fs::canonicalize(current).unwrap(), fs::canonicalize(artifact).unwrap());
        }
    }

    #[test]
    fn a_file_where_the_cache_should_be_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        fs::write(&path, "").unwrap();
        let error = Cache::at(path.clone()).err().unwrap().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("HARRIER_CACHE"), "{error}");
    }

    #[test]
    fn keys_differ_when_bytes_move_between_parts() {
        let key = |a: &str, b: &str| Key::new("r", 1).text("a", a).text("b", b).finish();
        assert_ne!(key("xy", "z"), key("x", "yz"));
        assert_eq!(key("xy", "z"), key("xy", "z"));
    }

    #[test]
    fn too_little_space_is_an_error_before_the_build() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_free_space(dir.path(), 1).is_ok());
        let error = check_free_space(dir.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("are needed"), "{error}");
    }
}
