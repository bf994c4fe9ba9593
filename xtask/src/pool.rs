//! A queue with workers of its own, for measurements and for the soak: `harrier` processes on a temporary folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// A queue in a folder.
pub(crate) struct Pool {
    harrier: PathBuf,
    folder: tempfile::TempDir,
}

/// A worker or coordinator; it ends with this value.
pub(crate) struct Process {
    child: Child,
    /// What it says.
    pub(crate) log: PathBuf,
}

impl Pool {
    pub(crate) fn new(harrier: &Path) -> Result<Self> {
        let folder = tempfile::tempdir().context("no temporary folder")?;
        // Commands run elsewhere.
        let harrier = std::path::absolute(harrier)?;
        Ok(Self { harrier, folder })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.harrier);
        command
            .args(arguments)
            .env("HARRIER_QUEUE", self.path("queue"))
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Stdout of a command that has to succeed.
    pub(crate) fn good(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("harrier {} ended with {}: {said}", arguments.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.good(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("harrier {} answers no JSON", arguments.join(" ")))
    }

    /// Submits and answers the jobs' numbers.
    pub(crate) fn submit(&self, flags: &[&str], command: &[&str]) -> Result<Vec<u64>> {
        let answer = self.json_of_submit(flags, command)?;
        let numbers = answer["jobs"].as_array().context("no numbers")?;
        numbers.iter().map(|number| number.as_u64().context("no number")).collect()
    }

    fn json_of_submit(&self, flags: &[&str], command: &[&str]) -> Result<Value> {
        let text = self.good(&[&["submit", "--json"][..], flags, &["--"], command].concat())?;
        serde_json::from_str(&text).context("harrier submit answers no JSON")
    }

    /// Starts a worker with a name and a folder of its own.
    pub(crate) fn worker(&self, name: &str, flags: &[&str]) -> Result<Process> {
        let state = self.path(name);
        let state = state.to_str().context("a folder that is not UTF-8")?;
        self.process(name, &[&["worker", "--name", name, "--state", state][..], flags].concat())
    }

    pub(crate) fn process(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let log = self.path(&format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = self.command(arguments).stdout(Stdio::null()).stderr(file).spawn()?;
        Ok(Process { child, log })
    }

    /// `harrier worker busy` or `idle`.
    pub(crate) fn owner(&self, word: &str, name: &str) -> Result<()> {
        let state = self.path(name);
        self.good(&["worker", word, "--state", state.to_str().context("not UTF-8")?]).map(drop)
    }

    /// Waits for jobs, whatever becomes of them.
    pub(crate) fn wait(&self, jobs: &[u64], limit: Duration) -> Result<()> {
        let (Some(first), Some(last)) = (jobs.first(), jobs.last()) else { return Ok(()) };
        let limit = format!("{}s", limit.as_secs());
        let status = self
            .command(&["wait", "--timeout", &limit, &format!("{first}-{last}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if status.code() == Some(124) {
            bail!("jobs {first}-{last} have not ended within {limit}");
        }
        Ok(())
    }
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends it in good order.
    pub(crate) fn end(&mut self, limit: Duration) -> Result<()> {
        let pid = self.pid().to_string();
        Command::new("kill").args(["-TERM", &pid]).status()?;
        let begin = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begin.elapsed() > limit {
                bail!("process {pid} does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
