//! The wall clock, read at the edge only: decisions take `now` as an argument.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch. Leases and registrations use it because they outlive the
/// process in the store; a clock that jumps can only end a lease early, which costs work, never
/// correctness.
pub(crate) fn unix_ms() -> i64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A duration as whole milliseconds, saturating.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
