//! Process 1: prepares the machine, dials the host, serves it, and switches the machine off.
//!
//! Nothing here is fatal that a command could do without; what fails is said on the console. Only a host that cannot be
//! reached ends the machine, since nobody could then ask for anything.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use harrier_agent_protocol::BootTimes;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::sync;

use crate::dial::{self, Dialer};
use crate::root::{self, MachineRoot};
use crate::session::{Ending, Place, Session};
use crate::sys;
use crate::{exit, guest, identity};

/// The agent has begun, in linux/harrier_hypercall.h.
const PHASE_AGENT: u32 = 7;
/// The agent is ready for work.
const PHASE_READY: u32 = 8;

/// How long processes have between SIGTERM and SIGKILL when the machine goes down.
const TERM_GRACE: Duration = Duration::from_millis(500);

/// The modules to load before the host can be dialled: one path per line, in load order; `#` begins a comment.
const MODULE_LIST: &str = "/modules.list";

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel is to decompress the module.
const COMPRESSED: ModuleInitFlags = ModuleInitFlags::from_bits_retain(4);

/// One file system that every Linux program expects.
struct Mount {
    target: &'static str,
    kind: &'static str,
    options: Option<&'static str>,
    flags: MsFlags,
}

const fn entry(
    target: &'static str,
    kind: &'static str,
    options: Option<&'static str>,
    flags: MsFlags,
) -> Mount {
    Mount { target, kind, options, flags }
}

const NO_EXECUTION: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const MOUNTS: [Mount; 8] = [
    entry("/proc", "proc", None, NO_EXECUTION),
    entry("/sys", "sysfs", None, NO_EXECUTION),
    entry("/dev", "devtmpfs", Some("mode=0755"), MsFlags::MS_NOSUID),
    entry(
        "/dev/pts",
        "devpts",
        Some("gid=5,mode=620,ptmxmode=666"),
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
    ),
    entry("/dev/shm", "tmpfs", Some("mode=1777"), NO_DEVICES),
    entry("/run", "tmpfs", Some("mode=0755"), NO_DEVICES),
    entry("/tmp", "tmpfs", Some("mode=1777"), NO_DEVICES),
    entry("/sys/fs/cgroup", "cgroup2", None, NO_EXECUTION),
];

/// Names under /dev that programs expect and devtmpfs does not make.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Runs the machine until it is switched off.
pub(crate) fn run(start_ns: u64) -> ! {
    // Process 1 must not end: the kernel would panic, and the reason would be lost in it.
    if let Ok(Err(message)) = catch_unwind(AssertUnwindSafe(|| serve(start_ns))) {
        say(&message);
    }
    power_off()
}

fn serve(start_ns: u64) -> Result<(), String> {
    mount_all();
    sys::mark(PHASE_AGENT);
    offer_guest_program();
    load_modules(Path::new(MODULE_LIST));
    if let Err(error) = sys::loopback_up() {
        say(&format!("cannot bring the loopback interface up: {error}"));
    }
    if let Err(error) = root::set_hostname(b"harrier") {
        say(&error);
    }
    // The kernel gives process 1 a hard limit of 4096 open files, which some servers find too few.
    if let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288) {
        say(&format!("cannot raise the limit of open files: {errno}"));
    }
    let mounted_ns = sys::monotonic_ns();
    let connection = dial::first()?;
    let times = BootTimes { agent_start_ns: start_ns, mounted_ns, connected_ns: sys::monotonic_ns() };
    let mut session = Session::new(connection, Dialer::Vsock, Place::Machine(MachineRoot::default()), times)
        .map_err(|error| error.to_string())?;
    sys::mark(PHASE_READY);
    if Path::new(sys::DEVICE).exists() {
        match exit::listen(exit::PATH.as_ref()) {
            Ok(exits) => session.take_exits(exits),
            Err(error) => say(&format!("jobs cannot ask for the end at {}: {error}", exit::PATH)),
        }
    }
    let ending = session.run();
    if let Ok(Ending::Exit(exit)) = ending {
        // Before: the host does not wait for long for the end of a machine that has hung up.
        sync();
        session.hang_up();
        let ended = sys::Device::open().and_then(|device| device.exit(exit.code, exit.message));
        say(&format!(
            "the machine cannot be ended as a job asked: {}",
            ended.err().unwrap_or_else(|| io::ErrorKind::Other.into())
        ));
    }
    end_processes();
    unmount_disks();
    match ending {
        Ok(Ending::Shutdown) => {
            session.say_synced();
            Ok(())
        }
        // It was tried, and said that it failed.
        Ok(Ending::Exit(_)) => Ok(()),
        Ok(Ending::Disconnected) => Err("the host is gone and has not come back".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Puts [`guest`] where every root file system has it. Only on Harrier's own kernel is there anything that it could do.
fn offer_guest_program() {
    let link = Path::new(identity::FOLDER).join(guest::NAME);
    if !Path::new(sys::DEVICE).exists() {
        return;
    }
    // By this name the file is found from within another root, too.
    let made =
        fs::create_dir_all(identity::FOLDER).and_then(|()| std::os::unix::fs::symlink("/proc/1/exe", &link));
    if let Err(error) = made {
        say(&format!("cannot make {}: {error}", link.display()));
    }
}

fn mount_all() {
    for Mount { target, kind, options, flags } in MOUNTS {
        // Where the folder can be neither made nor found, mount says so.
        let _ = fs::create_dir_all(target);
        match mount(Some(kind), target, Some(kind), flags, options) {
            // Mounted by the kernel already.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(errno) => say(&format!("cannot mount {kind} on {target}: {}", errno.desc())),
        }
    }
    for (target, link) in DEVICE_LINKS {
        match std::os::unix::fs::symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                say(&format!("cannot make the link {link}: {error}"));
            }
            _ => {}
        }
    }
}

fn load_modules(list: &Path) {
    let paths = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return say(&format!("cannot read {}: {error}", list.display())),
    };
    for path in paths.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let flags = if path.ends_with(".ko") { ModuleInitFlags::empty() } else { COMPRESSED };
        let loaded = File::open(path).and_then(|file| {
            finit_module(&file, c"", flags).or_else(|errno| already_loaded(errno).map_err(Into::into))
        });
        if let Err(error) = loaded {
            say(&format!("cannot load the kernel module {path}: {error}"));
        }
    }
}

fn already_loaded(errno: Errno) -> nix::Result<()> {
    if errno == Errno::EEXIST { Ok(()) } else { Err(errno) }
}

/// Says a line where a person may see it: on the console, else in the kernel's log.
pub(crate) fn say(message: &str) {
    let line = format!("harrier-jobs-agent: {message}\r\n");
    for path in ["/dev/console", "/dev/kmsg"] {
        let written =
            OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(line.as_bytes()));
        if written.is_ok() {
            return;
        }
    }
}

/// Ends all other processes: kindly first, then not.
fn end_processes() {
    let deadline_ns = sys::monotonic_ns().saturating_add(TERM_GRACE.as_nanos() as u64);
    if !has_children() {
        return;
    }
    sys::kill_all(libc::SIGTERM);
    while has_children() && sys::monotonic_ns() < deadline_ns {
        std::thread::sleep(Duration::from_millis(2));
    }
    sys::kill_all(libc::SIGKILL);
    // A process in an uninterruptible wait may outlast even this; the machine goes down regardless.
    let deadline_ns = deadline_ns.saturating_add(TERM_GRACE.as_nanos() as u64);
    while has_children() && sys::monotonic_ns() < deadline_ns {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reaps what has ended; says whether any child is left. Every orphan is a child of process 1.
fn has_children() -> bool {
    loop {
        match sys::reap() {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(error) => return error.kind() == io::ErrorKind::Interrupted,
        }
    }
}

/// Writes everything back, and unmounts what a job has mounted from disks, latest first.
fn unmount_disks() {
    sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ');
        let (Some(source), Some(target)) = (fields.next(), fields.next()) else { continue };
        if source.starts_with("/dev/") && target != "/" && umount2(target, MntFlags::empty()).is_err() {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            if let Err(errno) = mount(None::<&str>, target, None::<&str>, flags, None::<&str>) {
                say(&format!("cannot unmount {source} from {target}: {}", errno.desc()));
            }
        }
    }
    sync();
}

fn power_off() -> ! {
    sync();
    loop {
        let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
        say(&format!("cannot power off: {}", errno.desc()));
        std::thread::sleep(Duration::from_secs(1));
    }
}
