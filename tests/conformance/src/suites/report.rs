//! Tables of what passed: for people, and as JSON.

use std::fmt;

use serde::Serialize;

/// What became of one entry of a suite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed, and how.
    Fail {
        /// What went wrong.
        reason: String,
    },
    /// It was not run, and why.
    Skip {
        /// Why not.
        reason: String,
    },
}

impl Verdict {
    /// A failure.
    pub fn fail(reason: impl Into<String>) -> Verdict {
        Verdict::Fail { reason: reason.into() }
    }

    /// An entry that is not run.
    pub fn skip(reason: impl Into<String>) -> Verdict {
        Verdict::Skip { reason: reason.into() }
    }

    fn name(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail { .. } => "fail",
            Verdict::Skip { .. } => "skip",
        }
    }

    fn reason(&self) -> &str {
        match self {
            Verdict::Pass => "",
            Verdict::Fail { reason } | Verdict::Skip { reason } => reason,
        }
    }
}

/// One line.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name of the entry.
    pub name: String,
    /// What the column's runner made of it, in the order of [`Table::columns`].
    pub verdicts: Vec<Verdict>,
}

/// The results of a suite.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Table {
    /// Who ran the entries: Harrier's engine first, then whom it is compared with.
    pub columns: Vec<String>,
    /// What they made of it.
    pub rows: Vec<Row>,
}

impl Table {
    /// An empty table.
    pub fn new(columns: Vec<String>) -> Table {
        Table { columns, rows: Vec::new() }
    }

    /// Entries of a column that passed, failed and were skipped.
    fn sums(&self, column: usize) -> [usize; 3] {
        let mut sums = [0; 3];
        for verdict in self.rows.iter().filter_map(|row| row.verdicts.get(column)) {
            match verdict {
                Verdict::Pass => sums[0] += 1,
                Verdict::Fail { .. } => sums[1] += 1,
                Verdict::Skip { .. } => sums[2] += 1,
            }
        }
        sums
    }

    /// Whether something passed and nothing failed in the first column.
    pub fn succeeded(&self) -> bool {
        let [passed, failed, _] = self.sums(0);
        passed > 0 && failed == 0
    }

    /// The table as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

impl Table {
    /// The same table with only the entries that did not pass, and the sums of all.
    pub fn without_passes(&self) -> impl fmt::Display {
        struct Failures<'a>(&'a Table);
        impl fmt::Display for Failures<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.write(f, |row| row.verdicts.iter().any(|verdict| *verdict != Verdict::Pass))
            }
        }
        Failures(self)
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, shown: impl Fn(&Row) -> bool) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(4);
        write!(f, "{:width$}", "test")?;
        for column in &self.columns {
            write!(f, "  {column:<6}")?;
        }
        writeln!(f)?;
        for row in self.rows.iter().filter(|row| shown(row)) {
            write!(f, "{:width$}", row.name)?;
            for (verdict, column) in row.verdicts.iter().zip(&self.columns) {
                write!(f, "  {:<1$}", verdict.name(), column.len().max(6))?;
            }
            let reasons: Vec<_> = row.verdicts.iter().map(Verdict::reason).collect();
            match reasons.iter().find(|reason| !reason.is_empty()) {
                Some(first) if reasons.iter().all(|reason| reason == first) => {
                    write!(f, "  {first}")?;
                }
                Some(_) => {
                    for (reason, column) in reasons.iter().zip(&self.columns) {
                        if !reason.is_empty() {
                            write!(f, "  {column}: {reason}")?;
                        }
                    }
                }
                None => {}
            }
            writeln!(f)?;
        }
        for (index, column) in self.columns.iter().enumerate() {
            let [passed, failed, skipped] = self.sums(index);
            writeln!(f, "{column}: {passed} passed, {failed} failed, {skipped} skipped")?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, |_| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_counts_and_says_why() {
        let mut table = Table::new(vec!["soft".to_owned(), "tcg".to_owned()]);
        let row = |name: &str, first, second| Row { name: name.to_owned(), verdicts: vec![first, second] };
        table.rows.push(row("apic", Verdict::Pass, Verdict::fail("timeout")));
        table.rows.push(row("vmx", Verdict::skip("no vmx"), Verdict::skip("no vmx")));
        let text = table.to_string();
        assert!(text.contains("apic  pass    fail    tcg: timeout\n"), "{text}");
        assert!(text.contains("vmx   skip    skip    no vmx\n"), "{text}");
        assert!(text.ends_with("soft: 1 passed, 0 failed, 1 skipped\ntcg: 0 passed, 1 failed, 1 skipped\n"));
        assert!(table.succeeded());
        table.rows.push(row("x", Verdict::fail("it"), Verdict::Pass));
        assert!(!table.succeeded());
        assert!(!Table::new(Vec::new()).succeeded(), "nothing was shown");
    }
}
