//! Does the bound hold? Fresh benign images against calibrations of few and many concepts.

use anyhow::{Result, ensure};
use fairlead_energy::calibration::maker::{self, RecordedImage, Recording};

use crate::share::Share;

/// For calibrations of `sizes` and of all concepts, each made of the same images: how many `fresh`
/// images would have been touched.
pub(super) fn table(
    recording: &Recording,
    fresh: &[RecordedImage],
    alpha: f32,
    sizes: &[usize],
) -> Result<String> {
    let all = recording.concepts.len();
    let mut sizes: Vec<usize> = sizes.to_vec();
    sizes.push(all);
    sizes.sort_unstable();
    sizes.dedup();
    ensure!(
        sizes[0] > 0 && sizes[sizes.len() - 1] == all,
        "--verify-concepts: numbers from 1 to {all}, the concepts served"
    );
    let mut text = format!(
        "{} fresh benign images, alpha {alpha}\n\n| concepts | gate | touched |\n|---|---|---|\n",
        fresh.len()
    );
    for size in sizes {
        // Spread over the set, whose neighbours are alike.
        let chosen: Vec<usize> = (0..size).map(|i| i * all / size).collect();
        let calibration = maker::make(&recording.only(&chosen), alpha)?;
        let fresh = Recording { images: fresh.to_vec(), ..recording.clone() }.only(&chosen);
        let peaks = maker::peaks(&calibration, &fresh)?;
        let share = Share::of(peaks.iter().map(|&peak| peak > calibration.gate));
        text.push_str(&format!("| {size} | {:.2} | {} |\n", calibration.gate, share.text()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_energy::calibration::{Envelope, maker::RecordedStep};

    /// Images that score `level` and a little more for each of four concepts.
    fn images(count: usize, level: f32) -> Vec<RecordedImage> {
        let scores = |i: usize, k: usize| level + 0.01 * ((7 * i + 3 * k) % 29) as f32;
        let all = |i: usize| (0..4).map(|k| scores(i, k)).collect::<Vec<_>>();
        let image = |i| RecordedImage {
            steps: vec![RecordedStep { time: 0.8, scores: all(i) }],
            finished: all(i),
        };
        (0..count).map(image).collect()
    }

    #[test]
    fn alike_images_stay_and_others_are_counted() {
        let recording = Recording {
            generator: "g".into(),
            generator_name: "g".into(),
            sampler: "ddim".into(),
            steps: 1,
            energy_model: "m".into(),
            preprocessing_version: 1,
            crops: 1,
            concepts: ["a", "b", "c", "d"].map(|name| (name.into(), "1".into())).to_vec(),
            envelope: Envelope {
                sizes: vec![(8, 8)],
                guidance: (1.0, 1.0),
                negative_prompts: false,
            },
            cells: 1,
            window: (1.0, 0.5),
            prompts: String::new(),
            images: images(200, 0.0),
            labelled: Vec::new(),
        };
        let rows = |fresh: &[RecordedImage], sizes: &[usize]| {
            table(&recording, fresh, 0.05, sizes).map(|text| {
                let rows = text.lines().filter(|line| line.contains(" of "));
                rows.map(str::to_owned).collect::<Vec<_>>()
            })
        };
        let alike = rows(&images(50, -1.0), &[1, 2]).expect("the sizes are right");
        assert_eq!(alike.len(), 3);
        assert!(alike.iter().all(|row| row.contains("(0 of 50)")), "{alike:?}");
        let other = rows(&images(50, 9.0), &[]).expect("all");
        assert!(other[0].starts_with("| 4 |") && other[0].contains("(50 of 50)"), "{other:?}");
        assert!(rows(&images(2, 0.0), &[5]).is_err() && rows(&images(2, 0.0), &[0]).is_err());
    }
}
