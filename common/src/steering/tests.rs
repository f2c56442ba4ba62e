use fairlead_proto::FILE_DESCRIPTOR_SET;
use proptest::prelude::*;
use prost_reflect::DescriptorPool;

use super::*;

#[test]
fn the_table_has_every_knob_of_the_contract() {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the contract");
    let message = pool.get_message_by_name("fairlead.v1.SteeringParams").expect("it is there");
    let fields: Vec<String> = message.fields().map(|field| field.name().to_owned()).collect();
    assert_eq!(fields, KNOBS.map(|knob| knob.name));
    // Whoever adds a knob decides here what a client may do with it.
    let SteeringParams {
        mode: _,
        eta: _,
        window_start: _,
        window_end: _,
        inner_iterations: _,
        smoothing: _,
        cap: _,
        crops: _,
        probe_period: _,
        rerun_factor: _,
    } = defaults(SteeringMode::HoldNoise);
    for knob in &KNOBS {
        assert!((knob.get)(&defaults(SteeringMode::HoldNoise)).is_some(), "{}", knob.name);
        assert!((knob.get)(&SteeringParams::default()).is_none(), "{}", knob.name);
    }
}

#[test]
fn what_is_asked_for_beats_the_policy_beats_the_default() {
    let policy = SteeringParams { eta: Some(0.5), ..Default::default() };
    let asked = SteeringParams { crops: Some(6), ..Default::default() };
    let resolved = overridden(&policy, &asked, Leave::Stronger).expect("it is stronger");
    assert_eq!((resolved.eta(), resolved.crops(), resolved.cap()), (0.5, 6, 3.0));
    assert_eq!(resolved.mode(), SteeringMode::HoldNoise);
    let shifted = SteeringParams { mode: SteeringMode::ShiftState.into(), ..Default::default() };
    assert_eq!(resolve(&shifted).expect("in range").eta(), 0.15);
}

#[test]
fn values_out_of_range_are_named_with_their_range() {
    type Set = fn(&mut SteeringParams);
    let cases: [(Set, &str); 12] = [
        (|p| p.eta = Some(0.0), "eta: is 0; it must be above 0 and at most 2"),
        (|p| p.eta = Some(f32::NAN), "eta: is NaN"),
        (|p| p.window_start = Some(1.5), "window_start: is 1.5; it must be from 0 to 1"),
        (|p| p.window_end = Some(-0.1), "window_end: is -0.1; it must be from 0 to 1"),
        (|p| p.window_start = Some(0.5), "window_start: is 0.5, below window_end 0.6"),
        (|p| p.inner_iterations = Some(5), "inner_iterations: is 5; it must be from 1 to 4"),
        (|p| p.smoothing = Some(-1.0), "smoothing: is -1"),
        (|p| p.cap = Some(f32::INFINITY), "cap: is inf"),
        (|p| p.crops = Some(9), "crops: is 9; it must be from 1 to 8"),
        (|p| p.probe_period = Some(0), "probe_period: is 0"),
        (|p| p.rerun_factor = Some(0.5), "rerun_factor: is 0.5; it must be from 1 to 4"),
        (|p| p.mode = 9, "mode: is 9; use HOLD_NOISE"),
    ];
    for (change, expected) in cases {
        let mut params = SteeringParams::default();
        change(&mut params);
        let problem = resolve(&params).expect_err(expected).to_string();
        assert!(problem.starts_with(expected), "{problem}");
    }
}

#[test]
fn a_weaker_value_is_named_with_the_policys() {
    type Set = fn(&mut SteeringParams);
    let cases: [(Set, &str); 10] = [
        (
            |p| p.mode = SteeringMode::ShiftState.into(),
            "mode: is SHIFT_STATE and the policy's is HOLD_NOISE; a client may not",
        ),
        (
            |p| p.eta = Some(0.29),
            "eta: is 0.29 and the policy's is 0.3; a client may raise it only",
        ),
        (|p| p.window_start = Some(0.9), "window_start: is 0.9 and the policy's is 1"),
        (
            |p| p.window_end = Some(0.7),
            "window_end: is 0.7 and the policy's is 0.6; a client may lower",
        ),
        (|p| p.inner_iterations = Some(1), "inner_iterations: is 1 and the policy's is 2"),
        (|p| p.smoothing = Some(0.5), "smoothing: is 0.5 and the policy's is 1; a client may not"),
        (|p| p.cap = Some(2.9), "cap: is 2.9 and the policy's is 3"),
        (|p| p.crops = Some(3), "crops: is 3 and the policy's is 4"),
        (|p| p.probe_period = Some(2), "probe_period: is 2 and the policy's is 1"),
        (|p| p.rerun_factor = Some(1.5), "rerun_factor: is 1.5 and the policy's is 2"),
    ];
    let policy = SteeringParams { inner_iterations: Some(2), ..Default::default() };
    for (change, expected) in cases {
        let mut asked = SteeringParams::default();
        change(&mut asked);
        let problem = overridden(&policy, &asked, Leave::Stronger).expect_err(expected).to_string();
        assert!(problem.starts_with(expected), "{problem}");
    }
}

#[test]
fn a_window_of_one_time_is_taken() {
    let point = |time| SteeringParams {
        window_start: Some(time),
        window_end: Some(time),
        ..Default::default()
    };
    for time in [0.0, 0.5, 1.0] {
        assert!(resolve(&point(time)).is_ok(), "{time}");
    }
}

/// Any knobs: unset, in range and out of it.
pub(crate) fn params() -> impl Strategy<Value = SteeringParams> {
    let float = |range: std::ops::RangeInclusive<f32>| {
        prop::option::of(prop_oneof![8 => range, 1 => Just(f32::NAN), 1 => any::<f32>()])
    };
    let count = |most: u32| prop::option::of(0..=most);
    (
        (0i32..5, float(0.0..=2.1), float(0.0..=1.0), float(0.0..=1.0), count(5)),
        (float(0.0..=2.1), float(0.0..=110.0), count(9), count(5), float(0.5..=4.5)),
    )
        .prop_map(|((mode, eta, window_start, window_end, inner_iterations), rest)| {
            let (smoothing, cap, crops, probe_period, rerun_factor) = rest;
            SteeringParams {
                mode: if mode == 4 { 9 } else { mode },
                eta,
                window_start,
                window_end,
                inner_iterations,
                smoothing,
                cap,
                crops,
                probe_period,
                rerun_factor,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a client asks for, in every combination: no knob ends up below its policy's.
    #[test]
    fn a_client_only_ever_strengthens(policy in params(), asked in params()) {
        let Ok(own) = resolve(&policy) else { return Ok(()) };
        let Ok(got) = overridden(&policy, &asked, Leave::Stronger) else { return Ok(()) };
        // Written out, and not by the table that it checks.
        prop_assert_eq!((got.mode, got.smoothing), (own.mode, own.smoothing));
        prop_assert_eq!(overridden(&policy, &asked, Leave::None).is_ok(), got == own);
        prop_assert!(got.eta() >= own.eta() && got.cap() >= own.cap());
        prop_assert!(got.window_start() >= own.window_start());
        prop_assert!(got.window_end() <= own.window_end());
        prop_assert!(got.inner_iterations() >= own.inner_iterations());
        prop_assert!(got.crops() >= own.crops() && got.probe_period() <= own.probe_period());
        prop_assert!(got.rerun_factor() >= own.rerun_factor());
    }

    /// One knob at a time: taken exactly if it is in range and at least as strong.
    #[test]
    fn each_knob_moves_its_way_only(policy in params(), asked in params(), which in 0..KNOBS.len()) {
        let Ok(own) = resolve(&policy) else { return Ok(()) };
        let knob = &KNOBS[which];
        let mut single = SteeringParams::default();
        (knob.take)(&mut single, &asked);
        let Some(value) = (knob.get)(&single) else { return Ok(()) };
        let is_stronger = match knob.stronger {
            Stronger::Greater => value >= knob.value(&own),
            Stronger::Smaller => value <= knob.value(&own),
            Stronger::None => value == knob.value(&own),
        };
        let in_range = resolve(&over(&own, &single)).is_ok();
        prop_assert_eq!(overridden(&policy, &single, Leave::Stronger).is_ok(), is_stronger && in_range);
    }

    /// What was resolved is taken again, as it is: a worker reads what a coordinator pinned.
    #[test]
    fn resolved_knobs_are_a_fixed_point(policy in params()) {
        if let Ok(resolved) = resolve(&policy) {
            prop_assert_eq!(resolve(&resolved), Ok(resolved));
            prop_assert_eq!(overridden(&policy, &resolved, Leave::None), Ok(resolved));
            prop_assert_eq!(overridden(&policy, &SteeringParams::default(), Leave::None), Ok(resolved));
        }
    }
}
