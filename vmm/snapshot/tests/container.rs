//! Snapshots as files: written, read, damaged in every way, and their writers killed at every step.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use harrier_snapshot::{
    Chain, PageKind, Section, Snapshot, SnapshotError, SnapshotWriter, Source, Step, compact, layer_name,
    list, remove, seal_layer, sweep, unpack, verify,
};

const PAGE: usize = 4096;
const PAGES: u64 = 1000;

fn section(name: &str, bytes: &[u8]) -> Section {
    Section { name: name.to_owned(), version: 3, bytes: bytes.to_vec() }
}

fn page(value: u8) -> Vec<u8> {
    vec![value; PAGE]
}

/// A snapshot with data at `pages`, whose bytes are `value`.
fn write(
    target: &Path,
    parent: Option<&Snapshot>,
    pages: &[u64],
    value: u8,
) -> Result<Snapshot, SnapshotError> {
    let mut writer = SnapshotWriter::create(target, parent, "test")?;
    let mut memory = writer.memory(PAGES)?;
    for at in pages {
        memory.write(*at, &page(value))?;
    }
    writer.finish_memory(memory)?;
    writer.add_section(section("machine", b"{}"));
    writer.add_section(section("cpu-0", &[value; 100]));
    let file = writer.create_file("disk-0").unwrap();
    file.write_all_at(b"disk", 0).unwrap();
    writer.commit()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn read_page(chain: &Chain, at: u64) -> u8 {
    let mut bytes = page(99);
    chain.read(at, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[test]
fn what_was_written_is_read_and_holes_cost_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("base");
    let written = write(&target, None, &[0, 3, 4, 999], 7).unwrap();
    assert_eq!(names(folder.path()), ["base"]);
    assert_eq!(names(&target), ["disk-0", "manifest.json", "memory", "state"]);
    let chain = Chain::open(&target).unwrap();
    assert_eq!(chain.snapshot().manifest(), written.manifest());
    assert_eq!(chain.snapshot().section("cpu-0").unwrap(), section("cpu-0", &[7; 100]));
    assert_eq!([0, 1, 2, 3, 4, 998, 999].map(|at| read_page(&chain, at)), [7, 0, 0, 7, 7, 0, 7]);
    let memory = fs::metadata(target.join("memory")).unwrap();
    assert!(memory.blocks() * 512 < 64 << 10, "{} blocks", memory.blocks());
    assert_eq!(memory.permissions().mode() & 0o777, 0o400);
    assert_eq!(chain.runs().unwrap().len(), 5);
    assert_eq!(verify(&target).unwrap(), []);
}

#[test]
fn a_page_that_becomes_zero_again_is_a_hole() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("s");
    let mut writer = SnapshotWriter::create(&target, None, "test").unwrap();
    let mut memory = writer.memory(4).unwrap();
    memory.write(0, &[page(1), page(2), page(3), page(4)].concat()).unwrap();
    memory.write(1, &[page(0), page(5)].concat()).unwrap();
    assert!(memory.write(3, &[page(1), page(1)].concat()).is_err(), "beyond the end");
    writer.finish_memory(memory).unwrap();
    let snapshot = writer.commit().unwrap();
    let image = snapshot.memory().unwrap();
    assert_eq!(
        [0, 1, 2, 3].map(|at| image.map.get(at)),
        [PageKind::Data, PageKind::Zero, PageKind::Data, PageKind::Data]
    );
    let chain = Chain::from_snapshot(snapshot).unwrap();
    assert_eq!([0, 1, 2, 3].map(|at| read_page(&chain, at)), [1, 0, 5, 4]);
    assert_eq!(verify(&target).unwrap(), []);
}

#[test]
fn a_chain_has_of_each_page_the_youngest() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let base = write(&at("a"), None, &[1, 2, 3, 4], 1).unwrap();
    let second = write(&at("b"), Some(&base), &[2, 5], 2).unwrap();
    let mut writer = SnapshotWriter::create(&at("c"), Some(&second), "test").unwrap();
    let mut memory = writer.memory(PAGES).unwrap();
    memory.write(3, &page(0)).unwrap();
    memory.write(4, &page(3)).unwrap();
    writer.finish_memory(memory).unwrap();
    writer.commit().unwrap();
    let chain = Chain::open(&at("c")).unwrap();
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(|page| read_page(&chain, page)), [0, 1, 2, 0, 3, 2, 0]);
    assert_eq!((chain.depth(), chain.is_full()), (3, false));
    // A renamed parent is found by its id.
    fs::rename(at("a"), at("renamed")).unwrap();
    assert_eq!(read_page(&Chain::open(&at("c")).unwrap(), 1), 1);
    // One that is needed stays; those that nobody needs go.
    let needed = remove(&at("b")).unwrap_err();
    assert!(matches!(&needed, SnapshotError::Needed { children, .. } if children == &["c"]), "{needed}");
    assert!(remove(&at("renamed")).is_err());
    assert_eq!(names(folder.path()), ["b", "c", "renamed"]);
    for name in ["c", "b", "renamed"] {
        remove(&at(name)).unwrap();
    }
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_difference_stands_beside_its_parent_and_misses_it_when_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let base = write(&folder.path().join("a"), None, &[1], 1).unwrap();
    let refused = write(&elsewhere.path().join("b"), Some(&base), &[2], 2).unwrap_err();
    assert!(matches!(refused, SnapshotError::NotBesideParent { .. }), "{refused}");
    write(&folder.path().join("b"), Some(&base), &[2], 2).unwrap();
    fs::rename(folder.path().join("a"), elsewhere.path().join("a")).unwrap();
    let missing = Chain::open(&folder.path().join("b")).unwrap_err().to_string();
    assert!(missing.contains("needs its parent") && missing.contains("'a'"), "{missing}");
    // Another snapshot under the parent's name is not taken for it.
    write(&folder.path().join("a"), None, &[1], 9).unwrap();
    assert!(matches!(Chain::open(&folder.path().join("b")), Err(SnapshotError::MissingParent { .. })));
    let damage = verify(&folder.path().join("b")).unwrap();
    assert!(damage.len() == 1 && damage[0].reason.contains("parent"), "{damage:?}");
}

#[test]
fn existing_folders_are_never_touched() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a");
    write(&target, None, &[1], 1).unwrap();
    assert!(matches!(write(&target, None, &[1], 2), Err(SnapshotError::Exists(_))));
    // Even one that appears while the snapshot is being written.
    let late = folder.path().join("late");
    let writer = SnapshotWriter::create(&late, None, "test").unwrap();
    fs::create_dir(&late).unwrap();
    assert!(matches!(writer.commit(), Err(SnapshotError::Exists(_))));
    assert_eq!(names(folder.path()), ["a", "late"]);
    assert!(names(&late).is_empty());
    for bad in ["/", "..", "", "/nowhere/at/all"] {
        assert!(SnapshotWriter::create(Path::new(bad), None, "test").is_err(), "{bad}");
    }
}

#[test]
fn a_writer_that_gives_up_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let writer = SnapshotWriter::create(&folder.path().join("a"), None, "test").unwrap();
    let mut memory = writer.memory(PAGES).unwrap();
    memory.write(0, &page(1)).unwrap();
    assert_eq!(names(folder.path()).len(), 1);
    // A writer that lives is not swept away.
    sweep(folder.path()).unwrap();
    assert_eq!(names(folder.path()).len(), 1);
    drop(memory);
    drop(writer);
    assert!(names(folder.path()).is_empty());
}

/// Opens a file of a snapshot for damaging it.
fn damaged(folder: &Path, file: &str, change: impl FnOnce(&File)) {
    let path = folder.join(file);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    change(&File::options().read(true).write(true).open(path).unwrap());
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn every_flipped_byte_is_found_in_its_part_and_at_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a");
    let snapshot = write(&target, None, &[0, 300, 301, 999], 5).unwrap();
    let state_bytes = snapshot.manifest().state_bytes;
    let memory_bytes = fs::metadata(target.join("memory")).unwrap().len();
    drop(snapshot);
    let mut checked = 0;
    let pages_end = PAGES * PAGE as u64;
    let memory_offsets = [0, 1, 4095, 5000, 300 * 4096, 302 * 4096 + 7, pages_end - 1];
    let trailer = (pages_end..memory_bytes).step_by(7);
    for at in memory_offsets.into_iter().chain(trailer) {
        damaged(&target, "memory", |file| flip(file, at));
        let found = verify(&target).unwrap();
        assert_eq!(found.len(), 1, "memory at {at}: {found:?}");
        let place = found[0].offset..found[0].offset + found[0].bytes.max(1);
        assert!(found[0].part == "memory" && (at >= pages_end || place.contains(&at)), "{at}: {found:?}");
        damaged(&target, "memory", |file| flip(file, at));
        checked += 1;
    }
    assert!(checked > 40);
    for at in 0..state_bytes {
        damaged(&target, "state", |file| flip(file, at));
        let found = verify(&target).unwrap();
        // What lies between the sections is nobody's, and zero.
        let place = found[0].offset..found[0].offset + found[0].bytes.max(1);
        assert!(found.len() == 1 && (at < 32 || place.contains(&at)), "state at {at}: {found:?}");
        damaged(&target, "state", |file| flip(file, at));
    }
    damaged(&target, "disk-0", |file| flip(file, 2));
    assert_eq!(verify(&target).unwrap()[0].part, "disk-0");
    damaged(&target, "disk-0", |file| flip(file, 2));
    assert_eq!(verify(&target).unwrap(), []);
}

#[test]
fn truncated_lengthened_swapped_and_missing_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let fresh = |name: &str, value: u8| -> PathBuf {
        let target = folder.path().join(name);
        write(&target, None, &[0, 1], value).unwrap();
        target
    };
    for (index, file) in ["memory", "state", "manifest.json"].into_iter().enumerate() {
        let short = fresh(&format!("short-{index}"), 1);
        damaged(&short, file, |file| file.set_len(file.metadata().unwrap().len() - 1).unwrap());
        let refused = Chain::open(&short).map(|_| ());
        // The line end of the manifest is nobody's.
        assert_eq!(refused.is_err(), file != "manifest.json", "{file}");
        damaged(&short, file, |file| file.set_len(3).unwrap());
        assert!(Chain::open(&short).is_err(), "{file}");
        let long = fresh(&format!("long-{index}"), 1);
        damaged(&long, file, |file| file.set_len(file.metadata().unwrap().len() + 1).unwrap());
        assert!(Chain::open(&long).is_err(), "{file}");
        let gone = fresh(&format!("gone-{index}"), 1);
        fs::remove_file(gone.join(file)).unwrap();
        let text = Chain::open(&gone).unwrap_err().to_string();
        assert!(text.contains(file), "{text}");
        // The same file of another snapshot, of the same length.
        let (one, two) = (fresh(&format!("one-{index}"), 1), fresh(&format!("two-{index}"), 1));
        fs::rename(two.join(file), one.join(file)).unwrap();
        let text = Chain::open(&one).unwrap_err().to_string();
        assert!(text.contains("belongs to another snapshot") || text.contains("checksum"), "{text}");
    }
    assert!(matches!(Chain::open(Path::new("/")), Err(SnapshotError::NotASnapshot { .. })));
    assert!(matches!(Chain::open(Path::new("/nowhere")), Err(SnapshotError::NotASnapshot { .. })));
}

const TARGET: &str = "HARRIER_TEST_SNAPSHOT_TARGET";
const KILL_AT: &str = "HARRIER_TEST_KILL_AT";

/// Not a test of its own: the process that the tests below start.
#[test]
#[ignore = "is started by other tests"]
fn writer_process() {
    let Some(target) = std::env::var_os(TARGET) else { return };
    let target = PathBuf::from(target);
    let kill_at: usize = std::env::var(KILL_AT).unwrap().parse().unwrap();
    let mut steps = 0;
    let mut step = |_: Step| {
        if steps == kill_at {
            // As hard as kill -9.
            let pid = std::process::id().to_string();
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        steps += 1;
    };
    let base = Snapshot::open(&target.with_file_name("base")).unwrap();
    let mut run = || -> Result<(), SnapshotError> {
        let mut writer = SnapshotWriter::create(&target, Some(&base), "test")?;
        step(Step::Created);
        let mut memory = writer.memory(PAGES)?;
        for at in 0..500 {
            memory.write(at, &page(8))?;
        }
        step(Step::Memory);
        writer.finish_memory(memory)?;
        writer.add_section(section("machine", b"{}"));
        writer.watched_by(&mut step).commit()?;
        Ok(())
    };
    if let Err(error) = run() {
        println!("refused: {error}");
    }
}

fn writer(target: &Path, kill_at: usize, limit_blocks: Option<u32>) -> String {
    let exe = std::env::current_exe().unwrap();
    let limit = limit_blocks.map_or(String::new(), |blocks| format!("ulimit -f {blocks}; "));
    let script = format!("trap '' XFSZ; {limit}exec \"$0\" --ignored --exact writer_process --nocapture");
    let output = Command::new("sh")
        .args(["-c", &script])
        .arg(exe)
        .env(TARGET, target)
        .env(KILL_AT, kill_at.to_string())
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_writer_that_is_killed_leaves_all_or_nothing_and_the_others_intact() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("base"), None, &[0, 7], 3).unwrap();
    let mut complete = 0;
    for kill_at in 0..10 {
        let target = folder.path().join(format!("new-{kill_at}"));
        writer(&target, kill_at, None);
        match Chain::open(&target) {
            Ok(chain) => {
                complete += 1;
                assert_eq!([0, 7, 499, 500].map(|at| read_page(&chain, at)), [8, 8, 8, 0]);
                assert_eq!(verify(&target).unwrap(), []);
            }
            Err(SnapshotError::NotASnapshot { .. }) => assert!(!target.exists(), "{kill_at}"),
            Err(error) => panic!("{kill_at}: {error}"),
        }
        assert_eq!(verify(&folder.path().join("base")).unwrap(), []);
        assert_eq!(list(folder.path()).unwrap().len(), 1 + complete);
        // The next writer clears up what is left.
        sweep(folder.path()).unwrap();
        assert_eq!(names(folder.path()).len(), 1 + complete, "{kill_at}");
    }
    // Killed before the name there is none, after it there is one; the last ones were not killed at all.
    assert!((3..9).contains(&complete), "{complete}");
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("base"), None, &[0, 7], 3).unwrap();
    // A limit on the size of files fails writes as a full disk does.
    let said = writer(&folder.path().join("new"), usize::MAX, Some(1000));
    assert!(said.contains("refused: snapshot: cannot write "), "{said}");
    assert_eq!(names(folder.path()), ["base"]);
    assert_eq!(verify(&folder.path().join("base")).unwrap(), []);
}

#[test]
fn a_compacted_snapshot_needs_no_parent_and_stays_one_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = write(&path("base"), None, &[0, 1, 2, 700], 1).unwrap();
    let first = write(&path("first"), Some(&base), &[1, 2, 701], 2).unwrap();
    let mut writer = SnapshotWriter::create(&path("second"), Some(&first), "test").unwrap();
    let mut memory = writer.memory(PAGES).unwrap();
    memory.write(2, &page(3)).unwrap();
    memory.release(700, 1).unwrap();
    writer.finish_memory(memory).unwrap();
    writer.add_section(section("cpu-0", b"second"));
    let file = writer.create_file("disk-0").unwrap();
    file.write_all_at(b"second's", 0).unwrap();
    let second = writer.commit().unwrap();
    let third = write(&path("third"), Some(&second), &[5], 4).unwrap();
    let content = |name: &str| -> Vec<u8> {
        let chain = Chain::open(&path(name)).unwrap();
        (0..PAGES).map(|at| read_page(&chain, at)).collect()
    };
    let (second_before, third_before) = (content("second"), content("third"));
    assert_eq!((second_before[0], second_before[1], second_before[2], second_before[700]), (1, 2, 3, 0));

    // Damage in what it needs is not made good by new checksums.
    let memory = path("first").join("memory");
    let flip = |byte: u8| {
        fs::set_permissions(&memory, fs::Permissions::from_mode(0o600)).unwrap();
        File::options().write(true).open(&memory).unwrap().write_all_at(&[byte], PAGE as u64).unwrap();
    };
    flip(77);
    let error = compact(&path("second")).unwrap_err();
    assert!(error.to_string().contains("first' is damaged: memory at offset 0"), "{error}");
    flip(2);

    let full = compact(&path("second")).unwrap();
    assert_eq!(
        (full.manifest().id, full.manifest().created_ms),
        (second.manifest().id, second.manifest().created_ms)
    );
    assert_eq!((full.manifest().parent.clone(), content("second")), (None, second_before));
    assert_eq!(full.section("cpu-0").unwrap(), section("cpu-0", b"second"));
    assert_eq!(fs::read(path("second").join("disk-0")).unwrap(), b"second's");
    assert_eq!(verify(&path("second")).unwrap(), []);
    assert_eq!(compact(&path("second")).unwrap().manifest(), full.manifest(), "once is enough");
    // Those below it need its former parents no longer, those above it are as they were.
    remove(&path("first")).unwrap();
    remove(&path("base")).unwrap();
    assert_eq!(content("third"), third_before);
    assert_eq!(verify(third.path()).unwrap(), []);
    assert!(matches!(remove(&path("second")), Err(SnapshotError::Needed { .. })));
    assert_eq!(names(folder.path()), ["second", "third"]);
}

/// A snapshot whose disk of `len` bytes has `value` in such blocks: all of it, or a layer.
fn write_disk(target: &Path, parent: Option<&Snapshot>, len: u64, blocks: &[u64], value: u8) -> Snapshot {
    let mut writer = SnapshotWriter::create(target, parent, "test").unwrap();
    let name = if parent.is_some() { layer_name("disk-0") } else { "disk-0".to_owned() };
    let file = writer.create_file(&name).unwrap();
    file.set_len(len).unwrap();
    let mut map = vec![0u64; 2];
    for block in blocks {
        let bytes = (len - block * 4096).min(4096) as usize;
        file.write_all_at(&vec![value; bytes], block * 4096).unwrap();
        map[(block / 64) as usize] |= 1 << (block % 64);
    }
    if parent.is_some() {
        seal_layer(&file, writer.id(), len, (0..).zip(map)).unwrap();
    }
    writer.commit().unwrap()
}

#[test]
fn a_disk_is_what_the_layers_of_its_chain_say_also_when_it_is_compacted() {
    const LEN: u64 = 69 * 4096 + 512;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = write_disk(&path("a"), None, LEN, &[0, 1, 69], 1);
    let middle = write_disk(&path("b"), Some(&base), LEN, &[1, 2, 66], 2);
    write_disk(&path("c"), Some(&middle), LEN, &[2, 69], 3);
    let version = |name: &str| {
        let manifest = fs::read_to_string(path(name).join("manifest.json")).unwrap();
        manifest.chars().nth(r#"{"format":"harrier-snapshot","version":"#.len())
    };
    assert_eq!(["a", "b", "c"].map(version), [Some('1'), Some('2'), Some('2')], "the oldest that will do");
    let expected = [(0, 1), (1, 2), (2, 3), (3, 0), (66, 2), (69, 3)];
    let disk = Chain::open(&path("c")).unwrap().disk("disk-0").unwrap();
    assert_eq!((disk.bytes, disk.layers.len()), (LEN, 2));
    assert_eq!(verify(&path("c")).unwrap(), []);
    compact(&path("c")).unwrap();
    let alone = fs::read(path("c").join("disk-0")).unwrap();
    assert_eq!((alone.len() as u64, version("c")), (LEN, Some('1')));
    for (block, value) in expected {
        let at = block * 4096;
        assert!(alone[at..(at + 4096).min(alone.len())].iter().all(|byte| *byte == value), "block {block}");
    }
    assert_eq!(verify(&path("c")).unwrap(), []);
}

#[test]
fn layers_that_no_writer_writes_are_refused_by_name_and_place() {
    const LEN: u64 = 70 * 4096;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = write_disk(&path("a"), None, LEN, &[0], 1);
    write_disk(&path("b"), Some(&base), LEN, &[1], 2);
    let whole = fs::read(path("b").join("disk-0.layer")).unwrap();
    let end = whole.len() as u64;
    let refused = |bytes: &[(u64, &[u8])]| {
        damaged(&path("b"), "disk-0.layer", |file| {
            bytes.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        });
        let error = Chain::open(&path("b")).unwrap().disk("disk-0").unwrap_err().to_string();
        damaged(&path("b"), "disk-0.layer", |file| file.write_all_at(&whole, 0).unwrap());
        error
    };
    let size = end - 48 + 16;
    for (bytes, text) in [
        (vec![(end - 1, &b"?"[..])], "disk-0.layer at offset 286736: the footer"),
        (vec![(end - 48, &[9; 16][..])], "the footer belongs to another snapshot"),
        (vec![(size, &u64::MAX.to_le_bytes()[..])], "not as long as its disk asks for"),
        (vec![(size, &(LEN * 2).to_le_bytes()[..])], "not as long as its disk asks for"),
        (vec![(size, &(1u64 << 43).to_le_bytes()[..])], "not as long as its disk asks for"),
        (vec![(end - 48 - 1, &[0x80][..])], "blocks behind the disk's end"),
    ] {
        let error = refused(&bytes);
        assert!(error.contains(text), "{error}");
    }
    damaged(&path("b"), "disk-0.layer", |file| flip(file, 4096));
    assert_eq!(verify(&path("b")).unwrap()[0].part, "disk-0.layer");
    damaged(&path("b"), "disk-0.layer", |file| flip(file, 4096));
    // Another size than the parent's; and blocks that nobody has.
    write_disk(&path("c"), Some(&base), LEN - 4096, &[1], 2);
    let error = Chain::open(&path("c")).unwrap().disk("disk-0").unwrap_err().to_string();
    assert!(error.contains("a disk of 286720 bytes instead of 282624"), "{error}");
    assert_eq!(verify(&path("c")).unwrap().len(), 1);
    let chain = Chain::open(&path("b")).unwrap();
    assert!(chain.disk("disk-1").unwrap_err().to_string().contains("disk-1.layer"));
    assert!(seal_layer(&File::open("/dev/null").unwrap(), base.manifest().id, u64::MAX, []).is_err());
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_disk_that_is_mostly_a_hole_costs_what_it_has_and_not_what_it_claims() {
    // As large as the file systems of most hosts take a file with its map.
    const LEN: u64 = 15 << 40;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let far = LEN / 4096 - 3;
    let make = |name: &str, parent: Option<&Snapshot>, block: u64| {
        let writer = SnapshotWriter::create(&path(name), parent, "test").unwrap();
        let mut writer = writer.fleeting().unchecked();
        let disk = if parent.is_some() { layer_name("disk-0") } else { "disk-0".to_owned() };
        let file = writer.create_file(&disk).unwrap();
        file.set_len(LEN).unwrap();
        file.write_all_at(&[9; 4096], block * 4096).unwrap();
        if parent.is_some() {
            seal_layer(&file, writer.id(), LEN, [(block / 64, 1 << (block % 64))]).unwrap();
        }
        writer.commit().unwrap()
    };
    let first = make("first", None, 5);
    make("second", Some(&first), far);
    let before = resident();
    let chain = Chain::open(&path("second")).unwrap();
    let disk = chain.disk("disk-0").unwrap();
    assert_eq!(disk.bytes, LEN);
    assert_eq!(disk.layers[0].blocks.words().collect::<Vec<_>>(), [(far / 64, 1 << (far % 64))]);
    assert!(disk.layers[0].blocks.has(far) && !disk.layers[0].blocks.has(far - 1));
    // Neither memory nor time is that of its length.
    let whole = unpack(&chain, &path("whole"), "test").unwrap();
    let file = whole.file("disk-0").unwrap();
    for (block, value) in [(5, 9), (6, 0), (far, 9), (far + 1, 0)] {
        let mut bytes = [1; 4096];
        file.read_exact_at(&mut bytes, block * 4096).unwrap();
        assert_eq!(bytes, [value; 4096], "block {block}");
    }
    assert!(resident() < before + (16 << 20), "{} bytes, {before} before", resident());
}

/// A snapshot with compressed memory: data that becomes short, data that does not, zeros and holes.
fn write_packed(target: &Path, parent: Option<&Snapshot>, pages: &[u64], value: u8) -> Snapshot {
    let mut writer = SnapshotWriter::create(target, parent, "test").unwrap().compressed(true);
    let mut memory = writer.memory(PAGES).unwrap();
    for at in pages {
        memory.write(*at, &page(value)).unwrap();
    }
    memory.write(400, &noise()).unwrap();
    memory.write(401, &page(0)).unwrap();
    writer.finish_memory(memory).unwrap();
    writer.add_section(section("machine", b"{}"));
    writer.commit().unwrap()
}

fn noise() -> Vec<u8> {
    let mut x = 1u64;
    let next = |_| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as u8
    };
    (0..PAGE).map(next).collect()
}

#[test]
fn compressed_memory_is_the_same_memory_in_less_room_in_chains_and_when_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = write_packed(&path("a"), None, &[0, 1, 2, 999], 1);
    assert_eq!(names(&path("a")), ["manifest.json", "memory", "state"]);
    assert!(fs::metadata(path("a").join("memory")).unwrap().len() < 8192, "of five pages");
    let plain = write(&path("b"), Some(&base), &[1, 500], 2).unwrap();
    write_packed(&path("c"), Some(&plain), &[2, 700], 3);
    let expected = [(0, 1), (1, 2), (2, 3), (3, 0), (500, 2), (700, 3), (999, 1), (401, 0)];
    let check = |name: &str| {
        let chain = Chain::open(&path(name)).unwrap();
        for (at, value) in expected {
            assert_eq!(read_page(&chain, at), value, "{name}: page {at}");
        }
        let mut bytes = page(0);
        chain.read(400, &mut bytes).unwrap();
        assert!(bytes == noise());
        let data: u64 = chain
            .runs()
            .unwrap()
            .iter()
            .filter(|run| matches!(run.source, Source::File(_)))
            .map(|run| run.count)
            .sum();
        assert_eq!(data, 7, "{name}: released pages cost nothing");
        chain
    };
    let chain = check("c");
    assert!(chain.is_packed());
    assert_eq!(verify(&path("c")).unwrap(), []);
    // It is for machines that are made at once, and has no checksums: what it holds is what counts.
    unpack(&chain, &path("d"), "test").unwrap();
    assert!(!check("d").is_packed());
    compact(&path("c")).unwrap();
    let chain = check("c");
    assert_eq!(verify(&path("c")).unwrap(), []);
    assert!(chain.is_packed() && chain.is_full(), "it stays compressed");
    assert_eq!(names(folder.path()), ["a", "b", "c", "d"]);
}

#[test]
fn damage_of_compressed_memory_is_found_at_its_place_and_never_unpacked() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a");
    write_packed(&target, None, &[0, 300, 999], 5);
    let len = fs::metadata(target.join("memory")).unwrap().len();
    let trailer = Snapshot::open(&target).unwrap().manifest().memory.trailer_bytes;
    for at in 0..len {
        damaged(&target, "memory", |file| flip(file, at));
        let found = verify(&target).unwrap();
        assert_eq!(found.len(), 1, "{at}: {found:?}");
        let place = found[0].offset..found[0].offset + found[0].bytes.max(1);
        assert!(found[0].part == "memory" && (at >= len - trailer || place.contains(&at)), "{at}: {found:?}");
        if at < len - trailer {
            let refused = Chain::open(&target).unwrap().runs().unwrap_err();
            assert!(matches!(refused, SnapshotError::Damaged { .. }), "{refused}");
            assert!(compact(&target).is_ok(), "a full one is left alone");
        } else {
            assert!(Chain::open(&target).is_err());
        }
        damaged(&target, "memory", |file| flip(file, at));
    }
    for len in [0, 1, 100, len - 1, len + 1] {
        let whole = fs::read(target.join("memory")).unwrap();
        damaged(&target, "memory", |file| file.set_len(len).unwrap());
        assert!(Chain::open(&target).is_err(), "{len}");
        damaged(&target, "memory", |file| file.write_all_at(&whole, 0).unwrap());
        damaged(&target, "memory", |file| file.set_len(whole.len() as u64).unwrap());
    }
    assert_eq!(verify(&target).unwrap(), []);
}

/// LZ4 has more than one form for the same bytes: a changed byte that unpacks to the same pages is no damage, every other one
/// is.
#[test]
fn a_changed_byte_of_compressed_memory_is_damage_or_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a");
    let whole = write_packed(&target, None, &[0, 1, 2, 999], 1);
    let stored = fs::metadata(target.join("memory")).unwrap().len() - whole.manifest().memory.trailer_bytes;
    let pages = || {
        let chain = Chain::open(&target).unwrap();
        [0, 1, 2, 400, 999].map(|at| {
            let mut bytes = page(99);
            chain.read(at, &mut bytes).map(|()| bytes).map_err(drop)
        })
    };
    let expected = pages();
    let mut same = 0;
    // Not all of the page that does not become shorter.
    for at in (0..stored.min(64)).chain(stored.saturating_sub(64)..stored) {
        let byte = fs::read(target.join("memory")).unwrap()[at as usize];
        for bit in 0..8 {
            damaged(&target, "memory", |file| file.write_all_at(&[byte ^ 1 << bit], at).unwrap());
            let is_whole = verify(&target).unwrap().is_empty();
            assert_eq!(is_whole, pages() == expected, "bit {bit} of byte {at}");
            same += usize::from(is_whole);
        }
        damaged(&target, "memory", |file| file.write_all_at(&[byte], at).unwrap());
    }
    assert!(same > 0, "there was one such byte, or this checks nothing");
    assert_eq!(verify(&target).unwrap(), []);
}

/// Replaces bytes of a compressed memory's trailer, with right checksums everywhere.
fn forge_trailer(target: &Path, at: u64, bytes: &[u8]) -> String {
    let manifest = Snapshot::open(target).unwrap().manifest().clone();
    let path = target.join("memory");
    let len = fs::metadata(&path).unwrap().len();
    let start = len - manifest.memory.trailer_bytes;
    let mut trailer = vec![0; manifest.memory.trailer_bytes as usize];
    let digest = |bytes: &[u8]| {
        use sha2::Digest as _;
        sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    damaged(target, "memory", |file| {
        file.read_exact_at(&mut trailer, start).unwrap();
        let before = digest(&trailer);
        trailer[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        file.write_all_at(&trailer, start).unwrap();
        damaged(target, "manifest.json", |file| {
            let text = fs::read_to_string(target.join("manifest.json")).unwrap();
            let text = text.replace(&before, &digest(&trailer));
            let (head, body) = text.split_once(r#""body":"#).unwrap();
            let body = body.trim_end().strip_suffix('}').unwrap();
            let (front, rest) = head.split_once(r#""checksum":""#).unwrap();
            let text = format!(
                "{front}\"checksum\":\"{}{}\"body\":{body}}}\n",
                digest(body.as_bytes()),
                &rest[64..]
            );
            file.write_all_at(text.as_bytes(), 0).unwrap();
        });
    });
    Chain::open(target).and_then(|chain| chain.runs().map(|_| ())).unwrap_err().to_string()
}

#[test]
fn lengths_that_no_writer_writes_are_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let lengths = 48 + PAGES.div_ceil(4) + 32 * PAGES.div_ceil(256);
    for (index, (at, bytes, text)) in [
        (lengths, u32::MAX.to_le_bytes(), "chunk 0 has 4294967295 bytes for 4096"),
        (lengths, 0u32.to_le_bytes(), "chunk 0 has 0 bytes for 4096"),
        (lengths + 8, 7u32.to_le_bytes(), "chunk 2 has 7 bytes for 0"),
        (lengths, 2u32.to_le_bytes(), "its chunks have"),
        // All pages are said to be data.
        (48, [0xaa; 4], "chunk 0 has"),
    ]
    .into_iter()
    .enumerate()
    {
        let target = folder.path().join(index.to_string());
        write_packed(&target, None, &[0, 300, 999], 5);
        let refused = forge_trailer(&target, at, &bytes);
        assert!(refused.contains(text) || (index == 4 && refused.contains("damaged")), "{refused}");
    }
}
