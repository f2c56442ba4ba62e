//! Progress of running jobs, told to whoever watches them at another coordinator. Nothing is kept: a
//! message that cannot be sent at once is lost, as its reader only wants the newest.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use ::redis::{AsyncCommands, RedisResult};
use fairlead_common::{backoff::Backoff, ids::JobId};
use fairlead_proto::v1::StepProgress;
use futures::StreamExt;
use prost::Message;
use tokio::sync::mpsc;

use super::link::Link;
use crate::store::Change;

/// Messages that wait to be sent.
const OUTBOX: usize = 256;

/// The sending side, and whom to listen to.
#[derive(Debug)]
pub(super) struct Live {
    outbox: mpsc::Sender<(JobId, StepProgress)>,
    wanted: mpsc::UnboundedSender<(JobId, bool)>,
}

/// A message as it travels: the process that sent it hears it as well.
#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(string, tag = "1")]
    process: String,
    #[prost(message, optional, tag = "2")]
    step: Option<StepProgress>,
}

impl Live {
    /// Channels of jobs begin with `prefix`; what others say goes to `news`.
    pub(super) fn start(link: &Arc<Link>, prefix: &str, news: mpsc::Sender<Change>) -> Self {
        let process = uuid::Uuid::new_v4().to_string();
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let (wanted, subscriptions) = mpsc::unbounded_channel();
        let (link, prefix) = (Arc::clone(link), prefix.to_owned());
        tokio::spawn(send(Arc::clone(&link), prefix.clone(), process.clone(), messages));
        tokio::spawn(async move {
            let closed = news.clone();
            let listener = Listener { link, prefix, process, news };
            tokio::select! {
                () = closed.closed() => {}
                () = listener.run(subscriptions) => {}
            }
        });
        Self { outbox, wanted }
    }

    /// Tells the others about one step.
    pub(super) fn tell(&self, job: JobId, step: &StepProgress) {
        // Full while Redis is away: progress is not worth waiting for.
        let _ = self.outbox.try_send((job, step.clone()));
    }

    /// Begins or ends listening to what others say about `job`.
    pub(super) fn listen(&self, job: JobId, on: bool) {
        // Fails once the coordinator stops.
        let _ = self.wanted.send((job, on));
    }
}

async fn send(
    link: Arc<Link>,
    prefix: String,
    process: String,
    mut messages: mpsc::Receiver<(JobId, StepProgress)>,
) {
    while let Some((job, step)) = messages.recv().await {
        let envelope = Envelope { process: process.clone(), step: Some(step) };
        let sent = async {
            let mut connection = link.shared().await?;
            connection.publish::<_, _, ()>(format!("{prefix}{job}"), envelope.encode_to_vec()).await
        };
        if let Err(error) = sent.await {
            tracing::debug!(%job, %error, "progress was not told to other coordinators");
        }
    }
}

struct Listener {
    link: Arc<Link>,
    prefix: String,
    process: String,
    news: mpsc::Sender<Change>,
}

impl Listener {
    async fn run(self, mut wanted: mpsc::UnboundedReceiver<(JobId, bool)>) {
        let mut jobs = BTreeSet::new();
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        loop {
            match self.listen(&mut wanted, &mut jobs, &mut backoff).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, "progress elsewhere is not heard"),
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Listens until the connection breaks (an error) or nobody wants to any longer.
    async fn listen(
        &self,
        wanted: &mut mpsc::UnboundedReceiver<(JobId, bool)>,
        jobs: &mut BTreeSet<JobId>,
        backoff: &mut Backoff,
    ) -> RedisResult<()> {
        let (mut subscriptions, mut messages) = self.link.pubsub().await?.split();
        for job in jobs.iter() {
            subscriptions.subscribe(self.channel(*job)).await?;
        }
        backoff.reset();
        loop {
            tokio::select! {
                change = wanted.recv() => match change {
                    None => return Ok(()),
                    Some((job, true)) => {
                        jobs.insert(job);
                        subscriptions.subscribe(self.channel(job)).await?;
                    }
                    Some((job, false)) => {
                        jobs.remove(&job);
                        subscriptions.unsubscribe(self.channel(job)).await?;
                    }
                },
                message = messages.next() => {
                    let Some(message) = message else {
                        return Err((::redis::ErrorKind::Io, "the connection ended").into());
                    };
                    let job = message.get_channel_name().strip_prefix(&self.prefix);
                    let job = job.and_then(|id| id.parse().ok());
                    let envelope = Envelope::decode(message.get_payload_bytes()).ok();
                    if let (Some(job), Some(Envelope { process, step: Some(step) })) = (job, envelope)
                        && process != self.process
                    {
                        // A reader that is behind loses progress.
                        let _ = self.news.try_send(Change::Progress(job, Box::new(step)));
                    }
                }
            }
        }
    }

    fn channel(&self, job: JobId) -> String {
        format!("{}{job}", self.prefix)
    }
}
