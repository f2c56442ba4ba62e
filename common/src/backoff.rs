//! Jittered exponential backoff for reconnecting loops.

use std::time::Duration;

use rand::Rng;

/// Delays that double from `base` to `max`, each drawn from the upper half of its range, so that
/// many clients of one restarted server do not return together.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    attempt: u32,
}

impl Backoff {
    /// Starts at `base`, never waits longer than `max`.
    pub fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, attempt: 0 }
    }

    /// Forgets past failures; call it after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        let full = self.base.saturating_mul(1 << self.attempt.min(16)).min(self.max);
        self.attempt = self.attempt.saturating_add(1);
        full.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_maximum_and_reset() {
        let (base, max) = (Duration::from_millis(100), Duration::from_secs(2));
        let mut backoff = Backoff::new(base, max);
        for attempt in 0..20 {
            let full = base.saturating_mul(1 << attempt.min(16)).min(max);
            let delay = backoff.next_delay();
            assert!(delay >= full / 2 && delay <= full, "attempt {attempt}: {delay:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= base);
    }
}
