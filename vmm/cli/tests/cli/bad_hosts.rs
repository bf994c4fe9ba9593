//! Hosts that lack something: KVM missing, forbidden, busy or broken; no memory, no files, no threads. The host is made so for
//! one process, by a mount namespace, a limit, or a filter under which single system calls fail.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::support::{Code, texts, wait};

/// KVM's requests (include/uapi/linux/kvm.h of Linux).
const KVM_GET_API_VERSION: u64 = 0xae00;
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_CHECK_EXTENSION: u64 = 0xae03;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_GET_SUPPORTED_CPUID: u64 = 0xc008_ae05;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_CPUID2: u64 = 0x4008_ae90;

/// What glibc and musl ask clone for when they make a thread: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS,
/// PARENT_SETTID and CHILD_CLEARTID.
const THREAD: u64 = 0x003d_0f00;

/// A folder that every user can read, with the program, a kernel, and a registry of machines.
struct Place {
    folder: tempfile::TempDir,
}

/// What its kernel ends with.
const GUEST_CODE: i32 = 7;

impl Place {
    fn new() -> Place {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        // The build's folder may be closed to others.
        std::fs::copy(env!("CARGO_BIN_EXE_harrier"), folder.path().join("harrier")).unwrap();
        let kernel = Code::default().exit(GUEST_CODE as u32, 0, "").kernel();
        std::fs::write(folder.path().join("kernel"), kernel).unwrap();
        std::fs::write(folder.path().join("file"), "no device").unwrap();
        Place { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// `harrier` with its registry here, called by the program `wrapper` and its arguments if there are any.
    fn command(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let program = self.path("harrier");
        let words: Vec<&str> =
            wrapper.iter().copied().chain([program.as_str()]).chain(args.iter().copied()).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("HARRIER_RUNTIME_DIR", self.path("machines"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Arguments that run the kernel on an engine.
    fn plain<'a>(&self, engine: &'a str, kernel: &'a str) -> Vec<&'a str> {
        vec!["run", "--name", "m", "--engine", engine, "--memory", "32M", "--kernel", kernel]
    }

    /// No machine is in the registry, and no process of ours runs.
    #[track_caller]
    fn is_clean(&self) {
        let names: Vec<String> = std::fs::read_dir(self.path("machines"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "lock" && !name.starts_with('.'))
            .collect();
        assert!(names.is_empty(), "left behind: {names:?}");
        let program = self.path("harrier");
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            if let Ok(exe) = std::fs::read_link(entry.path().join("exe")) {
                assert!(!exe.starts_with(&program), "{} still runs", entry.path().display());
            }
        }
    }

    /// One line on stderr with `text` in it, exit code 125, nothing left behind.
    #[track_caller]
    fn refused(&self, command: Command, faults: &[Fault], text: &str) {
        let (code, stdout, stderr) = texts(wait(spawn(command, faults)));
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (125, "", 1), "{stderr}");
        assert!(stderr.starts_with("harrier: ") && stderr.contains(text), "{stderr} lacks {text}");
        self.is_clean();
    }

    /// The guest has run in software, and why is said in one line that has `text`.
    #[track_caller]
    fn ran_in_software(&self, command: Command, faults: &[Fault], text: &str) {
        let (code, _, stderr) = texts(wait(spawn(command, faults)));
        assert_eq!((code, stderr.lines().count()), (GUEST_CODE, 1), "{stderr}");
        assert!(
            stderr.starts_with("harrier: engine soft: ") && stderr.contains(text),
            "{stderr} lacks {text}"
        );
        self.is_clean();
    }
}

/// A system call that fails, or is answered with zero and not done.
#[derive(Debug, Clone, Copy)]
struct Fault {
    call: i64,
    /// Only where the argument of this index has this value.
    argument: Option<(u8, u64)>,
    errno: i32,
}

fn ioctl(request: u64, errno: i32) -> Fault {
    Fault { call: libc::SYS_ioctl, argument: Some((1, request)), errno }
}

fn call(call: i64, errno: i32) -> Fault {
    Fault { call, argument: None, errno }
}

fn filter(fault: &Fault) -> BpfProgram {
    let rules = fault.argument.map(|(index, value)| {
        let equal = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
        SeccompRule::new(vec![equal]).unwrap()
    });
    let rules = BTreeMap::from([(fault.call, rules.into_iter().collect())]);
    let action = SeccompAction::Errno(fault.errno as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, action, TargetArch::x86_64).unwrap().try_into().unwrap()
}

/// Starts a process whose system calls fail as `faults` say: it inherits the filters of the thread that starts it.
fn spawn(mut command: Command, faults: &[Fault]) -> std::process::Child {
    let filters: Vec<BpfProgram> = faults.iter().map(filter).collect();
    let starter = std::thread::spawn(move || {
        for filter in &filters {
            seccompiler::apply_filter(filter).unwrap();
        }
        command.spawn().unwrap()
    });
    starter.join().unwrap()
}

fn has_kvm() -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("skipped: /dev/kvm cannot be opened here");
    }
    there
}

/// Whether `unshare` makes mount namespaces here, and the words that do it.
fn mounts() -> Option<Vec<&'static str>> {
    [vec!["unshare", "-m"], vec!["unshare", "-rm"]].into_iter().find(|words| {
        let mut tried = Command::new(words[0]);
        tried.args(&words[1..]).args(["mount", "-t", "tmpfs", "none", "/mnt"]).stderr(Stdio::null());
        tried.status().is_ok_and(|status| status.success())
    })
}

/// Another /dev, with little in it.
const SMALL_DEV: &str = "mkdir -p $T/dev && mount -t tmpfs none $T/dev && for n in null zero random urandom; do \
                         touch $T/dev/$n && mount --bind /dev/$n $T/dev/$n || exit 99; done && mount --rbind $T/dev /dev";

#[test]
fn a_kvm_device_that_is_none() {
    let Some(unshare) = mounts() else {
        eprintln!("skipped: unshare makes no mount namespace here");
        return;
    };
    let is_root = rustix::process::geteuid().is_root();
    let missing = "/dev/kvm does not exist: load the module kvm_intel or kvm_amd";
    let no_kvm = "/dev/kvm is not KVM: it does not answer to KVM's requests";
    let mut cases = vec![
        (SMALL_DEV.to_owned(), missing),
        (format!("{SMALL_DEV} && mkdir /dev/kvm"), "/dev/kvm cannot be opened: "),
        (format!("{SMALL_DEV} && mkdir $T/dev/none && ln -s /dev/none/kvm /dev/kvm"), missing),
        (format!("{SMALL_DEV} && touch /dev/kvm && mount --bind /dev/null /dev/kvm"), no_kvm),
        (format!("{SMALL_DEV} && touch /dev/kvm && mount --bind $T/file /dev/kvm"), no_kvm),
    ];
    if is_root {
        let forbidden = "touch /dev/kvm && chmod 600 /dev/kvm && WITH='setpriv --reuid 65534 --regid 65534 --clear-groups'";
        cases.push((
            format!("{SMALL_DEV} && {forbidden}"),
            "no permission to open /dev/kvm: add the user to the group that owns it, usually kvm",
        ));
    } else {
        eprintln!("skipped: without root no other user can be tried");
    }
    for (prepare, text) in cases {
        let place = Place::new();
        let kernel = place.path("kernel");
        let folder = place.folder.path().to_str().unwrap();
        let script = format!("T={folder}; {prepare} || exit 98; exec $WITH \"$@\"");
        let wrapper = [&unshare[..], &["sh", "-c", &script, "sh"]].concat();
        place.refused(place.command(&wrapper, &place.plain("kvm", &kernel)), &[], text);
        place.ran_in_software(place.command(&wrapper, &place.plain("auto", &kernel)), &[], text);
    }
}

#[test]
fn a_kvm_that_is_busy_old_or_poor_is_refused_by_name_and_passed_over_by_auto() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.path("kernel");
    for (fault, text) in [
        (ioctl(KVM_CREATE_VM, libc::EBUSY), "/dev/kvm is busy: another hypervisor uses the processor's"),
        (ioctl(KVM_CREATE_VM, libc::ENOMEM), "KVM cannot create a virtual machine: Cannot allocate memory"),
        (ioctl(KVM_GET_API_VERSION, 0), "KVM's API has version 0, this program needs 12: use a Linux kernel"),
        (ioctl(KVM_CHECK_EXTENSION, 0), "KVM lacks the capabilities IRQCHIP USER_MEMORY SPLIT_IRQCHIP"),
    ] {
        place.refused(place.command(&[], &place.plain("kvm", &kernel)), &[fault], text);
        place.ran_in_software(place.command(&[], &place.plain("auto", &kernel)), &[fault], text);
    }
}

#[test]
fn a_kvm_that_refuses_a_request_is_told_with_it_and_what_helps() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.path("kernel");
    for (request, errno, text) in [
        (
            KVM_CREATE_VCPU,
            libc::EMFILE,
            "refused to create vCPU 0 (Too many open files (os error 24)): raise the limit",
        ),
        (
            KVM_CREATE_VCPU,
            libc::ENOMEM,
            "refused to create vCPU 0 (Cannot allocate memory (os error 12)): free memory",
        ),
        (KVM_SET_USER_MEMORY_REGION, libc::ENOMEM, "KVM refused it (Cannot allocate memory"),
        (KVM_GET_SUPPORTED_CPUID, libc::ENOMEM, "refused to ask KVM for its CPUID (Cannot allocate memory"),
        (KVM_GET_VCPU_MMAP_SIZE, libc::EINVAL, "KVM cannot create a virtual machine: Invalid argument"),
        (
            KVM_SET_CPUID2,
            libc::EINVAL,
            "refused to set the CPUID of a vCPU (Invalid argument (os error 22)): use a newer",
        ),
    ] {
        let faults = [ioctl(request, errno)];
        place.refused(place.command(&[], &place.plain("kvm", &kernel)), &faults, text);
        place.ran_in_software(place.command(&[], &place.plain("auto", &kernel)), &faults, text);
    }
}

#[test]
fn a_kvm_that_cannot_run_a_guest_is_refused_by_name_and_passed_over_by_auto() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.path("kernel");
    for (errno, text) in [
        (libc::EIO, "KVM_RUN failed: Input/output error (os error 5)"),
        (
            libc::EFAULT,
            "the host could not give guest memory to KVM (Bad address (os error 14)): free memory",
        ),
        (libc::ENOMEM, "KVM_RUN failed: Cannot allocate memory (os error 12)"),
        // It says that it has run, and has not.
        (0, "KVM does not know the processor's exit reason 0x0"),
    ] {
        let faults = [ioctl(KVM_RUN, errno)];
        place.refused(place.command(&[], &place.plain("kvm", &kernel)), &faults, text);
        place.ran_in_software(place.command(&[], &place.plain("auto", &kernel)), &faults, text);
    }
    // The selftest calls such a KVM faulty, where a missing one is none of its business.
    let mut command = place.command(&[], &["selftest", "--json", "--only", "linux-true", "--timeout", "60s"]);
    command.env("HARRIER_CACHE", crate::support::cache());
    let (code, stdout, stderr) = texts(wait(spawn(command, &[ioctl(KVM_RUN, libc::EIO)])));
    let report: serde_json::Value =
        serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stderr}"));
    assert_eq!((code, &report["passed"], &report["failed"]), (1, &1.into(), &1.into()), "{report}");
    assert!(report["checks"][1]["reason"].as_str().unwrap().contains("KVM_RUN failed"), "{report}");
    place.is_clean();
}

#[test]
fn memory_that_cannot_be_had() {
    let place = Place::new();
    let kernel = place.path("kernel");
    let with = |size: &'static str| {
        vec!["run", "--name", "m", "--engine", "soft", "--memory", size, "--kernel", kernel.as_str()]
    };
    place.refused(place.command(&[], &with("900T")), &[], "this host has: give less");
    // The address space of the process.
    let refused = "guest memory of 512M: the host refused (Cannot allocate memory (os error 12)): give less, free memory";
    place.refused(place.command(&["prlimit", "--as=400000000"], &with("512M")), &[], refused);
    let detached = [&["run", "--detach"], &with("512M")[1..]].concat();
    place.refused(place.command(&["prlimit", "--as=400000000"], &detached), &[], refused);
    for (errno, text) in [(libc::ENOMEM, "Cannot allocate memory"), (libc::EMFILE, "Too many open files")] {
        let text = format!(
            "the soft engine is not available: floating-point and vector instructions need executable memory, \
                            which the host refused ({text}"
        );
        place.refused(place.command(&[], &with("32M")), &[call(libc::SYS_memfd_create, errno)], &text);
    }
}

/// Whatever of its descriptors is the one too many: one line that says so, and nothing is left behind.
#[test]
fn too_few_open_files() {
    let place = Place::new();
    let kernel = place.path("kernel");
    let mut refusals = 0;
    // With 3 the program cannot even be loaded.
    for files in 4..60 {
        let command =
            place.command(&["prlimit", &format!("--nofile={files}")], &place.plain("soft", &kernel));
        let (code, _, stderr) = texts(wait(spawn(command, &[])));
        place.is_clean();
        if code == GUEST_CODE && stderr.is_empty() {
            assert!(refusals > 15, "so few descriptors are not enough");
            return;
        }
        if code == GUEST_CODE {
            // What it does not need it does without.
            assert_eq!(stderr.lines().count(), 1, "{files}: {stderr}");
            continue;
        }
        refusals += 1;
        assert_eq!((code, stderr.lines().count()), (125, 1), "{files}: {stderr}");
        assert!(stderr.starts_with("harrier: ") && stderr.contains("os error 24"), "{files}: {stderr}");
        let (_, remedy) = stderr.rsplit_once("os error 24").unwrap();
        assert!(remedy.contains(": ") || remedy.contains("; "), "{files}: no remedy in {stderr}");
    }
    panic!("60 descriptors are not enough");
}

#[test]
fn no_more_threads() {
    let place = Place::new();
    let kernel = place.path("kernel");
    // The C library makes threads by clone3, and by clone where that is missing; processes have another first argument.
    let faults = [
        call(libc::SYS_clone3, libc::ENOSYS),
        Fault { call: libc::SYS_clone, argument: Some((0, THREAD)), errno: libc::EAGAIN },
    ];
    place.refused(
        place.command(&[], &place.plain("soft", &kernel)),
        &faults,
        "(os error 11)): raise the limit",
    );
    if has_kvm() {
        place.refused(
            place.command(&[], &place.plain("kvm", &kernel)),
            &faults,
            "(os error 11)): raise the limit",
        );
    }
}
