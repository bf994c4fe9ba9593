//! Tables that fit a terminal: the last column gives way.

use std::io::{IsTerminal, stdout};

/// Columns that a terminal without a size is taken to have.
const DEFAULT_WIDTH: usize = 80;

/// Rows of cells below their headings.
pub(super) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(headings: &[&'static str]) -> Self {
        Table { headings: headings.to_vec(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table for where stdout goes: as wide as the terminal, or as wide as it is.
    pub(super) fn text(&self) -> String {
        let width = stdout().is_terminal().then(|| match crate::terminal::size().1 {
            0 => DEFAULT_WIDTH,
            columns => columns.into(),
        });
        self.text_within(width)
    }

    fn text_within(&self, width: Option<usize>) -> String {
        let headings: Vec<String> = self.headings.iter().map(|heading| (*heading).to_owned()).collect();
        let length = |cell: &String| cell.chars().count();
        let widths: Vec<usize> = (0..self.headings.len())
            .map(|column| {
                let cells = self.rows.iter().chain([&headings]).filter_map(|row| row.get(column));
                cells.map(length).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                // What users name may hold anything; a table has one line a row.
                let cell: String = cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                line.push_str(&cell);
                if column + 1 < row.len() {
                    let pad = widths.get(column).copied().unwrap_or(0).saturating_sub(cell.chars().count());
                    line.extend(std::iter::repeat_n(' ', pad));
                }
            }
            match width {
                Some(width) if line.chars().count() > width => {
                    text.extend(line.chars().take(width.saturating_sub(1)));
                    text.push('…');
                }
                _ => text.push_str(line.trim_end()),
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_at_the_width() {
        let mut table = Table::new(&["ID", "COMMAND"]);
        table.row(vec!["1".into(), "short".into()]);
        table.row(vec!["1000".into(), "a long\ncommand".into()]);
        assert_eq!(table.text_within(None), "ID    COMMAND\n1     short\n1000  a long command\n");
        assert_eq!(table.text_within(Some(12)), "ID    COMMA…\n1     short\n1000  a lon…\n");
    }
}
