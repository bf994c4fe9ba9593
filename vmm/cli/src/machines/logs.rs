//! `harrier logs`: what a detached machine's command has printed, each stream on its own.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::Duration;

use harrier_control::output::{OutputReader, Piece, Stream, monitor_log};
use harrier_control::{Entry, Registry};

use super::{about, refuse};
use crate::exit::Failure;
use crate::flags::LogsFlags;

/// How often a follower looks whether the monitor still lives, when nothing else wakes it.
const LOOK: Duration = Duration::from_millis(500);

pub(super) fn run(flags: &LogsFlags, registry: &Registry) -> Result<u8, Failure> {
    let for_jobs = [
        ("--stdout", flags.stdout),
        ("--stderr", flags.stderr),
        ("--attempt", flags.attempt.is_some()),
        ("--queue", flags.place.place.is_some()),
    ];
    refuse(&for_jobs, &flags.target)?;
    let entry = registry.find(&flags.target)?;
    let read = |err: io::Error| about(&entry, format!("its output cannot be read ({err})"));
    if flags.monitor {
        let bytes = monitor_log(&entry.folder).map_err(read)?;
        return written(io::stdout().write_all(&bytes));
    }
    let Some(mut reader) = OutputReader::open(&entry.folder).map_err(read)? else {
        return Err(about(&entry, "its output is not kept: it goes to where the machine was started from"));
    };
    let mut printer = Printer::new(flags);
    // Looked at before the output: what is there then is all there is.
    let mut over = is_over(&entry);
    let mut beginning = Vec::new();
    drain(&mut reader, over, &mut |piece| beginning.push(piece)).map_err(read)?;
    let lines = flags.tail.map(|lines| last_lines(&beginning, lines));
    for piece in lines.unwrap_or(beginning) {
        if let Err(err) = printer.print(&piece) {
            return written(Err(err));
        }
    }
    while flags.follow && !over {
        reader.wait_for_more(LOOK);
        over = is_over(&entry);
        let mut result = Ok(());
        drain(&mut reader, over, &mut |piece| {
            if result.is_ok() {
                result = printer.print(&piece);
            }
        })
        .map_err(read)?;
        if result.is_err() {
            return written(result);
        }
    }
    Ok(0)
}

fn is_over(entry: &Entry) -> bool {
    entry.is_over()
}

/// Everything that there is now.
fn drain(reader: &mut OutputReader, over: bool, take: &mut dyn FnMut(Piece)) -> io::Result<()> {
    while let Some(piece) = reader.next_piece()? {
        take(piece);
    }
    if over {
        reader.rest()?.into_iter().for_each(take);
    }
    Ok(())
}

/// A reader that went away has had enough.
fn written(result: io::Result<()>) -> Result<u8, Failure> {
    match result {
        Ok(()) => Ok(0),
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(err) => Err(Failure::new(format!("the output cannot be written ({err})"))),
    }
}

/// The last lines of both streams together; a line belongs where it begins.
fn last_lines(pieces: &[Piece], count: usize) -> Vec<Piece> {
    let mut kept: VecDeque<Piece> = VecDeque::new();
    let mut lines = 0;
    for piece in pieces.iter().rev() {
        let Piece::Printed { time_ns, stream, bytes } = piece else {
            kept.push_front(piece.clone());
            continue;
        };
        let mut begin = bytes.len();
        while begin > 0 {
            let line = bytes.get(..begin).unwrap_or_default();
            let inner = line.strip_suffix(b"\n").unwrap_or(line);
            let start = inner.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if lines == count {
                break;
            }
            lines += 1;
            begin = start;
        }
        let tail = bytes.get(begin..).unwrap_or_default();
        if !tail.is_empty() {
            kept.push_front(Piece::Printed { time_ns: *time_ns, stream: *stream, bytes: tail.to_vec() });
        }
        if lines == count {
            break;
        }
    }
    kept.into()
}

struct Printer {
    timestamps: bool,
    /// Whether the stream stands at the beginning of a line.
    at_line_start: [bool; 2],
}

impl Printer {
    fn new(flags: &LogsFlags) -> Self {
        Printer { timestamps: flags.timestamps, at_line_start: [true; 2] }
    }

    fn print(&mut self, piece: &Piece) -> io::Result<()> {
        match piece {
            Piece::Printed { time_ns, stream, bytes } => {
                let [stdout, stderr] = &mut self.at_line_start;
                let (at_start, is_stdout) =
                    if *stream == Stream::Stdout { (stdout, true) } else { (stderr, false) };
                let text =
                    if self.timestamps { with_times(bytes, *time_ns, at_start) } else { bytes.clone() };
                if is_stdout {
                    io::stdout().write_all(&text).and_then(|()| io::stdout().flush())
                } else {
                    io::stderr().write_all(&text)
                }
            }
            Piece::Lost { bytes, .. } => {
                // Without stderr there is nobody to tell.
                let _ = writeln!(
                    io::stderr(),
                    "harrier: {bytes} bytes of output were not kept: the disk was full"
                );
                Ok(())
            }
        }
    }
}

fn with_times(bytes: &[u8], time_ns: u64, at_start: &mut bool) -> Vec<u8> {
    let time = std::time::UNIX_EPOCH + Duration::from_nanos(time_ns);
    let time = format!("{} ", humantime::format_rfc3339_nanos(time));
    let mut text = Vec::with_capacity(bytes.len() + time.len());
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if std::mem::replace(at_start, line.ends_with(b"\n")) {
            text.extend_from_slice(time.as_bytes());
        }
        text.extend_from_slice(line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(stream: Stream, text: &str) -> Piece {
        Piece::Printed { time_ns: 0, stream, bytes: text.as_bytes().to_vec() }
    }

    #[test]
    fn the_last_lines_are_counted_over_both_streams() {
        let pieces = [
            printed(Stream::Stdout, "1\n2\n"),
            printed(Stream::Stderr, "3\n"),
            printed(Stream::Stdout, "4\n5"),
        ];
        let last = |count| last_lines(&pieces, count);
        assert_eq!(last(0), []);
        assert_eq!(last(1), [printed(Stream::Stdout, "5")]);
        assert_eq!(last(3), [printed(Stream::Stderr, "3\n"), printed(Stream::Stdout, "4\n5")]);
        assert_eq!(
            last(4),
            [printed(Stream::Stdout, "2\n"), printed(Stream::Stderr, "3\n"), printed(Stream::Stdout, "4\n5")]
        );
        assert_eq!(last(9), pieces);
    }

    #[test]
    fn times_stand_at_the_beginning_of_lines() {
        let mut at_start = true;
        let text = |bytes: &[u8], at_start: &mut bool| {
            String::from_utf8(with_times(bytes, 1_500_000_000, at_start)).unwrap()
        };
        let time = "1970-01-01T00:00:01.500000000Z ";
        assert_eq!(text(b"a\nb", &mut at_start), format!("{time}a\n{time}b"));
        assert_eq!(text(b"c\n", &mut at_start), "c\n");
        assert_eq!(text(b"d\n", &mut at_start), format!("{time}d\n"));
    }
}
