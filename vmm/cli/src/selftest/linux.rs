//! The default guest's Linux on an engine: this program's own `harrier run`, in a process of its own, as a user runs it.

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::report::Outcome;

/// How long a run may take beyond its own --timeout.
const END_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);
const MEMORY: &str = "256M";

/// A command in the guest and what it has to print.
pub(super) struct Command {
    pub(super) name: &'static str,
    script: &'static str,
    stdout: &'static str,
}

/// What is run, each in a machine of its own.
pub(super) const COMMANDS: &[Command] = &[
    Command { name: "linux-true", script: "true", stdout: "" },
    Command {
        name: "linux-checksum",
        script: "dd if=/dev/zero bs=64k count=16 2>/dev/null | sha256sum",
        // Of a MiB of zeros.
        stdout: "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58  -\n",
    },
];

/// Boots Linux on `engine` and runs `command` in it.
pub(super) fn run(engine: &str, command: &Command, limit: Duration) -> Outcome {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(err) => {
            return Outcome::failed(&format!("the program's own file cannot be found ({err}): mount /proc"));
        }
    };
    let limit_ms = format!("{}ms", limit.as_millis());
    let child = std::process::Command::new(program)
        .args(["run", "--engine", engine, "--memory", MEMORY, "--json", "--quiet", "--timeout", &limit_ms])
        .args(["--", "sh", "-c", command.script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    match child {
        Ok(child) => match output_of(child, limit.saturating_add(END_LIMIT)) {
            Ok(output) => verdict(&output, command),
            Err(reason) => Outcome::failed(&reason),
        },
        Err(err) => Outcome::failed(&format!("'harrier run' cannot be started ({err})")),
    }
}

/// What a process has written when it has ended, or been ended at the deadline.
fn output_of(mut child: Child, limit: Duration) -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + limit;
    let mut stdout = child.stdout.take().ok_or("its output is lost")?;
    let reader = std::thread::Builder::new().name("output".to_owned()).spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let ended = loop {
        match child.try_wait() {
            Ok(Some(_)) => break Ok(()),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
            Ok(None) => break Err("'harrier run' did not end by its own --timeout".to_owned()),
            Err(err) => break Err(format!("'harrier run' cannot be waited for ({err})")),
        }
    };
    // Of one that has ended nothing is left to kill.
    let _ = child.kill();
    let _ = child.wait();
    ended?;
    let reader =
        reader.map_err(|err| format!("no thread for its output ({err}): raise the limit of processes"))?;
    reader.join().map_err(|_| "harrier panicked")?.map_err(|err| format!("its output cannot be read ({err})"))
}

/// Judges the object that `harrier run --json` has printed.
fn verdict(output: &[u8], command: &Command) -> Outcome {
    let Ok(object) = serde_json::from_slice::<Value>(output) else {
        return Outcome::failed("'harrier run --json' printed no object");
    };
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let code = object.get("exit_code").and_then(Value::as_u64);
    let timings = object.get("timings_ms").cloned();
    let outcome = if code == Some(0) && text("stdout") == command.stdout {
        Outcome::passed(Vec::new())
    } else if !text("error").is_empty() {
        Outcome::failed(text("error"))
    } else {
        let code = code.map_or_else(|| "none".to_owned(), |code| code.to_string());
        Outcome::failed(&format!(
            "exit code {code} and the output '{}' instead of 0 and '{}'",
            text("stdout").trim_end(),
            command.stdout.trim_end()
        ))
    };
    Outcome { timings, ..outcome }
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn a_run_is_judged_by_its_exit_code_and_its_output() {
        let judge = |text: &str| match verdict(text.as_bytes(), &COMMANDS[1]).verdict {
            Verdict::Failed(reason) => reason,
            other => format!("{other:?}"),
        };
        let good = serde_json::json!({"exit_code": 0, "stdout": COMMANDS[1].stdout}).to_string();
        assert_eq!(judge(&good), "Passed");
        assert_eq!(judge(r#"{"exit_code": 125, "error": "no kernel"}"#), "no kernel");
        assert!(
            judge(r#"{"exit_code": 0, "stdout": "x\n"}"#)
                .starts_with("exit code 0 and the output 'x' instead")
        );
        assert_eq!(judge("harrier: x"), "'harrier run --json' printed no object");
    }

    #[test]
    fn a_process_that_does_not_end_is_ended() {
        let child = std::process::Command::new("sleep").arg("1000").stdout(Stdio::piped()).spawn().unwrap();
        let reason = output_of(child, Duration::from_millis(20)).unwrap_err();
        assert_eq!(reason, "'harrier run' did not end by its own --timeout");
    }
}
