//! Frames and messages of both directions. The first byte says how the stream is cut, the rest is the stream. Whatever
//! it holds, the cut changes nothing, and what is understood encodes to the very same bytes again.
#![no_main]

use std::io::{self, Read};

use harrier_agent_protocol::{CommandSpec, Frame, Inbox, decode_any};
use libfuzzer_sys::fuzz_target;

/// Gives at most so many bytes at once.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        (&mut self.0).take(self.1 as u64).read(room)
    }
}

/// How many frames come out of a stream, and whether it ended in an error.
fn cut(stream: &[u8], step: usize) -> (usize, bool) {
    let mut inbox = Inbox::default();
    let mut source = Pieces(stream, step);
    let mut count = 0;
    while inbox.fill(&mut source).expect("the frames are taken each time") > 0 {
        loop {
            match inbox.next_frame() {
                Ok(Some(frame)) => {
                    count += 1;
                    assert!(decode_any(frame), "{frame:?} does not encode to itself");
                }
                Ok(None) => break,
                Err(_) => return (count, true),
            }
        }
    }
    (count, false)
}

fuzz_target!(|data: &[u8]| {
    let Some((step, stream)) = data.split_first() else { return };
    assert_eq!(cut(stream, usize::from(*step) + 1), cut(stream, usize::MAX));
    // Without a header that must fit, the mutations get further.
    if let Some((kind, payload)) = stream.split_first() {
        let frame = Frame { kind: (*kind).into(), id: 1, payload };
        assert!(decode_any(frame), "{frame:?} does not encode to itself");
    }
    if let Ok(spec) = CommandSpec::decode(stream) {
        assert_eq!(spec.encode().as_deref(), Ok(stream));
    }
});
