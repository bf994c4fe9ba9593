//! Files that a job is given and leaves, and what its command may do: as users write them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::spec::{JobSpec, SpecProblem};
use crate::files::FileFacts;

/// Files in each direction.
const MAX_FILES: usize = 1000;
/// The processes and threads of a job that asks for nothing else: enough for what is meant, and not for a fork without end.
pub const DEFAULT_PROCESSES: u32 = 2048;

/// A file that a job is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// Where it was when the job was submitted.
    pub host: String,
    /// Where the job finds it, absolute.
    pub guest: String,
    /// What it is; the queue has it. `None` before it is submitted.
    pub facts: Option<FileFacts>,
}

/// A file that a job leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    /// Where the job writes it, absolute.
    pub guest: String,
    /// Its name when it is fetched: a relative path without `..`.
    pub name: String,
}

/// What a job's command may do and use in its machine; `None` is what the machine has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobLimits {
    /// UID, UID:GID or a name.
    pub user: Option<String>,
    /// It has namespaces of its own.
    pub isolate: bool,
    /// Percent of one processor.
    pub cpu_percent: Option<u32>,
    /// Memory of the command.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u32>,
    /// What fits each file system in memory.
    pub disk_bytes: Option<u64>,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            user: None,
            isolate: false,
            cpu_percent: None,
            memory_bytes: None,
            processes: Some(DEFAULT_PROCESSES),
            disk_bytes: None,
        }
    }
}

impl InputFile {
    /// Reads `HOST` or `HOST:GUEST`. A relative HOST begins at `folder`, a relative GUEST at the working directory; a GUEST
    /// that is a folder gets the file's name.
    pub fn parse(text: &str, folder: &Path, workdir: Option<&str>) -> Result<Self, String> {
        let (host, guest) = text.rsplit_once(':').unwrap_or((text, ""));
        let wrong = || format!("'{text}' names no file: write HOST or HOST:GUEST");
        let name = Path::new(host).file_name().and_then(|name| name.to_str()).ok_or_else(wrong)?;
        let host = text_of(&folder.join(host)).ok_or_else(wrong)?;
        Ok(Self { host, guest: in_guest(guest, name, workdir).ok_or_else(wrong)?, facts: None })
    }
}

impl OutputFile {
    /// Reads `GUEST` or `GUEST:NAME`. A relative GUEST begins at the working directory.
    pub fn parse(text: &str, workdir: Option<&str>) -> Result<Self, String> {
        let (guest, name) = text.split_once(':').map_or((text, None), |(guest, name)| (guest, Some(name)));
        let wrong = || format!("'{text}' names no file: write GUEST or GUEST:NAME");
        let own = Path::new(guest).file_name().and_then(|name| name.to_str());
        let own = own.filter(|_| !guest.ends_with('/')).ok_or_else(wrong)?;
        let guest = in_guest(guest, own, workdir).ok_or_else(wrong)?;
        let name = match name {
            None => own.to_owned(),
            Some(folder) if folder.ends_with('/') => format!("{folder}{own}"),
            Some(name) => name.to_owned(),
        };
        Ok(Self { guest, name })
    }
}

fn text_of(path: &Path) -> Option<String> {
    path.to_str().map(str::to_owned)
}

fn in_guest(path: &str, name: &str, workdir: Option<&str>) -> Option<String> {
    let mut absolute = PathBuf::from(workdir.unwrap_or("/")).join(path);
    if path.is_empty() || path.ends_with('/') {
        absolute.push(name);
    }
    text_of(&absolute)
}

/// Checks what can be checked without the files.
pub(super) fn check(spec: &JobSpec) -> Result<(), SpecProblem> {
    let problem = |key: &'static str, message: String| Err(SpecProblem { key, message });
    for (key, count) in [("inputs", spec.inputs.len()), ("outputs", spec.outputs.len())] {
        if count > MAX_FILES {
            return problem(key, format!("{count} are too many: {MAX_FILES} at most"));
        }
    }
    let mut names = BTreeSet::new();
    let inputs = spec.inputs.iter().map(|file| ("inputs", &file.guest));
    for (key, path) in inputs.chain(spec.outputs.iter().map(|file| ("outputs", &file.guest))) {
        // A colon would end it on a command line.
        if !path.starts_with('/') || path.ends_with('/') || path.contains(['\0', ':']) || path.len() > 4000 {
            return problem(
                key,
                format!("{path:?} is no file in the guest: write an absolute path without ':'"),
            );
        }
        if !names.insert((key, path.as_str())) {
            return problem(key, format!("{path:?} is named twice: once is enough"));
        }
    }
    for file in &spec.outputs {
        let path = Path::new(&file.name);
        let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if file.name.is_empty() || file.name.contains('\0') || !is_plain {
            return problem(
                "outputs",
                format!("{:?} is no name for a file: write a relative path without ..", file.name),
            );
        }
        if !names.insert(("names", file.name.as_str())) {
            return problem(
                "outputs",
                format!("two files would be called {:?}: give one another name", file.name),
            );
        }
    }
    if spec.checkpoint_exit == Some(0) {
        return problem("checkpoint_exit", "0 means success: give another code, like 85".to_owned());
    }
    if spec.checkpoint_exit.is_some() && spec.outputs.is_empty() {
        return problem("checkpoint_exit", "nothing would be saved: name the files with outputs".to_owned());
    }
    let limits = &spec.limits;
    for (key, value) in [
        ("cpu_limit", limits.cpu_percent.map(u64::from)),
        ("process_limit", limits.processes.map(u64::from)),
        ("memory_limit", limits.memory_bytes),
    ] {
        if value == Some(0) {
            return problem(key, "0 lets nothing run: give more".to_owned());
        }
    }
    if let Some(user) = &limits.user
        && (user.is_empty() || user.len() > 256 || user.starts_with('-') || user.contains('\0'))
    {
        return problem("user", format!("{user:?} is no user: give UID, UID:GID or a name"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_as_in_run() {
        let input = |text| InputFile::parse(text, Path::new("/jobs"), Some("/data"));
        for (text, host, guest) in [
            ("a", "/jobs/a", "/data/a"),
            ("/x/a:b", "/x/a", "/data/b"),
            ("a:/etc/", "/jobs/a", "/etc/a"),
            ("a:b:c", "/jobs/a:b", "/data/c"),
        ] {
            let found = input(text).unwrap();
            assert_eq!((found.host.as_str(), found.guest.as_str()), (host, guest), "{text}");
        }
        let output = |text| OutputFile::parse(text, None);
        for (text, guest, name) in
            [("out", "/out", "out"), ("/a/out:b", "/a/out", "b"), ("/a/out:sub/", "/a/out", "sub/out")]
        {
            let found = output(text).unwrap();
            assert_eq!((found.guest.as_str(), found.name.as_str()), (guest, name), "{text}");
        }
        assert!(input("..").is_err() && input("").is_err() && output("a/").is_err() && output("").is_err());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let output = |guest: &str, name: &str| OutputFile { guest: guest.into(), name: name.into() };
        let key = |change: &dyn Fn(&mut JobSpec)| {
            let mut spec = JobSpec { outputs: vec![output("/a", "a")], ..JobSpec::default() };
            change(&mut spec);
            check(&spec).err().map(|problem| problem.key)
        };
        assert_eq!(key(&|_| {}), None);
        assert_eq!(key(&|spec| spec.outputs.push(output("/a", "b"))), Some("outputs"));
        assert_eq!(key(&|spec| spec.outputs.push(output("/b", "a"))), Some("outputs"));
        for name in ["", "/x", "../x", "a/../b", "./a"] {
            assert_eq!(key(&|spec| spec.outputs.push(output("/b", name))), Some("outputs"), "{name}");
        }
        assert_eq!(key(&|spec| spec.outputs[0].guest = "a".into()), Some("outputs"));
        assert_eq!(key(&|spec| spec.checkpoint_exit = Some(0)), Some("checkpoint_exit"));
        assert_eq!(key(&|spec| spec.checkpoint_exit = Some(85)), None);
        assert_eq!(
            key(&|spec| {
                spec.checkpoint_exit = Some(85);
                spec.outputs.clear();
            }),
            Some("checkpoint_exit")
        );
        assert_eq!(key(&|spec| spec.limits.processes = Some(0)), Some("process_limit"));
        assert_eq!(key(&|spec| spec.limits.user = Some("-x".into())), Some("user"));
    }
}
