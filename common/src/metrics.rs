//! Prometheus metrics of a process: one recorder for all its services, one page over HTTP.
//!
//! Names are `fairlead_<service>_<what>_<unit>`; labels never name jobs, images or users.

use std::{sync::OnceLock, time::Duration};

use axum::{Router, http::header, routing::get};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

/// Upper bounds of the buckets of `_seconds`: from a small model's step to a large model's image.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];
/// Upper bounds of the buckets of `_images`.
const IMAGES: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
/// How often what was measured is moved into its buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// Starts recording. Until then, and in processes that never call it, measuring costs next to nothing.
///
/// # Panics
/// If a constant of this module is wrong.
fn recorder() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_images".into()), &IMAGES))
            .expect("buckets are not empty")
            .build_recorder();
        let handle = recorder.handle();
        // It fails where another recorder was installed, which then has the numbers.
        let _ = metrics::set_global_recorder(recorder);
        handle
    })
}

/// Answers `GET /metrics` on `listener`.
///
/// # Errors
/// If the listener fails.
pub async fn serve(listener: TcpListener) -> std::io::Result<()> {
    let handle = recorder();
    let page = move || async move {
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render())
    };
    let upkeep = async {
        loop {
            tokio::time::sleep(UPKEEP).await;
            handle.run_upkeep();
        }
    };
    let router = Router::new().route("/metrics", get(page));
    tokio::select! {
        served = axum::serve(listener, router).into_future() => served,
        () = upkeep => Ok(()),
    }
}
