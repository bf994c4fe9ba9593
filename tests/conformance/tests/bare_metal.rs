//! Every bare-metal guest on every engine. A test of an engine that is not available here counts as ignored.

use harrier_conformance::{GUESTS, check, engines};
use harrier_engine::Probe;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut trials = Vec::new();
    for engine in engines() {
        let engine: &'static dyn harrier_engine::Engine = Box::leak(engine);
        let available = match engine.probe() {
            Probe::Available { .. } => true,
            Probe::Unavailable { reason } => {
                eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                false
            }
        };
        for guest in GUESTS {
            let run = move || {
                let transcript = check(engine, guest)?;
                for line in transcript.skipped() {
                    eprintln!("{} on {}: {line}", guest.name, engine.name());
                }
                Ok(())
            };
            trials.push(
                Trial::test(format!("{}::{}", engine.name(), guest.name), run).with_ignored_flag(!available),
            );
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
