//! Log lines on stderr. Errors and warnings always; -v adds what happens to a run, -vv every detail.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct StderrLog;

impl Log for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // A terminal in raw mode needs the carriage return.
            let end = if crate::terminal::is_raw() { "\r\n" } else { "\n" };
            let level = record.level().as_str().to_ascii_lowercase();
            let line = format!("harrier: {level}: {}{end}", record.args());
            // Without stderr there is nobody to tell.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging; only the first call counts.
pub(crate) fn init(verbose: u8) {
    static LOG: StderrLog = StderrLog;
    let level = match verbose {
        0 => LevelFilter::Error,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(level);
    }
}
