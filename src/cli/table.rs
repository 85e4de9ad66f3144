//! Columns for people: as wide as their widest cell, numbers to the right.

/// Which side a column leans on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Lays out a heading and its rows, two spaces between columns, a newline after each row.
pub fn render(columns: &[(&str, Side)], rows: &[Vec<String>]) -> String {
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(index, (name, _))| {
            rows.iter().filter_map(|row| row.get(index)).map(|cell| width(cell)).max().unwrap_or(0).max(width(name))
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for ((cell, &wide), (_, side)) in cells.into_iter().zip(&widths).zip(columns) {
            let gap = " ".repeat(wide.saturating_sub(width(cell)));
            let (before, after) = if *side == Side::Right { (gap.as_str(), "") } else { ("", gap.as_str()) };
            text.push_str(before);
            text.push_str(cell);
            text.push_str(after);
            text.push_str("  ");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    };
    let mut table = line(columns.iter().map(|(name, _)| *name).collect());
    for row in rows {
        table.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_do_not_trail() {
        let rows = vec![vec!["α".into(), "7".into(), "x".into()], vec!["beta".into(), "1234".into(), String::new()]];
        let table = render(&[("id", Side::Left), ("n", Side::Right), ("note", Side::Left)], &rows);
        assert_eq!(table, "id       n  note\nα        7  x\nbeta  1234\n");
    }
}
