//! The figures of a group as points: one SVG a group, a row a figure, each side's median as a ratio to the peer's (or to
//! the host's own, or to the software engine's, where there is no peer) on a logarithmic scale.

use std::path::Path;

use anyhow::{Context as _, Result};
use plotters::prelude::*;

use super::report::{Figure, GroupReport};

const WIDTH: u32 = 1000;
const ROW: u32 = 30;
const MARGIN: u32 = 90;
const LABELS: u32 = 360;

/// Name and colour of a side, and how its median is found.
type Side = (&'static str, RGBColor, fn(&Figure) -> Option<f64>);

const SIDES: &[Side] = &[
    ("Harrier soft", RGBColor(31, 119, 180), |figure| Some(figure.soft.median())),
    ("Harrier kvm", RGBColor(44, 160, 44), |figure| Some(figure.kvm.as_ref()?.median())),
    ("QEMU TCG", RGBColor(214, 120, 20), |figure| Some(figure.peer.as_ref()?.median())),
    ("native", RGBColor(120, 120, 120), |figure| Some(figure.native.as_ref()?.median())),
];

/// Writes `<folder>/<group>.svg`.
pub(crate) fn write(report: &GroupReport, folder: &Path) -> Result<()> {
    let rows: Vec<(&Figure, Vec<Option<f64>>)> =
        report.figures.iter().filter_map(|figure| ratios(figure).map(|ratios| (figure, ratios))).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let path = folder.join(format!("{}.svg", report.name));
    draw(report.name, &rows, &path)
        .map_err(|text| anyhow::anyhow!(text))
        .with_context(|| format!("cannot plot {}", path.display()))
}

/// Each side's median divided by the reference's; `None` for a figure that stands alone.
fn ratios(figure: &Figure) -> Option<Vec<Option<f64>>> {
    let medians: Vec<Option<f64>> = SIDES
        .iter()
        .map(|(_, _, median)| median(figure).filter(|value| value.is_finite() && *value > 0.0))
        .collect();
    if medians.iter().flatten().count() < 2 {
        return None;
    }
    let reference = medians
        .get(2)
        .copied()
        .flatten()
        .or(medians.get(3).copied().flatten())
        .or(medians.first().copied().flatten())?;
    Some(medians.iter().map(|median| median.map(|value| value / reference)).collect())
}

fn draw(name: &str, rows: &[(&Figure, Vec<Option<f64>>)], path: &Path) -> Result<(), String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
    let height = count.saturating_mul(ROW).saturating_add(MARGIN);
    let values = || rows.iter().flat_map(|(_, ratios)| ratios.iter().flatten().copied());
    let low = values().fold(0.5, f64::min) * 0.8;
    let high = values().fold(2.0, f64::max) * 1.5;
    // The first row is on top.
    let place = |row: usize| f64::from(count) - 0.5 - row as f64;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(|error| said(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{name}: ratio to QEMU TCG, else to native"), ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(LABELS)
        .build_cartesian_2d((low..high).log_scale(), 0.0..f64::from(count))
        .map_err(|error| said(&error))?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().draw().map_err(|error| said(&error))?;
    for (row, (figure, _)) in rows.iter().enumerate() {
        let (_, y) = chart.backend_coord(&(low, place(row)));
        let text = format!("{} ({})", figure.name, figure.unit.text());
        area.draw(&Text::new(text, (20, y - 7), ("sans-serif", 14))).map_err(|error| said(&error))?;
    }
    for (side, (label, color, _)) in SIDES.iter().enumerate() {
        let points: Vec<(f64, f64)> = rows
            .iter()
            .enumerate()
            .filter_map(|(row, (_, ratios))| Some((ratios.get(side).copied().flatten()?, place(row))))
            .collect();
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 7, color.filled())))
            .map_err(|error| said(&error))?
            .label(*label)
            .legend(move |(x, y)| Circle::new((x + 8, y), 6, color.filled()));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|error| said(&error))?;
    area.present().map_err(|error| said(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Unit;

    #[test]
    fn a_group_becomes_one_file_with_every_figure_that_can_be_compared() {
        let samples = |value: f64| [value].into_iter().collect();
        let report = GroupReport {
            name: "test",
            figures: vec![
                Figure::new("with a peer", Unit::CpuMs, samples(4.0)).peer(samples(2.0)).kvm(samples(1.0)),
                Figure::new("only native", Unit::CpuMs, samples(4.0)).native(samples(1.0)),
                Figure::new("alone", Unit::CpuMs, samples(4.0)),
            ],
            remarks: Vec::new(),
        };
        let folder = tempfile::tempdir().unwrap();
        write(&report, folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("test.svg")).unwrap();
        assert!(text.contains("with a peer (ms cpu)") && text.contains("only native"), "{text}");
        assert!(!text.contains("alone"), "{text}");
        assert!(text.contains("Harrier kvm"));
    }

    #[test]
    fn the_peer_is_the_reference_then_native_then_the_software_engine() {
        let samples = |value: f64| [value].into_iter().collect();
        let figure = Figure::new("x", Unit::CpuMs, samples(4.0)).native(samples(1.0));
        assert_eq!(ratios(&figure), Some(vec![Some(4.0), None, None, Some(1.0)]));
        assert_eq!(ratios(&figure.peer(samples(2.0))), Some(vec![Some(2.0), None, Some(1.0), Some(0.5)]));
    }
}
