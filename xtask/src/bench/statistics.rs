//! Medians, spreads and ratios of a few measurements.

use serde::Serialize;

/// Above this spread a ratio is marked: the machine's other work decided it.
pub(crate) const WIDE_RATIO: f64 = 0.5;

/// Measurements of one thing, in the order they were taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// As they were taken.
    pub(crate) fn values(&self) -> &[f64] {
        &self.0
    }

    /// The value below which this share of the measurements lies, between neighbours in proportion; NaN without any.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let position = share.clamp(0.0, 1.0) * last as f64;
        let (below, above) = (position.floor() as usize, position.ceil() as usize);
        match (sorted.get(below), sorted.get(above)) {
            (Some(low), Some(high)) => low + (high - low) * position.fract(),
            _ => f64::NAN,
        }
    }

    /// The middle.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The middle half's width, as a share of the median.
    pub(crate) fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }

    /// Element by element divided by `other`: run by run, because neighbours in time saw the same machine.
    pub(crate) fn ratios(&self, other: &Samples) -> Samples {
        Samples(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// What is written into a report.
    pub(crate) fn summary(&self) -> Summary {
        Summary {
            median: self.median(),
            p99: self.quantile(0.99),
            spread: self.spread(),
            values: self.0.clone(),
        }
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Samples(values.into_iter().collect())
    }
}

/// Measurements in few numbers.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    /// With less than a hundred measurements, nearly the largest.
    pub(crate) p99: f64,
    /// Width of the middle half as a share of the median.
    pub(crate) spread: f64,
    pub(crate) values: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let samples: Samples = [5.0, 1.0, 3.0, 2.0].into_iter().collect();
        assert_eq!(samples.median(), 2.5);
        assert_eq!((samples.quantile(0.0), samples.quantile(1.0)), (1.0, 5.0));
        assert!((samples.quantile(0.99) - 4.94).abs() < 1e-9);
        assert!((samples.spread() - (3.5 - 1.75) / 2.5).abs() < 1e-9);
        assert!(Samples::default().median().is_nan());
    }

    #[test]
    fn a_ratio_is_taken_run_by_run() {
        let ours: Samples = [1.0, 20.0, 3.0].into_iter().collect();
        let theirs: Samples = [2.0, 40.0, 3.0].into_iter().collect();
        assert_eq!(ours.ratios(&theirs).values(), [0.5, 0.5, 1.0]);
        assert_eq!(ours.ratios(&theirs).median(), 0.5);
    }
}
