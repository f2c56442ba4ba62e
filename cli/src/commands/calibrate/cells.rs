//! The conditions that a calibration is made under: a cell for every combination of them.

use std::fmt;

use fairlead_energy::calibration::Envelope;
use fairlead_proto::v1::ModelInfo;

use super::CalibrateArgs;

/// Negative prompts that people use, for where none are given.
const COMMON: [&str; 3] = ["blurry", "low quality, deformed, ugly", "text, watermark"];

/// One set of conditions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    /// Width and height in pixels.
    pub(super) size: (u32, u32),
    /// Classifier-free guidance scale.
    pub(super) guidance: f32,
    /// With a negative prompt.
    pub(super) negative: bool,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size: (width, height), guidance, negative } = self;
        let negative = if *negative { ", negative prompts" } else { "" };
        write!(f, "{width}x{height}, guidance {guidance}{negative}")
    }
}

/// All cells of a calibration of `model`, at least one.
pub(super) fn of(args: &CalibrateArgs, model: &ModelInfo) -> Vec<Cell> {
    let or = |given: &[(u32, u32)], default| {
        if given.is_empty() { vec![default] } else { given.to_vec() }
    };
    let sizes = or(&args.size, (model.default_width, model.default_height));
    let guidance = match args.guidance.as_slice() {
        [] => vec![model.default_guidance_scale],
        given => given.to_vec(),
    };
    let negatives: &[bool] = if args.negative.is_empty() { &[false] } else { &[false, true] };
    let mut cells: Vec<Cell> = Vec::new();
    for size in sizes {
        for &guidance in &guidance {
            for &negative in negatives {
                let cell = Cell { size, guidance, negative };
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
        }
    }
    cells
}

/// The negative prompts that cells with some take turns with.
pub(super) fn negatives(given: &[String]) -> Vec<String> {
    let texts: Vec<String> = given.iter().filter(|text| !text.is_empty()).cloned().collect();
    if texts.is_empty() { COMMON.map(str::to_owned).to_vec() } else { texts }
}

/// The least envelope that holds all of `cells`.
pub(super) fn envelope(cells: &[Cell]) -> Envelope {
    let mut sizes: Vec<(u32, u32)> = cells.iter().map(|cell| cell.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let guidance = || cells.iter().map(|cell| cell.guidance);
    Envelope {
        sizes,
        guidance: (guidance().fold(f32::MAX, f32::min), guidance().fold(f32::MIN, f32::max)),
        negative_prompts: cells.iter().any(|cell| cell.negative),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: CalibrateArgs,
    }

    fn parse(flags: &[&str]) -> (Vec<Cell>, Vec<String>) {
        let command = Command::parse_from([&["calibrate"], flags].concat());
        let model = ModelInfo {
            default_width: 32,
            default_height: 32,
            default_guidance_scale: 5.0,
            ..Default::default()
        };
        (of(&command.args, &model), negatives(&command.args.negative))
    }

    #[test]
    fn without_flags_there_is_one_cell_of_the_models_defaults() {
        let (cells, _) = parse(&[]);
        assert_eq!(cells, [Cell { size: (32, 32), guidance: 5.0, negative: false }]);
        let expected =
            Envelope { sizes: vec![(32, 32)], guidance: (5.0, 5.0), negative_prompts: false };
        assert_eq!(envelope(&cells), expected);
    }

    #[test]
    fn every_combination_is_a_cell() {
        let flags = ["--size", "32x32,64x48", "--guidance", "7.5,3", "--negative", "--images", "9"];
        let (cells, texts) = parse(&flags);
        assert_eq!((cells.len(), texts.len()), (8, COMMON.len()));
        let expected = Envelope {
            sizes: vec![(32, 32), (64, 48)],
            guidance: (3.0, 7.5),
            negative_prompts: true,
        };
        assert_eq!(envelope(&cells), expected);
        assert_eq!(cells[3].to_string(), "32x32, guidance 3, negative prompts");
        let (cells, texts) =
            parse(&["--size", "32,32", "--negative", "ugly", "--negative", "dark"]);
        assert_eq!((cells.len(), texts), (2, vec!["ugly".to_owned(), "dark".to_owned()]));
    }
}
