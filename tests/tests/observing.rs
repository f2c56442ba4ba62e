//! What operators see: one trace through every process, and metrics of each.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::{Context, Result};
use fairlead_common::grpc;
use fairlead_tests::{
    PATIENCE, Sandbox, command,
    metrics::{get, scrape},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tonic::{Request, Response, Status};

/// A span with the service it comes from.
#[derive(Debug, Clone)]
struct Seen {
    service: String,
    span: Span,
}

/// An OTLP receiver that keeps what it gets.
#[derive(Clone)]
struct Receiver(Arc<watch::Sender<Vec<Seen>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = attributes.into_iter().find(|pair| pair.key == "service.name");
            let service = match name.and_then(|pair| pair.value?.value) {
                Some(Value::StringValue(name)) => name,
                other => return Err(Status::invalid_argument(format!("{other:?}"))),
            };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| Seen { service: service.clone(), span });
            self.0.send_modify(|seen| seen.extend(spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    /// Listens on a free port; the receiver lives as long as the runtime.
    async fn start() -> Result<(Self, String)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let receiver = Self(Arc::new(watch::Sender::new(Vec::new())));
        let service = TraceServiceServer::new(receiver.clone());
        let server = grpc::server().add_service(service);
        tokio::spawn(server.serve_with_incoming(grpc::incoming(listener)));
        Ok((receiver, address))
    }

    /// Waits until what has come satisfies `enough`.
    async fn wait(&self, enough: impl Fn(&[Seen]) -> bool) -> Result<Vec<Seen>> {
        let mut seen = self.0.subscribe();
        let wait = timeout(PATIENCE, seen.wait_for(|seen| enough(seen))).await;
        match wait {
            Ok(seen) => Ok(seen?.clone()),
            Err(_) => {
                let names: BTreeSet<String> = self.0.borrow().iter().map(label).collect();
                anyhow::bail!("not all spans came; there are {names:?}")
            }
        }
    }
}

fn label(seen: &Seen) -> String {
    format!("{} {}", seen.service.trim_start_matches("fairlead-"), seen.span.name)
}

/// For each kind of span the kinds of its parents; `None` while a parent is missing.
fn parents(spans: &[Seen]) -> Option<BTreeMap<String, BTreeSet<String>>> {
    let by_id: BTreeMap<&[u8], &Seen> =
        spans.iter().map(|seen| (&seen.span.span_id[..], seen)).collect();
    let mut parents: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for seen in spans {
        let parent = match &seen.span.parent_span_id[..] {
            [] => "none".to_owned(),
            id => label(by_id.get(id)?),
        };
        parents.entry(label(seen)).or_default().insert(parent);
    }
    Some(parents)
}

fn count(spans: &[Seen], kind: &str) -> usize {
    spans.iter().filter(|seen| label(seen) == kind).count()
}

/// Requests that the worker's calls made: one for the clean estimates of a step, one for each finished
/// image.
fn asked(spans: &[Seen]) -> usize {
    let calls = spans.iter().filter(|seen| label(seen) == "worker energy_call");
    let value = |seen: &Seen, key: &str| {
        let mut pairs = seen.span.attributes.iter().filter(|pair| pair.key == key);
        pairs.next().and_then(|pair| pair.value.clone()?.value)
    };
    let requests = calls.map(|seen| match (value(seen, "call"), value(seen, "images")) {
        (Some(Value::StringValue(call)), Some(Value::IntValue(images))) if call == "check" => {
            images as usize
        }
        _ => 1,
    });
    requests.sum()
}

#[tokio::test]
async fn one_trace_leads_from_the_command_to_every_energy_call() -> Result<()> {
    let (receiver, otlp) = Receiver::start().await?;
    let sandbox = Sandbox::emojiland_observed(&otlp).await?;
    let mut generate = command();
    generate
        .args(["generate", "a kitchen knife", "--seed", "11", "-n", "2"])
        .args(["--server", sandbox.address(), "--otlp", &otlp])
        .current_dir(sandbox.folder());
    let output = timeout(PATIENCE, generate.output()).await??;
    assert!(output.status.success(), "{output:?}");

    // The command's span is sent last, when it ends; the services' may still be on their way.
    let spans = receiver
        .wait(|spans| {
            count(spans, "fairlead generate") == 1
                && count(spans, "worker shard") == 1
                && parents(spans).is_some()
                && count(spans, "coordinator release") == 2
                && count(spans, "energy evaluate") > 20
                // Every call has arrived with its answer.
                && count(spans, "energy evaluate") + count(spans, "energy check")
                    == asked(spans) + count(spans, "coordinator check")
        })
        .await?;
    let traces: BTreeSet<&[u8]> = spans.iter().map(|seen| &seen.span.trace_id[..]).collect();
    assert_eq!(traces.len(), 1, "more than one trace");
    let expected = [
        ("fairlead generate", &["none"][..]),
        ("coordinator submit_job", &["fairlead generate"]),
        ("coordinator release", &["coordinator submit_job"]),
        ("coordinator check", &["coordinator release"]),
        ("worker shard", &["coordinator submit_job"]),
        ("worker step", &["worker shard"]),
        ("worker energy_call", &["worker shard", "worker step"]),
        ("energy evaluate", &["worker energy_call"]),
        ("energy check", &["coordinator check", "worker energy_call"]),
    ];
    let expected: BTreeMap<String, BTreeSet<String>> = expected
        .into_iter()
        .map(|(kind, parents)| (kind.to_owned(), parents.iter().map(|&p| p.to_owned()).collect()))
        .collect();
    assert_eq!(parents(&spans).context("every parent is there")?, expected);
    let steps = count(&spans, "worker step");
    assert!(steps >= 25, "{steps} steps");

    let metrics = metrics(&sandbox).await?;
    let value = |name: &str| metrics.get(name).copied().with_context(|| format!("no {name}"));
    assert_eq!(value("fairlead_coordinator_jobs_admitted_total")?, 1.0);
    assert_eq!(value("fairlead_coordinator_jobs_total{state=\"completed\"}")?, 1.0);
    assert_eq!(value("fairlead_coordinator_deliveries_total{outcome=\"committed\"}")?, 1.0);
    assert_eq!(value("fairlead_coordinator_workers")?, 1.0);
    assert_eq!(value("fairlead_coordinator_energy_nodes")?, 1.0);
    assert_eq!(value("fairlead_worker_denoise_seconds_count")?, steps as f64);
    let asked = value("fairlead_worker_energy_call_seconds_count{call=\"evaluate\"}")?;
    assert_eq!(asked, count(&spans, "energy evaluate") as f64);
    assert_eq!(value("fairlead_energy_requests_total{call=\"evaluate\",code=\"Ok\"}")?, asked);
    assert!(value("fairlead_worker_corrections_total")? > 0.0);
    assert!(value("fairlead_energy_gates_open_total{concept=\"kitchen-knife\"}")? > 0.0);
    assert!(metrics.keys().all(|name| name.starts_with("fairlead_")), "{metrics:?}");
    Ok(())
}

/// All services' metrics by name with labels.
async fn metrics(sandbox: &Sandbox) -> Result<BTreeMap<String, f64>> {
    let mut metrics = BTreeMap::new();
    assert_eq!(sandbox.metrics().len(), 3);
    for (name, url) in sandbox.metrics() {
        for (key, value) in scrape(url).await? {
            assert!(metrics.insert(key.clone(), value).is_none(), "{name}: {key} twice");
        }
        let address = url.trim_start_matches("http://").trim_end_matches("/metrics");
        let other = get(address, "/").await?;
        assert!(other.starts_with("HTTP/1.1 404"), "{name}: {other}");
    }
    Ok(metrics)
}
