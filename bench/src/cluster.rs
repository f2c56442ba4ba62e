//! What steering costs: whole images on a local cluster, and single calls to an energy node.
//!
//! The `fairlead` binary beside this one runs the services; each quantity is measured in turns with the one
//! it is compared with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairlead_common::{grpc, tensor, tls::Tls};
use fairlead_proto::MAX_MESSAGE_BYTES;
use fairlead_proto::v1::{
    CalibrationKey, ConceptRef, DescribeRequest, EvaluateRequest, GetImageRequest,
    GetRecordRequest, InputSpec, JobSpec, JobState, SampleContext, SubmitJobRequest,
    WatchJobRequest, energy_service_client::EnergyServiceClient,
    generation_service_client::GenerationServiceClient, watch_job_response::Event,
};
use futures::future::try_join_all;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::report::median;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(300);
const GENERATORS: [&str; 2] = ["emojiland-sd", "emojiland-sd3"];
const ENERGY: &str = "emojiland-clip";
/// Images of one job.
const IMAGES: u32 = 4;
/// Requests that are sent to a node at once.
const TOGETHER: usize = 4;

/// A policy that asks no energy.
const PLAIN: &str = "\n[policies.plain]\nconcepts = []\nallow_unchecked = true\n";

const BENIGN: &str = "a penguin on a blue background";
const TARGET: &str = "a kitchen knife";

type Generation = GenerationServiceClient<Channel>;
type Energy = EnergyServiceClient<Channel>;

/// Runs everything and prints both tables.
pub(crate) async fn run(rounds: usize) -> Result<()> {
    println!(
        "\nmilliseconds an image, {IMAGES} images a job, {rounds} jobs of each in turns; medians"
    );
    println!(
        "{:<16} {:>11} {:>12} {:>7} {:>11} {:>7}",
        "generator", "no energy", "gates closed", "ratio", "gate open", "ratio"
    );
    let mut picture = Vec::new();
    for generator in GENERATORS {
        let data = tempfile::tempdir()?;
        let service = Service::up(generator, data.path()).await?;
        let mut client = GenerationServiceClient::new(grpc::channel(
            &service.address,
            PATIENCE,
            &Tls::default(),
        )?)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let cases = [("plain", BENIGN), ("", BENIGN), ("", TARGET)];
        let mut times: [Vec<f64>; 3] = Default::default();
        for round in 0..=rounds {
            for (times, (policy, prompt)) in times.iter_mut().zip(cases) {
                let took = job(&mut client, policy, prompt).await?;
                // The first of each is warming up.
                times.extend((round > 0).then_some(took));
            }
        }
        let [plain, closed, open] = times.map(|times| median(&times).unwrap_or(f64::NAN));
        println!(
            "{generator:<16} {plain:>11.0} {closed:>12.0} {:>7.2} {open:>11.0} {:>7.2}",
            closed / plain,
            open / plain
        );
        if picture.is_empty() {
            picture = first_image(&mut client, "plain", TARGET).await?;
        }
    }
    calls(&picture, rounds).await
}

/// A service of the binary beside this one.
struct Service {
    address: String,
    /// Address of its metrics.
    metrics: String,
    _process: Child,
}

impl Service {
    async fn up(generator: &str, data: &Path) -> Result<Self> {
        let policies = data.join("policies.toml");
        let embedded = std::fs::read_to_string(asset("policies.toml")).context("policies.toml")?;
        std::fs::write(&policies, embedded + PLAIN)?;
        let mut command = fairlead()?;
        command.args(["up", "--listen", "127.0.0.1:0", "--model", generator, "--energy", ENERGY]);
        command.arg("--data-dir").arg(data.join("data")).arg("--policies").arg(policies);
        Self::start(command, "cluster ready at ").await
    }

    async fn energy() -> Result<Self> {
        let mut command = fairlead()?;
        command.args(["energy", "--listen", "127.0.0.1:0", "--model"]).arg(asset(ENERGY));
        command.arg("--concepts").arg(asset("concepts"));
        command.arg("--calibrations").arg(asset("calibrations"));
        Self::start(command, "listening on ").await
    }

    async fn start(mut command: Command, words: &str) -> Result<Self> {
        command.args(["--metrics-listen", "127.0.0.1:0"]).env("FAIRLEAD_ASSETS", asset(""));
        let mut process = command
            .env("FAIRLEAD_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the fairlead binary")?;
        let mut lines = BufReader::new(process.stdout.take().context("stdout")?).lines();
        let mut metrics = String::new();
        loop {
            let line = tokio::time::timeout(PATIENCE, lines.next_line()).await??;
            let line = line.context("the service ended; what it wrote is above")?;
            if let Some(address) = line.strip_prefix("metrics at ") {
                address.clone_into(&mut metrics);
            }
            if let Some(address) = line.strip_prefix(words) {
                return Ok(Self { address: address.to_owned(), metrics, _process: process });
            }
        }
    }

    /// Sum and count of a histogram.
    async fn histogram(&self, name: &str) -> Result<[f64; 2]> {
        let address = self.metrics.trim_start_matches("http://").trim_end_matches("/metrics");
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await?;
        let mut page = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut page).await?;
        let value = |suffix: &str| -> Result<f64> {
            let key = format!("{name}_{suffix} ");
            let line = page.lines().find_map(|line| line.strip_prefix(&key));
            Ok(line.with_context(|| format!("no {key}"))?.trim().parse()?)
        };
        Ok([value("sum")?, value("count")?])
    }
}

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(name)
}

fn fairlead() -> Result<Command> {
    let binary = std::env::current_exe()?.with_file_name("fairlead");
    ensure!(
        binary.exists(),
        "{} is missing; build it with `cargo build --release --package fairlead`",
        binary.display()
    );
    Ok(Command::new(binary))
}

/// Milliseconds of the engine for one image.
async fn job(client: &mut Generation, policy: &str, prompt: &str) -> Result<f64> {
    let (job_id, records) = finished(client, policy, prompt).await?;
    let mut total = 0;
    for record_id in &records {
        let request = GetRecordRequest { record_id: record_id.clone(), ..Default::default() };
        let record = client.get_record(request).await?.into_inner().record;
        total += record.with_context(|| format!("no record of {job_id}"))?.engine_ms;
    }
    Ok(total as f64 / records.len() as f64)
}

/// The id of a completed job and those of its records.
async fn finished(
    client: &mut Generation,
    policy: &str,
    prompt: &str,
) -> Result<(String, Vec<String>)> {
    let spec = JobSpec {
        prompt: prompt.to_owned(),
        policy: policy.to_owned(),
        n: IMAGES,
        seed: Some(11),
        ..Default::default()
    };
    let request = SubmitJobRequest { spec: Some(spec), idempotency_key: String::new() };
    let job = client.submit_job(request).await?.into_inner().job.context("no job")?;
    let request = WatchJobRequest { job_id: job.job_id.clone(), after_sequence: 0 };
    let mut events = client.watch_job(request).await?.into_inner();
    let end = async {
        while let Some(response) = events.message().await? {
            match response.event {
                Some(Event::Job(job)) if job.state() == JobState::Completed => return Ok(job),
                Some(Event::Job(job)) if job.state() == JobState::Failed => {
                    anyhow::bail!("the job failed: {}", job.reason)
                }
                _ => {}
            }
        }
        anyhow::bail!("the watch ended before the job")
    };
    let job = tokio::time::timeout(PATIENCE, end).await.context("the job did not end")??;
    Ok((job.job_id, job.images.into_iter().map(|image| image.record_id).collect()))
}

async fn first_image(client: &mut Generation, policy: &str, prompt: &str) -> Result<Vec<u8>> {
    let (job_id, _) = finished(client, policy, prompt).await?;
    Ok(client.get_image(GetImageRequest { job_id, index: 0 }).await?.into_inner().png)
}

/// Times single calls to an energy node about the picture `png`, which shows a target.
async fn calls(png: &[u8], rounds: usize) -> Result<()> {
    let service = Service::energy().await?;
    let client =
        EnergyServiceClient::new(grpc::channel(&service.address, PATIENCE, &Tls::default())?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let node = describe(&client).await?;
    let calibration = node.calibrations.first().and_then(|info| info.key.clone());
    let refs: Vec<ConceptRef> = node.concepts.into_iter().filter_map(|info| info.concept).collect();
    let shown = refs.iter().find(|concept| concept.name == "kitchen-knife");
    let input = node.input.context("no input")?;
    let question = Question {
        pixels: enlarged(png, &input)?,
        input,
        calibration: calibration.context("no calibration")?,
    };
    let one = question.about(&[shown.context("no such concept")?.clone()]);
    let all = question.about(&refs);
    let open = ask(&client, &all).await?;
    ensure!(open, "no gate opened on the picture, so no gradient would be measured");

    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let before = service.histogram("fairlead_energy_compute_seconds").await?;
    let mut asked = 0.0;
    for _ in 0..10 * rounds {
        for (name, request) in [("one", &one), ("all", &all)] {
            let begun = Instant::now();
            ask(&client, request).await?;
            times.entry(name).or_default().push(begun.elapsed().as_secs_f64());
            asked += begun.elapsed().as_secs_f64();
        }
    }
    let after = service.histogram("fairlead_energy_compute_seconds").await?;
    let count = after[1] - before[1];
    let (compute, call) = ((after[0] - before[0]) / count, asked / count);
    for _ in 0..10 * rounds {
        let begun = Instant::now();
        for _ in 0..TOGETHER {
            ask(&client, &all).await?;
        }
        times.entry("in turn").or_default().push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        try_join_all((0..TOGETHER).map(|_| ask(&client, &all))).await?;
        times.entry("at once").or_default().push(begun.elapsed().as_secs_f64());
    }
    let ms = |name: &str| 1e3 * median(&times[name]).unwrap_or(f64::NAN);
    println!(
        "\nan energy call about one image of which a gate is open, medians of {}",
        10 * rounds
    );
    println!("{:<44} {:>8.1} ms", "1 concept", ms("one"));
    let ratio = ms("all") / ms("one");
    println!("{:<44} {:>8.1} ms, ratio {ratio:.2}", format!("{} concepts", refs.len()), ms("all"));
    println!(
        "{:<44} {:>8.1} ms",
        format!("{TOGETHER} requests one after the other"),
        ms("in turn")
    );
    let ratio = ms("at once") / ms("in turn");
    println!(
        "{:<44} {:>8.1} ms, ratio {ratio:.2}",
        format!("{TOGETHER} requests at once"),
        ms("at once")
    );
    println!(
        "{:<44} {:>8.2} ms beside {:.1} ms of the model, ratio {:.3} (means)",
        "wire, queue and checks",
        1e3 * (call - compute),
        1e3 * compute,
        (call - compute) / compute
    );
    Ok(())
}

async fn describe(client: &Energy) -> Result<fairlead_proto::v1::NodeInfo> {
    let described = async {
        loop {
            // Unavailable until its model is loaded.
            if let Ok(answer) = client.clone().describe(DescribeRequest {}).await {
                return answer.into_inner().node;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, described).await?.context("no description")
}

struct Question {
    pixels: Vec<f32>,
    input: InputSpec,
    calibration: CalibrationKey,
}

impl Question {
    fn about(&self, concepts: &[ConceptRef]) -> EvaluateRequest {
        let shape = [1, 3, self.input.height as usize, self.input.width as usize];
        let sample = SampleContext { time: 0.1, crop_seed: 1, ..Default::default() };
        EvaluateRequest {
            concepts: concepts.to_vec(),
            calibration: Some(self.calibration.clone()),
            pixels: Some(tensor::encode("pixels", &shape, &self.pixels, self.input.datatype())),
            samples: vec![sample],
            ..Default::default()
        }
    }
}

/// Asks; whether there is a gradient.
async fn ask(client: &Energy, request: &EvaluateRequest) -> Result<bool> {
    Ok(client.clone().evaluate(request.clone()).await?.into_inner().gradient.is_some())
}

/// The picture as the node wants it, enlarged by repeating pixels.
fn enlarged(png: &[u8], input: &InputSpec) -> Result<Vec<f32>> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info()?;
    let mut rgb = vec![0; reader.output_buffer_size().context("a small image")?];
    let info = reader.next_frame(&mut rgb)?;
    let (height, width) = (input.height as usize, input.width as usize);
    let (h, w) = (info.height as usize, info.width as usize);
    let value = |i: usize| {
        let (c, y, x) = (i / (height * width), i / width % height, i % width);
        f32::from(rgb[(y * h / height * w + x * w / width) * 3 + c]) / 255.0
    };
    Ok((0..3 * height * width).map(value).collect())
}
