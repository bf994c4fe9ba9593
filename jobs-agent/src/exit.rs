//! The end of the machine that a job asks for with `harrier-guest exit`. What the job has written before is with the host by
//! then: the agent reads its pipes to where they were filled at that moment, hands that over, and hangs up, which the host
//! answers when it has taken everything. Only then comes the call that ends the machine.
//!
//! The program speaks to the agent through a socket that only root reaches: the code and message as the call takes them, and
//! a byte back. Without that byte within a moment it makes the call by itself.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Where the agent listens.
pub(crate) const PATH: &str = "/run/harrier/exit";
/// How long an agent that lives takes to answer at most, a loaded host included.
const ANSWER: Duration = Duration::from_secs(2);
/// How long whoever has connected may take to say what it wants: it says so in one piece.
const QUESTION: Duration = Duration::from_millis(100);
const HEARD: u8 = 1;

/// How the machine is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255.
    pub(crate) code: u32,
    /// Printable ASCII, zeros behind it.
    pub(crate) message: [u8; 32],
}

/// Begins to listen. The socket is made with the permissions of the agent's files: for root alone.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    // Left over from nobody: a machine has one agent. It may be there in tests.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What somebody who has connected asks for; nothing if it is no question.
pub(crate) fn take(listener: &UnixListener) -> Option<Exit> {
    let (mut stream, _) = listener.accept().ok()?;
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(QUESTION)).ok()?;
    let (mut code, mut message) = ([0; 4], [0; 32]);
    stream.read_exact(&mut code).and_then(|()| stream.read_exact(&mut message)).ok()?;
    let code = u32::from_le_bytes(code);
    // Who asks waits for the machine's end from now on.
    stream.write_all(&[HEARD]).ok().filter(|()| code <= 255)?;
    Some(Exit { code, message })
}

/// Asks the agent for the machine's end, and waits for it. Comes back only if there is nobody who does it.
pub(crate) fn ask(path: &Path, exit: Exit) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.set_read_timeout(Some(ANSWER))?;
    let question = [exit.code.to_le_bytes().as_slice(), exit.message.as_slice()].concat();
    stream.write_all(&question)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer != [HEARD] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_hears_of_it_and_who_is_not_heard_comes_back() {
        let path = std::env::temp_dir().join(format!("harrier-exit-{}", std::process::id()));
        let exit = Exit { code: 42, message: [b'x'; 32] };
        assert!(ask(&path, exit).is_err(), "nobody is there");
        let listener = listen(&path).unwrap();
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(take(&listener), None, "nobody has asked");
        // One that says nothing, and one that asks for what there is not.
        let silent = UnixStream::connect(&path).unwrap();
        assert_eq!(take(&listener), None);
        drop(silent);
        UnixStream::connect(&path)
            .unwrap()
            .write_all(&[&256u32.to_le_bytes()[..], &[0; 32]].concat())
            .unwrap();
        assert_eq!(take(&listener), None);
        let asking = std::thread::spawn({
            let path = path.clone();
            move || ask(&path, exit)
        });
        let heard = (0..1000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            take(&listener)
        });
        assert_eq!(heard, Some(exit));
        assert!(!asking.is_finished(), "it waits for the end");
        // An agent that does not answer.
        let begin = std::time::Instant::now();
        assert!(ask(&path, exit).is_err());
        assert!(begin.elapsed() >= ANSWER && begin.elapsed() < ANSWER * 10);
        fs::remove_file(&path).unwrap();
    }
}
