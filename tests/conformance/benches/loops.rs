//! Loops of the bare-metal guest `bench` on every engine that is available: million instructions a second, median of five
//! runs. Arguments go to the guest's command line, for example `only=registers`.

use harrier_conformance::{BENCH, DEADLINE, engines, run};
use harrier_engine::Probe;

const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    for engine in engines() {
        if let Probe::Unavailable { reason } = engine.probe() {
            println!("skipped: the {} engine is not available: {reason}", engine.name());
            continue;
        }
        let mut results: Vec<(String, Vec<f64>)> = Vec::new();
        for _ in 0..RUNS {
            let outcome = run(engine.as_ref(), &BENCH, &arguments.join(" "), DEADLINE)?;
            outcome.transcript.verdict()?;
            for (name, instructions, ticks) in outcome.transcript.text.lines().filter_map(measurement) {
                // Ticks a microsecond: so the quotient is in millions a second.
                let speed = instructions / (ticks / (f64::from(outcome.tsc_khz) / 1000.0));
                match results.iter_mut().find(|(known, _)| known == name) {
                    Some((_, speeds)) => speeds.push(speed),
                    None => results.push((name.to_owned(), vec![speed])),
                }
            }
        }
        println!("{} engine, million instructions/s", engine.name());
        for (name, mut speeds) in results {
            speeds.sort_by(f64::total_cmp);
            println!("  {name:24} {:9.1}", speeds[speeds.len() / 2]);
        }
    }
    Ok(())
}

/// Name, instructions and ticks of a line `bench INSTRUCTIONS TICKS NAME`.
fn measurement(line: &str) -> Option<(&str, f64, f64)> {
    let mut words = line.strip_prefix("bench ")?.splitn(3, ' ');
    let (instructions, ticks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((words.next()?, instructions, ticks))
}
