//! A plain boot: any kernel, with its serial console on the terminal.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use harrier_control::output::Stream;
use harrier_engine::{CpuModel, Engine};
use harrier_jobs::FdOutput;
use harrier_machine::MachineEnd;
use signal_hook::consts::SIGINT;

use crate::config::RunConfig;
use crate::exit::{Failure, no_stream};
use crate::monitor::Monitor;
use crate::report::CapturedOutput;
use crate::run::{Run, ended, guest_exit, interrupted, prepare, start};
use crate::signals::{Interrupter, Interruption};
use crate::terminal;

/// Ctrl-A, the first key of the way out.
const ESCAPE: u8 = 1;

/// Boots the kernel and answers the exit code of its end.
pub(crate) fn run(
    config: &RunConfig,
    engine: &dyn Engine,
    model: CpuModel,
    run: &mut Run<'_>,
) -> Result<u8, Failure> {
    let interrupter = run.interrupter.clone();
    let log = run.monitor.and_then(|monitor| monitor.output(Stream::Stdout));
    let interactive = terminal::is_interactive() && !config.output.json && log.is_none();
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(no_stream)?;
    let (input, keys) = if log.is_some() {
        // A console that is detached reads what whoever attaches sends, or nothing.
        (run.monitor.map(|monitor| monitor.open_input(config)).transpose()?.flatten(), None)
    } else if interactive {
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|err| no_stream(err.into()))?;
        (Some(reader), Some(writer))
    } else {
        (Some(stdin.try_clone().map_err(no_stream)?), None)
    };
    let output: Box<dyn Write + Send> = if config.output.json {
        let captured = CapturedOutput::default();
        run.record.captured = Some((captured.clone(), CapturedOutput::default()));
        Box::new(captured)
    } else if let Some(log) = log {
        Box::new(log)
    } else {
        let stdout = FdOutput::new(io::stdout().as_fd().try_clone_to_owned().map_err(no_stream)?);
        Box::new(ConsoleOutput { stdout, interrupter: interrupter.clone() })
    };
    let mut prepared = prepare(config, engine, model, Some(output), input)?;
    if interactive && config.output.remarks {
        // A remark that nobody can read is no failure.
        let _ = writeln!(io::stderr(), "harrier: Ctrl-A x ends the machine");
    }
    start(config, &mut prepared, run)?;
    if let Some(monitor) = run.monitor {
        monitor.on_running()();
    }
    if let Some(keys) = keys {
        terminal::set_raw().map_err(|err| {
            Failure::new(format!("the terminal cannot be set to raw mode ({err}): redirect stdin"))
        })?;
        let interrupter = interrupter.clone();
        // It may outlast the machine in a read of the terminal; the process does not wait for it.
        std::thread::Builder::new()
            .name("keyboard".to_owned())
            .spawn(move || pass_keys(stdin, keys, &interrupter))
            .map_err(|err| {
                Failure::new(format!("no thread for the keyboard ({err}): raise the limit of processes"))
            })?;
    }
    let report = prepared.machine.wait();
    terminal::restore();
    run.record.ended(&report);
    if let Some(exit) = guest_exit(&report) {
        return exit;
    }
    if report.end == MachineEnd::PowerOff && run.monitor.is_some_and(Monitor::is_stopping) {
        // It was asked to, by its power button.
        return Ok(0);
    }
    match interrupter.interruption() {
        Some(why) if report.end == MachineEnd::Stopped => interrupted(why, config),
        _ if matches!(
            report.end,
            MachineEnd::GuestPanic | MachineEnd::Unsupported { .. } | MachineEnd::TripleFault { .. }
        ) =>
        {
            Err(ended(&report, &prepared.console))
        }
        _ => Err(Failure::new(&report.end)),
    }
}

/// The console on stdout. When nobody reads it any more the machine ends.
struct ConsoleOutput {
    stdout: FdOutput,
    interrupter: Interrupter,
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stdout.write(bytes).inspect_err(|err| {
            if err.kind() != io::ErrorKind::Interrupted {
                self.interrupter.end(Interruption::OutputClosed);
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// Hands keys on until the terminal ends, the machine ends or the user types the way out.
fn pass_keys(terminal: OwnedFd, machine: OwnedFd, interrupter: &Interrupter) {
    let mut terminal = std::fs::File::from(terminal);
    let mut machine = std::fs::File::from(machine);
    let mut escapes = Escapes::default();
    let mut buf = [0; 256];
    loop {
        match terminal.read(&mut buf) {
            Ok(0) => return,
            Ok(count) => {
                let (keys, end) = escapes.filter(buf.get(..count).unwrap_or_default());
                if end {
                    interrupter.end(Interruption::Signal(SIGINT));
                    return;
                }
                if machine.write_all(&keys).is_err() {
                    return;
                }
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Ctrl-A x ends; Ctrl-A twice is one Ctrl-A for the guest.
#[derive(Default)]
struct Escapes {
    begun: bool,
}

impl Escapes {
    /// The keys for the guest, and whether the machine is to end.
    fn filter(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(keys.len());
        for key in keys {
            match (self.begun, *key) {
                (false, ESCAPE) => self.begun = true,
                (true, b'x' | b'X') => return (passed, true),
                (true, ESCAPE) => {
                    self.begun = false;
                    passed.push(ESCAPE);
                }
                (true, other) => {
                    self.begun = false;
                    passed.extend_from_slice(&[ESCAPE, other]);
                }
                (false, other) => passed.push(other),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_pass_except_the_way_out() {
        let mut escapes = Escapes::default();
        assert_eq!(escapes.filter(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(escapes.filter(b"\x01"), (vec![], false));
        assert_eq!(escapes.filter(b"\x01b"), (b"\x01b".to_vec(), false));
        assert_eq!(escapes.filter(b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(escapes.filter(b"a\x01xb"), (b"a".to_vec(), true));
    }
}
