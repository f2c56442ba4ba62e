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

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (n > 0).then(|| (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
