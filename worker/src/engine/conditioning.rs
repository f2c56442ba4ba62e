//! What the prompts become for the denoiser.

use candle_core::Tensor;

use crate::{
    Shard,
    error::{Error, Result},
    generator::{Context, EncodedText, Generator},
};

/// Most chunks of one prompt: 32 x 75 tokens with CLIP.
const MAX_CHUNKS: usize = 32;

/// Text states of the prompt and, with guidance on, of the negative prompt.
pub(super) struct Conditioning {
    /// Of one image.
    positive: Context,
    /// Same shapes; none if guidance is off.
    negative: Option<Context>,
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
            return Ok(Self { positive: context(positive)?, negative: None, chunked });
        }
        let negative = encode(generator, "negative_prompt", &shard.spec.negative_prompt)?;
        let chunked =
            [long("prompt", &positive), long("negative prompt", &negative)].into_iter().flatten();
        let chunked = chunked.collect();
        let blank = generator.encode("")?;
        let (positive, negative) = alike(positive, negative, &blank)?;
        Ok(Self { chunked, positive: context(positive)?, negative: Some(context(negative)?) })
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

    /// The context of one denoiser call for `batch` images, or with guidance for twice as many, the
    /// negative prompt first.
    pub(super) fn context(&self, batch: usize) -> Result<Context> {
        let rows = |positive: &Tensor, negative: Option<&Tensor>| {
            let rows = negative.into_iter().chain([positive]);
            let rows = rows.map(|row| repeat(row, batch)).collect::<Result<Vec<_>>>()?;
            Ok::<_, Error>(Tensor::cat(&rows, 0)?)
        };
        let negative = self.negative.as_ref();
        let pooled = |pooled| rows(pooled, negative.and_then(|context| context.pooled.as_ref()));
        Ok(Context {
            states: rows(&self.positive.states, negative.map(|context| &context.states))?,
            pooled: self.positive.pooled.as_ref().map(pooled).transpose()?,
        })
    }
}

/// `row` `[1, ..]` as `[batch, ..]`.
fn repeat(row: &Tensor, batch: usize) -> Result<Tensor> {
    Ok(Tensor::cat(&vec![row; batch], 0)?)
}

fn encode(generator: &dyn Generator, field: &'static str, text: &str) -> Result<EncodedText> {
    let encoded = generator.encode(text)?;
    let chunks = encoded.parts.iter().map(|part| part.dims()[0]).max().unwrap_or(0);
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
    let chunks = text.parts.first()?.dims()[0];
    (chunks > 1).then_some((which, text.tokens, chunks))
}

/// Both texts with as many chunks in each part, those of `blank` appended to the shorter one.
fn alike(
    mut one: EncodedText,
    mut other: EncodedText,
    blank: &EncodedText,
) -> Result<(EncodedText, EncodedText)> {
    for ((one, other), blank) in one.parts.iter_mut().zip(&mut other.parts).zip(&blank.parts) {
        let chunks = one.dim(0)?.max(other.dim(0)?);
        for part in [one, other] {
            let missing = chunks - part.dim(0)?;
            if missing > 0 {
                *part = Tensor::cat(&[&*part, &repeat(blank, missing)?], 0)?;
            }
        }
    }
    Ok((one, other))
}

/// All parts side by side: `[1, tokens of all chunks of all parts, width]`.
fn context(text: EncodedText) -> Result<Context> {
    let part = |part: &Tensor| {
        let (chunks, tokens, width) = part.dims3()?;
        part.contiguous()?.reshape((1, chunks * tokens, width))
    };
    let parts = text.parts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
    Ok(Context { states: Tensor::cat(&parts, 1)?, pooled: text.pooled })
}
