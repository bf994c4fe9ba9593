//! What the kernel does for programs, each many times.

use std::fs;
use std::hint::black_box;
use std::io::{self, Read as _, Write as _};
use std::thread;

/// Asks for its own number, which the C library does not remember.
pub(crate) fn system_calls() -> io::Result<u64> {
    const COUNT: u64 = 100_000;
    for _ in 0..COUNT {
        black_box(std::process::id());
    }
    Ok(COUNT)
}

/// Starts this program again, which says nothing and fails at once.
pub(crate) fn forks() -> io::Result<u64> {
    const COUNT: u64 = 40;
    let itself = std::env::current_exe()?;
    for _ in 0..COUNT {
        std::process::Command::new(&itself).stderr(std::process::Stdio::null()).status()?;
    }
    Ok(COUNT)
}

/// One byte to and fro between two threads: two switches a turn.
pub(crate) fn context_switches() -> io::Result<u64> {
    const TURNS: u64 = 5_000;
    let ((mut near_in, mut far_out), (mut far_in, mut near_out)) = (io::pipe()?, io::pipe()?);
    let far = thread::spawn(move || -> io::Result<()> {
        let mut byte = [0];
        for _ in 0..TURNS {
            far_in.read_exact(&mut byte)?;
            far_out.write_all(&byte)?;
        }
        Ok(())
    });
    let mut byte = [1];
    for _ in 0..TURNS {
        near_out.write_all(&byte)?;
        near_in.read_exact(&mut byte)?;
    }
    far.join().map_err(|_| io::Error::other("the other thread panicked"))??;
    Ok(2 * TURNS)
}

/// Data through a pipe, to a thread that throws it away.
pub(crate) fn pipe() -> io::Result<u64> {
    const COUNT: u64 = 512;
    let (mut reader, mut writer) = io::pipe()?;
    let far = thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
    let block = vec![7; 64 << 10];
    for _ in 0..COUNT {
        writer.write_all(&block)?;
    }
    drop(writer);
    far.join().map_err(|_| io::Error::other("the other thread panicked"))??;
    Ok(COUNT)
}

/// Copies a file beside it, in memory where /tmp is a tmpfs.
pub(crate) fn file_copy() -> io::Result<u64> {
    const COUNT: u64 = 256;
    let folder = std::env::temp_dir().join(format!("harrier-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let (from, to) = (folder.join("from"), folder.join("to"));
    let copied = fs::write(&from, vec![7; 64 << 10]).and_then(|()| {
        for _ in 0..COUNT {
            let (mut source, mut target) = (fs::File::open(&from)?, fs::File::create(&to)?);
            let mut block = vec![0; 64 << 10];
            source.read_exact(&mut block)?;
            target.write_all(&block)?;
        }
        Ok(())
    });
    fs::remove_dir_all(&folder)?;
    copied.map(|()| COUNT)
}
