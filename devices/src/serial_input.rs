//! Feeds a serial port from a descriptor (a terminal, a pipe, a file), no faster than the guest reads.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use crate::serial::Serial;

/// Bytes read from the source at a time, at most.
const CHUNK: usize = 4096;

const SOURCE: u32 = 0;
const ROOM: u32 = 1;

/// An event-loop subscriber between a descriptor and a [`Serial`].
///
/// The source need not be non-blocking; one that cannot be waited for (a regular file) is read whenever the
/// port has room. The end of the source is silence: a serial line has no end of file.
pub struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    source: File,
    /// Read and not yet taken by the port.
    waiting: Vec<u8>,
    watched: bool,
    ended: bool,
}

impl SerialInput {
    /// Connects `source` to `serial`.
    pub fn new(serial: Arc<Mutex<Serial>>, source: OwnedFd) -> Self {
        SerialInput { serial, source: File::from(source), waiting: Vec::new(), watched: false, ended: false }
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&mut self) {
        let taken = self.serial().enqueue(&self.waiting);
        self.waiting.drain(..taken);
    }

    fn pull(&mut self) {
        let mut chunk = [0; CHUNK];
        match self.source.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(count) => self.waiting.extend(chunk.iter().take(count)),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(error) => {
                log::warn!("serial input: {error}; the guest gets no more of it");
                self.ended = true;
            }
        }
    }

    /// Watches the source exactly while nothing waits for the port.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let wanted = !self.ended && self.waiting.is_empty();
        if wanted == self.watched {
            return;
        }
        let events = Events::with_data(&self.source, SOURCE, EventSet::IN);
        let done = if wanted { ops.add(events) } else { ops.remove(events) };
        match done {
            Ok(()) => self.watched = wanted,
            // Epoll refuses regular files: they are always readable.
            Err(_) if wanted => {
                while !self.ended && self.waiting.is_empty() {
                    self.pull();
                    self.push();
                }
            }
            Err(error) => log::warn!("serial input: cannot watch the source: {error:?}"),
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let room = Events::with_data_raw(self.serial().input_room().as_raw_fd(), ROOM, EventSet::IN);
        if let Err(error) = ops.add(room) {
            log::warn!("serial input: cannot watch the port: {error:?}");
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            SOURCE => self.pull(),
            // Only the signal matters, not its count.
            _ => drop(self.serial().input_room().read()),
        }
        self.push();
        self.watch(ops);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::os::unix::net::UnixStream;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;
    use crate::bus::BusDevice;
    use crate::byte_output::ByteOutput;
    use crate::interrupt::tests::RecordedLine;

    fn read_all(source: OwnedFd, expected: usize) -> Vec<u8> {
        let line = Arc::new(RecordedLine::default());
        let serial = Arc::new(Mutex::new(Serial::new(line, ByteOutput::new(1)).unwrap()));
        let _ = serial.lock().unwrap().write(2, &[1]);
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(SerialInput::new(serial.clone(), source)));
        let mut seen = Vec::new();
        while seen.len() < expected {
            manager.run_with_timeout(0).unwrap();
            let mut status = [0];
            let _ = serial.lock().unwrap().read(5, &mut status);
            if status[0] & 1 != 0 {
                let mut byte = [0];
                let _ = serial.lock().unwrap().read(0, &mut byte);
                seen.push(byte[0]);
            }
        }
        seen
    }

    #[test]
    fn a_stream_longer_than_every_buffer_arrives_whole() {
        let bytes: Vec<u8> = (0..20_000u32).map(|i| (i * 7) as u8).collect();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&bytes).unwrap();
        assert_eq!(read_all(theirs.into(), bytes.len()), bytes);
    }

    #[test]
    fn a_regular_file_arrives_whole() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i * 3) as u8).collect();
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        assert_eq!(read_all(file.into(), bytes.len()), bytes);
    }
}
