//! What the guest prints on its serial console: to a file, and the last of it kept for error messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are kept.
const TAIL: usize = 16 << 10;

/// The last bytes of a console; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConsoleTail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl ConsoleTail {
    fn push(&self, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend(data.iter().skip(data.len().saturating_sub(TAIL)));
        let excess = bytes.len().saturating_sub(TAIL);
        bytes.drain(..excess);
    }

    /// The line that says why the guest ended, as far as the console tells: a kernel panic's first, else the last
    /// one that is not empty.
    pub(crate) fn reason(&self) -> Option<String> {
        let bytes: Vec<u8> =
            self.bytes.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let panic = text.lines().find_map(|line| line.find("Kernel panic").and_then(|at| line.get(at..)));
        let last = || text.lines().rev().find(|line| !line.trim().is_empty());
        let line: String =
            panic.or_else(last)?.trim().chars().filter(|c| !c.is_control()).take(200).collect();
        Some(line)
    }
}

/// Where the serial port writes: to `file` where one is named, or to `stream`, and to the tail.
pub(crate) struct ConsoleSink {
    pub(crate) file: Option<File>,
    pub(crate) stream: Option<Box<dyn Write + Send>>,
    pub(crate) tail: ConsoleTail,
}

impl Write for ConsoleSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.tail.push(data);
        if let Some(file) = &mut self.file
            && let Err(err) = file.write_all(data)
        {
            // The guest and the terminal go on without it.
            log::error!("--console: {err}: the rest of the console is not in the file");
            self.file = None;
        }
        if let Some(stream) = &mut self.stream {
            stream.write_all(data)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.as_mut().map_or(Ok(()), |stream| stream.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_panic_line_or_else_the_last_line() {
        let tail = ConsoleTail::default();
        assert_eq!(tail.reason(), None);
        let mut sink = ConsoleSink { file: None, stream: None, tail: tail.clone() };
        sink.write_all(b"booting\r\nno init found\r\n\r\n").unwrap();
        assert_eq!(tail.reason().as_deref(), Some("no init found"));
        sink.write_all(b"[    0.5] Kernel panic - not syncing: No working init\r\nmore\r\n").unwrap();
        assert_eq!(tail.reason().as_deref(), Some("Kernel panic - not syncing: No working init"));
    }

    #[test]
    fn a_full_file_costs_neither_the_tail_nor_the_guest() {
        let tail = ConsoleTail::default();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut sink = ConsoleSink { file: Some(full), stream: None, tail: tail.clone() };
        sink.write_all(b"first\n").unwrap();
        sink.write_all(b"Kernel panic - not syncing: last\n").unwrap();
        assert!(sink.file.is_none());
        assert_eq!(tail.reason().as_deref(), Some("Kernel panic - not syncing: last"));
    }

    #[test]
    fn only_the_last_bytes_are_kept() {
        let tail = ConsoleTail::default();
        tail.push(&vec![b'a'; 3 * TAIL]);
        tail.push(b"\nend");
        assert_eq!(tail.reason().as_deref(), Some("end"));
        assert_eq!(tail.bytes.lock().unwrap().len(), TAIL);
    }
}
