#![no_main]
//! A snapshot's folder in which the input has changed bytes, lengths, numbers and names, with right checksums where it asks
//! for them. Whatever is read is right or refused; nothing is allocated for a size that is only claimed.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use harrier_fuzz::input::Input;
use harrier_snapshot::{
    Chain, PAGE_BYTES, Section, Snapshot, SnapshotWriter, compact, list, seal_layer, verify,
};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

const PAGES: u64 = 6;
const FILES: [&str; 4] = ["manifest.json", "state", "memory", "disk-0.layer"];
const MANIFEST: usize = 0;
const MEMORY: usize = 2;
const LAYER: usize = 3;
const DISK_BYTES: u64 = 2 * PAGE_BYTES as u64 + 512;

/// What the target changes before anything is read; borrowed where nothing has changed.
type Files<'a> = [Cow<'a, [u8]>; 4];

/// A folder in memory with two snapshots, of which the second is a difference to the first.
struct Place {
    folder: PathBuf,
    /// What the files of the second are when nothing has changed them.
    files: [Vec<u8>; 4],
    /// The same files, to be written.
    handles: [File; 4],
    /// Which of them differ on the disk now.
    changed: [bool; 4],
    /// Where memory's trailer begins.
    trailer: usize,
    /// Where numbers are in the table of contents.
    numbers: Vec<std::ops::Range<usize>>,
    compressed: bool,
    pages: Vec<u8>,
}

/// All pages of a snapshot that can be read.
fn pages(path: &Path) -> Vec<u8> {
    let mut pages = vec![0; PAGES as usize * PAGE_BYTES];
    let chain = Chain::open(path).expect("a chain");
    for (page, bytes) in (0..).zip(pages.chunks_exact_mut(PAGE_BYTES)) {
        chain.read(page, bytes).expect("a page");
    }
    pages
}

fn write(target: &Path, parent: Option<&Snapshot>, value: u8, compressed: bool) -> Snapshot {
    let writer = SnapshotWriter::create(target, parent, "fuzz").expect("a writer");
    let mut writer = writer.compressed(compressed);
    let mut memory = writer.memory(PAGES).expect("memory");
    for page in [0, u64::from(value), PAGES - 1] {
        memory.write(page, &[value; PAGE_BYTES]).expect("a page");
    }
    memory.release(3, 2).expect("zeros");
    writer.finish_memory(memory).expect("memory");
    for (name, len) in [("machine", 33), ("cpu-0", 64), ("virtio-0", 5)] {
        writer.add_section(Section { name: name.to_owned(), version: 1, bytes: vec![value + 32; len] });
    }
    let name = if parent.is_some() { FILES[LAYER] } else { "disk-0" };
    let disk = writer.create_file(name).expect("a disk");
    disk.set_len(DISK_BYTES).expect("a disk");
    disk.write_all_at(&[value; 512], PAGE_BYTES as u64).expect("a disk's content");
    if parent.is_some() {
        seal_layer(&disk, writer.id(), DISK_BYTES, [(0, 0b10)]).expect("a layer");
    }
    writer.fleeting().commit().expect("a snapshot")
}

impl Place {
    fn new(compressed: bool) -> Self {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = base.join(format!("harrier-fuzz-snapshot-{}-{compressed}", std::process::id()));
        // A process of this number may have left one.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).expect("a folder");
        let first = write(&folder.join("first"), None, 1, compressed);
        let second = write(&folder.join("second"), Some(&first), 2, compressed);
        let files = FILES.map(|name| std::fs::read(second.path().join(name)).expect("a file"));
        let handles = FILES.map(|name| {
            let path = second.path().join(name);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("a file");
            File::options().write(true).open(path).expect("a file")
        });
        let manifest = &files[MANIFEST];
        let numbers = (1..manifest.len())
            .filter(|at| manifest[*at].is_ascii_digit() && manifest[at - 1] == b':')
            .map(|at| at..at + manifest[at..].iter().position(|byte| !byte.is_ascii_digit()).expect("an end"))
            .collect();
        let trailer = files[MEMORY].len() - second.manifest().memory.trailer_bytes as usize;
        let pages = pages(second.path());
        Place { folder, files, handles, changed: [false; 4], trailer, numbers, compressed, pages }
    }

    /// The table of contents with other numbers in it, each changed once at most.
    fn renumbered(&self, input: &mut Input<'_>) -> Cow<'_, [u8]> {
        let mut others: Vec<Option<u64>> = vec![None; self.numbers.len()];
        for _ in 0..input.u8() % 4 {
            let which = usize::from(input.u8()) % self.numbers.len();
            others[which] = Some(match input.u8() & 3 {
                0 => input.u64(),
                1 => u64::from(input.u16()),
                2 => u64::from(input.u16()) * PAGE_BYTES as u64,
                _ => u64::MAX - u64::from(input.u8()),
            });
        }
        let manifest = &self.files[MANIFEST];
        if others.iter().all(Option::is_none) {
            return Cow::Borrowed(manifest);
        }
        let mut made = Vec::with_capacity(manifest.len() + 64);
        let mut from = 0;
        for (range, other) in self.numbers.iter().zip(others) {
            if let Some(other) = other {
                made.extend_from_slice(&manifest[from..range.start]);
                made.extend_from_slice(other.to_string().as_bytes());
                from = range.end;
            }
        }
        made.extend_from_slice(&manifest[from..]);
        Cow::Owned(made)
    }

    /// Answers whether the files are those that were written.
    fn put(&self, changed: &mut [bool; 4], files: &Files<'_>) -> bool {
        for index in 0..4 {
            let bytes = &files[index];
            let differs = matches!(bytes, Cow::Owned(_)) && **bytes != *self.files[index];
            if differs || changed[index] {
                self.handles[index].set_len(bytes.len() as u64).expect("a file's length");
                self.handles[index].write_all_at(bytes, 0).expect("a file");
            }
            changed[index] = differs;
        }
        !changed.iter().any(|changed| *changed)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Puts a checksum behind `key`.
fn set_checksum(manifest: &mut [u8], key: &[u8], of: &[u8]) {
    let found = manifest.windows(key.len()).position(|window| window == key);
    if let Some(at) = found.map(|at| at + key.len())
        && let Some(digits) = manifest.get_mut(at..at + 64)
    {
        digits.copy_from_slice(hex(&Sha256::digest(of)).as_bytes());
    }
}

const LAYER_NAME: &[u8] = b"\"disk-0.layer\"";

/// Makes checksums right again.
fn forge(files: &mut Files<'_>, trailer: usize) {
    let trailer = files[MEMORY].get(trailer..).unwrap_or_default().to_vec();
    let manifest = files[MANIFEST].to_mut();
    set_checksum(manifest, b"\"trailer_sha256\":\"", &trailer);
    let layer = files[LAYER].to_vec();
    let manifest = files[MANIFEST].to_mut();
    if let Some(at) = manifest.windows(LAYER_NAME.len()).position(|window| window == LAYER_NAME) {
        set_checksum(&mut manifest[at..], b"\"sha256\":\"", &layer);
    }
    const BODY: &[u8] = b"\"body\":";
    if let Some(at) = manifest.windows(BODY.len()).position(|window| window == BODY) {
        let end = manifest.iter().rposition(|byte| *byte == b'}').unwrap_or(0);
        let body = manifest.get(at + BODY.len()..end).unwrap_or_default().to_vec();
        set_checksum(manifest, b"\"checksum\":\"", &body);
    }
}

fn overwrite(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    for (to, from) in file.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn change(input: &mut Input<'_>, files: &mut Files<'_>, trailer: usize) {
    let which = usize::from(input.u8()) % 4;
    match input.u8() % 6 {
        0 => {
            let at = usize::from(input.u16()) % files[which].len().max(1);
            let len = usize::from(input.u8() & 15);
            overwrite(files[which].to_mut(), at, input.take(len));
        }
        1 => {
            let len = usize::from(input.u16());
            files[which].to_mut().truncate(len);
        }
        2 => {
            let len = usize::from(input.u8());
            files[which].to_mut().extend_from_slice(input.take(len));
        }
        3 => {
            let other = usize::from(input.u8()) % 4;
            let swapped = [files[which].to_vec(), files[other].to_vec()];
            let [a, b] = swapped;
            files[which] = Cow::Owned(b);
            files[other] = Cow::Owned(a);
        }
        4 => {
            // The same of a layer.
            let at = files[LAYER].len().saturating_sub(usize::from(input.u8() & 63));
            overwrite(files[LAYER].to_mut(), at, input.take(8));
        }
        _ => {
            // The trailer is where the numbers are.
            let at = trailer + usize::from(input.u8());
            overwrite(files[MEMORY].to_mut(), at, input.take(8));
        }
    }
}

thread_local! {
    static PLACES: RefCell<[Place; 2]> = RefCell::new([Place::new(false), Place::new(true)]);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    PLACES.with_borrow_mut(|places| {
        let how = input.u8();
        let place = &mut places[usize::from(how >> 1 & 1)];
        let mut changed = place.changed;
        let is_forged = how & 1 != 0;
        // What looks at the whole folder, or makes new files, is tried more seldom: the time is in it.
        let is_thorough = how & 0xf0 == 0;
        let mut files: Files<'_> = [
            place.renumbered(&mut input),
            Cow::Borrowed(&place.files[1]),
            Cow::Borrowed(&place.files[2]),
            Cow::Borrowed(&place.files[3]),
        ];
        while !input.is_empty() {
            change(&mut input, &mut files, place.trailer);
        }
        if is_forged {
            forge(&mut files, place.trailer);
        }
        let is_pristine = place.put(&mut changed, &files);
        let has_right_manifest = !is_forged && !changed[MANIFEST];
        drop(files);
        place.changed = changed;
        let path = place.folder.join("second");
        if let Ok(snapshot) = Snapshot::open(&path) {
            let _ = snapshot.sections();
            let _ = snapshot.layer("disk-0");
            if let Ok(chain) = Chain::from_snapshot(snapshot) {
                let _ = chain.disk("disk-0");
                let mut page = [0; PAGE_BYTES];
                // A size that is only claimed has no pages to read.
                for run in chain.runs().unwrap_or_default().iter().take(64) {
                    // A file that is shorter than it says is an error of the reader.
                    let _ = chain.read(run.first, &mut page);
                }
            }
        }
        let found = verify(&path);
        let mut is_damaged = !is_pristine;
        // Whoever forges checksums may say anything.
        if has_right_manifest {
            let is_whole = found.is_ok_and(|found| found.is_empty());
            if is_whole && place.compressed && changed == [false, false, true, false] {
                // LZ4 has more than one form for the same pages.
                assert!(pages(&path) == place.pages, "it has other pages, and is called whole");
                is_damaged = false;
            }
            assert_eq!(is_whole, !is_damaged, "damage is found, and nothing else");
        }
        if is_thorough {
            let _ = list(&place.folder);
            if has_right_manifest && is_damaged {
                assert!(compact(&path).is_err(), "damage is not made good");
            }
        }
    });
});
