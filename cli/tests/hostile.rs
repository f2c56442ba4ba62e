//! Text of others never acts on a terminal: every command is run against arguments, files and a
//! coordinator that put escape sequences into everything they can.

use std::{pin::Pin, process::Output, sync::Arc};

use fairlead_common::text;
use fairlead_proto::v1::{
    CalibrationInfo, CancelJobRequest, CancelJobResponse, ConceptInfo, ConceptRef, ConceptScore,
    DeployConceptsRequest, DeployConceptsResponse, Deployment, GetImageRequest, GetImageResponse,
    GetJobRequest, GetJobResponse, GetRecordRequest, GetRecordResponse, ImageInfo, ImageStatus,
    Job, JobState, ListConceptsRequest, ListConceptsResponse, ListJobsRequest, ListJobsResponse,
    ListModelsRequest, ListModelsResponse, ModelInfo, PinnedPolicy, RecordSignature,
    RetireConceptRequest, RetireConceptResponse, SafetyRecord, ServedConcept, ServingNode,
    StepProgress, StepRecord, SubmitJobRequest, SubmitJobResponse, WatchJobRequest,
    WatchJobResponse, WorkerReport,
    catalog_service_server::{CatalogService, CatalogServiceServer},
    generation_service_server::{GenerationService, GenerationServiceServer},
    watch_job_response::Event,
};
use futures::{Stream, stream};
use tokio::{net::TcpListener, process::Command};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// Sets the clipboard and the title, clears the screen (in seven bits and in eight), goes to the start of
/// the line, writes a line of its own, turns the direction of text, and hides characters.
const HOSTILE: &str = "x\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x07\x1b[2J\u{9b}2J\x7f\r\nerror: forged\
                       \u{85}\u{2028}\u{202e}dlrow\u{2066}\u{200b}\u{feff}\u{e0041}";

fn hostile() -> String {
    HOSTILE.to_owned()
}

/// What a job of the coordinator ends as.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Completed,
    Failed,
    /// It is refused when it is submitted.
    Refused,
}

/// A coordinator that says hostile things wherever it says anything.
struct Hostile(End);

fn concept() -> ConceptRef {
    ConceptRef { name: hostile(), version: hostile(), energy: hostile() }
}

fn score() -> ConceptScore {
    ConceptScore {
        concept: hostile(),
        energy: hostile(),
        z: 4.0,
        gate: 2.0,
        open: true,
        ..Default::default()
    }
}

fn record() -> SafetyRecord {
    let step =
        StepRecord { time: 0.5, correction: 0.5, scores: vec![score()], ..Default::default() };
    let report = WorkerReport {
        trajectory: vec![step],
        final_scores: vec![score()],
        steered: true,
        ..Default::default()
    };
    SafetyRecord {
        record_id: hostile(),
        reported_by_worker: Some(report),
        withheld_by_worker: true,
        final_scores: vec![score()],
        policy: Some(PinnedPolicy {
            name: hostile(),
            concepts: vec![concept()],
            ..Default::default()
        }),
        status: ImageStatus::Withheld.into(),
        signature: Some(RecordSignature { key_id: hostile(), ..Default::default() }),
        ..Default::default()
    }
}

impl Hostile {
    fn job(&self) -> Job {
        let state = if self.0 == End::Failed { JobState::Failed } else { JobState::Completed };
        let image = ImageInfo {
            record_id: hostile(),
            status: ImageStatus::Withheld.into(),
            final_scores: vec![score()],
            ..Default::default()
        };
        Job {
            job_id: hostile(),
            state: state.into(),
            reason: hostile(),
            notices: vec![hostile()],
            images: vec![image],
            ..Default::default()
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GenerationService for Hostile {
    type WatchJobStream = Pin<Box<dyn Stream<Item = Result<WatchJobResponse, Status>> + Send>>;

    async fn watch_job(&self, _: Request<WatchJobRequest>) -> Answer<Self::WatchJobStream> {
        let step =
            StepProgress { steps: 4, scores: vec![score()], correction: 0.5, ..Default::default() };
        let events = [Event::Progress(step), Event::Job(self.job())];
        let events = events
            .into_iter()
            .zip(1..)
            .map(|(event, sequence)| Ok(WatchJobResponse { sequence, event: Some(event) }));
        Ok(Response::new(Box::pin(stream::iter(events))))
    }

    async fn submit_job(&self, _: Request<SubmitJobRequest>) -> Answer<SubmitJobResponse> {
        match self.0 {
            End::Refused => Err(Status::invalid_argument(HOSTILE)),
            _ => Ok(Response::new(SubmitJobResponse { job: Some(self.job()) })),
        }
    }

    async fn get_job(&self, _: Request<GetJobRequest>) -> Answer<GetJobResponse> {
        Ok(Response::new(GetJobResponse { job: Some(self.job()) }))
    }

    async fn cancel_job(&self, _: Request<CancelJobRequest>) -> Answer<CancelJobResponse> {
        Ok(Response::new(CancelJobResponse { job: Some(self.job()) }))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Answer<ListJobsResponse> {
        Err(Status::unimplemented(HOSTILE))
    }

    async fn get_image(&self, _: Request<GetImageRequest>) -> Answer<GetImageResponse> {
        Err(Status::not_found(HOSTILE))
    }

    async fn get_record(&self, _: Request<GetRecordRequest>) -> Answer<GetRecordResponse> {
        Ok(Response::new(GetRecordResponse { record: Some(record()), reduced: false }))
    }
}

#[tonic::async_trait]
impl CatalogService for Hostile {
    async fn list_models(&self, _: Request<ListModelsRequest>) -> Answer<ListModelsResponse> {
        let model = || ModelInfo { name: hostile(), hash: hostile(), ..Default::default() };
        Ok(Response::new(ListModelsResponse { models: vec![model(), model()] }))
    }

    async fn list_concepts(&self, _: Request<ListConceptsRequest>) -> Answer<ListConceptsResponse> {
        let calibration = CalibrationInfo {
            generator_name: hostile(),
            id: hostile(),
            concepts: vec![hostile()],
            key: Some(fairlead_proto::v1::CalibrationKey {
                sampler: hostile(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let node = ServingNode {
            node_id: hostile(),
            address: hostile(),
            model_name: hostile(),
            calibrations: vec![calibration],
            ..Default::default()
        };
        let info = ConceptInfo { concept: Some(concept()), group: hostile(), ..Default::default() };
        let served = ServedConcept { concept: Some(info), nodes: vec![node] };
        let answer = ListConceptsResponse { concepts: vec![served], absent: vec![concept()] };
        Ok(Response::new(answer))
    }

    async fn deploy_concepts(
        &self,
        _: Request<DeployConceptsRequest>,
    ) -> Answer<DeployConceptsResponse> {
        let deployment = |error: &str| Deployment {
            node_id: hostile(),
            model_name: hostile(),
            error: error.to_owned(),
            ..Default::default()
        };
        let deployments = vec![deployment(HOSTILE), deployment("")];
        Ok(Response::new(DeployConceptsResponse { deployments }))
    }

    async fn retire_concept(
        &self,
        _: Request<RetireConceptRequest>,
    ) -> Answer<RetireConceptResponse> {
        Ok(Response::new(RetireConceptResponse { energies: vec![hostile()] }))
    }
}

async fn coordinator(end: End) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("it has an address"));
    let services = Arc::new(Hostile(end));
    let server = Server::builder()
        .add_service(GenerationServiceServer::from_arc(services.clone()))
        .add_service(CatalogServiceServer::from_arc(services));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

/// A folder whose files say hostile things.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a name of ours").to_owned()
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.0.path().join(name), bytes).expect("written");
        self.path(name)
    }
}

/// A PNG whose text chunks say hostile things under hostile names.
fn png() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.add_itxt_chunk("fairlead-record".into(), hostile()).expect("a text");
    encoder.add_itxt_chunk("parameters".into(), hostile()).expect("a text");
    encoder.add_text_chunk("\u{9b}2J".into(), "\x1b[2J".into()).expect("a text");
    let mut writer = encoder.write_header().expect("a header");
    writer.write_image_data(&[0; 3]).expect("a pixel");
    writer.finish().expect("it ends");
    bytes
}

/// Runs `fairlead` and fails if anything it says could act on a terminal or begins a line that others wrote.
async fn says(arguments: &[&str]) -> Output {
    says_with(&[], arguments).await
}

async fn says_with(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    // What is written where nothing else is said.
    let here = Folder::new();
    let output = Command::new(env!("CARGO_BIN_EXE_fairlead"))
        .args(arguments)
        .current_dir(here.0.path())
        .envs(variables.iter().copied())
        .env("RUST_LOG", "info")
        .output()
        .await
        .expect("it starts");
    for bytes in [&output.stdout, &output.stderr] {
        let said = String::from_utf8(bytes.clone()).expect("it is text");
        let acts = said.chars().find(|&c| c != '\n' && text::is_hidden(c));
        assert_eq!(acts, None, "{arguments:?}: {said:?}");
        assert!(
            !said.lines().any(|line| line.starts_with("error: forged")),
            "{arguments:?}: {said}"
        );
    }
    output
}

fn all(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// What it says holds some of the hostile text, escaped: the test would see nothing otherwise.
fn tells(output: &Output, what: &str) {
    assert!(all(output).contains("\\u{1b}"), "{what}: {}", all(output));
}

#[tokio::test]
async fn arguments_and_variables() {
    for command in [
        "up",
        "generate",
        "coordinator",
        "worker",
        "energy",
        "concepts",
        "calibrate",
        "inspect",
        "verify",
        "keys",
        "demo",
        "evaluate",
    ] {
        for flag in [format!("--{HOSTILE}"), format!("--log-format={HOSTILE}")] {
            let output = says(&[command, &flag]).await;
            assert!(!output.status.success(), "{command}");
            tells(&output, command);
        }
    }
    tells(&says(&[HOSTILE]).await, "a command");
    tells(&says(&["up", "--listen", HOSTILE]).await, "an address");
    tells(&says(&["generate", "a", "--seed", HOSTILE]).await, "a number");
    tells(&says(&["generate", "a", "--mode", HOSTILE]).await, "one of several");
    tells(&says(&["generate", "a", "--size", HOSTILE]).await, "a size");
    tells(&says(&["generate", "a", "--server", HOSTILE]).await, "a server");
    tells(&says(&["keys", "tls", HOSTILE]).await, "a service's name");
    tells(&says_with(&[("FAIRLEAD_SERVER", HOSTILE)], &["concepts", "--help"]).await, "help");
    let output = says_with(&[("FAIRLEAD_KEY", HOSTILE)], &["concepts"]).await;
    assert!(
        all(&output).contains("the key is empty or holds other characters"),
        "{}",
        all(&output)
    );
}

#[tokio::test]
async fn names_of_files() {
    let folder = Folder::new();
    let missing = folder.path(HOSTILE);
    for arguments in [
        &["inspect", &missing][..],
        &["verify", "--signer", &missing, &missing],
        &["generate", "a", "--model", &missing],
        &["generate", "a", "--concepts", &missing],
        &["evaluate", "--prompts", &missing, "--out", &folder.path("out")],
        &["calibrate", "--prompts", &missing],
        &["concepts", "--add", &missing],
        &["concepts", "--key-file", &missing],
        &["worker", "--model", &missing],
        &["energy", "--model", &missing, "--concepts", &missing],
        &["coordinator", "--policies", &missing],
        &["coordinator", "--tls-ca", &missing],
        &["up", "--policies", &missing],
    ] {
        let output = says(arguments).await;
        assert!(!output.status.success(), "{arguments:?}");
        tells(&output, arguments[0]);
    }
    // They work, and say where.
    let made = folder.path(&format!("made-{HOSTILE}"));
    tells(&says(&["keys", "client", "--out", &made]).await, "a key");
    let made = folder.path(&format!("signing-{HOSTILE}"));
    tells(&says(&["keys", "signing", "--out", &made]).await, "a signing key");
    let made = folder.path(&format!("tls-{HOSTILE}"));
    says(&["keys", "tls", "worker-1", "--out", &made]).await;
}

#[tokio::test]
async fn contents_of_files() {
    let folder = Folder::new();
    let toml = format!("[policies.\"{}\"]\nconcepts = 7\n", HOSTILE.escape_default());
    let policies = folder.file("policies.toml", unicode_escapes(&toml));
    tells(&says(&["coordinator", "--policies", &policies]).await, "policies");
    let name = serde_json::Value::from(HOSTILE);
    let pack = format!(
        "[[concept]]\nname = {}\ngroup = \"g\"\ntargets = [\"a\"]\nanchors = [\"b\"]\n",
        name
    );
    let pack = folder.file("pack.toml", pack.replace('\u{7f}', "\\u007f"));
    tells(&says(&["concepts", "--add", &pack]).await, "concepts");
    let prompts = folder
        .file("prompts.json", format!("[{{\"prompt\": \"a\", {name}: 1, \"seed\": {name}}}]"));
    tells(
        &says(&["evaluate", "--prompts", &prompts, "--out", &folder.path("out")]).await,
        "a seed",
    );
    let prompts = folder.file("prompts.json", format!("[{{{name}: 1}}]"));
    tells(
        &says(&["evaluate", "--prompts", &prompts, "--out", &folder.path("out")]).await,
        "a column",
    );
    let image = folder.file("image.png", png());
    tells(&says(&["inspect", &image]).await, "a picture");
    let record = fairlead_common::record::to_json(&record());
    folder.file("image.json", record);
    let inspected = says(&["inspect", &image]).await;
    assert!(all(&inspected).contains("policy: x\\u{1b}]52"), "{}", all(&inspected));
    folder.file("image.json", format!("{{{name}: 1}}"));
    tells(&says(&["inspect", &image]).await, "a record");
}

/// TOML knows `\u{1b}` as `\u001b`.
fn unicode_escapes(text: &str) -> String {
    let mut parts = text.split("\\u{");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_once('}').expect("Rust closes its escapes");
        out.push_str(&format!("\\U{digits:0>8}{rest}"));
    }
    out
}

#[tokio::test]
async fn a_coordinator() {
    let folder = Folder::new();
    let out = folder.path("out");
    for (end, status) in [(End::Completed, 3), (End::Failed, 1), (End::Refused, 1)] {
        let server = coordinator(end).await;
        let prompt = format!("a cat {HOSTILE}");
        let output = says(&["generate", &prompt, "--server", &server, "--out", &out]).await;
        assert_eq!(output.status.code(), Some(status), "{}", all(&output));
        tells(&output, "a job");
    }
    let server = coordinator(End::Completed).await;
    tells(&says(&["concepts", "--server", &server]).await, "the catalog");
    tells(&says(&["concepts", "--server", &server, "--retire", HOSTILE]).await, "a retirement");
    let pack = "[[concept]]\nname = \"axe\"\ngroup = \"g\"\ntargets = [\"a\"]\nanchors = [\"b\"]\n";
    let pack = folder.file("pack.toml", pack);
    tells(&says(&["concepts", "--server", &server, "--add", &pack]).await, "a deployment");
    tells(&says(&["calibrate", "--server", &server, "--out", &out]).await, "models");
    let image = folder.file("image.png", png());
    tells(&says(&["inspect", &image, "--server", &server]).await, "a record");
    let keys = folder.path("key.pem");
    says(&["keys", "signing", "--out", &keys]).await;
    let signer = folder.path("key.pub.pem");
    tells(
        &says(&["verify", &image, "--signer", &signer, "--server", &server]).await,
        "a signature",
    );
}
