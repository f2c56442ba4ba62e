//! Which energy nodes are let into the cluster: those of this release, sound, and with a name of their own.

use std::{collections::BTreeSet, time::Duration};

use fairlead_common::{bounds, grpc::Channels, identity::Identity};
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

/// Most characters of an address.
const MAX_ADDRESS: usize = 300;

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
    /// renewal, so the second is refused. `who` has shown a certificate: its name is the node's, and the node
    /// is reached at a host of it.
    pub(crate) async fn register(
        &self,
        info: v1::NodeInfo,
        who: Option<&Identity>,
    ) -> Result<String> {
        validate(&info)?;
        check_host(&info.address, who)?;
        self.registry.refresh().await?;
        self.registry.has_room(&info)?;
        let is_other = |node: &LiveNode| {
            node.info.node_id == info.node_id && node.info.address != info.address
        };
        if let Some(other) = self.registry.live().into_iter().find(is_other) {
            let (node_id, address) = (info.node_id.clone(), other.info.address.clone());
            match self.ask(&other.info).await {
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
    async fn ask(&self, registered: &v1::NodeInfo) -> Result<(), String> {
        let v1::NodeInfo { node_id, address, .. } = registered;
        let channel = self.channels.fresh(registered).map_err(|error| error.to_string())?;
        let mut client =
            EnergyServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = timeout(DEADLINE, client.describe(v1::DescribeRequest {})).await;
        let answer = answer.map_err(|_| format!("no answer within {DEADLINE:?}"))?;
        let said = |status: Status| format!("{:?}: {}", status.code(), status.message());
        let node = answer.map_err(said)?.into_inner().node;
        match node.unwrap_or_default() {
            node if node.node_id != *node_id => {
                Err(format!("{} is there", bounds::shown(&node.node_id)))
            }
            node if node.address != *address => {
                Err(format!("it is {} now", bounds::shown(&node.address)))
            }
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
    let invalid = |field| move |problem: String| Error::invalid(field, problem);
    bounds::name(&info.node_id).map_err(invalid("node.node_id"))?;
    bounds::path(&info.model_name).map_err(invalid("node.model_name"))?;
    bounds::line(&info.model_hash, bounds::MAX_NAME).map_err(invalid("node.model_hash"))?;
    bounds::path(&info.kind).map_err(invalid("node.kind"))?;
    check_address(&info.address)?;
    if info.concepts.is_empty() {
        return Err(Error::invalid("node.concepts", "is empty; a node serves one at least"));
    }
    bounds::concepts(&info.concepts).map_err(invalid("node.concepts"))?;
    bounds::calibrations(&info.calibrations).map_err(invalid("node.calibrations"))?;
    let mut names = BTreeSet::new();
    for concept in info.concepts.iter().filter_map(|info| info.concept.as_ref()) {
        if concept.energy != info.model_name {
            return Err(Error::invalid(
                "node.concepts",
                format!(
                    "`{}` names the energy {}, the node's model is `{}`",
                    concept.name,
                    bounds::shown(&concept.energy),
                    info.model_name
                ),
            ));
        }
        if !names.insert(&concept.name) {
            return Err(Error::invalid("node.concepts", format!("`{}` twice", concept.name)));
        }
    }
    Ok(())
}

/// The address as a URI with a host, or why it is none that others can connect to.
fn parse_address(address: &str) -> Result<tonic::transport::Uri> {
    let problem = |text: &str| {
        let problem = format!("{} {text}, e.g. http://10.0.0.7:7101", bounds::shown(address));
        Err(Error::invalid("node.address", problem))
    };
    let uri = match address.parse::<tonic::transport::Uri>() {
        Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) => uri,
        _ => return problem("must be a URI that other services reach the node at"),
    };
    if address.len() > MAX_ADDRESS || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return problem("must be a scheme, a host and a port, and no more");
    }
    match uri.host() {
        None | Some("" | "0.0.0.0" | "[::]") => {
            problem("names no host; announce an address that others can connect to")
        }
        Some(_) => Ok(uri),
    }
}

fn check_address(address: &str) -> Result<()> {
    parse_address(address).map(drop)
}

/// Where services show certificates, nobody is called in the clear, and a node only where its certificate is
/// for.
fn check_host(address: &str, who: Option<&Identity>) -> Result<()> {
    let Some(who) = who else { return Ok(()) };
    let uri = parse_address(address)?;
    if uri.scheme_str() != Some("https") {
        let problem = format!("`{address}` is in the clear, but this cluster speaks TLS: https://");
        return Err(Error::invalid("node.address", problem));
    }
    let host = uri.host().unwrap_or_default();
    match who.is_at(host) {
        true => Ok(()),
        false => Err(Error::Forbidden(format!(
            "node.address: the certificate of {who} is not for the host `{host}`; make one with `fairlead keys \
             tls --role energy --name {} --host {host}`",
            who.name
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use prost::Message;

    fn node() -> v1::NodeInfo {
        let concept =
            v1::ConceptRef { name: "axe".into(), version: "1".into(), energy: "clip".into() };
        v1::NodeInfo {
            node_id: "a".into(),
            address: "http://127.0.0.1:7101".into(),
            protocol_version: PROTOCOL_VERSION,
            preprocessing_version: PREPROCESSING_VERSION,
            kind: "contrastive".into(),
            model_name: "clip".into(),
            model_hash: "0a".into(),
            concepts: vec![v1::ConceptInfo { concept: Some(concept), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn bad_registrations_are_refused_with_the_reason() {
        validate(&node()).expect("it is sound");
        type Spoil = fn(&mut v1::NodeInfo);
        let cases: [(Spoil, &str); 18] = [
            (|n| n.protocol_version = 9, "speaks protocol 9"),
            (|n| n.preprocessing_version = 9, "has preprocessing 9"),
            (|n| n.node_id.clear(), "node.node_id"),
            (|n| n.address = "kitchen".into(), "must be a URI"),
            (|n| n.address = "http://0.0.0.0:7101".into(), "names no host"),
            (|n| n.concepts.clear(), "serves one at least"),
            (|n| n.concepts.push(n.concepts[0].clone()), "`axe` twice"),
            (|n| n.concepts[0].concept = None, "without a name"),
            (|n| n.model_name = "siglip".into(), "names the energy `clip`, the node's model is"),
            (|n| n.concepts = vec![n.concepts[0].clone(); 20_000], "20000 concepts; at most 1024"),
            (|n| n.calibrations = vec![Default::default(); 5_000], "5000 calibrations"),
            (|n| n.node_id = "a\u{1b}[2J".into(), "node.node_id: `a\\u{1b}[2J` must be"),
            (|n| n.node_id = "a/b".into(), "node.node_id"),
            (|n| n.model_hash = "x".repeat(200), "node.model_hash"),
            (|n| n.address = "ftp://a:1".into(), "must be a URI"),
            (|n| n.address = "http://a:1/path".into(), "and no more"),
            (|n| n.address = format!("http://{}:1", "a".repeat(300)), "and no more"),
            (|n| n.concepts[0].phrases = vec!["\n".into()], "empty text"),
        ];
        for (spoil, expected) in cases {
            let mut info = node();
            spoil(&mut info);
            let error = validate(&info).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_node_is_reached_where_its_certificate_is_for_and_not_in_the_clear() {
        let (certificate, _) = fairlead_common::testing::Authority::new()
            .certificate(&["fairlead://energy/a"], &["10.0.0.2", "gpu.local", "::1"]);
        let who = Identity::of(&certificate).expect("it is right");
        for good in ["https://10.0.0.2:7101", "https://gpu.local:7101", "https://[::1]:7101/"] {
            check_host(good, Some(&who)).expect(good);
        }
        for (bad, part) in [
            ("http://10.0.0.2:7101", "in the clear"),
            ("https://10.0.0.3:7101", "not for the host `10.0.0.3`"),
            ("https://10.0.0.2@evil.example:7101", "not for the host `evil.example`"),
        ] {
            let error = check_host(bad, Some(&who)).expect_err(bad).to_string();
            assert!(error.contains(part), "{error}");
        }
        check_host("http://10.0.0.2:7101", None).expect("nobody shows a certificate here");
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
