use std::{collections::VecDeque, pin::Pin, sync::Mutex};

use fairlead_coordinator::CoordinatorOptions;
use fairlead_proto::v1::{
    CancelJobResponse, GetImageResponse, GetJobResponse, GetRecordResponse, ListJobsRequest,
    ListJobsResponse, SubmitJobResponse, WatchJobResponse,
    generation_service_server::{GenerationService, GenerationServiceServer},
};
use futures::{Stream, future::try_join_all, stream};
use tokio::net::TcpListener;
use tonic::transport::Server;

use super::*;

/// Longer than a test.
const LONG: Duration = Duration::from_secs(60);
/// Shorter than what is quiet.
const SHORT: Duration = Duration::from_millis(200);
const QUIET: Duration = Duration::from_millis(500);

fn client(address: &str, deadline: Duration, away: Duration) -> Client {
    Client::with_patience(address, Credentials::default(), deadline, away).expect("an address")
}

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("it has an address"));
    (listener, address)
}

#[tokio::test]
async fn a_coordinator_that_is_silent_is_passed_over() {
    // It takes connections and never reads.
    let (_silent, silent) = listener().await;
    let (listener, address) = listener().await;
    let (options, stop) = (CoordinatorOptions::default(), CancellationToken::new());
    let coordinator = tokio::spawn(fairlead_coordinator::run(listener, options, stop.clone()));
    client(&address, LONG, LONG).models().await.expect("it runs");
    // Each begins with one of the two, by chance.
    let both = format!("{silent}, {address}");
    let ask = async |_| client(&both, ABSENT, LONG).models().await;
    let answers = try_join_all((0..16).map(ask)).await.expect("one of the two answers");
    assert!(answers.iter().all(Vec::is_empty), "{answers:?}");
    stop.cancel();
    coordinator.await.expect("no panic").expect("it ends in order");
}

/// What becomes of one call for a watch.
#[derive(Clone, Copy)]
enum Watch {
    /// It says nothing for a while and breaks.
    Breaks,
    Refused,
    /// It says that the job has ended.
    Ends,
}

/// The calls of a script, the last for ever.
struct Script(Mutex<VecDeque<Watch>>);

#[tonic::async_trait]
impl GenerationService for Script {
    type WatchJobStream = Pin<Box<dyn Stream<Item = Result<WatchJobResponse, Status>> + Send>>;

    async fn watch_job(
        &self,
        _request: Request<WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let watch = {
            let mut script = self.0.lock().expect("no panic");
            let next = script.front().copied().expect("a script has a last call");
            if script.len() > 1 {
                script.pop_front();
            }
            next
        };
        match watch {
            Watch::Refused => Err(Status::unavailable("stopping")),
            Watch::Breaks => Ok(Response::new(Box::pin(stream::once(async {
                tokio::time::sleep(QUIET).await;
                Err(Status::unavailable("stopping"))
            })))),
            Watch::Ends => {
                let mut job = Job::default();
                job.set_state(JobState::Completed);
                let last = WatchJobResponse { sequence: 1, event: Some(Event::Job(job)) };
                Ok(Response::new(Box::pin(stream::iter([Ok(last)]))))
            }
        }
    }

    async fn submit_job(
        &self,
        _request: Request<SubmitJobRequest>,
    ) -> Result<Response<SubmitJobResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }

    async fn get_job(
        &self,
        _request: Request<GetJobRequest>,
    ) -> Result<Response<GetJobResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }

    async fn cancel_job(
        &self,
        _request: Request<CancelJobRequest>,
    ) -> Result<Response<CancelJobResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }

    async fn list_jobs(
        &self,
        _request: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }

    async fn get_image(
        &self,
        _request: Request<GetImageRequest>,
    ) -> Result<Response<GetImageResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }

    async fn get_record(
        &self,
        _request: Request<GetRecordRequest>,
    ) -> Result<Response<GetRecordResponse>, Status> {
        Err(Status::unimplemented("not in a script"))
    }
}

async fn followed(script: &[Watch]) -> Result<Job> {
    let (listener, address) = listener().await;
    let service = GenerationServiceServer::new(Script(Mutex::new(script.to_vec().into())));
    let serve = Server::builder().add_service(service);
    tokio::spawn(serve.serve_with_incoming(grpc::incoming(listener)));
    let client = client(&address, LONG, SHORT);
    let (job, stop) = (Job::default(), CancellationToken::new());
    let follow = client.follow(&job, &stop, |_| {});
    tokio::time::timeout(LONG, follow).await.expect("it ends")
}

#[tokio::test]
async fn a_job_of_which_nothing_is_heard_for_long_is_followed_to_its_end() {
    let job = followed(&[Watch::Breaks, Watch::Refused, Watch::Ends]).await;
    assert_eq!(job.expect("the second watch tells").state(), JobState::Completed);
    let error = followed(&[Watch::Breaks, Watch::Refused]).await.expect_err("it is gone");
    assert!(format!("{error:#}").contains("stopping"), "{error:#}");
}
