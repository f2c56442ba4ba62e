//! Tests of the engine's thread: bounds, abandoned work, panics.

use std::{fmt::Debug, future::poll_fn, path::Path, pin::Pin, task::Poll};

use super::*;
use crate::{
    evaluate::{AskedConcept, Sample},
    scorer::ScorerError,
    testing::{Fault, Probe, SIDE, TestScorer},
};

fn set() -> ConceptSet {
    let text =
        "anchors = [\"x\"]\nconcept = [{ name = \"axe\", group = \"g\", targets = [\"y\"] }]";
    ConceptSet::parse(Path::new("c.toml"), text).expect("it parses")
}

async fn engine(queue: usize) -> (EngineHandle, Probe) {
    batching(queue, 1).await
}

/// An engine that scores up to `most` images in a pass.
async fn batching(queue: usize, most: usize) -> (EngineHandle, Probe) {
    waiting(Batching { queue, most, wait: Duration::ZERO }).await
}

async fn waiting(batching: Batching) -> (EngineHandle, Probe) {
    let (loader, probe) = TestScorer::loader();
    (start(loader, set(), batching).await.expect("started").handle, probe)
}

fn batch(images: usize) -> Batch {
    Batch {
        pixels: vec![0.3; images * 3 * SIDE * SIDE],
        samples: vec![Sample { crop_seed: 0, gates: None }; images],
        concepts: vec![AskedConcept { index: 0, name: "axe".into(), weight: 1.0 }],
        crops: 1,
        gradient: false,
    }
}

/// Waits until the scorer has begun `count` passes.
async fn until_forwards(probe: &Probe, count: usize) {
    while probe.forwards() < count {
        tokio::task::yield_now().await;
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, RequestError>> + 'a>>;

/// Comes back when the question is in the queue, of an engine that hangs.
async fn queued<'a, T: Debug>(
    question: impl Future<Output = Result<T, RequestError>> + 'a,
) -> Answer<'a, T> {
    let mut answer: Answer<'a, T> = Box::pin(question);
    let first = poll_fn(|context| Poll::Ready(answer.as_mut().poll(context))).await;
    assert!(first.is_pending(), "{first:?}");
    answer
}

async fn ask(engine: &EngineHandle, batch: Batch) -> Answer<'_, Vec<Evaluation>> {
    queued(engine.evaluate(batch)).await
}

#[tokio::test]
async fn work_in_answers_out() {
    let (engine, _) = engine(4).await;
    assert_eq!(engine.evaluate(batch(3)).await.expect("answered").len(), 3);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_recovers() {
    let (engine, probe) = engine(1).await;
    probe.set(Fault::Hang);
    let computing = ask(&engine, batch(1)).await;
    until_forwards(&probe, 1).await;
    let waiting = ask(&engine, batch(1)).await;
    let error = engine.evaluate(batch(1)).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::ResourceExhausted);
    probe.set(Fault::None);
    assert!(computing.await.is_ok() && waiting.await.is_ok());
    assert!(engine.evaluate(batch(1)).await.is_ok());
}

#[tokio::test]
async fn requests_that_wait_together_share_a_pass() {
    let (engine, probe) = batching(8, 4).await;
    let of = |value: f32| Batch { pixels: vec![value; 3 * SIDE * SIDE], ..batch(1) };
    let values = [0.1, 0.4, 0.9];
    let mut alone = Vec::new();
    for value in values {
        alone.push(engine.evaluate(of(value)).await.expect("answered"));
    }
    let before = probe.forwards();
    probe.set(Fault::Hang);
    let computing = ask(&engine, batch(1)).await;
    until_forwards(&probe, before + 1).await;
    let mut together = Vec::new();
    for value in values {
        together.push(ask(&engine, of(value)).await);
    }
    let other = ask(&engine, Batch { crops: 2, ..of(0.5) }).await;
    probe.set(Fault::None);
    for (together, alone) in together.into_iter().zip(alone) {
        let answer = together.await.expect("answered");
        assert_eq!(answer, alone, "each has the answer to its own question");
    }
    assert!(computing.await.is_ok() && other.await.is_ok());
    // What was computing, the three together, and the one that asked for something else.
    assert_eq!(probe.forwards() - before, 3);
}

/// The wait is longer than any test: it ends because the pass is full.
#[tokio::test]
async fn a_request_waits_for_others_to_share_its_pass() {
    let wait = Duration::from_secs(3_600);
    let (engine, probe) = waiting(Batching { queue: 8, most: 3, wait }).await;
    let one = || engine.evaluate(batch(1));
    let (a, b, c) = tokio::join!(one(), one(), one());
    for answer in [a, b, c] {
        assert_eq!(answer.expect("answered").len(), 1);
    }
    assert_eq!(probe.forwards(), 1);
}

#[tokio::test]
async fn a_request_that_stays_alone_is_answered_after_the_wait() {
    let wait = Duration::from_millis(5);
    let (engine, _) = waiting(Batching { queue: 8, most: 3, wait }).await;
    assert_eq!(engine.evaluate(batch(1)).await.expect("answered").len(), 1);
}

#[tokio::test]
async fn abandoned_work_is_not_computed() {
    let (engine, probe) = engine(4).await;
    probe.set(Fault::Hang);
    let computing = ask(&engine, batch(3)).await;
    until_forwards(&probe, 1).await;
    let waiting = ask(&engine, batch(5)).await;
    drop([computing, waiting]);
    probe.set(Fault::None);
    assert!(engine.evaluate(batch(1)).await.is_ok());
    // The first image of the first request, none of the second, and the last request's.
    assert_eq!(probe.forwards(), 2);
}

#[tokio::test]
async fn an_energy_waits_for_a_part_of_a_lesson_only() {
    let (engine, probe) = engine(4).await;
    let text = r#"
        anchors = ["x"]
        concept = [
            { name = "bow", group = "g", targets = ["a"] },
            { name = "cap", group = "g", targets = ["b"] },
            { name = "dog", group = "g", targets = ["c"] },
        ]
    "#;
    let set = ConceptSet::parse(Path::new("more.toml"), text).expect("it parses");
    probe.set(Fault::Hang);
    let computing = ask(&engine, batch(1)).await;
    until_forwards(&probe, 1).await;
    let lesson = queued(engine.learn(set)).await;
    let waiting = ask(&engine, batch(1)).await;
    probe.set(Fault::None);
    lesson.await.expect("learned");
    assert!(computing.await.is_ok() && waiting.await.is_ok());
    assert_eq!(probe.parts(), [1, 2, 2]);
    let concepts = vec![AskedConcept { index: 3, name: "dog".into(), weight: 1.0 }];
    assert!(engine.evaluate(Batch { concepts, ..batch(1) }).await.is_ok());
}

#[tokio::test]
async fn a_panic_ends_scoring_for_good_and_says_so() {
    let (engine, probe) = engine(4).await;
    let mut state = engine.state();
    assert_eq!(*state.borrow_and_update(), EngineState::Serving);
    probe.set(Fault::Panic);
    let first = engine.evaluate(batch(1)).await.expect_err("panicked");
    state.changed().await.expect("the sender lives until it has told");
    probe.set(Fault::None);
    let second = engine.evaluate(batch(1)).await.expect_err("stopped");
    for error in [first, second] {
        assert_eq!(error.code(), tonic::Code::Unavailable);
        assert!(error.to_string().contains("the test asked for a panic"), "{error}");
    }
    assert!(matches!(&*state.borrow(), EngineState::Failed(_)));
}

#[tokio::test]
async fn a_loader_that_fails_or_panics_is_an_error() {
    let failing: ScorerLoader =
        Box::new(|_| Err(ScorerError::Features { phrase: "an axe".to_owned() }));
    let one = Batching { queue: 1, most: 1, wait: Duration::ZERO };
    let error = start(failing, set(), one).await.err().expect("failed");
    assert!(error.to_string().contains("an axe"), "{error}");
    let panicking: ScorerLoader = Box::new(|_| panic!("no such device"));
    let error = start(panicking, set(), one).await.err().expect("failed");
    assert!(error.to_string().contains("no such device"), "{error}");
}
