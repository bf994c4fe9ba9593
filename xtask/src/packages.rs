//! The Debian packages that set-up and tests need: which are missing, and installing them where we may.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::process;

/// What shows that a package is installed.
enum Sign {
    /// A program on the path.
    Program(&'static str),
    /// A file of this exact name.
    File(&'static str),
    /// Anything that says the kernel's source is there.
    KernelSource,
}

/// A package and its sign. Other distributions have the same things under other package names.
pub(crate) struct Package {
    name: &'static str,
    sign: Sign,
}

const fn program(name: &'static str, program: &'static str) -> Package {
    Package { name, sign: Sign::Program(program) }
}

/// For the guest kernel, unless the user names another source.
pub(crate) const KERNEL_SOURCE: &[Package] = &[Package { name: "linux-source", sign: Sign::KernelSource }];

/// For building it: what Linux Documentation/process/changes.rst asks for.
pub(crate) const KERNEL_BUILD: &[Package] = &[
    program("gcc", "gcc"),
    program("make", "make"),
    program("flex", "flex"),
    program("bison", "bison"),
    program("bc", "bc"),
    program("perl", "perl"),
    program("patch", "patch"),
    program("tar", "tar"),
    program("xz-utils", "xz"),
    program("lz4", "lz4"),
    Package { name: "libelf-dev", sign: Sign::File("/usr/include/libelf.h") },
];

/// For the initramfs.
pub(crate) const INITRAMFS: &[Package] = &[program("busybox-static", "busybox")];

/// For unpacking Debian's own kernel.
pub(crate) const DEBIAN_KERNEL: &[Package] = &[
    program("dpkg", "dpkg-deb"),
    program("kmod", "depmod"),
    program("xz-utils", "xz"),
    program("zstd", "zstd"),
];

/// For the test images.
pub(crate) const IMAGES: &[Package] =
    &[program("e2fsprogs", "mke2fs"), program("squashfs-tools", "mksquashfs")];

/// For the suites: guests that run on our engines and on QEMU's, and programs in assembler.
pub(crate) const SUITES: &[Package] = &[
    program("nasm", "nasm"),
    program("qemu-system-x86", "qemu-system-x86_64"),
    program("qemu-utils", "qemu-img"),
];

/// For the Debian root file system among the test images.
pub(crate) const DEBOOTSTRAP: &[Package] = &[program("debootstrap", "debootstrap")];

impl Package {
    fn is_installed(&self) -> bool {
        match self.sign {
            Sign::Program(name) => find_program(name).is_some(),
            Sign::File(path) => Path::new(path).exists(),
            Sign::KernelSource => crate::kernel_source::installed_archive().is_some(),
        }
    }
}

/// Where `name` lies on the path, the directories of administrators' programs included.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// Makes sure that `packages` are there: installs them as root on a Debian system, else says in one line what is
/// missing and how to get it.
pub(crate) fn require(packages: &[&[Package]]) -> Result<()> {
    let missing = missing(packages);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if find_program("apt-get").is_none() {
        bail!("these are missing (by their Debian package names), install them and run this again: {list}");
    }
    if !running_as_root() {
        bail!(
            "missing packages: {list}; install them with: sudo apt-get install -y --no-install-recommends {list}"
        );
    }
    eprintln!("xtask: installing {list}");
    if apt_get(&["install", "-y", "--no-install-recommends"], &missing).is_err() {
        // The package lists may be missing or old.
        apt_get(&["update"], &[])?;
        apt_get(&["install", "-y", "--no-install-recommends"], &missing)?;
    }
    let still_missing = self::missing(packages);
    if !still_missing.is_empty() {
        bail!("installed but not found afterwards: {}", still_missing.join(" "));
    }
    Ok(())
}

fn missing(packages: &[&[Package]]) -> Vec<&'static str> {
    packages
        .iter()
        .copied()
        .flatten()
        .filter(|package| !package.is_installed())
        .map(|package| package.name)
        .collect()
}

fn apt_get(arguments: &[&str], packages: &[&str]) -> Result<()> {
    process::run(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg("-q")
            .args(arguments)
            .args(packages),
    )
}

/// Whether this process may install packages and make device nodes.
pub(crate) fn running_as_root() -> bool {
    process::output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_package_is_named_and_an_installed_one_is_not() {
        let packages = [
            program("certainly-there", "sh"),
            program("certainly-missing", "a-program-that-nobody-has-written"),
            Package { name: "no-such-header", sign: Sign::File("/nonexistent/header.h") },
        ];
        assert_eq!(missing(&[&packages]), ["certainly-missing", "no-such-header"]);
    }
}
