//! Requests: idempotency, paging, bounds, and every way to get one wrong.

use std::{collections::BTreeMap, time::Duration};

use fairlead_coordinator::CoordinatorOptions;
use fairlead_proto::v1::{self, JobState};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tonic::Code;

use crate::{
    cluster::{Cluster, assert_status, options, patient, spec},
    node::{Node, Script, describe},
    worker::Worker,
};

async fn start(options: CoordinatorOptions) -> (Cluster, Node, Worker) {
    let cluster = Cluster::start(options).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let worker = Worker::attach(&cluster, "w", 1).await;
    (cluster, node, worker)
}

#[tokio::test]
async fn the_same_key_and_body_is_one_job() {
    let (cluster, node, worker) = start(options()).await;
    let first = cluster.submit_with_key(spec(1), "key").await.expect("valid");
    let again = cluster.submit_with_key(spec(1), "key").await.expect("the same");
    assert_eq!(first.job_id, again.job_id);
    let other = cluster.submit_with_key(spec(2), "key").await;
    assert_status(other, Code::AlreadyExists, &first.job_id);
    // Even when the cluster could not admit it now.
    node.leave(&cluster).await;
    drop(worker);
    let again = cluster.submit_with_key(spec(1), "key").await.expect("the same");
    assert_eq!(first.job_id, again.job_id);
    let long = cluster.submit_with_key(spec(1), &"k".repeat(129)).await;
    assert_status(long, Code::InvalidArgument, "idempotency_key");
}

#[tokio::test]
async fn concurrent_submissions_with_one_key_are_one_job() {
    let (cluster, _node, _worker) = start(options()).await;
    let submits = (0..8).map(|_| cluster.submit_with_key(spec(1), "key"));
    let jobs = futures::future::try_join_all(submits).await.expect("all the same");
    assert!(jobs.iter().all(|job| job.job_id == jobs[0].job_id));
}

#[tokio::test]
async fn bad_specs_are_refused_by_field() {
    let (cluster, _node, _worker) = start(options()).await;
    type Spoil = fn(&mut v1::JobSpec);
    let cases: [(Spoil, Code, &str); 8] = [
        (|s| s.prompt.clear(), Code::InvalidArgument, "prompt: is empty"),
        (|s| s.n = 0, Code::InvalidArgument, "n: is 0"),
        (|s| s.n = 10_000, Code::InvalidArgument, "n: is 10000"),
        (|s| s.width = Some(63), Code::InvalidArgument, "nearest valid: 60 and 64"),
        (|s| s.steps = Some(0), Code::InvalidArgument, "steps: is 0"),
        (|s| s.steps = Some(30), Code::FailedPrecondition, "fairlead calibrate"),
        (|s| s.model = "dall-e".into(), Code::InvalidArgument, "known: `sd`"),
        (|s| s.extra_concepts = vec!["axes".into()], Code::InvalidArgument, "did you mean `axe`"),
    ];
    for (spoil, code, part) in cases {
        let mut spec = spec(1);
        spoil(&mut spec);
        assert_status(cluster.submit(spec).await, code, part);
    }
    let empty = v1::SubmitJobRequest::default();
    assert_status(patient(cluster.client().submit_job(empty)).await, Code::InvalidArgument, "spec");
}

#[tokio::test]
async fn a_cluster_without_workers_or_nodes_says_what_is_missing() {
    let cluster = Cluster::start(options()).await;
    assert_status(cluster.submit(spec(1)).await, Code::Unavailable, "no worker is attached");
    let _worker = Worker::attach(&cluster, "w", 1).await;
    assert_status(cluster.submit(spec(1)).await, Code::Unavailable, "no energy node is registered");
}

#[tokio::test]
async fn a_concept_whose_node_is_gone_stays_forbidden() {
    let (cluster, _node, _worker) = start(options()).await;
    let other = Node::start(&cluster, "other", &["pill"], Script::Closed).await;
    cluster.submit(spec(1)).await.expect("both are served");
    other.leave(&cluster).await;
    assert_status(cluster.submit(spec(1)).await, Code::Unavailable, "concept `pill`");
}

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let (cluster, _node, mut worker) =
        start(CoordinatorOptions { max_queued: 2, ..options() }).await;
    let running = cluster.submit(spec(1)).await.expect("valid");
    worker.assignment().await;
    let shards = |n| v1::JobSpec { max_shard_size: 1, ..spec(n) };
    let waiting = cluster.submit(shards(2)).await.expect("it fits");
    assert_status(cluster.submit(spec(1)).await, Code::ResourceExhausted, "2 shards wait");
    assert_eq!(waiting.state(), JobState::Queued);
    cluster.cancel(&waiting.job_id).await.expect("it waits");
    cluster.submit(spec(1)).await.expect("there is room again");
    assert_eq!(cluster.get(&running.job_id).await.state(), JobState::Running);
}

#[tokio::test]
async fn jobs_are_listed_newest_first_in_pages() {
    let (cluster, _node, _worker) = start(options()).await;
    let mut submitted = Vec::new();
    for _ in 0..5 {
        submitted.insert(0, cluster.submit(spec(1)).await.expect("valid").job_id);
    }
    let (mut listed, mut page_token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let request = v1::ListJobsRequest { page_size: 2, page_token };
        let page = patient(cluster.client().list_jobs(request)).await.expect("a page").into_inner();
        listed.extend(page.jobs.into_iter().map(|job| job.job_id));
        pages += 1;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!((listed, pages), (submitted, 3));
    for (page_size, page_token, part) in [(1001, "", "page_size"), (2, "next", "page_token")] {
        let request = v1::ListJobsRequest { page_size, page_token: page_token.into() };
        let listed = patient(cluster.client().list_jobs(request)).await;
        assert_status(listed, Code::InvalidArgument, part);
    }
}

#[tokio::test]
async fn unknown_things_are_not_found_and_malformed_ids_invalid() {
    let (cluster, _node, _worker) = start(options()).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let unknown = "0190a1b2-0000-7000-8000-000000000000";
    assert_status(cluster.cancel(unknown).await, Code::NotFound, unknown);
    assert_status(cluster.cancel("kitchen").await, Code::InvalidArgument, "`kitchen`");
    assert_status(cluster.image(&job.job_id, 7).await, Code::NotFound, "image 7");
    assert_status(cluster.image(&job.job_id, 0).await, Code::FailedPrecondition, "pending");
    assert_status(cluster.record("nothing").await, Code::NotFound, "record `nothing`");
    assert_status(cluster.record(&job.images[0].record_id).await, Code::NotFound, "image 0");
    // A store that failed over may have lost events that a client has heard: it goes on where that is.
    let mut ahead = cluster.watch(&job.job_id, 99).await;
    cluster.cancel(&job.job_id).await.expect("it waits");
    let heard = patient(ahead.message()).await.expect("a healthy stream").expect("news");
    assert!(heard.sequence > 1 && heard.sequence < 99, "{heard:?}");
    let ended = cluster.watch(&job.job_id, 99).await;
    let last = crate::cluster::collect(ended).await;
    assert_eq!(last.len(), 1, "the end alone: {last:?}");
}

#[tokio::test]
async fn nodes_of_another_version_are_refused_and_dead_registrations_unknown() {
    let (cluster, node, _worker) = start(options()).await;
    let mut old = describe("old", "http://127.0.0.1:1", "clip", &["axe"]);
    old.protocol_version = 99;
    let mut blurred = describe("blurred", "http://127.0.0.1:1", "clip", &["axe"]);
    blurred.preprocessing_version = 99;
    for (info, part) in [(old, "protocol 99"), (blurred, "preprocessing 99")] {
        let request = v1::RegisterNodeRequest { node: Some(info) };
        let result = patient(cluster.registry().register_node(request)).await;
        assert_status(result, Code::FailedPrecondition, part);
    }
    let renew = v1::RenewNodeRequest {
        node_id: node.info.node_id.clone(),
        registration_id: "of another life".into(),
    };
    let result = patient(cluster.registry().renew_node(renew)).await;
    assert_status(result, Code::NotFound, "register again");
}

#[tokio::test]
async fn a_name_belongs_to_the_node_that_answers_to_it() {
    let (cluster, node, _worker) = start(options()).await;
    let register = async |id: &str, address: &str| {
        let info = describe(id, address, "clip", &["axe"]);
        let request = v1::RegisterNodeRequest { node: Some(info) };
        patient(cluster.registry().register_node(request)).await.map(drop)
    };
    const ELSEWHERE: &str = "http://127.0.0.1:1";
    let at = format!("runs at {} already", node.info.address);
    assert_status(register(&node.info.node_id, ELSEWHERE).await, Code::AlreadyExists, &at);
    register(&node.info.node_id, &node.info.address).await.expect("it registers again");

    // One that was killed has come back elsewhere before its registration ended.
    let mut killed = Node::start(&cluster, "killed", &["axe"], Script::Closed).await;
    killed.die().await;
    // One is frozen: it takes connections, and that is all.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let frozen = format!("http://{}", listener.local_addr().expect("an address"));
    register("frozen", &frozen).await.expect("nobody has the name");
    // Another has the address of one.
    register("moved", &node.info.address).await.expect("nobody has the name");
    for id in ["killed", "moved"] {
        register(id, ELSEWHERE).await.expect(id);
    }
    // A node waits five seconds.
    let in_time = timeout(Duration::from_secs(5), register("frozen", ELSEWHERE)).await;
    in_time.expect("in time").expect("nobody answers at its address");
    // One has come back on its port and calls itself otherwise: it answers at both addresses.
    let renamed = Node::start(&cluster, "renamed", &["axe"], Script::Closed).await;
    renamed.leave(&cluster).await;
    let former = renamed.info.address.replace("127.0.0.1", "localhost");
    let connected = TcpStream::connect(former.trim_start_matches("http://")).await;
    connected.expect("it listens at both");
    register("renamed", &former).await.expect("nobody has the name");
    register("renamed", &renamed.info.address).await.expect("that is itself");

    let served = patient(cluster.catalog().list_concepts(v1::ListConceptsRequest {})).await;
    let served = served.expect("a list").into_inner().concepts.remove(0).nodes;
    let at: BTreeMap<&str, &str> =
        served.iter().map(|node| (node.node_id.as_str(), node.address.as_str())).collect();
    let expected = [
        ("frozen", ELSEWHERE),
        ("killed", ELSEWHERE),
        ("moved", ELSEWHERE),
        ("node", &node.info.address),
        ("renamed", &renamed.info.address),
    ];
    assert_eq!(at, expected.into());
}
