//! A machine with a disk of two layers that was snapshotted by an earlier version, restored on every engine.
//!
//! `fixtures/disk-layers` is committed and never changed: `first` is a full snapshot with a disk, `second` a difference with a
//! layer of it, whose memory is `second`'s where that has it and `first`'s elsewhere. The guest waits for a byte on its serial
//! port and ends with it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harrier_conformance::engines;
use harrier_devices::virtio::block::Block;
use harrier_devices::virtio::disk::{Base, BlockMap, DiskFile, Layer};
use harrier_engine::{CpuModel, Engine, Probe};
use harrier_engine_soft::SoftEngine;
use harrier_machine::boot::{Boot, BytesImage, Entry};
use harrier_machine::snapshot::{Kind, Request, Restoration};
use harrier_machine::{Machine, MachineBuilder, MachineConfig, MachineEnd};
use harrier_snapshot::{Chain, layer_name, nameless_beside, seal_layer, verify};

const GUEST: &[u8] = &[
    0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz in
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x30, 0xe4, // xor ah, ah
    0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xef, // out dx, ax
];
const DISK: &str = "disk-0";
/// The last block is not a whole one.
const LEN: u64 = 5 * 4096 + 512;
/// What stands at the beginning of each block: the second and the last are the layer's, and so is the zero of the third.
const IN_FIRST: [u8; 6] = [b'a', b'b', b'c', 0, b'e', b'f'];
const IN_SECOND: [u8; 6] = [b'a', b'B', 0, 0, b'e', b'F'];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/disk-layers")
}

fn add_devices(builder: &mut MachineBuilder, disk: Block, input: io::PipeReader) {
    builder.add_platform_devices().unwrap();
    builder.add_doorbell().unwrap();
    builder.add_debug_exit().unwrap();
    builder.add_virtio(Box::new(disk)).unwrap();
    builder.add_serial(Box::new(io::sink()), Some(input.into())).unwrap();
}

fn heads(file: &File) -> [u8; 6] {
    std::array::from_fn(|block| {
        let mut head = [0];
        file.read_exact_at(&mut head, block as u64 * 4096).unwrap();
        head[0]
    })
}

/// The disk of a snapshot as the command line opens it.
fn own_disk(chain: &Chain, room: &Path) -> Block {
    let disk = chain.disk(DISK).unwrap();
    assert_eq!(disk.bytes, LEN);
    let layers = disk.layers.into_iter().map(|layer| Layer {
        blocks: BlockMap::from_words(layer.disk_bytes, layer.blocks.words()),
        file: layer.file,
    });
    let base = Base { layers: layers.collect(), bottom: disk.base };
    let own = nameless_beside(&room.join("x")).unwrap();
    Block::from_disk(DiskFile::over(base, own, LEN).unwrap(), false, b"disk")
}

fn restored_end(engine: &dyn Engine, name: &str, expected: [u8; 6]) -> MachineEnd {
    let room = tempfile::tempdir().unwrap();
    let chain = Arc::new(Chain::open(&folder().join(name)).unwrap());
    let disk = own_disk(&chain, room.path());
    // A whole copy of what its guest sees.
    let copy =
        File::options().read(true).write(true).create_new(true).open(room.path().join("copy")).unwrap();
    disk.copies().unwrap().begin(copy.try_clone().unwrap(), None).unwrap().finish().unwrap();
    assert_eq!(heads(&copy), expected, "{name}");
    let mut builder = MachineBuilder::restoring(engine, &chain).unwrap();
    let (input, mut keys) = io::pipe().unwrap();
    add_devices(&mut builder, disk, input);
    let mut machine = builder.restore(&chain, &Restoration::default()).unwrap();
    machine.start().unwrap();
    keys.write_all(&[44]).unwrap();
    machine.handle().wait_for_end(Some(Instant::now() + Duration::from_secs(60)));
    machine.handle().stop();
    machine.wait().end
}

#[test]
fn disks_in_layers_of_an_earlier_version_are_what_they_were_on_every_engine() {
    for (name, content) in [("first", IN_FIRST), ("second", IN_SECOND)] {
        assert_eq!(verify(&folder().join(name)).unwrap(), []);
        for engine in engines() {
            if let Probe::Unavailable { reason } = engine.probe() {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                continue;
            }
            let end = restored_end(engine.as_ref(), name, content);
            assert_eq!(end, MachineEnd::DebugExit(44), "{name} on {}", engine.name());
        }
    }
}

fn take(machine: &Machine, target: &Path, kind: Kind, content: [u8; 6]) {
    let request = Request {
        target,
        kind,
        stay_paused: false,
        compress: true,
        quiesce_limit: Duration::ZERO,
        rest: None,
        producer: "harrier fixture",
        owner: &mut |writer| {
            let is_layer = kind == Kind::Difference;
            let name = if is_layer { layer_name(DISK) } else { DISK.to_owned() };
            let file = writer.create_file(&name).map_err(|err| err.to_string())?;
            file.set_len(LEN).unwrap();
            let mut blocks = 0;
            for (block, (first, now)) in IN_FIRST.iter().zip(content).enumerate() {
                if now != 0 && (!is_layer || *first != now) {
                    file.write_all_at(&[now], block as u64 * 4096).unwrap();
                }
                blocks |= u64::from(*first != now) << block;
            }
            if is_layer {
                seal_layer(&file, writer.id(), LEN, [(0, blocks)]).unwrap();
            }
            Ok(())
        },
        settle: &mut || Ok(()),
        progress: &mut |_| true,
    };
    machine.handle().snapshot(request).unwrap();
}

/// Makes a fixture for the present version, in the folder that `HARRIER_FIXTURE` says.
#[test]
#[ignore = "makes a new fixture"]
fn make() {
    let target =
        PathBuf::from(std::env::var_os("HARRIER_FIXTURE").expect("HARRIER_FIXTURE names the folder"));
    std::fs::create_dir_all(&target).unwrap();
    let config = MachineConfig { vcpu_count: 1, memory_bytes: 2 << 20, cpu_model: CpuModel::V1 };
    let mut builder = MachineBuilder::new(&SoftEngine, &config).unwrap();
    let (input, _keys) = io::pipe().unwrap();
    let disk = nameless_beside(&target.join("x")).unwrap();
    disk.set_len(LEN).unwrap();
    add_devices(&mut builder, Block::from_file(disk, false, b"disk").unwrap(), input);
    let image = BytesImage::new("guest", GUEST);
    let entry = Entry::Real { cs: 0, ip: 0x7c00 };
    let mut machine = builder.build(&Boot::Flat { image: &image, gpa: 0x7c00, entry }).unwrap();
    machine.start().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    take(&machine, &target.join("first"), Kind::Full, IN_FIRST);
    take(&machine, &target.join("second"), Kind::Difference, IN_SECOND);
}
