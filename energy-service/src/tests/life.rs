//! Start, load, overload, breakage and stop.

use std::time::Duration;

use fairlead_proto::v1::energy_service_server;
use tokio::sync::oneshot;
use tonic::Code;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::*;
use crate::{ScorerError, testing::Fault};

#[tokio::test]
async fn a_loading_node_answers_that_it_is_not_ready() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (loader, _) = TestScorer::loader();
    let slow: ScorerLoader = Box::new(move |set| {
        released.recv().expect("the test releases the loader");
        loader(set)
    });
    let folder = folder();
    let mut node = TestNode::spawn(options(folder.path()), slow).await;
    assert_eq!(node.health("").await.expect("answered"), ServingStatus::NotServing);
    let status = node.client.describe(DescribeRequest {}).await.expect_err("loading");
    assert_refused(&status, Code::Unavailable, "still loading");
    let unknown = node.health("fairlead.concept.axe").await.expect_err("not known yet");
    assert_eq!(unknown.code(), Code::NotFound);
    release.send(()).expect("the loader waits");
    node.until("fairlead.concept.axe", ServingStatus::Serving).await;
    node.describe().await;
}

#[tokio::test]
async fn a_node_that_cannot_start_says_why() {
    let folder = folder();
    let failing: ScorerLoader =
        Box::new(|_| Err(ScorerError::Features { phrase: "an axe".into() }));
    let node = TestNode::spawn(options(folder.path()), failing).await;
    let error = node.task.await.expect("no panic").expect_err("ended").to_string();
    assert!(error.contains("did not load") && error.contains("an axe"), "{error}");

    let start = async |change: fn(&mut EnergyOptions)| {
        let mut options = options(folder.path());
        change(&mut options);
        let node = TestNode::spawn(options, TestScorer::loader().0).await;
        node.task.await.expect("no panic").expect_err("ended").to_string()
    };
    for (part, change) in [
        ("--crops is 0", (|o| o.crops = 0) as fn(&mut EnergyOptions)),
        ("--queue is 0", |o| o.queue = 0),
        ("--node-id `` must be", |o| o.node_id.clear()),
        ("/nowhere/c.toml", |o| o.concepts = vec!["/nowhere/c.toml".into()]),
        ("--coordinator: `not a uri`", |o| o.coordinator = Some("not a uri".into())),
        ("--advertise `no uri` is not", |o| o.advertise = Some("no uri".into())),
    ] {
        let error = start(change).await;
        assert!(error.contains(part), "{part}: {error}");
    }
    let broken = folder.path().join("calibrations");
    fs::create_dir(&broken).expect("made");
    fs::write(broken.join("broken.json"), "{").expect("written");
    let error = start(|_| {}).await;
    assert!(error.contains("broken.json") && error.contains("fairlead calibrate"), "{error}");
}

#[tokio::test]
async fn a_model_folder_that_is_none_is_named() {
    let folder = folder();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let run = crate::run(listener, options(folder.path()), CancellationToken::new());
    let error = run.await.expect_err("no model there").to_string();
    assert!(error.contains(&*folder.path().to_string_lossy()), "{error}");
}

#[tokio::test]
async fn an_address_nobody_can_reach_is_not_advertised() {
    let folder = folder();
    let options =
        EnergyOptions { coordinator: Some("http://127.0.0.1:1".into()), ..options(folder.path()) };
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a port");
    let loader = TestScorer::loader().0;
    let run = run_with_scorer(listener, options, loader, CancellationToken::new());
    let error = run.await.expect_err("refused").to_string();
    assert!(error.contains("--advertise is needed"), "{error}");
}

#[tokio::test]
async fn health_has_a_name_per_concept_and_reflection_lists_the_services() {
    let folder = folder();
    let (mut node, _) = TestNode::start(options(folder.path())).await;
    for service in ["", energy_service_server::SERVICE_NAME, "fairlead.concept.skull"] {
        assert_eq!(node.health(service).await.expect(service), ServingStatus::Serving);
    }
    assert_eq!(
        node.health("fairlead.concept.hat").await.expect_err("unknown").code(),
        Code::NotFound
    );

    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(node.channel.clone());
    let answers = client.server_reflection_info(tokio_stream::iter([list])).await;
    let answer = answers.expect("answered").into_inner().message().await.expect("a message");
    let Some(MessageResponse::ListServicesResponse(list)) =
        answer.expect("one answer").message_response
    else {
        panic!("a list of services")
    };
    let names = list.service.into_iter().map(|service| service.name).collect::<Vec<_>>();
    for service in ["fairlead.v1.EnergyService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{service} in {names:?}");
    }
}

#[tokio::test]
async fn a_full_queue_is_said_at_once() {
    let folder = folder();
    let options = EnergyOptions { queue: 1, max_batch: Some(1), ..options(folder.path()) };
    let (mut node, probe) = TestNode::start(options).await;
    let request = EvaluateRequest { scores_only: true, ..node.request(&[benign(1)]).await };
    probe.set(Fault::Hang);
    let (answers, mut answered) = tokio::sync::mpsc::channel(8);
    for _ in 0..3 {
        let (mut client, request, answers) =
            (node.client.clone(), request.clone(), answers.clone());
        tokio::spawn(async move { answers.send(client.evaluate(request).await).await });
    }
    // One computes or waits for the thread, one waits in the queue: the third is refused.
    let refused = answered.recv().await.expect("an answer").expect_err("the queue is full");
    assert_refused(&refused, Code::ResourceExhausted, "1 requests wait");
    probe.set(Fault::None);
    drop(answers);
    while let Some(answer) = answered.recv().await {
        if let Err(status) = answer {
            assert_eq!(status.code(), Code::ResourceExhausted);
        }
    }
    assert!(node.evaluate(request).await.is_ok());
}

#[tokio::test]
async fn a_call_past_its_deadline_ends_and_the_node_serves_on() {
    let folder = folder();
    let (mut node, probe) = TestNode::start(options(folder.path())).await;
    let request = EvaluateRequest { scores_only: true, ..node.request(&[benign(1)]).await };
    probe.set(Fault::Hang);
    let mut late = tonic::Request::new(request.clone());
    late.set_timeout(Duration::from_millis(50));
    let status = node.client.evaluate(late).await.expect_err("late");
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
    probe.set(Fault::None);
    node.evaluate(request).await.expect("answered");
}

#[tokio::test]
async fn a_panic_of_the_model_ends_serving_but_not_the_node() {
    let folder = folder();
    let (mut node, probe) = TestNode::start(options(folder.path())).await;
    let request = EvaluateRequest { scores_only: true, ..node.request(&[benign(1)]).await };
    probe.set(Fault::Panic);
    let status = node.evaluate(request.clone()).await.expect_err("panicked");
    assert_refused(&status, Code::Unavailable, "the test asked for a panic");
    for service in ["", "fairlead.v1.EnergyService", "fairlead.concept.axe"] {
        node.until(service, ServingStatus::NotServing).await;
    }
    probe.set(Fault::None);
    let status = node.evaluate(request).await.expect_err("stopped");
    assert_refused(&status, Code::Unavailable, "restart it");
    assert!(!node.task.is_finished());
}

#[tokio::test]
async fn a_shutdown_ends_the_node_in_order_even_while_it_loads() {
    let folder = folder();
    let (node, _) = TestNode::start(options(folder.path())).await;
    node.shutdown.cancel();
    node.task.await.expect("no panic").expect("stopped in order");

    let (_release, released) = std::sync::mpsc::channel::<()>();
    let stuck: ScorerLoader = Box::new(move |_| {
        let _ = released.recv();
        Err(ScorerError::Features { phrase: "never loaded".into() })
    });
    let node = TestNode::spawn(options(folder.path()), stuck).await;
    node.shutdown.cancel();
    node.task.await.expect("no panic").expect("stopped in order");
}

#[tokio::test]
async fn a_call_in_flight_at_shutdown_is_answered() {
    let folder = folder();
    let (mut node, probe) = TestNode::start(options(folder.path())).await;
    let request = EvaluateRequest { scores_only: true, ..node.request(&[benign(1)]).await };
    probe.set(Fault::Hang);
    let (sent, answer) = oneshot::channel();
    let mut client = node.client.clone();
    tokio::spawn(async move { sent.send(client.evaluate(request).await).map_err(drop) });
    while probe.forwards() == 0 {
        tokio::task::yield_now().await;
    }
    node.shutdown.cancel();
    probe.set(Fault::None);
    assert!(answer.await.expect("answered").is_ok());
    node.task.await.expect("no panic").expect("stopped in order");
}
