//! Signals: the first asks for a graceful stop, a second exits at once.

use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGINT or SIGTERM. A second signal exits the process
/// with status 130.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let stop = token.clone();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        for count in 0.. {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if count > 0 {
                tracing::warn!("second signal, exiting without waiting");
                std::process::exit(130);
            }
            tracing::info!("stopping; a second signal exits at once");
            stop.cancel();
        }
    });
    Ok(token)
}
