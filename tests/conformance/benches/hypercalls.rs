//! What a hypercall costs on every engine, in nanoseconds: the fastest of the runs of the bare-metal guest
//! `hypercall_cost`, the engines in turns. Also what it takes from the first instruction to the guest's main function.

use std::sync::Arc;

use harrier_conformance::{DEADLINE, Guest, engines, run};
use harrier_engine::{Engine, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;

const RUNS: usize = 7;
/// Where KVM emulates kernel mode, a run takes many seconds.
const PATIENCE: u32 = 10;
const GUEST: Guest = Guest { name: "hypercall_cost", cpus: 1, checks: 10 };

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut named: Vec<(&str, Box<dyn Engine>)> =
        engines().into_iter().map(|engine| (engine.name(), engine)).collect();
    // Kernel mode in KVM, however it does that here: its exits are those that hardware would make.
    if std::env::args().any(|word| word == "kvm-alone") {
        named.push(("kvm alone", Box::new(KvmEngine::default().with_assistant(Arc::new(SoftEngine)))));
    }
    named.retain(|(name, engine)| match engine.probe() {
        Probe::Available { .. } => true,
        Probe::Unavailable { reason } => {
            println!("skipped: the {name} engine is not available: {reason}");
            false
        }
    });
    // Name, then for each engine its values.
    let mut table: Vec<(String, Vec<Vec<f64>>)> = Vec::new();
    let mut note = |name: &str, engine: usize, value: f64| {
        let at = table.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            table.push((name.to_owned(), vec![Vec::new(); named.len()]));
            table.len() - 1
        });
        table[at].1[engine].push(value);
    };
    for _ in 0..RUNS {
        for (index, (_, engine)) in named.iter().enumerate() {
            let outcome = run(engine.as_ref(), &GUEST, "", DEADLINE * PATIENCE)?;
            outcome.transcript.verdict()?;
            let begin = outcome.report.first_instruction;
            if let Some((mark, begin)) = outcome.report.hypercalls.marks.first().zip(begin) {
                note("boot to the main function", index, (mark.at - begin).as_nanos() as f64);
            }
            for (name, rounds, ticks) in outcome.transcript.text.lines().filter_map(measurement) {
                note(name, index, ticks * 1e6 / f64::from(outcome.tsc_khz) / rounds);
            }
        }
    }
    print!("{:<56}", "nanoseconds");
    for (name, _) in &named {
        print!("{name:>12}");
    }
    println!();
    for (name, engines) in table {
        print!("{name:<56}");
        for mut values in engines {
            values.sort_by(f64::total_cmp);
            print!("{:>12.0}", values.first().copied().unwrap_or(f64::NAN));
        }
        println!();
    }
    Ok(())
}

/// Name, rounds and ticks of a line `cost ROUNDS TICKS NAME`.
fn measurement(line: &str) -> Option<(&str, f64, f64)> {
    let mut words = line.strip_prefix("cost ")?.splitn(3, ' ');
    let (rounds, ticks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((words.next()?, rounds, ticks))
}
