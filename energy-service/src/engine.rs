//! The scorer on its own thread, behind a bounded queue.
//!
//! Async code sends work and waits; the thread computes, and takes what has come meanwhile together, or
//! comes within a short wait. Between two passes it learns a part of the concepts that are to be learned.
//! Work whose caller is gone (a deadline passed, a connection closed) is dropped before or between
//! its passes. A panic of the scorer ends the engine for good: what a broken model says next is no
//! verdict.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};
use tracing::Span;

use crate::{
    concepts::ConceptSet,
    error::{Error, RequestError},
    evaluate::{Batch, Evaluation, evaluate},
    metrics,
    scorer::{Learned, Scorer, ScorerDescription, ScorerLoader},
};

/// Whether the engine can score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineState {
    Serving,
    /// The scorer panicked; the message says how.
    Failed(String),
}

struct Work {
    batch: Batch,
    reply: oneshot::Sender<Result<Vec<Evaluation>, RequestError>>,
    span: Span,
    since: Instant,
}

/// Concepts that the scorer is to learn.
struct Lesson {
    set: ConceptSet,
    reply: oneshot::Sender<Result<(), RequestError>>,
}

enum Message {
    Evaluate(Work),
    Learn(Lesson),
}

impl Message {
    fn refuse(self, reason: &str) {
        match self {
            Self::Evaluate(work) => work.refuse(reason),
            Self::Learn(lesson) => lesson.refuse(reason),
        }
    }
}

impl Lesson {
    /// As [`Work::refuse`].
    fn refuse(self, reason: &str) {
        let _ = self.reply.send(Err(RequestError::Stopped(reason.to_owned())));
    }

    /// Has `scorer` learn a part; returns the lesson if there is more. The error is the message of a panic.
    fn give(self, scorer: &mut dyn Scorer) -> Result<Option<Self>, String> {
        match catch_unwind(AssertUnwindSafe(|| scorer.learn(&self.set))) {
            Ok(Ok(Learned::Part)) => Ok(Some(self)),
            Ok(learned) => {
                // Whoever asked waits to the end.
                let _ = self.reply.send(learned.map(drop).map_err(RequestError::from));
                Ok(None)
            }
            Err(panic) => {
                let reason = format!("the energy model panicked: {}", panic_message(&*panic));
                self.refuse(&reason);
                Err(reason)
            }
        }
    }
}

impl Work {
    /// Answers that the engine has stopped. A caller that is gone needs no answer.
    fn refuse(self, reason: &str) {
        let _ = self.reply.send(Err(RequestError::Stopped(reason.to_owned())));
    }
}

/// Hands work to the engine; cheap to clone. The thread ends with the last handle.
#[derive(Debug, Clone)]
pub(crate) struct EngineHandle {
    inbox: mpsc::SyncSender<Message>,
    /// Requests that the inbox holds at most.
    queue: usize,
    state: watch::Receiver<EngineState>,
}

impl EngineHandle {
    /// Scores a batch. Dropping the future abandons it.
    pub(crate) async fn evaluate(&self, batch: Batch) -> Result<Vec<Evaluation>, RequestError> {
        let (reply, answer) = oneshot::channel();
        let work = Work { batch, reply, span: Span::current(), since: Instant::now() };
        self.send(Message::Evaluate(work))?;
        answer.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    /// Has the scorer learn a set of concepts. Wait for the answer: once asked, it learns.
    pub(crate) async fn learn(&self, set: ConceptSet) -> Result<(), RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Learn(Lesson { set, reply }))?;
        answer.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    fn send(&self, message: Message) -> Result<(), RequestError> {
        if let EngineState::Failed(reason) = &*self.state.borrow() {
            return Err(RequestError::Stopped(reason.clone()));
        }
        self.inbox.try_send(message).map_err(|error| match error {
            mpsc::TrySendError::Full(_) => RequestError::QueueFull { queue: self.queue },
            mpsc::TrySendError::Disconnected(_) => self.stopped(),
        })
    }

    /// Follows the engine's state.
    pub(crate) fn state(&self) -> watch::Receiver<EngineState> {
        self.state.clone()
    }

    fn stopped(&self) -> RequestError {
        match &*self.state.borrow() {
            EngineState::Failed(reason) => RequestError::Stopped(reason.clone()),
            EngineState::Serving => RequestError::Stopped("the engine has stopped".to_owned()),
        }
    }
}

/// A loaded scorer's thread.
pub(crate) struct Engine {
    pub(crate) handle: EngineHandle,
    pub(crate) description: ScorerDescription,
}

/// How requests share the engine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batching {
    /// Requests that may wait.
    pub(crate) queue: usize,
    /// Images that share a pass.
    pub(crate) most: usize,
    /// How long one waits for others to share its pass.
    pub(crate) wait: Duration,
}

/// Starts the thread and loads the scorer on it.
pub(crate) async fn start(
    loader: ScorerLoader,
    concepts: ConceptSet,
    batching: Batching,
) -> Result<Engine, Error> {
    let (sender, inbox) = mpsc::sync_channel(batching.queue);
    let (state, state_receiver) = watch::channel(EngineState::Serving);
    let (loaded, description) = oneshot::channel();
    thread::Builder::new()
        .name("energy-engine".to_owned())
        .spawn(move || run(loader, &concepts, loaded, Inbox { inbox, batching }, &state))
        .map_err(|source| Error::System {
            what: "cannot start the engine's thread".into(),
            source,
        })?;
    let description = description
        .await
        .unwrap_or_else(|_| Err(Error::LoaderPanicked("its thread ended".to_owned())))?;
    let handle = EngineHandle { inbox: sender, queue: batching.queue, state: state_receiver };
    Ok(Engine { handle, description })
}

fn run(
    loader: ScorerLoader,
    concepts: &ConceptSet,
    loaded: oneshot::Sender<Result<ScorerDescription, Error>>,
    inbox: Inbox,
    state: &watch::Sender<EngineState>,
) {
    let mut scorer = match catch_unwind(AssertUnwindSafe(|| loader(concepts))) {
        Ok(Ok(scorer)) => scorer,
        failed => {
            let error = match failed {
                Ok(Err(error)) => Error::Model(error),
                Err(panic) => Error::LoaderPanicked(panic_message(&*panic)),
                Ok(Ok(_)) => unreachable!("a loaded scorer was handled above"),
            };
            // A caller that is gone has given up on the node.
            let _ = loaded.send(Err(error));
            return;
        }
    };
    if loaded.send(Ok(scorer.describe().clone())).is_err() {
        return;
    }
    serve(scorer.as_mut(), inbox, state);
}

/// Answers until there is nobody left to ask, or the scorer panics.
fn serve(scorer: &mut dyn Scorer, inbox: Inbox, state: &watch::Sender<EngineState>) {
    let mut lessons = VecDeque::new();
    loop {
        let message = if lessons.is_empty() {
            let Ok(message) = inbox.inbox.recv() else { return };
            Some(message)
        } else {
            inbox.inbox.try_recv().ok()
        };
        let ended = match message {
            Some(Message::Learn(lesson)) => {
                lessons.push_back(lesson);
                Ok(())
            }
            Some(Message::Evaluate(first)) => {
                let (waiting, lesson) = inbox.gather(first);
                lessons.extend(lesson);
                answer_all(scorer, waiting, inbox.batching.most)
            }
            None => Ok(()),
        };
        let Err(reason) = ended.and_then(|()| study(scorer, &mut lessons)) else { continue };
        tracing::error!(%reason, "the energy model panicked; this node no longer scores");
        state.send_replace(EngineState::Failed(reason.clone()));
        // What is sent before the state is seen finds nobody here, and says the same.
        let waiting = lessons.into_iter().map(Message::Learn).chain(inbox.inbox.try_iter());
        waiting.for_each(|message| message.refuse(&reason));
        return;
    }
}

/// Learns a part of the first lesson; the error is the message of a panic.
fn study(scorer: &mut dyn Scorer, lessons: &mut VecDeque<Lesson>) -> Result<(), String> {
    if let Some(lesson) = lessons.pop_front()
        && let Some(more) = lesson.give(scorer)?
    {
        lessons.push_front(more);
    }
    Ok(())
}

/// What is asked of the engine.
struct Inbox {
    inbox: mpsc::Receiver<Message>,
    batching: Batching,
}

impl Inbox {
    /// `first` and what has come meanwhile, or comes within the wait, and shares its pass; what would need
    /// another waits for its turn, so that nobody's answer waits for more than one pass of others. And a
    /// lesson, if one came.
    fn gather(&self, first: Work) -> (Vec<Work>, Option<Lesson>) {
        let deadline = Instant::now() + self.batching.wait;
        let mut images = first.batch.samples.len();
        let mut waiting = vec![first];
        while images < self.batching.most {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Message::Evaluate(work)) => {
                    images += work.batch.samples.len();
                    waiting.push(work);
                }
                Ok(Message::Learn(lesson)) => return (waiting, Some(lesson)),
                Err(_) => break,
            }
        }
        (waiting, None)
    }
}

/// Answers requests, those together that ask for the same; the error is the message of a panic, which
/// all that were not answered are refused with.
fn answer_all(scorer: &dyn Scorer, mut waiting: Vec<Work>, most: usize) -> Result<(), String> {
    while let Some(first) = waiting.first() {
        let key = first.batch.asks();
        let (group, rest): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|work| work.batch.asks() == key);
        waiting = rest;
        if let Err(reason) = answer(scorer, group, most) {
            waiting.into_iter().for_each(|work| work.refuse(&reason));
            return Err(reason);
        }
    }
    Ok(())
}

/// Answers requests that ask for the same.
fn answer(scorer: &dyn Scorer, group: Vec<Work>, most: usize) -> Result<(), String> {
    let begun = Instant::now();
    for work in &group {
        metrics::waited(begun.duration_since(work.since));
    }
    // The spans of the others wait meanwhile, which is what happens.
    let entered = group[0].span.clone().entered();
    let batches: Vec<&Batch> = group.iter().map(|work| &work.batch).collect();
    let run = || evaluate(scorer, &batches, most, |of| group[of].reply.is_closed());
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcomes) => {
            metrics::computed(begun.elapsed(), batches.iter().map(|b| b.samples.len()).sum());
            drop(entered);
            for (work, outcome) in group.into_iter().zip(outcomes) {
                match outcome.transpose() {
                    // A caller that has gone meanwhile needs no answer.
                    Some(answer) => drop(work.reply.send(answer)),
                    None => tracing::debug!("the caller is gone, the evaluation was dropped"),
                }
            }
            Ok(())
        }
        Err(panic) => {
            let reason = format!("the energy model panicked: {}", panic_message(&*panic));
            drop(entered);
            group.into_iter().for_each(|work| work.refuse(&reason));
            Err(reason)
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests;
