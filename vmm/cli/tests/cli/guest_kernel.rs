//! The default guest's kernel: what its patches do in Harrier, on each engine, and that they do nothing elsewhere. That a
//! kernel without them boots in Harrier is `an_unmodified_distribution_kernel_boots_as_bzimage_and_as_vmlinux`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{cache, harrier, output, wait};

/// The engines that can run here; without KVM it is said that its half was skipped.
pub(crate) fn engines() -> Vec<&'static str> {
    let kvm = Path::new("/dev/kvm").exists();
    if !kvm {
        eprintln!("skipped: nothing runs on KVM, there is no /dev/kvm");
    }
    ["soft", "kvm"].into_iter().filter(|name| kvm || *name == "soft").collect()
}

/// Whether the engine runs only user code on the processor, once there is enough of it.
pub(crate) fn lends(engine: &str) -> bool {
    count(&run(engine, &[], "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"), "loans") > 0
}

/// What is known about a run of a shell script that ends well.
fn run(engine: &str, options: &[&str], script: &str) -> Value {
    let args = [&["run", "--json", "--engine", engine], options, &["--", "sh", "-c", script]].concat();
    let output = output(&args);
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(record["exit_code"], 0, "{engine}: {record}");
    record
}

fn count(record: &Value, name: &str) -> u64 {
    record[name].as_u64().unwrap()
}

/// Processors, disks and the serial port's input are there whichever way the kernel finds its devices.
#[test]
fn devices_are_found_by_hypercall_and_by_acpi() {
    let folder = tempfile::tempdir().unwrap();
    let disks: Vec<_> = (0..8u8)
        .map(|number| {
            let path = folder.path().join(format!("disk{number}"));
            std::fs::write(&path, vec![b'0' + number; 4096]).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    for engine in engines() {
        for (words, interpreter) in [("", "disabled"), ("harrier_acpi", "enabled")] {
            let mut options = vec!["--cpus", "2", "--cmdline", words];
            options.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
            // More than eight virtio devices: the last ones have the interrupts of ISA.
            let script = "nproc; dmesg | grep -o 'ACPI: Interpreter [a-z]*'; grep -c virtio /proc/interrupts; \
                          for disk in a b c d e f g h; do head -c 1 /dev/vd$disk; done";
            let record = run(engine, &options, script);
            let lines: Vec<_> = record["stdout"].as_str().unwrap().lines().collect();
            let said = format!("ACPI: Interpreter {interpreter}");
            assert_eq!(lines[..2], ["2", said.as_str()], "{engine}: {record}");
            assert!(lines[2].parse::<u32>().unwrap() > 8, "{engine}: {record}");
            assert_eq!(lines[3], "01234567", "{engine}: {record}");
        }
    }
}

/// The kernel keeps pages of the initramfs where they are and calls them a file's: they are whole, can be changed, and are
/// free when the file is gone.
#[test]
fn a_file_of_the_initramfs_is_a_file_as_any_other() {
    // What runs is busy, so a copy does it.
    let script = r#"cp /bin/busybox /tmp/busybox && cmp /tmp/busybox /bin/busybox && exec /tmp/busybox sh -c '
        b=/tmp/busybox
        shmem() { $b sed -n "s/^Shmem: *\([0-9]*\) kB/\1/p" /proc/meminfo; }
        shmem
        $b truncate -s 5000 /bin/busybox
        $b truncate -s 9000 /bin/busybox
        $b head -c 5000 /bin/busybox > /tmp/begin
        $b head -c 5000 $b | $b cmp - /tmp/begin && echo kept
        $b tail -c 4000 /bin/busybox | $b tr -d "\000" | $b wc -c
        printf changed | $b dd of=/bin/busybox bs=1 seek=4092 conv=notrunc 2> /dev/null
        $b tail -c +4093 /bin/busybox | $b head -c 7; echo
        $b rm /bin/busybox /tmp/begin
        shmem'"#;
    for engine in engines() {
        let record = run(engine, &[], script);
        let lines: Vec<_> = record["stdout"].as_str().unwrap().lines().collect();
        assert_eq!(lines[1..4], ["kept", "0", "changed"], "{engine}: {record}");
        let shmem = |line: &str| line.parse::<u64>().unwrap();
        assert!(shmem(lines[0]) > shmem(lines[4]) + 1000, "{engine}: {record}");
    }
}

#[test]
fn the_guest_marks_its_phases_and_prints_by_the_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("console");
    for engine in engines() {
        let console = ["--console", file.to_str().unwrap()];
        let record = run(engine, &console, "ls /dev/harrier; seq 5000 > /dev/ttyS0");
        assert_eq!(record["stdout"], "/dev/harrier\n");
        let marks: Vec<_> =
            record["marks"].as_array().unwrap().iter().map(|mark| mark["phase"].as_u64().unwrap()).collect();
        assert_eq!(marks, [1, 2, 3, 4, 5, 6, 7, 8], "{engine}");

        let expected: String = (1..=5000).map(|number| format!("{number}\r\n")).collect();
        let printed = std::fs::read_to_string(&file).unwrap();
        let rest = printed.strip_prefix(&expected);
        // A kernel that comes to switching off before its monitor ends says so.
        assert!(
            rest.is_some_and(|rest| rest.lines().all(|line| line.ends_with("reboot: Power down"))),
            "{engine}: {printed}"
        );
        let (calls, accesses) = (count(&record, "console_calls"), count(&record, "device_accesses"));
        assert!(calls > 0 && accesses < expected.len() as u64 / 10, "{engine}: {calls}, {accesses}");
    }
}

#[test]
fn no_clock_has_to_be_calibrated_and_idle_can_park() {
    for engine in engines() {
        // Without kvm-clock and PIT there is nothing to calibrate against.
        let options = ["--cmdline", "no-kvmclock lapic=notscdeadline harrier_park"];
        let record = run(engine, &options, "sleep 0.2; date +%s");
        assert!(count(&record, "parks") > 0, "{engine}: {record}");
        let guest: u64 = record["stdout"].as_str().unwrap().trim().parse().unwrap();
        let host = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert!(host.abs_diff(guest) < 60, "{engine}: {guest} and {host}");
    }
}

/// Resident guest memory of a machine, in MiB: what is left out of core dumps ("dd", proc_pid_smaps(5)).
fn resident_mib(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut sum, mut kib) = (0, 0);
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            kib = size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        } else if line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|flag| flag == "dd"))
        {
            sum += kib;
        }
    }
    assert!(sum > 0, "no guest memory in {maps}");
    sum / 1024
}

#[test]
fn memory_that_a_job_has_freed_goes_back_to_the_host() {
    let script = "echo before; read line; dd if=/dev/zero of=/tmp/a bs=1M count=256 2>/dev/null; echo touched; read line; \
                  rm /tmp/a; echo freed; read line; dd if=/dev/zero of=/tmp/b bs=1M count=64 2>/dev/null; \
                  tr -d '\\0' < /tmp/b | wc -c";
    let mut child =
        harrier(&["run", "--quiet", "--", "sh", "-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "before");
    let before = resident_mib(child.id());
    writeln!(input).unwrap();
    assert_eq!(lines.next().unwrap(), "touched");
    let touched = resident_mib(child.id());
    assert!(touched >= before + 200, "{before} and {touched} MiB");
    writeln!(input).unwrap();
    assert_eq!(lines.next().unwrap(), "freed");
    let deadline = Instant::now() + Duration::from_secs(80);
    while resident_mib(child.id()) > before + before / 10 {
        assert!(Instant::now() < deadline, "{} of {touched} MiB are resident", resident_mib(child.id()));
        std::thread::sleep(Duration::from_millis(100));
    }
    writeln!(input).unwrap();
    assert_eq!(lines.next().unwrap(), "0", "what is used again holds what was written");
    assert_eq!(wait(child).status.code(), Some(0));
}

#[test]
fn the_kernel_keeps_to_the_features_that_it_is_told() {
    let options =
        ["--cpu-model", "v3", "--cmdline", "harrier.cpuid=1d:fff7ffff,1c:81202000,7b:202,x1c:400001,d1a:0"];
    let record = run("soft", &options, "grep -m1 flags /proc/cpuinfo; env");
    let stdout = record["stdout"].as_str().unwrap();
    let flags: Vec<_> = stdout.lines().next().unwrap().split(' ').collect();
    assert!(flags.contains(&"sse2") && flags.contains(&"cx16"), "{stdout}");
    for hidden in ["clflush", "avx", "avx2", "xsave", "bmi1", "popcnt", "sse4_2"] {
        assert!(!flags.contains(&hidden), "{hidden}: {stdout}");
    }
    assert!(!stdout.contains("harrier.cpuid"), "the word is the kernel's, not init's");
}

#[test]
fn where_the_processor_shows_itself_as_it_is_the_guest_is_asked_to_keep_to_the_model() {
    for engine in engines() {
        let record =
            run(engine, &["--cpu-model", "v2"], "cat /proc/cmdline; env; grep -m1 flags /proc/cpuinfo");
        // User code is lent to the processor only where KVM does not run kernel mode there.
        let asked = lends(engine);
        let stdout = record["stdout"].as_str().unwrap();
        let kernel = stdout.lines().next().unwrap().starts_with("harrier.cpuid=1d:");
        let library = stdout.lines().any(|line| line.starts_with("GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,"));
        assert_eq!((kernel, library), (asked, asked), "{engine}: {stdout}");
        let flags: Vec<_> = stdout.lines().last().unwrap().split(' ').collect();
        assert!(flags.contains(&"sse4_2") && flags.contains(&"clflush"), "{engine}: {stdout}");
        assert!(!flags.contains(&"avx"), "{engine}: {stdout}");
    }
}

/// As a program of the user's would, through the documented numbers.
#[test]
fn programs_mark_and_end_the_machine_through_the_device() {
    let image = cache().join("rootfs-debian/current/debian.ext4");
    let script = "import fcntl, struct\n\
        device = open('/dev/harrier')\n\
        call = lambda number, size, data: fcntl.ioctl(device, 1 << 30 | size << 16 | 0xbe << 8 | number, data)\n\
        features = fcntl.ioctl(device, 2 << 30 | 16 << 16 | 0xbe << 8 | 1, bytes(16))\n\
        assert struct.unpack('<QII', features)[1] >> 16 == 1\n\
        call(3, 48, struct.pack('<IIQ32s', 0, 0, 77, b'half way'))\n\
        for number, size, data in ((3, 48, struct.pack('<IIQ32s', 0, 1, 0, b'x')), (3, 48, bytes(48)), (8, 48, bytes(48)),\n\
                (7, 40, struct.pack('<II32s', 256, 0, b'x'))):\n\
        \x20   try: call(number, size, data)\n\
        \x20   except OSError as error: print(error.errno)\n\
        print('end', flush=True)\n\
        call(7, 40, struct.pack('<II32s', 41, 0, b'enough'))\n";
    let args = [
        "run",
        "--json",
        "--engine",
        "soft",
        "--rootfs",
        image.to_str().unwrap(),
        "--",
        "python3",
        "-c",
        script,
    ];
    let output = output(&args);
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(record["exit_code"], 41, "{record}");
    // EINVAL for a reserved field, a mark without name and a code that is none; ENOTTY for a number without call.
    assert_eq!(record["stdout"], "22\n22\n25\n22\nend\n", "{record}");
    let named = |mark: &Value| mark["label"] == "half way" && mark["value"] == 77;
    assert!(record["marks"].as_array().unwrap().iter().any(named), "{record}");
}

#[test]
fn the_patched_kernel_boots_elsewhere_as_any_other() {
    const QEMU: &str = "qemu-system-x86_64";
    let guest = cache().join("guest").join(harrier_jobs::protocol::VERSION_TAG);
    let script = "test -e /dev/harrier || echo absent; echo $((6*7)); poweroff -f";
    let append = format!(
        "tsc_early_khz=2000000 {} rdinit=/bin/sh -- -c \"{script}\"",
        include_str!("../../../../guest-kernel/cmdline").trim()
    );
    let run = Command::new("timeout")
        .args(["90", QEMU, "-machine", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "256"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-append", &append, "-kernel"])
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(guest.join("initramfs.cpio"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if run.status.code() == Some(127) {
        eprintln!("skipped: {QEMU} is not installed");
        return;
    }
    let console = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{}: {console}", run.status);
    let lines: Vec<_> = console.lines().map(str::trim).collect();
    let said = lines.iter().position(|line| *line == "absent");
    assert_eq!(said.and_then(|at| lines.get(at + 1)), Some(&"42"), "{console}");
}
