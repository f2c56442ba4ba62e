//! Workers that make no images: they take shards over the real stream and commit at once, or never.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use fairlead_proto::PROTOCOL_VERSION;
use fairlead_proto::v1::{
    AttachRequest, AttachResponse, CommitStatus, ImageOutcome, ImageStatus, ModelInfo,
    ShardAssignment, ShardDone, WorkerHello, WorkerReport, attach_request::Message as Up,
    attach_response::Message as Down, worker_service_client::WorkerServiceClient,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

/// Pixels of a side.
const SIDE: u32 = 32;

/// A worker's stream.
pub(crate) struct Worker {
    up: mpsc::Sender<AttachRequest>,
    down: Streaming<AttachResponse>,
    pixels: Arc<Vec<u8>>,
}

/// A generator of this name.
fn model(name: &str) -> ModelInfo {
    ModelInfo {
        name: name.to_owned(),
        hash: format!("hash of {name}"),
        family: "simulated".to_owned(),
        sampler: "ddim".to_owned(),
        default_width: SIDE,
        default_height: SIDE,
        granularity: SIDE,
        max_side: SIDE,
        default_steps: 25,
        default_guidance_scale: 5.0,
        max_batch: 4,
        prompt_tokens: 77,
        workers: 0,
        train_timesteps: 1_000,
        max_steps: 0,
    }
}

/// Pixels of a small image.
fn pixels() -> Arc<Vec<u8>> {
    Arc::new(vec![7; 3 * SIDE as usize * SIDE as usize])
}

impl Worker {
    /// Attaches as `id` with the generator `model` and waits for the welcome.
    pub(crate) async fn attach(
        channel: Channel,
        id: String,
        model_name: &str,
        capacity: u32,
    ) -> Result<Self> {
        // A welcome and what a worker of this capacity may have to say at once.
        let (up, stream) = mpsc::channel(3 * capacity as usize + 1);
        let hello = WorkerHello {
            worker_id: id,
            protocol_version: PROTOCOL_VERSION,
            models: vec![model(model_name)],
            capacity,
        };
        up.send(AttachRequest { message: Some(Up::Hello(hello)) }).await?;
        let down = WorkerServiceClient::new(channel).attach(ReceiverStream::new(stream)).await?;
        let mut worker = Self { up, down: down.into_inner(), pixels: pixels() };
        match worker.receive().await? {
            Down::Welcome(_) => Ok(worker),
            other => bail!("no welcome but {other:?}"),
        }
    }

    async fn receive(&mut self) -> Result<Down> {
        let response = self.down.message().await?.context("the coordinator ended the stream")?;
        response.message.context("an empty message")
    }

    /// The next shard it is given.
    pub(crate) async fn assignment(&mut self) -> Result<ShardAssignment> {
        loop {
            if let Down::Assignment(assignment) = self.receive().await? {
                return Ok(assignment);
            }
        }
    }

    /// Sends an image for each that is asked for, and that there are no more.
    pub(crate) async fn complete(&self, assignment: &ShardAssignment) -> Result<()> {
        for image in &assignment.images {
            let outcome = ImageOutcome {
                lease: assignment.lease.clone(),
                index: image.index,
                status: ImageStatus::Released.into(),
                pixels: self.pixels.to_vec(),
                report: Some(WorkerReport::default()),
                notices: Vec::new(),
            };
            self.send(Up::Image(outcome)).await?;
        }
        self.send(Up::Done(ShardDone { lease: assignment.lease.clone() })).await
    }

    async fn send(&self, message: Up) -> Result<()> {
        let message = AttachRequest { message: Some(message) };
        self.up.send(message).await.context("the coordinator ended the stream")
    }

    /// Completes every shard from the time when `go` holds, and counts accepted commits.
    pub(crate) async fn complete_all(
        mut self,
        mut go: watch::Receiver<bool>,
        committed: watch::Sender<usize>,
    ) -> Result<()> {
        go.wait_for(|go| *go).await?;
        loop {
            match self.receive().await? {
                Down::Assignment(assignment) => self.complete(&assignment).await?,
                Down::Commit(reply) if reply.status() == CommitStatus::Accepted => {
                    committed.send_modify(|count| *count += 1);
                }
                Down::Commit(reply) => bail!("a commit was refused: {}", reply.reason),
                _ => {}
            }
        }
    }

    /// Keeps its stream open and whatever it is given.
    pub(crate) async fn hold(mut self) -> Result<()> {
        loop {
            self.receive().await?;
        }
    }
}
