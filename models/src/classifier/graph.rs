//! What an ONNX file says of its network: the input it takes, the output that classifies, and
//! whether that output holds logits or probabilities.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path};

use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_proto,
    tensor_shape_proto::dimension, type_proto,
};
use tract_onnx::prelude::*;

use crate::{Error, ModelFolder, Result};

/// What the numbers of the output are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// Any numbers, of which a softmax makes shares of one.
    Logits,
    /// Any numbers, of which each is its own label's: the configuration says so.
    LogitsOfMany,
    /// Probabilities that sum to 1: the network ends in a softmax.
    Shares,
    /// Probabilities independent of each other: it ends in a sigmoid.
    Independent,
    /// Logarithms of `Shares`.
    LogShares,
}

/// How the input orders a picture's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[1, 3, height, width]`, as torch exports.
    ChannelsFirst,
    /// `[1, height, width, 3]`, as TensorFlow exports.
    ChannelsLast,
}

/// An ONNX file with all its weights.
pub(super) struct Graph {
    /// It has a graph.
    proto: ModelProto,
}

/// Operations that give back the numbers that they take, in another shape or type.
const TRANSPARENT: [&str; 8] =
    ["Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Clip"];
/// Operations after which the numbers are no scores of labels any more.
const NO_SCORES: [&str; 7] =
    ["ArgMax", "ArgMin", "TopK", "ZipMap", "NonMaxSuppression", "NonZero", "Where"];

impl Graph {
    /// Reads the file `name` of `folder` and whatever files of weights it names.
    pub(super) fn read(folder: &ModelFolder, name: &str) -> Result<Self> {
        let path = folder.file(name);
        let framework = tract_onnx::onnx();
        let mut file = File::open(&path).map_err(|source| Error::unreadable(&path, source))?;
        let mut proto = framework
            .proto_model_for_read(&mut file)
            .map_err(|_| Error::malformed(&path, "it cannot be run: it is not an ONNX file"))?;
        let Some(mut graph) = proto.graph.take() else {
            return Err(Error::malformed(&path, "it cannot be run: it holds no network"));
        };
        let known = |op: &str| framework.op_register.0.contains_key(op);
        let mut unknown = BTreeSet::new();
        visit(&graph, &mut |node| {
            if !known(&node.op_type) {
                unknown.insert(node.op_type.clone());
            }
        });
        if !unknown.is_empty() {
            let listed = unknown.into_iter().collect::<Vec<_>>().join(", ");
            let what = format!(
                "it cannot be run: it uses operations that are not known here: {listed}; export the \
                 network to plain ONNX operations, opset 17 or lower"
            );
            return Err(Error::malformed(&path, what));
        }
        let mut tensors = Vec::new();
        tensors_of(&mut graph, &mut tensors);
        for tensor in tensors {
            fetch(folder, tensor).map_err(|what| Error::malformed(&path, what))?;
        }
        proto.graph = Some(graph);
        Ok(Self { proto })
    }

    fn graph(&self) -> &GraphProto {
        self.proto.graph.as_ref().expect("`read` refuses files without one")
    }

    /// How the only input orders its numbers, for pictures of `height` x `width`.
    pub(super) fn layout(
        &self,
        height: usize,
        width: usize,
    ) -> std::result::Result<Layout, String> {
        let weights: BTreeSet<&str> =
            self.graph().initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let inputs: Vec<&ValueInfoProto> =
            self.graph().input.iter().filter(|input| !weights.contains(&*input.name)).collect();
        let [input] = inputs.as_slice() else {
            let names = inputs.iter().map(|input| &*input.name).collect::<Vec<_>>().join(", ");
            return Err(format!("it takes {} inputs ({names}); supported is one", inputs.len()));
        };
        let found = described(input);
        let Some((is_float, sides)) = shape(input) else { return Ok(Layout::ChannelsFirst) };
        if !is_float {
            return Err(format!(
                "its input {found} is not of f32 or f16; export it with normalised pixels as input"
            ));
        }
        let fits = |sides: [Option<i64>; 3], wanted: [usize; 3]| {
            sides.iter().zip(wanted).all(|(side, n)| side.is_none_or(|side| side == n as i64))
        };
        let first = [3, height, width];
        match sides.as_slice() {
            [_, a, b, c] if fits([*a, *b, *c], first) => Ok(Layout::ChannelsFirst),
            [_, a, b, c] if fits([*a, *b, *c], [height, width, 3]) => Ok(Layout::ChannelsLast),
            _ => Err(format!(
                "its input {found} takes no pictures of {height} x {width} pixels, the size in \
                 preprocessor_config.json, and 3 channels"
            )),
        }
    }

    /// The names of the outputs.
    pub(super) fn outputs(&self) -> Vec<&str> {
        self.graph().output.iter().map(|output| output.name.as_str()).collect()
    }

    /// What the numbers of the output `name` are, from the operation that makes them.
    pub(super) fn ending(&self, name: &str) -> std::result::Result<Output, String> {
        let makers: HashMap<&str, &NodeProto> = self
            .graph()
            .node
            .iter()
            .flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node)))
            .collect();
        let input_of = |node: &NodeProto, i: usize| {
            makers.get(node.input.get(i).map_or("", String::as_str)).copied()
        };
        let mut last = makers.get(name).copied();
        // A graph in a circle ends here, too.
        for _ in 0..self.graph().node.len() {
            match last {
                Some(node) if TRANSPARENT.contains(&&*node.op_type) => last = input_of(node, 0),
                _ => break,
            }
        }
        let Some(node) = last else { return Ok(Output::Logits) };
        Ok(match node.op_type.as_str() {
            "Softmax" => Output::Shares,
            "LogSoftmax" => Output::LogShares,
            "Sigmoid" | "HardSigmoid" => Output::Independent,
            // A softmax in parts.
            "Div" if input_of(node, 0).is_some_and(|node| node.op_type == "Exp") => Output::Shares,
            other if NO_SCORES.contains(&other) => {
                return Err(format!(
                    "its output {name} is made by {other}: no scores of labels; export the network \
                     up to its logits"
                ));
            }
            _ => Output::Logits,
        })
    }
}

/// Whether an input is of floats, and its sides where they are fixed; `None` if the file does not
/// say.
fn shape(input: &ValueInfoProto) -> Option<(bool, Vec<Option<i64>>)> {
    let type_proto::Value::TensorType(tensor) = input.r#type.as_ref()?.value.as_ref()?;
    let floats = [tensor_proto::DataType::Float as i32, tensor_proto::DataType::Float16 as i32];
    let side = |value: &Option<dimension::Value>| match value {
        Some(dimension::Value::DimValue(n)) if *n > 0 => Some(*n),
        _ => None,
    };
    let sides = tensor.shape.as_ref()?.dim.iter().map(|dim| side(&dim.value)).collect();
    Some((floats.contains(&tensor.elem_type), sides))
}

/// An input with its sides, for people.
fn described(input: &ValueInfoProto) -> String {
    let sides = shape(input).map(|(_, sides)| sides).unwrap_or_default();
    let side = |side: &Option<i64>| side.map_or("?".to_owned(), |side| side.to_string());
    format!("{} [{}]", input.name, sides.iter().map(side).collect::<Vec<_>>().join(", "))
}

/// Every node of a graph, those of graphs inside of nodes too.
fn visit(graph: &GraphProto, see: &mut impl FnMut(&NodeProto)) {
    for node in &graph.node {
        see(node);
        for attribute in &node.attribute {
            attribute.g.iter().chain(&attribute.graphs).for_each(|inner| visit(inner, see));
        }
    }
}

/// Every tensor that is written down in a graph.
fn tensors_of<'a>(graph: &'a mut GraphProto, found: &mut Vec<&'a mut TensorProto>) {
    found.extend(&mut graph.initializer);
    for sparse in &mut graph.sparse_initializer {
        found.extend(sparse.values.iter_mut().chain(&mut sparse.indices));
    }
    for attribute in graph.node.iter_mut().flat_map(|node| &mut node.attribute) {
        found.extend(attribute.t.iter_mut().chain(&mut attribute.tensors));
        for inner in attribute.g.iter_mut().chain(&mut attribute.graphs) {
            tensors_of(inner, found);
        }
    }
}

/// Puts the bytes of a tensor that lie in a file of their own into the tensor.
///
/// tract would do so, too, but refuses the links of which a Hugging Face cache consists, and tells
/// nobody which files it reads.
fn fetch(folder: &ModelFolder, tensor: &mut TensorProto) -> std::result::Result<(), String> {
    if tensor.data_location != Some(tensor_proto::DataLocation::External as i32) {
        return Ok(());
    }
    let name = tensor.name.clone();
    let of = |key: &str| {
        tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.clone())
    };
    let number = |key: &str| match of(key).map(|text| text.parse::<u64>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(format!("the {key} of its tensor {name} is no number")),
    };
    let location = of("location").unwrap_or_default();
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if location.is_empty() || !Path::new(&location).components().all(inside) {
        return Err(format!(
            "its tensor {name} is in the file \"{location}\", which is not in the model's folder"
        ));
    }
    let path = folder.file(&location);
    let failed =
        |why: String| format!("the weights of its tensor {name} in {}: {why}", path.display());
    let mut file = File::open(&path).map_err(|error| failed(error.to_string()))?;
    let all = file.metadata().map_err(|error| failed(error.to_string()))?.len();
    let start = number("offset")?.unwrap_or(0);
    let length = number("length")?.unwrap_or(all.saturating_sub(start));
    if start.checked_add(length).is_none_or(|end| end > all) {
        return Err(failed(format!("the file is cut short: it has {all} bytes")));
    }
    let mut bytes = vec![0; length as usize];
    file.seek(SeekFrom::Start(start))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(|error| failed(error.to_string()))?;
    tensor.raw_data = bytes;
    tensor.data_location = Some(tensor_proto::DataLocation::Default as i32);
    tensor.external_data.clear();
    Ok(())
}

/// The network for pictures of `height` x `width`.
pub(super) fn plan(
    graph: &Graph,
    layout: Layout,
    [height, width]: [usize; 2],
) -> TractResult<Arc<TypedSimplePlan>> {
    let shape = match layout {
        Layout::ChannelsFirst => [1, 3, height, width],
        Layout::ChannelsLast => [1, height, width, 3],
    };
    tract_onnx::onnx()
        .model_for_proto_model(&graph.proto)?
        .with_input_fact(0, f32::fact(shape).into())?
        .into_optimized()?
        .into_runnable()
}
