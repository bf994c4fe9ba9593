//! Developer commands: `cargo xtask --help` lists them.
//!
//! Each command makes what it needs by itself, so that one command on a fresh machine is enough. Products go to the
//! cache that `harrier run` reads (`cache`), described in `guest-kernel/README.md`.

mod bare_metal;
mod bench;
mod bzimage;
mod cache;
mod checks;
mod cpio;
mod debian_kernel;
mod guest;
mod guest_kernel;
mod initramfs;
mod kernel_source;
mod packages;
mod pool;
mod process;
mod rootfs_images;
mod soak;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::cache::Cache;
use crate::guest_kernel::Patches;

/// Developer commands of Harrier.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: XtaskCommand,
}

#[derive(Subcommand)]
enum XtaskCommand {
    /// Install or name missing system packages, build the guest kernel, the initramfs and
    /// the guests of `harrier selftest`
    Setup {
        /// Kernel source to build, a folder or an archive [default: the linux-source package's]
        #[arg(long, value_name = "FOLDER|ARCHIVE")]
        source: Option<PathBuf>,
    },
    /// Build the guest kernel only, and print the folder it is in
    GuestKernel {
        /// Kernel source to build, a folder or an archive [default: the linux-source package's]
        #[arg(long, value_name = "FOLDER|ARCHIVE")]
        source: Option<PathBuf>,
        /// Without guest-kernel/patches: the source as it is, to compare
        #[arg(long)]
        unpatched: bool,
    },
    /// Build the agent and the initramfs only, and print the archive's path
    Initramfs,
    /// Download Debian's cloud kernel and make it bootable in Harrier, as bzImage and as vmlinux
    DebianKernel,
    /// Build root file systems for tests: busybox as ext4 and squashfs
    RootfsImages {
        /// Also a Debian with python3, as ext4; needs root and a Debian system
        #[arg(long)]
        debian: bool,
    },
    /// Measure Harrier beside its peers
    Bench(bench::BenchArguments),
    /// Run thousands of jobs while workers, machines and the coordinator are killed, and check that nothing is lost
    Soak(soak::SoakArguments),
    /// Set up, then check format, lints and every test
    Test,
    /// Run a test suite of others on the engines: `conformance --help` lists them
    Conformance {
        /// The suite, its directory, and options
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Set up, build `harrier` in release mode and run `harrier run` with the given arguments
    Run {
        /// Arguments of `harrier run`, for example: -- uname -a
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match execute(Arguments::parse_from(escaped(std::env::args_os())).command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Puts a "--" behind "run" and "conformance": the words after it are another program's, its own "--" among them, which
/// clap would take for itself.
fn escaped(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words.into_iter().collect();
    if words.get(1).is_some_and(|word| word == "run" || word == "conformance") {
        words.insert(2, "--".into());
    }
    words
}

fn execute(command: XtaskCommand) -> Result<ExitCode> {
    let root = workspace_root();
    let cache = Cache::from_env()?;
    match command {
        XtaskCommand::Setup { source } => {
            let guest = guest::set_up(&cache, root, source.as_deref())?;
            bare_metal::build(&cache, root)?;
            eprintln!("xtask: the guest is ready in {}", guest.display());
        }
        XtaskCommand::GuestKernel { source, unpatched } => {
            let patches = if unpatched { Patches::None } else { Patches::Applied };
            println!("{}", guest_kernel::build(&cache, root, source.as_deref(), patches)?.dir.display());
        }
        XtaskCommand::Initramfs => {
            println!("{}", initramfs::build(&cache, root, &[])?.file.display());
        }
        XtaskCommand::DebianKernel => {
            println!("{}", debian_kernel::build(&cache, root)?.display());
        }
        XtaskCommand::RootfsImages { debian } => {
            println!("{}", rootfs_images::build_busybox(&cache)?.display());
            if debian {
                println!("{}", rootfs_images::build_debian(&cache)?.display());
            }
        }
        XtaskCommand::Bench(arguments) => bench::run(&cache, root, &arguments)?,
        XtaskCommand::Soak(arguments) => {
            let harrier = match &arguments.harrier {
                Some(file) => file.clone(),
                None => {
                    guest::set_up(&cache, root, None)?;
                    bench::build_harrier(root)?
                }
            };
            soak::run(&harrier, &arguments)?;
        }
        XtaskCommand::Test => checks::run(&cache, root)?,
        XtaskCommand::Conformance { mut arguments } => {
            match arguments.first().and_then(|suite| suite.to_str()) {
                Some("selftests-x86") => arguments.extend(selftests_guest(&cache, root)?),
                Some("programs") => arguments.extend(programs_guest(&cache, root)?),
                _ => {}
            }
            return run_program(root, "harrier-conformance", "harrier-conformance", &arguments);
        }
        XtaskCommand::Run { arguments } => {
            guest::set_up(&cache, root, None)?;
            let arguments: Vec<_> = std::iter::once("run".into()).chain(arguments).collect();
            return run_program(root, "harrier", "harrier", &arguments);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What Linux's own tests run in: `harrier`, a Debian root, and Debian's kernel, which has all that they test.
fn selftests_guest(cache: &Cache, root: &Path) -> Result<[OsString; 8]> {
    let kernel = debian_kernel::build(cache, root)?;
    let rootfs = rootfs_images::build_debian(cache)?;
    Ok([
        "--harrier".into(),
        bench::build_harrier(root)?.into(),
        "--rootfs".into(),
        rootfs.join("debian.ext4").into(),
        "--kernel".into(),
        kernel.join("vmlinux").into(),
        "--initrd".into(),
        kernel.join("initramfs.cpio").into(),
    ])
}

/// What a Debian's programs run in: `harrier`, and a Debian root that has them.
fn programs_guest(cache: &Cache, root: &Path) -> Result<[OsString; 4]> {
    guest::set_up(cache, root, None)?;
    let rootfs = rootfs_images::build_debian_programs(cache)?;
    Ok([
        "--harrier".into(),
        bench::build_harrier(root)?.into(),
        "--rootfs".into(),
        rootfs.join("debian.ext4").into(),
    ])
}

/// Replaces this program by `cargo run` of a program of the workspace, so that terminal, signals and exit code are its
/// own.
fn run_program(root: &Path, package: &str, program: &str, arguments: &[OsString]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt as _;
    let error = checks::cargo()
        .args(["run", "--quiet", "--release", "--package", package, "--bin", program, "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .arg("--")
        .args(arguments)
        .exec();
    Err(anyhow::Error::new(error).context("cannot run cargo"))
}

/// The folder of the workspace: the parent of this package's own.
fn workspace_root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_hands_every_word_on_to_harrier() {
        let words = |line: &[&str]| {
            let typed = ["xtask", "run"].iter().chain(line).map(|word| word.into());
            match Arguments::try_parse_from(escaped(typed)) {
                Ok(Arguments { command: XtaskCommand::Run { arguments } }) => arguments,
                _ => panic!("{line:?} is not taken"),
            }
        };
        for line in [
            &["--", "uname", "-a"][..],
            &["--engine", "soft", "--", "sh", "-c", "exit 7"],
            &["--help"],
            &["--", "echo", "--", "x"],
        ] {
            assert_eq!(words(line), line);
        }
    }
}
