//! `harrier doctor`: what this host offers, and what follows from it, as a table or as JSON.

mod host_calls;
mod probes;

use std::io::Write;

use serde_json::{Value, json};

use crate::exit::Failure;
use crate::flags::DoctorFlags;

/// One thing that was looked at.
pub(crate) struct Finding {
    /// A short name; lower case.
    pub(crate) name: &'static str,
    /// Whether it is there; `None` for plain information.
    pub(crate) available: Option<bool>,
    /// What was seen.
    pub(crate) detail: String,
    /// What that means for Harrier.
    pub(crate) consequence: String,
}

/// Looks and prints.
pub(crate) fn run(flags: &DoctorFlags) -> Result<u8, Failure> {
    let findings = look();
    let text = if flags.json { format!("{}\n", to_json(&findings)) } else { to_table(&findings) };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|err| Failure::new(format!("stdout cannot be written ({err}): give it another place")))?;
    Ok(0)
}

/// Looks at everything.
pub(crate) fn look() -> Vec<Finding> {
    probes::all()
}

/// The findings for programs.
pub(crate) fn to_json(findings: &[Finding]) -> Value {
    let list: Vec<Value> = findings
        .iter()
        .map(|finding| {
            json!({
                "name": finding.name,
                "available": finding.available,
                "detail": finding.detail,
                "consequence": finding.consequence,
            })
        })
        .collect();
    json!({ "version": env!("CARGO_PKG_VERSION"), "findings": list })
}

/// Whether it is there, in a word for people.
pub(crate) fn mark(finding: &Finding) -> &'static str {
    match finding.available {
        Some(true) => "yes",
        Some(false) => "no",
        None => "",
    }
}

fn to_table(findings: &[Finding]) -> String {
    let width =
        |text: fn(&Finding) -> &str| findings.iter().map(|f| text(f).chars().count()).max().unwrap_or(0);
    let (names, details) = (width(|f| f.name), width(|f| &f.detail));
    let mut table = String::new();
    for finding in findings {
        let mark = mark(finding);
        let line = format!(
            "{:<names$}  {mark:<3}  {:<details$}  {}",
            finding.name, finding.detail, finding.consequence
        );
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_has_a_name_a_detail_and_a_consequence() {
        let findings = probes::all();
        let names: std::collections::HashSet<_> = findings.iter().map(|finding| finding.name).collect();
        assert_eq!(names.len(), findings.len());
        for finding in &findings {
            assert!(!finding.detail.is_empty() && !finding.consequence.is_empty(), "{}", finding.name);
            assert!(!finding.detail.contains('\n'), "{}", finding.name);
        }
        assert_eq!(to_table(&findings).lines().count(), findings.len());
        let list = to_json(&findings);
        assert_eq!(list["findings"].as_array().map(Vec::len), Some(findings.len()));
    }
}
