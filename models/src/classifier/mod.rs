//! Image classifiers of others, as ONNX exports: they judge pictures and never steer, so that a
//! library without gradients runs them.

mod graph;

use serde_json::Value;
use tract_onnx::prelude::*;

use crate::config::ConfigFile;
use crate::layers::Filter;
use crate::picture::Picture;
use crate::processor::Processor;
use crate::{Error, ModelFolder, Result};
use graph::{Graph, Layout, Output, plan};

/// The file of an export.
const FILE: &str = "model.onnx";
/// Folder of it where there are others beside.
const PART: &str = "onnx";
/// Names that exports give to the output that classifies.
const NAMES: [&str; 4] = ["logits", "probabilities", "probs", "scores"];
/// How far probabilities may be from 0..1, and their sum from 1: f16 and some hundred labels.
const SLACK: f32 = 1e-2;

/// An ONNX export of a transformers `ForImageClassification` model: `model.onnx` (or
/// `onnx/model.onnx`) beside `config.json` and `preprocessor_config.json` (or
/// `processor_config.json`).
///
/// It has one input, `[b, 3, h, w]` or `[b, h, w, 3]`, and an output with a number for each label:
/// logits, or probabilities where the network ends in a softmax or sigmoid.
#[derive(Debug)]
pub struct OnnxClassifier {
    plan: Arc<TypedSimplePlan>,
    layout: Layout,
    /// Which of the outputs classifies.
    output: usize,
    meaning: Output,
    labels: Vec<String>,
    hash: String,
    sides: [usize; 2],
    processor: Processor,
    mean: [f32; 3],
    std: [f32; 3],
}

impl OnnxClassifier {
    /// Reads the folder.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the network cannot be
    /// run.
    pub fn load(dir: impl Into<ModelFolder>) -> Result<Self> {
        let folder = dir.into();
        let parts = [folder.clone(), folder.at(PART)];
        let Some(part) = parts.iter().find(|part| part.has(FILE)) else {
            let hint = "give the folder of a transformers image classifier with its ONNX export";
            return Err(Error::MissingFile { path: folder.path().join(FILE), hint: hint.into() });
        };
        let (labels, is_multi_label) = labels(&folder.config("config.json")?)?;
        let processor = Processor::read(&folder, Filter::BilinearAntialias, &[])?;
        let sides = sides(&processor)?;
        let path = part.path().join(FILE);
        let graph = Graph::read(part, FILE)?;
        let refused = |what: String| Error::malformed(&path, format!("it cannot be run: {what}"));
        let layout = graph.layout(sides[0], sides[1]).map_err(refused)?;
        let plan = plan(&graph, layout, sides).map_err(|error| {
            let [height, width] = sides;
            let why = error.root_cause();
            refused(format!("a picture of {height} x {width} pixels does not fit it ({why})"))
        })?;
        let output = output(&graph, &plan, labels.len()).map_err(refused)?;
        let meaning = match graph.ending(graph.outputs()[output]).map_err(refused)? {
            Output::Logits if is_multi_label => Output::LogitsOfMany,
            ending => ending,
        };
        let (mean, std) = (processor.mean, processor.std);
        let needed = |field| processor.fields.unsupported(field, "three numbers");
        Ok(Self {
            plan,
            layout,
            output,
            meaning,
            labels,
            hash: folder.hash()?,
            sides,
            mean: mean.ok_or_else(|| needed("image_mean"))?,
            std: std.ok_or_else(|| needed("image_std"))?,
            processor,
        })
    }

    /// [`ModelFolder::hash`]: of the network, its weights, wherever they lie, and the two files of
    /// settings.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The labels, in the order of the probabilities.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The probability of each label for a picture of `width` x `height` pixels, RGB8 row by row.
    ///
    /// # Errors
    /// When the picture has another shape than the network takes, the network fails, its numbers
    /// are not finite, or what should be probabilities are none.
    pub fn probabilities(&self, rgb: &[u8], width: usize, height: usize) -> Result<Vec<f32>> {
        let failed = |problem: String| Error::invalid("OnnxClassifier", problem);
        let picture = self.processor.apply(Picture { height, width, rgb: rgb.to_vec() });
        let [h, w] = self.sides;
        if [picture.height, picture.width] != [h, w] {
            return Err(failed(format!(
                "a picture of {width} x {height} pixels does not become one of {w} x {h}: its \
                 preprocessor_config.json keeps the shape of pictures"
            )));
        }
        let numbers = self.run(&picture).map_err(|error| failed(error.root_cause().to_string()))?;
        if numbers.len() != self.labels.len() || numbers.iter().any(|n| !n.is_finite()) {
            let (found, labels) = (numbers.len(), self.labels.len());
            let problem = format!("{found} numbers for {labels} labels, or some are not finite");
            return Err(failed(problem));
        }
        self.meaning.probabilities(numbers).map_err(failed)
    }

    fn run(&self, picture: &Picture) -> TractResult<Vec<f32>> {
        let [height, width] = self.sides;
        let value = |channel: usize, byte: u8| {
            (f32::from(byte) / 255.0 - self.mean[channel]) / self.std[channel]
        };
        let shape = match self.layout {
            Layout::ChannelsFirst => (1, 3, height, width),
            Layout::ChannelsLast => (1, height, width, 3),
        };
        let pixels = tract_ndarray::Array4::from_shape_fn(shape, |(_, a, b, c)| {
            let (channel, row, column) = match self.layout {
                Layout::ChannelsFirst => (a, b, c),
                Layout::ChannelsLast => (c, a, b),
            };
            value(channel, picture.rgb[(row * width + column) * 3 + channel])
        });
        let outputs = self.plan.run(tvec!(pixels.into_tensor().into()))?;
        let numbers = outputs[self.output].cast_to::<f32>()?;
        Ok(numbers.to_plain_array_view::<f32>()?.iter().copied().collect())
    }
}

impl Output {
    /// Probabilities from what the network put out, or why they are none.
    fn probabilities(self, numbers: Vec<f32>) -> std::result::Result<Vec<f32>, String> {
        let found = match self {
            Self::LogitsOfMany => {
                return Ok(numbers.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect());
            }
            Self::Logits => {
                let greatest = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = numbers.iter().map(|n| (n - greatest).exp()).collect();
                let sum: f32 = weights.iter().sum();
                return Ok(weights.iter().map(|weight| weight / sum).collect());
            }
            Self::LogShares => numbers.iter().map(|n| n.exp()).collect(),
            Self::Shares | Self::Independent => numbers,
        };
        let sum: f32 = found.iter().sum();
        let is_sum_wrong = self != Self::Independent && (sum - 1.0).abs() > SLACK;
        if is_sum_wrong || found.iter().any(|p| !(-SLACK..=1.0 + SLACK).contains(p)) {
            return Err(format!(
                "its last operation makes probabilities, but these are none: {found:?}; is its softmax \
                 over another axis than the labels?"
            ));
        }
        Ok(found.into_iter().map(|p| p.clamp(0.0, 1.0)).collect())
    }
}

/// The labels in their order, and whether several may be true of one picture.
fn labels(config: &ConfigFile) -> Result<(Vec<String>, bool)> {
    const WANTED: &str = "labels, numbered from 0 on";
    let kinds = ["single_label_classification", "multi_label_classification"];
    let is_multi_label = config.choice("problem_type", &kinds)? == kinds[1];
    let Some(Value::Object(map)) = config.get("id2label") else {
        return Err(config.unsupported("id2label", WANTED));
    };
    let mut labels = vec![None; map.len()];
    for (number, label) in map {
        let place = number.parse::<usize>().ok().and_then(|number| labels.get_mut(number));
        match (place, label.as_str()) {
            (Some(place), Some(label)) if place.is_none() => *place = Some(label.to_owned()),
            _ => return Err(config.unsupported("id2label", WANTED)),
        }
    }
    let labels: Vec<String> = labels.into_iter().flatten().collect();
    if labels.is_empty() {
        return Err(config.unsupported("id2label", WANTED));
    }
    Ok((labels, is_multi_label))
}

/// Height and width of what the network gets.
fn sides(processor: &Processor) -> Result<[usize; 2]> {
    processor.sides().ok_or_else(|| {
        let wanted = "height and width or shortest_edge, with do_resize true";
        processor.fields.unsupported("size", wanted)
    })
}

/// Which output classifies: the only one, or the only one with a number for each label, or one of a
/// known name.
fn output(
    graph: &Graph,
    plan: &TypedSimplePlan,
    labels: usize,
) -> std::result::Result<usize, String> {
    let names = graph.outputs();
    let size = |i| {
        let fact = plan.model().output_fact(i).ok()?;
        Some(fact.shape.as_concrete()?.iter().product::<usize>())
    };
    let sizes: Vec<Option<usize>> = (0..names.len()).map(size).collect();
    let described = || {
        let size = |size: &Option<usize>| size.map_or("?".to_owned(), |size| size.to_string());
        let outputs = names.iter().zip(&sizes);
        let outputs = outputs.map(|(name, found)| format!("{name} has {} numbers", size(found)));
        outputs.collect::<Vec<_>>().join(", ")
    };
    let fitting: Vec<usize> = (0..names.len())
        .filter(|&i| sizes.get(i).is_some_and(|size| size.is_none_or(|size| size == labels)))
        .collect();
    match fitting.as_slice() {
        [only] => Ok(*only),
        [] => Err(format!(
            "config.json has {labels} labels in id2label; of its outputs, {}",
            described()
        )),
        several => {
            let named = several.iter().find(|&&i| NAMES.contains(&names[i])).copied();
            named.ok_or_else(|| {
                format!(
                    "several outputs might classify: {}; call one of them {}",
                    described(),
                    NAMES.join(" or ")
                )
            })
        }
    }
}
