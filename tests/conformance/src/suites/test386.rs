//! test386.asm: a ROM that tests real, protected and virtual-8086 mode from the reset vector on.
//!
//! It writes the number of each test to a port before it begins, halts where one fails, and prints the results of its
//! arithmetic, which are compared with the suite's own reference.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harrier_engine::cpu_state::MpState;
use harrier_engine::{CpuModel, Engine, Exit, Flow, GuestRegion, PageLog, VmConfig};
use vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress, MmapRegion};

use super::report::{Row, Table, Verdict};
use super::{EngineName, SuiteError};
use crate::devices::PortWrites;

const SOURCE: &str = "src/test386.asm";
const CONFIGURATION: &str = "src/configuration.asm";
const REFERENCE: &str = "test386-EE-reference.txt";
/// What is set in the configuration: the larger ROM, which has all tests, and the ports of [`Ports`].
const SETTINGS: &[(&str, &str)] = &[("POST_PORT", "0x190"), ("OUT_PORT", "0xe9"), ("ROM128", "1")];
const POST_PORT: u16 = 0x190;
const OUT_PORT: u16 = 0xe9;
const ROM_BYTES: usize = 128 << 10;
const MEMORY_BYTES: usize = 1 << 20;
/// The test that prints, and the end.
const ARITHMETIC: u8 = 0xee;
const FINISHED: u8 = 0xff;
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is seen whether the processor has halted.
const LOOK: Duration = Duration::from_millis(50);

/// What the numbers mean, from the suite's documentation.
const TESTS: &[(u8, &str)] = &[
    (0x00, "initialisation in real mode"),
    (0x01, "jumps and loops"),
    (0x02, "32-bit multiplication and division"),
    (0x03, "segment registers in real mode"),
    (0x04, "strings in real mode"),
    (0x05, "calls in real mode"),
    (0x06, "full pointers in real mode"),
    (0x08, "tables, and entry into protected mode"),
    (0x09, "stack"),
    (0x20, "user mode"),
    (0x21, "virtual-8086 mode"),
    (0x22, "task switches"),
    (0x0b, "segment registers"),
    (0x0c, "zero and sign extension"),
    (0x0d, "16-bit addressing modes"),
    (0x0e, "32-bit addressing modes"),
    (0x0f, "memory by every addressing mode"),
    (0x10, "strings in protected mode"),
    (0x11, "page faults and bits of page-table entries"),
    (0x12, "other faults of memory accesses"),
    (0x13, "bit scans"),
    (0x14, "bit tests"),
    (0x15, "SETcc"),
    (0x16, "calls in protected mode"),
    (0x17, "ARPL"),
    (0x18, "BOUND"),
    (0x19, "XCHG"),
    (0x1a, "ENTER"),
    (0x1b, "LEAVE"),
    (0x1c, "VERR and VERW"),
    (0xe0, "undefined behaviour"),
    (ARITHMETIC, "arithmetic"),
];

/// Runs the ROM of the suite in `dir`.
///
/// # Errors
/// [`SuiteError`] if this is not the suite, or nothing can run it.
pub fn run(dir: &Path, engine: EngineName) -> Result<Table, SuiteError> {
    let read = |name: &str| {
        let file = dir.join(name);
        fs::read_to_string(&file).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                let missing = name.to_owned();
                SuiteError::NotThere { dir: dir.to_owned(), suite: "test386.asm", missing }
            }
            _ => SuiteError::Unreadable { file, source },
        })
    };
    let (configuration, reference) = (read(CONFIGURATION)?, read(REFERENCE)?);
    let rom = assemble(dir, &configuration)?;
    let engine = super::engine(engine)?;
    let mut table = Table::new(vec![engine.name().to_owned()]);
    let mut add = |name: String, verdict: Verdict| table.rows.push(Row { name, verdicts: vec![verdict] });
    let (ports, end) = match execute(engine.as_ref(), &rom) {
        Ok(ended) => ended,
        Err(reason) => {
            add("the ROM".to_owned(), Verdict::fail(reason));
            return Ok(table);
        }
    };
    let mut posts = ports.posts.iter().filter(|post| **post != FINISHED).peekable();
    while let Some(&post) = posts.next() {
        let name = TESTS.iter().find(|(number, _)| *number == post).map_or("", |(_, name)| *name);
        let verdict = match &end {
            Some(reason) if posts.peek().is_none() => Verdict::fail(reason.clone()),
            _ => Verdict::Pass,
        };
        add(format!("{post:02x} {name}"), verdict);
    }
    for (number, name) in TESTS.iter().filter(|(number, _)| !ports.posts.contains(number)) {
        let reason = match &end {
            Some(_) => "the ROM did not come so far",
            None => "it is for a processor of one family and switched off in the suite's configuration",
        };
        add(format!("{number:02x} {name}"), Verdict::skip(reason));
    }
    if end.is_none() {
        add("results of arithmetic".to_owned(), compare(&ports.said, &reference));
    }
    Ok(table)
}

/// The ROM, with [`SETTINGS`].
fn assemble(dir: &Path, configuration: &str) -> Result<Vec<u8>, SuiteError> {
    let folder = tempfile::tempdir().map_err(SuiteError::Temporary)?;
    let configured: Vec<String> = configuration
        .lines()
        .map(|line| {
            let name = line.split_whitespace().next().unwrap_or_default();
            let setting = SETTINGS.iter().find(|(setting, _)| *setting == name);
            setting.map_or(line.to_owned(), |(name, value)| format!("{name} equ {value}"))
        })
        .collect();
    fs::write(folder.path().join("configuration.asm"), configured.join("\n"))
        .map_err(SuiteError::Temporary)?;
    let rom = folder.path().join("rom");
    let output = Command::new("nasm")
        .args(["-f", "bin", "-w-all", "-i"])
        .arg(folder.path().join(""))
        .arg("-i")
        .arg(dir.join("src").join(""))
        .arg(dir.join(SOURCE))
        .arg("-o")
        .arg(&rom)
        .output()
        .map_err(|source| SuiteError::Program { program: "nasm", source })?;
    let said = String::from_utf8_lossy(&output.stderr);
    let refused = |reason: String| SuiteError::Assembly { file: dir.join(SOURCE), reason };
    if !output.status.success() {
        return Err(refused(said.lines().next().unwrap_or("nasm failed").to_owned()));
    }
    let rom = fs::read(&rom).map_err(SuiteError::Temporary)?;
    if rom.len() != ROM_BYTES {
        return Err(refused(format!("the ROM has {} bytes, not {ROM_BYTES}", rom.len())));
    }
    Ok(rom)
}

/// What the ROM writes.
#[derive(Default)]
struct Ports {
    posts: Vec<u8>,
    said: Vec<u8>,
}

impl Ports {
    fn write(&mut self, port: u16, data: &[u8]) -> Flow {
        let byte = data.first().copied().unwrap_or_default();
        match port {
            POST_PORT => {
                self.posts.push(byte);
                if byte == FINISHED {
                    return Flow::Leave;
                }
            }
            // The reference has some ten thousand lines.
            OUT_PORT if self.said.len() < 64 << 20 => self.said.push(byte),
            _ => {}
        }
        Flow::Continue
    }
}

/// Runs the ROM from reset to its end. The text says why it did not come there.
fn execute(engine: &dyn Engine, rom: &[u8]) -> Result<(Ports, Option<String>), String> {
    let text = |err: harrier_engine::EngineError| err.to_string();
    let config = VmConfig { cpu_model: CpuModel::V1, vcpu_count: 1, tsc_khz: None };
    let vm = engine.create_vm(&config).map_err(text)?;
    let last = MEMORY_BYTES - rom.len();
    let rest = u64::from(u32::MAX) + 1 - rom.len() as u64;
    for (gpa, bytes, read_only) in [(0, last, false), (last as u64, rom.len(), true), (rest, rom.len(), true)]
    {
        let mapping = MmapRegion::<PageLog>::new(bytes).map_err(|err| err.to_string())?;
        let region = GuestRegion::new(mapping, GuestAddress(gpa)).ok_or("no guest memory")?;
        if read_only {
            region.write_slice(rom, MemoryRegionAddress(0)).map_err(|err| err.to_string())?;
        }
        vm.map_memory(Arc::new(region), read_only).map_err(text)?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(text)?;
    let kicker = vcpu.kicker();
    let done = Arc::new(AtomicBool::new(false));
    let watched = Arc::clone(&done);
    let watchdog = std::thread::spawn(move || {
        while !watched.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
            kicker.kick();
        }
    });
    let mut ports = Ports::default();
    let started = Instant::now();
    let end = loop {
        match vcpu.run(&mut PortWrites(|port, data: &[u8]| ports.write(port, data))) {
            Exit::Left => break Ok(None),
            Exit::Kicked => match vcpu.state() {
                Ok(state) if state.mp_state == MpState::Halted => {
                    break Ok(Some(format!(
                        "it halted at {:04x}:{:08x}",
                        state.segments.cs.selector, state.regs.rip
                    )));
                }
                Ok(_) if started.elapsed() > PATIENCE => {
                    break Ok(Some(format!("no end in {} s", PATIENCE.as_secs())));
                }
                Ok(_) => {}
                Err(err) => break Err(text(err)),
            },
            other => break Ok(Some(format!("the engine ended by {other:?}"))),
        }
    };
    done.store(true, Ordering::SeqCst);
    let _ = watchdog.join();
    Ok((ports, end?))
}

/// The results of arithmetic beside the suite's.
fn compare(said: &[u8], reference: &str) -> Verdict {
    let said = String::from_utf8_lossy(said);
    let (said, wanted): (Vec<&str>, Vec<&str>) =
        (said.lines().map(str::trim_end).collect(), reference.lines().map(str::trim_end).collect());
    let differing: Vec<_> = said.iter().zip(&wanted).filter(|(said, wanted)| said != wanted).collect();
    match differing.first() {
        Some((said, wanted)) => {
            Verdict::fail(format!("{} lines differ, the first is '{said}', not '{wanted}'", differing.len()))
        }
        None if said.len() != wanted.len() => {
            Verdict::fail(format!("{} lines instead of {}", said.len(), wanted.len()))
        }
        None => Verdict::Pass,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_compared_line_by_line() {
        let reference = "ADD 1\nADC 2\n";
        assert_eq!(compare(b"ADD 1\r\nADC 2\r\n", reference), Verdict::Pass);
        assert_eq!(compare(b"ADD 1\n", reference), Verdict::fail("1 lines instead of 2"));
        let Verdict::Fail { reason } = compare(b"ADD 1\nADC 3\n", reference) else { panic!("it passed") };
        assert_eq!(reason, "1 lines differ, the first is 'ADC 3', not 'ADC 2'");
    }

    #[test]
    fn a_folder_without_the_suite_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = run(folder.path(), EngineName::Soft).unwrap_err().to_string();
        assert!(error.contains("test386.asm") && error.contains(CONFIGURATION), "{error}");
    }
}
