//! Builds the bare-metal guests, which have flags and a linker script of their own and are no part of the
//! workspace. Needs nothing but the installed toolchain.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-kernel/bare-metal");
    for input in ["src", "Cargo.toml", "Cargo.lock", ".cargo/config.toml", "build.rs", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guests.join(input).display());
    }
    println!("cargo::rerun-if-changed={}", guests.join("../abi/src").display());
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let target = Path::new(&out).join("bare-metal");
    let mut cargo = Command::new(env::var("CARGO").expect("cargo sets CARGO"));
    cargo
        .current_dir(&guests)
        .args(["build", "--release", "--locked", "--offline", "--target-dir"])
        .arg(&target);
    // What the outer build was given is not meant for the guests.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let flags = matches!(
            &*text,
            "RUSTFLAGS" | "CARGO_ENCODED_RUSTFLAGS" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER"
        );
        if flags
            || ["CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_"]
                .iter()
                .any(|prefix| text.starts_with(prefix))
        {
            cargo.env_remove(&name);
        }
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "building the bare-metal guests failed");
    let binaries = target.join("x86_64-unknown-linux-gnu/release");
    assert!(fs::exists(binaries.join("integer")).unwrap_or(false), "the guests are not where they should be");
    println!("cargo::rustc-env=BARE_METAL_GUESTS={}", binaries.display());
}
