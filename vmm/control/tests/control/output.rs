//! Output that is kept, and read back while it comes.

use std::io::Write;
use std::time::Duration;

use harrier_control::output::{OutputLog, OutputReader, Piece, Stream};

use crate::support::{claim, registry};

fn text(pieces: &[Piece]) -> Vec<(Stream, String)> {
    let text = |piece: &Piece| match piece {
        Piece::Printed { stream, bytes, .. } => (*stream, String::from_utf8(bytes.clone()).unwrap()),
        Piece::Lost { bytes, .. } => panic!("{bytes} bytes lost"),
    };
    pieces.iter().map(text).collect()
}

fn drain(reader: &mut OutputReader) -> Vec<Piece> {
    std::iter::from_fn(|| reader.next_piece().unwrap()).collect()
}

#[test]
fn both_streams_come_back_in_their_order_also_after_the_folder_is_gone() {
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    assert!(OutputReader::open(seat.folder()).unwrap().is_none());
    let log = OutputLog::create(seat.folder(), u64::MAX).unwrap();
    let (mut stdout, mut stderr) = (log.writer(Stream::Stdout), log.writer(Stream::Stderr));
    let mut reader = OutputReader::open(seat.folder()).unwrap().unwrap();
    assert_eq!(drain(&mut reader), []);
    stdout.write_all(b"one\n").unwrap();
    stderr.write_all(b"two\n").unwrap();
    let expected = [(Stream::Stdout, "one\n".to_owned()), (Stream::Stderr, "two\n".to_owned())];
    assert_eq!(text(&drain(&mut reader)), expected);
    stdout.write_all(b"three\n").unwrap();
    std::fs::remove_dir_all(seat.folder().path()).unwrap();
    stdout.write_all(b"four\n").unwrap();
    let expected = ["three\n", "four\n"].map(|line| (Stream::Stdout, line.to_owned()));
    assert_eq!(text(&drain(&mut reader)), expected);
    assert_eq!(reader.rest().unwrap(), []);
    let info = log.info();
    assert_eq!((info.stdout_bytes, info.stderr_bytes, info.lost_bytes), (15, 4, 0));
}

#[test]
fn long_pieces_are_read_in_parts_and_a_reader_is_woken() {
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    let log = OutputLog::create(seat.folder(), u64::MAX).unwrap();
    let mut reader = OutputReader::open(seat.folder()).unwrap().unwrap();
    let writer = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i / 7) as u8).collect();
        log.writer(Stream::Stderr).write_all(&bytes).unwrap();
        bytes
    });
    let mut read = Vec::new();
    while read.len() < 1_000_000 {
        for piece in drain(&mut reader) {
            let Piece::Printed { stream: Stream::Stderr, bytes, .. } = piece else { panic!("{piece:?}") };
            assert!(bytes.len() <= 256 << 10);
            read.extend_from_slice(&bytes);
        }
        reader.wait_for_more(Duration::from_secs(1));
    }
    assert!(read == writer.join().unwrap());
}

#[test]
fn damaged_times_cost_no_more_than_themselves() {
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    let log = OutputLog::create(seat.folder(), u64::MAX).unwrap();
    log.writer(Stream::Stdout).write_all(b"told\n").unwrap();
    let append = |name: &str, bytes: &[u8]| {
        let path = seat.folder().path().join(name);
        std::fs::File::options().append(true).open(path).unwrap().write_all(bytes).unwrap();
    };
    append("stdout.log", b"untold\n");
    append("times.log", b"garbage\n\xff\xff 1 2 3\n9 stdout 99999999999999999999 1\n9 stdout 5000 18446744073709551615\n9 stdout 5000 9000000000000000000\n9 stdout 2 9000000000000000000\n5 std");
    let mut reader = OutputReader::open(seat.folder()).unwrap().unwrap();
    let told = ["told\n", "ld\nuntold\n"].map(|line| (Stream::Stdout, line.to_owned()));
    assert_eq!(text(&drain(&mut reader)), told);
    assert_eq!(reader.rest().unwrap(), []);
}

#[test]
fn what_a_killed_monitor_wrote_without_a_time_is_read_at_the_end() {
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    let log = OutputLog::create(seat.folder(), u64::MAX).unwrap();
    log.writer(Stream::Stdout).write_all(b"told\n").unwrap();
    let path = seat.folder().path().join("stdout.log");
    std::fs::File::options().append(true).open(path).unwrap().write_all(b"untold\n").unwrap();
    let mut reader = OutputReader::open(seat.folder()).unwrap().unwrap();
    assert_eq!(text(&drain(&mut reader)), [(Stream::Stdout, "told\n".to_owned())]);
    assert_eq!(text(&reader.rest().unwrap()), [(Stream::Stdout, "untold\n".to_owned())]);
}

#[test]
fn output_beyond_its_limit_is_told_as_lost_and_takes_no_room() {
    const LIMIT: u64 = 10_000;
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    let log = OutputLog::create(seat.folder(), LIMIT).unwrap();
    let mut reader = OutputReader::open(seat.folder()).unwrap().unwrap();
    let (mut stdout, mut stderr) = (log.writer(Stream::Stdout), log.writer(Stream::Stderr));
    let mut sent = 0;
    for index in 0..20_000 {
        let line = format!("line {index}\n");
        sent += line.len() as u64;
        stdout.write_all(line.as_bytes()).unwrap();
        stderr.write_all(b"e").unwrap();
    }
    let info = log.info();
    assert_eq!((info.stdout_bytes, info.stderr_bytes), (sent, 20_000));
    assert!(info.error.unwrap().contains("--log-limit"));
    let size = || {
        let files = std::fs::read_dir(seat.folder().path()).unwrap();
        let len = |entry: std::fs::DirEntry| entry.metadata().unwrap().len();
        files
            .map(Result::unwrap)
            .filter(|entry| {
                entry.file_name().to_str().unwrap().ends_with("s.log")
                    || entry.file_name().to_str().unwrap().starts_with("std")
            })
            .map(len)
            .sum::<u64>()
    };
    // A few lines tell of what is lost, however many pieces it were.
    assert!(size() < LIMIT + 1000, "{}", size());
    drop((log, stdout, stderr));
    let (mut printed, mut lost) = (0, 0);
    for piece in drain(&mut reader) {
        match piece {
            Piece::Printed { bytes, .. } => {
                assert_eq!(lost, 0, "what comes after a loss is lost");
                printed += bytes.len() as u64;
            }
            Piece::Lost { bytes, .. } => lost += bytes,
        }
    }
    assert_eq!((lost, printed + lost), (info.lost_bytes, sent + 20_000));
    // Most of the room went to the lines about such short pieces.
    assert!(printed > LIMIT / 10 && printed < LIMIT, "{printed}");
}
