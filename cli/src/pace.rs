//! How fast work goes and how much longer it takes. Pure: whoever asks says what time it is.

use std::time::{Duration, Instant};

/// The pace of work whose parts are counted as they are done.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    /// When the first part was done: what came before it, loading or waiting, is no measure.
    first: Option<Instant>,
    latest: Option<Instant>,
    /// Parts since the first.
    parts: u64,
}

impl Pace {
    /// Another part was done.
    pub(crate) fn add(&mut self, now: Instant) {
        match self.first {
            None => self.first = Some(now),
            Some(_) => self.parts += 1,
        }
        self.latest = Some(now);
    }

    /// Time of one part, once two are done.
    pub(crate) fn each(&self) -> Option<Duration> {
        let (first, latest) = (self.first?, self.latest?);
        let parts = u32::try_from(self.parts).ok().filter(|&parts| parts > 0)?;
        Some(latest.duration_since(first) / parts)
    }

    /// Time that `parts` more take.
    pub(crate) fn left(&self, parts: u64) -> Option<Duration> {
        Some(self.each()?.saturating_mul(u32::try_from(parts).unwrap_or(u32::MAX)))
    }
}

/// Lets something through every so often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Every {
    period: Duration,
    since: Instant,
}

impl Every {
    /// First after a whole period.
    pub(crate) fn new(period: Duration, now: Instant) -> Self {
        Self { period, since: now }
    }

    /// Whether it is time again.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = now.duration_since(self.since) >= self.period;
        if is_due {
            self.since = now;
        }
        is_due
    }
}

/// "0.25 s", "17 s", "3 min 20 s", "2 h 5 min".
pub(crate) fn words(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let whole = seconds.round() as u64;
    match seconds {
        ..0.1 => format!("{seconds:.3} s"),
        ..10.0 => format!("{seconds:.2} s"),
        ..60.0 => format!("{whole} s"),
        ..3_600.0 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3_600, whole % 3_600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_time_before_the_first_part_counts_for_nothing() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.left(5), None);
        pace.add(start + 100 * SECOND);
        assert_eq!((pace.each(), pace.left(5)), (None, None), "one part has no length");
        pace.add(start + 101 * SECOND);
        pace.add(start + 105 * SECOND);
        assert_eq!(pace.each(), Some(5 * SECOND / 2));
        assert_eq!(pace.left(4), Some(10 * SECOND));
    }

    #[test]
    fn something_is_due_once_a_period() {
        let start = Instant::now();
        let mut every = Every::new(10 * SECOND, start);
        let due: Vec<u32> = (0..40).filter(|&s| every.is_due(start + s * SECOND)).collect();
        assert_eq!(due, [10, 20, 30]);
    }

    #[test]
    fn times_are_told_as_exactly_as_they_matter() {
        for (ms, expected) in [
            (12, "0.012 s"),
            (1_300, "1.30 s"),
            (17_400, "17 s"),
            (200_000, "3 min 20 s"),
            (7_500_000, "2 h 5 min"),
        ] {
            assert_eq!(words(Duration::from_millis(ms)), expected);
        }
    }
}
