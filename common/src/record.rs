//! Safety records as text: canonical protobuf JSON, one object, readable by people and tools.

use std::{collections::BTreeSet, sync::LazyLock};

use fairlead_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{SafetyRecord, StepRecord, WorkerReport},
};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

use serde::{Deserializer, de::DeserializeSeed};

use crate::{parse, probe::Probe};

static RECORD: LazyLock<MessageDescriptor> = LazyLock::new(|| {
    DescriptorPool::decode(FILE_DESCRIPTOR_SET)
        .expect("the build made the descriptors")
        .get_message_by_name("fairlead.v1.SafetyRecord")
        .expect("the contract has the record")
});

/// Text that is no safety record.
#[derive(Debug, thiserror::Error)]
#[error("not a safety record: {0}")]
pub struct RecordError(#[from] parse::Problem);

/// What the worker said of how it made the image; empty where it said nothing.
pub fn reported(record: &SafetyRecord) -> &WorkerReport {
    static NOTHING: LazyLock<WorkerReport> = LazyLock::new(WorkerReport::default);
    record.reported_by_worker.as_ref().unwrap_or(&NOTHING)
}

/// What an image was steered away from: the probes whose gate was open at a step, of any attempt,
/// that corrected it.
pub fn steered_away(trajectory: &[StepRecord]) -> BTreeSet<Probe> {
    let pushed = trajectory.iter().filter(|step| step.correction > 0.0);
    let open = pushed.flat_map(|step| step.scores.iter().filter(|score| score.open));
    open.map(Probe::from).collect()
}

/// What an answer of an energy node rests on, as records have it: calibrations by their ids, and what stood
/// in for missing ones as "fallback: ...".
pub fn calibrations(ids: Vec<String>, fallbacks: Vec<String>) -> impl Iterator<Item = String> {
    ids.into_iter().chain(fallbacks.into_iter().map(|fallback| format!("fallback: {fallback}")))
}

/// The record as indented JSON, fields named as in the contract; default values are left out.
pub fn to_json(record: &SafetyRecord) -> String {
    let mut message = DynamicMessage::new(RECORD.clone());
    message.transcode_from(record).expect("both sides come from the same contract");
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::pretty(&mut out);
    message
        .serialize_with_options(
            &mut serializer,
            &SerializeOptions::new().use_proto_field_name(true),
        )
        .expect("a message serialises into memory");
    String::from_utf8(out).expect("JSON is UTF-8")
}

/// A record of the contract's form.
struct Record;

impl<'de> DeserializeSeed<'de> for Record {
    type Value = DynamicMessage;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        DynamicMessage::deserialize(RECORD.clone(), deserializer)
    }
}

/// Reads what [`to_json`] wrote; an unknown field is an error.
pub fn from_json(text: &str) -> Result<SafetyRecord, RecordError> {
    let message = parse::json_seed(Record, text)?;
    Ok(message.transcode_to().expect("both sides come from the same contract"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{ConceptScore, ImageStatus};

    #[test]
    fn records_round_trip_and_read_like_the_contract() {
        let record = SafetyRecord {
            record_id: "r".into(),
            status: ImageStatus::Withheld.into(),
            seed: u64::MAX,
            reported_by_worker: Some(WorkerReport {
                trajectory: vec![StepRecord { step: 3, time: 0.88, ..Default::default() }],
                ..Default::default()
            }),
            final_scores: vec![ConceptScore {
                concept: "axe".into(),
                z: 4.5,
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = to_json(&record);
        assert!(text.contains("IMAGE_STATUS_WITHHELD") && text.contains("final_scores"), "{text}");
        assert_eq!(from_json(&text).expect("it reads back"), record);
        let marked = format!("\u{feff}{text}");
        assert_eq!(from_json(&marked).expect("a byte order mark is no part of it"), record);
        let error = from_json("{\"kitchen\": 1}").expect_err("unknown").to_string();
        assert!(error.contains("`kitchen` is not known here"), "{error}");
        let error = from_json("{\"seed\": [1]}").expect_err("a list").to_string();
        assert!(error.starts_with("not a safety record: line 1, column "), "{error}");
        assert!(error.contains("`seed`"), "{error}");
        assert!(from_json(&format!("{text} trailing")).is_err());
    }
}
