//! CLIP's tokenizer, token for token as transformers' `CLIPTokenizer`.
//!
//! A prompt longer than the model's window is never cut in silence: it becomes several windows, each
//! with its own start and end mark.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{self, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::{EncodedPrompt, HARMLESS};
use crate::config::{ConfigFile, read_object, read_text};
use crate::{Error, ModelFolder, Result};

/// How CLIP cuts a text before byte-pair encoding: the marks, English contractions, runs of letters, single
/// digits, runs of anything else that is not white space.
const PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// The window of every CLIP text model whose folder does not say otherwise.
const DEFAULT_LENGTH: usize = 77;
/// Above this, `model_max_length` is transformers' way of saying that it is not set.
const LARGEST_LENGTH: f64 = 65_536.0;

/// A byte-level BPE tokenizer in CLIP's file format.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    max_length: usize,
    bos: u32,
    eos: u32,
    pad: u32,
}

impl ClipTokenizer {
    /// Reads a tokenizer folder: `vocab.json` and `merges.txt`, or `tokenizer.json`; settings from
    /// `tokenizer_config.json` and `special_tokens_map.json` where present.
    ///
    /// As transformers does, it takes the vocabulary, the merges and the added tokens from
    /// `tokenizer.json` and builds CLIP's own normalisation around them.
    ///
    /// # Errors
    /// When a file is missing or malformed, a mark is not in the vocabulary, or a setting is not
    /// supported.
    pub fn load(dir: impl Into<ModelFolder>) -> Result<Self> {
        let folder = dir.into();
        let settings = Settings::read(&folder)?;
        let dir = &folder.path();
        let mut tokenizer = build(&folder, &settings)?;
        add_tokens(dir, &mut tokenizer, &settings)?;
        let id = |role: &str, token: &AddedToken| {
            tokenizer.token_to_id(&token.content).ok_or_else(|| {
                let what = format!("the {role} \"{}\" is not in the vocabulary", token.content);
                Error::malformed(dir, what)
            })
        };
        let bos = id("bos_token", &settings.bos)?;
        let eos = id("eos_token", &settings.eos)?;
        let pad = id("pad_token", &settings.pad)?;
        Ok(Self { tokenizer, max_length: settings.max_length, bos, eos, pad })
    }

    /// The length of every window, marks included: 77 for Stable Diffusion.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The ids of `text`, in as many windows as it takes. The empty text is one window without tokens.
    ///
    /// The only window of a short text is what transformers returns for `padding="max_length"`.
    ///
    /// # Errors
    /// When the tokenizer fails, which no text is known to cause.
    pub fn encode(&self, text: &str) -> Result<EncodedPrompt> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|e| Error::invalid("ClipTokenizer::encode", e.to_string()))?;
        let ids = encoding.get_ids();
        let body = self.max_length - 2;
        let pieces: Vec<&[u32]> =
            if ids.is_empty() { vec![ids] } else { ids.chunks(body).collect() };
        let chunks = pieces.into_iter().map(|piece| self.window(piece)).collect();
        Ok(EncodedPrompt { chunks, tokens: ids.len() })
    }

    fn window(&self, piece: &[u32]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.bos);
        ids.extend_from_slice(piece);
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        ids
    }
}

/// What the settings files say.
struct Settings {
    bos: AddedToken,
    eos: AddedToken,
    pad: AddedToken,
    unk: AddedToken,
    max_length: usize,
    /// Tokens beyond the vocabulary, with the ids they must get, in the order of their ids.
    added: Vec<(u32, AddedToken)>,
}

impl Settings {
    fn read(folder: &ModelFolder) -> Result<Self> {
        let read = |name: &str| folder.has(name).then(|| folder.config(name)).transpose();
        let config = read("tokenizer_config.json")?;
        let map = read("special_tokens_map.json")?;
        // As transformers: a config that lists the added tokens is whole, an older one is overruled
        // by the map. Stable Diffusion 2 pads with "!" by its map alone.
        let whole = config.as_ref().is_some_and(|c| c.get("added_tokens_decoder").is_some());
        let named = |field: &str, default: &str| {
            let of_config = config.as_ref().and_then(|c| c.get(field));
            let of_map = map.as_ref().filter(|_| !whole).and_then(|map| map.get(field));
            let default = Value::from(default);
            mark(of_map.or(of_config).unwrap_or(&default))
                .ok_or_else(|| Error::malformed(&folder.path(), format!("{field} is not a token")))
        };
        let mut max_length = DEFAULT_LENGTH;
        if let Some(config) = &config {
            config.choice("tokenizer_class", &["CLIPTokenizer", "CLIPTokenizerFast"])?;
            config.only("do_lower_case", true)?;
            config.choice("padding_side", &["right"])?;
            max_length = length(config)?;
        }
        let added = added_tokens(folder, config.as_ref())?;
        config.iter().chain(&map).try_for_each(|fields| fields.finish(&HARMLESS))?;
        Ok(Self {
            bos: named("bos_token", "<|startoftext|>")?,
            eos: named("eos_token", "<|endoftext|>")?,
            pad: named("pad_token", "<|endoftext|>")?,
            unk: named("unk_token", "<|endoftext|>")?,
            max_length,
            added,
        })
    }
}

/// `model_max_length`, marks included; [`DEFAULT_LENGTH`] when it is not set.
fn length(config: &ConfigFile) -> Result<usize> {
    match config.number("model_max_length", LARGEST_LENGTH + 1.0)? {
        n if n > LARGEST_LENGTH => Ok(DEFAULT_LENGTH),
        n if n >= 3.0 && n.fract() == 0.0 => Ok(n as usize),
        _ => Err(config.unsupported("model_max_length", "a whole number from 3 up")),
    }
}

/// A mark given as a string, or as an object with `content` and how it is matched in a text.
fn mark(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(content) => Some(AddedToken::from(content.as_str(), true)),
        _ => Some(matching(value, true)?.special(true)),
    }
}

/// A token from an object as the settings files hold it; `None` if a field is not what it must be.
fn matching(value: &Value, normalized: bool) -> Option<AddedToken> {
    let flag = |name: &str, default| value.get(name).map_or(Some(default), Value::as_bool);
    Some(
        AddedToken::from(value.get("content")?.as_str()?, flag("special", false)?)
            .single_word(flag("single_word", false)?)
            .lstrip(flag("lstrip", false)?)
            .rstrip(flag("rstrip", false)?)
            .normalized(flag("normalized", normalized)?),
    )
}

/// Tokens that `tokenizer_config.json` or `tokenizer.json` or `added_tokens.json` add, by id.
fn added_tokens(
    folder: &ModelFolder,
    config: Option<&ConfigFile>,
) -> Result<Vec<(u32, AddedToken)>> {
    let mut added = BTreeMap::new();
    if folder.has("added_tokens.json") {
        let simple = folder.file("added_tokens.json");
        for (content, id) in read_object(&simple)? {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| Error::malformed(&simple, format!("no id for {content}")))?;
            added.insert(id, AddedToken::from(content, false));
        }
    }
    if folder.has("tokenizer.json") {
        let whole = folder.file("tokenizer.json");
        let fields = read_object(&whole)?;
        let tokens: &[Value] = match fields.get("added_tokens") {
            None => &[],
            Some(Value::Array(tokens)) => tokens,
            Some(_) => return Err(Error::malformed(&whole, "added_tokens must be a list")),
        };
        for token in tokens {
            let (id, token) = added_token(token.get("id"), token)
                .ok_or_else(|| Error::malformed(&whole, format!("bad added token {token}")))?;
            added.insert(id, token);
        }
    }
    if let Some(config) = config {
        let decoder = config.section("added_tokens_decoder", &[])?;
        for (id, token) in decoder.names().filter_map(|id| Some((id, decoder.peek(id)?))) {
            let number = id.parse::<u32>().ok().map(Value::from);
            let (id, token) = added_token(number.as_ref(), token).ok_or_else(|| {
                let path = folder.path().join("tokenizer_config.json");
                Error::malformed(&path, format!("bad added_tokens_decoder entry {id}: {token}"))
            })?;
            added.insert(id, token);
        }
    }
    Ok(added.into_iter().collect())
}

fn added_token(id: Option<&Value>, token: &Value) -> Option<(u32, AddedToken)> {
    Some((u32::try_from(id?.as_u64()?).ok()?, matching(token, false)?))
}

/// The tokenizer as `CLIPTokenizer.__init__` of transformers builds it.
fn build(folder: &ModelFolder, settings: &Settings) -> Result<Tokenizer> {
    let (vocabulary, merges) = vocabulary_and_merges(folder)?;
    let dir = folder.path();
    let failed =
        |e: tokenizers::Error| Error::malformed(&dir, format!("not a CLIP tokenizer: {e}"));
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .unk_token(settings.unk.content.clone())
        .build()
        .map_err(failed)?;
    let spaces = Replace::new(normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ");
    let split =
        Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Removed, true);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(vec![
        NFC.into(),
        spaces.map_err(failed)?.into(),
        normalizers::Lowercase.into(),
    ])));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        split.map_err(failed)?.into(),
        ByteLevel::new(false, true, true).into(),
    ])));
    Ok(tokenizer)
}

/// Registers the added tokens and the marks, so that they are found in a text, and checks their ids.
fn add_tokens(dir: &Path, tokenizer: &mut Tokenizer, settings: &Settings) -> Result<()> {
    for (id, token) in &settings.added {
        tokenizer.add_tokens(std::slice::from_ref(token));
        if tokenizer.token_to_id(&token.content) != Some(*id) {
            let what = format!("the added token \"{}\" cannot get its id {id}", token.content);
            return Err(Error::malformed(dir, what));
        }
    }
    let mut marks: Vec<&AddedToken> = Vec::new();
    for mark in [&settings.bos, &settings.eos, &settings.unk, &settings.pad] {
        // One token has several roles; how it is matched in a text is what the last of them says.
        marks.retain(|other| other.content != mark.content);
        marks.push(mark);
    }
    for mark in marks {
        let known = tokenizer.token_to_id(&mark.content).is_some();
        if known && !settings.added.iter().any(|(_, added)| added.content == mark.content) {
            tokenizer.add_special_tokens(std::slice::from_ref(mark));
        }
    }
    Ok(())
}

fn vocabulary_and_merges(folder: &ModelFolder) -> Result<(Vocab, Merges)> {
    const VOCAB: &str = "vocab.json";
    const MERGES: &str = "merges.txt";
    const WHOLE: &str = "tokenizer.json";
    if folder.has(VOCAB) && folder.has(MERGES) {
        let (vocab, merges) = (folder.file(VOCAB), folder.file(MERGES));
        let ids = ids(&vocab, &read_object(&vocab)?)?;
        let text = read_text(&merges)?;
        let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let merges = lines.map(|line| pair(&merges, line)).collect::<Result<_>>()?;
        return Ok((ids, merges));
    }
    if !folder.has(WHOLE) {
        let missing = if folder.has(VOCAB) { MERGES } else { VOCAB };
        let hint = "a CLIP tokenizer needs vocab.json and merges.txt, or tokenizer.json".into();
        return Err(Error::MissingFile { path: folder.path().join(missing), hint });
    }
    let whole = folder.file(WHOLE);
    let fields = read_object(&whole)?;
    let model = fields.get("model").and_then(Value::as_object);
    let vocab = model.and_then(|m| m.get("vocab")).and_then(Value::as_object);
    let merges = model.and_then(|m| m.get("merges")).and_then(Value::as_array);
    let (Some(vocab), Some(merges)) = (vocab, merges) else {
        return Err(Error::malformed(
            &whole,
            "no model.vocab and model.merges: not a BPE tokenizer",
        ));
    };
    let merges = merges.iter().map(|merge| match merge {
        Value::String(line) => pair(&whole, line),
        other => other
            .as_array()
            .and_then(|two| match two.as_slice() {
                [a, b] => Some((a.as_str()?.to_owned(), b.as_str()?.to_owned())),
                _ => None,
            })
            .ok_or_else(|| Error::malformed(&whole, format!("bad merge {other}"))),
    });
    Ok((ids(&whole, vocab)?, merges.collect::<Result<_>>()?))
}

fn ids(path: &Path, vocab: &Map<String, Value>) -> Result<Vocab> {
    let id = |(token, id): (&String, &Value)| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(|id| (token.clone(), id))
            .ok_or_else(|| Error::malformed(path, format!("the id of \"{token}\" is not a number")))
    };
    vocab.iter().map(id).collect()
}

/// One line of `merges.txt`: two symbols and a space between.
fn pair(path: &Path, line: &str) -> Result<(String, String)> {
    match line.split_once(' ') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => {
            Ok((a.to_owned(), b.to_owned()))
        }
        _ => Err(Error::malformed(path, format!("bad merge \"{line}\": expected two symbols"))),
    }
}
