//! What bad input gets: one line on stderr that names the value and the remedy, and exit code 125.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::{self, wait};

/// A directory for the files of one test.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Files { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A kernel that can be loaded; what it does does not matter here.
    fn kernel(&self) -> String {
        self.write("good-kernel", &elf(2, 62, 0x100_0000, &[(0x100_0000, 64, 64)]))
    }
}

fn harrier(cache: &Path, args: &[&str]) -> Output {
    // A run that is not refused is a guest that may never end.
    wait(support::harrier(args).env("HARRIER_CACHE", cache).spawn().unwrap())
}

#[track_caller]
fn refused(args: &[&str], text: &str) {
    let cache = tempfile::tempdir().unwrap();
    let output = harrier(cache.path(), args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("harrier: "), "{stderr}");
    assert!(stderr.contains(text), "{stderr} lacks {text}");
    assert!(output.stdout.is_empty());
}

/// An ELF file of a class (1 or 2) for a machine, with segments of (address, bytes in the file, bytes in memory).
fn elf(class: u8, machine: u16, entry: u64, segments: &[(u64, usize, u64)]) -> Vec<u8> {
    let wide = class == 2;
    let (header_len, entry_len) = if wide { (64usize, 56usize) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
    file.resize(16, 0);
    let word = |file: &mut Vec<u8>, value: u64| {
        if wide {
            file.extend_from_slice(&value.to_le_bytes());
        } else {
            file.extend_from_slice(&(value as u32).to_le_bytes());
        }
    };
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&machine.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    word(&mut file, entry);
    word(&mut file, header_len as u64);
    word(&mut file, 0);
    file.extend_from_slice(&[0; 4]);
    for half in [header_len, entry_len, segments.len(), 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let mut offset = (header_len + entry_len * segments.len()) as u64;
    for (address, file_len, memory_len) in segments {
        file.extend_from_slice(&1u32.to_le_bytes());
        if wide {
            file.extend_from_slice(&5u32.to_le_bytes());
        }
        for value in [offset, *address, *address, *file_len as u64, *memory_len] {
            word(&mut file, value);
        }
        if !wide {
            file.extend_from_slice(&5u32.to_le_bytes());
        }
        word(&mut file, 4096);
        offset += *file_len as u64;
    }
    file.resize(offset as usize, 0xf4);
    file
}

fn random(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

#[test]
fn kernels_that_cannot_be() {
    let files = Files::new();
    let dir = files.dir.path().to_str().unwrap().to_owned();
    let refused = |kernel: &str, text: &str| refused(&["run", "--kernel", kernel], text);
    refused(&files.path("none"), "does not exist: check the path");
    refused(&dir, "is a directory: give a regular file");
    refused("/dev/null", "is a device, pipe or socket: give a regular file");
    refused(&files.write("empty", b""), "is empty: give a complete file");
    refused(&files.write("random", &random(1 << 20)), "no known kernel format");
    refused(&files.write("script", b"#!/bin/sh\nexit 0\n"), "is a script");
    refused(&files.write("gz", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0]), "is compressed with gzip: unpack it first");
    refused("/proc/self/exe", "is an ELF program, library or object file");
    let good = elf(2, 62, 0x100_0000, &[(0x100_0000, 4096, 8192)]);
    for len in [20, 63, 100, 1000, good.len() - 1] {
        refused(&files.write("truncated", &good[..len]), "truncated");
    }
    let overlap = elf(2, 62, 0x100_0000, &[(0x100_0000, 64, 0x2000), (0x100_1000, 64, 64)]);
    refused(&files.write("overlap", &overlap), "segments at 0x1000000 and 0x1001000 overlap");
    for gpa in [0x1000, 0xfee0_0000, 0x7fff_ffff_ffff_f000] {
        let outside = elf(2, 62, 0x100_0000, &[(0x100_0000, 64, 64), (gpa, 64, 64)]);
        refused(&files.write("outside", &outside), "outside the memory that a kernel may use");
    }
    refused(&files.write("entry", &elf(2, 62, 0x10, &[(0x100_0000, 64, 64)])), "its entry 0x10 is outside");
    refused(&files.write("none", &elf(2, 62, 0x10, &[])), "invalid program header table");
    refused(&files.write("elf32", &elf(1, 3, 0x10_0000, &[(0x10_0000, 64, 64)])), "is a 32-bit kernel");
    refused(
        &files.write("arm", &elf(2, 183, 0x100_0000, &[(0x100_0000, 64, 64)])),
        "is for ARM64: give one for x86-64",
    );
}

#[test]
fn a_log_limit_that_is_none_is_refused_before_there_is_a_machine() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("machines");
    let begin = ["--runtime-dir", folder.to_str().unwrap(), "run"];
    for how in [["-d", "--rm"], ["--name", "x"]] {
        refused(
            &[&begin[..], &how, &["--log-limit", "much", "--", "true"]].concat(),
            "--log-limit: 'much' is not a size",
        );
    }
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_str().unwrap().len() != 12), "no machine's folder: {left:?}");
}

#[test]
fn memory_and_cpus_that_cannot_be() {
    let files = Files::new();
    let kernel = files.kernel();
    let refused =
        |option: &str, value: &str, text: &str| refused(&["run", "--kernel", &kernel, option, value], text);
    refused("--memory", "0", "guest memory of 0 bytes is too little: give at least 2M");
    refused("--memory", "4M", "needs 17M of memory and the machine has 4M there: give more memory");
    refused("--memory", "900T", "this host has: give less");
    refused("--memory", "4294967297", "is not a multiple of 4K");
    refused("--memory", "99999999999G", "is not a size");
    refused("--memory", "much", "'much' is not a size");
    refused("--cpus", "0", "'0' is not a number of cpus: give 1 to 255");
    refused("--cpus", "100000", "'100000' is not a number of cpus: give 1 to 255");
    refused("--cpu-model", "pentium", "unknown cpu model 'pentium': use v1, v2, v3 or host");
    refused("--engine", "bochs", "unknown engine 'bochs': use auto, kvm or soft");
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        refused("--engine", "kvm", "engine kvm is not available");
    }
    refused("--timeout", "never", "'never' is not a time");
    refused("--console", "/nonexistent/console", "--console '/nonexistent/console' cannot be written");
    refused("--cmdline", &"x".repeat(3000), "takes 2047: shorten it");
}

#[test]
fn ramdisks_and_disks_that_cannot_be() {
    let files = Files::new();
    let kernel = files.kernel();
    let empty = files.write("empty", b"");
    let noise = files.write("random", &random(1 << 16));
    let missing = files.path("none");
    let with =
        |option: &str, value: &str, text: &str| refused(&["run", "--kernel", &kernel, option, value], text);
    with("--initrd", &missing, "does not exist: check the path");
    with("--initrd", &empty, "is empty: give a complete file");
    with("--initrd", &noise, "is neither a cpio archive nor a compressed one");
    let archive = [b"070701".to_vec(), vec![b'0'; 300]].concat();
    with("--initrd", &files.write("cpio", &archive), "initrd");
    with("--disk", &missing, "none");
    with("--disk", &empty, "empty");
    with("--disk", files.dir.path().to_str().unwrap(), "is no file and no block device");

    let initrd = files.write("initrd", &[0x1f, 0x8b, 8, 0]);
    let root = |value: &str, text: &str| {
        refused(&["run", "--kernel", &kernel, "--initrd", &initrd, "--rootfs", value, "--", "true"], text);
    };
    root(&missing, "does not exist: check the path");
    root(&empty, "is empty: give a complete file");
    root(&noise, "is neither an ext4 nor a squashfs image");
    let mut ext4 = vec![0; 4096];
    ext4[1024 + 4..1024 + 8].copy_from_slice(&100u32.to_le_bytes());
    ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    root(&files.write("ext4", &ext4), "holds 4096 of the 102400 bytes of its file system");
}

#[test]
fn too_many_disks() {
    let files = Files::new();
    let kernel = files.kernel();
    let disk = files.write("disk", &[0; 4096]) + ":ro";
    let mut args = vec!["run", "--kernel", &kernel];
    for _ in 0..20 {
        args.extend(["--disk", &disk]);
    }
    refused(&args, "virtio devices are not possible: use fewer disks");
}

#[test]
fn arguments_that_mean_nothing() {
    refused(&[], "no command given");
    refused(&["walk"], "unrecognized subcommand 'walk'");
    refused(&["run"], "nothing to run");
    refused(&["run", "--no-such-option", "--", "true"], "--no-such-option");
    refused(&["submit", "--require", "x", "--", "true"], "'--requirements'): try 'harrier submit --help'");
    refused(&["snapshots", "rm"], "<SNAPSHOT>...: try 'harrier snapshots rm --help'");
    refused(&["run", "--memory"], "--memory");
    refused(&["run", "--env", "=x", "--", "true"], "--env '=x' has no name");
    refused(&["run", "--kernel", "k\nl"], "'k?l' does not exist");
}

#[test]
fn a_guest_that_is_not_built() {
    refused(&["run", "--", "true"], "run `cargo xtask setup`");
    let files = Files::new();
    let file = PathBuf::from(files.write("file", b"x"));
    let output = harrier(&file, &["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cargo xtask setup"));
}

#[test]
fn with_json_the_failure_is_in_the_object_too() {
    let cache = tempfile::tempdir().unwrap();
    let output = harrier(cache.path(), &["run", "--json", "--cpus", "0", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["exit_code"], 125);
    assert!(object["error"].as_str().unwrap().contains("give 1 to 255"));
}

#[test]
fn a_stdout_that_takes_nothing() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_harrier"))
        .arg("doctor")
        .stdout(full)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.starts_with("harrier: stdout cannot be written"), "{stderr}");
}

#[test]
fn a_stdout_that_is_closed() {
    let shell = |redirection: &str| {
        let script = format!("exec \"$0\" doctor {redirection}");
        Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_harrier")]).output().unwrap()
    };
    let output = shell(">&-");
    assert_eq!(output.status.code(), Some(125));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr, "harrier: stdout is closed: send it somewhere, to /dev/null if nobody wants it\n");
    for open in [">/dev/null", "1<>/dev/null"] {
        assert_eq!(shell(open).status.code(), Some(0), "{open}");
    }
}

#[test]
fn help_and_version_are_no_failures() {
    let cache = tempfile::tempdir().unwrap();
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["doctor"]] {
        let output = harrier(cache.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}
