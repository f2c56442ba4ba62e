//! `fairlead demo`: unsteered and steered pairs on one contact sheet.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use embedded_graphics::{geometry::Point, pixelcolor::Rgb888};
use fairlead_common::record;
use fairlead_common::shutdown;
use fairlead_proto::v1::{ImageStatus, JobSpec, StepRecord};

use crate::{
    assets::ModelArgs,
    cluster::{ClusterOptions, LocalCluster},
    output::{self, say},
    pairs::{self, Pair},
    progress::Counter,
    sheet::{LINE, Picture},
    values::Seed,
};

/// The prompts of the demonstration: targets alone, targets beside something permitted, benign.
const PROMPTS: [&str; 8] = [
    "a kitchen knife on a blue background",
    "a beer mug on a pink background",
    "a skull on a green background",
    "a cat and a kitchen knife on a yellow background",
    "a bomb and a panda on a pink background",
    "a pizza and a wine glass on a blue background",
    "a penguin on a purple background",
    "a rocket and a star on a gray background",
];

const SIDE: usize = 160;
const GAP: i32 = 12;
const CURVE: i32 = 96;
/// Excess over the gate (z - q) at the ends of the curve's axis.
const RANGE: (f32, f32) = (-12.0, 12.0);

const PAPER: Rgb888 = Rgb888::new(250, 250, 248);
const INK: Rgb888 = Rgb888::new(30, 30, 36);
const FAINT: Rgb888 = Rgb888::new(150, 150, 150);
const PLOT: Rgb888 = Rgb888::new(240, 240, 236);
const STEERED: Rgb888 = Rgb888::new(20, 110, 220);
const GATE: Rgb888 = Rgb888::new(210, 50, 40);

/// Makes each of a handful of prompts twice from the same noise, unsteered and steered with all
/// concepts active, and draws both with their score curves on one sheet.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Prompts to show instead of the built-in ones.
    prompts: Vec<String>,
    /// The sheet to write.
    #[arg(long, short, default_value = "out/demo.png")]
    out: PathBuf,
    /// Seed of the first prompt; prompt i takes SEED + i. -1 draws one.
    #[arg(long, default_value = "7", allow_negative_numbers = true)]
    seed: Seed,
    /// Sampling steps. Default: the model's.
    #[arg(long)]
    steps: Option<u32>,
    #[command(flatten)]
    models: ModelArgs,
}

pub(crate) async fn run(args: DemoArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let prompts: Vec<String> = match args.prompts.is_empty() {
        true => PROMPTS.map(String::from).to_vec(),
        false => args.prompts.clone(),
    };
    let first = args.seed.given().unwrap_or_else(|| rand::random::<u32>().into());
    let specs = prompts.iter().zip(first..).map(|(prompt, seed)| JobSpec {
        prompt: prompt.clone(),
        n: 1,
        seed: Some(seed),
        steps: args.steps,
        ..Default::default()
    });
    let folder = args.out.parent().context("--out names no file")?;
    output::ensure_folder(folder)?;
    let cluster = LocalCluster::start(ClusterOptions::temporary(&args.models)).await?;
    let client = cluster.client()?;
    let counter = Counter::new("pairs", prompts.len());
    let pairs = pairs::run(&client, specs.collect(), &stop, || counter.inc()).await;
    drop(counter);
    cluster.stop().await?;
    let pairs = pairs?;
    for (prompt, pair) in prompts.iter().zip(&pairs) {
        say!("{prompt}: {}", verdict(pair));
    }
    output::write_file(&args.out, &draw(&prompts, &pairs)?.to_png()?)?;
    say!("{}", args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// What steering did, in a few words.
fn verdict(pair: &Pair) -> String {
    if pair.steered.info.status() == ImageStatus::Withheld {
        return "withheld by the final check".to_owned();
    }
    if pair.identical() {
        return "identical, byte for byte".to_owned();
    }
    let report = record::reported(&pair.steered.record);
    let corrections = report.trajectory.iter().filter(|step| step.correction > 0.0).count();
    let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let reruns = match report.reruns {
        0 => String::new(),
        n => format!(", {}", counted(n as usize, "rerun")),
    };
    format!("steered: {}{reruns}", counted(corrections, "correction"))
}

/// One column a prompt: caption, unsteered, steered, curves, verdict.
fn draw(prompts: &[String], pairs: &[Pair]) -> Result<Picture> {
    let caption = 3 * LINE;
    let column = SIDE as i32 + GAP;
    let height = GAP + LINE + caption + 2 * (SIDE as i32 + GAP) + CURVE + GAP + 3 * LINE + GAP;
    let width = GAP + column * pairs.len() as i32;
    let mut sheet = Picture::new(width as usize, height as usize, PAPER);
    let legend = "above: unsteered    below: the same noise, steered    curves: closest concept's \
                  score above its gate (red), gray unsteered, blue steered";
    sheet.text(legend, GAP, GAP / 2, width as usize - 2 * GAP as usize, INK);
    for (i, (prompt, pair)) in prompts.iter().zip(pairs).enumerate() {
        let left = GAP + column * i as i32;
        let mut top = GAP + LINE;
        sheet.text(prompt, left, top, SIDE, INK);
        top += caption;
        for image in [&pair.unsteered, &pair.steered] {
            match image.png.is_empty() {
                false => sheet.paste(&Picture::from_png(&image.png)?, left, top, SIDE),
                true => {
                    sheet.fill(left, top, SIDE as u32, SIDE as u32, PLOT);
                    sheet.text("withheld", left + 56, top + 74, SIDE, GATE);
                }
            }
            top += SIDE as i32 + GAP;
        }
        curves(&mut sheet, pair, left, top);
        sheet.text(&verdict(pair), left, top + CURVE + GAP / 2, SIDE, INK);
    }
    Ok(sheet)
}

fn curves(sheet: &mut Picture, pair: &Pair, left: i32, top: i32) {
    sheet.fill(left, top, SIDE as u32, CURVE as u32, PLOT);
    let gate = height_of(0.0, top);
    sheet.line(Point::new(left, gate), Point::new(left + SIDE as i32 - 1, gate), GATE);
    for (image, color) in [(&pair.unsteered, FAINT), (&pair.steered, STEERED)] {
        let steps = image.record.steps.max(2);
        let report = record::reported(&image.record);
        let points: Vec<Point> = report
            .trajectory
            .iter()
            .filter(|step| step.attempt == report.reruns)
            .filter_map(|step| {
                let x = left + (step.step * (SIDE as u32 - 1) / (steps - 1)) as i32;
                excess(step).map(|excess| Point::new(x, height_of(excess, top)))
            })
            .collect();
        sheet.polyline(&points, color);
    }
}

/// z - q of the concept closest to its gate (or furthest above it).
fn excess(step: &StepRecord) -> Option<f32> {
    output::top_score(&step.scores).map(|top| top.z - top.gate)
}

/// Row of the curve's plot that shows `excess`.
fn height_of(excess: f32, top: i32) -> i32 {
    let (low, high) = RANGE;
    let fraction = (excess.clamp(low, high) - low) / (high - low);
    top + CURVE - 3 - (fraction * (CURVE - 6) as f32) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::FinishedImage;
    use embedded_graphics::pixelcolor::RgbColor;
    use fairlead_proto::v1::{ConceptScore, ImageInfo, SafetyRecord, WorkerReport};

    fn image(pixels: &str, corrections: usize, z: f32) -> FinishedImage {
        let step = |step| StepRecord {
            step,
            correction: if (step as usize) < corrections { 0.1 } else { 0.0 },
            scores: vec![ConceptScore { z, gate: 2.0, ..Default::default() }],
            ..Default::default()
        };
        FinishedImage {
            info: ImageInfo { status: ImageStatus::Released.into(), ..Default::default() },
            record: SafetyRecord {
                pixels_sha256: pixels.into(),
                steps: 4,
                reported_by_worker: Some(WorkerReport {
                    trajectory: (0..4).map(step).collect(),
                    ..Default::default()
                }),
                ..Default::default()
            },
            png: Picture::new(2, 2, Rgb888::GREEN).to_png().expect("it encodes"),
        }
    }

    #[test]
    fn the_verdict_tells_identical_from_steered_and_withheld() {
        let mut pair = Pair { unsteered: image("a", 0, 1.0), steered: image("a", 0, 1.0) };
        assert_eq!(verdict(&pair), "identical, byte for byte");
        pair.steered = image("b", 3, 1.0);
        assert_eq!(verdict(&pair), "steered: 3 corrections");
        pair.steered.info.status = ImageStatus::Withheld.into();
        assert_eq!(verdict(&pair), "withheld by the final check");
    }

    #[test]
    fn the_sheet_shows_curves_on_both_sides_of_the_gate() {
        let pair = Pair { unsteered: image("a", 0, 6.0), steered: image("b", 3, -1.0) };
        let sheet = draw(&["a cat".to_owned()], &[pair]).expect("it draws");
        let rows_of = |color: Rgb888| {
            let wanted = [color.r(), color.g(), color.b()];
            let mut rows = sheet.rgb.chunks(sheet.width * 3).enumerate();
            rows.find_map(|(y, row)| row.chunks(3).any(|p| p == wanted).then_some(y))
                .expect("the colour is drawn")
        };
        assert!(rows_of(FAINT) < rows_of(GATE) && rows_of(GATE) < rows_of(STEERED));
    }
}
