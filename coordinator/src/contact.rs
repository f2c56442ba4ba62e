//! Whether silence of others may be held against them: not while the store was away, or this process
//! stood still. Then nobody could renew, and all get the time to do so before they count as gone. Pure:
//! `now` is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// The store's answers.
#[derive(Debug)]
pub(crate) struct Contact {
    /// Longer than this between two answers is a pause.
    most: Duration,
    last: Instant,
    /// When answers came again after a pause.
    back: Option<Instant>,
}

impl Contact {
    /// An answer came just now; one that is later than `most` comes after a pause. Where others were at
    /// work `before`, nobody knows for how long they could not renew.
    pub(crate) fn new(now: Instant, most: Duration, before: bool) -> Self {
        Self { most, last: now, back: before.then_some(now) }
    }

    /// Something has happened that counts as a pause, e.g. that the store's clock was set.
    pub(crate) fn interrupted(&mut self, now: Instant) {
        self.back = Some(now);
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, now: Instant) {
        if self.is_away(now) {
            self.back = Some(now);
        }
        self.last = now;
    }

    /// Whether everyone has been able to renew for the length of `ttl`.
    pub(crate) fn is_settled(&self, now: Instant, ttl: Duration) -> bool {
        !self.is_away(now) && self.back.is_none_or(|back| now.duration_since(back) >= ttl)
    }

    fn is_away(&self, now: Instant) -> bool {
        now.duration_since(self.last) > self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_gives_everyone_a_full_term_to_renew() {
        let (start, ttl) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contact = Contact::new(start, ttl / 2, false);
        assert!(contact.is_settled(at(0), ttl), "the start of the only one is no pause");
        let beside = Contact::new(start, 2 * ttl, true);
        assert!(!beside.is_settled(at(9), ttl) && beside.is_settled(at(10), ttl));
        contact.answered(at(4));
        assert!(contact.is_settled(at(9), ttl));
        assert!(!contact.is_settled(at(10), ttl), "no answer for longer than half the term");
        contact.answered(at(30));
        for second in 31..40 {
            assert!(!contact.is_settled(at(second), ttl), "{second}");
            contact.answered(at(second));
        }
        assert!(contact.is_settled(at(40), ttl));
        contact.interrupted(at(40));
        contact.answered(at(44));
        assert!(!contact.is_settled(at(44), ttl));
    }
}
