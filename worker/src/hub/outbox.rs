//! What the worker sends, in three bounded lanes: control before results before progress. Renewals
//! overtake pictures; of progress the newest is kept when the stream is slow.

use fairlead_proto::v1::{AttachRequest, attach_request::Message};
use futures::{Stream, stream};
use tokio::sync::{broadcast, broadcast::error::RecvError, mpsc};

/// Renewals and the like that may wait: more mean that the coordinator reads nothing any more.
const CONTROL: usize = 64;

/// Images and endings that may wait; their senders wait with them.
const RESULTS: usize = 8;

/// Steps that may wait before the oldest is dropped.
const PROGRESS: usize = 64;

/// The stream is gone.
#[derive(Debug)]
pub(super) struct Closed;

/// The sending side; cloned into every shard's task. The stream ends when all are dropped.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    control: mpsc::Sender<Message>,
    results: mpsc::Sender<Message>,
    progress: broadcast::Sender<Message>,
}

impl Outbox {
    /// The lanes and the stream that empties them.
    pub(super) fn new() -> (Self, impl Stream<Item = AttachRequest> + Send + 'static) {
        let (control, from_control) = mpsc::channel(CONTROL);
        let (results, from_results) = mpsc::channel(RESULTS);
        let (progress, from_progress) = broadcast::channel(PROGRESS);
        let lanes = Lanes { control: from_control, results: from_results, progress: from_progress };
        let stream = stream::unfold(lanes, |mut lanes| async {
            let message = lanes.next().await?;
            Some((AttachRequest { message: Some(message) }, lanes))
        });
        (Self { control, results, progress }, stream)
    }

    /// Sends before everything else. Fails if the stream is gone or stuck.
    pub(super) fn control(&self, message: Message) -> Result<(), Closed> {
        self.control.try_send(message).map_err(|_| Closed)
    }

    /// Sends after earlier results, waiting for room.
    pub(super) async fn result(&self, message: Message) -> Result<(), Closed> {
        self.results.send(message).await.map_err(|_| Closed)
    }

    /// Sends when nothing else waits; may be dropped in favour of later progress.
    pub(super) fn progress(&self, message: Message) {
        // It fails only when the stream is gone, which the session notices by itself.
        let _ = self.progress.send(message);
    }
}

struct Lanes {
    control: mpsc::Receiver<Message>,
    results: mpsc::Receiver<Message>,
    progress: broadcast::Receiver<Message>,
}

impl Lanes {
    async fn next(&mut self) -> Option<Message> {
        tokio::select! {
            biased;
            Some(message) = self.control.recv() => Some(message),
            Some(message) = self.results.recv() => Some(message),
            Some(message) = newest(&mut self.progress) => Some(message),
            else => None,
        }
    }
}

async fn newest(progress: &mut broadcast::Receiver<Message>) -> Option<Message> {
    loop {
        match progress.recv().await {
            Ok(message) => return Some(message),
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{LeaseRenewal, ShardDone, ShardProgress, StepProgress};
    use futures::StreamExt;

    fn step(step: u32) -> Message {
        let steps = vec![StepProgress { step, ..Default::default() }];
        Message::Progress(ShardProgress { lease: None, steps, previews: Vec::new() })
    }

    #[tokio::test]
    async fn renewals_overtake_and_old_progress_is_dropped() {
        let (outbox, stream) = Outbox::new();
        for i in 0..100 {
            outbox.progress(step(i));
        }
        outbox.result(Message::Done(ShardDone::default())).await.expect("there is room");
        outbox.control(Message::Renewal(LeaseRenewal::default())).expect("there is room");
        drop(outbox);
        let sent: Vec<Message> =
            stream.map(|request| request.message.expect("a message")).collect().await;
        assert!(matches!(sent[0], Message::Renewal(_)));
        assert!(matches!(sent[1], Message::Done(_)));
        assert_eq!(sent.len(), 2 + PROGRESS);
        assert_eq!(sent[2], step(100 - PROGRESS as u32));
        assert_eq!(sent.last(), Some(&step(99)));
    }

    #[tokio::test]
    async fn a_stuck_stream_is_noticed() {
        let (outbox, _stream) = Outbox::new();
        let renewal = || outbox.control(Message::Renewal(LeaseRenewal::default()));
        assert!((0..CONTROL).all(|_| renewal().is_ok()));
        assert!(renewal().is_err());
    }
}
