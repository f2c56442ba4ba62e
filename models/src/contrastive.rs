//! Contrastive models behind one interface: whatever puts images and texts as unit vectors into one space.

use candle_core::{Device, Tensor};

use crate::clip::{ClipModel, open_clip};
use crate::layers::Filter;
use crate::siglip::SiglipModel;
use crate::tokenizer::{ClipTokenizer, EncodedPrompt, FileTokenizer};
use crate::{Error, ModelFolder, Result, Tape};

/// A contrastive model with its tokenizer. A new kind is one implementation and one row of
/// [`load_contrastive`]'s table.
pub trait ContrastiveModel: Send {
    /// Side of the square images it takes, in pixels.
    fn image_size(&self) -> usize;

    /// How pictures of other sizes are to get to that size.
    fn filter(&self) -> Filter;

    /// The window of token ids of `text`.
    ///
    /// # Errors
    /// [`Error::TextTooLong`] when it does not fit one window.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// Unit vectors `[b, d]` of `b` windows.
    ///
    /// # Errors
    /// When the windows do not fit the model.
    fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor>;

    /// Unit vectors `[b, d]` of images `[b, 3, image_size, image_size]`, RGB in 0..1.
    ///
    /// # Errors
    /// When the images have another shape.
    fn image_features(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor>;

    /// The gradient with respect to the pixels, from that with respect to the unit vectors.
    ///
    /// # Errors
    /// When the tape is empty or `dfeatures` has another shape.
    fn image_features_backward(&self, dfeatures: &Tensor, tape: &mut Tape) -> Result<Tensor>;
}

type Load = fn(&ModelFolder, &Device) -> Result<Box<dyn ContrastiveModel>>;

/// Values of `model_type` in `config.json`.
const TABLE: &[(&str, Load)] = &[("clip", Clip::load), ("siglip", Siglip::load)];

/// Loads the transformers or open_clip folder `dir` of a contrastive model, tokenizer included.
///
/// # Errors
/// When its `model_type` is not supported, or as the model's own `load`.
pub fn load_contrastive(
    dir: impl Into<ModelFolder>,
    device: &Device,
) -> Result<Box<dyn ContrastiveModel>> {
    let folder = dir.into();
    if open_clip::is_one(&folder) {
        return Clip::load(&folder, device);
    }
    let fields = folder.config("config.json")?;
    let given = fields.get("model_type").and_then(|kind| kind.as_str());
    match TABLE.iter().find(|(kind, _)| Some(*kind) == given) {
        Some((_, load)) => load(&folder, device),
        None => {
            let known: Vec<_> = TABLE.iter().map(|(kind, _)| *kind).collect();
            Err(fields.unsupported("model_type", known.join(", ")))
        }
    }
}

/// The only window of a text that must fit one.
fn only_window(mut encoded: EncodedPrompt, most: usize) -> Result<Vec<u32>> {
    match encoded.chunks.len() {
        1 => Ok(encoded.chunks.remove(0)),
        _ => Err(Error::TextTooLong { tokens: encoded.tokens, most }),
    }
}

struct Clip {
    model: ClipModel,
    tokenizer: ClipTokenizer,
}

impl Clip {
    fn load(folder: &ModelFolder, device: &Device) -> Result<Box<dyn ContrastiveModel>> {
        let model = ClipModel::load(folder, device)?;
        Ok(Box::new(Self { model, tokenizer: ClipTokenizer::load(folder)? }))
    }
}

impl ContrastiveModel for Clip {
    fn image_size(&self) -> usize {
        self.model.config().image_size
    }

    fn filter(&self) -> Filter {
        self.model.preprocess().filter
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        only_window(self.tokenizer.encode(text)?, self.tokenizer.max_length() - 2)
    }

    fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.model.text_features(ids)
    }

    fn image_features(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.model.image_features(pixels, tape)
    }

    fn image_features_backward(&self, dfeatures: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.model.image_features_backward(dfeatures, tape)
    }
}

struct Siglip {
    model: SiglipModel,
    tokenizer: FileTokenizer,
}

impl Siglip {
    fn load(folder: &ModelFolder, device: &Device) -> Result<Box<dyn ContrastiveModel>> {
        let model = SiglipModel::load(folder, device)?;
        // The model reads a text at its last position, so every window is filled up to it.
        let tokenizer = FileTokenizer::load(folder, model.config().max_position_embeddings)?;
        Ok(Box::new(Self { model, tokenizer }))
    }
}

impl ContrastiveModel for Siglip {
    fn image_size(&self) -> usize {
        self.model.config().image_size
    }

    fn filter(&self) -> Filter {
        self.model.preprocess().filter
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        only_window(self.tokenizer.encode(text)?, self.tokenizer.body())
    }

    fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.model.text_features(ids)
    }

    fn image_features(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.model.image_features(pixels, tape)
    }

    fn image_features_backward(&self, dfeatures: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.model.image_features_backward(dfeatures, tape)
    }
}
