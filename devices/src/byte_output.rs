//! A bounded queue between a device that prints bytes and a place that may be slow, blocked or gone.
//!
//! The device pushes into a [`ByteOutput`] and never waits. An [`OutputWriter`] thread takes the bytes out and
//! writes them; when the sink fails, the rest is thrown away and the device goes on.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that wait at most, unless another number is asked for.
pub const DEFAULT_CAPACITY: usize = 64 * 1024;

/// How long the writer waits for the rest of a line, so that a line is one write and not eighty.
const LINGER: Duration = Duration::from_millis(1);

/// How long a dropped writer waits for a sink that is slow but alive.
const DROP_LIMIT: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// The device found the queue full and waits for room.
    room_wanted: bool,
    /// The writer is to end once the queue is empty.
    finished: bool,
    /// The writer has ended: nothing takes bytes out any more.
    ended: bool,
    /// Why the sink failed; from then on bytes are accepted and thrown away.
    failure: Option<io::ErrorKind>,
}

struct Shared {
    capacity: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// The queue; clones share it.
#[derive(Clone)]
pub struct ByteOutput {
    shared: Arc<Shared>,
}

impl ByteOutput {
    /// A queue for `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        ByteOutput { shared: Arc::new(Shared { capacity, state: Mutex::default(), changed: Condvar::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a byte; false if there is no room, and then the writer tells when there is.
    pub fn push(&self, byte: u8) -> bool {
        let mut state = self.lock();
        if state.failure.is_some() || state.ended {
            return true;
        }
        if state.bytes.len() >= self.shared.capacity {
            state.room_wanted = true;
            return false;
        }
        state.bytes.push_back(byte);
        if state.bytes.len() == 1 || byte == b'\n' {
            self.shared.changed.notify_all();
        }
        true
    }

    /// Adds as many of `bytes` as there is room for, at most after waiting for room for `wait`, and answers their
    /// number. After fewer than all the writer tells when there is room.
    pub fn push_slice(&self, bytes: &[u8], wait: Duration) -> usize {
        let mut state = self.lock();
        let mut taken = 0;
        let begin = Instant::now();
        loop {
            if state.failure.is_some() || state.ended {
                return bytes.len();
            }
            let rest = bytes.get(taken..).unwrap_or_default();
            let room = self.shared.capacity.saturating_sub(state.bytes.len()).min(rest.len());
            let piece = rest.get(..room).unwrap_or_default();
            if !piece.is_empty() {
                let was_empty = state.bytes.is_empty();
                state.bytes.extend(piece);
                taken += room;
                if was_empty || piece.contains(&b'\n') {
                    self.shared.changed.notify_all();
                }
            }
            if taken == bytes.len() {
                return taken;
            }
            state.room_wanted = true;
            let left = wait.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return taken;
            }
            self.shared.changed.notify_all();
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether a byte would be accepted now; if not, the writer tells when there is room again.
    pub fn has_room(&self) -> bool {
        let mut state = self.lock();
        let room = state.bytes.len() < self.shared.capacity || state.failure.is_some() || state.ended;
        state.room_wanted |= !room;
        room
    }

    /// Takes out all that waits, for callers without a writer thread.
    pub fn take(&self) -> Vec<u8> {
        let mut state = self.lock();
        state.room_wanted = false;
        state.bytes.drain(..).collect()
    }

    /// Why the sink failed, if it did.
    pub fn failure(&self) -> Option<io::ErrorKind> {
        self.lock().failure
    }

    /// Starts the thread that writes to `sink`. It calls `on_room` each time that there is room again after
    /// the device was refused.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start_writer(
        &self,
        sink: Box<dyn Write + Send>,
        on_room: Box<dyn Fn() + Send>,
    ) -> io::Result<OutputWriter> {
        let output = self.clone();
        let thread = std::thread::Builder::new()
            .name("serial-output".to_owned())
            .spawn(move || output.write_to(sink, on_room))?;
        Ok(OutputWriter { output: self.clone(), thread: Some(thread) })
    }

    fn write_to(&self, mut sink: Box<dyn Write + Send>, on_room: Box<dyn Fn() + Send>) {
        loop {
            let mut state = self.lock();
            while state.bytes.is_empty() && !state.finished {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.bytes.is_empty() {
                break;
            }
            if state.bytes.back() != Some(&b'\n') && !state.finished && !state.room_wanted {
                state =
                    self.shared.changed.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner).0;
            }
            let chunk: Vec<u8> = state.bytes.drain(..).collect();
            let room_wanted = std::mem::take(&mut state.room_wanted);
            drop(state);
            if room_wanted {
                self.shared.changed.notify_all();
                on_room();
            }
            if let Err(error) = sink.write_all(&chunk).and_then(|()| sink.flush()) {
                log::warn!("serial output: {error}; what the guest prints from here on is thrown away");
                let mut state = self.lock();
                state.failure = Some(error.kind());
                state.bytes.clear();
                let room_wanted = std::mem::take(&mut state.room_wanted);
                drop(state);
                if room_wanted {
                    self.shared.changed.notify_all();
                    on_room();
                }
                break;
            }
        }
        self.lock().ended = true;
        self.shared.changed.notify_all();
    }
}

/// The thread that writes; dropping it gives the sink a short time for what still waits.
pub struct OutputWriter {
    output: ByteOutput,
    thread: Option<JoinHandle<()>>,
}

impl OutputWriter {
    /// Writes what still waits, for at most `limit`. Answers whether all was written; if not, the thread is
    /// stuck in the sink and is left behind.
    pub fn finish(mut self, limit: Duration) -> bool {
        self.end(limit)
    }

    fn end(&mut self, limit: Duration) -> bool {
        let Some(thread) = self.thread.take() else { return true };
        let begin = Instant::now();
        let mut state = self.output.lock();
        state.finished = true;
        self.output.shared.changed.notify_all();
        while !state.ended {
            let left = limit.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return false;
            }
            state = self
                .output
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let written = state.failure.is_none();
        drop(state);
        thread.join().is_ok() && written
    }
}

impl Drop for OutputWriter {
    fn drop(&mut self) {
        self.end(DROP_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use super::*;

    struct Collector(Arc<Mutex<Vec<u8>>>);

    impl Write for Collector {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_pushed_arrives_in_order_before_finish_returns() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let output = ByteOutput::new(1 << 20);
        let writer = output.start_writer(Box::new(Collector(seen.clone())), Box::new(|| ())).unwrap();
        let expected: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        assert!(expected.iter().all(|&byte| output.push(byte)));
        assert!(writer.finish(Duration::from_secs(60)));
        assert_eq!(*seen.lock().unwrap(), expected);
    }

    #[test]
    fn a_slice_is_taken_as_far_as_there_is_room() {
        let output = ByteOutput::new(4);
        assert_eq!(output.push_slice(b"abcdef", Duration::ZERO), 4);
        assert_eq!(output.push_slice(b"ef", Duration::from_millis(1)), 0);
        assert_eq!(output.take(), b"abcd");
        assert_eq!(output.push_slice(b"ef", Duration::ZERO), 2);
        assert!(output.push(b'g'));
        assert_eq!(output.take(), b"efg", "single bytes and slices share one queue");
    }

    #[test]
    fn slices_longer_than_the_queue_arrive_whole_when_their_owner_waits() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let output = ByteOutput::new(16);
        let writer = output.start_writer(Box::new(Collector(seen.clone())), Box::new(|| ())).unwrap();
        let expected: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        for piece in expected.chunks(100) {
            assert_eq!(output.push_slice(piece, Duration::from_secs(60)), piece.len());
        }
        assert!(writer.finish(Duration::from_secs(60)));
        assert_eq!(*seen.lock().unwrap(), expected);
        assert_eq!(
            output.push_slice(b"late", Duration::from_secs(60)),
            4,
            "nobody waits for a writer that ended"
        );
    }

    #[test]
    fn a_full_queue_refuses_and_tells_when_there_is_room() {
        let output = ByteOutput::new(2);
        assert!(output.push(1) && output.push(2));
        assert!(!output.push(3) && !output.has_room());
        let (tell, told) = mpsc::channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let on_room = Box::new(move || tell.send(()).unwrap());
        let writer = output.start_writer(Box::new(Collector(seen.clone())), on_room).unwrap();
        told.recv().unwrap();
        assert!(output.has_room() && output.push(4));
        assert!(writer.finish(Duration::from_secs(60)));
        assert_eq!(*seen.lock().unwrap(), [1, 2, 4]);
    }

    #[test]
    fn a_closed_sink_swallows_everything_from_then_on() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let output = ByteOutput::new(4);
        let writer = output.start_writer(Box::new(ours), Box::new(|| ())).unwrap();
        assert!(output.push(b'\n'));
        assert!(!writer.finish(Duration::from_secs(60)));
        assert_eq!(output.failure(), Some(io::ErrorKind::BrokenPipe));
        for _ in 0..100 {
            assert!(output.push(0) && output.has_room());
        }
    }

    #[test]
    fn a_sink_that_blocks_for_ever_does_not_hold_up_the_end() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let output = ByteOutput::new(8 << 20);
        let writer = output.start_writer(Box::new(ours), Box::new(|| ())).unwrap();
        for _ in 0..4 << 20 {
            assert!(output.push(0));
        }
        assert!(!writer.finish(Duration::from_millis(10)));
    }
}
