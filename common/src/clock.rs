//! The machine's clock, read at the edge only.

use std::time::{SystemTime, UNIX_EPOCH};

/// The machine's time, milliseconds since the Unix epoch.
pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
