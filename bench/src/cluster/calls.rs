//! Single calls to an energy node, CLIP ViT-B/32 at 224 pixels with random weights: what more concepts cost,
//! what the wire costs beside the model, and what requests gain that arrive together.
//!
//! The node has no calibration, so that its gates rest on thresholds, which are so low here that every gate
//! is open and every answer has a gradient.

use std::{fmt::Write, fs, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use fairlead_common::tensor;
use fairlead_proto::MAX_MESSAGE_BYTES;
use fairlead_proto::v1::{
    CalibrationKey, ConceptRef, DescribeRequest, EvaluateRequest, InputSpec, NodeInfo,
    SampleContext, energy_service_client::EnergyServiceClient,
};
use futures::future::try_join_all;
use tonic::transport::Channel;

use super::service::{LISTENING, PATIENCE, Service, asset, fairlead};
use crate::fixture;
use crate::report::{self, median};

/// Numbers of concepts that one node serves.
const CONCEPTS: [usize; 4] = [1, 6, 18, 100];
/// Requests that are sent to a node at once.
const TOGETHER: usize = 4;
/// What the embedded tokenizer needs.
const TOKENIZER: [&str; 4] =
    ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"];

type Energy = EnergyServiceClient<Channel>;

/// A node, and what it is asked.
struct Node {
    service: Service,
    client: Energy,
    request: EvaluateRequest,
    /// Seconds of each call.
    times: Vec<f64>,
    /// Sum and count of the model's seconds before the first of them.
    before: [f64; 2],
}

/// Asks nodes with more and more concepts in turns.
pub(super) async fn run(rounds: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    fixture::write_clip(folder.path())?;
    let model = folder.path().join(fixture::CLIP);
    for name in TOKENIZER {
        fs::copy(asset("emojiland-clip").join(name), model.join(name))?;
    }
    let mut nodes = Vec::new();
    for concepts in CONCEPTS {
        let pack = folder.path().join(format!("{concepts}.toml"));
        fs::write(&pack, pack_of(concepts))?;
        nodes.push(Node::start(&model, &pack).await?);
    }
    for _ in 0..10 * rounds {
        for node in &mut nodes {
            node.ask().await?;
        }
    }
    print(&nodes, 10 * rounds).await?;
    let node = nodes.iter().zip(CONCEPTS).find(|(_, concepts)| *concepts == 18);
    together(node.context("a node of 18 concepts")?.0, 2 * rounds).await
}

/// A pack of concepts with phrases of their own.
fn pack_of(concepts: usize) -> String {
    const COLOURS: [&str; 10] =
        ["red", "blue", "green", "white", "black", "small", "large", "old", "new", "open"];
    const THINGS: [&str; 10] =
        ["knife", "mug", "glass", "pill", "dog", "cat", "ball", "tree", "house", "car"];
    let mut pack = String::from("anchors = [\"a picture\", \"nothing\"]\n");
    for i in 0..concepts {
        let (colour, thing) = (COLOURS[i / 10 % 10], THINGS[i % 10]);
        write!(
            pack,
            "[[concept]]\nname = \"concept-{i}\"\ngroup = \"bench\"\n\
             targets = [\"a {colour} {thing}\", \"{colour} {thing}\"]\nfallback_threshold = -10.0\n"
        )
        .expect("text is written to memory");
    }
    pack
}

impl Node {
    async fn start(model: &Path, pack: &Path) -> Result<Self> {
        let mut command = fairlead(None)?;
        command.args(["energy", "--listen", "127.0.0.1:0", "--crops", "1", "--model"]).arg(model);
        command.arg("--concepts").arg(pack);
        let service = Service::start(command, LISTENING).await?;
        let client = EnergyServiceClient::new(service.channel()?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let request = question(describe(&client).await?)?;
        let mut node = Self { service, client, request, times: Vec::new(), before: [0.0; 2] };
        // Not timed: the first call.
        node.ask().await?;
        node.times.clear();
        node.before = node.computed().await?;
        Ok(node)
    }

    async fn ask(&mut self) -> Result<()> {
        let begun = Instant::now();
        ask(&self.client, &self.request).await?;
        self.times.push(begun.elapsed().as_secs_f64());
        Ok(())
    }

    /// Sum and count of the model's seconds.
    async fn computed(&self) -> Result<[f64; 2]> {
        self.service.histogram("fairlead_energy_compute_seconds").await
    }
}

async fn describe(client: &Energy) -> Result<NodeInfo> {
    let described = async {
        loop {
            // Unavailable until its model is loaded.
            if let Ok(answer) = client.clone().describe(DescribeRequest {}).await {
                return answer.into_inner().node;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, described).await?.context("no description")
}

/// One image, about everything that the node serves.
fn question(node: NodeInfo) -> Result<EvaluateRequest> {
    let input: InputSpec = node.input.context("no input")?;
    let shape = [1, 3, input.height as usize, input.width as usize];
    let pixels: Vec<f32> =
        (0..shape.iter().product()).map(|i: usize| (i * 7 % 251) as f32 / 250.0).collect();
    let concepts: Vec<ConceptRef> =
        node.concepts.into_iter().filter_map(|info| info.concept).collect();
    Ok(EvaluateRequest {
        concepts,
        calibration: Some(CalibrationKey {
            generator: "none".into(),
            sampler: "ddim".into(),
            steps: 25,
            conditions: None,
        }),
        allow_calibration_fallback: true,
        pixels: Some(tensor::encode("pixels", &shape, &pixels, input.datatype())),
        samples: vec![SampleContext { time: 0.1, crop_seed: 1, ..Default::default() }],
        ..Default::default()
    })
}

async fn ask(client: &Energy, request: &EvaluateRequest) -> Result<()> {
    let answer = client.clone().evaluate(request.clone()).await?.into_inner();
    ensure!(answer.gradient.is_some(), "no gate opened, so no gradient was measured");
    Ok(())
}

async fn print(nodes: &[Node], calls: usize) -> Result<()> {
    let first = median(&nodes[0].times).unwrap_or(f64::NAN);
    let mut rows = Vec::new();
    for (node, concepts) in nodes.iter().zip(CONCEPTS) {
        let after = node.computed().await?;
        let count = after[1] - node.before[1];
        ensure!(count as usize == calls, "the node counted {count} passes for {calls} calls");
        let compute = (after[0] - node.before[0]) / count;
        let mean = node.times.iter().sum::<f64>() / calls as f64;
        let call = median(&node.times).unwrap_or(f64::NAN);
        rows.push(vec![
            concepts.to_string(),
            format!("{:.1}", 1e3 * call),
            format!("{:.2}", call / first),
            format!("{:.1}", 1e3 * compute),
            format!("{:.2}", 1e3 * (mean - compute)),
        ]);
    }
    println!(
        "\nan energy call about one image of 224 px in f16 with its gradient, CLIP ViT-B/32, {calls} of each in \
         turns: median, and of means what is not the model's (goals: ratio 1.1 at 100, 2 ms)"
    );
    report::table(
        &["concepts", "ms a call", "ratio", "model's ms", "wire, queue, checks: ms"],
        &rows,
    );
    Ok(())
}

/// Requests one after the other and at once.
async fn together(node: &Node, rounds: usize) -> Result<()> {
    let (mut in_turn, mut at_once) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let begun = Instant::now();
        for _ in 0..TOGETHER {
            ask(&node.client, &node.request).await?;
        }
        in_turn.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        try_join_all((0..TOGETHER).map(|_| ask(&node.client, &node.request))).await?;
        at_once.push(begun.elapsed().as_secs_f64());
    }
    let ms = |times: &[f64]| 1e3 * median(times).unwrap_or(f64::NAN);
    let (in_turn, at_once) = (ms(&in_turn), ms(&at_once));
    println!(
        "{TOGETHER} requests: {in_turn:.1} ms one after the other, {at_once:.1} ms at once, ratio {:.2}",
        at_once / in_turn
    );
    Ok(())
}
