//! Every bare-metal guest, stopped, saved and taken up again in the middle of its checks, on one engine and then on the
//! other. What it says in all must be what it says in one piece.

use harrier_conformance::{GUESTS, engines, relay};
use harrier_engine::{Engine, Probe};
use libtest_mimic::{Arguments, Trial};

fn main() {
    let engines: Vec<&'static dyn Engine> = engines().into_iter().map(|engine| &*Box::leak(engine)).collect();
    let mut trials = Vec::new();
    for first in &engines {
        for second in &engines {
            let available = [first, second].iter().all(|engine| match engine.probe() {
                Probe::Available { .. } => true,
                Probe::Unavailable { reason } => {
                    eprintln!("skipped: the {} engine is not available: {reason}", engine.name());
                    false
                }
            });
            // On the way to the same engine and back, the guests whose state is the richest will do.
            let same = first.name() == second.name();
            let rich = ["paging", "apic", "devices", "fpu"];
            // The one with two processors makes thousands of split locks, which hosts slow down to seconds.
            let guests = GUESTS.iter().filter(|guest| guest.cpus == 1);
            for guest in guests.filter(|guest| !same || rich.contains(&guest.name)) {
                let route = [*first, *second];
                let name = format!("{}-{}::{}", first.name(), second.name(), guest.name);
                let run = move || relay::check(&route, guest, 4).map_err(Into::into);
                trials.push(Trial::test(name, run).with_ignored_flag(!available));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
