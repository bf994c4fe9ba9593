//! `manifest.json`: the table of contents, with a checksum over itself.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::SnapshotError;
use crate::id::{Checksum, SnapshotId};
use crate::{FORMAT_VERSION, PAGE_BYTES, layer};

/// Name of the file.
pub(crate) const FILE: &str = "manifest.json";
/// A manifest is not longer than this, in bytes.
pub(crate) const MAX_BYTES: u64 = 4 << 20;
/// Sections and files of a snapshot at most.
const MAX_ENTRIES: usize = 4096;
/// Most guest memory, in pages: 1 TiB. What a reader keeps of each page and chunk is then 100 MiB, in a file that may be
/// a hole but for that.
pub(crate) const MAX_PAGES: u64 = 1 << 28;
const FORMAT: &str = "harrier-snapshot";

/// Table of contents of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The snapshot's own id; every file repeats it.
    pub id: SnapshotId,
    /// What a difference is a difference to.
    pub parent: Option<ParentEntry>,
    /// When it was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// The program that wrote it, for people.
    pub producer: String,
    /// Bytes of the file `state`.
    pub state_bytes: u64,
    /// What is in it.
    pub sections: Vec<SectionEntry>,
    /// Guest memory.
    pub memory: MemoryEntry,
    /// Further files.
    pub files: Vec<FileEntry>,
}

/// A parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentEntry {
    /// Its id.
    pub id: SnapshotId,
    /// The name of its folder, beside this one, when the difference was taken.
    pub name: String,
}

/// A section of `state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionEntry {
    /// Its name; each is there once.
    pub name: String,
    /// Version of its content.
    pub version: u32,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of it.
    pub sha256: Checksum,
}

/// The file `memory`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryEntry {
    /// Guest memory in pages of 4096 bytes; the trailer stands behind them.
    pub pages: u64,
    /// Length of the trailer.
    pub trailer_bytes: u64,
    /// SHA-256 of the trailer.
    pub trailer_sha256: Checksum,
    /// How the pages are compressed, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
}

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// LZ4 blocks.
    Lz4,
}

/// A further file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of it.
    pub sha256: Checksum,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    format: String,
    version: u64,
    checksum: Checksum,
    body: T,
}

/// Reads only what every version has.
#[derive(Deserialize)]
struct Label {
    format: String,
    version: u64,
}

impl Manifest {
    /// The oldest version of the format that has what the snapshot has: 2 has layers of disks and compressed memory.
    fn version(&self) -> u32 {
        let has_layers = self.files.iter().any(|file| layer::disk_of(&file.name).is_some());
        if has_layers || self.memory.compression.is_some() { 2 } else { 1 }
    }

    /// The bytes of the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Neither strings nor numbers can fail to be written.
        let body = serde_json::value::to_raw_value(self).unwrap_or_default();
        let checksum = Checksum::of(body.get().as_bytes());
        let envelope = Envelope { format: FORMAT.to_owned(), version: self.version().into(), checksum, body };
        let mut bytes = serde_json::to_vec(&envelope).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads and checks the bytes of a file in the folder `path`, which only goes into errors.
    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, SnapshotError> {
        let no_snapshot = |reason: String| SnapshotError::NotASnapshot { path: path.to_owned(), reason };
        let label: Label = serde_json::from_slice(bytes)
            .map_err(|err| no_snapshot(format!("{FILE} cannot be read as one ({err})")))?;
        if label.format != FORMAT {
            return Err(no_snapshot(format!("{FILE} is not of format {FORMAT}")));
        }
        if !(1..=u64::from(FORMAT_VERSION)).contains(&label.version) {
            return Err(SnapshotError::Version { path: path.to_owned(), found: label.version });
        }
        let damaged = |reason: String| SnapshotError::Damaged {
            path: path.to_owned(),
            part: FILE.to_owned(),
            offset: 0,
            reason,
        };
        let envelope: Envelope<Box<RawValue>> =
            serde_json::from_slice(bytes).map_err(|err| damaged(err.to_string()))?;
        if Checksum::of(envelope.body.get().as_bytes()) != envelope.checksum {
            return Err(damaged("its checksum is another one".to_owned()));
        }
        let manifest: Manifest =
            serde_json::from_str(envelope.body.get()).map_err(|err| damaged(err.to_string()))?;
        manifest.check().map_err(damaged)?;
        if u64::from(manifest.version()) > label.version {
            return Err(damaged(format!("it has what version {} does not", label.version)));
        }
        Ok(manifest)
    }

    /// What no writer would write.
    fn check(&self) -> Result<(), String> {
        if self.sections.len() > MAX_ENTRIES || self.files.len() > MAX_ENTRIES {
            return Err(format!("it has more than {MAX_ENTRIES} sections or files"));
        }
        if self.memory.pages > MAX_PAGES {
            return Err(format!("{} pages of memory are too many", self.memory.pages));
        }
        let mut names: Vec<&str> = self.sections.iter().map(|section| section.name.as_str()).collect();
        names.extend(self.files.iter().map(|file| file.name.as_str()));
        if let Some(bad) = names.iter().find(|name| !is_name(name)) {
            return Err(format!("'{}' is no name", bad.escape_default()));
        }
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(format!("{pair:?} is there twice"));
        }
        if self.parent.as_ref().is_some_and(|parent| !is_file_name(&parent.name)) {
            return Err("the parent's name is no file name".to_owned());
        }
        let mut end = crate::snapshot::STATE_HEADER_BYTES;
        for section in &self.sections {
            if section.offset < end {
                return Err(format!("section '{}' overlaps the one before", section.name));
            }
            end = section.offset.checked_add(section.bytes).ok_or("a section's end overflows")?;
        }
        if end > self.state_bytes {
            return Err("the sections are longer than their file".to_owned());
        }
        Ok(())
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.pages.saturating_mul(PAGE_BYTES as u64)
    }
}

/// Whether a section or file may be called so: lower-case letters, digits, `-` and `.` in between.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// Whether this can be the name of a folder's entry.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn manifest() -> Manifest {
        let section = |name: &str, offset| SectionEntry {
            name: name.to_owned(),
            version: 1,
            offset,
            bytes: 8,
            sha256: Checksum::of(name.as_bytes()),
        };
        Manifest {
            id: SnapshotId([7; 16]),
            parent: Some(ParentEntry { id: SnapshotId([6; 16]), name: "base".to_owned() }),
            created_ms: 1,
            producer: "test".to_owned(),
            state_bytes: 48,
            sections: vec![section("cpu-0", 32), section("serial", 40)],
            memory: MemoryEntry {
                pages: 2,
                trailer_bytes: 100,
                trailer_sha256: Checksum::of(b""),
                compression: None,
            },
            files: vec![FileEntry { name: "disk-0".to_owned(), bytes: 3, sha256: Checksum::of(b"abc") }],
        }
    }

    fn refused(bytes: &[u8]) -> String {
        Manifest::decode(Path::new("x"), bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        let manifest = manifest();
        assert_eq!(Manifest::decode(Path::new("x"), &manifest.encode()).unwrap(), manifest);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = manifest().encode();
        // The line end belongs to nothing.
        for at in 0..bytes.len() - 1 {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                let read = Manifest::decode(Path::new("x"), &bytes);
                assert!(read.is_err(), "byte {at} bit {bit}");
            }
        }
        for len in 0..bytes.len() - 1 {
            assert!(Manifest::decode(Path::new("x"), &bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn other_formats_and_versions_are_told_apart_from_damage() {
        assert!(refused(b"{}").contains("is no snapshot"));
        assert!(refused(br#"{"format":"qcow","version":1}"#).contains("not of format"));
        let newer = br#"{"format":"harrier-snapshot","version":3,"and":"more"}"#;
        assert_eq!(
            refused(newer),
            "snapshot 'x' has format version 3, this harrier knows up to 2: use a newer one"
        );
    }

    #[test]
    fn tables_that_no_writer_writes_are_refused() {
        type Change = fn(&mut Manifest);
        let cases: [(&str, Change); 8] = [
            ("there twice", |m| m.sections[1].name = "cpu-0".to_owned()),
            ("no name", |m| m.files[0].name = "../x".to_owned()),
            ("no name", |m| m.sections[0].name = String::new()),
            ("overlaps", |m| m.sections[1].offset = 39),
            ("overlaps", |m| m.sections[0].offset = 0),
            ("overflows", |m| m.sections[1].bytes = u64::MAX),
            ("too many", |m| m.memory.pages = u64::MAX),
            ("no file name", |m| m.parent.as_mut().unwrap().name = "..".to_owned()),
        ];
        for (text, change) in cases {
            let mut manifest = manifest();
            change(&mut manifest);
            let refused = refused(&manifest.encode());
            assert!(refused.contains(text), "{refused}");
        }
    }

    /// A body whose checksum is right, whatever it says.
    fn envelope(body: &str) -> Option<Vec<u8>> {
        let body = RawValue::from_string(body.to_owned()).ok()?;
        let checksum = Checksum::of(body.get().as_bytes());
        let envelope = Envelope { format: FORMAT.to_owned(), version: FORMAT_VERSION.into(), checksum, body };
        serde_json::to_vec(&envelope).ok()
    }

    #[test]
    fn forged_tables_with_right_checksums_are_read_or_refused_and_never_more() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        let mut writer = crate::SnapshotWriter::create(&target, None, "test").unwrap();
        let mut memory = writer.memory(300).unwrap();
        memory.write(7, &[1; PAGE_BYTES]).unwrap();
        writer.finish_memory(memory).unwrap();
        writer.add_section(crate::Section { name: "machine".to_owned(), version: 1, bytes: vec![2; 100] });
        let snapshot = writer.commit().unwrap();
        let body = serde_json::to_string(snapshot.manifest()).unwrap();
        let numbers =
            ["0", "1", "99", "4294967296", "18446744073709551615", "-1", "null", "1e9", "17179869184"];
        let path = target.join(FILE);
        std::fs::remove_file(&path).unwrap();
        let mut x = 1u64;
        let mut next = |below: usize| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) as usize % below
        };
        let (mut refused, mut opened) = (0, 0);
        for _ in 0..3000 {
            let mut forged = body.clone();
            for _ in 0..=next(3) {
                // A number becomes another one, or a character does.
                let digits: Vec<usize> =
                    forged.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| at + 1).collect();
                if next(3) > 0 {
                    let at = digits[next(digits.len())];
                    let len = forged[at..].bytes().take_while(u8::is_ascii_digit).count();
                    forged.replace_range(at..at + len, numbers[next(numbers.len())]);
                } else {
                    let at = next(forged.len());
                    forged.replace_range(at..at + 1, ["0", "a", "\"", ",", "{"][next(5)]);
                }
            }
            let Some(bytes) = envelope(&forged) else { continue };
            std::fs::write(&path, bytes).unwrap();
            match crate::Chain::open(&target) {
                Ok(chain) => {
                    opened += 1;
                    let _ = (chain.runs(), chain.snapshot().sections(), crate::verify(&target));
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 500 && opened > 0, "{refused} refused, {opened} opened");
    }
}
