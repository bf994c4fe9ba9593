//! Snapshots that were made by earlier versions restore in this one, on every engine.
//!
//! The folders under `fixtures/` are committed and never changed: a new version of the format adds one. The guest has
//! summed up the numbers to 100 in real mode and waits for a byte on its serial port; it ends with their sum and the byte.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_conformance::engines;
use harrier_engine::{CpuModel, Engine, Probe};
use harrier_engine_soft::SoftEngine;
use harrier_machine::boot::{Boot, BytesImage, Entry};
use harrier_machine::snapshot::{Kind, Request, Restoration};
use harrier_machine::{MachineBuilder, MachineConfig, MachineEnd};
use harrier_snapshot::{Chain, verify};

const SUM: u32 = 5050;
const GUEST: &[u8] = &[
    0x31, 0xc0, // xor ax, ax
    0xb9, 0x64, 0x00, // mov cx, 100
    0x01, 0xc8, // add ax, cx
    0xe2, 0xfc, // loop add
    0x89, 0xc3, // mov bx, ax
    0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz in
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x30, 0xe4, // xor ah, ah
    0x01, 0xd8, // add ax, bx
    0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xef, // out dx, ax
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Format 1 was taken without a doorbell; format 2 has one, and its memory is compressed.
fn add_devices(builder: &mut MachineBuilder, input: io::PipeReader, has_doorbell: bool) {
    builder.add_platform_devices().unwrap();
    if has_doorbell {
        builder.add_doorbell().unwrap();
    }
    builder.add_debug_exit().unwrap();
    builder.add_serial(Box::new(io::sink()), Some(input.into())).unwrap();
}

fn restored_end(engine: &dyn Engine, folder: &Path, byte: u8) -> MachineEnd {
    let chain = Arc::new(Chain::open(folder).unwrap());
    let mut builder = MachineBuilder::restoring(engine, &chain).unwrap();
    let (input, mut keys) = io::pipe().unwrap();
    let has_doorbell = chain.snapshot().manifest().sections.iter().any(|section| section.name == "doorbell");
    add_devices(&mut builder, input, has_doorbell);
    let mut machine = builder.restore(&chain, &Restoration::default()).unwrap();
    let sum = machine.cpu_states().unwrap()[0].regs.gpr[3];
    assert_eq!(sum as u32, SUM, "the sum is in BX before anything runs");
    machine.start().unwrap();
    keys.write_all(&[byte]).unwrap();
    machine.handle().wait_for_end(Some(Instant::now() + Duration::from_secs(60)));
    machine.handle().stop();
    machine.wait().end
}

#[test]
fn every_snapshot_that_was_ever_made_goes_on_on_every_engine() {
    let mut seen = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let folder = entry.unwrap().path();
        // Pairs have a test of their own.
        if !folder.join("manifest.json").exists() {
            continue;
        }
        assert_eq!(verify(&folder).unwrap(), [], "{}", folder.display());
        for engine in engines() {
            if let Probe::Unavailable { reason } = engine.probe() {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                continue;
            }
            // The same one as often as one likes.
            for byte in [1, 77] {
                let end = restored_end(engine.as_ref(), &folder, byte);
                assert_eq!(end, MachineEnd::DebugExit(SUM + u32::from(byte)), "{}", engine.name());
            }
        }
        seen += 1;
    }
    assert!(seen >= 2, "a fixture is missing");
}

/// Makes a fixture for the present version, where `HARRIER_FIXTURE` says.
#[test]
#[ignore = "makes a new fixture"]
fn make() {
    let target =
        PathBuf::from(std::env::var_os("HARRIER_FIXTURE").expect("HARRIER_FIXTURE names the folder"));
    let config = MachineConfig { vcpu_count: 1, memory_bytes: 2 << 20, cpu_model: CpuModel::V1 };
    let mut builder = MachineBuilder::new(&SoftEngine, &config).unwrap();
    let (input, _keys) = io::pipe().unwrap();
    add_devices(&mut builder, input, true);
    let image = BytesImage::new("guest", GUEST);
    let entry = Entry::Real { cs: 0, ip: 0x7c00 };
    let mut machine = builder.build(&Boot::Flat { image: &image, gpa: 0x7c00, entry }).unwrap();
    machine.start().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let request = Request {
        target: &target,
        kind: Kind::Full,
        stay_paused: false,
        compress: true,
        quiesce_limit: Duration::ZERO,
        rest: None,
        producer: "harrier fixture",
        owner: &mut |_| Ok(()),
        settle: &mut || Ok(()),
        progress: &mut |_| true,
    };
    machine.handle().snapshot(request).unwrap();
}
