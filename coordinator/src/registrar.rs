//! Which energy nodes are let into the cluster: those of this release, sound, and with a name of their own.

use std::{collections::BTreeSet, time::Duration};

use fairlead_common::grpc::Channels;
use fairlead_proto::{
    MAX_MESSAGE_BYTES, PREPROCESSING_VERSION, PROTOCOL_VERSION,
    v1::{self, energy_service_client::EnergyServiceClient},
};
use tokio::time::timeout;
use tonic::Status;

use crate::{
    error::{Error, Result},
    levels, metrics,
    registry::Registry,
    routing::LiveNode,
};

/// Time for a node to say that it is there: part of a call that the one who registers gives five seconds.
const DEADLINE: Duration = Duration::from_secs(2);

/// Lets energy nodes in.
#[derive(Debug, Clone)]
pub(crate) struct Registrar {
    registry: Registry,
    channels: Channels,
}

impl Registrar {
    pub(crate) fn new(registry: Registry, channels: Channels) -> Self {
        Self { registry, channels }
    }

    /// Registers a node and returns the registration's id. One that registers again replaces its
    /// registration. So does one at another address if nobody of that name answers at the old one: it was
    /// killed and came back elsewhere. Two that both answer would take the name from each other at every
    /// renewal, so the second is refused.
    pub(crate) async fn register(&self, info: v1::NodeInfo) -> Result<String> {
        validate(&info)?;
        self.registry.refresh().await?;
        let is_other = |node: &LiveNode| {
            node.info.node_id == info.node_id && node.info.address != info.address
        };
        if let Some(other) = self.registry.live().into_iter().find(is_other) {
            let (node_id, address) = (info.node_id.clone(), other.info.address.clone());
            match self.ask(&node_id, &address).await {
                Ok(()) => return Err(Error::NodeIdTaken { node_id, address }),
                Err(reason) => tracing::warn!(
                    node = node_id,
                    address,
                    reason,
                    "does not answer to its name there any longer; it goes to the one that asks for it"
                ),
            }
        }
        for contradiction in levels::contradictions(&info, &self.registry.live()) {
            metrics::disagreement();
            tracing::error!("{contradiction}; the stricter level holds for new jobs");
        }
        self.registry.register(info).await
    }

    /// Whether the node that was registered is there still; otherwise why not. What answers there may be
    /// the very one that registers, by another of its addresses.
    async fn ask(&self, node_id: &str, address: &str) -> Result<(), String> {
        let channel = self.channels.fresh(address).map_err(|error| error.to_string())?;
        let mut client =
            EnergyServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = timeout(DEADLINE, client.describe(v1::DescribeRequest {})).await;
        let answer = answer.map_err(|_| format!("no answer within {DEADLINE:?}"))?;
        let said = |status: Status| format!("{:?}: {}", status.code(), status.message());
        let node = answer.map_err(said)?.into_inner().node;
        match node.unwrap_or_default() {
            node if node.node_id != node_id => Err(format!("`{}` is there", node.node_id)),
            node if node.address != address => Err(format!("it is {} now", node.address)),
            _ => Ok(()),
        }
    }
}

fn validate(info: &v1::NodeInfo) -> Result<()> {
    if info.protocol_version != PROTOCOL_VERSION {
        return Err(Error::Incompatible(format!(
            "energy node `{}` speaks protocol {}, this coordinator {PROTOCOL_VERSION}; run the \
             same release on both",
            info.node_id, info.protocol_version
        )));
    }
    if info.preprocessing_version != PREPROCESSING_VERSION {
        return Err(Error::Incompatible(format!(
            "energy node `{}` has preprocessing {}, this coordinator {PREPROCESSING_VERSION}; run \
             the same release on both",
            info.node_id, info.preprocessing_version
        )));
    }
    let id = info.node_id.as_str();
    if id.is_empty() || id.len() > 128 || id.contains(char::is_whitespace) {
        return Err(Error::invalid(
            "node.node_id",
            format!("`{id}` must have 1 to 128 characters and no white space"),
        ));
    }
    check_address(&info.address)?;
    if info.concepts.is_empty() {
        return Err(Error::invalid("node.concepts", "is empty; a node serves one at least"));
    }
    let mut names = BTreeSet::new();
    for concept in info.concepts.iter().map(|info| info.concept.clone().unwrap_or_default()) {
        if concept.name.is_empty() || concept.version.is_empty() {
            return Err(Error::invalid("node.concepts", "a concept has no name or no version"));
        }
        if concept.energy != info.model_name {
            return Err(Error::invalid(
                "node.concepts",
                format!(
                    "`{}` names the energy `{}`, the node's model is `{}`",
                    concept.name, concept.energy, info.model_name
                ),
            ));
        }
        if !names.insert(concept.name.clone()) {
            return Err(Error::invalid("node.concepts", format!("`{}` twice", concept.name)));
        }
    }
    Ok(())
}

fn check_address(address: &str) -> Result<()> {
    let problem = |text: &str| {
        Err(Error::invalid(
            "node.address",
            format!("`{address}` {text}, e.g. http://10.0.0.7:7101"),
        ))
    };
    let uri = match address.parse::<tonic::transport::Uri>() {
        Ok(uri) if uri.scheme().is_some() => uri,
        _ => return problem("must be a URI that other services reach the node at"),
    };
    match uri.host() {
        None | Some("" | "0.0.0.0" | "[::]") => {
            problem("names no host; announce an address that others can connect to")
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use prost::Message;

    fn node() -> v1::NodeInfo {
        let concept =
            v1::ConceptRef { name: "axe".into(), version: "1".into(), ..Default::default() };
        v1::NodeInfo {
            node_id: "a".into(),
            address: "http://127.0.0.1:7101".into(),
            protocol_version: PROTOCOL_VERSION,
            preprocessing_version: PREPROCESSING_VERSION,
            concepts: vec![v1::ConceptInfo { concept: Some(concept), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn bad_registrations_are_refused_with_the_reason() {
        validate(&node()).expect("it is sound");
        type Spoil = fn(&mut v1::NodeInfo);
        let cases: [(Spoil, &str); 9] = [
            (|n| n.protocol_version = 9, "speaks protocol 9"),
            (|n| n.preprocessing_version = 9, "has preprocessing 9"),
            (|n| n.node_id.clear(), "node.node_id"),
            (|n| n.address = "kitchen".into(), "must be a URI"),
            (|n| n.address = "http://0.0.0.0:7101".into(), "names no host"),
            (|n| n.concepts.clear(), "serves one at least"),
            (|n| n.concepts.push(n.concepts[0].clone()), "`axe` twice"),
            (|n| n.concepts[0].concept = None, "no name"),
            (|n| n.model_name = "clip".into(), "names the energy ``, the node's model is `clip`"),
        ];
        for (spoil, expected) in cases {
            let mut info = node();
            spoil(&mut info);
            let error = validate(&info).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn spoiled_nodes_are_sound_or_refused_by_field() {
        fuzz(spoiled(node().encode_to_vec()), |bytes| {
            let Ok(info) = v1::NodeInfo::decode(&*bytes) else { return };
            match bounded(bytes.len(), || validate(&info)) {
                Ok(()) => assert!(!info.concepts.is_empty() && !info.node_id.is_empty()),
                Err(Error::Invalid { field, .. }) => assert!(field.starts_with("node."), "{field}"),
                Err(error) => assert!(matches!(error, Error::Incompatible(_)), "{error}"),
            }
        });
    }
}
