//! Plain tables for terminals: columns as wide as their widest cell, two spaces apart, no rules.

use std::fmt;

/// Which side of its column a cell sits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A header and rows of the same number of cells.
#[derive(Debug, Clone)]
pub struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a header: the names of the columns.
    pub fn new<const COLUMNS: usize>(columns: [(&str, Align); COLUMNS]) -> Self {
        let header = columns.iter().map(|(name, _)| (*name).to_string()).collect();
        Table { align: columns.iter().map(|(_, align)| *align).collect(), rows: vec![header] }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..self.align.len()).map(width).collect()
    }
}

/// Lines without trailing spaces; ends with a newline.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.align) {
                match align {
                    Align::Left => line.push_str(&format!("{cell:<width$}  ")),
                    Align::Right => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must() {
        let mut table = Table::new([("", Align::Left), ("loss", Align::Right)]);
        table.row(["base".into(), "3.5".into()]);
        table.row(["größer".into(), "12.25".into()]);
        table.row(["none".into()]);
        let expected = "         loss\nbase      3.5\ngrößer  12.25\nnone\n";
        assert_eq!(table.to_string(), expected);
    }
}
