//! Linux with two processors, handed from KVM to software and back in the middle of everything at once: a job that computes,
//! one that starts processes without end, one that writes a disk. What the second engine takes over is what the first one
//! gave, field by field, and every job ends with the right sum.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use harrier_conformance::{engines, relay};
use harrier_devices::virtio::block::Block;
use harrier_engine::{CpuModel, Engine, Probe};
use harrier_machine::boot::{Boot, ElfEntry, FileImage, Image};
use harrier_machine::snapshot::{Kind, Request, Restoration};
use harrier_machine::{Machine, MachineBuilder, MachineConfig, MachineEnd};
use harrier_snapshot::{Chain, Section, Snapshot};

const DEADLINE: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = 16 << 20;

/// Each worker says what it has found; the sums are those of any machine.
const SCRIPT: &str = "b=/bin/busybox; $b mkdir -p /dev; $b mount -t devtmpfs d /dev; \
    processes() { s=0; i=0; while [ $i -lt 60 ]; do s=$(echo $s $i | $b md5sum | $b cut -c1-8); i=$((i+1)); \
    echo step $i; done; echo processes $s; }; \
    computes() { echo computes $($b awk 'BEGIN { for (i = 0; i < 200000; i++) s = (s * 31 + i) % 1000003; print s }'); }; \
    writes() { i=0; while [ $i -lt 12 ]; do $b seq $((i*1000)) $((i*1000+50000)) | $b dd of=/dev/vda bs=64k seek=$i \
    conv=notrunc,fsync 2>/dev/null; i=$((i+1)); done; echo writes $($b dd if=/dev/vda bs=64k count=16 2>/dev/null | \
    $b md5sum | $b cut -c1-8); }; \
    echo begun; processes & computes & writes & wait; echo all done; $b poweroff -f";

/// What the workers find, made here.
fn expected(disk: &Path) -> Vec<String> {
    let script = SCRIPT
        .replace("b=/bin/busybox", "b=")
        .replace("$b mkdir -p /dev; $b mount -t devtmpfs d /dev;", "")
        .replace("/dev/vda", disk.to_str().unwrap())
        .replace("$b poweroff -f", ":");
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    results(&String::from_utf8(output.stdout).unwrap())
}

fn results(said: &str) -> Vec<String> {
    let names = ["processes ", "computes ", "writes "];
    let is_result = |line: &&str| names.iter().any(|name| line.starts_with(name));
    let mut results: Vec<String> =
        said.lines().map(str::trim_end).filter(is_result).map(str::to_owned).collect();
    results.sort();
    results
}

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guest that `cargo xtask setup` leaves, by its newest link.
fn guest_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("HARRIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("harrier")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/harrier")))
        .expect("a cache");
    let links = std::fs::read_dir(cache.join("guest")).expect("cargo xtask setup has been run").flatten();
    let newest = links
        .map(|entry| entry.file_name().into_string().unwrap_or_default())
        .filter_map(|name| name.strip_prefix("agent-")?.parse::<u32>().ok())
        .max();
    cache.join("guest").join(format!("agent-{}", newest.expect("cargo xtask setup has been run")))
}

fn add_devices(builder: &mut MachineBuilder, said: &Said, disk: &Path) {
    builder.add_platform_devices().unwrap();
    let file = std::fs::File::options().read(true).write(true).open(disk).unwrap();
    builder.add_virtio(Box::new(Block::from_file(file, false, b"disk").unwrap())).unwrap();
    builder.add_serial(Box::new(said.clone()), None).unwrap();
    builder.add_doorbell().unwrap();
}

fn boot(engine: &dyn Engine, model: CpuModel, said: &Said, disk: &Path) -> Machine {
    let config = MachineConfig { vcpu_count: 2, memory_bytes: 192 << 20, cpu_model: model };
    let mut builder = MachineBuilder::new(engine, &config).unwrap();
    add_devices(&mut builder, said, disk);
    let kernel = FileImage::open(&guest_folder().join("vmlinux")).unwrap();
    let initrd = FileImage::open(&guest_folder().join("initramfs.cpio")).unwrap();
    let words = include_str!("../../../guest-kernel/cmdline").trim();
    let command_line = &format!("{words} console=ttyS0 quiet rdinit=/bin/busybox -- sh -c \"{SCRIPT}\"");
    let initrd: Option<&dyn Image> = Some(&initrd);
    builder.build(&Boot::Kernel { kernel: &kernel, initrd, command_line, elf_entry: ElfEntry::Auto }).unwrap()
}

fn take(machine: &Machine, target: &Path, kind: Kind) -> Snapshot {
    let report = machine.handle().snapshot(Request {
        target,
        kind,
        stay_paused: true,
        compress: false,
        quiesce_limit: Duration::ZERO,
        rest: None,
        producer: "linux",
        owner: &mut |_| Ok(()),
        settle: &mut || Ok(()),
        progress: &mut |_| true,
    });
    report.unwrap().snapshot
}

/// Devices of a machine before and after, section by section. The clock and what counts its restores differ.
fn same_devices(before: &Snapshot, after: &Snapshot) {
    let devices = |snapshot: &Snapshot| -> Vec<Section> {
        let others = |section: &Section| {
            !(section.name == "machine" || section.name == "rtc" || section.name.starts_with("cpu-"))
        };
        snapshot.sections().unwrap().into_iter().filter(others).collect()
    };
    for (before, after) in devices(before).into_iter().zip(devices(after)) {
        let value = |section: &Section| {
            let mut value: serde_json::Value = serde_json::from_slice(&section.bytes).unwrap();
            if let Some(page) = value.pointer_mut("/calls/clock_page") {
                page.take();
            }
            value
        };
        assert_eq!((&before.name, value(&before)), (&after.name, value(&after)));
    }
}

fn handed_over(route: &[Box<dyn Engine>], model: CpuModel) {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let expected = {
        let own = folder.path().join("expected");
        std::fs::File::create(&own).unwrap().set_len(DISK_BYTES).unwrap();
        expected(&own)
    };
    assert_eq!(expected.len(), 3, "{expected:?}");
    let said = Said::default();
    let mut machine = boot(route[0].as_ref(), model, &said, &disk);
    machine.start().unwrap();
    let steps = |text: &str| text.lines().filter(|line| line.starts_with("step ")).count();
    for leg in 1..=4usize {
        let give_up = Instant::now() + DEADLINE;
        while steps(&said.text()) < leg * 10 {
            let has_ended = machine.handle().wait_for_end(Some(Instant::now())).is_some();
            assert!(!has_ended && Instant::now() < give_up, "{model} leg {leg}: {}", said.text());
            std::thread::sleep(Duration::from_millis(2));
        }
        let kind = if leg % 2 == 0 { Kind::Difference } else { Kind::Full };
        let snapshot = take(&machine, &folder.path().join(format!("leg-{leg}")), kind);
        let before = machine.cpu_states().unwrap();
        drop(machine);
        let engine = route[leg % route.len()].as_ref();
        let chain = Arc::new(Chain::open(snapshot.path()).unwrap());
        let mut builder = MachineBuilder::restoring(engine, &chain).unwrap();
        add_devices(&mut builder, &said, &disk);
        machine = builder.restore(&chain, &Restoration::default()).unwrap();
        if let Err(differences) = relay::same(&before, &machine.cpu_states().unwrap()) {
            panic!("{model} leg {leg} to {}: {differences}", engine.name());
        }
        same_devices(&snapshot, &take(&machine, &folder.path().join(format!("again-{leg}")), Kind::Full));
        // That one left a pause.
        machine.handle().resume();
        machine.start().unwrap();
    }
    let end = machine.handle().wait_for_end(Some(Instant::now() + DEADLINE));
    machine.handle().stop();
    assert_eq!(end, Some(MachineEnd::PowerOff), "{}", said.text());
    assert_eq!(results(&said.text()), expected, "{model}: {}", said.text());
}

fn route() -> Vec<Box<dyn Engine>> {
    let mut there: Vec<_> = engines()
        .into_iter()
        .filter(|engine| match engine.probe() {
            Probe::Available { .. } => true,
            Probe::Unavailable { reason } => {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                false
            }
        })
        .collect();
    // KVM first, where there is one.
    there.reverse();
    there
}

#[test]
fn linux_is_handed_from_engine_to_engine_in_the_middle_of_everything_with_v1() {
    handed_over(&route(), CpuModel::V1);
}

#[test]
fn linux_is_handed_from_engine_to_engine_in_the_middle_of_everything_with_v2() {
    handed_over(&route(), CpuModel::V2);
}
