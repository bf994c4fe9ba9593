//! `--input` and `--output`: files that are copied into the machine before its command runs, and out of it afterwards.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use harrier_jobs::files::{Arrival, CopyError, FileFacts, copy_in};
use harrier_jobs::{ExecuteError, Root, Session, User};
use thiserror::Error;

use crate::exit::Failure;
use crate::flags::FileFlags;
use crate::units::{UnitError, parse_size};

/// The longest file that is taken from a guest, unless a flag says otherwise.
const MAX_OUTPUT: u64 = 16 << 30;

/// The files of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FilesConfig {
    pub(crate) inputs: Vec<Input>,
    pub(crate) outputs: Vec<Output>,
    /// The longest file that is taken.
    pub(crate) max_output: u64,
}

impl Default for FilesConfig {
    fn default() -> Self {
        FilesConfig { inputs: Vec::new(), outputs: Vec::new(), max_output: MAX_OUTPUT }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Input {
    pub(crate) host: PathBuf,
    /// Absolute.
    pub(crate) guest: Vec<u8>,
    /// Its permission bits, if not the host's file's.
    pub(crate) mode: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    /// Absolute.
    pub(crate) guest: Vec<u8>,
    pub(crate) host: PathBuf,
}

#[derive(Debug, Error)]
pub(crate) enum FileFlagError {
    #[error("--input '{0}' names no file: write HOST or HOST:GUEST")]
    Input(String),
    #[error("--output '{0}' names no file: write GUEST or GUEST:HOST")]
    Output(String),
    #[error("--output: two files would become '{}': give each a place of its own", .0.display())]
    Twice(PathBuf),
    #[error("--output-limit: {0}")]
    Limit(#[from] UnitError),
}

impl FilesConfig {
    /// Reads the flags. Relative paths of the guest begin at the command's working directory.
    pub(crate) fn from_flags(flags: &FileFlags, workdir: Option<&[u8]>) -> Result<Self, FileFlagError> {
        let mut config = FilesConfig::default();
        let as_they_are = flags.input.iter().map(|text| (text.as_os_str(), None));
        let with_mode = flags.input_as.iter().map(|text| {
            let (mode, rest) = split(text, |bytes| bytes.iter().position(|byte| *byte == b':'));
            let mode = mode.to_str().and_then(|mode| u32::from_str_radix(mode, 8).ok());
            (rest.unwrap_or_default(), Some(mode.unwrap_or(0o600) & 0o777))
        });
        for (text, mode) in as_they_are.chain(with_mode) {
            let wrong = || FileFlagError::Input(text.to_string_lossy().into_owned());
            let (host, guest) = split(text, |bytes| bytes.iter().rposition(|byte| *byte == b':'));
            let guest = guest.unwrap_or(OsStr::new(""));
            let name = Path::new(host).file_name().ok_or_else(wrong)?;
            config.inputs.push(Input { host: host.into(), guest: in_guest(guest, name, workdir), mode });
        }
        for text in &flags.output {
            let wrong = || FileFlagError::Output(text.to_string_lossy().into_owned());
            let (guest, host) = split(text, |bytes| bytes.iter().position(|byte| *byte == b':'));
            let name = Path::new(guest).file_name().filter(|_| !guest.as_bytes().ends_with(b"/"));
            let name = name.ok_or_else(wrong)?;
            let host = match host {
                None => PathBuf::from(name),
                Some(host) if host.is_empty() => return Err(wrong()),
                Some(host) if host.as_bytes().ends_with(b"/") => Path::new(host).join(name),
                Some(host) => PathBuf::from(host),
            };
            let host = std::path::absolute(&host).unwrap_or(host);
            if config.outputs.iter().any(|output| output.host == host) {
                return Err(FileFlagError::Twice(host));
            }
            config.outputs.push(Output { guest: in_guest(guest, name, workdir), host });
        }
        if let Some(limit) = &flags.output_limit {
            config.max_output = parse_size(limit)?;
        }
        Ok(config)
    }
}

fn split(text: &OsStr, at: impl Fn(&[u8]) -> Option<usize>) -> (&OsStr, Option<&OsStr>) {
    let bytes = text.as_bytes();
    match at(bytes) {
        Some(at) => {
            let (head, tail) = bytes.split_at(at);
            (OsStr::from_bytes(head), Some(OsStr::from_bytes(tail.get(1..).unwrap_or_default())))
        }
        None => (text, None),
    }
}

/// An absolute path of the guest; a folder, or nothing, gets `name` added.
fn in_guest(path: &OsStr, name: &OsStr, workdir: Option<&[u8]>) -> Vec<u8> {
    let mut absolute = PathBuf::from(OsStr::from_bytes(workdir.unwrap_or(b"/"))).join(path);
    if path.is_empty() || path.as_bytes().ends_with(b"/") {
        absolute.push(name);
    }
    OsString::from(absolute).into_encoded_bytes()
}

/// Why files stop a run.
#[derive(Debug)]
pub(crate) enum FileTrouble {
    /// The session with the agent ended.
    Session(ExecuteError),
    Other(Failure),
}

impl From<ExecuteError> for FileTrouble {
    fn from(error: ExecuteError) -> Self {
        Self::Session(error)
    }
}

impl FileTrouble {
    fn new(flag: &str, error: CopyError) -> Self {
        match error {
            CopyError::Session(error) => Self::Session(error),
            error => Self::Other(Failure::new(format!("{flag}: {error}"))),
        }
    }
}

/// Copies the input files into the machine.
pub(crate) fn copy_inputs(
    config: &FilesConfig,
    session: &Session,
    owner: Option<&User>,
    root: &Root,
) -> Result<(), FileTrouble> {
    for input in &config.inputs {
        copy_in(session, &input.host, &input.guest, input.mode, owner.cloned(), root)
            .map_err(|error| FileTrouble::new("--input", error))?;
    }
    Ok(())
}

/// The output files of a run, until they have their names.
#[derive(Debug, Default)]
pub(crate) struct Outputs(Vec<(Output, Arrival, Fetched)>);

#[derive(Debug)]
enum Fetched {
    NotYet,
    There(FileFacts),
    /// The command did not write it.
    Missing(String),
}

/// An output file at the end of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutputEnd {
    pub(crate) guest: Vec<u8>,
    pub(crate) host: PathBuf,
    /// `None`: the command did not write it.
    pub(crate) facts: Option<FileFacts>,
}

impl Outputs {
    /// Makes sure that every file will have a place, before there is anything to lose.
    pub(crate) fn prepare(config: &FilesConfig) -> Result<Self, Failure> {
        let prepare = |output: &Output| {
            let arrival =
                Arrival::prepare(&output.host).map_err(|error| Failure::new(format!("--output: {error}")))?;
            Ok((output.clone(), arrival, Fetched::NotYet))
        };
        config.outputs.iter().map(prepare).collect::<Result<_, Failure>>().map(Self)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Copies the files out of the machine; they do not have their names yet.
    pub(crate) fn fetch(
        &mut self,
        config: &FilesConfig,
        session: &Session,
        root: &Root,
    ) -> Result<(), FileTrouble> {
        for (output, arrival, fetched) in &mut self.0 {
            *fetched = match arrival.fetch(session, &output.guest, root, config.max_output) {
                Ok(facts) => Fetched::There(facts),
                Err(error @ CopyError::Missing(_)) => Fetched::Missing(error.to_string()),
                Err(error) => return Err(FileTrouble::new("--output", error)),
            };
        }
        Ok(())
    }

    /// The machine has ended before they could be copied.
    pub(crate) fn give_up(&mut self) {
        for (output, _, fetched) in &mut self.0 {
            let guest = String::from_utf8_lossy(&output.guest);
            *fetched =
                Fetched::Missing(format!("the machine has ended itself before '{guest}' could be copied"));
        }
    }

    /// Gives the files that are there their names. A missing one is a failure only where the command itself succeeded.
    pub(crate) fn commit(
        self,
        succeeded: bool,
        remarks: bool,
    ) -> Result<Vec<OutputEnd>, (Vec<OutputEnd>, Failure)> {
        let mut ends = Vec::new();
        let mut failure = None;
        for (Output { guest, host }, arrival, fetched) in self.0 {
            let facts = match fetched {
                Fetched::There(facts) => match arrival.commit() {
                    Ok(_) => Some(facts),
                    Err(error) => {
                        failure.get_or_insert(Failure::new(format!("--output: {error}")));
                        None
                    }
                },
                Fetched::Missing(message) if succeeded => {
                    failure.get_or_insert(Failure::new(format!("--output: {message}")));
                    None
                }
                Fetched::Missing(message) => {
                    if remarks {
                        // A remark that nobody can read is no failure.
                        let _ = writeln!(io::stderr(), "harrier: --output: {message}");
                    }
                    None
                }
                Fetched::NotYet => None,
            };
            ends.push(OutputEnd { guest, host, facts });
        }
        match failure {
            None => Ok(ends),
            Some(failure) => Err((ends, failure)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(input: &[&str], output: &[&str]) -> Result<FilesConfig, FileFlagError> {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect();
        let flags = FileFlags { input: words(input), output: words(output), ..FileFlags::default() };
        FilesConfig::from_flags(&flags, Some(b"/data"))
    }

    #[test]
    fn names_are_added_to_folders_and_relative_paths_begin_where_the_command_does() {
        let inputs = ["data/a", "b:/etc/c", "d:sub/", "e:f:g"];
        let found = config(&inputs, &[]).unwrap().inputs;
        let guests: Vec<&str> =
            found.iter().map(|input| std::str::from_utf8(&input.guest).unwrap()).collect();
        assert_eq!(guests, ["/data/a", "/etc/c", "/data/sub/d", "/data/g"]);
        assert_eq!(found[3].host, Path::new("e:f"));
        let found = config(&[], &["out", "/var/log/x:/tmp/y", "z:/tmp/"]).unwrap().outputs;
        let here = std::env::current_dir().unwrap();
        let expected =
            [("/data/out", here.join("out")), ("/var/log/x", "/tmp/y".into()), ("/data/z", "/tmp/z".into())];
        for (output, (guest, host)) in found.iter().zip(expected) {
            assert_eq!((output.guest.as_slice(), &output.host), (guest.as_bytes(), &host));
        }
    }

    #[test]
    fn what_names_no_file_is_refused() {
        for wrong in ["", ":/x", "..", "/"] {
            assert!(matches!(config(&[wrong], &[]), Err(FileFlagError::Input(_))), "{wrong}");
        }
        for wrong in ["", ":x", "out:", "dir/", ".."] {
            assert!(matches!(config(&[], &[wrong]), Err(FileFlagError::Output(_))), "{wrong}");
        }
        assert!(matches!(config(&[], &["a/x", "b/x"]), Err(FileFlagError::Twice(_))));
    }
}
