//! The table.

/// One line of it.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) goal: f64,
    /// Seconds of each run.
    pub(crate) ours: Vec<f64>,
    /// Seconds of each run of torch; empty when it was skipped.
    pub(crate) theirs: Vec<f64>,
    /// Peak memory in bytes, ours and torch's.
    pub(crate) memory: (Option<u64>, Option<Option<u64>>),
}

/// Prints the head.
pub(crate) fn header(threads: usize, rounds: usize) {
    println!(
        "f32, {threads} threads, {rounds} runs in turns; medians, least time in brackets, peak memory of the process"
    );
    println!(
        "{:<18} {:>20} {:>20} {:>7} {:>6} {:>9} {:>9}",
        "case", "ours ms", "torch ms", "ratio", "goal", "ours MB", "torch MB"
    );
}

/// Prints a line.
pub(crate) fn row(row: &Row) {
    let times = |times: &[f64]| match median(times) {
        Some(median) => format!(
            "{:.1} ({:.1})",
            1e3 * median,
            1e3 * times.iter().copied().fold(f64::INFINITY, f64::min)
        ),
        None => "skipped".into(),
    };
    let ratio = match (median(&row.ours), median(&row.theirs)) {
        (Some(ours), Some(theirs)) => format!("{:.2}", ours / theirs),
        _ => "-".into(),
    };
    let megabytes =
        |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| (bytes / 1_000_000).to_string());
    println!(
        "{:<18} {:>20} {:>20} {ratio:>7} {:>6} {:>9} {:>9}",
        row.name,
        times(&row.ours),
        times(&row.theirs),
        row.goal,
        megabytes(row.memory.0),
        megabytes(row.memory.1.flatten()),
    );
}

/// Prints a Markdown table whose first column is text and the others numbers.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].as_str()).chain([head[column]]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default().max(3)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[&str]| {
        let cell = |(i, (cell, width)): (usize, (&&str, &usize))| match i {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        };
        let cells: Vec<String> = cells.iter().zip(&widths).enumerate().map(cell).collect();
        println!("| {} |", cells.join(" | "));
    };
    line(head);
    let rule = |(i, width): (usize, &usize)| match i {
        0 => "-".repeat(*width),
        _ => format!("{}:", "-".repeat(width - 1)),
    };
    let rules: Vec<String> = widths.iter().enumerate().map(rule).collect();
    line(&rules.iter().map(String::as_str).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(&row.iter().map(String::as_str).collect::<Vec<_>>()));
}

/// The value that a share `q` of `values` stays at or below.
pub(crate) fn percentile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (n > 0).then(|| (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::{median, percentile};

    #[test]
    fn percentiles() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
        assert_eq!(percentile(&hundred, 0.5), Some(50.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
