//! Running other programs: quiet when they succeed, one clear line when they do not.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

/// Runs `command` and returns what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = name_of(command);
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        bail!("{name} failed ({status}): {}", telling_line(&stderr));
    }
    Ok(stdout)
}

/// Runs `command` and throws its output away.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs `command` on this process's own terminal.
pub(crate) fn run_visibly(command: &mut Command) -> Result<()> {
    let name = name_of(command);
    let status = command.status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    Ok(())
}

/// Runs a long `command` with its output in `log`, and shows a line of progress on standard error: the number of
/// output lines and the time so far. On failure the error is the line of the log that tells most, and the log stays.
pub(crate) fn run_with_progress(command: &mut Command, what: &str, log: &Path) -> Result<()> {
    let name = name_of(command);
    let mut log_file = File::create(log).map_err(|error| crate::cache::explain(error, log))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let mut progress = Progress::new(what);
    for line in BufReader::new(child.stdout.take().context("no output to read")?).split(b'\n') {
        let mut line = line?;
        line.push(b'\n');
        log_file.write_all(&line).map_err(|error| crate::cache::explain(error, log))?;
        progress.step();
    }
    let status = child.wait()?;
    progress.end();
    if !status.success() {
        let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
        return Err(anyhow!("{name} failed: {} (its whole output: {})", telling_line(&text), log.display()));
    }
    Ok(())
}

/// The line of a program's output that says what went wrong: a full disk, else the first line that speaks of an error,
/// else the first.
fn telling_line(text: &str) -> &str {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let speaks_of_error = |line: &&str| {
        line.to_ascii_lowercase().contains("error") && !line.ends_with("due to previous errors")
    };
    let out_of_space = lines.clone().find(|line| line.contains("No space left"));
    out_of_space
        .or_else(|| lines.clone().find(speaks_of_error))
        .or_else(|| lines.next())
        .unwrap_or("it gave no reason")
}

fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}

/// Progress of a step that takes minutes: redrawn in place on a terminal, a line every half minute elsewhere.
struct Progress<'a> {
    what: &'a str,
    started: Instant,
    shown: Instant,
    steps: u64,
    terminal: bool,
}

impl<'a> Progress<'a> {
    fn new(what: &'a str) -> Self {
        let now = Instant::now();
        eprintln!("xtask: {what}");
        Self { what, started: now, shown: now, steps: 0, terminal: std::io::stderr().is_terminal() }
    }

    fn step(&mut self) {
        self.steps += 1;
        let interval = if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(30) };
        if self.shown.elapsed() < interval {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.started.elapsed().as_secs();
        if self.terminal {
            eprint!("\r\x1b[Kxtask: {}: {} steps, {seconds} s", self.what, self.steps);
        } else {
            eprintln!("xtask: {}: {} steps, {seconds} s", self.what, self.steps);
        }
    }

    fn end(&self) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        eprintln!("{clear}xtask: {}: took {} s", self.what, self.started.elapsed().as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_one_line_with_the_program_and_its_reason() {
        let error =
            run(Command::new("sh").args(["-c", "echo one; echo 'x: error: bad' >&2; echo last >&2; exit 3"]))
                .unwrap_err()
                .to_string();
        assert_eq!(error, "sh failed (exit status: 3): x: error: bad");
    }

    #[test]
    fn a_full_disk_is_told_before_the_errors_that_follow_from_it() {
        let text = "cc: error: cannot write\nld: No space left on device\nmake: *** Error 1\n";
        assert_eq!(telling_line(text), "ld: No space left on device");
        let text = "tar: not an archive\ntar: Exiting with failure status due to previous errors\n";
        assert_eq!(telling_line(text), "tar: not an archive");
        assert_eq!(telling_line(""), "it gave no reason");
    }

    #[test]
    fn a_long_command_keeps_its_log_and_names_it_when_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let error = run_with_progress(
            Command::new("sh").args(["-c", "echo made; echo broken >&2; exit 1"]),
            "x",
            &log,
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains(log.to_str().unwrap()), "{error}");
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains("made") && text.contains("broken"), "{text}");
    }
}
