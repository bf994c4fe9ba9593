//! The session with the agent of a real guest, on each engine, whose connections are cut: the agent dials again over vsock,
//! and nothing is lost or comes twice.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use harrier_devices::virtio::vsock::{InProcess, Vsock, VsockListener};
use harrier_engine::{CpuModel, Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
use harrier_jobs::protocol::VERSION_TAG;
use harrier_jobs::{AGENT_PORT, CommandSpec, Session, SessionOptions, Status, Stdin, Stdio};
use harrier_machine::boot::{Boot, ElfEntry, FileImage};
use harrier_machine::{Machine, MachineBuilder, MachineConfig};

/// The guest that `cargo xtask setup` has built.
fn guest_file(name: &str) -> FileImage {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = set("HARRIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("harrier")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/harrier")))
        .unwrap();
    FileImage::open(&cache.join("guest").join(VERSION_TAG).join(name)).expect("cargo xtask setup comes first")
}

fn boot(engine: &dyn Engine) -> (Machine, VsockListener) {
    let (kernel, initrd) = (guest_file("vmlinux"), guest_file("initramfs.cpio"));
    let config = MachineConfig { vcpu_count: 1, memory_bytes: 256 << 20, cpu_model: CpuModel::V1 };
    let mut builder = MachineBuilder::new(engine, &config).unwrap();
    builder.add_platform_devices().unwrap();
    let host = InProcess::new();
    let listener = host.listen(AGENT_PORT).unwrap();
    builder.add_virtio(Box::new(Vsock::new(3, Box::new(host)).unwrap())).unwrap();
    builder.add_serial(Box::new(io::sink()), None).unwrap();
    let command_line = include_str!("../../../guest-kernel/cmdline").trim();
    let boot =
        Boot::Kernel { kernel: &kernel, initrd: Some(&initrd), command_line, elf_entry: ElfEntry::default() };
    let mut machine = builder.build(&boot).unwrap();
    machine.start().unwrap();
    (machine, listener)
}

/// Hands the agent's connections to the session, each cut after so many bytes from the guest; the last one stays.
fn relay(listener: VsockListener, session: Session, cuts: Vec<u64>, connections: Arc<Mutex<usize>>) {
    let mut cuts = cuts.into_iter();
    loop {
        match listener.accept(Duration::from_secs(1)) {
            Ok(guest) => {
                *connections.lock().unwrap() += 1;
                let (near, host) = UnixStream::pair().unwrap();
                session.connect(host);
                let limit = cuts.next().unwrap_or(u64::MAX);
                for (from, to, limit) in [(&guest, &near, limit), (&near, &guest, u64::MAX)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || pump(from, to, limit));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(_) => return session.machine_ended(),
        }
    }
}

fn pump(mut from: UnixStream, mut to: UnixStream, mut limit: u64) {
    let mut buffer = vec![0; 16 * 1024];
    while limit > 0 {
        let room = buffer.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        match from.read(&mut buffer[..room]) {
            Ok(count @ 1..) if to.write_all(&buffer[..count]).is_ok() => limit -= count as u64,
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_whose_connection_is_cut_dials_again_and_loses_nothing() {
    cut_connections_of_a_guest_on(&SoftEngine);
}

#[test]
fn so_does_one_on_kvm() {
    let engine = KvmEngine::default().with_software(Arc::new(SoftEngine));
    match engine.probe() {
        Probe::Available { .. } => cut_connections_of_a_guest_on(&engine),
        Probe::Unavailable { reason } => eprintln!("skipped: the kvm engine is not available: {reason}"),
    }
}

fn cut_connections_of_a_guest_on(engine: &dyn Engine) {
    let (machine, listener) = boot(engine);
    let session = Session::new(SessionOptions::default()).unwrap();
    let connections = Arc::new(Mutex::new(0));
    let cuts = vec![5, 60, 400, 20_000, 100_000, 100_000];
    let expected_connections = cuts.len() + 1;
    thread::spawn({
        let (session, connections) = (session.clone(), Arc::clone(&connections));
        move || relay(listener, session, cuts, connections)
    });
    let input: String = (1..=30_000).map(|line| format!("{line}\n")).collect();
    let (stdout, stderr) = (Capture::default(), Capture::default());
    let stdio = Stdio {
        stdin: Stdin::Reader(Box::new(io::Cursor::new(input.clone().into_bytes()))),
        stdout: Box::new(stdout.clone()),
        stderr: Box::new(stderr.clone()),
    };
    // Two commands at a time: one goes through stdin, one makes its own output.
    let first = session.run(&CommandSpec::new(["sh", "-c", "cat; echo end >&2; exit 7"]), stdio).unwrap();
    let counted = Capture::default();
    let stdio =
        Stdio { stdin: Stdin::Empty, stdout: Box::new(counted.clone()), stderr: Box::new(io::sink()) };
    let second = session.run(&CommandSpec::new(["seq", "30000"]), stdio).unwrap();
    let outcome = first.wait().unwrap();
    assert_eq!(outcome.status, Status::Exited(7));
    assert_eq!(second.wait().unwrap().status, Status::Exited(0));
    for (name, capture) in [("cat", &stdout), ("seq", &counted)] {
        let found = capture.0.lock().unwrap();
        assert!(*found == input.as_bytes(), "{name}: {} of {} bytes", found.len(), input.len());
    }
    assert_eq!(stderr.0.lock().unwrap().as_slice(), b"end\n");
    assert_eq!(*connections.lock().unwrap(), expected_connections);
    session.shut_down(Duration::from_secs(60)).unwrap();
    machine.handle().stop();
    machine.wait();
}
