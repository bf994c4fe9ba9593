//! What a selftest has found, for people and for programs.

use std::time::Duration;

use serde_json::{Value, json};

use super::milliseconds;
use super::unexercised::Unexercised;
use crate::doctor::{self, Finding};
use crate::table::aligned;

/// Characters of a reason in a table.
const LONGEST_REMARK: usize = 240;

/// What came of a check.
#[derive(Debug)]
pub(super) enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// How a check ended.
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    /// Single checks that the guest left out, with reasons.
    pub(super) left_out: Vec<String>,
    /// The phases of a `harrier run`.
    pub(super) timings: Option<Value>,
    /// It cannot even be stopped.
    pub(super) is_stuck: bool,
}

impl Outcome {
    fn new(verdict: Verdict) -> Self {
        Outcome { verdict, left_out: Vec::new(), timings: None, is_stuck: false }
    }

    pub(super) fn passed(left_out: Vec<String>) -> Self {
        Outcome { left_out, ..Outcome::new(Verdict::Passed) }
    }

    pub(super) fn failed(reason: &str) -> Self {
        Outcome::new(Verdict::Failed(reason.to_owned()))
    }

    pub(super) fn skipped(reason: &str) -> Self {
        Outcome::new(Verdict::Skipped(reason.to_owned()))
    }
}

/// A check on an engine.
pub(super) struct Row {
    pub(super) check: &'static str,
    pub(super) engine: &'static str,
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

impl Row {
    fn result(&self) -> &'static str {
        match self.outcome.verdict {
            Verdict::Passed => "passed",
            Verdict::Failed(_) => "failed",
            Verdict::Skipped(_) => "skipped",
        }
    }

    fn reason(&self) -> Option<&str> {
        match &self.outcome.verdict {
            Verdict::Passed => None,
            Verdict::Failed(reason) | Verdict::Skipped(reason) => Some(reason),
        }
    }

    /// What a person wants to know besides the result, in one line.
    fn remark(&self) -> String {
        if let Some(reason) = self.reason() {
            let line = crate::one_line(&reason.replace('\n', "; "));
            return match line.char_indices().nth(LONGEST_REMARK) {
                Some((end, _)) => format!("{} ... (--json has all)", line.get(..end).unwrap_or_default()),
                None => line,
            };
        }
        if let Some(timings) = &self.outcome.timings {
            let phase = |name: &str| timings.get(name).and_then(Value::as_f64);
            if let (Some(boot), Some(command)) = (phase("kernel_entry_to_agent"), phase("command")) {
                return format!("kernel to agent {boot:.0} ms, command {command:.1} ms");
            }
        }
        match self.outcome.left_out.len() {
            0 => String::new(),
            count => format!("{count} of its checks do not apply here"),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "check": self.check,
            "engine": self.engine,
            "result": self.result(),
            "reason": self.reason(),
            "milliseconds": milliseconds(self.took),
            "left_out": self.outcome.left_out,
            "timings_ms": self.outcome.timings,
        })
    }
}

/// Everything.
pub(super) struct Report {
    pub(super) rows: Vec<Row>,
    pub(super) host: Vec<Finding>,
    pub(super) unexercised: Vec<Unexercised>,
}

impl Report {
    fn count(&self, result: &str) -> usize {
        self.rows.iter().filter(|row| row.result() == result).count()
    }

    pub(super) fn failures(&self) -> usize {
        self.count("failed")
    }

    pub(super) fn to_json(&self) -> Value {
        let unexercised: Vec<Value> =
            self.unexercised.iter().map(|item| json!({ "path": item.path, "needs": item.needs })).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "passed": self.count("passed"),
            "failed": self.failures(),
            "skipped": self.count("skipped"),
            "checks": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
            "host": doctor::to_json(&self.host),
            "not_exercised": unexercised,
        })
    }

    pub(super) fn to_text(&self) -> String {
        let mut rows = vec![["CHECK", "ENGINE", "RESULT", "MS", ""].map(str::to_owned).to_vec()];
        rows.extend(self.rows.iter().map(|row| {
            let time = match row.outcome.verdict {
                Verdict::Skipped(_) => String::new(),
                _ => format!("{:.1}", milliseconds(row.took)),
            };
            vec![row.check.to_owned(), row.engine.to_owned(), row.result().to_owned(), time, row.remark()]
        }));
        let mut text = aligned(&rows);
        text.push_str("\nThis host\n");
        // What follows from it says `harrier doctor`.
        let facts = |finding: &Finding| {
            vec![finding.name.to_owned(), doctor::mark(finding).to_owned(), finding.detail.clone()]
        };
        text.push_str(&aligned(&self.host.iter().map(facts).collect::<Vec<_>>()));
        if !self.unexercised.is_empty() {
            text.push_str("\nNot exercised on this host\n");
            for Unexercised { path, needs } in &self.unexercised {
                text.push_str(&format!("- {path}: needs {needs}\n"));
            }
        }
        text.push_str(&format!(
            "\n{} passed, {} failed, {} skipped\n",
            self.count("passed"),
            self.failures(),
            self.count("skipped")
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_and_gives_reasons_in_one_line() {
        let row =
            |outcome| Row { check: "paging", engine: "soft", outcome, took: Duration::from_micros(12_345) };
        let rows = vec![
            row(Outcome::passed(vec!["skip nx".to_owned()])),
            row(Outcome::failed("not ok a\nnot ok b")),
            row(Outcome::skipped("no KVM")),
        ];
        let report = Report {
            rows,
            host: Vec::new(),
            unexercised: vec![Unexercised { path: "SVM".to_owned(), needs: "an AMD host".to_owned() }],
        };
        let text = report.to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "paging   soft     passed    12.3   1 of its checks do not apply here");
        assert_eq!(lines[2], "paging   soft     failed    12.3   not ok a; not ok b");
        assert_eq!(lines[3], "paging   soft     skipped          no KVM");
        assert!(text.contains("\n- SVM: needs an AMD host\n"), "{text}");
        assert!(text.ends_with("\n1 passed, 1 failed, 1 skipped\n"), "{text}");
        let long = row(Outcome::failed(&"ä".repeat(1000))).remark();
        assert_eq!(long, format!("{} ... (--json has all)", "ä".repeat(LONGEST_REMARK)));
        let json = report.to_json();
        assert_eq!((&json["passed"], &json["failed"], &json["skipped"]), (&1.into(), &1.into(), &1.into()));
        assert_eq!(json["checks"][1]["reason"], "not ok a\nnot ok b");
        assert_eq!(json["checks"][0]["milliseconds"], 12.345);
        assert_eq!(json["not_exercised"][0]["needs"], "an AMD host");
    }
}
