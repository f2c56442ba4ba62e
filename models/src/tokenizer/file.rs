//! A tokenizer that its `tokenizer.json` describes whole: SigLIP's, T5's.

use std::{fs, path::Path};

use serde::Deserialize;
use tokenizers::Tokenizer;

use super::EncodedPrompt;
use crate::config::read_object;
use crate::{Error, Result};

/// Tokens as `tokenizer.json` makes them, in windows that end as it says and are padded to one length.
#[derive(Debug)]
pub struct FileTokenizer {
    tokenizer: Tokenizer,
    length: usize,
    /// Marks at the end of every window.
    end: Vec<u32>,
    pad: u32,
}

/// What tokenizers 0.22 panics over if it is no JSON.
#[derive(Deserialize)]
struct Delicate {
    #[serde(rename = "decoder")]
    _decoder: Option<serde_json::Value>,
}

impl FileTokenizer {
    /// Reads `tokenizer.json` and, for the padding token, `tokenizer_config.json` or
    /// `special_tokens_map.json`. Windows get `length` ids.
    ///
    /// # Errors
    /// When a file is missing or malformed, the padding token is not in the vocabulary, marks stand before the
    /// text, or `length` leaves no room for a token.
    pub fn load(dir: &Path, length: usize) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            let hint = "this tokenizer needs it; save it with transformers' `use_fast=True`".into();
            return Err(Error::MissingFile { path, hint });
        }
        let malformed = |what: String| Error::malformed(&path, what);
        let bytes = fs::read(&path).map_err(|e| Error::unreadable(&path, e))?;
        serde_json::from_slice::<Delicate>(&bytes).map_err(|e| malformed(e.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| malformed(e.to_string()))?;
        // Windows are cut and filled here, where nothing is dropped in silence.
        tokenizer.with_truncation(None).map_err(|e| malformed(e.to_string()))?;
        tokenizer.with_padding(None);
        let pad = pad_token(dir)?;
        let pad = tokenizer.token_to_id(&pad).ok_or_else(|| {
            malformed(format!("the pad_token \"{pad}\" is not in the vocabulary"))
        })?;
        let ids = |text, marks| {
            let encoding = tokenizer.encode_fast(text, marks);
            encoding.map(|e| e.get_ids().to_vec()).map_err(|e| malformed(e.to_string()))
        };
        let (bare, marked, end) = (ids("a", false)?, ids("a", true)?, ids("", true)?);
        if marked != [bare, end.clone()].concat() {
            let what =
                "its post_processor puts marks before the text; supported are marks after it";
            return Err(malformed(what.into()));
        }
        if length <= end.len() {
            let what = format!("windows of {length} ids have no room beside {} marks", end.len());
            return Err(malformed(what));
        }
        Ok(Self { tokenizer, length, end, pad })
    }

    /// The length of every window, marks included.
    pub fn max_length(&self) -> usize {
        self.length
    }

    /// The most tokens of a text that fits one window.
    pub fn body(&self) -> usize {
        self.length - self.end.len()
    }

    /// The ids of `text`, in as many windows as it takes. The empty text is one window without tokens.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<EncodedPrompt> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|e| Error::invalid("FileTokenizer::encode", e.to_string()))?;
        let ids = encoding.get_ids();
        let pieces: Vec<&[u32]> =
            if ids.is_empty() { vec![ids] } else { ids.chunks(self.body()).collect() };
        let window = |piece: &[u32]| {
            let mut window = [piece, &self.end].concat();
            window.resize(self.length, self.pad);
            window
        };
        Ok(EncodedPrompt { chunks: pieces.into_iter().map(window).collect(), tokens: ids.len() })
    }
}

/// The padding token that the settings name.
fn pad_token(dir: &Path) -> Result<String> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = dir.join(name);
        if !path.is_file() {
            continue;
        }
        let fields = read_object(&path)?;
        let token = fields.get("pad_token").map(|token| token.get("content").unwrap_or(token));
        let token = token.and_then(|token| token.as_str());
        if let Some(token) = token {
            return Ok(token.to_owned());
        }
    }
    let what = "neither tokenizer_config.json nor special_tokens_map.json names a pad_token";
    Err(Error::malformed(dir, what))
}
