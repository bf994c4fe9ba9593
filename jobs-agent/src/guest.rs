//! `harrier-guest`: what a job asks of the monitor. The agent's binary under another name, so that every guest has it.
//!
//! It speaks to `/dev/harrier` of Harrier's own guest kernel; another kernel has no such device.

use std::process::ExitCode;

use harrier_agent_protocol::PROGRESS_MAX;

use crate::exit::{self, Exit};
use crate::identity;
use crate::progress;
use crate::sys::{self, Device, Identity};

/// The name that makes the agent's binary this program.
pub(crate) const NAME: &str = "harrier-guest";

const USAGE: &str = "\
What a job can ask of the machine that it runs in.

  harrier-guest checkpoint           take a snapshot of the machine; comes back in this machine and in each that is
                                     made of the snapshot, and says in which: HARRIER_ROLE=original, restored, clone
                                     or migrated, HARRIER_GENERATION, HARRIER_CLONE_INDEX
  harrier-guest identity [--wait]    say the same of this machine; --wait: once it is another one than now
  harrier-guest mark NAME [VALUE]    note a moment, which `harrier run --timings` and --json show
  harrier-guest progress TEXT        say how far the job has come, which `harrier status` shows within seconds
  harrier-guest exit CODE [MESSAGE]  synchronise the disks and end the machine with this exit code, 0 to 255; what the
                                     job has written before arrives
  harrier-guest features             the bits of what the monitor offers, in hexadecimal
";

/// Bytes of a name or message that the monitor takes.
const TEXT_BYTES: usize = 32;

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Checkpoint,
    Identity { wait: bool },
    Mark { name: [u8; TEXT_BYTES], value: u64 },
    Progress { text: String },
    Exit { code: u32, message: [u8; TEXT_BYTES] },
    Features,
    Help,
}

/// Runs the program; `arguments` are without its name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    match parse(arguments).and_then(serve) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{NAME}: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Result<Request, String> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Ok(match *words.as_slice() {
        ["checkpoint"] => Request::Checkpoint,
        ["identity"] => Request::Identity { wait: false },
        ["identity", "--wait"] => Request::Identity { wait: true },
        ["mark", name] => Request::Mark { name: text("name", name)?, value: 0 },
        ["mark", name, value] => {
            let value = value
                .parse()
                .map_err(|_| format!("'{value}' is not a value for a mark: give a number below 2^64"))?;
            Request::Mark { name: text("name", name)?, value }
        }
        ["progress", text] => Request::Progress { text: line(text)? },
        ["exit", code] => Request::Exit { code: exit_code(code)?, message: [0; TEXT_BYTES] },
        ["exit", code, message] => {
            Request::Exit { code: exit_code(code)?, message: text("message", message)? }
        }
        ["features"] => Request::Features,
        ["help" | "--help" | "-h"] => Request::Help,
        [] => return Err(format!("nothing is asked for: see {NAME} --help")),
        [word, ..] => return Err(format!("'{word}' is not known in this form: see {NAME} --help")),
    })
}

fn exit_code(word: &str) -> Result<u32, String> {
    word.parse::<u8>().map(u32::from).map_err(|_| format!("'{word}' is not an exit code: give 0 to 255"))
}

/// As the monitor takes it: printable ASCII.
fn text(what: &str, word: &str) -> Result<[u8; TEXT_BYTES], String> {
    let fits = !word.is_empty() && word.len() <= TEXT_BYTES;
    if !fits || !word.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(format!("{word:?} is not a {what}: give 1 to {TEXT_BYTES} printable ASCII characters"));
    }
    let mut bytes = [0; TEXT_BYTES];
    for (place, byte) in bytes.iter_mut().zip(word.bytes()) {
        *place = byte;
    }
    Ok(bytes)
}

/// One line that is not cut off.
fn line(word: &str) -> Result<String, String> {
    if word.trim().is_empty() || word.contains(['\n', '\r', '\0']) || word.len() > PROGRESS_MAX {
        return Err(format!(
            "{word:?} is not what status can show: give one line of 1 to {PROGRESS_MAX} bytes"
        ));
    }
    Ok(word.to_owned())
}

fn serve(request: Request) -> Result<String, String> {
    if request == Request::Help {
        return Ok(USAGE.to_owned());
    }
    if let Request::Progress { text } = &request {
        return progress::say(text).map(|()| String::new()).map_err(|error| {
            format!("the progress cannot be said: {error}; a job of 'harrier submit' has {}", progress::PATH)
        });
    }
    let device = Device::open().map_err(|error| {
        format!(
            "the monitor cannot be reached through {}: {error}; only Harrier's own guest kernel has it",
            sys::DEVICE
        )
    })?;
    let failed = |what: &str, error: std::io::Error| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => format!("this machine's monitor offers no {what}"),
        Some(libc::EPERM) => format!("{what} needs CAP_SYS_BOOT: be root"),
        Some(libc::EIO) => format!("{what} failed on the host; its log says why"),
        _ => format!("{what}: {error}"),
    };
    match request {
        Request::Checkpoint => device.checkpoint().map(describe).map_err(|error| failed("checkpoint", error)),
        Request::Identity { wait } => {
            if wait {
                device.wait_for_restore().map_err(|error| failed("waiting", error))?;
            }
            device.identity().map(describe).map_err(|error| failed("identity", error))
        }
        Request::Mark { name, value } => {
            device.mark(0, value, name).map(|()| String::new()).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOSPC) => "the monitor keeps no more marks of this machine".to_owned(),
                _ => failed("mark", error),
            })
        }
        Request::Exit { code, message } => {
            // Where no agent does it, the machine ends all the same; only what is on its way then may be lost.
            let _ = exit::ask(exit::PATH.as_ref(), Exit { code, message });
            let error = device.exit(code, message).err();
            Err(failed("exit", error.unwrap_or_else(|| std::io::ErrorKind::Other.into())))
        }
        Request::Features => {
            device.features().map(|bits| format!("{bits:#x}\n")).map_err(|error| failed("features", error))
        }
        Request::Progress { .. } | Request::Help => Ok(USAGE.to_owned()),
    }
}

fn describe(identity: Identity) -> String {
    let role = identity::ROLES.get(identity.role as usize).copied().unwrap_or("unknown");
    identity::text(role, identity.generation, identity.clone_index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Request, String> {
        parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_asked_for_is_read_or_named() {
        let mut name = [0; TEXT_BYTES];
        name[..8].copy_from_slice(b"half way");
        assert_eq!(parsed(&["mark", "half way", "77"]), Ok(Request::Mark { name, value: 77 }));
        assert_eq!(parsed(&["progress", "3 of 4"]), Ok(Request::Progress { text: "3 of 4".to_owned() }));
        assert_eq!(parsed(&["identity", "--wait"]), Ok(Request::Identity { wait: true }));
        assert_eq!(parsed(&["exit", "255"]), Ok(Request::Exit { code: 255, message: [0; TEXT_BYTES] }));
        for (words, named) in [
            (&["exit", "256"][..], "'256'"),
            (&["exit"], "'exit'"),
            (&["mark", ""], "\"\""),
            (&["mark", "\u{e9}"], "name"),
            (&["mark", "x", "-1"], "'-1'"),
            (&["mark", "123456789012345678901234567890123"], "32"),
            (&["progress", " "], "one line"),
            (&["progress", "a\nb"], "one line"),
            (&["progress"], "'progress'"),
            (&["restart"], "'restart'"),
            (&[], "--help"),
        ] {
            let message = parsed(words).unwrap_err();
            assert!(message.contains(named) && !message.contains('\n'), "{words:?}: {message}");
        }
    }

    #[test]
    fn who_returns_is_said_as_a_shell_reads_it() {
        let text = describe(Identity { generation: 3, role: 2, clone_index: 1 });
        assert_eq!(text, "HARRIER_ROLE=clone\nHARRIER_GENERATION=3\nHARRIER_CLONE_INDEX=1\n");
        assert!(describe(Identity { role: 9, ..Identity::default() }).starts_with("HARRIER_ROLE=unknown\n"));
    }
}
