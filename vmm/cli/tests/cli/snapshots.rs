//! Machines that are kept and go on later, as a user does it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::machines::Machines;
use crate::support::{Code, KernelFile, cache};

/// A guest's kernel and initramfs, as `cargo xtask setup` leaves them.
pub(crate) fn guest() -> (PathBuf, PathBuf) {
    let folder = cache().join("guest/agent-3");
    (folder.join("vmlinux"), folder.join("initramfs.cpio"))
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn kvm_is_there(machines: &Machines) -> bool {
    let doctor: Value = serde_json::from_str(&machines.good(&["doctor", "--json"])).unwrap();
    let there = doctor.to_string().contains("\"kvm\"") && Path::new("/dev/kvm").exists();
    if !there {
        eprintln!("skipped: the kvm engine is not available: the machine goes on in software only");
    }
    there
}

/// Boots Linux with a shell script as its first process. The script's output is the console's.
fn boot_script(machines: &Machines, name: &str, cpus: &str, script: &str) {
    let (kernel, initramfs) = guest();
    let words = format!("rdinit=/bin/busybox quiet -- sh -c \"{script}\"");
    let args = ["run", "-d", "--name", name, "--cpus", cpus, "--memory", "128M", "--cpu-model", "v1"];
    let files = ["--kernel", text(&kernel), "--initrd", text(&initramfs), "--cmdline", &words];
    machines.good(&[&args[..], &files].concat());
}

pub(crate) fn wait_for_line(machines: &Machines, name: &str, line: &str) {
    crate::machines::eventually(&format!("{name} says {line}"), || {
        machines.run(&["logs", name]).1.lines().any(|said| said.trim_end() == line)
    });
}

/// The lines of the script, without the kernel's.
pub(crate) fn lines(console: &str, mark: &str) -> Vec<String> {
    console.lines().map(str::trim_end).filter(|line| line.starts_with(mark)).map(str::to_owned).collect()
}

/// Every step of a chain of checksums is printed: one that is lost, doubled or wrong shows.
const CHAIN: &str = "b=/bin/busybox; s=0; i=0; while [ $i -lt 60 ]; do s=$(echo $s $i | $b md5sum | $b cut -c1-8); \
                     i=$((i+1)); echo step $i $s; $b usleep 20000; done; echo step end; $b poweroff -f";

/// What the script prints, made here.
fn expected_chain() -> Vec<String> {
    let script =
        CHAIN.replace("b=/bin/busybox", "b=").replace("$b usleep 20000", ":").replace("$b poweroff -f", ":");
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.ends_with("step end\n"), "{said}");
    said.lines().map(str::to_owned).collect()
}

#[test]
fn linux_goes_on_in_the_middle_of_its_work_on_either_engine_and_again_and_again() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let folder = |name: &str| kept.path().join(name);
    boot_script(&machines, "job", "1", CHAIN);
    wait_for_line(&machines, "job", &expected_chain()[4]);
    let first = folder("first");
    machines.good(&["snapshot", "job", "--to", text(&first)]);
    // It goes on, and a difference needs what it is one to.
    let second = folder("second");
    machines.good(&["snapshot", "job", "--to", text(&second), "--diff"]);
    let needed = machines.bad(&["snapshots", "rm", text(&first)]);
    assert!(needed.contains("is needed by second"), "{needed}");
    machines.good(&["kill", "job"]);
    let before = lines(&machines.good(&["logs", "job"]), "step");
    assert!(before.len() < 60, "it was ended in the middle: {before:?}");

    let engines: &[&str] = if kvm_is_there(&machines) { &["soft", "kvm"] } else { &["soft"] };
    for engine in engines {
        for (index, from) in [&first, &second].into_iter().enumerate() {
            let name = format!("{engine}-{index}");
            machines.good(&["restore", text(from), "-d", "--name", &name, "--engine", engine]);
            // A restored machine is kept and restored in its turn, on the first engine.
            let again = folder(&format!("again-{name}"));
            machines.good(&["snapshot", &name, "--to", text(&again)]);
            machines.good(&["kill", &name]);
            let said = lines(&machines.good(&["logs", &name]), "step");
            let (code, rest, _) =
                machines.run(&["restore", text(&again), "--engine", "soft", "--timeout", "60s"]);
            assert_eq!(code, 125, "a plain boot ends by switching itself off: {rest}");
            let rest = lines(&rest, "step");
            let expected = expected_chain();
            let tail = expected.len() - rest.len();
            assert_eq!(rest, expected[tail..], "{name}");
            assert!(said.is_empty() || expected.ends_with(&rest), "{name}: {said:?}");
            assert_eq!(machines.good(&["snapshots", "verify", text(&again)]).matches("whole").count(), 1);
        }
    }
}

#[test]
fn a_command_goes_on_where_it_was_with_its_output_and_its_exit_code() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let script = "trap 'exit 9' USR1; i=0; while [ $i -lt 60 ]; do echo step $i; echo err $i >&2; i=$((i+1)); \
                  usleep 50000; done; cat; exit 7";
    machines.good(&[
        "run",
        "-d",
        "--name",
        "job",
        "--memory",
        "128M",
        "--cpu-model",
        "v1",
        "--",
        "sh",
        "-c",
        script,
    ]);
    wait_for_line(&machines, "job", "step 3");
    let target = kept.path().join("job");
    machines.good(&["snapshot", "job", "--to", text(&target)]);
    // The machine itself goes on, and its session knows nothing of the copies.
    assert_eq!(machines.run(&["wait", "job"]).1.trim(), "7");
    let (_, whole, _) = machines.run(&["logs", "job"]);
    assert_eq!(lines(&whole, "step").len(), 60, "{whole}");

    let engines: &[&str] = if kvm_is_there(&machines) { &["kvm", "soft"] } else { &["soft"] };
    for engine in engines {
        let (code, out, err) =
            machines.run(&["restore", text(&target), "--engine", engine, "--timeout", "60s"]);
        assert_eq!(code, 7, "{engine}: {err}");
        let steps = lines(&out, "step");
        let expected: Vec<String> = (60 - steps.len()..60).map(|i| format!("step {i}")).collect();
        assert!(steps.len() < 60 && steps == expected, "{engine}: {out}");
        assert_eq!(lines(&err, "err").last().map(String::as_str), Some("err 59"), "{engine}: {err}");
    }

    // Signals and further commands reach it, too.
    machines.good(&["restore", text(&target), "-d", "--name", "again"]);
    assert_eq!(machines.good(&["exec", "again", "--", "echo", "beside"]).trim(), "beside");
    machines.good(&["kill", "again", "--signal", "USR1"]);
    assert_eq!(machines.run(&["wait", "again"]).1.trim(), "9");
}

#[test]
fn a_stream_in_the_middle_of_a_hand_over_between_engines_loses_and_doubles_nothing() {
    const LAST: u32 = 2_000_000;
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let path = |name: &str| kept.path().join(name);
    let whole: String = (1..=LAST).map(|number| format!("{number}\n")).collect();
    let other = if kvm_is_there(&machines) { "kvm" } else { "soft" };
    let args = ["run", "-d", "--name", "first", "--engine", "soft", "--memory", "128M", "--cpu-model", "v1"];
    machines.good(&[&args[..], &["--", "seq", &LAST.to_string()]].concat());
    // What a machine has printed when a snapshot of it was taken in the middle, and it was killed.
    let flows_until_kept = |name: &str, target: &str| {
        crate::machines::eventually(&format!("{name} prints"), || {
            machines.inspect(name)["output"]["stdout_bytes"].as_u64().is_some_and(|bytes| bytes > 300_000)
        });
        machines.good(&["snapshot", name, "--to", text(&path(target))]);
        machines.run(&["kill", name]);
        machines.run(&["wait", name]);
        machines.good(&["logs", name])
    };
    let first = flows_until_kept("first", "a");
    machines.good(&["restore", text(&path("a")), "-d", "--name", "second", "--engine", other]);
    let second = flows_until_kept("second", "b");
    let (code, third, err) =
        machines.run(&["restore", text(&path("b")), "--engine", "soft", "--timeout", "120s"]);
    assert_eq!(code, 0, "{err}");
    assert!(whole.starts_with(&first), "the first one's is from the beginning on");
    let begins = whole.find(&second).expect("a piece of the stream");
    assert!(begins > 0 && begins <= first.len(), "{begins} after {}", first.len());
    assert!(whole.ends_with(&third) && !third.is_empty());
    let rest = whole.len() - third.len();
    assert!(rest > begins && rest <= begins + second.len(), "{rest} after {}", begins + second.len());
}

#[test]
fn two_processors_go_on_together() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let script = "b=/bin/busybox; $b mkdir -p /dev; $b mount -t devtmpfs d /dev; w() { i=0; while [ $i -lt 100 ]; do i=$((i+1)); $b true; $b usleep 10000; done; echo \
                  worker $1 done; }; w a & w b & $b sleep 0.3; echo begun; wait; echo all done; $b poweroff -f";
    boot_script(&machines, "pair", "2", script);
    wait_for_line(&machines, "pair", "begun");
    let target = kept.path().join("pair");
    machines.good(&["snapshot", "pair", "--to", text(&target)]);
    machines.good(&["kill", "pair"]);
    let engines: &[&str] = if kvm_is_there(&machines) { &["kvm", "soft"] } else { &["soft"] };
    for engine in engines {
        let (_, said, _) = machines.run(&["restore", text(&target), "--engine", engine, "--timeout", "60s"]);
        let workers = lines(&said, "worker");
        assert_eq!(workers.len(), 2, "{engine}: {said}");
        assert!(!lines(&said, "all done").is_empty(), "{engine}: {said}");
    }
}

#[test]
fn disks_are_kept_with_the_memory_and_never_shared() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let disk = kept.path().join("disk");
    std::fs::write(&disk, vec![0u8; 1 << 20]).unwrap();
    let (kernel, initramfs) = guest();
    let script = "b=/bin/busybox; $b mkdir -p /d; $b mount -t devtmpfs d /d; put() { echo $1 | $b dd of=/d/vda bs=512 \
                  seek=$2 conv=notrunc,sync,fsync 2>/dev/null; }; get() { $b dd if=/d/vda bs=512 skip=$1 count=1 \
                  iflag=direct 2>/dev/null | $b head -n 1; }; put before 0; echo ready; $b sleep 2; echo disk $(get 0) \
                  $(get 1); put after 1; echo disk $(get 1); $b poweroff -f";
    let words = format!("rdinit=/bin/busybox quiet -- sh -c \"{script}\"");
    let args = ["run", "-d", "--name", "store", "--memory", "128M", "--disk", text(&disk)];
    let files = ["--kernel", text(&kernel), "--initrd", text(&initramfs), "--cmdline", &words];
    machines.good(&[&args[..], &files].concat());
    wait_for_line(&machines, "store", "ready");
    let target = kept.path().join("snapshot");
    machines.good(&["snapshot", "store", "--to", text(&target)]);
    // The machine itself writes on.
    let (_, ended, _) = machines.run(&["wait", "store"]);
    assert_eq!(ended, "125\n", "a plain boot ends by switching itself off");
    let own = lines(&machines.good(&["logs", "store"]), "disk");
    assert_eq!(own, ["disk before", "disk after"]);
    for _ in 0..2 {
        let (_, said, _) = machines.run(&["restore", text(&target), "--timeout", "60s"]);
        assert_eq!(lines(&said, "disk"), own, "{said}");
    }
    assert!(machines.good(&["snapshots", "verify", text(&target)]).contains("whole"));
}

#[test]
fn compressed_memory_goes_on_on_either_engine_as_clones_and_in_differences() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let path = |name: &str| kept.path().join(name);
    boot_script(&machines, "job", "1", CHAIN);
    wait_for_line(&machines, "job", &expected_chain()[4]);
    machines.good(&["snapshot", "job", "--to", text(&path("plain"))]);
    machines.good(&["snapshot", "job", "--to", text(&path("small")), "--compress"]);
    machines.good(&["snapshot", "job", "--to", text(&path("diff")), "--compress", "--diff"]);
    machines.good(&["rm", "-f", "job"]);
    use std::os::unix::fs::MetadataExt as _;
    let stored = |name: &str| std::fs::metadata(path(name).join("memory")).unwrap().blocks() * 512;
    assert!(stored("small") * 2 < stored("plain"), "{} of {}", stored("small"), stored("plain"));
    assert!(stored("diff") < stored("small"));
    let expected = expected_chain();
    let engines: &[&str] = if kvm_is_there(&machines) { &["soft", "kvm"] } else { &["soft"] };
    for engine in engines {
        for name in ["small", "diff"] {
            let (_, said, _) =
                machines.run(&["restore", text(&path(name)), "--engine", engine, "--timeout", "60s"]);
            let said = lines(&said, "step");
            assert!(said.len() > 10 && expected.ends_with(&said), "{name} on {engine}: {said:?}");
        }
    }
    machines.good(&["fork", text(&path("diff")), "-n", "2", "--name", "kid"]);
    for name in ["kid-0", "kid-1"] {
        machines.run(&["wait", name]);
        let said = lines(&machines.good(&["logs", name]), "step");
        assert!(said.len() > 10 && expected.ends_with(&said), "{name}: {said:?}");
    }
    assert!(machines.good(&["snapshots", "verify", text(&path("diff"))]).contains("whole"));
    // What is damaged never becomes a machine's memory.
    let memory = path("small").join("memory");
    let mut bytes = std::fs::read(&memory).unwrap();
    bytes[1000] ^= 1;
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, bytes).unwrap();
    let refused = machines.bad(&["restore", text(&path("small"))]);
    let begin = format!("harrier: snapshot '{}' is damaged: memory at offset 0", path("small").display());
    assert!(refused.starts_with(&begin), "{refused}");
}

/// Writes a disk and prints the checksum of all of it after each write.
const DISK_CHAIN: &str = "i=0; while [ $i -lt 50 ]; do echo put $i | $b dd of=$d bs=512 seek=$((i*9)) conv=notrunc,sync,fsync \
                          2>/dev/null; i=$((i+1)); echo step $i $($b dd if=$d bs=64k iflag=direct 2>/dev/null | $b md5sum | \
                          $b cut -c1-8); $b usleep 30000; done; echo step end; $b poweroff -f";

#[test]
fn disks_go_on_through_differences_and_engines_and_only_what_changed_is_kept() {
    use std::os::unix::fs::MetadataExt as _;
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let path = |name: &str| kept.path().join(name);
    let image = vec![b'x'; 256 << 10];
    std::fs::write(path("disk"), &image).unwrap();
    std::fs::write(path("expected"), &image).unwrap();
    let script = DISK_CHAIN.replace("$b usleep 30000", ":").replace("$b poweroff -f", ":").replace("$b ", "");
    let script = script.replace("$d", text(&path("expected"))).replace(" iflag=direct", "");
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let expected: Vec<String> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(expected.len(), 51);

    let (kernel, initramfs) = guest();
    let words = format!(
        "rdinit=/bin/busybox quiet -- sh -c \"b=/bin/busybox; d=/d/vda; $b mkdir -p /d; $b mount -t devtmpfs d /d; {DISK_CHAIN}\""
    );
    let args = ["run", "-d", "--name", "store", "--engine", "soft", "--memory", "128M", "--cpu-model", "v1"];
    let files = ["--kernel", text(&kernel), "--initrd", text(&initramfs), "--cmdline", &words];
    machines.good(&[&args[..], &["--disk", text(&path("disk"))], &files].concat());
    let steps = |name: &str| lines(&machines.run(&["logs", name]).1, "step").len();
    let other = if kvm_is_there(&machines) { "kvm" } else { "soft" };
    let take = |name: &str, target: &str, more: &[&str]| {
        crate::machines::eventually(&format!("{name} goes on"), || steps(name) >= 2);
        machines.good(&[&["snapshot", name, "--to", text(&path(target))][..], more].concat());
    };
    take("store", "a", &[]);
    let before = steps("store");
    crate::machines::eventually("store goes on", || steps("store") > before + 2);
    take("store", "b", &["--diff"]);
    machines.good(&["rm", "-f", "store"]);
    machines.good(&["restore", text(&path("b")), "-d", "--name", "second", "--engine", other]);
    take("second", "c", &["--diff"]);
    machines.good(&["rm", "-f", "second"]);
    for name in ["b", "c"] {
        let layer = std::fs::metadata(path(name).join("disk-0.layer")).unwrap();
        assert!(layer.blocks() * 512 < image.len() as u64 / 2, "{name} has {} blocks", layer.blocks());
    }
    assert!(machines.good(&["snapshots", "verify", text(&path("c"))]).contains("whole"));
    let goes_on = |name: &str, engine: &str| {
        let (_, said, _) =
            machines.run(&["restore", text(&path(name)), "--engine", engine, "--timeout", "60s"]);
        let said = lines(&said, "step");
        assert!(said.len() > 5 && expected.ends_with(&said), "{name} on {engine}: {said:?}");
    };
    goes_on("c", "soft");
    // What the second machine wrote is not in its own snapshot.
    goes_on("b", "soft");
    goes_on("c", other);
    machines.good(&["snapshots", "compact", text(&path("c"))]);
    goes_on("c", "soft");
}

#[test]
fn snapshots_are_listed_shown_checked_and_removed() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    machines.good(&["run", "-d", "--name", "small", "--memory", "32M", "--kernel", &kernel.path]);
    let base = kept.path().join("base");
    let taken: Value =
        serde_json::from_str(&machines.good(&["snapshot", "small", "--to", text(&base), "--json"])).unwrap();
    assert_eq!(taken["path"].as_str(), base.canonicalize().unwrap().to_str());
    let again = machines.bad(&["snapshot", "small", "--to", text(&base)]);
    assert!(again.contains("exists already"), "{again}");
    machines.good(&["pause", "small"]);
    let diff = kept.path().join("diff");
    machines.good(&["snapshot", "small", "--to", text(&diff), "--diff"]);
    assert_eq!(machines.inspect("small")["state"], "paused", "one that is paused stays so");
    let other = kept.path().join("other");
    machines.good(&["snapshot", "small", "--to", text(&other), "--resume"]);
    assert_eq!(machines.inspect("small")["state"], "running");
    let listed: Value =
        serde_json::from_str(&machines.good(&["snapshots", "ls", text(kept.path()), "--json"])).unwrap();
    let parent = |index: usize| listed[index]["manifest"]["parent"]["name"].as_str().map(str::to_owned);
    assert_eq!([parent(0), parent(1), parent(2)], [None, Some("base".to_owned()), None]);
    let table = machines.good(&["snapshots", "ls", text(kept.path())]);
    assert_eq!(table.lines().count(), 4, "{table}");
    let shown: Value = serde_json::from_str(&machines.good(&["snapshots", "inspect", text(&diff)])).unwrap();
    assert_eq!(shown[0]["machine"]["memory_bytes"], 32 << 20);
    assert!(shown[0]["sections"]["cpu-0"]["regs"]["rip"].is_number(), "{shown}");
    let alone = kept.path().join("alone");
    machines.good(&["snapshot", "small", "--to", text(&alone), "--diff"]);
    assert_eq!(machines.good(&["snapshots", "compact", text(&alone)]).trim(), text(&alone));
    machines.good(&["snapshots", "rm", text(&alone)]);
    let memory = base.join("memory");
    std::fs::set_permissions(&memory, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 12 << 20).unwrap();
    let (code, said, _) = machines.run(&["snapshots", "verify", text(&diff), text(&other)]);
    assert_eq!(code, 125, "{said}");
    assert!(said.contains("base: memory at offset 12582912") && said.contains("other: whole"), "{said}");
    machines.good(&["snapshots", "rm", text(&base), text(&diff), text(&other)]);
    assert_eq!(std::fs::read_dir(kept.path()).unwrap().count(), 0);
    let none = machines.bad(&["restore", text(&base)]);
    assert!(none.contains("is no snapshot: there is no such folder"), "{none}");
    let unnamed = machines.bad(&["snapshot", "nobody"]);
    assert!(unnamed.contains("nobody"), "{unnamed}");
}
