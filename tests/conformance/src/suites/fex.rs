//! FEX's unittests/ASM: small nasm programs that say in JSON which registers they end with.
//!
//! Each is a flat binary at 0x10000 that runs in user mode until HLT, whose fault ends it here. The suite lists tests
//! that real processors fail; they are skipped with its word for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use harrier_engine::cpu_state::{DescriptorTable, Segment};
use harrier_engine::{CpuModel, CpuState, Engine, Exit, Flow, GuestRegion, PageLog, VmConfig};
use serde_json::Value;
use vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress, MmapRegion};

use super::report::{Row, Table, Verdict};
use super::{EngineName, SuiteError};
use crate::devices::PortWrites;

const TESTS: &str = "unittests/ASM";
/// The suite's lists of tests that do not pass on a processor.
const LISTS: &[&str] = &["Disabled_Tests", "Disabled_Tests_host", "Known_Failures", "Known_Failures_host"];
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0xc000_0000;
const STACK_BYTES: u64 = 0x1_0000;
/// Memory that every program has besides: start and length.
const MEMORY: &[(u64, u64)] = &[(0xe000_0000, 0xa000), (0xe7ff_f000, 0x2000), (STACK, STACK_BYTES)];
/// Hosts slow atomic accesses across a cache line down (Linux's split lock detection), and there are tests full of them.
const PATIENCE: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;

/// Features that a test asks for and no cpu model has.
const FOREIGN: &[&str] = &["3DNOW", "SSE4A", "CLZERO", "EMMI", "AFP", "ADX", "LINUX"];

/// Runs the tests of the suite in `dir`, or those whose name contains `only`.
///
/// # Errors
/// [`SuiteError`] if this is not the suite, or nothing can run it.
pub fn run(dir: &Path, engine: EngineName, only: Option<&str>) -> Result<Table, SuiteError> {
    let root = dir.join(TESTS);
    if !root.is_dir() {
        let missing = TESTS.to_owned();
        return Err(SuiteError::NotThere { dir: dir.to_owned(), suite: "FEX", missing });
    }
    let engine = super::engine(engine)?;
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    files.sort();
    let known = known_failures(&root);
    let folder = tempfile::tempdir().map_err(SuiteError::Temporary)?;
    let mut table = Table::new(vec![engine.name().to_owned()]);
    for file in files {
        let name = file.strip_prefix(&root).unwrap_or(&file).display().to_string();
        if only.is_some_and(|part| !name.contains(part)) {
            continue;
        }
        let verdict = match known.iter().any(|line| line.ends_with(&name)) {
            true => Verdict::skip("the suite says that processors do not pass it"),
            false => test(engine.as_ref(), &file, &root, folder.path())?,
        };
        table.rows.push(Row { name, verdicts: vec![verdict] });
    }
    Ok(table)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), SuiteError> {
    let unreadable = |source| SuiteError::Unreadable { file: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "asm") {
            files.push(path);
        }
    }
    Ok(())
}

fn known_failures(root: &Path) -> Vec<String> {
    let texts = LISTS.iter().filter_map(|list| fs::read_to_string(root.join(list)).ok());
    let lines = texts.flat_map(|text| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>());
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.strip_prefix("Test_").map(str::to_owned).unwrap_or(line))
        .collect()
}

/// What a test says about itself.
struct Config {
    registers: BTreeMap<String, Vec<u64>>,
    memory: Vec<(u64, u64)>,
    data: Vec<(u64, Vec<u8>)>,
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok().or_else(|| text.parse::<i64>().ok().map(i64::cast_unsigned)),
    }
}

fn bytes(text: &str) -> Vec<u8> {
    // Groups of digits; each group is a number with its lowest byte last.
    text.split_whitespace()
        .flat_map(|group| {
            let digits = group.trim_start_matches("0x").as_bytes();
            digits
                .rchunks(2)
                .filter_map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The configuration in a test's text, or why it is not run.
fn configuration(text: &str) -> Result<Config, Verdict> {
    let json = text.split("%ifdef CONFIG").nth(1).and_then(|rest| rest.split("%endif").next());
    let json = json.ok_or_else(|| Verdict::skip("it says nothing about its end"))?;
    let value: Value =
        serde_json::from_str(json).map_err(|err| Verdict::skip(format!("its JSON is not valid: {err}")))?;
    let fields: BTreeMap<String, &Value> =
        value.as_object().into_iter().flatten().map(|(key, value)| (key.to_uppercase(), value)).collect();
    if fields.get("MODE").and_then(|mode| mode.as_str()) == Some("32BIT") {
        return Err(Verdict::skip("for 32-bit mode"));
    }
    let features = fields.get("HOSTFEATURES").and_then(|list| list.as_array());
    for feature in features.into_iter().flatten().filter_map(Value::as_str) {
        if FOREIGN.contains(&feature.to_uppercase().as_str()) {
            return Err(Verdict::skip(format!("no cpu model has {feature}")));
        }
    }
    let pairs = |name: &str| {
        let object = fields.get(name).and_then(|value| value.as_object());
        object.into_iter().flatten().collect::<Vec<_>>()
    };
    let registers = pairs("REGDATA").into_iter().filter_map(|(name, value)| {
        let words = match value {
            Value::String(text) => vec![number(text)?],
            Value::Array(list) => list.iter().map(|word| number(word.as_str()?)).collect::<Option<_>>()?,
            _ => return None,
        };
        Some((name.to_uppercase(), words))
    });
    let text_pairs = |name: &str| {
        pairs(name).into_iter().filter_map(|(key, value)| Some((number(key)?, value.as_str()?.to_owned())))
    };
    Ok(Config {
        registers: registers.collect(),
        memory: text_pairs("MEMORYREGIONS").filter_map(|(at, len)| Some((at, number(&len)?))).collect(),
        data: text_pairs("MEMORYDATA").map(|(at, text)| (at, bytes(&text))).collect(),
    })
}

fn test(engine: &dyn Engine, file: &Path, root: &Path, folder: &Path) -> Result<Verdict, SuiteError> {
    let text = fs::read(file).map_err(|source| SuiteError::Unreadable { file: file.to_owned(), source })?;
    let text = String::from_utf8_lossy(&text);
    let config = match configuration(&text) {
        Ok(config) => config,
        Err(verdict) => return Ok(verdict),
    };
    let (source, program) = (folder.join("test.asm"), folder.join("test.bin"));
    fs::write(&source, format!("BITS 64\n{text}\nret\n")).map_err(SuiteError::Temporary)?;
    let output = Command::new("nasm")
        .arg("-i")
        .arg(root.join("Includes/"))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .map_err(|source| SuiteError::Program { program: "nasm", source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Ok(Verdict::skip(format!("nasm: {}", said.lines().next().unwrap_or("it failed"))));
    }
    let program = fs::read(&program).map_err(SuiteError::Temporary)?;
    Ok(match execute(engine, &program, &config) {
        Ok(state) => compare(&config, &state),
        Err(reason) => Verdict::fail(reason),
    })
}

/// The physical memory of a test, and where its pages are.
struct Space {
    region: Arc<GuestRegion>,
    next: u64,
    root: u64,
}

const TABLE: u64 = 0x1000;
const GDT: u64 = 0x2000;
const TSS: u64 = 0x2800;
const IDT: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const KERNEL_STACK: u64 = 0x6000;
const FIRST_FREE: u64 = 0x10_0000;

impl Space {
    fn put(&self, gpa: u64, bytes: &[u8]) -> Result<(), String> {
        let refused = |_| format!("its memory does not fit at {gpa:#x}");
        self.region.write_slice(bytes, MemoryRegionAddress(gpa)).map_err(refused)
    }

    fn word(&self, gpa: u64) -> u64 {
        self.region.read_obj(MemoryRegionAddress(gpa)).unwrap_or_default()
    }

    fn page(&mut self) -> u64 {
        self.next += PAGE;
        self.next - PAGE
    }

    /// The entry of the last level for an address; the tables above are made.
    fn entry(&mut self, va: u64) -> Result<u64, String> {
        let mut table = self.root;
        for shift in [39, 30, 21] {
            let at = table + (va >> shift & 0x1ff) * 8;
            if self.word(at) == 0 {
                let next = self.page();
                self.put(at, &(next | 7).to_le_bytes())?;
            }
            table = self.word(at) & !0xfff;
        }
        Ok(table + (va >> 12 & 0x1ff) * 8)
    }

    /// Gives user mode memory there.
    fn map(&mut self, va: u64, len: u64) -> Result<(), String> {
        for page in (va & !(PAGE - 1)..va.saturating_add(len)).step_by(PAGE as usize) {
            let entry = self.entry(page)?;
            if self.word(entry) == 0 {
                let gpa = self.page();
                self.put(entry, &(gpa | 7).to_le_bytes())?;
            }
        }
        Ok(())
    }

    fn write(&mut self, va: u64, bytes: &[u8]) -> Result<(), String> {
        self.map(va, bytes.len() as u64)?;
        for (offset, byte) in bytes.iter().enumerate() {
            let va = va + offset as u64;
            let entry = self.entry(va)?;
            let gpa = self.word(entry) & !0xfff | va & 0xfff;
            self.put(gpa, &[*byte])?;
        }
        Ok(())
    }
}

fn execute(engine: &dyn Engine, program: &[u8], config: &Config) -> Result<CpuState, String> {
    let model = engine.cpu_models().into_iter().max().unwrap_or(CpuModel::V1);
    let text = |err: harrier_engine::EngineError| err.to_string();
    let vm = engine.create_vm(&VmConfig { cpu_model: model, vcpu_count: 1, tsc_khz: None }).map_err(text)?;
    let wanted: u64 = config.memory.iter().map(|(_, len)| len).sum();
    let size = (4 << 20) + wanted.next_multiple_of(PAGE) * 2 + program.len() as u64 * 2;
    let mapping =
        MmapRegion::<PageLog>::new(size.next_multiple_of(PAGE) as usize).map_err(|err| err.to_string())?;
    let region = Arc::new(GuestRegion::new(mapping, GuestAddress(0)).ok_or("no guest memory")?);
    vm.map_memory(Arc::clone(&region), false).map_err(text)?;
    let mut space = Space { region, next: FIRST_FREE, root: TABLE };
    for &(at, len) in MEMORY.iter().chain(&config.memory) {
        space.map(at, len)?;
    }
    space.write(CODE, program)?;
    for (at, bytes) in &config.data {
        space.write(*at, bytes)?;
    }
    // The kernel's code and data; user mode's as Linux has them, which tests name; the task.
    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        0x0000_8b00_0000_0067 | TSS << 16,
    ];
    for (slot, descriptor) in descriptors.into_iter().enumerate() {
        space.put(GDT + 8 * slot as u64, &u64::to_le_bytes(descriptor))?;
    }
    // The kernel's part lies in the upper half, away from what programs use.
    const HIGH: u64 = 0xffff_8000_0000_0000;
    let directory = space.page();
    let second = space.page();
    space.put(TABLE + 256 * 8, &(directory | 3).to_le_bytes())?;
    space.put(directory, &(second | 3).to_le_bytes())?;
    space.put(second, &0x83u64.to_le_bytes())?;
    space.put(TSS + 0x66, &0x68u16.to_le_bytes())?;
    space.put(TSS + 4, &(HIGH + KERNEL_STACK).to_le_bytes())?;
    for vector in 0..32u8 {
        let handler = HIGH + HANDLERS + 16 * u64::from(vector);
        space.put(HANDLERS + 16 * u64::from(vector), &[0xe6, vector])?;
        let low = (handler & 0xffff) | 8 << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
        space.put(IDT + 16 * u64::from(vector), &low.to_le_bytes())?;
        space.put(IDT + 16 * u64::from(vector) + 8, &(handler >> 32).to_le_bytes())?;
    }

    let mut vcpu = vm.create_vcpu(0).map_err(text)?;
    let mut state = vcpu.state().map_err(text)?;
    let data = Segment::flat(0x2b, 3, false);
    let segments = &mut state.segments;
    segments.cs = Segment::flat(0x33, 0xb, true);
    (segments.ss, segments.ds, segments.es, segments.fs, segments.gs) = (data, data, data, data, data);
    segments.tr = Segment {
        selector: 0x40,
        base: HIGH + TSS,
        limit: 0x67,
        kind: 0xb,
        present: true,
        ..Segment::default()
    };
    segments.gdtr = DescriptorTable { base: HIGH + GDT, limit: 0x4f };
    segments.idtr = DescriptorTable { base: HIGH + IDT, limit: 0x1ff };
    state.control.cr0 = 0x8005_0033;
    state.control.cr3 = TABLE;
    state.control.cr4 = if model >= CpuModel::V3 { 0x4_0620 } else { 0x620 };
    if model == CpuModel::Host {
        // FSGSBASE, as Linux has it.
        state.control.cr4 |= 1 << 16;
    }
    state.control.efer = 0xd01;
    state.control.xcr0 = if model >= CpuModel::V3 { 7 } else { 1 };
    state.regs.gpr = [0; 16];
    state.regs.gpr[4] = STACK + STACK_BYTES - 0x100;
    state.regs.rip = CODE;
    state.regs.rflags = 0x202;
    vcpu.set_state(&state).map_err(text)?;

    let kicker = vcpu.kicker();
    let done = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let watched = Arc::clone(&done);
    let watchdog = std::thread::spawn(move || {
        let (ended, changed) = &*watched;
        let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        if changed
            .wait_timeout_while(ended, PATIENCE, |ended| !*ended)
            .is_ok_and(|(_, wait)| wait.timed_out())
        {
            kicker.kick();
        }
    });
    // A write to a port below 32 leaves: it is the vector of an exception.
    let mut vector = None;
    let exit = vcpu.run(&mut PortWrites(|port, _: &[u8]| {
        vector = Some(port);
        Flow::Leave
    }));
    *done.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    done.1.notify_all();
    let _ = watchdog.join();
    let mut state = vcpu.state().map_err(text)?;
    let vector = match (exit, vector) {
        (Exit::Left, Some(vector)) => vector,
        (Exit::Kicked, _) => return Err(format!("no end in {} s", PATIENCE.as_secs())),
        (other, _) => return Err(format!("the engine ended by {other:?}")),
    };
    // The frame: error code for some, then RIP, CS, RFLAGS, RSP.
    let frame = state.regs.gpr[4].wrapping_sub(HIGH) + if matches!(vector, 8 | 10..=14 | 17) { 8 } else { 0 };
    let rip = space.word(frame);
    state.regs.gpr[4] = space.word(frame + 24);
    let entry = space.entry(rip)?;
    let entry = space.word(entry) & !0xfff;
    let mut byte = [0];
    let _ = space.region.read_slice(&mut byte, MemoryRegionAddress(entry | rip & 0xfff));
    if vector != 13 || byte != [0xf4] {
        return Err(format!("exception {vector} at {rip:#x}, address {:#x}", state.control.cr2));
    }
    Ok(state)
}

fn compare(config: &Config, state: &CpuState) -> Verdict {
    let area = |at: usize| {
        let bytes = state.xsave.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"];
    let top = usize::from(state.xsave.get(3).copied().unwrap_or(0) >> 3 & 7);
    for (name, wanted) in &config.registers {
        let index = |prefix: &str| name.strip_prefix(prefix).and_then(|digits| digits.parse::<usize>().ok());
        let found = if let Some(number) = names.iter().position(|known| known == name).or_else(|| index("R"))
        {
            vec![state.regs.gpr.get(number).copied().unwrap_or(0)]
        } else if let Some(number) = index("XMM") {
            let low = 160 + 16 * number;
            let high = 576 + 16 * number;
            vec![area(low), area(low + 8), area(high), area(high + 8)]
        } else if let Some(number) = index("MM") {
            let at = 32 + 16 * (number.wrapping_sub(top) & 7);
            vec![area(at), area(at + 8) & 0xffff]
        } else if name == "FS" || name == "GS" {
            let segments = &state.segments;
            vec![if name == "FS" { segments.fs.base } else { segments.gs.base }]
        } else {
            continue;
        };
        for (part, (wanted, found)) in wanted.iter().zip(&found).enumerate() {
            if wanted != found {
                return Verdict::fail(format!("{name}[{part}] is {found:#x}, not {wanted:#x}"));
            }
        }
    }
    Verdict::Pass
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_says_what_it_wants() {
        let text = "%ifdef CONFIG\n{ \"RegData\": { \"RAX\": \"0x10\", \"XMM0\": [\"1\", \"-1\"] },\n\
                    \"MemoryRegions\": { \"0x100000000\": \"4096\" }, \"MemoryData\": { \"0x10\": \"01 0203\" } }\n%endif";
        let config = configuration(text).unwrap_or_else(|_| panic!("it is refused"));
        assert_eq!(config.registers["RAX"], [16]);
        assert_eq!(config.registers["XMM0"], [1, u64::MAX]);
        assert_eq!(config.memory, [(1 << 32, 4096)]);
        assert_eq!(config.data, [(16, vec![1, 3, 2])]);
        let foreign = text.replace("{ \"RegData\"", "{ \"HostFeatures\": [\"3DNOW\"], \"RegData\"");
        assert!(configuration(&foreign).is_err());
    }
}
