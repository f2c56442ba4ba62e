//! What the prompts become for the denoiser.

use candle_core::Tensor;

use crate::{
    Shard,
    error::{Error, Result},
    generator::{EncodedText, Generator},
};

/// Most chunks of one prompt: 32 x 75 tokens with CLIP.
const MAX_CHUNKS: usize = 32;

/// Text states of the prompt and, with guidance on, of the negative prompt.
pub(super) struct Conditioning {
    /// `[1, chunks * tokens, width]`.
    positive: Tensor,
    /// Same shape; none if guidance is off.
    negative: Option<Tensor>,
    /// Tokens and chunks of the prompts that needed more than one chunk.
    chunked: Vec<(&'static str, usize, usize)>,
}

impl Conditioning {
    /// Encodes both prompts. Each chunk of a long prompt is encoded by itself and the states stand
    /// side by side; the shorter prompt is filled up with chunks of the empty text.
    pub(super) fn new(generator: &dyn Generator, shard: &Shard) -> Result<Self> {
        let positive = encode(generator, "prompt", &shard.spec.prompt)?;
        if shard.guidance <= 1.0 {
            let chunked = long("prompt", &positive).into_iter().collect();
            return Ok(Self { positive: side_by_side(&positive.states)?, negative: None, chunked });
        }
        let negative = encode(generator, "negative_prompt", &shard.spec.negative_prompt)?;
        let chunked =
            [long("prompt", &positive), long("negative prompt", &negative)].into_iter().flatten();
        let chunks = positive.states.dim(0)?.max(negative.states.dim(0)?);
        let blank = generator.encode("")?.states;
        Ok(Self {
            chunked: chunked.collect(),
            positive: side_by_side(&filled(positive.states, chunks, &blank)?)?,
            negative: Some(side_by_side(&filled(negative.states, chunks, &blank)?)?),
        })
    }

    /// What the caller should know about the prompts' length; a chunk holds `window` tokens, marks
    /// of start and end included.
    pub(super) fn notices(&self, window: u32) -> Vec<String> {
        let body = window.saturating_sub(2);
        self.chunked
            .iter()
            .map(|(which, tokens, chunks)| {
                format!(
                    "the {which} has {tokens} tokens, more than the {body} the text encoder takes \
                     at once: it was encoded in {chunks} chunks"
                )
            })
            .collect()
    }

    /// Whether guidance is on.
    pub(super) fn is_guided(&self) -> bool {
        self.negative.is_some()
    }

    /// The context of one denoiser call for `batch` images: `[batch, n, d]`, or with guidance
    /// `[2 batch, n, d]`, the negative prompt first.
    pub(super) fn context(&self, batch: usize) -> Result<Tensor> {
        let repeat = |states: &Tensor| states.repeat((batch, 1, 1));
        Ok(match &self.negative {
            None => repeat(&self.positive)?,
            Some(negative) => Tensor::cat(&[repeat(negative)?, repeat(&self.positive)?], 0)?,
        })
    }
}

fn encode(generator: &dyn Generator, field: &'static str, text: &str) -> Result<EncodedText> {
    let encoded = generator.encode(text)?;
    let chunks = encoded.states.dim(0)?;
    if chunks > MAX_CHUNKS {
        let tokens = encoded.tokens;
        return Err(Error::request(
            field,
            format!("{tokens} tokens need {chunks} chunks; allowed are {MAX_CHUNKS}: shorten it"),
        ));
    }
    Ok(encoded)
}

fn long(which: &'static str, text: &EncodedText) -> Option<(&'static str, usize, usize)> {
    let chunks = text.states.dims()[0];
    (chunks > 1).then_some((which, text.tokens, chunks))
}

/// `[k, tokens, width]` with `blank` `[1, tokens, width]` appended up to `chunks`.
fn filled(states: Tensor, chunks: usize, blank: &Tensor) -> Result<Tensor> {
    let missing = chunks - states.dim(0)?;
    if missing == 0 {
        return Ok(states);
    }
    Ok(Tensor::cat(&[states, blank.repeat((missing, 1, 1))?], 0)?)
}

/// `[k, tokens, width]` as `[1, k * tokens, width]`.
fn side_by_side(states: &Tensor) -> Result<Tensor> {
    let (chunks, tokens, width) = states.dims3()?;
    Ok(states.contiguous()?.reshape((1, chunks * tokens, width))?)
}
