//! How far a command says it has come: the last line of `/run/harrier/progress`, which anybody in the machine may write.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use harrier_agent_protocol::PROGRESS_MAX;

/// The file in every machine of a job.
pub(crate) const PATH: &str = "/run/harrier/progress";
/// How long the file becomes by what is said with [`say`].
const LONGEST: u64 = 64 << 10;
const FOLDER: &str = "/run/harrier";
const NAME: &str = "progress";

/// The file, and what was last read of it.
#[derive(Debug, Default)]
pub(crate) struct ProgressFile {
    path: PathBuf,
    /// Inode, change time and size.
    seen: Option<(u64, i64, i64, u64)>,
}

/// Says how far a command has come. The file has to be there: only a job's machine has it.
pub(crate) fn say(text: &str) -> io::Result<()> {
    say_in(PATH.as_ref(), text)
}

fn say_in(path: &std::path::Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    // It lies in the guest's memory.
    if file.metadata()?.len() > LONGEST {
        file.set_len(0)?;
    }
    // One write: whoever reads beside it sees the line whole, or the line before as well.
    file.write_all(format!("{text}\n").as_bytes())
}

impl ProgressFile {
    /// Makes the file, empty.
    pub(crate) fn make() -> io::Result<Self> {
        Self::make_in(FOLDER.into())
    }

    fn make_in(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        let path = folder.join(NAME);
        File::create(&path)?.set_permissions(fs::Permissions::from_mode(0o666))?;
        Ok(Self { path, seen: None })
    }

    /// The last line, if something was written since it was read.
    pub(crate) fn news(&mut self) -> Option<Vec<u8>> {
        // Whatever a command has put in its place must not be waited for.
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(&self.path)
            .ok()?;
        let metadata = file.metadata().ok().filter(fs::Metadata::is_file)?;
        let now = (metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.len());
        if metadata.len() == 0 || self.seen == Some(now) {
            return None;
        }
        let mut text = Vec::new();
        let begin = metadata.len().saturating_sub(2 * PROGRESS_MAX as u64);
        io::Seek::seek(&mut file, io::SeekFrom::Start(begin)).ok()?;
        file.take(2 * PROGRESS_MAX as u64).read_to_end(&mut text).ok()?;
        self.seen = Some(now);
        let line =
            text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).rfind(|line| !line.is_empty())?;
        Some(line.get(..PROGRESS_MAX).unwrap_or(line).to_vec())
    }

    /// Reads it again next time: a host that is new has not heard of it.
    pub(crate) fn forget(&mut self) {
        self.seen = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_told_once_and_nothing_else_is_waited_for() {
        let folder = std::env::temp_dir().join(format!("harrier-progress-{}", std::process::id()));
        let mut file = ProgressFile::make_in(folder.clone()).unwrap();
        let path = folder.join(NAME);
        assert_eq!(file.news(), None);
        fs::write(&path, "one\n two \n\n").unwrap();
        assert_eq!(file.news().as_deref(), Some(b"two".as_slice()));
        assert_eq!(file.news(), None);
        say_in(&path, "three").unwrap();
        assert_eq!(file.news().as_deref(), Some(b"three".as_slice()));
        for number in 0..10_000 {
            say_in(&path, &format!("number {number}")).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() <= LONGEST + 16);
        assert_eq!(file.news().as_deref(), Some(b"number 9999".as_slice()));
        fs::write(&path, "one\n two \n\n").unwrap();
        file.forget();
        assert_eq!(file.news().as_deref(), Some(b"two".as_slice()));
        fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(file.news().map(|line| line.len()), Some(PROGRESS_MAX));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert_eq!(file.news(), None);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(file.news(), None);
    }
}
