//! The picture beside a calibration: how well each concept is told apart over time, and how far benign
//! images stay below the gate.

use anyhow::Result;
use embedded_graphics::{
    geometry::Point,
    pixelcolor::{Rgb888, RgbColor},
};
use fairlead_energy::calibration::{
    BINS, Calibration,
    maker::{self, Recording},
};

use crate::sheet::{LINE, Picture};

const GREY: Rgb888 = Rgb888::new(190, 190, 190);
const DARK: Rgb888 = Rgb888::new(40, 40, 40);
const ACCENT: Rgb888 = Rgb888::new(200, 60, 30);

/// Plot area of one panel, pixels.
const WIDTH: i32 = 400;
const HEIGHT: i32 = 240;
/// Room around it.
const MARGIN: i32 = 44;

/// Draws both panels.
pub(super) fn draw(calibration: &Calibration, recording: &Recording) -> Result<Picture> {
    let (width, height) = (2 * (WIDTH + 2 * MARGIN), HEIGHT + 2 * MARGIN + 2 * LINE);
    let mut picture = Picture::new(width as usize, height as usize, Rgb888::WHITE);
    let title = format!(
        "{}, {}, {} steps: gate {:.2} at alpha {} from {} benign images",
        calibration.setup.generator_name,
        calibration.setup.sampler,
        calibration.setup.steps,
        calibration.gate,
        calibration.alpha,
        calibration.images
    );
    picture.text(&title, MARGIN, 8, width as usize, Rgb888::BLACK);
    let left = Panel { left: MARGIN, top: MARGIN };
    aurocs(&mut picture, left, calibration);
    let right = Panel { left: 3 * MARGIN + WIDTH, top: MARGIN };
    peaks(&mut picture, right, calibration.gate, &maker::peaks(calibration, recording)?);
    Ok(picture)
}

/// A plot area.
#[derive(Clone, Copy)]
struct Panel {
    left: i32,
    top: i32,
}

impl Panel {
    /// The pixel of `x` and `y`, both from 0 to 1, y upwards.
    fn at(self, x: f32, y: f32) -> Point {
        let pixel = |value: f32, size: i32| (value.clamp(0.0, 1.0) * size as f32).round() as i32;
        Point::new(self.left + pixel(x, WIDTH), self.top + HEIGHT - pixel(y, HEIGHT))
    }

    fn frame(self, picture: &mut Picture, caption: &str, y: [&str; 2], x: [&str; 2]) {
        let corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)];
        for pair in corners.windows(2) {
            picture.line(self.at(pair[0].0, pair[0].1), self.at(pair[1].0, pair[1].1), DARK);
        }
        let mut text = |text: &str, left: i32, top: i32| {
            picture.text(text, left, top, WIDTH as usize + MARGIN as usize, DARK);
        };
        text(y[0], self.left - 36, self.top + HEIGHT - LINE);
        text(y[1], self.left - 36, self.top);
        text(x[0], self.left, self.top + HEIGHT + 4);
        text(x[1], self.left + WIDTH - 6 * x[1].len() as i32, self.top + HEIGHT + 4);
        text(caption, self.left, self.top + HEIGHT + 4 + LINE);
    }
}

/// AUROC of each concept and, darker, their mean over the bins of time, from noise on the left to the
/// finished image on the right.
fn aurocs(picture: &mut Picture, panel: Panel, calibration: &Calibration) {
    panel.frame(
        picture,
        "AUROC of each concept (grey) and their mean, from noise to image",
        ["0.5", "1.0"],
        ["t = T", "image"],
    );
    // The last bin is the finished image's; before it time runs down.
    let order: Vec<usize> = (0..BINS - 1).rev().chain([BINS - 1]).collect();
    let place = |bin: usize, area: f32| {
        let x = order.iter().position(|&b| b == bin).unwrap_or(0) as f32 / (BINS - 1) as f32;
        panel.at(x, 2.0 * area - 1.0)
    };
    let mut draw = |areas: &[Option<f32>], color: Rgb888| {
        let points: Vec<Point> =
            order.iter().filter_map(|&bin| Some(place(bin, areas[bin]?))).collect();
        picture.polyline(&points, color);
    };
    for concept in &calibration.concepts {
        draw(&concept.auroc, GREY);
    }
    let mean = |bin: usize| {
        let known: Vec<f32> = calibration.concepts.iter().filter_map(|c| c.auroc[bin]).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f32>() / known.len() as f32)
    };
    draw(&(0..BINS).map(mean).collect::<Vec<_>>(), DARK);
}

/// The share of benign images whose greatest z lies above x, and the gate.
fn peaks(picture: &mut Picture, panel: Panel, gate: f32, peaks: &[f32]) {
    let mut sorted = peaks.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let most = sorted.last().copied().unwrap_or(gate).max(gate) * 1.05;
    panel.frame(
        picture,
        "share of benign images whose greatest z lies above x; red: the gate",
        ["0", "1"],
        ["0", &format!("z = {most:.1}")],
    );
    let share = |i: usize| 1.0 - i as f32 / sorted.len() as f32;
    let curve: Vec<Point> =
        sorted.iter().enumerate().map(|(i, &z)| panel.at(z / most, share(i))).collect();
    picture.polyline(&curve, DARK);
    picture.line(panel.at(gate / most, 0.0), panel.at(gate / most, 1.0), ACCENT);
}
