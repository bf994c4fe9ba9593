//! The single looks at the host. None of them leaves anything behind or needs privileges.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use harrier_engine::{CpuModel, Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use harrier_machine::memory::{ByteSize, host_memory_bytes};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};

use super::{Finding, host_calls};
use crate::{engines, guest_files};

/// Looks at everything.
pub(super) fn all() -> Vec<Finding> {
    let mut findings = Vec::from(engines());
    findings.extend([
        guest(),
        host_kernel(),
        cpus(),
        cpu_level(),
        memory(),
        huge_pages(),
        memfd(),
        userfaultfd(),
        tun(),
        vhost_vsock(),
        landlock(),
        seccomp(),
        user_namespaces(),
        cgroup_v2(),
    ]);
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    findings.push(reflink("reflink here", &here, "disk copies"));
    if let Ok(cache) = guest_files::cache_dir() {
        findings.push(reflink("reflink in the cache", &cache, "copies of images and snapshots"));
    }
    findings
}

fn finding(
    name: &'static str,
    available: Option<bool>,
    detail: impl Into<String>,
    consequence: &str,
) -> Finding {
    Finding { name, available, detail: detail.into(), consequence: consequence.to_owned() }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Opens a device for reading and writing and says in words how that went.
fn open_device(path: &str) -> Result<File, String> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|err| match err.kind() {
        ErrorKind::NotFound => format!("{path} is missing"),
        ErrorKind::PermissionDenied => format!("{path}: no permission"),
        _ => format!("{path}: {err}"),
    })
}

fn device(name: &'static str, path: &str, with: &str, without: &str) -> Finding {
    match open_device(path) {
        Ok(_) => finding(name, Some(true), path, with),
        Err(detail) => finding(name, Some(false), detail, without),
    }
}

/// Speeds of both engines and what follows from them.
fn engines() -> [Finding; 4] {
    let soft_mips = engines::soft_mips();
    let kvm = KvmEngine::default();
    let calibration = kvm.calibrate().map_err(|err| err.to_string());
    let soft = match (SoftEngine.probe(), &soft_mips) {
        (Probe::Available { .. }, Ok(mips)) => {
            let models: Vec<String> = SoftEngine.cpu_models().iter().map(CpuModel::to_string).collect();
            let detail = format!(
                "kernel and user mode {mips:.0} million instructions/s; cpu models {}",
                models.join(", ")
            );
            finding("engine soft", Some(true), detail, "guests can run in software")
        }
        (Probe::Unavailable { reason }, _) => {
            finding("engine soft", Some(false), reason, "no guest can run without KVM")
        }
        (_, Err(reason)) => finding("engine soft", Some(false), reason, "no guest can run without KVM"),
    };
    let speeds = match &calibration {
        Ok(speeds) => {
            let detail = format!(
                "kernel mode {:.1}, user mode {:.0} million instructions/s",
                speeds.kernel_mips, speeds.user_mips
            );
            let consequence = if speeds.kernel_mode_in_hardware {
                "--engine kvm runs guests on the processor"
            } else {
                "this KVM emulates kernel mode: --engine kvm runs that in software and user mode on the processor"
            };
            finding("engine kvm", Some(true), detail, consequence)
        }
        Err(err) => finding("engine kvm", Some(false), err.as_str(), "guests run in software"),
    };
    let capabilities = match kvm.missing_capabilities() {
        Ok(missing) if missing.is_empty() => {
            finding("kvm capabilities", Some(true), "all that harrier can use", "nothing is missing")
        }
        Ok(missing) => finding(
            "kvm capabilities",
            Some(true),
            format!("all that are needed; without {}", missing.join(" ")),
            "harrier does without those",
        ),
        Err(err) => finding("kvm capabilities", Some(false), err.to_string(), "--engine kvm is refused"),
    };
    let choice = engines::choose(calibration, || soft_mips);
    let taken = finding("engine auto", None, choice.reason, "what harrier run takes without --engine");
    [soft, speeds, capabilities, taken]
}

fn guest() -> Finding {
    match guest_files::find() {
        Ok(files) => {
            let dir = files.kernel.parent().unwrap_or(&files.kernel).display().to_string();
            finding("guest kernel", Some(true), dir, "harrier run works without --kernel")
        }
        Err(err) => finding(
            "guest kernel",
            Some(false),
            err.to_string(),
            "harrier run needs --kernel and --initrd until then",
        ),
    }
}

/// Which Linux this is, and which KVM it has loaded.
fn host_kernel() -> Finding {
    let uname = rustix::system::uname();
    let mut modules: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    modules.sort();
    let kvm = if modules.is_empty() { "no kvm module".to_owned() } else { modules.join(" ") };
    let detail =
        format!("{} {}; {kvm}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy());
    finding("host kernel", None, detail, "kvm_intel uses VT-x, kvm_amd SVM; others emulate kernel mode")
}

fn cpus() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']));
    finding("cpus", None, format!("{count} x {model}"), "more virtual cpus than that take turns")
}

fn cpu_level() -> Finding {
    let v2 = [
        ("sse3", is_x86_feature_detected!("sse3")),
        ("ssse3", is_x86_feature_detected!("ssse3")),
        ("sse4.1", is_x86_feature_detected!("sse4.1")),
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("popcnt", is_x86_feature_detected!("popcnt")),
        ("cmpxchg16b", is_x86_feature_detected!("cmpxchg16b")),
    ];
    let v3 = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("bmi1", is_x86_feature_detected!("bmi1")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("fma", is_x86_feature_detected!("fma")),
        ("lzcnt", is_x86_feature_detected!("lzcnt")),
        ("movbe", is_x86_feature_detected!("movbe")),
    ];
    let v4 = [
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512cd", is_x86_feature_detected!("avx512cd")),
        ("avx512dq", is_x86_feature_detected!("avx512dq")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
    ];
    let levels: [&[(&str, bool)]; 3] = [&v2, &v3, &v4];
    let reached = 1 + levels.iter().take_while(|level| level.iter().all(|(_, there)| *there)).count();
    let missing: Vec<&str> = levels
        .get(reached - 1)
        .map(|level| level.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect())
        .unwrap_or_default();
    let detail = if missing.is_empty() {
        format!("x86-64-v{reached}")
    } else {
        format!("x86-64-v{reached}; v{} lacks {}", reached + 1, missing.join(" "))
    };
    finding("cpu level", None, detail, "the highest --cpu-model that this processor could give")
}

fn memory() -> Finding {
    let available = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).map(str::to_owned)?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    let total = ByteSize(host_memory_bytes());
    let detail = match available {
        Some(kib) => format!("{total}, {} available", ByteSize(kib << 10)),
        None => total.to_string(),
    };
    finding("memory", None, detail, "a guest may have up to that; pages are taken when they are used")
}

fn huge_pages() -> Finding {
    let state = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_else(|| "unknown".to_owned());
    let chosen = state.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    let on = matches!(chosen.as_str(), "always" | "madvise");
    finding(
        "huge pages",
        Some(on),
        chosen.clone(),
        match chosen.as_str() {
            "always" => "guest memory may use large pages: faster, and an idle machine takes more",
            "madvise" => "the parts of guest memory that a kernel uses all of have large pages",
            _ => "guest memory uses pages of 4K",
        },
    )
}

fn memfd() -> Finding {
    match memfd_create("harrier-doctor", MemfdFlags::CLOEXEC) {
        Ok(_) => finding("memfd", Some(true), "works", "the software engine can make code"),
        Err(err) => finding(
            "memfd",
            Some(false),
            err.to_string(),
            "the software engine does not run: allow memfd_create",
        ),
    }
}

fn userfaultfd() -> Finding {
    let with = "restored memory can come page by page from elsewhere";
    let without = "restored memory comes by mapping files";
    if open_device("/dev/userfaultfd").is_ok() {
        return finding("userfaultfd", Some(true), "/dev/userfaultfd", with);
    }
    match read("/proc/sys/vm/unprivileged_userfaultfd").as_deref() {
        Some("1") => finding("userfaultfd", Some(true), "unprivileged, all faults", with),
        Some(_) => finding("userfaultfd", Some(false), "user-mode faults only, without privileges", without),
        None => finding("userfaultfd", Some(false), "not in this kernel", without),
    }
}

fn tun() -> Finding {
    device(
        "tun",
        "/dev/net/tun",
        "network devices for guests are possible (a tap needs CAP_NET_ADMIN or one made beforehand)",
        "no network devices for guests through the host's kernel",
    )
}

fn vhost_vsock() -> Finding {
    device(
        "vhost-vsock",
        "/dev/vhost-vsock",
        "not needed: harrier's vsock is its own",
        "not needed: harrier's vsock is its own",
    )
}

fn landlock() -> Finding {
    match host_calls::landlock_abi() {
        Ok(abi) => {
            finding("landlock", Some(true), format!("ABI {abi}"), "the monitor can give up access to files")
        }
        Err(err) => {
            finding("landlock", Some(false), err.to_string(), "the monitor keeps its user's access to files")
        }
    }
}

fn seccomp() -> Finding {
    let actions = read("/proc/sys/kernel/seccomp/actions_avail");
    match actions {
        Some(_) => {
            finding("seccomp", Some(true), "filters work", "the monitor's threads can give up system calls")
        }
        None => finding(
            "seccomp",
            Some(false),
            "not in this kernel",
            "the monitor's threads keep all system calls",
        ),
    }
}

fn user_namespaces() -> Finding {
    let most =
        read("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let clone = read("/proc/sys/kernel/unprivileged_userns_clone").is_none_or(|text| text == "1");
    let restricted =
        read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").is_some_and(|text| text == "1");
    if most > 0 && clone && !restricted {
        finding("user namespaces", Some(true), format!("up to {most}"), "isolation without root is possible")
    } else {
        finding(
            "user namespaces",
            Some(false),
            "switched off for users",
            "isolation beyond landlock and seccomp needs root",
        )
    }
}

fn cgroup_v2() -> Finding {
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        if let Some(controllers) = read(&format!("{root}/cgroup.controllers")) {
            let list = if controllers.is_empty() { "no controllers".to_owned() } else { controllers };
            return finding(
                "cgroup v2",
                Some(true),
                format!("{root}: {list}"),
                "guests' processor and memory can be limited",
            );
        }
    }
    finding("cgroup v2", Some(false), "not mounted", "limits for guests only by --cpus and --memory")
}

/// Tries it with two files that have no name.
fn reflink(name: &'static str, dir: &Path, what: &str) -> Finding {
    let existing = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let unnamed = || {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::open(existing, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode).map(File::from)
    };
    let shown = existing.display();
    let result = unnamed().and_then(|mut from| {
        // A clone of nothing would succeed anywhere.
        from.write_all(&[0xa5; 4096]).map_err(|_| rustix::io::Errno::IO)?;
        let to = unnamed()?;
        rustix::fs::ioctl_ficlone(&to, &from)
    });
    match result {
        Ok(()) => finding(name, Some(true), shown.to_string(), &format!("{what} cost no space")),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOTTY | rustix::io::Errno::INVAL) => {
            finding(name, Some(false), shown.to_string(), &format!("{what} take the space of what they hold"))
        }
        Err(err) => finding(
            name,
            Some(false),
            format!("{shown}: {err}"),
            &format!("{what} may not be possible there"),
        ),
    }
}
