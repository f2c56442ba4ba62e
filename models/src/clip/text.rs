//! CLIP's text tower.

use candle_core::{Device, Tensor};

use super::config::ClipTextConfig;
use crate::layers::LayerNorm;
use crate::tower::{Encoder, TokenEmbedding};
use crate::weights::{self, Scope};
use crate::{Error, ModelFolder, Result, Tape};

/// transformers' `CLIPTextModel`: token ids to hidden states, each token seeing those before it.
#[derive(Debug)]
pub struct ClipTextModel {
    config: ClipTextConfig,
    embedding: TokenEmbedding,
    encoder: Encoder,
    final_norm: LayerNorm,
}

impl ClipTextModel {
    /// Reads a transformers folder: `config.json` and `model.safetensors` (or its shards).
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = ClipTextConfig::read(&folder.file("config.json"))?;
        weights::load(&folder, "model", device, |root| {
            // transformers 5 saves this class without the prefix that versions up to 4 wrote.
            let old = root.at("text_model");
            let bare = root.has("embeddings.token_embedding.weight");
            Self::new(if bare { root } else { &old }, config)
        })
    }

    pub(super) fn new(scope: &Scope<'_>, config: ClipTextConfig) -> Result<Self> {
        let width = config.hidden_size;
        let sizes = [config.vocab_size, config.max_position_embeddings, width];
        Ok(Self {
            embedding: TokenEmbedding::new(&scope.at("embeddings"), sizes)?,
            encoder: Encoder::new(&scope.at("encoder"), &config.tower, true)?,
            final_norm: scope.layer_norm("final_layer_norm", width, config.tower.eps)?,
            config,
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// The last hidden state after the final norm, `[b, n, hidden_size]`, of `b` windows of `n` ids each.
    ///
    /// # Errors
    /// When there is no window, the windows differ in length or are longer than the model's positions, or an
    /// id is outside the vocabulary.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.forward_on(ids, &mut Tape::off())
    }

    /// [`ClipTextModel::forward`], saving what [`ClipTextModel::backward`] needs.
    ///
    /// # Errors
    /// As [`ClipTextModel::forward`].
    pub fn forward_on(&self, ids: &[Vec<u32>], tape: &mut Tape) -> Result<Tensor> {
        self.final_norm.forward(&self.encoder.forward(&self.embed(ids)?, tape)?, tape)
    }

    /// The states that the last block gets, and the last hidden state after the final norm.
    pub(super) fn last_two(&self, ids: &[Vec<u32>]) -> Result<(Tensor, Tensor)> {
        let tape = &mut Tape::off();
        let (before, last) = self.encoder.last_two(&self.embed(ids)?, tape)?;
        Ok((before, self.final_norm.forward(&last, tape)?))
    }

    fn embed(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.embedding.forward("CLIP text model", ids)
    }

    /// The gradient with respect to the token embeddings, `[b, n, hidden_size]`.
    ///
    /// # Errors
    /// When the tape is empty or `dy` is not of the shape of the output.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.encoder.backward(&self.final_norm.backward(dy, tape)?, tape)
    }

    /// The state at each window's end mark, `[b, hidden_size]`, from the last hidden state.
    pub(super) fn pool(&self, hidden: &Tensor, ids: &[Vec<u32>]) -> Result<Tensor> {
        let n = ids.first().map_or(0, Vec::len);
        let ends = ids.iter().enumerate().map(|(row, window)| {
            let end = end_of_window(window, self.config.eos_token_id).ok_or_else(|| {
                let problem = format!(
                    "window {row} has no end mark {}; encode it with the tokenizer of this model",
                    self.config.eos_token_id
                );
                Error::invalid("CLIP text model", problem)
            })?;
            Ok((row * n + end) as u32)
        });
        let ends = Tensor::from_vec(ends.collect::<Result<Vec<_>>>()?, ids.len(), hidden.device())?;
        Ok(hidden.reshape((ids.len() * n, self.config.hidden_size))?.index_select(&ends, 0)?)
    }
}

/// Where a window ends: the first end mark; with the old default `eos_token_id == 2`, which no tokenizer
/// of CLIP emits, the first largest id, as the end mark is the last of CLIP's vocabulary.
fn end_of_window(window: &[u32], eos: u32) -> Option<usize> {
    let end = if eos == 2 { *window.iter().max()? } else { eos };
    window.iter().position(|&id| id == end)
}

#[cfg(test)]
mod tests {
    use super::end_of_window;

    #[test]
    fn a_window_ends_at_its_first_end_mark() {
        assert_eq!(end_of_window(&[98, 5, 99, 99], 99), Some(2));
        assert_eq!(end_of_window(&[98, 5, 99, 0], 99), Some(2));
        assert_eq!(end_of_window(&[98, 5, 99, 99], 2), Some(2));
        assert_eq!(end_of_window(&[98, 2, 99, 0], 2), Some(2));
        assert_eq!(end_of_window(&[98, 5], 99), None);
    }
}
