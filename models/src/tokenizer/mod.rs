//! Text to token ids, as the transformers library does it.

mod clip;
mod file;

pub use clip::ClipTokenizer;
pub use file::FileTokenizer;

/// A text as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// At least one window, each of the tokenizer's full length: marks, tokens, padding.
    pub chunks: Vec<Vec<u32>>,
    /// How many tokens the text has, marks and padding not counted.
    pub tokens: usize,
}
