//! Linux's tools/testing/selftests/x86: the same programs on this host and in a guest, side by side.
//!
//! The programs are copied into an image with a C library and run one after the other by one shell in one machine. Each
//! says by its exit code how it went; what it said last is the reason of a failure.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::report::{Row, Table, Verdict};
use super::{Debian, EngineName, SuiteError};

/// Where the programs lie in the guest.
const FOLDER: &str = "/root";
/// How long one program may take, in seconds: timeout(1)'s word.
const PATIENCE: &str = "180";
/// What a line begins with that says how a program ended.
const MARK: &str = "=== ";
/// Exit code of a program that skips itself (tools/testing/selftests/kselftest.h).
const SKIPPED: i32 = 4;
const TIMED_OUT: i32 = 124;

/// What the programs run in.
#[derive(Debug, Clone, clap::Args)]
pub struct Guest {
    /// A Debian, of which a copy gets the programs
    #[command(flatten)]
    pub debian: Debian,
    /// The guest's kernel: one with every interface that the programs test
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Its initial ramdisk
    #[arg(long, value_name = "FILE")]
    pub initrd: PathBuf,
}

/// Runs the programs that were built in `dir`, here and in a guest on `engine`.
///
/// # Errors
/// [`SuiteError`] if nothing was built there, or the guest cannot be made.
pub fn run(dir: &Path, engine: EngineName, guest: &Guest) -> Result<Table, SuiteError> {
    let programs = programs(dir)?;
    let engine = engine.word();
    let folder = tempfile::tempdir().map_err(SuiteError::Temporary)?;
    let image = folder.path().join("root.ext4");
    fill(&guest.debian.rootfs, &image, dir, &programs)?;
    let mut table = Table::new(vec![engine.to_owned(), "host".to_owned()]);
    let in_guest = ends(&in_guest(engine, guest, &image, &programs)?);
    for name in programs {
        let here = Command::new("timeout").arg(PATIENCE).arg(dir.join(&name)).current_dir(dir).output();
        let here = here.map_err(|source| SuiteError::Program { program: "timeout", source })?;
        let there = in_guest.iter().find(|end| end.name == name);
        let there = there.map_or_else(|| Verdict::fail("the guest did not come to it"), End::verdict);
        table.rows.push(Row { verdicts: vec![there, End::of(&name, &here).verdict()], name });
    }
    Ok(table)
}

/// The names of the built programs.
fn programs(dir: &Path) -> Result<Vec<String>, SuiteError> {
    let unreadable = |source| SuiteError::Unreadable { file: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let runs = entry.metadata().is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0);
        let built = name.ends_with("_64") || name.ends_with("_32");
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if runs && built && plain {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() {
        let missing = "program whose name ends in _64 or _32 (make them first)".to_owned();
        return Err(SuiteError::NotThere { dir: dir.to_owned(), suite: "selftests/x86", missing });
    }
    Ok(names)
}

/// Copies the image and puts the programs into it.
fn fill(rootfs: &Path, image: &Path, dir: &Path, programs: &[String]) -> Result<(), SuiteError> {
    fs::copy(rootfs, image).map_err(|source| SuiteError::Unreadable { file: rootfs.to_owned(), source })?;
    let mut script = tempfile::NamedTempFile::new().map_err(SuiteError::Temporary)?;
    for name in programs {
        writeln!(
            script,
            "write {} {FOLDER}/{name}\nsif {FOLDER}/{name} mode 0100755",
            dir.join(name).display()
        )
        .map_err(SuiteError::Temporary)?;
    }
    let output = Command::new("debugfs").arg("-w").arg("-f").arg(script.path()).arg(image).output();
    let output = output.map_err(|source| SuiteError::Program { program: "debugfs", source })?;
    let said = String::from_utf8_lossy(&output.stderr);
    match said.lines().find(|line| line.contains(": ") && !line.starts_with("debugfs ")) {
        Some(line) => Err(SuiteError::Guest(format!("'{}' cannot be filled: {line}", rootfs.display()))),
        None => Ok(()),
    }
}

fn in_guest(engine: &str, guest: &Guest, image: &Path, programs: &[String]) -> Result<String, SuiteError> {
    let script: String = programs
        .iter()
        .map(|name| {
            format!("timeout {PATIENCE} ./{name} >/tmp/said 2>&1 </dev/null; echo \"{MARK}{name} $?\"; tail -n 3 /tmp/said; ")
        })
        .collect();
    let output = Command::new(&guest.debian.harrier)
        .args(["run", "--engine", engine, "--memory", "1G"])
        .args(if engine == "soft" { &["--cpu-model", "host"][..] } else { &[] })
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initrd)
        .arg("--rootfs")
        .arg(image)
        .args(["--workdir", FOLDER, "--", "sh", "-c", &script])
        .output()
        .map_err(|source| SuiteError::Program { program: "harrier", source })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if said.is_empty() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(SuiteError::Guest(why.lines().next().unwrap_or("it said nothing").to_owned()));
    }
    Ok(said)
}

/// How a program ended.
struct End {
    name: String,
    code: i32,
    last: String,
}

impl End {
    fn of(name: &str, output: &Output) -> End {
        let said = String::from_utf8_lossy(&output.stdout);
        let last = said.lines().last().unwrap_or_default().trim().to_owned();
        End { name: name.to_owned(), code: output.status.code().unwrap_or(-1), last }
    }

    fn verdict(&self) -> Verdict {
        match self.code {
            0 => Verdict::Pass,
            SKIPPED => Verdict::skip(self.last.clone()),
            TIMED_OUT => Verdict::fail(format!("no end in {PATIENCE} s")),
            code => Verdict::fail(format!("exit code {code}: {}", self.last)),
        }
    }
}

/// The ends in what the guest said.
fn ends(said: &str) -> Vec<End> {
    let mut ends: Vec<End> = Vec::new();
    for line in said.lines() {
        let end = line.strip_prefix(MARK).and_then(|rest| rest.rsplit_once(' '));
        match end.and_then(|(name, code)| Some((name, code.parse().ok()?))) {
            Some((name, code)) => ends.push(End { name: name.to_owned(), code, last: String::new() }),
            None => {
                if let Some(end) = ends.last_mut() {
                    end.last = line.trim().to_owned();
                }
            }
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_is_found_with_its_last_words() {
        let said = "=== a_64 0\n[OK]\tall\n=== b_64 139\n=== c_64 1\n[RUN]\n[FAIL]\tthat\n=== d_64 124\n=== e_64 4\nno AMX\n";
        let verdicts: Vec<Verdict> = ends(said).iter().map(End::verdict).collect();
        assert_eq!(verdicts[0], Verdict::Pass);
        assert_eq!(verdicts[1], Verdict::fail("exit code 139: "));
        assert_eq!(verdicts[2], Verdict::fail("exit code 1: [FAIL]\tthat"));
        assert_eq!(verdicts[3], Verdict::fail("no end in 180 s"));
        assert_eq!(verdicts[4], Verdict::skip("no AMX"));
    }

    #[test]
    fn a_folder_where_nothing_was_built_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("fsgsbase_64"), "not a program").unwrap();
        let error = programs(folder.path()).unwrap_err().to_string();
        assert!(error.contains("make them first"), "{error}");
    }
}
