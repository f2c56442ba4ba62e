//! Tenants: keys, whose jobs are whose, quotas, and changes of the file while the coordinator runs.

use fairlead_coordinator::{CoordinatorOptions, Policies};
use fairlead_proto::v1::{
    self, Priority, catalog_service_client::CatalogServiceClient,
    generation_service_client::GenerationServiceClient,
};
use sha2::{Digest, Sha256};
use tonic::{
    Code, Request, Response, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tonic_types::StatusExt;

use crate::{
    cluster::{Cluster, assert_status, options, patient, spec},
    node::{Node, Script},
    worker::Worker,
};

#[derive(Clone)]
struct Header(&'static str);

impl Interceptor for Header {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", MetadataValue::from_static(self.0));
        Ok(request)
    }
}

type Keyed = InterceptedService<Channel, Header>;

fn client(cluster: &Cluster, header: &'static str) -> GenerationServiceClient<Keyed> {
    GenerationServiceClient::with_interceptor(cluster.channel(), Header(header))
}

const ACME: &str = "Bearer key-of-acme";
const OTHER: &str = "bearer key-of-other";
const ADMIN: &str = "Bearer key-of-admin";

fn line(key: &str) -> String {
    format!("keys = ['sha256:{}']", hex::encode(Sha256::digest(key)))
}

fn file() -> String {
    format!(
        "[policies.default]\nconcepts = ['*']\n\
         [policies.observe]\nconcepts = ['*']\nobserve_only = true\n\
         [tenants.acme]\n{}\nmax_queued = 2\nconcepts = ['pill']\n\
         [tenants.other]\n{}\nimages_per_minute = 2\n\
         [tenants.admin]\n{}\nadmin = true\npolicies = ['*']\n",
        line("key-of-acme"),
        line("key-of-other"),
        line("key-of-admin"),
    )
}

fn tenants() -> CoordinatorOptions {
    CoordinatorOptions { policies: Policies::parse(&file()).expect("it is right"), ..options() }
}

async fn start(options: CoordinatorOptions) -> (Cluster, Node, Worker) {
    let cluster = Cluster::start(options).await;
    let node = Node::start(&cluster, "node", &["axe", "pill"], Script::Closed).await;
    let worker = Worker::attach(&cluster, "w", 1).await;
    (cluster, node, worker)
}

async fn submit(
    cluster: &Cluster,
    header: &'static str,
    spec: v1::JobSpec,
) -> Result<v1::Job, Status> {
    let request = v1::SubmitJobRequest { spec: Some(spec), idempotency_key: "key".into() };
    let response = patient(client(cluster, header).submit_job(request)).await?;
    Ok(response.into_inner().job.expect("a job"))
}

#[tokio::test]
async fn without_a_tenants_key_nothing_is_answered() {
    let (cluster, _node, _worker) = start(tenants()).await;
    assert_status(cluster.submit(spec(1)).await, Code::Unauthenticated, "no key");
    for header in ["Bearer key-of-nobody", "Bearer ", "Basic key-of-acme", "key-of-acme"] {
        let refused = submit(&cluster, header, spec(1)).await;
        assert_status(refused, Code::Unauthenticated, "not authenticated");
    }
    let (mut generation, mut catalog) = (cluster.client(), cluster.catalog());
    let id = String::new;
    let unauthenticated = [
        patient(generation.get_job(v1::GetJobRequest { job_id: id() })).await.map(drop),
        patient(generation.list_jobs(v1::ListJobsRequest::default())).await.map(drop),
        patient(generation.cancel_job(v1::CancelJobRequest { job_id: id() })).await.map(drop),
        patient(generation.watch_job(v1::WatchJobRequest::default())).await.map(drop),
        patient(generation.get_image(v1::GetImageRequest::default())).await.map(drop),
        patient(generation.get_record(v1::GetRecordRequest::default())).await.map(drop),
        patient(catalog.list_models(v1::ListModelsRequest {})).await.map(drop),
        patient(catalog.list_concepts(v1::ListConceptsRequest {})).await.map(drop),
        patient(catalog.retire_concept(v1::RetireConceptRequest::default())).await.map(drop),
        patient(catalog.deploy_concepts(v1::DeployConceptsRequest::default())).await.map(drop),
    ];
    for answer in unauthenticated {
        assert_status(answer, Code::Unauthenticated, "no key");
    }
    submit(&cluster, ACME, spec(1)).await.expect("its key opens");
}

#[tokio::test]
async fn a_tenant_sees_its_own_jobs_and_an_admin_all() {
    let (cluster, _node, mut worker) = start(tenants()).await;
    let job = submit(&cluster, ACME, spec(1)).await.expect("its key opens");
    let assignment = worker.assignment().await;
    worker.complete(&assignment).await;
    assert_eq!(worker.commit_reply().await.status(), v1::CommitStatus::Accepted);
    let theirs = submit(&cluster, OTHER, spec(1)).await.expect("its key opens");
    assert_ne!(job.job_id, theirs.job_id, "the same idempotency key of another tenant");

    let (job_id, record_id) = (job.job_id.clone(), job.images[0].record_id.clone());
    let get = v1::GetJobRequest { job_id: job_id.clone() };
    let watch = v1::WatchJobRequest { job_id: job_id.clone(), after_sequence: 0 };
    let image = v1::GetImageRequest { job_id: job_id.clone(), index: 0 };
    let record = v1::GetRecordRequest { record_id: record_id.clone(), ..Default::default() };
    let by_job = v1::GetRecordRequest { job_id: job_id.clone(), ..Default::default() };
    let mut other = client(&cluster, OTHER);
    for answer in [
        patient(other.get_job(get.clone())).await.map(drop),
        patient(other.watch_job(watch.clone())).await.map(drop),
        patient(other.get_image(image.clone())).await.map(drop),
        patient(other.get_record(by_job)).await.map(drop),
        patient(other.cancel_job(v1::CancelJobRequest { job_id: job_id.clone() })).await.map(drop),
    ] {
        assert_status(answer, Code::NotFound, &format!("job {job_id} does not exist"));
    }
    // Not even which job a record belongs to.
    let refused = patient(other.get_record(record.clone())).await;
    assert_status(refused, Code::NotFound, &format!("record `{record_id}` does not exist"));

    for header in [ACME, ADMIN] {
        let mut client = client(&cluster, header);
        let watched = patient(client.watch_job(watch.clone())).await.expect("it may");
        assert!(!crate::cluster::collect(watched.into_inner()).await.is_empty());
        patient(client.get_job(get.clone())).await.expect("it may");
        patient(client.get_image(image.clone())).await.expect("it was released");
        patient(client.get_record(record.clone())).await.expect("it was released");
    }
    let listed = async |header| {
        let request = v1::ListJobsRequest::default();
        let page = patient(client(&cluster, header).list_jobs(request)).await.expect("a page");
        page.into_inner().jobs.into_iter().map(|job| job.job_id).collect::<Vec<_>>()
    };
    assert_eq!(listed(ACME).await, [job_id.as_str()]);
    assert_eq!(listed(OTHER).await, [theirs.job_id.as_str()]);
    assert_eq!(listed(ADMIN).await, [theirs.job_id, job_id]);

    let retire = async |header| -> Result<Response<_>, Status> {
        let mut catalog = CatalogServiceClient::with_interceptor(cluster.channel(), Header(header));
        let request = v1::RetireConceptRequest { concept: "axe".into() };
        patient(catalog.retire_concept(request)).await
    };
    assert_status(retire(ACME).await, Code::PermissionDenied, "tenant `acme` is no admin");
    assert_status(retire(ADMIN).await, Code::FailedPrecondition, "serves it");
}

#[tokio::test]
async fn only_an_admin_gives_concepts_to_nodes_and_hears_what_each_says() {
    let (cluster, _node, _worker) = start(tenants()).await;
    let deploy = async |header, node_ids: &[&str]| {
        let mut catalog = CatalogServiceClient::with_interceptor(cluster.channel(), Header(header));
        let node_ids = node_ids.iter().map(|&id| id.to_owned()).collect();
        let request = v1::DeployConceptsRequest { node_ids, ..Default::default() };
        patient(catalog.deploy_concepts(request)).await
    };
    assert_status(deploy(ACME, &[]).await, Code::PermissionDenied, "tenant `acme` is no admin");
    let unknown = deploy(ADMIN, &["nobody"]).await;
    assert_status(
        unknown,
        Code::InvalidArgument,
        "no live energy node is called `nobody`; known: `node`",
    );
    let answer = deploy(ADMIN, &[]).await.expect("asked").into_inner();
    let [deployment] = answer.deployments.as_slice() else { panic!("one node: {answer:?}") };
    assert_eq!(deployment.error, "Unimplemented: not needed here");
    assert!(deployment.concepts.is_empty());
}

#[tokio::test]
async fn a_tenant_gets_what_its_lines_say() {
    let (cluster, _node, mut worker) = start(tenants()).await;
    let unkeyed = async |header, spec: v1::JobSpec| {
        let request = v1::SubmitJobRequest { spec: Some(spec), ..Default::default() };
        let response = patient(client(&cluster, header).submit_job(request)).await?;
        Ok::<_, Status>(response.into_inner().job.expect("a job"))
    };
    let observe = v1::JobSpec { policy: "observe".into(), ..spec(1) };
    let refused = unkeyed(ACME, observe.clone()).await;
    assert_status(refused, Code::PermissionDenied, "`observe` is none of tenant `acme`'s");
    unkeyed(ADMIN, observe).await.expect("it may");
    let high = v1::JobSpec { priority: Priority::High.into(), ..spec(1) };
    assert_status(unkeyed(ACME, high).await, Code::PermissionDenied, "above the highest");

    worker.assignment().await;
    let shards = |n| v1::JobSpec { max_shard_size: 1, ..spec(n) };
    unkeyed(ACME, shards(2)).await.expect("two may wait");
    let refused = unkeyed(ACME, spec(1)).await.expect_err("the third may not");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("2 shards waiting"), "{refused}");
    assert!(refused.get_details_retry_info().is_some(), "it says when");
    unkeyed(OTHER, spec(2)).await.expect("others have their own room");
    let refused = unkeyed(OTHER, spec(1)).await.expect_err("but no more this minute");
    assert!(refused.message().contains("2 images a minute"), "{refused}");
    let hint = refused.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(hint.is_some_and(|wait| wait.as_secs() >= 25 && wait.as_secs() <= 30), "{hint:?}");
}

#[tokio::test]
async fn a_tenants_concepts_are_mandatory_beside_its_policys() {
    let text = file()
        .replace("concepts = ['*']\n[policies.observe]", "concepts = ['axe']\n[policies.observe]");
    let policies = Policies::parse(&text).expect("it is right");
    let (cluster, _node, _worker) = start(CoordinatorOptions { policies, ..options() }).await;
    let concepts = async |header| {
        let job = submit(&cluster, header, spec(1)).await.expect("its key opens");
        let concepts = job.policy.expect("pinned").concepts;
        concepts.into_iter().map(|concept| concept.name).collect::<Vec<_>>()
    };
    assert_eq!(concepts(OTHER).await, ["axe"]);
    assert_eq!(concepts(ACME).await, ["axe", "pill"]);
}

#[tokio::test]
async fn the_file_is_read_again_when_it_changes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("policies.toml");
    std::fs::write(&path, file()).expect("it is written");
    let options = CoordinatorOptions { policies_file: Some(path.clone()), ..tenants() };
    let (cluster, _node, _worker) = start(options).await;
    let until = async |header, wanted: bool| {
        let changed = async {
            while submit(&cluster, header, spec(1)).await.is_ok() != wanted {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        patient(changed).await;
    };
    let new = format!("{}[tenants.new]\n{}\n", file(), line("key-of-new"));
    std::fs::write(&path, &new).expect("it is written");
    until("Bearer key-of-new", true).await;
    submit(&cluster, ACME, spec(1)).await.expect("the others stay");

    std::fs::write(&path, file()).expect("it is written");
    until("Bearer key-of-new", false).await;
}

/// Every answer that a client gets about a job and its record, in words.
async fn told(cluster: &Cluster, header: &'static str, job: &v1::Job) -> Vec<String> {
    let mut client = client(cluster, header);
    let (job_id, record_id) = (job.job_id.clone(), job.images[0].record_id.clone());
    let watch = v1::WatchJobRequest { job_id: job_id.clone(), after_sequence: 0 };
    let get = v1::GetJobRequest { job_id: job_id.clone() };
    let cancel = v1::CancelJobRequest { job_id };
    let record = v1::GetRecordRequest { record_id, ..Default::default() };
    let watched = patient(client.watch_job(watch)).await.expect("it may").into_inner();
    let list = v1::ListJobsRequest::default();
    vec![
        format!("{:?}", submit(cluster, header, spec(1)).await.expect("the same job again")),
        format!("{:?}", crate::cluster::collect(watched).await),
        format!("{:?}", patient(client.get_job(get)).await.expect("it may").into_inner()),
        format!("{:?}", patient(client.list_jobs(list)).await.expect("it may").into_inner()),
        format!("{:?}", patient(client.cancel_job(cancel)).await.expect("it may").into_inner()),
        format!("{:?}", patient(client.get_record(record)).await.expect("it may").into_inner()),
    ]
}

/// A job of which the one image is withheld for its axe.
async fn withheld(cluster: &Cluster, worker: &mut Worker, header: &'static str) -> v1::Job {
    let job = submit(cluster, header, spec(1)).await.expect("its key opens");
    let assignment = worker.assignment().await;
    worker.complete(&assignment).await;
    assert_eq!(worker.commit_reply().await.status(), v1::CommitStatus::Accepted);
    job
}

#[tokio::test]
async fn who_may_not_see_scores_is_told_what_was_found_and_not_how_nearly() {
    let seeing = file().replace("images_per_minute = 2", "sees_scores = true");
    let policies = Policies::parse(&seeing).expect("it is right");
    let cluster = Cluster::start(CoordinatorOptions { policies, ..options() }).await;
    let _node = Node::start(&cluster, "node", &["axe", "pill"], Script::Open("axe")).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    for (header, sees) in [(ACME, false), (OTHER, true)] {
        let job = withheld(&cluster, &mut worker, header).await;
        for answer in told(&cluster, header, &job).await {
            assert!(answer.contains("concept: \"axe\""), "why it was withheld: {answer}");
            assert_eq!(answer.contains("gate: 3.0"), sees, "{header}: {answer}");
        }
    }
}

#[tokio::test]
async fn a_tenant_with_too_many_withheld_images_has_to_wait() {
    let text = file().replace("images_per_minute = 2", "withheld_per_minute = 1");
    let policies = Policies::parse(&text).expect("it is right");
    let cluster = Cluster::start(CoordinatorOptions { policies, ..options() }).await;
    let _node = Node::start(&cluster, "node", &["axe", "pill"], Script::Open("axe")).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    withheld(&cluster, &mut worker, OTHER).await;
    let fresh = async |header| {
        let request = v1::SubmitJobRequest { spec: Some(spec(1)), ..Default::default() };
        patient(client(&cluster, header).submit_job(request)).await
    };
    let refused = fresh(OTHER).await.expect_err("one a minute");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused.message().contains("too many of its images were withheld; 1 a minute"),
        "{refused}"
    );
    let hint = refused.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(hint.is_some_and(|wait| wait.as_secs() <= 60), "{hint:?}");
    submit(&cluster, OTHER, spec(1)).await.expect("what was admitted is there still");
    fresh(ACME).await.expect("others have their own bound");
    fresh(ADMIN).await.expect("others have their own bound");
}
