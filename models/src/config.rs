//! Reads `config.json` files so that nothing in them is silently ignored.
//!
//! Every field that a network reads is noted. [`ConfigFile::finish`] then refuses the file if it holds a
//! field nobody read, unless that field cannot change what the network computes: names that start
//! with `_`, values `null` and `false`, and the names each caller lists as harmless.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// No real dimension is larger; a bound keeps a corrupt file from asking for absurd memory.
const LARGEST_SIZE: u64 = 1 << 24;

/// The largest text file of a real model, a `tokenizer.json`, has 35 MB.
const LARGEST_TEXT: u64 = 256 << 20;

/// One JSON object of a configuration file: the whole file, or a section of it such as `text_config`.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    section: String,
    fields: Map<String, Value>,
    seen: RefCell<BTreeSet<String>>,
}

/// Reads `path` as UTF-8 text. A byte order mark at its start, as some editors write it, is not
/// part of it.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let unreadable = |source| Error::unreadable(path, source);
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(LARGEST_TEXT + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > LARGEST_TEXT {
        let what = format!("larger than {} MiB: no file of a model's settings", LARGEST_TEXT >> 20);
        return Err(Error::malformed(path, what));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(Error::malformed(path, "it is UTF-16 text; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::malformed(path, format!("byte {at} is not UTF-8 text; save it as UTF-8"))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// Reads `path` as a JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    object(path, &read_text(path)?)
}

/// The JSON object that `path` holds as `text`.
fn object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    let parsed = serde_json::from_str(text)
        .or_else(|error| serde_json::from_str(&without_infinities(text)).map_err(|_| error));
    match parsed {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => {
            let what = format!("expected a JSON object, found {}", kind(&other));
            Err(Error::malformed(path, what))
        }
        Err(e) => Err(Error::malformed(path, not_json(&e))),
    }
}

/// Python's JSON as JSON: diffusers saves `"lambda_min_clipped": -Infinity`. Such a number becomes
/// a string, which nothing that wants a number takes.
fn without_infinities(text: &str) -> String {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut is_string) = (text, false);
    while let Some(first) = rest.chars().next() {
        let number = NUMBERS.iter().find(|number| !is_string && rest.starts_with(**number));
        let taken = match (number, first) {
            (Some(number), _) => {
                out.push_str(&format!("\"{number}\""));
                rest = &rest[number.len()..];
                continue;
            }
            // An escape and what it escapes.
            (None, '\\') if is_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, other) => {
                is_string ^= other == '"';
                other.len_utf8()
            }
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

/// Where a text stops to be JSON.
pub(crate) fn not_json(error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    if error.is_eof() {
        return format!("not valid JSON: it ends too early, at line {line}; is it cut short?");
    }
    format!("not valid JSON: line {line}, column {column}")
}

impl ConfigFile {
    /// Reads `path`, which must hold a JSON object.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_text(path)?)
    }

    /// The JSON object in `text`, which errors say is in the file `path`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            section: String::new(),
            fields: object(path, text)?,
            seen: RefCell::default(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// The value of `field`, which does not count as read for that.
    pub(crate) fn peek(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// The object under `field`, or under the first of `instead` that is present; empty when none is.
    pub(crate) fn section(&self, field: &str, instead: &[&str]) -> Result<Self> {
        let mut given =
            instead.iter().chain([&field]).filter_map(|name| Some((name, self.get(name)?)));
        let fields = match given.next() {
            None => Map::new(),
            Some((_, Value::Object(fields))) => fields.clone(),
            Some((name, _)) => return Err(self.unsupported(name, "a JSON object")),
        };
        // It counts as read where another was taken, too.
        self.seen.borrow_mut().insert(field.to_owned());
        Ok(Self {
            path: self.path.clone(),
            section: format!("{}{field}.", self.section),
            fields,
            seen: RefCell::default(),
        })
    }

    /// The value of `field`, `None` when it is absent or null. Counts as read.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.seen.borrow_mut().insert(field.to_owned());
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A whole number from 1 up; `default` when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn size(&self, field: &str, default: usize) -> Result<usize> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => as_size(value)
                .ok_or_else(|| self.unsupported(field, "a whole number from 1 to 16777216")),
        }
    }

    /// A list of whole numbers from 1 up, or one number that stands for `length` equal ones.
    pub(crate) fn sizes(&self, field: &str, length: usize, default: usize) -> Result<Vec<usize>> {
        let wanted = || format!("a whole number from 1 up, or a list of {length} of them");
        match self.get(field) {
            None => Ok(vec![default; length]),
            Some(Value::Array(items)) => items
                .iter()
                .map(as_size)
                .collect::<Option<Vec<_>>>()
                .filter(|sizes| sizes.len() == length)
                .ok_or_else(|| self.unsupported(field, wanted())),
            Some(value) => as_size(value)
                .map(|size| vec![size; length])
                .ok_or_else(|| self.unsupported(field, wanted())),
        }
    }

    /// A non-empty list of whole numbers from 1 up.
    pub(crate) fn size_list(&self, field: &str, default: &[usize]) -> Result<Vec<usize>> {
        match self.get(field) {
            None => Ok(default.to_vec()),
            Some(Value::Array(items)) => items
                .iter()
                .map(as_size)
                .collect::<Option<Vec<_>>>()
                .filter(|sizes| !sizes.is_empty())
                .ok_or_else(|| self.unsupported(field, "a list of whole numbers from 1 up")),
            Some(_) => Err(self.unsupported(field, "a list of whole numbers from 1 up")),
        }
    }

    /// A list of different whole numbers from 0 up, below `bound`; empty when absent.
    pub(crate) fn indices(&self, field: &str, bound: usize) -> Result<Vec<usize>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let index = |item: &Value| item.as_u64().map(|n| n as usize).filter(|n| *n < bound);
        value
            .as_array()
            .and_then(|items| items.iter().map(index).collect::<Option<Vec<_>>>())
            .filter(|found| found.iter().collect::<BTreeSet<_>>().len() == found.len())
            .ok_or_else(|| {
                let wanted = format!("a list of different whole numbers below {bound}");
                self.unsupported(field, wanted)
            })
    }

    /// A token id or another whole number from 0 up.
    pub(crate) fn id(&self, field: &str, default: u32) -> Result<u32> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.unsupported(field, "a whole number from 0 up")),
        }
    }

    /// A finite number; `default` when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn number(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.unsupported(field, "a finite number")),
        }
    }

    /// A positive finite number; `default` when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64> {
        let number = self.number(field, default)?;
        if number > 0.0 { Ok(number) } else { Err(self.unsupported(field, "a number above 0")) }
    }

    /// `true` or `false`; `default` when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.unsupported(field, "true or false")),
        }
    }

    /// One of `choices`; the first of them when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn choice<'a>(&self, field: &str, choices: &[&'a str]) -> Result<&'a str> {
        let Some(value) = self.get(field) else { return Ok(choices[0]) };
        choices
            .iter()
            .find(|choice| value.as_str() == Some(choice))
            .copied()
            .ok_or_else(|| self.unsupported(field, quoted(choices)))
    }

    /// A list of strings, each one of `choices`; `default` when absent.
    pub(crate) fn choice_list<'a>(
        &self,
        field: &str,
        choices: &[&'a str],
        default: &[&'a str],
    ) -> Result<Vec<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(default.to_vec()) };
        let find = |item: &Value| choices.iter().find(|c| item.as_str() == Some(c)).copied();
        value
            .as_array()
            .and_then(|items| items.iter().map(find).collect::<Option<Vec<_>>>())
            .ok_or_else(|| self.unsupported(field, format!("a list of {}", quoted(choices))))
    }

    /// A list of finite numbers of the given length, or `None` when absent.
    ///
    /// # Errors
    /// When it is something else.
    pub fn numbers(&self, field: &str, length: usize) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = |item: &Value| item.as_f64().filter(|n| n.is_finite()).map(|n| n as f32);
        value
            .as_array()
            .and_then(|items| items.iter().map(number).collect::<Option<Vec<_>>>())
            .filter(|numbers| numbers.len() == length)
            .map(Some)
            .ok_or_else(|| self.unsupported(field, format!("a list of {length} finite numbers")))
    }

    /// Accepts `field` only if it is absent, null, or equal to `supported`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn only(&self, field: &str, supported: impl Into<Value>) -> Result<()> {
        let supported = supported.into();
        let same = |value: &Value| {
            *value == supported || (value.is_number() && value.as_f64() == supported.as_f64())
        };
        match self.get(field) {
            Some(value) if !same(value) => Err(self.unsupported(field, supported.to_string())),
            _ => Ok(()),
        }
    }

    /// The error for a value this crate cannot honour.
    pub fn unsupported(&self, field: &str, supported: impl Into<String>) -> Error {
        let value = self.fields.get(field).map_or_else(|| "absent".into(), short);
        let (section, supported) = (&self.section, supported.into());
        Error::Config {
            path: self.path.clone(),
            what: format!("{section}{field} is {value}; supported: {supported}"),
        }
    }

    /// Refuses fields that nobody read and that `harmless` does not list.
    ///
    /// # Errors
    /// When there is one, unless it is null or false.
    pub fn finish(&self, harmless: &[&str]) -> Result<()> {
        let seen = self.seen.borrow();
        let stray = self.fields.iter().find(|(name, value)| {
            !seen.contains(name.as_str())
                && !name.starts_with('_')
                && !harmless.contains(&name.as_str())
                && !matches!(value, Value::Null | Value::Bool(false))
        });
        match stray {
            None => Ok(()),
            Some((name, value)) => Err(Error::Config {
                path: self.path.clone(),
                what: format!(
                    "unknown field {}{name} ({}): this version cannot tell what it changes; \
                     remove it if it is harmless",
                    self.section,
                    short(value)
                ),
            }),
        }
    }
}

/// A value for a message, which no long list must fill.
fn short(value: &Value) -> String {
    const MOST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&n| (1..=LARGEST_SIZE).contains(&n)).map(|n| n as usize)
}

fn quoted(choices: &[&str]) -> String {
    choices.iter().map(|choice| format!("\"{choice}\"")).collect::<Vec<_>>().join(" or ")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    /// As editors of some systems save text.
    #[test]
    fn a_byte_order_mark_is_no_part_of_a_text() {
        let marked = written(b"\xef\xbb\xbf{\"a\": 3}");
        assert_eq!(ConfigFile::read(marked.path()).unwrap().size("a", 1).unwrap(), 3);
        for (bytes, part) in [
            (&b"\xff\xfe{\0}\0"[..], "it is UTF-16 text; save it as UTF-8"),
            (b"{\"a\": \"\xe4\"}", "byte 7 is not UTF-8"),
            (b"{\"a\": ", "it ends too early, at line 1"),
            (b"{\n1}", "not valid JSON: line 2, column 1"),
        ] {
            let message = ConfigFile::read(written(bytes).path()).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn numbers_that_only_python_writes_are_read_and_never_taken() {
        let text = r#"{"a": -Infinity, "b": [NaN, "Infinity \" NaN"], "c": Infinity, "NaN": 1}"#;
        let fields = ConfigFile::parse(Path::new("f"), text).unwrap();
        assert_eq!(fields.peek("b").unwrap()[1], "Infinity \" NaN");
        assert_eq!(fields.number("NaN", 0.0).unwrap(), 1.0);
        for (field, said) in [("a", "a is \"-Infinity\""), ("c", "c is \"Infinity\"")] {
            let message = fields.number(field, 0.0).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
        ConfigFile::parse(Path::new("f"), "{\"a\": Infinit}").unwrap_err();
    }

    #[test]
    fn a_long_value_fills_no_message() {
        let text = format!("{{\"a\": [{}1]}}", "1, ".repeat(1000));
        let fields = ConfigFile::parse(Path::new("f"), &text).unwrap();
        let message = fields.numbers("a", 3).unwrap_err().to_string();
        assert!(message.len() < 250 && message.contains("...; supported"), "{message}");
    }
}
