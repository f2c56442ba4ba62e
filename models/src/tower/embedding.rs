//! Token ids to the input of a text tower.

use candle_core::Tensor;

use crate::weights::Scope;
use crate::{Error, Result};

/// Learned embeddings of tokens and of their positions.
#[derive(Debug)]
pub(crate) struct TokenEmbedding {
    /// `[vocabulary, width]`.
    tokens: Tensor,
    /// `[positions, width]`.
    positions: Tensor,
    /// Vocabulary, positions and width.
    sizes: [usize; 3],
}

impl TokenEmbedding {
    /// Sizes are those of the vocabulary, the positions and the width.
    pub(crate) fn new(scope: &Scope<'_>, sizes: [usize; 3]) -> Result<Self> {
        let [vocabulary, positions, width] = sizes;
        Ok(Self {
            tokens: scope.tensor("token_embedding.weight", &[vocabulary, width])?,
            positions: scope.tensor("position_embedding.weight", &[positions, width])?,
            sizes,
        })
    }

    /// `[b, n, width]` of `b` windows of `n` ids; what does not fit is refused in the name of `model`.
    pub(crate) fn forward(&self, model: &'static str, ids: &[Vec<u32>]) -> Result<Tensor> {
        let [vocabulary, positions, width] = self.sizes;
        let n = ids.first().map_or(0, Vec::len);
        if n == 0 || n > positions || ids.iter().any(|window| window.len() != n) {
            let lengths: Vec<_> = ids.iter().map(Vec::len).collect();
            return Err(Error::invalid(
                model,
                format!("expected windows of one length from 1 to {positions}, got {lengths:?}"),
            ));
        }
        if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= vocabulary) {
            let problem = format!(
                "token id {id} is outside the vocabulary of {vocabulary}; is this the tokenizer of \
                 this model?"
            );
            return Err(Error::invalid(model, problem));
        }
        let flat = Tensor::from_vec(ids.concat(), ids.len() * n, self.tokens.device())?;
        let x = self.tokens.index_select(&flat, 0)?.reshape((ids.len(), n, width))?;
        Ok(x.broadcast_add(&self.positions.narrow(0, 0, n)?)?)
    }
}
