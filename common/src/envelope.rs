//! The conditions that calibrations were made under, and whether a run lies inside them.
//!
//! What benign images score depends on the size, on the guidance scale and on whether a negative prompt
//! pulls at them: outside the conditions that a calibration was made under, its gate bounds nothing.

use fairlead_proto::v1::{CalibrationEnvelope, ImageSize, JobSpec, RunConditions};

/// The conditions of the run of `spec`, of which every field is set; `may_leave_envelope` says that its
/// policy lets it lie outside its calibrations' envelopes.
pub fn conditions(spec: &JobSpec, may_leave_envelope: bool) -> RunConditions {
    RunConditions {
        size: Some(ImageSize { width: spec.width(), height: spec.height() }),
        guidance_scale: spec.guidance_scale(),
        // A prompt of blanks is encoded like any other text.
        negative_prompt: !spec.negative_prompt.is_empty(),
        may_leave_envelope,
    }
}

/// In which ways `run` lies outside `envelope`; none if it lies inside. Conditions that are missing lie
/// outside.
pub fn ways_outside(envelope: &CalibrationEnvelope, run: &RunConditions) -> Vec<String> {
    let mut ways = Vec::new();
    let size = run.size.unwrap_or_default();
    if !envelope.sizes.contains(&size) {
        ways.push(format!("size {}, calibrated {}", text(&size), sizes(envelope)));
    }
    let range = envelope.guidance_least..=envelope.guidance_greatest;
    if !range.contains(&run.guidance_scale) {
        let calibrated = guidance(envelope, " to ");
        ways.push(format!("guidance {}, calibrated {calibrated}", run.guidance_scale));
    }
    if run.negative_prompt && !envelope.negative_prompts {
        ways.push("a negative prompt, calibrated without".to_owned());
    }
    ways
}

/// The least envelope that holds `run`.
pub fn around(run: &RunConditions) -> CalibrationEnvelope {
    CalibrationEnvelope {
        sizes: run.size.into_iter().collect(),
        guidance_least: run.guidance_scale,
        guidance_greatest: run.guidance_scale,
        negative_prompts: run.negative_prompt,
    }
}

/// `envelope`, widened so that it holds `run` as well.
pub fn extended(envelope: &CalibrationEnvelope, run: &RunConditions) -> CalibrationEnvelope {
    let mut wider = envelope.clone();
    wider.sizes.extend(run.size.filter(|size| !envelope.sizes.contains(size)));
    wider.guidance_least = wider.guidance_least.min(run.guidance_scale);
    wider.guidance_greatest = wider.guidance_greatest.max(run.guidance_scale);
    wider.negative_prompts |= run.negative_prompt;
    wider
}

/// An envelope, for people.
pub fn describe(envelope: &CalibrationEnvelope) -> String {
    let negative =
        if envelope.negative_prompts { "negative prompts" } else { "no negative prompt" };
    format!("{}, guidance {}, {negative}", sizes(envelope), guidance(envelope, " to "))
}

/// The flags of `fairlead calibrate` that make a calibration with this envelope.
pub fn flags(envelope: &CalibrationEnvelope) -> String {
    let guidance = guidance(envelope, ",");
    let negative = if envelope.negative_prompts { " --negative" } else { "" };
    format!("--size {} --guidance {guidance}{negative}", sizes(envelope))
}

fn guidance(envelope: &CalibrationEnvelope, between: &str) -> String {
    let (least, greatest) = (envelope.guidance_least, envelope.guidance_greatest);
    if least == greatest { least.to_string() } else { format!("{least}{between}{greatest}") }
}

fn sizes(envelope: &CalibrationEnvelope) -> String {
    envelope.sizes.iter().map(text).collect::<Vec<_>>().join(",")
}

fn text(ImageSize { width, height }: &ImageSize) -> String {
    format!("{width}x{height}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size(side: u32) -> ImageSize {
        ImageSize { width: side, height: side }
    }

    fn run(side: u32, guidance_scale: f32, negative_prompt: bool) -> RunConditions {
        RunConditions {
            size: Some(size(side)),
            guidance_scale,
            negative_prompt,
            may_leave_envelope: false,
        }
    }

    #[test]
    fn every_way_out_is_named_with_what_is_calibrated() {
        let envelope = around(&run(32, 5.0, false));
        assert_eq!(ways_outside(&envelope, &run(32, 5.0, false)), [""; 0]);
        assert_eq!(ways_outside(&envelope, &run(64, 5.0, false)), ["size 64x64, calibrated 32x32"]);
        let all =
            ways_outside(&extended(&envelope, &run(64, 7.5, false)), &run(16, f32::NAN, true));
        assert_eq!(
            all,
            [
                "size 16x16, calibrated 32x32,64x64",
                "guidance NaN, calibrated 5 to 7.5",
                "a negative prompt, calibrated without"
            ]
        );
        let tall = RunConditions {
            size: Some(ImageSize { width: 32, height: 64 }),
            ..run(32, 5.0, false)
        };
        assert_eq!(ways_outside(&envelope, &tall).len(), 1);
        assert_eq!(ways_outside(&envelope, &RunConditions::default()).len(), 2, "unset is outside");
    }

    #[test]
    fn the_flags_name_the_old_and_the_new() {
        let envelope = extended(&around(&run(32, 5.0, false)), &run(64, 7.5, true));
        assert_eq!(flags(&envelope), "--size 32x32,64x64 --guidance 5,7.5 --negative");
        assert_eq!(describe(&envelope), "32x32,64x64, guidance 5 to 7.5, negative prompts");
        let least = around(&run(32, 5.0, false));
        assert_eq!(flags(&least), "--size 32x32 --guidance 5");
        assert_eq!(describe(&least), "32x32, guidance 5, no negative prompt");
    }

    proptest! {
        #[test]
        fn an_extended_envelope_holds_the_run_and_all_that_it_held(
            runs in prop::collection::vec((1u32..5, 1f32..9.0, any::<bool>()), 1..6),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(side, g, n)| run(side, g, n)).collect();
            let envelope = runs.iter().skip(1).fold(around(&runs[0]), |e, run| extended(&e, run));
            for run in &runs {
                prop_assert!(ways_outside(&envelope, run).is_empty());
            }
        }
    }
}
