//! The `parameters` text of a PNG, in the form of AUTOMATIC1111's `create_infotext`:
//!
//! ```text
//! a cat
//! Negative prompt: a dog
//! Steps: 20, Sampler: DDIM, CFG scale: 5, Seed: 1, Size: 32x32, Model hash: 0123456789, Model: sd
//! ```
//!
//! Tools find the fields in different ways: in the last line (AUTOMATIC1111), in the first that begins
//! with `Steps:` (Civitai, SD Prompt Reader), or by the first `Seed:` anywhere. A prompt that holds such
//! words could choose what they read. Therefore a text is written as it is only if none of them reads
//! anything else in it; any other is written as a JSON string, as AUTOMATIC1111 quotes values, in which the
//! colon of each such word is an escape too. [`read`] returns exactly what [`write`] was given.

use std::{borrow::Cow, fmt::Write as _};

use crate::text::is_separator_or_bidi;

/// Keyword of the PNG's text chunk.
pub const KEYWORD: &str = "parameters";

/// How many digits of a model's hash are written.
const HASH_DIGITS: usize = 10;

const NEGATIVE: &str = "Negative prompt";
const STEPS: &str = "Steps";
const SAMPLER: &str = "Sampler";
const GUIDANCE: &str = "CFG scale";
const SEED: &str = "Seed";
const SIZE: &str = "Size";
const HASH: &str = "Model hash";
const MODEL: &str = "Model";

/// What the line of fields has, in its order.
const FIELDS: [&str; 7] = [STEPS, SAMPLER, GUIDANCE, SEED, SIZE, HASH, MODEL];

/// What an image was made with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt; left out if empty.
    pub negative_prompt: String,
    /// Sampling steps.
    pub steps: u32,
    /// Label of the sampler, e.g. "DDIM".
    pub sampler: String,
    /// Classifier-free guidance scale.
    pub guidance: f32,
    /// Seed of this image.
    pub seed: u64,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Content hash of the model. Its first ten characters are written, and read.
    pub model_hash: String,
    /// Name of the model.
    pub model: String,
}

/// Why a text cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The last line is not one of fields.
    #[error("the last line does not begin with `{STEPS}: `")]
    NoFields,
    /// A text within quotes has no end, or something follows it.
    #[error("`{0}` is not `Key: value, Key: value`")]
    Malformed(String),
    /// A field is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field is there twice.
    #[error("`{0}` is there twice")]
    Twice(String),
    /// A field's value is of another kind.
    #[error("`{field}` is `{value}`, which is not {wanted}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

/// The text for `parameters`.
pub fn write(parameters: &Parameters) -> String {
    let mut text = prompt_text(&parameters.prompt).into_owned();
    if !parameters.negative_prompt.is_empty() {
        let _ = write!(text, "\n{NEGATIVE}: {}", prompt_text(&parameters.negative_prompt));
    }
    let hash: String = parameters.model_hash.chars().take(HASH_DIGITS).collect();
    let _ = write!(
        text,
        "\n{STEPS}: {}, {SAMPLER}: {}, {GUIDANCE}: {}, {SEED}: {}, {SIZE}: {}x{}, {HASH}: {}, {MODEL}: {}",
        parameters.steps,
        value_text(&parameters.sampler),
        parameters.guidance,
        parameters.seed,
        parameters.size.0,
        parameters.size.1,
        value_text(&hash),
        value_text(&parameters.model),
    );
    text
}

/// Reads what [`write`] wrote. Fields that it does not know are passed over.
///
/// # Errors
/// If `text` has another form.
pub fn read(text: &str) -> Result<Parameters, ReadError> {
    let (prompts, last) = text.rsplit_once('\n').ok_or(ReadError::NoFields)?;
    if !last.starts_with("Steps: ") {
        return Err(ReadError::NoFields);
    }
    let fields = Fields::of(last)?;
    let (prompt, negative) = match prompts.split_once("\nNegative prompt: ") {
        Some((prompt, negative)) => (prompt, negative),
        None => (prompts, ""),
    };
    let size = fields.get(SIZE)?;
    let side = |text: &str| text.parse::<u32>().ok();
    let size = size
        .split_once('x')
        .and_then(|(width, height)| Some((side(width)?, side(height)?)))
        .ok_or_else(|| ReadError::Value {
            field: SIZE,
            value: size.into(),
            wanted: "WIDTHxHEIGHT",
        })?;
    Ok(Parameters {
        prompt: unquoted(prompt).into_owned(),
        negative_prompt: unquoted(negative).into_owned(),
        steps: fields.number(STEPS)?,
        sampler: fields.get(SAMPLER)?.to_owned(),
        guidance: fields.number(GUIDANCE)?,
        seed: fields.number(SEED)?,
        size,
        model_hash: fields.get(HASH)?.to_owned(),
        model: fields.get(MODEL)?.to_owned(),
    })
}

/// A prompt as it is, or quoted if some tool would read it as anything else.
fn prompt_text(prompt: &str) -> Cow<'_, str> {
    // Tabs and line feeds are the usual ones: tools keep them, and only a line's words can mislead.
    let acts = |c: char| c != '\n' && c != '\t' && (c.is_control() || is_separator_or_bidi(c));
    if prompt.chars().any(acts) || labels(prompt).next().is_some() || is_quoted(prompt) {
        Cow::Owned(quoted(prompt))
    } else {
        Cow::Borrowed(prompt)
    }
}

/// A field's value as it is, or quoted as AUTOMATIC1111 does.
fn value_text(value: &str) -> Cow<'_, str> {
    let acts = |c: char| c.is_control() || is_separator_or_bidi(c);
    let plain = !value.is_empty()
        && value.trim() == value
        && !value.contains([',', ':', '"'])
        && !value.chars().any(acts);
    if plain { Cow::Borrowed(value) } else { Cow::Owned(quoted(value)) }
}

/// Bytes of `text` at which the colon of a field's name is, however it is spelt and spaced: "steps :",
/// "SEED:", "\u{17f}teps:" (a long s, which is an s to expressions that ignore case).
fn labels(text: &str) -> impl Iterator<Item = usize> {
    let fold = |c: char| c.to_uppercase().rev();
    text.match_indices(':').map(|(at, _)| at).filter(move |&at| {
        let before = text[..at].trim_end();
        FIELDS.iter().chain([&NEGATIVE, &"prompt"]).any(|name| {
            let mut end = before.chars().rev().flat_map(fold);
            name.chars().rev().flat_map(fold).all(|c| end.next() == Some(c))
        })
    })
}

/// `text` as a JSON string that breaks no line and holds no field's name before a colon.
fn quoted(text: &str) -> String {
    let labels: Vec<usize> = labels(text).collect();
    let mut json = String::from('"');
    for (at, c) in text.char_indices() {
        match c {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            c if c.is_control() || is_separator_or_bidi(c) || labels.binary_search(&at).is_ok() => {
                let _ = write!(json, "\\u{:04x}", u32::from(c));
            }
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

/// Whether all of `text` is one JSON string.
fn is_quoted(text: &str) -> bool {
    text.starts_with('"') && serde_json::from_str::<String>(text).is_ok()
}

fn unquoted(text: &str) -> Cow<'_, str> {
    let json = text.starts_with('"').then(|| serde_json::from_str(text).ok()).flatten();
    json.map_or(Cow::Borrowed(text), Cow::Owned)
}

/// The line of fields.
struct Fields<'a>(Vec<(&'a str, Cow<'a, str>)>);

impl<'a> Fields<'a> {
    fn of(line: &'a str) -> Result<Self, ReadError> {
        let mut fields: Vec<(&str, Cow<'_, str>)> = Vec::new();
        let mut rest = line;
        loop {
            let malformed = || ReadError::Malformed(rest.to_owned());
            let (key, after) = rest.split_once(": ").ok_or_else(malformed)?;
            if fields.iter().any(|(known, _)| *known == key) {
                return Err(ReadError::Twice(key.to_owned()));
            }
            let end = value_end(after).ok_or_else(malformed)?;
            fields.push((key, unquoted(&after[..end])));
            match &after[end..] {
                "" => return Ok(Self(fields)),
                more => rest = more.strip_prefix(", ").ok_or_else(malformed)?,
            }
        }
    }

    fn get(&self, name: &'static str) -> Result<&str, ReadError> {
        let found = self.0.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| &**value).ok_or(ReadError::Missing(name))
    }

    fn number<T: std::str::FromStr>(&self, field: &'static str) -> Result<T, ReadError> {
        let value = self.get(field)?;
        let wrong = |_| ReadError::Value { field, value: value.to_owned(), wanted: "a number" };
        value.parse().map_err(wrong)
    }
}

/// Where a value at the start of `text` ends: behind its closing quote, or before a comma.
fn value_end(text: &str) -> Option<usize> {
    if !text.starts_with('"') {
        return Some(text.find(',').unwrap_or(text.len()));
    }
    let mut escaped = false;
    let closing = text.bytes().skip(1).position(|byte| {
        let closes = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        closes
    });
    closing.map(|at| at + 2)
}

#[cfg(test)]
mod tests;
