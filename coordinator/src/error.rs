//! Everything that can go wrong here, and the one table from it to gRPC codes.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use fairlead_common::{identity::Refusal, limits::FieldError, signature::KeyError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{outputs::OutputError, policy::PolicyError, store::StoreError};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// When a full queue is tried again.
const FULL_RETRY: Duration = Duration::from_secs(2);

/// An error of the coordinator. The message says what, where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a request is not acceptable.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field as the contract names it.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// There is no such job, image or record.
    #[error("{0} does not exist")]
    NotFound(String),
    /// A concept that is to be retired and has a node.
    #[error(
        "concept `{concept}` cannot be retired: node `{node}` serves it; stop it, or start it \
         again without the concept"
    )]
    StillServed {
        /// The concept.
        concept: String,
        /// A live node that serves it.
        node: String,
    },
    /// Another node has the name.
    #[error(
        "node `{node_id}` runs at {address} already; give each node a --node-id of its own, or stop that one"
    )]
    NodeIdTaken {
        /// The name.
        node_id: String,
        /// Where the node is that has it.
        address: String,
    },
    /// A registration that has ended or was replaced.
    #[error("node `{node_id}` is not registered under this registration; register again")]
    NotRegistered {
        /// The node.
        node_id: String,
    },
    /// The image exists but was not released.
    #[error("image {index} of job {job_id} was not released: it is {status}{hint}")]
    NotReleased {
        /// The job.
        job_id: String,
        /// The image.
        index: u32,
        /// Its status.
        status: &'static str,
        /// What to do, or empty.
        hint: &'static str,
    },
    /// An idempotency key that was used with another request.
    #[error(
        "idempotency key `{key}` was used for job {job_id} with another request; \
         use a new key for a new request"
    )]
    KeyReused {
        /// The key.
        key: String,
        /// The job made with it.
        job_id: String,
    },
    /// No live node has a concept calibrated for the generator.
    #[error(
        "concept `{concept}` has no calibration for model `{model}` ({run}) at any live energy node; \
         make one with `fairlead calibrate {flags}` (and --concepts FILE where the concept comes from a \
         file of yours) in the folder of its node's --calibrations, or use a policy with \
         allow_calibration_fallback = true"
    )]
    NotCalibrated {
        /// The concept.
        concept: String,
        /// The generator's name.
        model: String,
        /// What the calibration must be for.
        run: String,
        /// The flags that make it.
        flags: String,
    },
    /// A job that no calibration was made for, though there is one for its generator, sampler and steps.
    #[error(
        "model `{model}`: concept `{concept}` is not calibrated for this job ({ways}): extend its calibration \
         with `fairlead calibrate {flags}` (and --concepts FILE where the concept comes from a file of yours) \
         in the folder of its node's --calibrations, or use a policy with outside = \"withhold-unless-clear\""
    )]
    OutsideEnvelope {
        /// The concept.
        concept: String,
        /// The generator's name.
        model: String,
        /// What of the job no calibration covers.
        ways: String,
        /// The flags that make one that does.
        flags: String,
    },
    /// A peer of another version, or one that contradicts the cluster.
    #[error("{0}")]
    Incompatible(String),
    /// Something that is needed is not there now.
    #[error("{0}")]
    Unavailable(String),
    /// The queue of shards is full.
    #[error("the queue is full ({limit} shards wait); retry later or raise --max-queued")]
    QueueFull {
        /// The bound.
        limit: usize,
    },
    /// A tenant has as many shards waiting as it may.
    #[error(
        "tenant `{tenant}` may have {limit} shards waiting (max_queued); retry when some have run"
    )]
    TenantFull {
        /// The tenant.
        tenant: String,
        /// The bound.
        limit: usize,
    },
    /// A tenant has asked for as many images in a minute as it may.
    #[error(
        "tenant `{tenant}` may ask for {limit} images a minute (images_per_minute); retry in {:.1} s",
        wait.as_secs_f64()
    )]
    TooFast {
        /// The tenant.
        tenant: String,
        /// The bound.
        limit: u32,
        /// Until there is room.
        wait: Duration,
    },
    /// A tenant with more withheld images than it may have.
    #[error(
        "tenant `{tenant}`: too many of its images were withheld; {limit} a minute may be \
         (withheld_per_minute); retry in {:.1} s",
        wait.as_secs_f64()
    )]
    TooManyWithheld {
        /// The tenant.
        tenant: String,
        /// The bound.
        limit: u32,
        /// Until it may ask again.
        wait: Duration,
    },
    /// A call without the key or certificate that it needs.
    #[error("not authenticated: {problem}")]
    Unauthenticated {
        /// What is missing and where it comes from.
        problem: &'static str,
    },
    /// A service that calls without the certificate for it.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// A tenant or service that asks for what it may not have.
    #[error("{0}")]
    Forbidden(String),
    /// A stored object is not what was signed and released.
    #[error("{object} {problem}; it was changed or lost where it is stored, and is not handed out")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The coordinator is stopping.
    #[error("the coordinator is stopping; retry against its successor")]
    Stopping,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object store failed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The policies file is wrong.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The key that signs records cannot be used.
    #[error("--signing-key: {0}")]
    Key(#[from] KeyError),
    /// The server failed.
    #[error("gRPC server: {0}")]
    Server(#[from] tonic::transport::Error),
    /// A file or socket failed.
    #[error("{what}: {source}")]
    Io {
        /// The file or socket and what was done to it.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    /// What whoever called is told. Their own part in it is told in full; of what failed inside nothing
    /// that says where the cluster keeps things or what it runs on: the coordinator's log has that.
    pub(crate) fn public(&self) -> String {
        const LOG: &str = "the coordinator's log says more";
        match self {
            Self::Store(StoreError::Refused(refusal)) => refusal.to_string(),
            Self::Store(StoreError::UnknownJob(job)) => format!("job {job} does not exist"),
            Self::Store(StoreError::Away { .. }) => {
                format!("the cluster's store cannot be used now; retry later ({LOG})")
            }
            Self::Store(StoreError::Corrupt(_)) => {
                format!("what the store has cannot be read; ask the operator ({LOG})")
            }
            Self::Store(StoreError::Backend { .. }) => {
                format!("the cluster's store failed; ask the operator ({LOG})")
            }
            Self::Output(OutputError::Folder(_) | OutputError::Object { .. }) => {
                format!("images cannot be stored or read now; retry later ({LOG})")
            }
            Self::Output(OutputError::Record { .. }) => {
                format!("a record cannot be read; ask the operator ({LOG})")
            }
            Self::Policy(_) | Self::Key(_) | Self::Server(_) | Self::Io { .. } => {
                format!("the coordinator failed; ask the operator ({LOG})")
            }
            Self::Invalid { .. }
            | Self::NotFound(_)
            | Self::StillServed { .. }
            | Self::NodeIdTaken { .. }
            | Self::NotRegistered { .. }
            | Self::NotReleased { .. }
            | Self::KeyReused { .. }
            | Self::NotCalibrated { .. }
            | Self::OutsideEnvelope { .. }
            | Self::Incompatible(_)
            | Self::Unavailable(_)
            | Self::QueueFull { .. }
            | Self::TenantFull { .. }
            | Self::TooFast { .. }
            | Self::TooManyWithheld { .. }
            | Self::Refused(_)
            | Self::Unauthenticated { .. }
            | Self::Forbidden(_)
            | Self::Damaged { .. }
            | Self::Stopping => self.to_string(),
        }
    }

    /// When the same request may succeed, of those that are too many now: `google.rpc.RetryInfo` in the
    /// status.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { .. } | Self::TenantFull { .. } => Some(FULL_RETRY),
            Self::TooFast { wait, .. } | Self::TooManyWithheld { wait, .. } => Some(*wait),
            _ => None,
        }
    }

    /// The gRPC code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Policy(_) => Code::InvalidArgument,
            Self::NotFound(_) | Self::NotRegistered { .. } => Code::NotFound,
            Self::NotReleased { .. }
            | Self::NotCalibrated { .. }
            | Self::OutsideEnvelope { .. }
            | Self::Incompatible(_)
            | Self::StillServed { .. } => Code::FailedPrecondition,
            Self::KeyReused { .. } | Self::NodeIdTaken { .. } => Code::AlreadyExists,
            Self::Unavailable(_) | Self::Stopping => Code::Unavailable,
            Self::QueueFull { .. }
            | Self::TenantFull { .. }
            | Self::TooFast { .. }
            | Self::TooManyWithheld { .. } => Code::ResourceExhausted,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::Forbidden(_) => Code::PermissionDenied,
            Self::Refused(refusal) => refusal.code(),
            Self::Damaged { .. } => Code::DataLoss,
            Self::Store(StoreError::Refused(_)) => Code::Aborted,
            Self::Store(StoreError::UnknownJob(_)) => Code::NotFound,
            Self::Store(StoreError::Away { .. })
            | Self::Output(OutputError::Folder(_) | OutputError::Object { .. }) => {
                Code::Unavailable
            }
            Self::Store(_) | Self::Output(_) | Self::Server(_) | Self::Key(_) | Self::Io { .. } => {
                Code::Internal
            }
        }
    }
}

impl From<FieldError> for Error {
    fn from(FieldError { field, problem }: FieldError) -> Self {
        Self::Invalid { field, problem }
    }
}

/// What a worker, a node or the store says, for whoever asked for a job: without addresses and paths.
pub(crate) fn without_places(text: &str) -> String {
    let is_edge = |c: char| "(),;.`'\"".contains(c);
    let words = text.split(' ').map(|word| {
        let inner = word.trim_matches(is_edge).trim_end_matches(':');
        let found = match inner {
            _ if inner.contains("://") => "an address",
            _ if inner.parse::<SocketAddr>().is_ok() || inner.parse::<IpAddr>().is_ok() => {
                "an address"
            }
            _ if is_host_and_port(inner) => "an address",
            _ if inner.starts_with('/') && inner.len() > 1 => "a path",
            _ => return word.to_owned(),
        };
        word.replace(inner, found)
    });
    words.collect::<Vec<_>>().join(" ")
}

fn is_host_and_port(word: &str) -> bool {
    let Some((host, port)) = word.rsplit_once(':') else { return false };
    let is_host = host == "localhost" || host.contains(['.', ':']);
    is_host && !host.contains('/') && port.parse::<u16>().is_ok()
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = error.code();
        let public = error.public();
        if matches!(code, Code::Internal | Code::DataLoss) || public != error.to_string() {
            tracing::error!(%error, "request failed");
        }
        match error.retry_after() {
            None => Status::new(code, public),
            wait => {
                let details = ErrorDetails::with_retry_info(wait);
                Status::with_error_details(code, public, details)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use fairlead_common::ids::JobId;

    use super::*;
    use crate::{lease::LeaseError, transition::Refusal};

    /// One of each that a request can meet.
    fn samples() -> Vec<(Error, Code)> {
        let io = || std::io::Error::other("disk");
        vec![
            (Error::invalid("n", "is 0; ask for 1 to 64 images"), Code::InvalidArgument),
            (Error::NotFound("job 7".into()), Code::NotFound),
            (Error::NotRegistered { node_id: "n".into() }, Code::NotFound),
            (
                Error::NotReleased {
                    job_id: "j".into(),
                    index: 0,
                    status: "withheld",
                    hint: "; its record says why",
                },
                Code::FailedPrecondition,
            ),
            (Error::KeyReused { key: "k".into(), job_id: "j".into() }, Code::AlreadyExists),
            (Error::NodeIdTaken { node_id: "n".into(), address: "a".into() }, Code::AlreadyExists),
            (
                Error::NotCalibrated {
                    concept: "axe".into(),
                    model: "m".into(),
                    run: "ddim, 25 steps".into(),
                    flags: "--steps 25".into(),
                },
                Code::FailedPrecondition,
            ),
            (
                Error::OutsideEnvelope {
                    concept: "axe".into(),
                    model: "m".into(),
                    ways: "size 64x64, calibrated 32x32".into(),
                    flags: "--size 32x32,64x64".into(),
                },
                Code::FailedPrecondition,
            ),
            (Error::Incompatible("protocol 2".into()), Code::FailedPrecondition),
            (Error::Unavailable("no worker".into()), Code::Unavailable),
            (Error::QueueFull { limit: 4 }, Code::ResourceExhausted),
            (Error::TenantFull { tenant: "a".into(), limit: 4 }, Code::ResourceExhausted),
            (Error::Unauthenticated { problem: "no key" }, Code::Unauthenticated),
            (Error::Forbidden("no admin".into()), Code::PermissionDenied),
            (
                Error::Damaged { object: "image 0".into(), problem: "is missing".into() },
                Code::DataLoss,
            ),
            (Error::Stopping, Code::Unavailable),
            (
                Error::Store(StoreError::Refused(Refusal::Lease(LeaseError::TooEarly(5)))),
                Code::Aborted,
            ),
            (Error::Store(StoreError::Corrupt("job 7".into())), Code::Internal),
            (Error::Policy(PolicyError::NoPolicies), Code::InvalidArgument),
            (Error::Io { what: "data dir".into(), source: io() }, Code::Internal),
            (Error::Store(StoreError::UnknownJob(JobId::generate(0))), Code::NotFound),
            (
                Error::StillServed { concept: "axe".into(), node: "n".into() },
                Code::FailedPrecondition,
            ),
            (
                Error::TooFast { tenant: "a".into(), limit: 4, wait: Duration::from_secs(1) },
                Code::ResourceExhausted,
            ),
        ]
    }

    /// What must not get out, in everything that can hold it.
    const SECRETS: [&str; 4] =
        ["redis://10.0.0.7:6379", "f_1b9a1f2c", "/var/lib/fairlead", "node-7.internal"];

    /// One of each that fails inside.
    fn inner() -> Vec<Error> {
        let secret = || SECRETS.join(" ");
        let io = || std::io::Error::other(secret());
        let object = || object_store::Error::Generic { store: "file", source: io().into() };
        let json = || fairlead_common::record::from_json("").expect_err("it is none");
        vec![
            StoreError::Away { what: "read a job", problem: secret() }.into(),
            StoreError::Backend { what: "read a job", problem: secret() }.into(),
            StoreError::Corrupt(secret()).into(),
            OutputError::Object { object: secret(), source: object() }.into(),
            OutputError::Record { object: secret(), source: json() }.into(),
            OutputError::Folder(secret()).into(),
            Error::Io { what: secret(), source: io() },
            PolicyError::Read { path: secret().into(), source: io() }.into(),
        ]
    }

    #[test]
    fn what_failed_inside_is_not_told_to_callers() {
        for error in inner() {
            let (name, code) = (format!("{error:?}"), error.code());
            assert!(error.to_string().contains(SECRETS[0]), "the log has it: {name}");
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            let told = format!("{} {:?}", status.message(), status.details());
            assert!(SECRETS.iter().all(|secret| !told.contains(secret)), "{name}: {told}");
            assert!(!status.message().is_empty(), "{name}");
        }
    }

    #[test]
    fn reasons_name_no_places() {
        for (said, told) in [
            (
                "worker w: energy node a (http://10.0.0.7:7200), concepts axe: no answer within 5 s",
                "worker w: energy node a (an address), concepts axe: no answer within 5 s",
            ),
            ("connect to 10.0.0.7:6379 failed", "connect to an address failed"),
            ("node-7.internal:7200: refused", "an address: refused"),
            ("[::1]:7200 and 10.0.0.7, too", "an address and an address, too"),
            ("model folder /srv/models/sd: missing", "model folder a path: missing"),
            (
                "steps: 5; width: 63 and/or height, ratio 16:9",
                "steps: 5; width: 63 and/or height, ratio 16:9",
            ),
        ] {
            assert_eq!(without_places(said), told);
        }
    }

    #[test]
    fn what_is_too_much_says_when_to_come_back() {
        let wait = Duration::from_millis(1_500);
        let status = Status::from(Error::TooFast { tenant: "a".into(), limit: 60, wait });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("retry in 1.5 s"), "{status}");
        let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
        assert_eq!(hint, Some(wait));
        let oracle = Error::TooManyWithheld { tenant: "a".into(), limit: 20, wait };
        let status = Status::from(oracle);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.get_details_retry_info().is_some());
        let full = Status::from(Error::QueueFull { limit: 1 });
        assert!(full.get_details_retry_info().is_some());
    }

    #[test]
    fn every_error_keeps_its_code_and_message_on_the_wire() {
        for (error, code) in samples() {
            let text = error.public();
            let status = Status::from(error);
            let response = status.into_http::<()>();
            let back = Status::from_header_map(response.headers()).expect("headers hold a status");
            assert_eq!((back.code(), back.message()), (code, text.as_str()));
        }
    }
}
