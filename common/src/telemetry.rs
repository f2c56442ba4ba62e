//! Logs and traces, set up the same for every process.

use std::{
    io::{self, IsTerminal},
    str::FromStr,
    time::Duration,
};

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::{Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::filter_fn,
    fmt::{self, MakeWriter},
    prelude::*,
    registry::LookupSpan,
};

use crate::text;

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
        LogFormat::Human => boxed(human(colours(), io::stderr)),
        LogFormat::Json => boxed(json(io::stderr)),
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

/// Lines for people.
fn human<S, W>(colours: bool, writer: W) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let safe = if colours { text::printable_coloured_line } else { text::printable_line };
    fmt::layer().with_ansi(colours).with_writer(Lines { writer, safe })
}

/// One JSON object a line.
fn json<S, W>(writer: W) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    fmt::layer().json().with_writer(Lines { writer, safe: text::printable_json_line })
}

/// Writes each event as one line in which nothing acts on a terminal, whatever its fields hold.
struct Lines<W> {
    writer: W,
    safe: fn(&str) -> String,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Lines<W> {
    type Writer = Line<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { writer: self.writer.make_writer(), safe: self.safe }
    }
}

/// Writes one event, which comes in one piece.
struct Line<W> {
    writer: W,
    safe: fn(&str) -> String,
}

impl<W: io::Write> io::Write for Line<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.writer.write_all((self.safe)(&String::from_utf8_lossy(event)).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing_subscriber::Registry;

    use super::*;

    /// Keeps what is written.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged of an event with `text` in its message and in its fields.
    fn logged(
        text: &str,
        layer: impl FnOnce(Kept) -> Box<dyn Layer<Registry> + Send + Sync>,
    ) -> String {
        let kept = Kept::default();
        let subscriber = tracing_subscriber::registry().with(layer(kept.clone()));
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("span", spanned = text).entered();
            tracing::info!(name = text, shown = %text, debugged = ?text, "of {text}");
        });
        let bytes = kept.0.lock().clone();
        String::from_utf8(bytes).expect("it is text")
    }

    #[test]
    fn an_event_is_one_line_that_acts_on_no_terminal() {
        let text =
            "a\x1b]52;c;eA==\x07\x1b[2J\u{9b}2J\r\n2026 INFO forged\u{202e}\u{200b}\u{e0041}b";
        let kept = |kept: Kept| move || kept.clone();
        let plain = logged(text, |w| Box::new(human(false, kept(w))));
        let coloured = logged(text, |w| Box::new(human(true, kept(w))));
        let json = logged(text, |w| Box::new(json(kept(w))));
        for line in [&plain, &json] {
            let hidden = line.trim_end_matches('\n').chars().find(|&c| text::is_hidden(c));
            assert_eq!(hidden, None, "{line:?}");
        }
        let line = coloured.strip_suffix('\n').expect("a line");
        let codes = line.split('\x1b').skip(1);
        for code in codes {
            let end = code.find(|c: char| c != '[' && c != ';' && !c.is_ascii_digit());
            assert_eq!(end.map(|end| &code[end..=end]), Some("m"), "{line:?} only sets colours");
        }
        assert!(!line.replace('\x1b', "").chars().any(text::is_hidden), "{line:?}");
        let json: serde_json::Value = serde_json::from_str(&json).expect("it is still JSON");
        assert_eq!(json["fields"]["name"], text);
    }
}
