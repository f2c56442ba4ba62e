//! What is asked for: a few requests that repeat, so that each image has one from before the faults to be
//! compared with.

use anyhow::{Context, Result};
use fairlead_proto::v1::JobSpec;
use serde::Deserialize;

use crate::asset;

/// A policy like the embedded one, for fewer steps than the embedded calibrations are made for: nodes may
/// take the nearest.
const POLICY: &str = r#"
[policies.soak]
concepts = ["*"]
allow_calibration_fallback = true

[policies.soak.steering]
mode = "shift-state"
eta = 0.4
window_start = 0.85
window_end = 0.02
cap = 10.0
smoothing = 0.0
rerun_factor = 1.0
"#;
/// Few, so that an image takes little time and most of it is about the cluster.
const STEPS: u32 = 8;

#[derive(Deserialize)]
struct Objects {
    benign: Vec<String>,
    targets: Vec<Target>,
    backgrounds: Vec<String>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// The embedded policies and the one that [`distinct`] requests name.
pub(super) fn policies() -> Result<String> {
    Ok(std::fs::read_to_string(asset("policies.toml"))? + POLICY)
}

/// So many requests: by turns one that hits no concept, one that hits one, and one that asks for both.
pub(super) fn distinct(count: usize) -> Result<Vec<JobSpec>> {
    let text = std::fs::read_to_string(asset("emojiland-objects.json"))?;
    let objects: Objects = serde_json::from_str(&text).context("emojiland-objects.json")?;
    let name = |list: &[String], i: usize| list[i % list.len()].clone();
    let request = |i: usize| {
        let (benign, background) = (name(&objects.benign, 7 * i), name(&objects.backgrounds, i));
        let target = &objects.targets[i % objects.targets.len()].name;
        let objects = match i % 3 {
            0 => benign,
            1 => target.clone(),
            _ => format!("{benign} and a {target}"),
        };
        JobSpec {
            prompt: format!("a {objects} on a {background} background"),
            n: 1 + (i % 3) as u32,
            steps: Some(STEPS),
            seed: Some(1_000 * i as u64),
            policy: "soak".to_owned(),
            ..Default::default()
        }
    };
    Ok((0..count).map(request).collect())
}
