//! One trace from a client through every service: W3C trace context in the metadata of a call.
//!
//! Spans leave a process only where [`crate::telemetry`] exports them. Elsewhere a trace passes
//! through: what came in is what goes on.

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The header's name.
const TRACEPARENT: &str = "traceparent";

/// A carrier of the one header.
#[derive(Default)]
struct Header(String);

impl Injector for Header {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = value;
        }
    }
}

impl Extractor for Header {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0.as_str())
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

/// The traceparent of `span`; empty if spans are not exported.
fn traceparent(span: &Span) -> String {
    let mut header = Header::default();
    TraceContextPropagator::new().inject_context(&span.context(), &mut header);
    header.0
}

/// The traceparent that a call brought along; empty if it brought none.
pub fn incoming(metadata: &MetadataMap) -> &str {
    metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Makes `span`, which must not have been entered yet, a child of the remote span `traceparent`. One
/// that is empty or malformed changes nothing.
pub fn follow(span: &Span, traceparent: &str) {
    let header = Header(traceparent.to_owned());
    let remote = TraceContextPropagator::new().extract_with_context(&Context::new(), &header);
    if remote.has_active_span() {
        // It fails where spans are not exported, and then there is nothing to link.
        let _ = span.set_parent(remote);
    }
}

/// The traceparent of `span`, or where spans are not exported `otherwise`, one that came in.
pub fn traceparent_or(span: &Span, otherwise: &str) -> String {
    let own = traceparent(span);
    if own.is_empty() { otherwise.to_owned() } else { own }
}

/// Sends [`traceparent_or`] along with a call.
pub fn send(span: &Span, otherwise: &str, metadata: &mut MetadataMap) {
    let header = traceparent_or(span, otherwise);
    if !header.is_empty()
        && let Ok(value) = header.parse()
    {
        metadata.insert(TRACEPARENT, value);
    }
}
