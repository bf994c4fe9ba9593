//! A writer of the initramfs format: the "newc" cpio archive (Linux Documentation/driver-api/early-userspace/
//! buffer-format.rst).
//!
//! Deterministic: owner 0, modification time 0, inode numbers counted up, entries in the order they are added.

/// An archive being written in memory.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// Files from this length on begin at a page: Harrier's kernel keeps their pages instead of copying them.
const ALIGNED_FROM: usize = 64 << 10;
const PAGE: usize = 4096;
/// Longest name with its zeros that the kernel reads (PATH_MAX).
const NAME_MAX: usize = 4096;
const HEADER_BYTES: usize = 110;

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

impl Archive {
    /// An empty archive.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, mode 755. `path` is relative to the root, without a leading slash; parents come first.
    pub(crate) fn dir(&mut self, path: &str) {
        self.entry(path, S_IFDIR | 0o755, 2, &[], (0, 0));
    }

    /// Adds a file of the given permissions.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) {
        self.entry(path, S_IFREG | permissions, 1, contents, (0, 0));
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, S_IFLNK | 0o777, 1, target.as_bytes(), (0, 0));
    }

    /// Adds a character device, mode 600.
    pub(crate) fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, S_IFCHR | 0o600, 1, &[], (major, minor));
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.header(b"TRAILER!!!\0", 0, 1, 0, (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, contents: &[u8], device: (u32, u32)) {
        self.entries += 1;
        // 32 bits hold every file this program reads: the largest is a kernel module or an agent.
        let size = u32::try_from(contents.len()).expect("a file of 4 GiB in an initramfs");
        let mut name = path.as_bytes().to_vec();
        name.push(0);
        if contents.len() >= ALIGNED_FROM {
            // Readers take a name up to its first zero.
            let end = self.bytes.len() + HEADER_BYTES + name.len();
            let filled = name.len() + end.next_multiple_of(PAGE) - end;
            if filled <= NAME_MAX {
                name.resize(filled, 0);
            }
        }
        self.header(&name, mode, links, size, device);
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    /// `name` ends with a zero at least.
    fn header(&mut self, name: &[u8], mode: u32, links: u32, size: u32, (major, minor): (u32, u32)) {
        let name_size = u32::try_from(name.len()).expect("a path of 4 GiB");
        // inode, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.align();
    }

    /// Names and contents end on a multiple of 4 bytes, counted from the start of the archive.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.dir("dev");
        archive.char_device("dev/console", 5, 1);
        archive.file("init", 0o755, b"12345");
        archive.symlink("sh", "init");
        archive.finish()
    }

    #[test]
    fn the_same_entries_give_the_same_bytes_aligned_to_four() {
        let bytes = sample();
        assert_eq!(bytes, sample());
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
    }

    #[test]
    fn a_large_file_begins_at_a_page() {
        let mut archive = Archive::new();
        archive.dir("bin");
        let contents = [&b"first"[..], &[7; ALIGNED_FROM]].concat();
        archive.file("bin/large", 0o755, &contents);
        let bytes = archive.finish();
        let at = bytes.windows(5).position(|window| window == b"first").unwrap();
        assert_eq!(at % PAGE, 0);
        assert!(bytes[at..].starts_with(&contents));
    }

    #[test]
    fn a_device_node_carries_its_numbers() {
        let mut archive = Archive::new();
        archive.char_device("console", 5, 1);
        let bytes = archive.finish();
        let field =
            |index: usize| std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).unwrap().to_owned();
        assert_eq!(
            (field(1), field(9), field(10)),
            ("00002180".into(), "00000005".into(), "00000001".into())
        );
    }

    #[test]
    fn cpio_reads_the_archive_back() {
        use std::io::Write as _;
        let Ok(mut child) = std::process::Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            panic!("busybox is not installed: run `cargo xtask setup`");
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        let listing = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<_> = listing.lines().collect();
        assert_eq!(lines.len(), 4, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" dev"), "{listing}");
        assert!(lines[1].starts_with("crw-------") && lines[1].ends_with(" dev/console"), "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].contains(" 5 "), "{listing}");
        assert!(lines[3].starts_with("lrwxrwxrwx") && lines[3].ends_with("sh -> init"), "{listing}");
    }
}
