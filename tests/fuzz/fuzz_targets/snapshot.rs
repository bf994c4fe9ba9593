#![no_main]
//! A snapshot's folder in which the input has changed bytes, lengths, numbers and names, with right checksums where it asks
//! for them. Whatever is read is right or refused; nothing is allocated for a size that is only claimed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use harrier_fuzz::input::Input;
use harrier_snapshot::{Chain, PAGE_BYTES, Section, Snapshot, SnapshotWriter, compact, list, verify};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

const PAGES: u64 = 12;
const FILES: [&str; 4] = ["manifest.json", "state", "memory", "disk-0"];

/// A folder in memory with two snapshots, of which the second is a difference to the first.
struct Place {
    folder: PathBuf,
    /// What the files of the second are when nothing has changed them.
    files: [Vec<u8>; 4],
    /// Which of them differ on the disk now.
    changed: [bool; 4],
}

fn write(target: &Path, parent: Option<&Snapshot>, value: u8) -> Snapshot {
    let mut writer = SnapshotWriter::create(target, parent, "fuzz").expect("a writer");
    let mut memory = writer.memory(PAGES).expect("memory");
    for page in [0, 1, u64::from(value) + 2, PAGES - 1] {
        memory.write(page, &[value; PAGE_BYTES]).expect("a page");
    }
    memory.release(3, 2).expect("zeros");
    writer.finish_memory(memory).expect("memory");
    for (name, len) in [("machine", 33), ("cpu-0", 64), ("virtio-0", 5)] {
        writer.add_section(Section { name: name.to_owned(), version: 1, bytes: vec![value + 32; len] });
    }
    let disk = writer.create_file("disk-0").expect("a disk");
    std::os::unix::fs::FileExt::write_all_at(&disk, b"disk", 0).expect("a disk's content");
    writer.fleeting().commit().expect("a snapshot")
}

impl Place {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = base.join(format!("harrier-fuzz-snapshot-{}", std::process::id()));
        // A process of this number may have left one.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).expect("a folder");
        let first = write(&folder.join("first"), None, 1);
        let second = write(&folder.join("second"), Some(&first), 2);
        let files = FILES.map(|name| std::fs::read(second.path().join(name)).expect("a file"));
        Place { folder, files, changed: [false; 4] }
    }

    fn put(&mut self, files: &[Vec<u8>; 4]) {
        for (index, name) in FILES.iter().enumerate() {
            let differs = files[index] != self.files[index];
            if differs || self.changed[index] {
                let path = self.folder.join("second").join(name);
                std::fs::remove_file(&path).expect("a file to replace");
                std::fs::write(&path, &files[index]).expect("a file");
            }
            self.changed[index] = differs;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Puts a checksum behind `key`.
fn set_checksum(manifest: &mut [u8], key: &[u8], of: &[u8]) {
    if let Some(at) = find(manifest, key).map(|at| at + key.len())
        && let Some(digits) = manifest.get_mut(at..at + 64)
    {
        digits.copy_from_slice(hex(&Sha256::digest(of)).as_bytes());
    }
}

/// Makes checksums right again.
fn forge(files: &mut [Vec<u8>; 4]) {
    let [manifest, _, memory, _] = files;
    let trailer = memory.get(PAGES as usize * PAGE_BYTES..).unwrap_or_default().to_vec();
    set_checksum(manifest, b"\"trailer_sha256\":\"", &trailer);
    if let Some(at) = find(manifest, b"\"body\":") {
        let end = manifest.iter().rposition(|byte| *byte == b'}').unwrap_or(0);
        let body = manifest.get(at + 7..end).unwrap_or_default().to_vec();
        set_checksum(manifest, b"\"checksum\":\"", &body);
    }
}

fn change(input: &mut Input<'_>, files: &mut [Vec<u8>; 4]) {
    let which = usize::from(input.u8()) % 4;
    match input.u8() % 6 {
        0 => {
            let at = usize::from(input.u16()) % files[which].len().max(1);
            let len = usize::from(input.u8() & 15);
            for (to, from) in files[which].iter_mut().skip(at).zip(input.take(len)) {
                *to = *from;
            }
        }
        1 => {
            let len = usize::from(input.u16());
            files[which].truncate(len);
        }
        2 => {
            let len = usize::from(input.u8());
            files[which].extend_from_slice(input.take(len));
        }
        3 => files.swap(which, usize::from(input.u8()) % 4),
        4 => {
            // The trailer is where the numbers are.
            let at = (PAGES as usize * PAGE_BYTES + usize::from(input.u8())).min(files[2].len());
            for (to, from) in files[2].iter_mut().skip(at).zip(input.take(8)) {
                *to = *from;
            }
        }
        _ => {
            // Some number in the table of contents becomes another one.
            let numbers: Vec<usize> = (1..files[0].len())
                .filter(|at| files[0][*at].is_ascii_digit() && files[0][at - 1] == b':')
                .collect();
            if let Some(at) = numbers.get(usize::from(input.u8()) % numbers.len().max(1)) {
                let end = files[0].iter().skip(*at).take_while(|byte| byte.is_ascii_digit()).count() + at;
                let number = match input.u8() & 3 {
                    0 => input.u64(),
                    1 => u64::from(input.u16()),
                    2 => u64::from(input.u16()) * PAGE_BYTES as u64,
                    _ => u64::MAX - u64::from(input.u8()),
                };
                files[0].splice(*at..end, number.to_string().into_bytes());
            }
        }
    }
}

thread_local! {
    static PLACE: RefCell<Place> = RefCell::new(Place::new());
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    PLACE.with_borrow_mut(|place| {
        let mut files = place.files.clone();
        let is_forged = input.u8() & 1 != 0;
        while !input.is_empty() {
            change(&mut input, &mut files);
        }
        if is_forged {
            forge(&mut files);
        }
        place.put(&files);
        let path = place.folder.join("second");
        if let Ok(snapshot) = Snapshot::open(&path) {
            let _ = snapshot.sections();
            let _ = snapshot.memory();
            let _ = snapshot.file("disk-0");
        }
        if let Ok(chain) = Chain::open(&path) {
            let mut page = [0; PAGE_BYTES];
            for run in chain.runs() {
                // A file that is shorter than it says is an error of the reader.
                let _ = chain.read(run.first, &mut page);
            }
        }
        let found = verify(&path);
        // Whoever forges checksums may say anything.
        if !is_forged && files[0] == place.files[0] {
            let is_whole = found.is_ok_and(|found| found.is_empty());
            assert_eq!(is_whole, files == place.files, "damage is found, and nothing else");
        }
        let _ = list(&place.folder);
        if !is_forged && files != place.files && files[0] == place.files[0] {
            assert!(compact(&path).is_err(), "damage is not made good");
        }
    });
});
