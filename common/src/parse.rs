//! JSON and TOML that people write, with errors for people: where, which field, what it is and what it
//! must be. The words of serde are about the program's own types ("invalid type: string, expected f32").

use std::{fmt, marker::PhantomData};

use serde::de::{DeserializeOwned, DeserializeSeed};
use serde_path_to_error::{Deserializer, Path, Segment, Track};

use crate::text::without_mark;

/// What is wrong with a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line and column from 1, where they are known.
    at: Option<(usize, usize)>,
    what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.at {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

impl Problem {
    /// What is wrong, without the place.
    pub fn what(&self) -> &str {
        &self.what
    }
}

/// Reads all of `text` as one JSON value.
///
/// # Errors
/// If it is not JSON, or not of this form.
pub fn json<T: DeserializeOwned>(text: &str) -> Result<T, Problem> {
    json_seed(PhantomData, text)
}

/// [`json`] for a value whose form is known only when the program runs.
///
/// # Errors
/// If it is not JSON, or not of this form.
pub fn json_seed<'de, S: DeserializeSeed<'de>>(
    seed: S,
    text: &'de str,
) -> Result<S::Value, Problem> {
    let mut deserializer = serde_json::Deserializer::from_str(without_mark(text));
    let mut track = Track::new();
    let value = seed.deserialize(Deserializer::new(&mut deserializer, &mut track));
    let value = value.and_then(|value| deserializer.end().map(|()| value));
    value.map_err(|error| {
        let at = (error.line() > 0).then(|| (error.line(), error.column()));
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let message = text.strip_suffix(&place).unwrap_or(&text);
        let what = match error.classify() {
            serde_json::error::Category::Data => in_words(message, &track.path()),
            _ => json_syntax(message),
        };
        Problem { at, what }
    })
}

/// Reads all of `text` as TOML.
///
/// # Errors
/// If it is not TOML, or not of this form.
pub fn toml<T: DeserializeOwned>(text: &str) -> Result<T, Problem> {
    let text = without_mark(text);
    let problem = |error: &toml::de::Error, path: Option<&Path>| {
        let at = error.span().map(|span| place(text, span.start));
        let what =
            path.map_or_else(|| error.message().to_owned(), |path| in_words(error.message(), path));
        Problem { at, what }
    };
    let deserializer = toml::Deserializer::parse(text).map_err(|error| problem(&error, None))?;
    serde_path_to_error::deserialize(deserializer)
        .map_err(|error| problem(error.inner(), Some(error.path())))
}

/// Line and column, from 1, of a byte of `text`.
fn place(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or_default();
    (1 + before.matches('\n').count(), 1 + line.chars().count())
}

fn json_syntax(message: &str) -> String {
    let problem = if message.starts_with("EOF") {
        "the text ends before the JSON does; is it cut off?"
    } else if message == "trailing characters" {
        "the JSON has ended here, but more text follows"
    } else if message.starts_with("control character") {
        "a line break or control character within quotes; write it as an escape, e.g. \\n"
    } else if message.contains("recursion limit") {
        "too many lists and objects within each other"
    } else if message.contains("number out of range") {
        "this number is too large"
    } else {
        return format!("this is not JSON ({message})");
    };
    problem.to_owned()
}

/// serde's `message` about the value at `path`.
fn in_words(message: &str, path: &Path) -> String {
    let field = match path.to_string().as_str() {
        "." | "" => "the whole".to_owned(),
        path => format!("`{path}`"),
    };
    if let Some(rest) =
        message.strip_prefix("invalid type: ").or(message.strip_prefix("invalid value: "))
        && let Some((found, wanted)) = rest.rsplit_once(", expected ")
    {
        return format!("{field} is {}; it must be {}", found_words(found), wanted_words(wanted));
    }
    if let Some(name) = quoted_after(message, "missing field ") {
        return format!("`{}` is missing", beside(path, name));
    }
    if let Some(name) = quoted_after(message, "duplicate field ") {
        return format!("`{}` is there twice", beside(path, name));
    }
    for unknown in ["unknown field ", "unrecognized field name "] {
        if let Some(name) = quoted_after(message, unknown) {
            let known = names_after_expected(message);
            let known =
                if known.is_empty() { String::new() } else { format!("; known are {known}") };
            return format!("`{}` is not known here{known}", beside(path, name));
        }
    }
    if let Some(name) = quoted_after(message, "unknown variant ") {
        return format!("{field} is `{name}`; it must be one of {}", names_after_expected(message));
    }
    match field.as_str() {
        "the whole" => message.to_owned(),
        field => format!("{field}: {message}"),
    }
}

/// The path of the field `name` of the table that `path` leads to, or to a field of which.
fn beside(path: &Path, name: &str) -> String {
    let text = path.to_string();
    let is_it = path.iter().next_back().is_some_and(|last| match last {
        Segment::Map { key } => key == name,
        _ => false,
    });
    if is_it {
        text
    } else if text == "." || text.is_empty() {
        name.to_owned()
    } else {
        format!("{text}.{name}")
    }
}

/// The name in quotes that follows `start` at the beginning of `message`.
fn quoted_after<'a>(message: &'a str, start: &str) -> Option<&'a str> {
    let rest = message.strip_prefix(start)?;
    let quote = rest.chars().next().filter(|quote| "`'\"".contains(*quote))?;
    rest[1..].split(quote).next()
}

/// "a, b" of "..., expected one of `a`, `b`".
fn names_after_expected(message: &str) -> String {
    let list = message.split_once(", expected ").map_or("", |(_, list)| list);
    list.split('`').skip(1).step_by(2).collect::<Vec<_>>().join(", ")
}

fn found_words(found: &str) -> String {
    match found {
        "sequence" => "a list".to_owned(),
        "map" => "a table of fields".to_owned(),
        "null" | "unit value" | "Option value" => "null".to_owned(),
        _ => match found.strip_prefix("string ") {
            Some(text) => format!("the text {text}"),
            None => ["integer ", "floating point ", "boolean "]
                .iter()
                .find_map(|kind| found.strip_prefix(kind))
                .unwrap_or(found)
                .to_owned(),
        },
    }
}

fn wanted_words(wanted: &str) -> String {
    let words = match wanted {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number of 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "a boolean" | "bool" => "true or false",
        "a string" | "a borrowed string" | "str" | "string" => "text in quotes",
        "a sequence" => "a list",
        "a map" => "a table of fields",
        _ if wanted.starts_with("struct ") => "a table of fields",
        other => other,
    };
    words.to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        Hold,
        ShiftState,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Knobs {
        #[serde(default)]
        eta: Option<f32>,
        #[serde(default)]
        crops: Option<u32>,
        #[serde(default)]
        mode: Option<Mode>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Policy {
        concepts: Vec<String>,
        #[serde(default)]
        steering: BTreeMap<String, Knobs>,
    }

    #[test]
    fn mistakes_in_toml_are_told_by_place_field_and_value() {
        for (text, expected) in [
            (
                "concept = []",
                "line 1, column 1: `concept` is not known here; known are concepts, steering",
            ),
            ("steering = {}", "line 1, column 1: `concepts` is missing"),
            (
                "concepts = 'a'",
                "line 1, column 12: `concepts` is the text \"a\"; it must be a list",
            ),
            (
                "concepts = ['x']\n[steering.a]\neta = 'high'",
                "line 3, column 7: `steering.a.eta` is the text \"high\"; it must be a number",
            ),
            (
                "concepts = ['x']\nsteering.a.crops = -1",
                "line 2, column 20: `steering.a.crops` is `-1`; it must be a whole number of 0 or more",
            ),
            (
                "concepts = ['x']\nsteering.a.mode = 'push'",
                "line 2, column 19: `steering.a.mode` is `push`; it must be one of hold, shift-state",
            ),
            (
                "concepts = ['x', 3]",
                "line 1, column 18: `concepts[1]` is `3`; it must be text in quotes",
            ),
        ] {
            let problem = toml::<Policy>(text).expect_err(text).to_string();
            assert_eq!(problem, expected);
        }
        let open = toml::<Policy>("concepts = [").expect_err("not closed").to_string();
        assert!(open.starts_with("line 1, column "), "{open}");
        assert!(toml::<Policy>("\u{feff}concepts = ['x']").is_ok());
    }

    #[test]
    fn mistakes_in_json_are_told_by_place_field_and_value() {
        for (text, expected) in [
            ("", "line 1, column 0: the text ends before the JSON does; is it cut off?"),
            (
                "{\"concepts\": [",
                "line 1, column 14: the text ends before the JSON does; is it cut off?",
            ),
            (
                "{\"concepts\": []} x",
                "line 1, column 18: the JSON has ended here, but more text follows",
            ),
            ("concepts", "line 1, column 1: this is not JSON (expected value)"),
            ("{\"concepts\": null}", "line 1, column 17: `concepts` is null; it must be a list"),
            (
                "{\n\"concept\": []}",
                "line 2, column 9: `concept` is not known here; known are concepts, steering",
            ),
            ("{}", "line 1, column 2: `concepts` is missing"),
            (
                "{\"concepts\": [], \"concepts\": []}",
                "line 1, column 27: `concepts` is there twice",
            ),
            (
                "{\"concepts\": [], \"steering\": {\"a\": {\"crops\": 1.5}}}",
                "line 1, column 48: `steering.a.crops` is `1.5`; it must be a whole number of 0 or more",
            ),
        ] {
            let problem = json::<Policy>(text).expect_err(text).to_string();
            assert_eq!(problem, expected);
        }
        assert!(json::<Policy>("\u{feff}{\"concepts\": []}").is_ok());
    }
}
