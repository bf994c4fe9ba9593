//! Group `devices`: disk, console and the socket between guest and host.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::measure::{self, last_words};
use super::monitors::{Guest, Monitor, Monitors, Sides};
use super::programs::{self, Programs};
use super::report::{Figure, GroupReport, Unit};
use super::statistics::Samples;

const MIB: f64 = 1024.0 * 1024.0;
/// Size of the disk; the programs use its beginning.
const DISK_BYTES: u64 = 128 << 20;
/// What goes through the socket, to the guest and back.
const SOCKET_BYTES: usize = 16 << 20;
const ROUND_TRIPS: u32 = 500;

/// Prints 1 MiB on the serial console between two marks, counted in KiB.
const CONSOLE: &str = "echo '@begin serial console'; busybox yes \
    0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | busybox head -c 1048576; echo; \
    echo '@end serial console|1024|0'";

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, root: &Path, runs: u32) -> Result<GroupReport> {
    let mut figures = disk_and_console(monitors, guest, root, runs)?;
    figures.extend(socket(monitors, runs)?);
    let mut remarks: Vec<String> = monitors.kvm_remark().into_iter().collect();
    remarks.push(qemu_socket_remark(monitors, guest));
    Ok(GroupReport { name: "devices", figures, remarks })
}

fn disk_and_console(monitors: &Monitors, guest: &Guest, root: &Path, runs: u32) -> Result<Vec<Figure>> {
    let image = tempfile::NamedTempFile::new().context("no temporary file for a disk")?;
    // Written, not sparse: a hole costs the host's kernel less than data.
    let block = vec![0x5a; 1 << 20];
    for _ in 0..DISK_BYTES >> 20 {
        image.as_file().write_all(&block).context("no room for a disk")?;
    }
    image.as_file().sync_all()?;
    let programs = Programs {
        loops: "disk",
        scripts: Vec::new(),
        preparation: CONSOLE,
        data: Vec::new(),
        disk: Some(image.path().to_owned()),
        native: false,
    };
    let measured = programs::run(monitors, guest, root, runs, &programs)?;
    let mut figures = Vec::new();
    for (name, program) in &measured {
        let (name, count) = if name.starts_with("serial") {
            (format!("{name}, per KiB"), program.work as f64)
        } else if name.starts_with("random") {
            (format!("disk, {name}"), program.work as f64)
        } else {
            (format!("disk, {name}, per MiB"), program.work as f64 / MIB)
        };
        figures.push(program.figure(&name, Unit::CpuUs, |ms| ms * 1e3 / count));
    }
    Ok(figures)
}

/// `harrier run -- cat`, whose streams go through the socket.
fn socket(monitors: &Monitors, runs: u32) -> Result<Vec<Figure>> {
    let (mut rates, mut trips): (Sides<Samples>, Sides<Samples>) = (Sides::default(), Sides::default());
    for _ in 0..runs {
        for side in monitors.engines() {
            rates.of(side).push(throughput(monitors, side)?);
            trips.of(side).push(round_trip(monitors, side)?);
        }
    }
    Ok(vec![
        Figure::new("socket, to the guest and back", Unit::MiBPerSecond, rates.soft).kvm(rates.kvm),
        Figure::new("socket, a byte to the guest and back", Unit::WallUs, trips.soft).kvm(trips.kvm),
    ])
}

/// Mebibytes a second from stdin to stdout, without the boot.
fn throughput(monitors: &Monitors, side: Monitor) -> Result<f64> {
    let mut command = monitors.harrier_run(side, &["--quiet", "--timeout", "2m", "--", "cat"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut to, mut from) =
        (child.stdin.take().context("no stdin")?, child.stdout.take().context("no stdout")?);
    let writer = std::thread::spawn(move || -> std::io::Result<()> {
        let block = vec![b'x'; 64 << 10];
        for _ in 0..SOCKET_BYTES / block.len() {
            to.write_all(&block)?;
        }
        Ok(())
    });
    // The first byte comes when the guest is up.
    let mut first = [0];
    from.read_exact(&mut first).context("the guest sent nothing back")?;
    let begun = Instant::now();
    let rest = std::io::copy(&mut from, &mut std::io::sink())?;
    let taken = begun.elapsed();
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let status = child.wait()?;
    if !status.success() || rest + 1 != SOCKET_BYTES as u64 {
        bail!("{side:?}: cat ended with {status} after {rest} bytes");
    }
    Ok(rest as f64 / MIB / taken.as_secs_f64())
}

/// Microseconds for one byte to `cat` and back.
fn round_trip(monitors: &Monitors, side: Monitor) -> Result<f64> {
    let mut command = monitors.harrier_run(side, &["--quiet", "--timeout", "2m", "--", "cat"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut to, mut from) =
        (child.stdin.take().context("no stdin")?, child.stdout.take().context("no stdout")?);
    let mut trip = || -> std::io::Result<()> {
        to.write_all(b"x")?;
        from.read_exact(&mut [0])
    };
    trip().context("the guest sent nothing back")?;
    let begun = Instant::now();
    for _ in 0..ROUND_TRIPS {
        trip()?;
    }
    let taken = begun.elapsed();
    drop(to);
    let status = child.wait()?;
    if !status.success() {
        bail!("{side:?}: cat ended with {status}");
    }
    Ok(taken.as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS))
}

/// Whether QEMU could be a peer for the socket, in its own words.
fn qemu_socket_remark(monitors: &Monitors, guest: &Guest) -> String {
    let words = || -> Result<String> {
        let mut command = monitors.boot(Monitor::QemuTcg, guest)?;
        command.args(["-device", "vhost-vsock-device,guest-cid=77"]);
        let ended = measure::run(&mut command, Duration::from_secs(10))?;
        Ok(last_words(&ended.stderr))
    };
    match words() {
        Ok(words) => format!("QEMU's socket device cannot be measured here: {words}"),
        // It ran until its limit: the device is there.
        Err(_) => "QEMU's socket device runs here, but QEMU has no command that moves a stream through it."
            .to_owned(),
    }
}
