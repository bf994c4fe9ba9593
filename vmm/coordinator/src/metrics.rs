//! The queue's numbers as Prometheus text, version 0.0.4 of its exposition format.

use std::fmt::Write;

use harrier_jobs::queue::State;
use harrier_jobs::store::Stats;

pub(crate) fn text(stats: &Stats) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, f64)>| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let count_of = |state: State| {
        stats.states.iter().find(|(known, _)| *known == state).map_or(0, |(_, count)| *count) as f64
    };
    family(
        "harrier_jobs",
        "gauge",
        "Jobs by state.",
        State::ALL.iter().map(|state| (format!("{{state=\"{state}\"}}"), count_of(*state))).collect(),
    );
    family(
        "harrier_attempts_total",
        "counter",
        "Times that a worker has taken a job.",
        vec![(String::new(), stats.attempts as f64)],
    );
    family(
        "harrier_attempt_ends_total",
        "counter",
        "Ends of attempts by reason.",
        stats
            .ends
            .iter()
            .map(|(reason, count)| (format!("{{reason=\"{reason}\"}}"), *count as f64))
            .collect(),
    );
    let times = &stats.times;
    let seconds = |ms: u64| ms as f64 / 1000.0;
    family(
        "harrier_seconds_total",
        "counter",
        "What ended attempts did with their time.",
        [
            ("allocated", times.allocated_ms),
            ("committed", times.committed_ms),
            ("lost", times.lost_ms),
            ("suspended", times.suspended_ms),
            ("checkpoint", times.checkpoint_ms),
            ("restore", times.restore_ms),
            ("transfer", times.transfer_ms),
        ]
        .map(|(kind, ms)| (format!("{{kind=\"{kind}\"}}"), seconds(ms)))
        .into(),
    );
    family(
        "harrier_goodput_ratio",
        "gauge",
        "The share of allocated time that was kept.",
        stats.goodput().map(|share| (String::new(), share)).into_iter().collect(),
    );
    family(
        "harrier_hosts",
        "gauge",
        "Hosts by whether they have been heard of lately.",
        vec![
            ("{alive=\"true\"}".to_owned(), stats.hosts.0 as f64),
            ("{alive=\"false\"}".to_owned(), stats.hosts.1.saturating_sub(stats.hosts.0) as f64),
        ],
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_its_head_and_every_state_a_sample() {
        let stats =
            Stats { states: vec![(State::Queued, 3)], attempts: 2, hosts: (1, 3), ..Stats::default() };
        let text = text(&stats);
        assert!(text.contains("harrier_jobs{state=\"queued\"} 3\n"));
        assert!(text.contains("harrier_jobs{state=\"running\"} 0\n"));
        assert!(text.contains("harrier_attempts_total 2\n"));
        assert!(text.contains("harrier_hosts{alive=\"false\"} 2\n"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok()), "{line}");
        }
    }
}
