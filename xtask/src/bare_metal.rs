//! The bare-metal guests in the cache, for `harrier selftest`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Cache, Key};
use crate::{checks, initramfs, process};

/// Raise when the folder's layout changes.
const RECIPE: u32 = 1;

/// What the outer build was given is not meant for the guests, which have flags of their own.
const FLAGS_OF_OTHERS: &[&str] =
    &["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"];
const SETTINGS_OF_OTHERS: &[&str] = &["CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_"];

/// Builds the guests unless the cache has them, and points `<cache>/bare-metal/current` at them.
pub(crate) fn build(cache: &Cache, root: &Path) -> Result<PathBuf> {
    let source = root.join("guest-kernel/bare-metal");
    let target = initramfs::target_dir(root).join("bare-metal");
    let mut cargo = checks::cargo();
    cargo
        .current_dir(&source)
        .args(["build", "--quiet", "--release", "--locked", "--target-dir"])
        .arg(&target);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if FLAGS_OF_OTHERS.contains(&&*text)
            || SETTINGS_OF_OTHERS.iter().any(|prefix| text.starts_with(prefix))
        {
            cargo.env_remove(&name);
        }
    }
    process::run_visibly(&mut cargo).context("cannot build the bare-metal guests")?;
    let built = target.join("x86_64-unknown-linux-gnu/release");
    let names = names(&source.join("src/bin"))?;
    let mut key = Key::new("bare-metal", RECIPE);
    for name in &names {
        key = key.file(name, &built.join(name))?;
    }
    let key = key.finish();
    cache.artifact("bare-metal", &key, |dir| {
        // Not linked: cargo may write its own files again.
        names.iter().try_for_each(|name| {
            let to = dir.join(name);
            fs::copy(built.join(name), &to).map(drop).map_err(|error| cache::explain(error, &to))
        })
    })?;
    cache.set_current("bare-metal", &key)
}

/// One program for each source file.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
        {
            names.push(name.to_owned());
        }
    }
    if names.is_empty() {
        bail!("{} has no guests", folder.display());
    }
    names.sort();
    Ok(names)
}
