//! Logs and traces, set up the same for every process.

use std::{io::IsTerminal, str::FromStr, time::Duration};

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::{Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, prelude::*, registry::LookupSpan,
};

/// Time the last spans have to leave when a process ends.
const FLUSH: Duration = Duration::from_secs(5);

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(format!("log format `{other}` is not one of: human, json")),
        }
    }
}

/// What a process tells about itself.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// How log lines, on standard error, look.
    pub format: LogFormat,
    /// Which are written; `FAIRLEAD_LOG` or `RUST_LOG` takes precedence.
    pub filter: &'a str,
    /// `service.name` of the spans, unless `OTEL_SERVICE_NAME` says another.
    pub service: &'static str,
    /// Where spans go: the gRPC endpoint of an OTLP receiver, "http://host:4317".
    pub otlp: Option<&'a str>,
}

/// Telemetry of the process; [`Telemetry::stop`] sends the last spans.
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Installs the process's subscriber. Called inside a tokio runtime, which carries the spans.
///
/// # Errors
/// If `otlp` is no endpoint.
pub fn init(options: Options<'_>) -> Result<Telemetry, OtlpError> {
    let filter = EnvFilter::try_from_env("FAIRLEAD_LOG")
        .or_else(|_| EnvFilter::try_from_default_env())
        .unwrap_or_else(|_| EnvFilter::new(options.filter));
    let provider = options.otlp.map(|endpoint| provider(endpoint, options.service)).transpose()?;
    let spans = provider.as_ref().map(|provider| {
        let tracer = provider.tracer("fairlead");
        tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_filter(LevelFilter::INFO)
            .with_filter(filter_fn(ours))
    });
    let lines = match options.format {
        LogFormat::Human => boxed(fmt::layer().with_ansi(colours()).with_writer(std::io::stderr)),
        LogFormat::Json => boxed(fmt::layer().json().with_writer(std::io::stderr)),
    };
    // A second call (several services in one test process) keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(spans).with(lines.with_filter(filter)).try_init();
    Ok(Telemetry { provider })
}

/// Whether lines go to somebody who sees colours, and wants them (<https://no-color.org>).
fn colours() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stderr().is_terminal() && !unwanted
}

impl Telemetry {
    /// Sends the spans that wait, for a few seconds at the most. Without an exporter it does nothing.
    pub async fn stop(self) {
        let Some(provider) = self.provider else { return };
        let stopped = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH));
        match stopped.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not exported"),
            Err(error) => tracing::warn!(%error, "the exporter of spans failed"),
        }
    }
}

/// Only this project's spans: the transport's would be traced through the exporter itself.
fn ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("fairlead")
}

fn boxed<S>(layer: impl Layer<S> + Send + Sync) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    Box::new(layer)
}

fn provider(endpoint: &str, service: &'static str) -> Result<SdkTracerProvider, OtlpError> {
    let exporter =
        SpanExporter::builder().with_tonic().with_endpoint(endpoint).build().map_err(|source| {
            OtlpError { endpoint: endpoint.to_owned(), problem: source.to_string() }
        })?;
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(service);
    }
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource.build())
        .build())
}

/// An endpoint that spans cannot be sent to.
#[derive(Debug, thiserror::Error)]
#[error(
    "--otlp or OTEL_EXPORTER_OTLP_ENDPOINT is `{endpoint}`: {problem}; give a receiver's gRPC endpoint, \
     http://host:4317, or leave it empty"
)]
pub struct OtlpError {
    endpoint: String,
    problem: String,
}
