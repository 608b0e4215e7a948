//! Columns aligned by blanks: no borders, no wrapping, no blanks at the end of a line, so that
//! a pipe gets the same lines that a terminal shows.

const GAP: &str = "   ";
/// A terminal that says it is narrower does not know.
const WIDTH_MIN: u16 = 20;

/// A table whose header is in capitals.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns and no rows.
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row; one cell for each column.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.rows[0].len(), "a row has as many cells as the header");
        self.rows.push(cells);
    }

    /// The lines, each with its newline; cut at the terminal's width when stdout is one.
    pub(crate) fn render(&self) -> String {
        self.cut_at(terminal_width())
    }

    /// A cell's own line breaks become blanks.
    fn cut_at(&self, width_max: usize) -> String {
        let columns = self.rows[0].len();
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                if !line.is_empty() {
                    line.push_str(GAP);
                }
                line.push_str(&cell.replace(['\n', '\r', '\t'], " "));
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
            }
            let line = line.trim_end();
            match line.char_indices().nth(width_max) {
                Some(_) => {
                    text.extend(line.chars().take(width_max - 1));
                    text.push('…');
                }
                None => text.push_str(line),
            }
            text.push('\n');
        }
        text
    }
}

/// Characters in a line; no limit where stdout is no terminal.
fn terminal_width() -> usize {
    // The tests look at whole lines, wherever they run.
    if cfg!(test) {
        return usize::MAX;
    }
    match rustix::termios::tcgetwinsize(rustix::stdio::stdout()) {
        Ok(size) if size.ws_col >= WIDTH_MIN => usize::from(size.ws_col),
        _ => usize::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_align_and_lines_end_clean() {
        let mut table = Table::new(&["NAME", "STATE", "WHY"]);
        table.row(vec!["web1".into(), "running".into(), String::new()]);
        table.row(vec!["größe".into(), "x".into(), "two\nlines".into()]);
        let expected = "NAME    STATE     WHY\nweb1    running\ngröße   x         two lines\n";
        assert_eq!(table.cut_at(usize::MAX), expected);
        assert_eq!(table.cut_at(22).lines().last(), Some("größe   x         two…"));
    }
}
