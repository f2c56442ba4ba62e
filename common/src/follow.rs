//! Files that are read again while a process runs: policies, certificates, calibrations.

use std::{fmt::Display, sync::Arc, time::Duration};

/// How often files are looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Calls `look` every two seconds, on a thread that may block. It says whether `what` changed. What cannot
/// be used must change nothing: the error is logged once, and told to `failed`. It never ends.
pub async fn follow<E: Display + Send + 'static>(
    what: &'static str,
    look: impl Fn() -> Result<bool, E> + Send + Sync + 'static,
    failed: impl Fn() + Send,
) {
    let look = Arc::new(look);
    let mut told = String::new();
    loop {
        tokio::time::sleep(PERIOD).await;
        let look = Arc::clone(&look);
        match tokio::task::spawn_blocking(move || look()).await {
            Ok(Ok(changed)) => {
                told.clear();
                if changed {
                    tracing::info!("{what} read again");
                }
            }
            Ok(Err(error)) if error.to_string() != told => {
                told = error.to_string();
                failed();
                tracing::error!(%error, "{what}: not usable, what was read before stays");
            }
            Ok(Err(_)) => {}
            Err(panic) => tracing::error!(%panic, "{what}: reading them panicked"),
        }
    }
}
