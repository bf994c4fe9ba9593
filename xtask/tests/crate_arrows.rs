//! The arrows between the crates, as ARCHITECTURE.md draws them. Whoever moves a wall moves it here too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Who may use whom. A crate that stands on the left uses no other crate of the workspace than those on its right.
const ARROWS: &[(&str, &[&str])] = &[
    ("harrier-engine", &[]),
    ("harrier-hypercall-abi", &[]),
    ("harrier-agent-protocol", &[]),
    ("harrier-engine-kvm", &["harrier-engine"]),
    ("harrier-engine-soft", &["harrier-engine"]),
    ("harrier-snapshot", &["harrier-engine"]),
    ("harrier-control", &[]),
    ("harrier-devices", &["harrier-engine", "harrier-hypercall-abi"]),
    (
        "harrier-machine",
        &[
            "harrier-engine",
            "harrier-engine-kvm",
            "harrier-engine-soft",
            "harrier-snapshot",
            "harrier-devices",
            "harrier-hypercall-abi",
        ],
    ),
    (
        "harrier-jobs",
        &[
            "harrier-control",
            "harrier-machine",
            "harrier-snapshot",
            "harrier-engine",
            "harrier-agent-protocol",
        ],
    ),
    ("harrier-guest-checks", &["harrier-machine", "harrier-engine"]),
    ("harrier-coordinator", &["harrier-jobs", "harrier-control"]),
    ("harrier-jobs-agent", &["harrier-agent-protocol", "harrier-hypercall-abi"]),
    (
        "harrier",
        &[
            "harrier-control",
            "harrier-coordinator",
            "harrier-guest-checks",
            "harrier-jobs",
            "harrier-machine",
            "harrier-snapshot",
            "harrier-devices",
            "harrier-engine",
            "harrier-engine-kvm",
            "harrier-engine-soft",
        ],
    ),
    ("xtask", &["harrier-agent-protocol"]),
];

/// Crates of others that belong to some of ours only.
const RESERVED: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["harrier-engine-kvm"]),
    ("kvm-bindings", &["harrier-engine-kvm"]),
    ("clap", &["harrier", "xtask"]),
    ("anyhow", &["harrier", "xtask"]),
];

/// Programs: they own their process and may look at its environment. A library is told.
const PROGRAMS: &[&str] = &["harrier", "xtask", "harrier-jobs-agent"];

struct Package {
    name: String,
    folder: PathBuf,
    /// What it is built from, without what only its tests use.
    dependencies: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The workspace's packages without those under tests/, which use everything.
fn packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut packages = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let folder = Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned();
        if folder.starts_with(root().join("tests"))
            || folder.starts_with(root().join("guest-kernel/bare-metal"))
        {
            continue;
        }
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        packages.push(Package {
            name: package["name"].as_str().unwrap().to_owned(),
            folder,
            dependencies: dependencies
                .filter(|dependency| dependency["kind"] != "dev")
                .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
                .collect(),
        });
    }
    assert!(packages.len() >= 9, "cargo metadata lists too few packages");
    packages
}

fn allowed<'a>(table: &'a [(&str, &[&str])], name: &str) -> Option<&'a [&'a str]> {
    table.iter().find(|(key, _)| *key == name).map(|(_, values)| *values)
}

#[test]
fn crates_use_only_the_crates_that_the_architecture_lets_them() {
    let packages = packages();
    let ours: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for package in &packages {
        let may_use = allowed(ARROWS, &package.name).unwrap_or_else(|| {
            panic!("{} is new: give it a line in ARROWS and in ARCHITECTURE.md", package.name)
        });
        for used in package.dependencies.iter().filter(|used| ours.contains(&used.as_str())) {
            assert!(may_use.contains(&used.as_str()), "{} must not use {used}", package.name);
        }
    }
}

#[test]
fn the_arrows_have_no_cycle() {
    fn reaches(from: &str, to: &str, depth: usize) -> bool {
        assert!(depth <= ARROWS.len(), "a cycle through {from}");
        let next = allowed(ARROWS, from).unwrap_or_default();
        next.contains(&to) || next.iter().any(|next| reaches(next, to, depth + 1))
    }
    for (name, _) in ARROWS {
        assert!(!reaches(name, name, 0), "{name} uses itself");
    }
    assert!(!reaches("harrier-devices", "harrier-machine", 0));
    assert!(!reaches("harrier-machine", "harrier-jobs", 0));
}

#[test]
fn reserved_crates_stay_where_they_belong() {
    for package in packages() {
        for used in &package.dependencies {
            if let Some(owners) = allowed(RESERVED, used) {
                assert!(owners.contains(&package.name.as_str()), "{} must not use {used}", package.name);
            }
        }
    }
}

#[test]
fn libraries_do_not_read_the_environment() {
    for package in packages().iter().filter(|package| !PROGRAMS.contains(&package.name.as_str())) {
        for file in rust_files(&package.folder.join("src")) {
            let text = fs::read_to_string(&file).unwrap();
            assert!(!text.contains("env::var"), "{} reads an environment variable", file.display());
        }
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
