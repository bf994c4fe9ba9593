//! Figures: as tables for people, and as JSON.

use serde::Serialize;

use super::statistics::{Samples, Summary, WIDE_RATIO};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Milliseconds on the clock on the wall.
    WallMs,
    /// Milliseconds of processor time, all threads of the process together.
    CpuMs,
    /// Million guest instructions.
    MillionInstructions,
    /// Million guest instructions in a second of processor time.
    Mips,
    /// Mebibytes.
    MiB,
    /// Mebibytes in a second on the clock on the wall.
    MiBPerSecond,
    /// Microseconds of processor time, for one of many.
    CpuUs,
    /// Microseconds on the clock on the wall, for one of many.
    WallUs,
    /// Accesses of the guest to devices, each an exit to the monitor.
    Accesses,
    /// Per cent of one processor.
    CpuPercent,
    /// So many in a second on the clock on the wall.
    PerSecond,
    /// Per cent.
    Percent,
    /// Seconds on the clock on the wall.
    Seconds,
}

impl Unit {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Unit::WallMs => "ms wall",
            Unit::CpuMs => "ms cpu",
            Unit::MillionInstructions => "M instr.",
            Unit::Mips => "MIPS",
            Unit::MiB => "MiB",
            Unit::MiBPerSecond => "MiB/s",
            Unit::CpuUs => "us cpu",
            Unit::WallUs => "us wall",
            Unit::Accesses => "accesses",
            Unit::CpuPercent => "% cpu",
            Unit::PerSecond => "/s",
            Unit::Percent => "%",
            Unit::Seconds => "s",
        }
    }
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// The median, at most.
    AtMost(f64),
    /// The median, at least.
    AtLeast(f64),
    /// The median ratio to the peer, at most.
    PeerRatio(f64),
}

/// One line of a table.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// Harrier's software engine, or Harrier where the engine makes no difference.
    pub(crate) soft: Samples,
    /// Harrier on KVM, measured in the same rounds.
    pub(crate) kvm: Option<Samples>,
    /// QEMU's translator, measured in the same rounds.
    pub(crate) peer: Option<Samples>,
    /// The same program on the host itself.
    pub(crate) native: Option<Samples>,
    pub(crate) goal: Option<Goal>,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, unit: Unit, soft: Samples) -> Self {
        Self { name: name.into(), unit, soft, kvm: None, peer: None, native: None, goal: None }
    }

    /// KVM's side; without measurements there is none on this host.
    pub(crate) fn kvm(mut self, kvm: Samples) -> Self {
        self.kvm = Some(kvm).filter(|kvm| !kvm.values().is_empty());
        self
    }

    /// The peer's side; without measurements it could not take part.
    pub(crate) fn peer(mut self, peer: Samples) -> Self {
        self.peer = Some(peer).filter(|peer| !peer.values().is_empty());
        self
    }

    /// The same on the host itself; without measurements there is no such thing.
    pub(crate) fn native(mut self, native: Samples) -> Self {
        self.native = Some(native).filter(|native| !native.values().is_empty());
        self
    }

    pub(crate) fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    fn peer_ratios(&self) -> Option<Samples> {
        Some(self.soft.ratios(self.peer.as_ref()?))
    }

    fn native_ratios(&self) -> Option<Samples> {
        Some(self.soft.ratios(self.native.as_ref()?))
    }

    fn kvm_peer_ratios(&self) -> Option<Samples> {
        Some(self.kvm.as_ref()?.ratios(self.peer.as_ref()?))
    }

    fn kvm_native_ratios(&self) -> Option<Samples> {
        Some(self.kvm.as_ref()?.ratios(self.native.as_ref()?))
    }

    fn is_met(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::AtMost(limit) => self.soft.median() <= limit,
            Goal::AtLeast(limit) => self.soft.median() >= limit,
            Goal::PeerRatio(limit) => self.peer_ratios()?.median() <= limit,
        })
    }

    fn goal_text(&self) -> String {
        let Some(goal) = self.goal else { return String::new() };
        let limit = match goal {
            Goal::AtMost(limit) => format!("<= {}", number(limit)),
            Goal::AtLeast(limit) => format!(">= {}", number(limit)),
            Goal::PeerRatio(limit) => format!("<= {} x QEMU", number(limit)),
        };
        match self.is_met() {
            Some(true) => format!("{limit}: yes"),
            Some(false) => format!("{limit}: **no**"),
            None => limit,
        }
    }

    fn cells(&self) -> Vec<String> {
        let of = |samples: &Option<Samples>| samples.as_ref().map(value).unwrap_or_default();
        let by = |samples: Option<Samples>| samples.as_ref().map(ratio).unwrap_or_default();
        vec![
            self.name.clone(),
            self.unit.text().to_owned(),
            value(&self.soft),
            of(&self.kvm),
            of(&self.peer),
            of(&self.native),
            by(self.peer_ratios()),
            by(self.kvm_peer_ratios()),
            by(self.native_ratios()),
            by(self.kvm_native_ratios()),
            self.goal_text(),
        ]
    }

    /// The figure as JSON.
    pub(crate) fn record(&self) -> FigureRecord {
        let ratio = |samples: Option<Samples>| {
            samples.map(|samples| RatioRecord {
                too_wide: samples.spread() > WIDE_RATIO,
                summary: samples.summary(),
            })
        };
        FigureRecord {
            name: self.name.clone(),
            unit: self.unit,
            harrier_soft: self.soft.summary(),
            harrier_kvm: self.kvm.as_ref().map(Samples::summary),
            qemu_tcg: self.peer.as_ref().map(Samples::summary),
            native: self.native.as_ref().map(Samples::summary),
            soft_to_qemu_tcg: ratio(self.peer_ratios()),
            kvm_to_qemu_tcg: ratio(self.kvm_peer_ratios()),
            soft_to_native: ratio(self.native_ratios()),
            kvm_to_native: ratio(self.kvm_native_ratios()),
            goal: self.goal.map(|_| self.goal_text().replace("**", "")),
            goal_met: self.is_met(),
        }
    }
}

/// A figure as JSON. Ratios are Harrier's value by the other's.
#[derive(Debug, Serialize)]
pub(crate) struct FigureRecord {
    name: String,
    unit: Unit,
    harrier_soft: Summary,
    harrier_kvm: Option<Summary>,
    qemu_tcg: Option<Summary>,
    native: Option<Summary>,
    soft_to_qemu_tcg: Option<RatioRecord>,
    kvm_to_qemu_tcg: Option<RatioRecord>,
    soft_to_native: Option<RatioRecord>,
    kvm_to_native: Option<RatioRecord>,
    goal: Option<String>,
    goal_met: Option<bool>,
}

#[derive(Debug, Serialize)]
struct RatioRecord {
    #[serde(flatten)]
    summary: Summary,
    too_wide: bool,
}

/// What a group found.
#[derive(Debug, Default)]
pub(crate) struct GroupReport {
    pub(crate) name: &'static str,
    pub(crate) figures: Vec<Figure>,
    /// What cannot be measured here, and in whose words.
    pub(crate) remarks: Vec<String>,
}

const HEADINGS: [&str; 11] = [
    "",
    "unit",
    "soft",
    "kvm",
    "QEMU TCG",
    "native",
    "soft / QEMU",
    "kvm / QEMU",
    "soft / native",
    "kvm / native",
    "goal",
];

impl GroupReport {
    /// A Markdown table with aligned columns, without those that are empty, and the remarks.
    pub(crate) fn to_markdown(&self) -> String {
        let rows: Vec<Vec<String>> = self.figures.iter().map(Figure::cells).collect();
        let columns: Vec<(usize, usize)> = HEADINGS
            .iter()
            .enumerate()
            .filter(|(column, _)| {
                rows.iter().any(|row| row.get(*column).is_some_and(|cell| !cell.is_empty()))
            })
            .map(|(column, heading)| {
                let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
                (column, cells.chain([heading.len()]).max().unwrap_or(0))
            })
            .collect();
        let line = |cell: &dyn Fn(usize) -> String| {
            let cells = columns.iter().map(|(column, width)| format!("{:<width$}", cell(*column)));
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let mut text = line(&|column| HEADINGS.get(column).copied().unwrap_or_default().to_owned());
        let rules: Vec<String> = columns.iter().map(|(_, width)| "-".repeat(*width)).collect();
        text.push_str(&format!("| {} |\n", rules.join(" | ")));
        for row in &rows {
            text.push_str(&line(&|column| row.get(column).cloned().unwrap_or_default()));
        }
        for remark in &self.remarks {
            text.push_str(&format!("\n- {remark}"));
        }
        if !self.remarks.is_empty() {
            text.push('\n');
        }
        text
    }
}

/// The median, and in brackets the p99 and the spread where there are several measurements.
fn value(samples: &Samples) -> String {
    let median = number(samples.median());
    if samples.values().len() < 2 || samples.spread() == 0.0 {
        return median;
    }
    format!("{median} (p99 {}, ±{:.0} %)", number(samples.quantile(0.99)), samples.spread() * 50.0)
}

fn ratio(samples: &Samples) -> String {
    let median = number(samples.median());
    if samples.spread() > WIDE_RATIO {
        let (low, high) = (number(samples.quantile(0.0)), number(samples.quantile(1.0)));
        return format!("{median}? ({low} to {high}: too wide)");
    }
    format!("{median} ±{:.0} %", samples.spread() * 50.0)
}

/// Three significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "-".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        values.iter().copied().collect()
    }

    #[test]
    fn a_goal_is_judged_by_the_median() {
        let figure = Figure::new("x", Unit::CpuMs, samples(&[10.0, 10.0, 90.0]));
        assert_eq!(figure.clone().goal(Goal::AtMost(10.0)).is_met(), Some(true));
        assert_eq!(figure.clone().goal(Goal::AtLeast(11.0)).is_met(), Some(false));
        assert_eq!(figure.clone().goal(Goal::PeerRatio(2.0)).is_met(), None, "there is no peer");
        let beside = figure.peer(samples(&[5.0, 5.0, 5.0])).goal(Goal::PeerRatio(2.0));
        assert_eq!(beside.is_met(), Some(true));
    }

    #[test]
    fn a_ratio_too_wide_to_mean_something_is_marked() {
        let figure = Figure::new("x", Unit::CpuMs, samples(&[1.0, 2.0, 9.0])).peer(samples(&[1.0, 1.0, 1.0]));
        assert!(figure.record().soft_to_qemu_tcg.unwrap().too_wide);
        assert!(figure.cells().join("|").contains("too wide"));
        let narrow = Figure::new("x", Unit::CpuMs, samples(&[2.0, 2.0])).peer(samples(&[1.0, 1.0]));
        assert!(!narrow.record().soft_to_qemu_tcg.unwrap().too_wide);
    }

    #[test]
    fn a_table_has_no_empty_columns() {
        let report = GroupReport {
            name: "x",
            figures: vec![Figure::new("size", Unit::MiB, samples(&[4.0])).goal(Goal::AtMost(10.0))],
            remarks: vec!["a peer is missing".to_owned()],
        };
        let expected = "\
|      | unit | soft | goal         |
| ---- | ---- | ---- | ------------ |
| size | MiB  | 4.00 | <= 10.0: yes |

- a peer is missing
";
        assert_eq!(report.to_markdown(), expected);
    }
}
