//! A scripted worker: what the tests say, over a real stream.

use fairlead_proto::{
    PROTOCOL_VERSION,
    v1::{
        self, AttachRequest, CommitReply, ImageOutcome, ImageStatus, LeaseRef, ModelInfo,
        ShardAssignment, ShardFailure, WorkerHello, attach_request::Message as Up,
        attach_response::Message as Down, worker_service_client::WorkerServiceClient,
    },
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::cluster::{Cluster, patient};

pub(crate) struct Worker {
    up: mpsc::Sender<AttachRequest>,
    down: Streaming<v1::AttachResponse>,
}

pub(crate) fn model() -> ModelInfo {
    ModelInfo {
        name: "sd".into(),
        hash: "hash-of-sd".into(),
        family: "stable-diffusion".into(),
        sampler: "ddim".into(),
        default_width: 32,
        default_height: 32,
        granularity: 4,
        max_side: 64,
        default_steps: 25,
        default_guidance_scale: 5.0,
        max_batch: 4,
        prompt_tokens: 77,
        workers: 0,
        train_timesteps: 1000,
        max_steps: 0,
    }
}

pub(crate) fn hello(id: &str, capacity: u32) -> WorkerHello {
    WorkerHello {
        worker_id: id.into(),
        protocol_version: PROTOCOL_VERSION,
        models: vec![model()],
        capacity,
    }
}

/// Pixels of the default size; image `index` has its own.
pub(crate) fn pixels(index: u32) -> Vec<u8> {
    vec![index as u8; 3 * 32 * 32]
}

/// The pixels of a PNG.
pub(crate) fn decode(png: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a PNG");
    let mut data = vec![0; reader.output_buffer_size().expect("a small picture")];
    reader.next_frame(&mut data).expect("a frame");
    data
}

pub(crate) fn released(lease: &LeaseRef, index: u32) -> ImageOutcome {
    ImageOutcome {
        lease: Some(lease.clone()),
        index,
        status: ImageStatus::Released.into(),
        pixels: pixels(index),
        report: Some(v1::WorkerReport {
            energy_nodes: vec!["steering-node hash".into()],
            ..Default::default()
        }),
        notices: vec![],
    }
}

impl Worker {
    /// Attaches and waits for the welcome.
    pub(crate) async fn attach(cluster: &Cluster, id: &str, capacity: u32) -> Self {
        let mut worker = Self::open(cluster, Up::Hello(hello(id, capacity))).await;
        worker.welcome().await;
        worker
    }

    /// Waits for the welcome.
    pub(crate) async fn welcome(&mut self) {
        match self.receive().await {
            Ok(Some(Down::Welcome(_))) => {}
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// Opens a stream that begins with `first`.
    pub(crate) async fn open(cluster: &Cluster, first: Up) -> Self {
        let (up, stream) = mpsc::channel(64);
        let mut client = WorkerServiceClient::new(cluster.channel());
        let down = patient(client.attach(ReceiverStream::new(stream))).await.expect("a stream");
        let worker = Self { up, down: down.into_inner() };
        worker.send(first).await;
        worker
    }

    pub(crate) async fn send(&self, message: Up) {
        let _ = self.up.send(AttachRequest { message: Some(message) }).await;
    }

    pub(crate) async fn receive(&mut self) -> Result<Option<Down>, Status> {
        Ok(patient(self.down.message()).await?.and_then(|response| response.message))
    }

    /// The next message that `pick` wants; others are passed over.
    pub(crate) async fn until<T>(&mut self, pick: impl Fn(Down) -> Option<T>) -> T {
        loop {
            let message = self.receive().await.expect("a healthy stream").expect("an open stream");
            if let Some(picked) = pick(message) {
                return picked;
            }
        }
    }

    pub(crate) async fn assignment(&mut self) -> ShardAssignment {
        self.until(|message| match message {
            Down::Assignment(assignment) => Some(assignment),
            _ => None,
        })
        .await
    }

    pub(crate) async fn commit_reply(&mut self) -> CommitReply {
        self.until(|message| match message {
            Down::Commit(reply) => Some(reply),
            _ => None,
        })
        .await
    }

    pub(crate) async fn cancelled(&mut self) -> v1::ShardCancel {
        self.until(|message| match message {
            Down::Cancel(cancel) => Some(cancel),
            _ => None,
        })
        .await
    }

    /// Sends every image of a shard and commits.
    pub(crate) async fn complete(&self, assignment: &ShardAssignment) {
        let lease = lease(assignment);
        for image in &assignment.images {
            self.send(Up::Image(released(&lease, image.index))).await;
        }
        self.done(&lease).await;
    }

    pub(crate) async fn done(&self, lease: &LeaseRef) {
        self.send(Up::Done(v1::ShardDone { lease: Some(lease.clone()) })).await;
    }

    pub(crate) async fn fail(&self, assignment: &ShardAssignment, reason: &str, retryable: bool) {
        let lease = Some(lease(assignment));
        let reason = reason.to_owned();
        self.send(Up::Failure(ShardFailure {
            lease,
            reason,
            retryable,
            cancelled: false,
            handed_back: false,
        }))
        .await;
    }

    /// Completes whatever it is given, until its stream ends.
    pub(crate) fn complete_all(mut self) -> JoinHandle<()> {
        tokio::spawn(async move {
            while let Ok(Some(message)) = self.down.message().await {
                if let Some(Down::Assignment(assignment)) = message.message {
                    self.complete(&assignment).await;
                }
            }
        })
    }
}

pub(crate) fn lease(assignment: &ShardAssignment) -> LeaseRef {
    assignment.lease.clone().expect("an assignment has a lease")
}
