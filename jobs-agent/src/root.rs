//! The root file system of a machine: the initramfs, or a disk's file system, read-only, below an overlay in memory.
//!
//! The agent itself moves into the disk's root, as switch_root(8) does: the new root is moved onto `/` and entered, so
//! that for the kernel too it is the mount namespace's root (a plain chroot would forbid the command user
//! namespaces and pivot_root). The distribution's files stay as they are.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harrier_agent_protocol::Root;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, sethostname};

use crate::sys;

/// How long a disk may take to appear.
const DISK_LIMIT: Duration = Duration::from_secs(5);

/// Where the pieces of the new root are mounted, in the initramfs.
const LOWER: &str = "/.root/disk";
const MEMORY: &str = "/.root/memory";
const MERGED: &str = "/.root/merged";

/// File systems of the machine that move along, in this order.
const MOVED: [&str; 5] = ["dev", "proc", "sys", "run", "tmp"];

/// Why a root file system cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error("the machine has no disk with the serial number {serial:?} (disks: {found})")]
    NoDisk { serial: String, found: String },
    #[error("cannot read the root disk {}: {source}", device.display())]
    Read { device: PathBuf, source: io::Error },
    #[error(
        "the root disk {} holds neither ext4 nor squashfs at its start: give the image of a file system, not of a \
         partitioned disk",
        device.display()
    )]
    Unknown { device: PathBuf },
    #[error("the guest kernel has no {0}: build it in, or list its module in the initramfs")]
    NoFileSystem(&'static str),
    #[error("cannot mount the root disk as {kind} ({reason}): check the image, or make it again")]
    Mount { kind: &'static str, reason: &'static str },
    #[error("cannot {step} for the root file system: {reason}")]
    Step { step: &'static str, reason: String },
    #[error("cannot {step}, the root file system is damaged ({reason}): check the image, or make it again")]
    Damaged { step: &'static str, reason: String },
    #[error("this machine's root file system is already another one")]
    Taken,
    #[error("this machine's root file system could not be mounted before")]
    Broken,
}

/// Which root file system a machine has come to.
#[derive(Default)]
pub(crate) enum MachineRoot {
    /// No command has run yet.
    #[default]
    Undecided,
    /// This one, and for a disk the file system in memory above it.
    Entered(Root, Option<File>),
    /// An attempt failed half-way.
    Broken,
}

impl MachineRoot {
    /// Enters `root`, unless that is done already. Gives a warning, if there is one.
    pub(crate) fn enter(&mut self, root: &Root) -> Result<Option<String>, RootError> {
        match self {
            Self::Entered(current, _) if current == root => return Ok(None),
            Self::Entered(..) => return Err(RootError::Taken),
            Self::Broken => return Err(RootError::Broken),
            Self::Undecided => {}
        }
        let (warning, memory) = match root {
            Root::Initramfs => (None, None),
            Root::Disk { serial } => {
                *self = Self::Broken;
                let (warning, memory) = switch(serial)?;
                (warning, Some(memory))
            }
        };
        *self = Self::Entered(root.clone(), memory);
        Ok(warning)
    }

    /// A path of the file system in memory that takes what is written to the root.
    pub(crate) fn memory(&self) -> PathBuf {
        match self {
            Self::Entered(_, Some(folder)) => format!("/proc/self/fd/{}", folder.as_raw_fd()).into(),
            Self::Entered(_, None) | Self::Undecided | Self::Broken => "/".into(),
        }
    }
}

/// Sets the machine's host name.
pub(crate) fn set_hostname(name: &[u8]) -> Result<(), String> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::OsStr::from_bytes(name);
    sethostname(name).map_err(|errno| format!("cannot set the host name {name:?}: {}", errno.desc()))
}

fn switch(serial: &[u8]) -> Result<(Option<String>, File), RootError> {
    let device = find_disk(serial)?;
    let file_system = FileSystem::detect(&device)?;
    for folder in [LOWER, MEMORY, MERGED] {
        fs::create_dir_all(folder).map_err(|error| step("make a folder", error))?;
    }
    let warning = file_system.mount(&device)?;
    mount(Some("tmpfs"), MEMORY, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(|errno| file_system_error("tmpfs", errno))?;
    let memory = File::open(MEMORY).map_err(|error| step("open a folder", error))?;
    let (upper, work) = (format!("{MEMORY}/upper"), format!("{MEMORY}/work"));
    for folder in [&upper, &work] {
        fs::create_dir(folder).map_err(|error| step("make a folder", error))?;
    }
    // The root folder's own mode and owner come from the upper layer.
    copy_ownership(Path::new(LOWER), Path::new(&upper)).map_err(|error| step("copy the owner", error))?;
    let options = format!("lowerdir={LOWER},upperdir={upper},workdir={work}");
    mount(Some("overlay"), MERGED, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|errno| file_system_error("overlay", errno))?;
    for name in MOVED {
        move_into(Path::new(MERGED), name)?;
    }
    let failed = |step_name| move |errno: Errno| step(step_name, errno.into());
    chdir(MERGED).map_err(failed("enter the new root"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(failed("move the new root"))?;
    chroot(".").map_err(failed("change the root"))?;
    chdir("/").map_err(failed("enter the new root"))?;
    Ok((warning, memory))
}

fn step(step: &'static str, error: io::Error) -> RootError {
    let damage = [Errno::EBADMSG, Errno::EUCLEAN, Errno::EIO];
    if error.raw_os_error().is_some_and(|code| damage.contains(&Errno::from_raw(code))) {
        return RootError::Damaged { step, reason: error.to_string() };
    }
    RootError::Step { step, reason: error.to_string() }
}

fn file_system_error(kind: &'static str, errno: Errno) -> RootError {
    match errno {
        Errno::ENODEV => RootError::NoFileSystem(kind),
        _ => RootError::Mount { kind, reason: errno.desc() },
    }
}

fn copy_ownership(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

/// Moves one of the machine's own file systems to its place in the new root.
fn move_into(new_root: &Path, name: &str) -> Result<(), RootError> {
    let (from, to) = (Path::new("/").join(name), new_root.join(name));
    match fs::symlink_metadata(&to) {
        Ok(metadata) if metadata.is_dir() => {}
        // The distribution has something else there, perhaps a link to another place, which would be followed
        // within the old root. It is the distribution's choice for all but the first three.
        Ok(_) if matches!(name, "run" | "tmp") => return Ok(()),
        Ok(_) => {
            return Err(RootError::Step {
                step: "use the image",
                reason: format!("/{name} is no folder in it"),
            });
        }
        Err(_) => fs::create_dir(&to).map_err(|error| step("make a mount point", error))?,
    }
    match mount(Some(&from), &to, None::<&str>, MsFlags::MS_MOVE, None::<&str>) {
        Ok(()) => Ok(()),
        // Not mounted in the first place, which was said on the console.
        Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(step("move a mount", errno.into())),
    }
}

/// The device of the disk with a serial number (`GET_ID` of virtio-blk, by way of sysfs).
fn find_disk(serial: &[u8]) -> Result<PathBuf, RootError> {
    let deadline_ns = sys::monotonic_ns().saturating_add(DISK_LIMIT.as_nanos() as u64);
    loop {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let Ok(its_serial) = fs::read(entry.path().join("serial")) else { continue };
            let device = Path::new("/dev").join(entry.file_name());
            if its_serial.trim_ascii_end() == serial {
                return Ok(device);
            }
            found.push(device.display().to_string());
        }
        if sys::monotonic_ns() >= deadline_ns {
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            return Err(RootError::NoDisk { serial: String::from_utf8_lossy(serial).into_owned(), found });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A file system that can be a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileSystem {
    Ext4,
    Squashfs,
}

impl FileSystem {
    fn detect(device: &Path) -> Result<Self, RootError> {
        let mut start = [0; 2048];
        let mut length = 0;
        let read = |source| RootError::Read { device: device.into(), source };
        let file = File::open(device).map_err(read)?;
        while let Some(room) = start.get_mut(length..).filter(|room| !room.is_empty()) {
            match file.read_at(room, length as u64).map_err(read)? {
                0 => break,
                count => length += count,
            }
        }
        Self::of(start.get(..length).unwrap_or_default())
            .ok_or_else(|| RootError::Unknown { device: device.into() })
    }

    /// Recognises a file system by its magic number: ext4's superblock is at 1024 and has it at 0x38, squashfs's is at 0.
    fn of(start: &[u8]) -> Option<Self> {
        if start.get(0x438..0x43a) == Some(&[0x53, 0xef]) {
            Some(Self::Ext4)
        } else if start.starts_with(b"hsqs") {
            Some(Self::Squashfs)
        } else {
            None
        }
    }

    fn mount(self, device: &Path) -> Result<Option<String>, RootError> {
        let kind = match self {
            Self::Ext4 => "ext4",
            Self::Squashfs => "squashfs",
        };
        let attempt = |options| mount(Some(device), LOWER, Some(kind), MsFlags::MS_RDONLY, options);
        match (attempt(None), self) {
            (Ok(()), _) => Ok(None),
            // A journal that was not closed cannot be replayed on a disk that cannot be written.
            (Err(Errno::EROFS), Self::Ext4) => attempt(Some("noload"))
                .map(|()| Some("the root image was not unmounted cleanly; its journal is ignored".into()))
                .map_err(|errno| file_system_error(kind, errno)),
            (Err(errno), _) => Err(file_system_error(kind, errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_recognised_by_their_magic_number() {
        let mut start = vec![0; 2048];
        assert_eq!(FileSystem::of(&start), None);
        start[0x438] = 0x53;
        start[0x439] = 0xef;
        assert_eq!(FileSystem::of(&start), Some(FileSystem::Ext4));
        assert_eq!(FileSystem::of(b"hsqs"), Some(FileSystem::Squashfs));
        assert_eq!(FileSystem::of(b"hsq"), None);
        assert_eq!(FileSystem::of(&start[..0x439]), None);
    }

    #[test]
    fn a_disk_that_is_a_file_without_file_system_is_named() {
        let error = FileSystem::detect(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().starts_with("the root disk /dev/null holds neither"), "{error}");
    }
}
