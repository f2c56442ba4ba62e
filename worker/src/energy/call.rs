//! One call to one energy node: connection, deadline, headers, and the check of what came back.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use fairlead_common::{bounds, grpc::Channels, record, tls::Tls, trace};
use fairlead_proto::{
    MAX_MESSAGE_BYTES, PREPROCESSING_VERSION, PROTOCOL_VERSION,
    v1::{
        CheckRequest, EvaluateRequest, InputSpec, NodeInfo, ResizeFilter,
        energy_service_client::EnergyServiceClient,
    },
};
use tokio::runtime::Handle;
use tonic::{Code, Request, Status, transport::Channel};
use tracing::Span;

use super::{Answer, Verdict, validate};
use crate::metrics;

/// The transport's and the node's deadlines lie so much later than the worker's own, which therefore
/// tells what happened.
const LENIENCE: Duration = Duration::from_secs(1);

pub(super) type Client = EnergyServiceClient<Channel>;

/// Connections to energy nodes for calls that may take `timeout`.
pub fn channels(timeout: Duration, tls: Tls) -> Channels {
    Channels::new(timeout + LENIENCE, tls)
}

/// How a shard's calls to energy nodes are made.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// The runtime that carries the calls.
    pub runtime: Handle,
    /// Shared connections.
    pub channels: Channels,
    /// Deadline of one call.
    pub timeout: Duration,
    /// W3C traceparent of the shard, sent along where spans are not exported; empty for none.
    pub traceparent: String,
}

impl PoolOptions {
    /// A client of `node`, if it speaks this worker's versions, and the input it wants.
    pub(super) fn connect(&self, node: &NodeInfo) -> Result<(Client, InputSpec), Trouble> {
        for (what, theirs, ours) in [
            ("protocol", node.protocol_version, PROTOCOL_VERSION),
            ("preprocessing", node.preprocessing_version, PREPROCESSING_VERSION),
        ] {
            if theirs != ours {
                return Err(Trouble::refused(format!(
                    "its {what} version is {theirs}, this worker's {ours}; run the same release"
                )));
            }
        }
        let input = usable_input(node)?;
        let _inside = self.runtime.enter();
        let channel = self.channels.get(node);
        let channel = channel.map_err(|error| Trouble::refused(error.to_string()))?;
        let client = EnergyServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok((client, input))
    }

    /// A request with the deadline and the trace, as a part of the present span.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout + LENIENCE);
        trace::send(&Span::current(), &self.traceparent, request.metadata_mut());
        request
    }
}

/// Of one image as the node wants it, at two bytes a value.
fn bytes_of_image(input: &InputSpec) -> u64 {
    (u64::from(input.height) * u64::from(input.width)).saturating_mul(3 * 2)
}

fn usable_input(node: &NodeInfo) -> Result<InputSpec, Trouble> {
    match &node.input {
        Some(input)
            if input.height > 0
                && input.width > 0
                && bytes_of_image(input) <= MAX_MESSAGE_BYTES as u64
                && input.range_min.is_finite()
                && input.range_max.is_finite()
                && input.range_max > input.range_min
                && ResizeFilter::try_from(input.filter).is_ok() =>
        {
            Ok(*input)
        }
        other => Err(Trouble::refused(format!("it declares an unusable input: {other:?}"))),
    }
}

/// Why a call gave nothing.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) reason: String,
    /// The same node may answer in a moment.
    pub(super) passing: bool,
    /// A later attempt of the shard may succeed.
    pub(super) retryable: bool,
}

impl Trouble {
    /// The node will say the same again.
    fn refused(reason: String) -> Self {
        Self { reason, passing: false, retryable: false }
    }

    /// The node gave an answer that cannot be used.
    fn unusable(reason: String) -> Self {
        Self { reason, passing: false, retryable: true }
    }

    fn status(status: &Status) -> Self {
        let passing =
            matches!(status.code(), Code::Unavailable | Code::ResourceExhausted | Code::Aborted);
        let refused = matches!(
            status.code(),
            Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::Unimplemented
                | Code::Unauthenticated
                | Code::PermissionDenied
                | Code::OutOfRange
        );
        let reason = format!("{:?}: {}", status.code(), status.message());
        Self { reason, passing, retryable: !refused }
    }
}

/// Ends `call`, which is named `name`, at the deadline whatever the transport does.
async fn within<T>(
    name: &'static str,
    timeout: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Trouble> {
    let begun = Instant::now();
    let answer = tokio::time::timeout(timeout, call).await;
    metrics::energy_call(name, begun.elapsed(), matches!(answer, Ok(Ok(_))));
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Trouble::status(&status)),
        Err(_) => Err(Trouble {
            reason: format!("no answer within {timeout:?}"),
            passing: false,
            retryable: true,
        }),
    }
}

/// A usable answer and the calibrations behind it.
pub(super) struct Answered<T> {
    pub(super) answer: T,
    pub(super) calibrations: Vec<String>,
}

/// Sends the parts of a batch one after the other and joins the answers.
pub(super) async fn evaluate(
    mut client: Client,
    parts: Vec<Request<EvaluateRequest>>,
    input: InputSpec,
    timeout: Duration,
) -> Result<Answered<Answer>, Trouble> {
    let pixels = 3 * input.height as usize * input.width as usize;
    let mut answer = Answer { input, weight: 1.0, samples: Vec::new(), gradient: None };
    let mut calibrations = Vec::new();
    for part in parts {
        let (concepts, batch) = (part.get_ref().concepts.clone(), part.get_ref().samples.len());
        let scores_only = part.get_ref().scores_only;
        let mut response = within("evaluate", timeout, client.evaluate(part)).await?;
        let ids = std::mem::take(&mut response.calibration_ids);
        let fallbacks = std::mem::take(&mut response.calibration_fallbacks);
        bounds::answer(&ids, &fallbacks).map_err(Trouble::unusable)?;
        calibrations.extend(record::calibrations(ids, fallbacks));
        let (samples, gradient) =
            validate::evaluation(response, &concepts, batch, &input, scores_only)
                .map_err(Trouble::unusable)?;
        if let Some(gradient) = gradient {
            let all = answer.gradient.get_or_insert_default();
            all.resize(answer.samples.len() * pixels, 0.0);
            all.extend(gradient);
        }
        answer.samples.extend(samples);
    }
    if let Some(all) = &mut answer.gradient {
        all.resize(answer.samples.len() * pixels, 0.0);
    }
    Ok(Answered { answer, calibrations })
}

/// Has finished images judged one after the other; `hashes` are those of the requests' images.
pub(super) async fn check(
    mut client: Client,
    requests: Vec<(Request<CheckRequest>, String)>,
    timeout: Duration,
) -> Result<Answered<Vec<Verdict>>, Trouble> {
    let (mut answer, mut calibrations) = (Vec::with_capacity(requests.len()), Vec::new());
    for (request, hash) in requests {
        let concepts = request.get_ref().concepts.clone();
        let scores_only = request.get_ref().scores_only;
        let mut response = within("check", timeout, client.check(request)).await?;
        let ids = std::mem::take(&mut response.calibration_ids);
        let fallbacks = std::mem::take(&mut response.calibration_fallbacks);
        bounds::answer(&ids, &fallbacks).map_err(Trouble::unusable)?;
        calibrations.extend(record::calibrations(ids, fallbacks));
        answer.push(
            validate::verdict(response, &concepts, &hash, scores_only)
                .map_err(Trouble::unusable)?,
        );
    }
    Ok(Answered { answer, calibrations })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use prost::Message;

    fn node(height: u32, width: u32) -> NodeInfo {
        let input = InputSpec { height, width, range_max: 1.0, ..Default::default() };
        NodeInfo { node_id: "n".into(), input: Some(input), ..Default::default() }
    }

    #[test]
    fn an_input_that_fits_into_no_message_is_refused() {
        assert!(usable_input(&node(224, 224)).is_ok());
        for (height, width) in [(0, 224), (100_000, 100_000), (u32::MAX, u32::MAX)] {
            let trouble = usable_input(&node(height, width)).expect_err("it is refused");
            assert!(trouble.reason.contains("an unusable input"), "{}", trouble.reason);
            assert!(!trouble.retryable);
        }
    }

    /// Pixels resized in another way than the node asks for would be judged in silence.
    #[test]
    fn a_filter_that_this_release_does_not_know_is_refused() {
        let with = |filter: i32| {
            let mut node = node(224, 224);
            node.input = node.input.map(|input| InputSpec { filter, ..input });
            usable_input(&node)
        };
        assert!(with(ResizeFilter::Hamming.into()).is_ok());
        assert!(with(99).expect_err("it is refused").reason.contains("an unusable input"));
    }

    #[test]
    fn spoiled_inputs_are_usable_or_refused() {
        fuzz(spoiled(node(224, 224).encode_to_vec()), |bytes| {
            let Ok(node) = NodeInfo::decode(&*bytes) else { return };
            if let Ok(input) = bounded(bytes.len(), || usable_input(&node)) {
                assert!(bytes_of_image(&input) <= MAX_MESSAGE_BYTES as u64);
                assert!(input.range_max > input.range_min, "{input:?}");
            }
        });
    }
}
