//! kvm-unit-tests (x86_64) on an engine, and beside it under QEMU's translator.
//!
//! A program of the suite is a multiboot kernel. It learns the number of processors and the size of memory from a
//! text that it gets as initial ramdisk, prints on the first serial port, and ends with a write to port 0xf4.

mod config;
mod firmware;
mod qemu;
mod test_device;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use harrier_engine::{CpuModel, Engine};
use harrier_machine::boot::{Boot, BytesImage, ElfEntry, FileImage, Image};
use harrier_machine::{MachineBuilder, MachineConfig, MachineEnd};

use self::config::Entry;
use super::report::{Row, Table, Verdict};
use super::{EngineName, SuiteError};
use crate::Collector;

/// What a program says when everything in it was skipped: with QEMU's exit device this becomes the 77 of Automake.
const ALL_SKIPPED: u32 = 77 >> 1;

/// The program that runs in real mode and expects what firmware has set up.
const REAL_MODE: &str = "realmode.flat";

/// How the suite is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The engine.
    pub engine: EngineName,
    /// Whether QEMU runs everything too.
    pub qemu: bool,
    /// Only entries of these names; all if empty.
    pub only: Vec<String>,
    /// Whether the last words of a failing entry are shown on standard error.
    pub output: bool,
}

/// What one run of a program was.
struct Run {
    ended: Ended,
    said: String,
}

enum Ended {
    /// With this number at the exit port.
    Code(u32),
    Timeout,
    /// Without using the exit port.
    Otherwise(String),
}

/// Runs the suite that was built in `dir`.
///
/// # Errors
/// [`SuiteError`] if this is no built suite or nothing can run it. What goes wrong in an entry is in the table.
pub fn run(dir: &Path, options: &Options) -> Result<Table, SuiteError> {
    let list = dir.join("x86/unittests.cfg");
    let missing = |missing: &str| SuiteError::NotThere {
        dir: dir.to_owned(),
        suite: "kvm-unit-tests",
        missing: missing.to_owned(),
    };
    let text = match fs::read_to_string(&list) {
        Ok(text) => text,
        Err(_) if !list.exists() => return Err(missing("x86/unittests.cfg")),
        Err(source) => return Err(SuiteError::Unreadable { file: list, source }),
    };
    let mut entries = config::parse(&text);
    if let Some(name) = options.only.iter().find(|name| !entries.iter().any(|entry| entry.name == **name)) {
        return Err(SuiteError::NoEntry(name.clone()));
    }
    entries.retain(|entry| options.only.is_empty() || options.only.contains(&entry.name));
    if !entries.iter().any(|entry| dir.join("x86").join(&entry.file).exists()) {
        return Err(missing("program in x86/ (run ./configure and make there)"));
    }
    let engine = super::engine(options.engine)?;
    let mut table = Table::new(vec![engine.name().to_owned()]);
    if options.qemu {
        table.columns.push("tcg".to_owned());
    }
    for entry in entries {
        let program = dir.join("x86").join(&entry.file);
        eprintln!("xtask: {}", entry.name);
        let mut verdicts = vec![match reason_to_skip(&entry, &program, Some(engine.as_ref())) {
            Some(reason) => Verdict::Skip { reason },
            None => judge(&entry, &run_on_engine(engine.as_ref(), &entry, &program), options.output),
        }];
        if options.qemu {
            verdicts.push(match reason_to_skip(&entry, &program, None) {
                Some(reason) => Verdict::Skip { reason },
                None => judge(&entry, &qemu::run(&entry, &program)?, false),
            });
        }
        table.rows.push(Row { name: entry.name, verdicts });
    }
    Ok(table)
}

/// Why an entry is not run: what the suite's own script would say, then what a machine of ours has not.
fn reason_to_skip(entry: &Entry, program: &Path, engine: Option<&dyn Engine>) -> Option<String> {
    if entry.arch == "i386" {
        return Some("only for 32-bit builds".to_owned());
    }
    if entry.groups.iter().any(|group| group == "nodefault") {
        return Some("the suite runs it only by hand".to_owned());
    }
    if entry.accel == "kvm" || entry.qemu.iter().any(|word| word == "-enable-kvm") {
        return Some("the suite runs it only on QEMU with KVM".to_owned());
    }
    for (file, text) in &entry.checks {
        if fs::read_to_string(file).map_or(true, |there| there.trim() != text) {
            return Some(format!("the suite wants {text} in {file}"));
        }
    }
    if !program.exists() {
        return Some(format!("{} is not built", entry.file));
    }
    let asks_for = |feature: &str| entry.cpu().split(',').any(|word| word == feature);
    if asks_for("+vmx") || asks_for("+svm") {
        return Some("nested virtualization is offered by neither".to_owned());
    }
    if asks_for("hv_passthrough") {
        return Some("the suite wants the host's Hyper-V interface".to_owned());
    }
    let engine = engine?;
    if let Some(device) = entry.option("-device") {
        return Some(format!("it needs QEMU's {}", device.split(',').next().unwrap_or(device)));
    }
    if entry.file == "s3.flat" {
        return Some("a machine of ours does not sleep (ACPI S3)".to_owned());
    }
    if asks_for("+invpcid") && asks_for("-pcid") {
        return Some("no cpu model has INVPCID without PCID".to_owned());
    }
    engine.cpu_models().is_empty().then(|| "the engine offers no cpu model here".to_owned())
}

/// The model that comes closest to the processor that the entry asks QEMU for.
fn model(entry: &Entry, engine: &dyn Engine) -> CpuModel {
    let (name, features) = entry.cpu().split_once(',').unwrap_or((entry.cpu(), ""));
    let everything =
        matches!(name, "max" | "host") || ["+pcid", "+umip"].iter().any(|f| features.contains(f));
    let offered = engine.cpu_models();
    let wanted = if everything { CpuModel::Host } else { CpuModel::V2 };
    offered.into_iter().filter(|model| *model <= wanted).max().unwrap_or(wanted)
}

/// The text with what QEMU would tell by other ways.
fn environment(entry: &Entry) -> String {
    format!("NR_CPUS={}\nMEMSIZE={}\nTEST_DEVICE=1\n", entry.cpus, entry.memory_mib())
}

/// The program's name and its arguments.
fn command_line(entry: &Entry) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let arguments = entry.arguments.replace("`date +%s`", &seconds.to_string());
    format!("{} {arguments}", entry.file)
}

fn run_on_engine(engine: &dyn Engine, entry: &Entry, program: &Path) -> Run {
    let said = Collector::default();
    let ended = try_on_engine(engine, entry, program, &said)
        .unwrap_or_else(|err| Ended::Otherwise(format!("no machine: {err}")));
    Run { ended, said: said.text() }
}

fn try_on_engine(
    engine: &dyn Engine,
    entry: &Entry,
    program: &Path,
    said: &Collector,
) -> Result<Ended, Box<dyn std::error::Error>> {
    let config = MachineConfig {
        vcpu_count: entry.cpus,
        memory_bytes: entry.memory_mib() << 20,
        cpu_model: model(entry, engine),
    };
    let mut builder = MachineBuilder::new(engine, &config)?;
    builder.add_platform_devices()?;
    builder.add_debug_exit()?;
    builder.add_serial(Box::new(said.clone()), None)?;
    test_device::add(&mut builder)?;
    let kernel = FileImage::open(program)?;
    let with_firmware =
        (entry.file == REAL_MODE).then(|| fs::read(program).map(|file| firmware::put_before(&file)));
    let with_firmware = with_firmware.transpose()?.flatten();
    let with_firmware = with_firmware.as_ref().map(|file| BytesImage::new(&entry.file, file));
    let environment = environment(entry);
    let initrd = BytesImage::new("environment", environment.as_bytes());
    let mut machine = builder.build(&Boot::Kernel {
        kernel: with_firmware.as_ref().map_or(&kernel as &dyn Image, |image| image),
        elf_entry: ElfEntry::Auto,
        initrd: Some(&initrd),
        command_line: &command_line(entry),
    })?;
    let handle = machine.handle();
    machine.start()?;
    let deadline = Instant::now() + Duration::from_secs(entry.timeout_s);
    if handle.wait_for_end(Some(deadline)).is_none() {
        handle.stop();
    }
    Ok(match machine.wait().end {
        MachineEnd::DebugExit(code) => Ended::Code(code),
        MachineEnd::Stopped => Ended::Timeout,
        end => Ended::Otherwise(end.to_string()),
    })
}

fn judge(entry: &Entry, run: &Run, show: bool) -> Verdict {
    let failures: Vec<&str> = run.said.lines().filter(|line| line.starts_with("FAIL")).collect();
    let skipped = run.said.lines().find(|line| line.starts_with("SKIP")).unwrap_or("everything in it");
    let verdict = match &run.ended {
        Ended::Code(0) => Verdict::Pass,
        Ended::Code(ALL_SKIPPED) => Verdict::skip(skipped.to_owned()),
        Ended::Code(code) => match failures.first() {
            Some(first) if failures.len() > 1 => {
                Verdict::fail(format!("{first} and {} more", failures.len() - 1))
            }
            Some(first) => Verdict::fail(*first),
            None => Verdict::fail(format!("exit code {code}: {}", last_line(&run.said))),
        },
        Ended::Timeout => Verdict::fail(format!("no end in {} s: {}", entry.timeout_s, last_line(&run.said))),
        Ended::Otherwise(end) => Verdict::fail(format!("{end}: {}", last_line(&run.said))),
    };
    if show && matches!(verdict, Verdict::Fail { .. }) {
        eprintln!("{}", run.said);
    }
    verdict
}

fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")
}
