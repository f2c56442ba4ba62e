//! Makes a calibration from the raw scores of unsteered benign images.
//!
//! The images are split in two halves by a fixed shuffle. One half gives mean and standard
//! deviation per concept and bin; for each image of the other half the greatest `z` over concepts
//! and steps is taken, and the gate is the `ceil((1 - alpha)(n + 1))`-th smallest of these `n`
//! values. A further benign image exchangeable with them stays at or below the gate with
//! probability at least `1 - alpha`, for any number of concepts (split conformal prediction, Vovk
//! et al. 2005; Lei et al. 2018, theorem 2.2).
//!
//! A calibration may cover several cells: sizes, guidance scales, with and without negative prompts. Then
//! every cell is split by the same shuffle, the first halves of all cells give means and deviations, each
//! second half its own order statistic, and the gate is the greatest of these. A quantile of all cells
//! together would bound the mean over cells only, and touch more than `alpha` in the cells that score
//! highest; the greatest keeps the bound in each of them, at the cost of sensitivity in the others. Cells
//! may share prompts: one that gave a mean never gives a gate. Between the guidance scales of its cells the
//! bound is an interpolation.
//!
//! No deviation counts for less than their root mean square over concepts and bins. One gate serves
//! all concepts, and scores have long tails: without the floor one odd picture of a concept that is
//! otherwise very quiet has a `z` that raises the gate for all the others.

use super::{BINS, Bin, Calibration, ConceptBins, Envelope, FINISHED_BIN, FORMAT, Setup, time_bin};
use crate::{concepts, random::SplitMix64};

/// The least hysteresis `h`.
pub const HYSTERESIS: f32 = 0.5;

/// The hysteresis as a share of the gate, where that is more: long tails put the gate far from where
/// most benign images score, and what has just fallen below it may still be well in view.
const HYSTERESIS_SHARE: f32 = 0.65;

/// Bound on the share of benign images that the final check withholds.
pub const CHECK_ALPHA: f32 = 0.005;

/// Raw scores of one image's trajectory, concepts in the order of [`Recording::concepts`].
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedImage {
    /// One entry per step at which the energy was asked.
    pub steps: Vec<RecordedStep>,
    /// Scores of the finished image.
    pub finished: Vec<f32>,
}

/// Raw scores of one clean estimate.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedStep {
    /// Training time t / T in (0, 1].
    pub time: f32,
    /// One score per concept.
    pub scores: Vec<f32>,
}

/// Everything a calibration is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// Content hash of the generator.
    pub generator: String,
    /// Its name, for people.
    pub generator_name: String,
    /// Sampler, e.g. "ddim".
    pub sampler: String,
    /// Sampling steps.
    pub steps: u32,
    /// Content hash of the energy model, as the node describes itself.
    pub energy_model: String,
    /// Preprocessing version, as the node describes itself.
    pub preprocessing_version: u32,
    /// Crops per image that the scores were made with; the node's default unless asked otherwise.
    pub crops: u32,
    /// Name and version of *every* concept the node serves.
    pub concepts: Vec<(String, String)>,
    /// The conditions of all cells together.
    pub envelope: Envelope,
    /// Number of cells: as many equal parts of [`Recording::images`], one after the other, the same prompts
    /// in the same order.
    pub cells: usize,
    /// Start and end of the steering window, t / T, start >= end; steps outside are left out.
    pub window: (f32, f32),
    /// SHA-256 of the prompts and seeds of all images.
    pub prompts: String,
    /// Unsteered images of benign prompts.
    pub images: Vec<RecordedImage>,
    /// Unsteered images of prompts that ask for concepts.
    pub labelled: Vec<LabelledImage>,
}

/// An image with the concepts that its prompt asks for, as indices into [`Recording::concepts`].
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledImage {
    /// What it scored.
    pub image: RecordedImage,
    /// What was asked for.
    pub concepts: Vec<usize>,
}

impl Recording {
    /// The same with some of the concepts only; labels of the others are dropped.
    pub fn only(&self, concepts: &[usize]) -> Self {
        let pick = |scores: &[f32]| concepts.iter().map(|&k| scores[k]).collect::<Vec<_>>();
        let image = |image: &RecordedImage| RecordedImage {
            steps: image
                .steps
                .iter()
                .map(|step| RecordedStep { time: step.time, scores: pick(&step.scores) })
                .collect(),
            finished: pick(&image.finished),
        };
        let place = |k: &usize| concepts.iter().position(|chosen| chosen == k);
        Self {
            concepts: concepts.iter().map(|&k| self.concepts[k].clone()).collect(),
            images: self.images.iter().map(image).collect(),
            labelled: self
                .labelled
                .iter()
                .map(|labelled| LabelledImage {
                    image: image(&labelled.image),
                    concepts: labelled.concepts.iter().filter_map(place).collect(),
                })
                .collect(),
            ..self.clone()
        }
    }
}

/// Why no calibration could be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MakeError {
    /// `alpha` is no share.
    #[error("alpha is {0}, must be above 0 and below 1, e.g. 0.01")]
    Alpha(f32),
    /// The conformal rank would lie beyond the last value.
    #[error(
        "{images} benign images of each cell are too few for alpha = {alpha}: at least {needed} are needed, \
         1000 or more are better"
    )]
    TooFewImages {
        /// Images of each cell.
        images: usize,
        /// The bound asked for.
        alpha: f32,
        /// Fewest images that will do.
        needed: usize,
    },
    /// The images do not fill the cells.
    #[error("{images} benign images do not make {cells} equal cells")]
    Cells {
        /// Images given.
        images: usize,
        /// Cells to fill.
        cells: usize,
    },
    /// There are no concepts.
    #[error("no concepts: take them from the energy node's description")]
    NoConcepts,
    /// The window is no interval of t / T.
    #[error("window {0} to {1}: start and end must lie in 0..1, start at or above end")]
    Window(f32, f32),
    /// An image has no step within the window.
    #[error("image {0} has no step within the window; record every step, or widen the window")]
    NoSteps(usize),
    /// A number of scores or a time that cannot be.
    #[error("image {image}: {problem}")]
    Scores {
        /// Index of the image.
        image: usize,
        /// What is wrong.
        problem: String,
    },
    /// Scores that never vary cannot be standardised.
    #[error(
        "concept `{concept}` scored {score} on every image (bin {bin} of t / T): the energy model \
         does not see it; check its weights and the concept's phrases"
    )]
    Constant {
        /// The concept.
        concept: String,
        /// The bin, 10 for the finished image.
        bin: usize,
        /// The one score seen.
        score: f32,
    },
    /// A bin holds a single score, or bins differ between the halves.
    #[error("bin {bin} of t / T holds {count} scores; at least 2 are needed, record more images")]
    ThinBin {
        /// The bin.
        bin: usize,
        /// Scores found.
        count: usize,
    },
}

/// Fewest images from which [`make`] can keep the bound `alpha`.
///
/// # Errors
/// [`MakeError::Alpha`] unless `alpha` lies in (0, 1).
pub fn minimum_images(alpha: f32) -> Result<usize, MakeError> {
    if !(alpha > 0.0 && alpha < 1.0) {
        return Err(MakeError::Alpha(alpha));
    }
    let mut half = 2;
    while conformal_rank(half, alpha) > half {
        half += 1;
    }
    Ok(2 * half)
}

/// `ceil((1 - alpha)(n + 1))`, with no rounding error of the product pushing it up.
fn conformal_rank(n: usize, alpha: f32) -> usize {
    let exact = (1.0 - f64::from(alpha)) * (n + 1) as f64;
    (exact - 1e-6).ceil().max(1.0) as usize
}

/// Makes a calibration that touches at most `alpha` of benign images in each cell; see the module. The result
/// depends on the recording alone.
pub fn make(recording: &Recording, alpha: f32) -> Result<Calibration, MakeError> {
    check(recording, alpha)?;
    let of_cell = recording.images.len() / recording.cells;
    let order = shuffled(of_cell);
    // The gate's half never loses the odd image: the bound is about its size.
    let (first, second) = order.split_at(of_cell / 2);
    let place = |cell: usize| move |&image: &usize| cell * of_cell + image;
    let first = (0..recording.cells).flat_map(|cell| first.iter().map(place(cell)));
    let levels = levels(recording, &first.collect::<Vec<_>>())?;
    let mut gate = f32::NEG_INFINITY;
    for cell in 0..recording.cells {
        let images = second.iter().map(place(cell)).map(|image| &recording.images[image]);
        let peaks = images.map(|image| peak(recording, &levels, image));
        let mut peaks = peaks.collect::<Result<Vec<_>, _>>()?;
        peaks.sort_unstable_by(f32::total_cmp);
        gate = gate.max(peaks[conformal_rank(peaks.len(), alpha) - 1]);
    }
    let pairs = recording.concepts.iter().map(|(name, version)| (name.as_str(), version.as_str()));
    let setup = Setup {
        generator: recording.generator.clone(),
        generator_name: recording.generator_name.clone(),
        sampler: recording.sampler.clone(),
        steps: recording.steps,
        energy_model: recording.energy_model.clone(),
        concept_set: concepts::set_hash(pairs),
        preprocessing_version: recording.preprocessing_version,
        crops: recording.crops,
    };
    let aurocs = auroc_by_bin(recording);
    let (thresholds, check_alpha) = final_check(recording);
    let concepts = recording.concepts.iter().zip(levels.into_iter().zip(aurocs)).zip(thresholds);
    let concepts = concepts.map(|(((name, version), (bins, auroc)), threshold)| ConceptBins {
        name: name.clone(),
        version: version.clone(),
        bins,
        auroc,
        check_threshold: threshold,
    });
    Ok(Calibration {
        format: FORMAT,
        id: String::new(),
        setup,
        envelope: recording.envelope.clone(),
        window: recording.window,
        alpha,
        images: recording.images.len() as u32,
        labelled: recording.labelled.len() as u32,
        prompts: recording.prompts.clone(),
        gate,
        hysteresis: HYSTERESIS.max(HYSTERESIS_SHARE * gate),
        check_alpha,
        concepts: concepts.collect(),
    }
    .seal())
}

/// Levels of the final check and the bound that they keep. A raw score is read as a share of what
/// pictures of its concept typically score, and one share is the level of all concepts: the conformal
/// quantile of the greatest share that each finished benign image has. The benign images serve for nothing
/// else here, so all of them count.
///
/// Unlike the gates nothing is standardised by benign deviations: these say little about where a concept's
/// own pictures lie, and put the level of some out of reach.
fn final_check(recording: &Recording) -> (Vec<f32>, f32) {
    let typical = typical_scores(recording);
    let greatest = |image: &RecordedImage| {
        let shares = image.finished.iter().zip(&typical).map(|(score, typical)| score / typical);
        shares.fold(f32::MIN, f32::max)
    };
    let n = recording.images.len() / recording.cells;
    // Of few images the greatest of all bounds the share as well as it can be bounded.
    let alpha = CHECK_ALPHA.max(1.0 / (n + 1) as f32);
    let quantile = |cell: &[RecordedImage]| {
        let mut greatest: Vec<f32> = cell.iter().map(greatest).collect();
        greatest.sort_unstable_by(f32::total_cmp);
        greatest[conformal_rank(n, alpha).min(n) - 1]
    };
    // As for the gate, the bound is to hold in every cell.
    let share = recording.images.chunks(n).map(quantile).fold(f32::MIN, f32::max);
    (typical.iter().map(|typical| share * typical).collect(), alpha)
}

/// What finished images of prompts that ask for a concept typically score: their median, but no less than
/// half of what is usual for the concepts together, so that one which the energy hardly sees does not
/// take the level of all the others along. 1 for every concept where some have no such images.
fn typical_scores(recording: &Recording) -> Vec<f32> {
    let concepts = recording.concepts.len();
    let of_concept = |k: usize| {
        let asked = recording.labelled.iter().filter(|labelled| labelled.concepts.contains(&k));
        median(asked.map(|labelled| labelled.image.finished[k]).collect())
    };
    let medians: Option<Vec<f32>> = (0..concepts).map(of_concept).collect();
    let usual = medians.as_ref().and_then(|medians| median(medians.clone()));
    match (medians, usual) {
        (Some(medians), Some(usual)) if usual > 0.0 => {
            medians.into_iter().map(|typical| typical.max(0.5 * usual)).collect()
        }
        _ => vec![1.0; concepts],
    }
}

fn median(mut values: Vec<f32>) -> Option<f32> {
    values.sort_unstable_by(f32::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(0.5 * (values[middle - 1] + values[middle])),
    }
}

/// Of the labelled images of each concept, the share that the final check would withhold; none where there
/// are none.
pub fn withheld_shares(calibration: &Calibration, recording: &Recording) -> Vec<Option<f32>> {
    let share = |k: usize| {
        let asked = recording.labelled.iter().filter(|labelled| labelled.concepts.contains(&k));
        let found: Vec<bool> = asked
            .map(|it| it.image.finished[k] > calibration.concepts[k].check_threshold)
            .collect();
        let seen = found.iter().filter(|found| **found).count();
        (!found.is_empty()).then(|| seen as f32 / found.len() as f32)
    };
    (0..recording.concepts.len()).map(share).collect()
}

fn check(recording: &Recording, alpha: f32) -> Result<(), MakeError> {
    let needed = minimum_images(alpha)?;
    let (start, end) = recording.window;
    if !(start <= 1.0 && end >= 0.0 && start >= end) {
        return Err(MakeError::Window(start, end));
    }
    if recording.concepts.is_empty() {
        return Err(MakeError::NoConcepts);
    }
    let (images, cells) = (recording.images.len(), recording.cells);
    if cells == 0 || !images.is_multiple_of(cells) {
        return Err(MakeError::Cells { images, cells });
    }
    let images = images / cells;
    if images < needed {
        return Err(MakeError::TooFewImages { images, alpha, needed });
    }
    let labelled = recording.labelled.iter().map(|labelled| &labelled.image);
    for (image, recorded) in recording.images.iter().chain(labelled).enumerate() {
        check_image(recording, recorded).map_err(|problem| MakeError::Scores { image, problem })?;
        if recorded.steps.iter().all(|step| !within(recording, step.time)) {
            return Err(MakeError::NoSteps(image));
        }
    }
    Ok(())
}

fn check_image(recording: &Recording, image: &RecordedImage) -> Result<(), String> {
    let concepts = recording.concepts.len();
    for step in &image.steps {
        if !(step.time > 0.0 && step.time <= 1.0) {
            return Err(format!("time {} is not in (0, 1]", step.time));
        }
    }
    for scores in image.steps.iter().map(|step| &step.scores).chain([&image.finished]) {
        if scores.len() != concepts {
            return Err(format!("{} scores for {concepts} concepts", scores.len()));
        }
        if let Some(k) = scores.iter().position(|score| !score.is_finite()) {
            return Err(format!("score {} of `{}`", scores[k], recording.concepts[k].0));
        }
    }
    Ok(())
}

fn within(recording: &Recording, time: f32) -> bool {
    time <= recording.window.0 && time >= recording.window.1
}

/// Bin and scores of every step within the window, and of the finished image.
fn observations<'a>(
    recording: &'a Recording,
    image: &'a RecordedImage,
) -> impl Iterator<Item = (usize, &'a [f32])> {
    let RecordedImage { steps, finished } = image;
    steps
        .iter()
        .filter(|step| within(recording, step.time))
        .map(|step| (time_bin(step.time), step.scores.as_slice()))
        .chain([(FINISHED_BIN, finished.as_slice())])
}

/// A permutation of `0..n` that depends on `n` alone (Fisher-Yates).
fn shuffled(n: usize) -> Vec<usize> {
    let mut random = SplitMix64::new(n as u64);
    let mut order = (0..n).collect::<Vec<_>>();
    for i in (1..n).rev() {
        order.swap(i, random.below(i + 1));
    }
    order
}

/// Mean and standard deviation, not below the floor, per concept and bin.
fn levels(recording: &Recording, images: &[usize]) -> Result<Vec<Vec<Option<Bin>>>, MakeError> {
    let mut values = vec![[const { Vec::new() }; BINS]; recording.concepts.len()];
    for &image in images {
        for (bin, scores) in observations(recording, &recording.images[image]) {
            for (k, &score) in scores.iter().enumerate() {
                values[k][bin].push(score);
            }
        }
    }
    let moments_of = |name: &str, bin: usize, scores: &[f32]| match scores {
        [] => Ok(None),
        [_] => Err(MakeError::ThinBin { bin, count: 1 }),
        [score, ..] => match moments(scores) {
            (_, sd) if sd < 1e-9 => {
                Err(MakeError::Constant { concept: name.to_owned(), bin, score: *score })
            }
            (mean, sd) => Ok(Some(Bin { mean, sd, count: scores.len() as u32 })),
        },
    };
    let concept = |((name, _), bins): (&(String, String), &[Vec<f32>; BINS])| {
        bins.iter().enumerate().map(|(bin, scores)| moments_of(name, bin, scores)).collect()
    };
    let mut levels =
        recording.concepts.iter().zip(&values).map(concept).collect::<Result<Vec<Vec<_>>, _>>()?;
    let filled = || levels.iter().flatten().flatten();
    let square: f64 = filled().map(|bin| f64::from(bin.sd).powi(2)).sum();
    let floor = (square / filled().count().max(1) as f64).sqrt() as f32;
    for bin in levels.iter_mut().flatten().flatten() {
        bin.sd = bin.sd.max(floor);
    }
    Ok(levels)
}

/// Mean and sample standard deviation (n - 1), summed in f64.
fn moments(values: &[f32]) -> (f32, f32) {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
    (mean as f32, (square / (n - 1.0)).sqrt() as f32)
}

/// Greatest `z` over concepts and steps of each benign image of `recording`, by a calibration of the
/// same concepts: an image is touched if it lies above the calibration's gate.
///
/// # Errors
/// [`MakeError::ThinBin`] where the calibration saw no step that late or early.
pub fn peaks(calibration: &Calibration, recording: &Recording) -> Result<Vec<f32>, MakeError> {
    let levels: Vec<_> = calibration.concepts.iter().map(|c| c.bins.clone()).collect();
    recording.images.iter().map(|image| peak(recording, &levels, image)).collect()
}

/// Greatest `z` of one image over concepts and steps.
fn peak(
    recording: &Recording,
    levels: &[Vec<Option<Bin>>],
    image: &RecordedImage,
) -> Result<f32, MakeError> {
    let mut peak = f32::NEG_INFINITY;
    for (bin, scores) in observations(recording, image) {
        for (bins, &score) in levels.iter().zip(scores) {
            let Bin { mean, sd, .. } = bins[bin].ok_or(MakeError::ThinBin { bin, count: 0 })?;
            peak = peak.max((score - mean) / sd);
        }
    }
    Ok(peak)
}

/// Area under the ROC curve of `scores` for `labels`: the probability that a positive scores above
/// a negative, ties counting half. None unless there are both.
pub fn auroc(scores: &[f32], labels: &[bool]) -> Option<f64> {
    let mut order = (0..scores.len().min(labels.len())).collect::<Vec<_>>();
    order.sort_unstable_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let positives = order.iter().filter(|&&i| labels[i]).count();
    let negatives = order.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    // Mann-Whitney: ranks of ties are averaged.
    let mut rank_sum = 0.0;
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let rank = start as f64 + (tied.len() + 1) as f64 / 2.0;
        rank_sum += rank * tied.iter().filter(|&&i| labels[i]).count() as f64;
        start += tied.len();
    }
    let p = positives as f64;
    Some((rank_sum - p * (p + 1.0) / 2.0) / (p * negatives as f64))
}

/// AUROC of every concept in every bin, `[concepts][BINS]`: images of prompts that ask for the
/// concept against benign ones. None where a bin lacks either.
fn auroc_by_bin(recording: &Recording) -> Vec<Vec<Option<f32>>> {
    let mut scores = vec![[const { (Vec::new(), Vec::new()) }; BINS]; recording.concepts.len()];
    for image in &recording.images {
        for (bin, values) in observations(recording, image) {
            for (k, &score) in values.iter().enumerate() {
                scores[k][bin].0.push(score);
                scores[k][bin].1.push(false);
            }
        }
    }
    for LabelledImage { image, concepts } in &recording.labelled {
        for (bin, values) in observations(recording, image) {
            for &k in concepts {
                scores[k][bin].0.push(values[k]);
                scores[k][bin].1.push(true);
            }
        }
    }
    let area = |(scores, labels): &(Vec<f32>, Vec<bool>)| auroc(scores, labels).map(|a| a as f32);
    scores.iter().map(|bins| bins.iter().map(area).collect()).collect()
}

#[cfg(test)]
mod tests;
