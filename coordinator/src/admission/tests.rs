use std::sync::Arc;

use fairlead_common::envelope;
use proptest::prelude::*;
use tonic::Code;

use super::*;

fn model(name: &str) -> v1::ModelInfo {
    v1::ModelInfo {
        name: name.into(),
        hash: format!("hash-of-{name}"),
        sampler: "ddim".into(),
        default_width: 32,
        default_height: 32,
        granularity: 4,
        max_side: 66,
        default_steps: 25,
        default_guidance_scale: 5.0,
        max_batch: 8,
        max_steps: 999,
        ..Default::default()
    }
}

fn key(model: &str, steps: u32) -> v1::CalibrationKey {
    let generator = format!("hash-of-{model}");
    v1::CalibrationKey { generator, sampler: "ddim".into(), steps, conditions: None }
}

fn node(concepts: &[(&str, &str)], since: i64, calibrated: Option<v1::CalibrationKey>) -> LiveNode {
    let concept = |(name, version): &(&str, &str)| v1::ConceptInfo {
        concept: Some(v1::ConceptRef {
            name: (*name).into(),
            version: (*version).into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let info = v1::NodeInfo {
        node_id: format!("node-{since}"),
        concepts: concepts.iter().map(concept).collect(),
        calibrations: calibrated.map(|key| calibration(key, concepts)).into_iter().collect(),
        ..Default::default()
    };
    LiveNode { info: Arc::new(info), since_unix_ms: since, load: 0 }
}

fn probe(concept: &str, energy: &str) -> Probe {
    Probe { concept: concept.into(), energy: energy.into() }
}

/// For four crops, the whole window, the size 32 x 32, guidance 5 and no negative prompt.
fn calibration(key: v1::CalibrationKey, concepts: &[(&str, &str)]) -> v1::CalibrationInfo {
    let defaults = v1::JobSpec {
        width: Some(32),
        height: Some(32),
        guidance_scale: Some(5.0),
        ..Default::default()
    };
    let envelope = Some(envelope::around(&envelope::conditions(&defaults, false)));
    let level =
        |(name, _): &(&str, &str)| v1::CheckThreshold { concept: (*name).into(), score: 0.5 };
    v1::CalibrationInfo {
        key: Some(key),
        crops: 4,
        window_start: 1.0,
        check_thresholds: concepts.iter().map(level).collect(),
        envelope,
        ..Default::default()
    }
}

struct World {
    models: Vec<v1::ModelInfo>,
    nodes: Vec<LiveNode>,
    seen: Seen,
    policies: Policies,
    tenant: Tenant,
}

impl World {
    /// One model and one node that serves and is calibrated for two concepts.
    fn new() -> Self {
        let concepts = [("axe", "1"), ("kitchen-knife", "1")];
        Self {
            models: vec![model("sd")],
            nodes: vec![node(&concepts, 1, Some(key("sd", 25)))],
            seen: Seen { models: ["gone-model".to_owned()].into(), ..Seen::default() },
            policies: Policies::default(),
            tenant: Tenant::everyone(),
        }
    }

    fn policies(mut self, text: &str) -> Self {
        self.policies = Policies::parse(text).expect("valid policies");
        self
    }

    fn admit(&self, spec: &v1::JobSpec) -> Result<JobRecord> {
        let cluster = Cluster { models: &self.models, nodes: &self.nodes, seen: &self.seen };
        let identity = Identity { job: JobId::generate(0), drawn_seed: 99, now: 7 };
        admit(spec, &self.policies, &self.tenant, &cluster, identity)
    }
}

fn seen(probe: Probe) -> Seen {
    Seen { probes: [probe].into(), ..Seen::default() }
}

fn spec() -> v1::JobSpec {
    v1::JobSpec { prompt: "a cat".into(), n: 1, ..Default::default() }
}

#[test]
fn defaults_are_filled_and_everything_is_pinned() {
    let record = World::new().admit(&v1::JobSpec { n: 3, ..spec() }).expect("it is valid");
    let filled = record.spec();
    assert_eq!((filled.model.as_str(), filled.width(), filled.height()), ("sd", 32, 32));
    assert_eq!((filled.steps(), filled.guidance_scale(), filled.seed()), (25, 5.0, 99));
    let policy = record.policy();
    let names: Vec<_> = policy.concepts.iter().map(|c| (&*c.name, &*c.version)).collect();
    assert_eq!(names, [("axe", "1"), ("kitchen-knife", "1")]);
    assert_eq!(filled.steering, policy.steering);
    assert_eq!(policy.steering.expect("filled").eta(), 0.3);
    let seeds: Vec<_> = record.job.images.iter().map(|image| image.seed).collect();
    assert_eq!(seeds, [99, 100, 101]);
    assert_eq!(record.shards.len(), 1);
}

#[test]
fn knobs_for_other_generators_are_left_out_with_a_notice() {
    let admitted = |generators: &str| {
        let policies = format!(
            "[policies.a]\nconcepts = ['*']\nsteering = {{ eta = 0.7, generators = ['{generators}'] }}"
        );
        World::new().policies(&policies).admit(&spec()).expect("it is valid")
    };
    let tuned = admitted("sd");
    assert_eq!(tuned.policy().steering.expect("filled").eta(), 0.7);
    assert!(tuned.job.notices.is_empty());
    let other = admitted("tiny");
    assert_eq!(other.policy().steering.expect("filled").eta(), 0.3);
    assert_eq!(
        other.job.notices,
        ["the steering knobs of policy `a` are for tiny; `sd` gets the defaults"]
    );
}

/// A node of another energy for the same concepts.
fn second_energy(concepts: &[(&str, &str)], since: i64) -> LiveNode {
    let mut node = node(concepts, since, Some(key("sd", 25)));
    let info = Arc::get_mut(&mut node.info).expect("nobody else has it");
    info.model_name = "siglip".into();
    for concept in info.concepts.iter_mut().filter_map(|info| info.concept.as_mut()) {
        concept.energy = "siglip".into();
    }
    node
}

fn pinned(record: &JobRecord) -> Vec<(String, String)> {
    record.policy().concepts.iter().map(|c| (c.name.clone(), c.energy.clone())).collect()
}

#[test]
fn every_energy_that_serves_a_concept_is_pinned_unless_the_policy_names_some() {
    let mut world = World::new();
    world.nodes.push(second_energy(&[("axe", "9")], 2));
    let pair = |concept: &str, energy: &str| (concept.to_owned(), energy.to_owned());
    let all = [pair("axe", ""), pair("axe", "siglip"), pair("kitchen-knife", "")];
    assert_eq!(pinned(&world.admit(&spec()).expect("all are live")), all);

    let only = world.policies(
        "[policies.a]\nconcepts = ['*']\nenergies = ['siglip']\nweights = { siglip = 0.5 }",
    );
    let record = only.admit(&spec()).expect("it is live");
    assert_eq!(pinned(&record), [pair("axe", "siglip")]);
    assert_eq!(record.policy().weights[0].weight, 0.5);
    let knife = v1::JobSpec { extra_concepts: vec!["kitchen-knife".into()], ..spec() };
    let refused = only.admit(&knife).expect_err("siglip does not know it").to_string();
    assert!(refused.contains("`kitchen-knife` with an energy of policy `a`"), "{refused}");
}

#[test]
fn an_energy_that_is_gone_is_missed_and_not_replaced() {
    let gone = World { seen: seen(probe("axe", "siglip")), ..World::new() };
    let refused = gone.admit(&spec()).expect_err("siglip is gone");
    assert!(matches!(&refused, Error::Unavailable(_)), "{refused}");
    assert!(refused.to_string().contains("concept `axe` with `siglip`"), "{refused}");
    // It is served still, so it cannot be retired.
    assert!(refused.to_string().ends_with("`fairlead concepts --add`"), "{refused}");
    let named = World::new().policies("[policies.a]\nconcepts = ['*']\nenergies = ['siglip']");
    let refused = named.admit(&spec()).expect_err("siglip never came").to_string();
    assert!(refused.contains("policy `a` needs the energy `siglip`"), "{refused}");
}

#[test]
fn seeds_wrap_around() {
    let record = World::new().admit(&v1::JobSpec { n: 2, seed: Some(u64::MAX), ..spec() });
    let seeds: Vec<_> = record.expect("valid").job.images.iter().map(|image| image.seed).collect();
    assert_eq!(seeds, [u64::MAX, 0]);
}

#[test]
fn bad_fields_are_refused_by_name() {
    let odd = World::new().admit(&v1::JobSpec { priority: 9, ..spec() });
    assert!(odd.expect_err("no such priority").to_string().contains("priority: 9 is none"));
    type Spoil = fn(&mut v1::JobSpec);
    let cases: [(Spoil, &str); 17] = [
        (|s| s.prompt = " \n".into(), "prompt: is empty"),
        (|s| s.prompt = "x".repeat(8193), "prompt: has 8193 bytes; at most 8192"),
        (|s| s.negative_prompt = "x".repeat(8193), "negative_prompt: has 8193 bytes"),
        (|s| s.n = 0, "n: is 0; ask for 1 to 64 images"),
        (|s| s.n = 10_000, "n: is 10000"),
        (
            |s| s.width = Some(63),
            "width: is 63, but `sd` needs a multiple of 4; nearest valid: 60 and 64",
        ),
        (|s| s.height = Some(0), "height: is 0, but `sd` needs a multiple of 4; nearest valid: 4"),
        (|s| s.height = Some(68), "height: is 68, but `sd` makes at most 64; nearest valid: 64"),
        (|s| s.width = Some(u32::MAX), "width: is 4294967295, but `sd` makes at most 64"),
        (|s| s.steps = Some(0), "steps: is 0; ask `sd` for 1 to 999"),
        (|s| s.steps = Some(1000), "steps: is 1000"),
        (|s| s.guidance_scale = Some(f32::NAN), "guidance_scale: is NaN"),
        (|s| s.guidance_scale = Some(0.5), "guidance_scale: is 0.5"),
        (|s| s.model = "sdd".into(), "model: `sdd` is unknown; did you mean `sd`?"),
        (|s| s.policy = "defaul".into(), "policy: `defaul` is unknown; did you mean `default`?"),
        (
            |s| s.extra_concepts = vec!["kitchen-knive".into()],
            "extra_concepts: concept `kitchen-knive` is unknown; did you mean `kitchen-knife`?",
        ),
        (
            |s| s.steering = Some(v1::SteeringParams { eta: Some(9.0), ..Default::default() }),
            "steering: eta is 9; it must be above 0 and at most 2",
        ),
    ];
    for (spoil, expected) in cases {
        let mut spec = spec();
        spoil(&mut spec);
        let error = World::new().admit(&spec).expect_err(expected);
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[test]
fn a_missing_worker_or_node_is_unavailable_not_invalid() {
    let no_worker = World { models: vec![], ..World::new() };
    let no_node = World { nodes: vec![], ..World::new() };
    let named = World::new().policies("[policies.a]\nconcepts = ['bomb']");
    let gone = World { seen: seen(probe("gone-concept", "")), ..World::new() };
    let cases = [
        (no_worker.admit(&spec()), "no worker is attached"),
        (World::new().admit(&v1::JobSpec { model: "gone-model".into(), ..spec() }), "`gone-model`"),
        (no_node.admit(&spec()), "no energy node is registered"),
        (named.admit(&spec()), "no live energy node serves concept `bomb`"),
        (gone.admit(&spec()), "concept `gone-concept`"),
    ];
    for (result, expected) in cases {
        let error = result.expect_err(expected);
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn only_a_concept_that_nobody_names_is_for_retirement() {
    let refused = |policies: &str, extra: &[&str], of_tenant: &[&str]| {
        let mut world = World { seen: seen(probe("bomb", "")), ..World::new() }.policies(policies);
        world.tenant.concepts = of_tenant.iter().map(|&name| name.to_owned()).collect();
        let extra_concepts = extra.iter().map(|&name| name.to_owned()).collect();
        let spec = v1::JobSpec { extra_concepts, ..spec() };
        world.admit(&spec).expect_err("nobody serves it").to_string()
    };
    let (all, named) = ("[policies.a]\nconcepts = ['*']", "[policies.a]\nconcepts = ['*', 'bomb']");
    let can_retire = |text: String| text.contains("`fairlead concepts --retire bomb`");
    assert!(can_retire(refused(all, &[], &[])));
    for text in
        [refused(named, &[], &[]), refused(all, &["bomb"], &[]), refused(all, &[], &["bomb"])]
    {
        assert!(text.contains("no live energy node serves concept `bomb`"), "{text}");
        assert!(!can_retire(text));
    }
}

#[test]
fn an_empty_model_needs_exactly_one_attached() {
    let world = World { models: vec![model("sd"), model("sd3")], ..World::new() };
    let error = world.admit(&spec()).expect_err("two are attached").to_string();
    assert!(error.contains("several are attached; known: `sd`, `sd3`"), "{error}");
}

#[test]
fn a_missing_calibration_names_the_command_unless_it_may_fall_back() {
    let other_steps = v1::JobSpec { steps: Some(30), ..spec() };
    let error = World::new().admit(&other_steps).expect_err("not calibrated");
    let two = World::new().policies("[policies.a]\nconcepts = ['*']\nsteering.crops = 2");
    let other_crops = two.admit(&spec());
    assert!(other_crops.expect_err("not calibrated").to_string().contains("--crops 2"));
    assert_eq!(error.code(), Code::FailedPrecondition);
    let text = error.to_string();
    assert!(
        text.contains(
            "`fairlead calibrate --steps 30 --crops 4 --window-start 1 --window-end 0.6 --size 32x32 \
             --guidance 5`"
        ),
        "{text}"
    );
    for flag in ["allow_calibration_fallback", "observe_only"] {
        let world = World::new().policies(&format!("[policies.a]\nconcepts=['*']\n{flag} = true"));
        world.admit(&other_steps).expect(flag);
    }
}

/// Every field of a request that moves benign scores, beside generator, sampler and steps.
fn outside() -> [(v1::JobSpec, &'static str, &'static str); 4] {
    [
        (
            v1::JobSpec { width: Some(64), height: Some(64), ..spec() },
            "size 64x64, calibrated 32x32",
            "--size 32x32,64x64 --guidance 5",
        ),
        (
            v1::JobSpec { height: Some(16), ..spec() },
            "size 32x16, calibrated 32x32",
            "--size 32x32,32x16 --guidance 5",
        ),
        (
            v1::JobSpec { guidance_scale: Some(1.0), ..spec() },
            "guidance 1, calibrated 5",
            "--size 32x32 --guidance 1,5",
        ),
        (
            v1::JobSpec { negative_prompt: "safe".into(), ..spec() },
            "a negative prompt, calibrated without",
            "--size 32x32 --guidance 5 --negative",
        ),
    ]
}

#[test]
fn outside_the_envelope_a_job_is_refused_with_the_command_that_extends_it() {
    for (spec, ways, flags) in outside() {
        let error = World::new().admit(&spec).expect_err(ways);
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        let text = error.to_string();
        let command = format!(
            "`fairlead calibrate --steps 25 --crops 4 --window-start 1 --window-end 0 {flags}`"
        );
        assert!(text.contains(ways) && text.contains(&command), "{text}");
        // Not one that the envelope could be extended to.
        let steps = World::new().admit(&v1::JobSpec { steps: Some(30), ..spec });
        assert!(matches!(steps, Err(Error::NotCalibrated { .. })), "{steps:?}");
    }
}

#[test]
fn outside_the_envelope_a_policy_may_leave_it_to_the_strictest_check_and_says_so() {
    let world =
        World::new().policies("[policies.a]\nconcepts = ['*']\noutside = 'withhold-unless-clear'");
    for (spec, ways, _) in outside() {
        let record = world.admit(&spec).expect(ways);
        assert_eq!(record.policy().outside_envelope, [ways]);
        let conditions = record.run().key.conditions.expect("they are known");
        assert!(conditions.may_leave_envelope, "nodes are told so");
        assert_eq!(record.policy().concepts.len(), 2);
    }
    let inside = world.admit(&spec()).expect("inside");
    assert!(inside.policy().outside_envelope.is_empty());
    assert!(!inside.run().key.conditions.expect("they are known").may_leave_envelope);
    let steps = world.admit(&v1::JobSpec { steps: Some(30), ..spec() });
    assert!(matches!(steps, Err(Error::NotCalibrated { .. })), "{steps:?}");
}

#[test]
fn only_an_admin_may_observe() {
    let mut world = World::new().policies("[policies.a]\nconcepts = ['*']\nobserve_only = true");
    world.admit(&spec()).expect("where there are no tenants everybody may");
    world.tenant.admin = false;
    let error = world.admit(&spec()).expect_err("no admin");
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.to_string().contains("`a` only observes"), "{error}");
}

#[test]
fn overrides_need_the_policys_leave_and_only_strengthen() {
    let asks = |eta: f32| {
        let steering = Some(v1::SteeringParams { eta: Some(eta), ..Default::default() });
        v1::JobSpec { steering, ..spec() }
    };
    let policy = |lines: &str| {
        World::new()
            .policies(&format!("[policies.a]\nconcepts = ['*']\nsteering.eta = 0.4\n{lines}"))
    };
    let refused =
        |world: &World, eta| world.admit(&asks(eta)).expect_err("not allowed").to_string();
    let expected = "steering: eta is 0.5 and the policy's is 0.4; the policy does not allow overrides (policy `a`)";
    assert_eq!(refused(&policy(""), 0.5), expected);
    let same = policy("").admit(&asks(0.4)).expect("it changes nothing");
    assert_eq!(policy("").admit(&same.spec()).expect("what was filled in").policy(), same.policy());
    assert!(World::new().admit(&asks(0.5)).is_err(), "nor does the built-in policy");

    let open = policy("allow_overrides = true");
    let expected =
        "steering: eta is 0.3 and the policy's is 0.4; a client may raise it only (policy `a`)";
    assert_eq!(refused(&open, 0.3), expected);
    let record = open.admit(&asks(0.5)).expect("it is stronger");
    assert_eq!(record.policy().steering.expect("filled").eta(), 0.5);
    let observing = policy("allow_overrides = true\nobserve_only = true");
    let record = observing.admit(&asks(0.1)).expect("nothing is steered");
    assert_eq!(record.policy().steering.expect("filled").eta(), 0.1);
}

#[test]
fn no_concept_is_legal_only_where_the_policy_says_so() {
    let text = "[policies.a]\nconcepts = []\nallow_unchecked = true";
    let world = World { nodes: vec![], ..World::new() }.policies(text);
    assert_eq!(world.admit(&spec()).expect("allowed").policy().concepts, []);
    let observe = "[policies.a]\nconcepts = ['*']\nobserve_only = true";
    let world = World { nodes: vec![], ..World::new() }.policies(observe);
    assert_eq!(world.admit(&spec()).expect("allowed").policy().concepts, []);
}

#[test]
fn the_newest_version_is_pinned_but_a_calibrated_one_comes_first() {
    let old = node(&[("axe", "old")], 1, Some(key("sd", 25)));
    let world = |calibrated| World {
        nodes: vec![old.clone(), node(&[("axe", "new")], 2, calibrated)],
        ..World::new()
    };
    let version =
        |world: World| world.admit(&spec()).expect("valid").policy().concepts[0].version.clone();
    assert_eq!(version(world(Some(key("sd", 25)))), "new");
    assert_eq!(version(world(None)), "old");
}

proptest! {
    #[test]
    fn shards_cover_the_job_and_respect_both_bounds(n in 1u32..=64, size in 0u32..100) {
        let record = World::new().admit(&v1::JobSpec { n, max_shard_size: size, ..spec() })
            .expect("valid");
        let images: Vec<u32> = record.shards.iter().flat_map(Shard::images).collect();
        prop_assert_eq!(images, (0..n).collect::<Vec<_>>());
        let most = if size == 0 { 8 } else { size.min(8) };
        prop_assert!(record.shards.iter().all(|shard| shard.count <= most));
    }

    #[test]
    fn any_numbers_are_answered_without_a_panic(
        n: u32, width: Option<u32>, steps: Option<u32>, guidance: Option<f32>,
    ) {
        let spec = v1::JobSpec { n, width, steps, guidance_scale: guidance, ..spec() };
        if let Ok(record) = World::new().admit(&spec) {
            prop_assert_eq!(record.job.images.len(), n as usize);
            // The checks by which a worker reads its shards.
            let spec = record.spec();
            prop_assert!(limits::check_prompts(&spec).is_ok() && Shape::of(&spec, &record.model).is_ok());
            let knobs = record.policy().steering.expect("filled");
            prop_assert_eq!(steering::resolve(&knobs), Ok(knobs));
        }
    }
}

#[test]
fn another_model_of_a_name_keeps_no_job_from_the_right_one() {
    let mut world = World::new();
    // It came first, describes the name otherwise, and no node is calibrated for it.
    let rogue = v1::ModelInfo { hash: "rogue".into(), max_side: 8, ..model("sd") };
    let liar = v1::ModelInfo { max_side: 8, ..model("sd") };
    world.models.splice(0..0, [rogue, liar]);
    let record = world.admit(&spec()).expect("the right one is there");
    assert_eq!((record.model.hash.as_str(), record.model.max_side), ("hash-of-sd", 66));
    assert_eq!(record.spec().model, "sd");
    let [notice] = record.job.notices.as_slice() else { panic!("{:?}", record.job.notices) };
    assert!(notice.contains("3 different models called `sd`; this is `sd@hash-of-sd`"), "{notice}");
    let named = v1::JobSpec { model: "sd@hash-of".into(), ..spec() };
    assert_eq!(world.admit(&named).expect("there").model.max_side, 66);
    let other = v1::JobSpec { model: "sd@0a".into(), ..spec() };
    let error = world.admit(&other).expect_err("no such hash").to_string();
    assert!(error.contains("model: `sd@0a`: no worker has that"), "{error}");
}
