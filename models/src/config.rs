//! Reads `config.json` files so that nothing in them is silently ignored.
//!
//! Every field that a network reads is noted. [`ConfigFile::finish`] then refuses the file if it holds a
//! field nobody read, unless that field cannot change what the network computes: names that start
//! with `_`, values `null` and `false`, and the names each caller lists as harmless.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// No real dimension is larger; a bound keeps a corrupt file from asking for absurd memory.
const LARGEST_SIZE: u64 = 1 << 24;

/// One JSON object of a configuration file: the whole file, or a section of it such as `text_config`.
pub(crate) struct ConfigFile {
    path: PathBuf,
    section: String,
    fields: Map<String, Value>,
    seen: RefCell<BTreeSet<String>>,
}

/// Reads `path` as a JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|source| Error::unreadable(path, source))?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => {
            let what = format!("expected a JSON object, found {}", kind(&other));
            Err(Error::malformed(path, what))
        }
        Err(e) => Err(Error::malformed(path, format!("not valid JSON: {e}"))),
    }
}

impl ConfigFile {
    /// Reads `path`, which must hold a JSON object.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            section: String::new(),
            fields: read_object(path)?,
            seen: RefCell::default(),
        })
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
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.seen.borrow_mut().insert(field.to_owned());
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A whole number from 1 up; `default` when absent.
    pub(crate) fn size(&self, field: &str, default: usize) -> Result<usize> {
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
    pub(crate) fn number(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.unsupported(field, "a finite number")),
        }
    }

    /// A positive finite number; `default` when absent.
    pub(crate) fn positive(&self, field: &str, default: f64) -> Result<f64> {
        let number = self.number(field, default)?;
        if number > 0.0 { Ok(number) } else { Err(self.unsupported(field, "a number above 0")) }
    }

    /// `true` or `false`; `default` when absent.
    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.unsupported(field, "true or false")),
        }
    }

    /// One of `choices`; the first of them when absent.
    pub(crate) fn choice<'a>(&self, field: &str, choices: &[&'a str]) -> Result<&'a str> {
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
    pub(crate) fn numbers(&self, field: &str, length: usize) -> Result<Option<Vec<f32>>> {
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
    pub(crate) fn only(&self, field: &str, supported: impl Into<Value>) -> Result<()> {
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
    pub(crate) fn unsupported(&self, field: &str, supported: impl Into<String>) -> Error {
        let value = self.fields.get(field).map_or_else(|| "absent".into(), Value::to_string);
        let (section, supported) = (&self.section, supported.into());
        Error::Config {
            path: self.path.clone(),
            what: format!("{section}{field} is {value}; supported: {supported}"),
        }
    }

    /// Refuses fields that nobody read and that `harmless` does not list.
    pub(crate) fn finish(self, harmless: &[&str]) -> Result<()> {
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
                    "unknown field {}{name} ({value}): this version cannot tell what it changes; \
                     remove it if it is harmless",
                    self.section
                ),
            }),
        }
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
