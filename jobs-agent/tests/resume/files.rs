//! Files that are copied to the real agent and from it, also over connections that are cut.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;

use harrier_jobs::files::{Arrival, CopyError, Sha256Digest, copy_in, facts};
use harrier_jobs::protocol::PutSpec;
use harrier_jobs::{CommandSpec, ExecuteError, Root, Session, SessionOptions, Status, Stdin, Stdio, User};

use crate::relay::{Cut, NEVER, Relay};

/// Bytes of all values without a short period.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_encoded_bytes().to_vec()
}

/// A session with an agent whose connections are cut, and a folder that stands for the guest's and one of the host's.
struct Pair {
    session: Session,
    relay: Relay,
    folder: tempfile::TempDir,
}

impl Pair {
    fn new(cuts: &[Cut]) -> Self {
        let session = Session::new(SessionOptions::default()).unwrap();
        let relay = Relay::new(&session, cuts.iter().copied());
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("host")).unwrap();
        fs::create_dir(folder.path().join("guest")).unwrap();
        Self { session, relay, folder }
    }

    fn host(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("host").join(name)
    }

    fn guest(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("guest").join(name)
    }

    fn put(&self, from: &str, to: &str) -> Result<harrier_jobs::files::FileFacts, CopyError> {
        copy_in(&self.session, &self.host(from), &bytes_of(&self.guest(to)), None, None, &Root::Initramfs)
    }

    fn get(&self, from: &str, to: &str) -> Result<harrier_jobs::files::FileFacts, CopyError> {
        let mut arrival = Arrival::prepare(&self.host(to)).unwrap();
        arrival.fetch(&self.session, &bytes_of(&self.guest(from)), &Root::Initramfs, 1 << 30)?;
        Ok(arrival.commit()?.unwrap())
    }

    /// Names in a folder, in order.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join(folder)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    fn end(self) {
        self.relay.end(&self.session);
    }
}

#[test]
fn files_go_in_and_come_out_with_their_rights_and_digests() {
    let pair = Pair::new(&[]);
    for (length, mode) in [(0, 0o600), (1, 0o644), (65_536, 0o755), (3_000_001, 0o640)] {
        let data = pattern(length);
        fs::write(pair.host("in"), &data).unwrap();
        fs::set_permissions(pair.host("in"), fs::Permissions::from_mode(mode)).unwrap();
        let sent = pair.put("in", "new/folder/file").unwrap();
        assert_eq!(sent, facts(&pair.host("in")).unwrap());
        assert!(fs::read(pair.guest("new/folder/file")).unwrap() == data, "{length} bytes");
        let there = fs::metadata(pair.guest("new/folder/file")).unwrap().permissions().mode();
        assert_eq!(there & 0o7777, mode);
        let came = pair.get("new/folder/file", "out").unwrap();
        assert_eq!((came.bytes, came.sha256), (sent.bytes, sent.sha256));
        assert!(fs::read(pair.host("out")).unwrap() == data, "{length} bytes");
        // Nobody else may write what came from a guest.
        let here = fs::metadata(pair.host("out")).unwrap().permissions().mode();
        assert_eq!(here & 0o7777, mode & 0o755 | 0o600);
    }
    assert_eq!(pair.names("host"), ["in", "out"]);
    assert_eq!(pair.names("guest/new/folder"), ["file"]);
    pair.end();
}

#[test]
fn a_file_survives_a_cut_at_every_place() {
    let data = pattern(300_000);
    let cuts: Vec<u64> = (0..140).chain((140..300_000).step_by(9_973)).collect();
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            let (data, cuts) = (data.clone(), cuts.clone());
            thread::spawn(move || {
                for at in cuts.into_iter().skip(worker).step_by(8) {
                    for cut in [Cut { from_agent: at, ..NEVER }, Cut { to_agent: at, ..NEVER }] {
                        let pair = Pair::new(&[cut]);
                        fs::write(pair.host("in"), &data).unwrap();
                        pair.put("in", "file").unwrap();
                        pair.get("file", "out").unwrap();
                        assert!(fs::read(pair.host("out")).unwrap() == data, "{cut:?}");
                        assert_eq!((pair.names("guest"), pair.names("host").len()), (vec!["file".into()], 2));
                        pair.end();
                    }
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

#[test]
fn what_cannot_be_copied_says_why_and_the_session_goes_on() {
    let pair = Pair::new(&[]);
    let said = |result: Result<_, CopyError>| result.map(drop).unwrap_err();
    let missing = said(pair.get("none", "out"));
    assert!(matches!(missing, CopyError::Missing(_)), "{missing}");
    assert!(missing.to_string().contains("/none\" in the guest cannot be read: No such file"), "{missing}");
    fs::create_dir(pair.guest("folder")).unwrap();
    assert!(said(pair.get("folder", "out")).to_string().contains("is a folder: name a file"));
    let pipe = std::process::Command::new("mkfifo").arg(pair.guest("pipe")).status().unwrap();
    assert!(pipe.success());
    assert!(said(pair.get("pipe", "out")).to_string().contains("not a regular file"));
    assert!(said(pair.put("none", "in")).to_string().contains("cannot be read"));
    fs::write(pair.host("in"), "x").unwrap();
    let refused = said(pair.put("in", "folder")).to_string();
    assert!(refused.contains("cannot be written"), "{refused}");
    fs::write(pair.guest("file"), "").unwrap();
    assert!(matches!(said(pair.put("in", "file/below")), CopyError::Missing(_)));
    // Too long, by what the file says, and by what it turns out to be.
    fs::write(pair.guest("long"), pattern(1000)).unwrap();
    for (path, limit) in [(pair.guest("long"), 999), ("/dev/../proc/self/maps".into(), 10)] {
        let mut arrival = Arrival::prepare(&pair.host("out")).unwrap();
        let result = arrival.fetch(&pair.session, &bytes_of(&path), &Root::Initramfs, limit);
        assert!(said(result).to_string().contains("longer than the"), "{path:?}");
        assert_eq!(arrival.commit().unwrap(), None);
    }
    let owner = Some(User::Name(b"no such user".to_vec()));
    let to = bytes_of(&pair.guest("owned"));
    let refused =
        said(copy_in(&pair.session, &pair.host("in"), &to, None, owner, &Root::Initramfs)).to_string();
    assert!(refused.contains("\"no such user\" is not in the guest's /etc/passwd"), "{refused}");
    for path in ["relative", ""] {
        let result = copy_in(&pair.session, &pair.host("in"), path.as_bytes(), None, None, &Root::Initramfs);
        assert!(said(result).to_string().contains("is not a path in the guest"));
    }
    assert_eq!(pair.names("host"), ["in"]);
    assert_eq!(pair.names("guest"), ["file", "folder", "long", "pipe"]);
    pair.put("in", "after").unwrap();
    pair.end();
}

#[test]
fn a_file_that_is_not_what_was_announced_never_gets_its_name() {
    let pair = Pair::new(&[]);
    let data = pattern(100_000);
    let host = pair.host("in");
    fs::write(&host, &data).unwrap();
    let sha256 = facts(&host).unwrap().sha256;
    let Sha256Digest(right) = sha256;
    let put = |bytes: u64, sha256: [u8; 32]| {
        let spec = PutSpec { path: bytes_of(&pair.guest("file")), bytes, sha256, ..PutSpec::default() };
        let stdin = Stdin::Reader(Box::new(io::Cursor::new(data.clone())));
        let stdio = Stdio { stdin, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
        pair.session.put(spec, stdio).unwrap().wait().unwrap().status
    };
    for (bytes, sha256, text) in [
        (100_000, [0; 32], "another SHA-256"),
        (100_001, right, "100000 of 100001 bytes"),
        (99_999, right, "longer than the 99999 bytes announced"),
        (0, right, "longer than the 0 bytes announced"),
    ] {
        let status = put(bytes, sha256);
        assert!(status.message().is_some_and(|message| message.contains(text)), "{status:?}");
    }
    assert!(pair.names("guest").is_empty());
    assert!(matches!(put(100_000, right), Status::Transferred(file) if file.sha256 == right));
    assert_eq!(pair.names("guest"), ["file"]);
    pair.end();
}

#[test]
fn no_snapshot_is_taken_while_a_file_is_on_its_way() {
    let pair = Pair::new(&[]);
    let (reader, writer) = io::pipe().unwrap();
    let spec = PutSpec { path: bytes_of(&pair.guest("file")), bytes: 1, ..PutSpec::default() };
    let stdin = Stdin::Reader(Box::new(reader));
    let stdio = Stdio { stdin, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let going = pair.session.put(spec, stdio).unwrap();
    assert!(matches!(pair.session.state(), Err(ExecuteError::Busy(_))));
    drop(writer);
    assert!(going.wait().unwrap().status.message().is_some());
    assert!(pair.session.state().unwrap().commands.is_empty());
    pair.session.set_busy(Some("for a reason"));
    let refused = pair.session.state().unwrap_err().to_string();
    assert_eq!(refused, "no snapshot can be taken now: for a reason: try again later");
    pair.session.set_busy(None);
    assert!(pair.session.state().is_ok());
    pair.end();
}

#[test]
fn a_host_that_goes_in_the_middle_of_a_file_leaves_none() {
    let pair = Pair::new(&[]);
    let (reader, mut writer) = io::pipe().unwrap();
    let spec = PutSpec { path: bytes_of(&pair.guest("file")), bytes: 1 << 20, ..PutSpec::default() };
    let stdin = Stdin::Reader(Box::new(reader));
    let stdio = Stdio { stdin, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let going = pair.session.put(spec, stdio).unwrap();
    io::Write::write_all(&mut writer, &pattern(10_000)).unwrap();
    while pair.names("guest").is_empty() {
        thread::sleep(std::time::Duration::from_millis(1));
    }
    // Half-way out, too: what was there before stays.
    fs::write(pair.host("kept"), "before").unwrap();
    let arrival = Arrival::prepare(&pair.host("kept")).unwrap();
    going.controller().cancel();
    assert!(going.wait().is_err());
    drop(arrival);
    while !pair.names("guest").is_empty() {
        thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(fs::read_to_string(pair.host("kept")).unwrap(), "before");
    assert_eq!(pair.names("host"), ["kept"]);
    // A command is none the worse for it.
    let stdio = Stdio { stdin: Stdin::Empty, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
    let command = pair.session.run(&CommandSpec::new(["true"]), stdio).unwrap();
    assert_eq!(command.wait().unwrap().status, Status::Exited(0));
    pair.end();
}
