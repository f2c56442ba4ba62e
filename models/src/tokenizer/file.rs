//! A tokenizer that its `tokenizer.json` describes whole: SigLIP's, T5's.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::normalizers::{Lowercase, Sequence};
use tokenizers::{NormalizerWrapper, Tokenizer};

use super::{EncodedPrompt, HARMLESS};
use crate::config::{ConfigFile, not_json, read_text};
use crate::{Error, ModelFolder, Result};

const FILE: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const PAD: &str = "pad_token";

/// Tokens as `tokenizer.json` makes them, in windows that end as it says and are padded to one
/// length.
#[derive(Debug)]
pub struct FileTokenizer {
    tokenizer: Tokenizer,
    length: usize,
    /// Marks at the end of every text.
    end: Vec<u32>,
    pad: u32,
    /// Padding stands before the text.
    pads_left: bool,
}

/// Tokenizer classes of transformers whose texts are what their `tokenizer.json` makes of them,
/// apart from what their row says.
const CLASSES: [Class; 13] = [
    Class::plain("PreTrainedTokenizerFast"),
    Class::plain("TokenizersBackend"),
    Class::plain("SiglipTokenizer"),
    Class::plain("SiglipTokenizerFast"),
    Class::plain("T5Tokenizer"),
    Class::plain("T5TokenizerFast"),
    Class::plain("XLMRobertaTokenizer"),
    Class::plain("XLMRobertaTokenizerFast"),
    Class::gemma("GemmaTokenizer", false),
    Class::gemma("GemmaTokenizerFast", false),
    // It lower-cases, its file does not: SigLIP 2 was trained on lower-cased text.
    Class::gemma("Siglip2Tokenizer", true),
    Class::gemma("Siglip2TokenizerFast", true),
    Class::plain("PreTrainedTokenizer"),
];

/// What a tokenizer class does beside its `tokenizer.json`.
#[derive(Clone, Copy)]
struct Class {
    name: &'static str,
    lowers: bool,
    pads_left: bool,
}

impl Class {
    const fn plain(name: &'static str) -> Self {
        Self { name, lowers: false, pads_left: false }
    }

    const fn gemma(name: &'static str, lowers: bool) -> Self {
        Self { name, lowers, pads_left: true }
    }
}

/// What `tokenizer_config.json` says.
struct Settings {
    lowers: bool,
    pads_left: bool,
    pad: String,
    /// Whether a mark stands before and after each text, where the file says.
    marks: [Option<bool>; 2],
}

/// What tokenizers 0.22 panics over if it is no JSON.
#[derive(Deserialize)]
struct Delicate {
    #[serde(rename = "decoder")]
    _decoder: Option<serde_json::Value>,
}

impl FileTokenizer {
    /// Reads `tokenizer.json` and, for what transformers' class of it does besides and the padding
    /// token, `tokenizer_config.json` or `special_tokens_map.json`. Windows get `length` ids.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, the padding token is not in
    /// the vocabulary, marks stand before the text, or `length` leaves no room for a token.
    pub fn load(dir: impl Into<ModelFolder>, length: usize) -> Result<Self> {
        let folder = dir.into();
        if !folder.has(FILE) {
            let hint = "this tokenizer needs it; save it with transformers' `use_fast=True`".into();
            return Err(Error::MissingFile { path: folder.path().join(FILE), hint });
        }
        let settings = Settings::read(&folder)?;
        let path = folder.file(FILE);
        let malformed = |what: String| Error::malformed(&path, what);
        let mut tokenizer = read(&read_text(&path)?).map_err(malformed)?;
        if settings.lowers {
            let own: Option<NormalizerWrapper> = tokenizer.get_normalizer().cloned();
            let both = [Lowercase.into()].into_iter().chain(own).collect();
            tokenizer.with_normalizer(Some(NormalizerWrapper::Sequence(Sequence::new(both))));
        }
        let pad = tokenizer.token_to_id(&settings.pad).ok_or_else(|| {
            malformed(format!("the pad_token \"{}\" is not in the vocabulary", settings.pad))
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
        let [before, after] = settings.marks;
        if before == Some(true) || after.is_some_and(|after| after == end.is_empty()) {
            let what = "its post_processor contradicts add_bos_token or add_eos_token of \
                        tokenizer_config.json; save both files from one tokenizer";
            return Err(malformed(what.into()));
        }
        if length <= end.len() {
            let what = format!("windows of {length} ids have no room beside {} marks", end.len());
            return Err(malformed(what));
        }
        Ok(Self { tokenizer, length, end, pad, pads_left: settings.pads_left })
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
            if self.pads_left {
                window.rotate_right(self.length - piece.len() - self.end.len());
            }
            window
        };
        Ok(EncodedPrompt { chunks: pieces.into_iter().map(window).collect(), tokens: ids.len() })
    }
}

/// The tokenizer that `tokenizer.json` describes, or what is wrong with it.
fn read(text: &str) -> std::result::Result<Tokenizer, String> {
    if let Err(error) = serde_json::from_str::<IgnoredAny>(text) {
        return Err(not_json(&error));
    }
    serde_json::from_str::<Delicate>(text).map_err(|error| not_json(&error))?;
    let unknown =
        |error: tokenizers::Error| format!("it describes no tokenizer that is known: {error}");
    let mut tokenizer = Tokenizer::from_bytes(text).map_err(unknown)?;
    // Windows are cut and filled here, where nothing is dropped in silence.
    tokenizer.with_truncation(None).map_err(unknown)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

impl Settings {
    fn read(folder: &ModelFolder) -> Result<Self> {
        let config = folder.has(SETTINGS).then(|| folder.config(SETTINGS)).transpose()?;
        let Some(config) = config else {
            let [lowers, pads_left] = [false; 2];
            let pad = named_pad(folder, None)?;
            return Ok(Self { lowers, pads_left, pad, marks: [None; 2] });
        };
        let class = config.choice("tokenizer_class", &CLASSES.map(|class| class.name))?;
        let class = CLASSES.iter().find(|known| known.name == class).unwrap_or(&CLASSES[0]);
        let mark = |field| config.get(field).map(|_| config.flag(field, false)).transpose();
        let side = match class.pads_left {
            true => config.choice("padding_side", &["left", "right"])?,
            false => config.choice("padding_side", &["right", "left"])?,
        };
        let settings = Self {
            lowers: config.flag("do_lower_case", false)? || class.lowers,
            pads_left: side == "left",
            pad: named_pad(folder, Some(&config))?,
            marks: [mark("add_bos_token")?, mark("add_eos_token")?],
        };
        config.finish(&HARMLESS)?;
        Ok(settings)
    }
}

/// The padding token that the settings name.
fn named_pad(folder: &ModelFolder, config: Option<&ConfigFile>) -> Result<String> {
    let map = || folder.has(MAP).then(|| folder.config(MAP)).transpose();
    let of = |fields: &ConfigFile| match fields.get(PAD) {
        None => Ok(None),
        Some(Value::String(token)) => Ok(Some(token.clone())),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(token)) => Ok(Some(token.clone())),
            _ => Err(fields.unsupported(PAD, "a token")),
        },
        Some(_) => Err(fields.unsupported(PAD, "a token")),
    };
    if let Some(pad) = config.map(of).transpose()?.flatten() {
        return Ok(pad);
    }
    if let Some(pad) = map()?.as_ref().map(of).transpose()?.flatten() {
        return Ok(pad);
    }
    let what = format!("neither {SETTINGS} nor {MAP} names a {PAD}");
    Err(Error::malformed(&folder.path(), what))
}
