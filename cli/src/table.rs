//! Tables of prompts: CSV with a header line (separated by commas, semicolons or tabs), JSON lines, a JSON
//! list of objects or texts, captions as COCO has them, or plain text with a prompt a line.

use std::{collections::BTreeMap, path::Path, str::FromStr};

use anyhow::{Context, Result, bail, ensure};
use fairlead_common::{parse, text};
use serde_json::{Map, Value};

use crate::values::digits;

/// Columns that hold the prompt, the first present one is taken: I2P, P4D; MMA-Diffusion; Ring-A-Bell; COCO
/// and other captions.
const PROMPT: [&str; 5] = ["prompt", "adv_prompt", "sensitive prompt", "caption", "text"];

/// One value. What it is tells a text from a number of the same letters.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Text(String),
    Number(String),
    /// Something that no column of ours holds: "a list".
    Other(&'static str),
}

/// One row, by the names of its columns in small letters.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Where it is from, for errors.
    place: String,
    cells: BTreeMap<String, Cell>,
}

impl Row {
    /// The text of a column that must be there.
    pub(crate) fn get(&self, column: &str) -> Result<&str> {
        match self.find(column)? {
            Some(value) => Ok(value),
            None => {
                let known: Vec<&str> = self.cells.keys().map(String::as_str).collect();
                bail!("{}: no value of `{column}`; there are {}", self.place, known.join(", "))
            }
        }
    }

    /// The text of a column, if it has one.
    pub(crate) fn find(&self, column: &str) -> Result<Option<&str>> {
        match self.cell(column) {
            None => Ok(None),
            Some(Cell::Text(text)) => Ok(Some(text.trim()).filter(|text| !text.is_empty())),
            Some(Cell::Number(number)) => {
                bail!("{}: `{column}` is the number {number}; it must be text", self.place)
            }
            Some(Cell::Other(kind)) => {
                bail!("{}: `{column}` is {kind}; it must be text", self.place)
            }
        }
    }

    /// The value of a column as a number; `7.0` is a whole one, too.
    pub(crate) fn number<T: FromStr>(&self, column: &str) -> Result<Option<T>> {
        let value = match self.cell(column) {
            None => return Ok(None),
            Some(Cell::Text(value) | Cell::Number(value)) => value.trim(),
            Some(Cell::Other(kind)) => kind,
        };
        if value.is_empty() {
            return Ok(None);
        }
        match value.parse().or_else(|_| digits(value).parse()) {
            Ok(number) => Ok(Some(number)),
            Err(_) => bail!("{}: `{column}` is `{value}`, which is no such number", self.place),
        }
    }

    /// The prompt, in `column` or else in one of the usual ones.
    pub(crate) fn prompt(&self, column: Option<&str>) -> Result<&str> {
        if let Some(column) = column {
            return self.get(column);
        }
        for column in PROMPT {
            if let Some(prompt) = self.find(column)? {
                return Ok(prompt);
            }
        }
        let known: Vec<&str> = self.cells.keys().map(String::as_str).collect();
        bail!(
            "{}: none of the columns {} holds a prompt; there are {}",
            self.place,
            PROMPT.join(", "),
            known.join(", ")
        )
    }

    fn cell(&self, column: &str) -> Option<&Cell> {
        self.cells.get(&column.to_lowercase())
    }
}

/// Reads the rows of `path`: JSON if its name ends in `.json`, `.jsonl` or `.ndjson`; CSV if it ends in
/// `.csv` or `.tsv`, or its first line names a column of prompts; else plain text.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let text =
        text::read(path).with_context(|| format!("cannot read the table {}", path.display()))?;
    let name = path.display();
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
    let rows = match extension.as_str() {
        "jsonl" | "ndjson" | "json" => json_rows(&text).with_context(|| name.to_string())?,
        "csv" | "tsv" => csv_rows(&text).with_context(|| name.to_string())?,
        _ if has_header(&text) => csv_rows(&text).with_context(|| name.to_string())?,
        _ => plain_rows(&text),
    };
    ensure!(!rows.is_empty(), "{name}: the table has no row");
    let row = |(i, cells)| Row { place: format!("{name}, row {}", i + 1), cells };
    Ok(rows.into_iter().enumerate().map(row).collect())
}

type Cells = BTreeMap<String, Cell>;

/// The prompts of plain text, one a line.
fn plain_rows(text: &str) -> Vec<Cells> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| one_prompt(line.to_owned())).collect()
}

fn one_prompt(prompt: String) -> Cells {
    BTreeMap::from([(PROMPT[0].to_owned(), Cell::Text(prompt))])
}

/// Whether the first line names a column that holds prompts.
fn has_header(text: &str) -> bool {
    let header = fields(text, separator(text));
    header.iter().any(|name| PROMPT.contains(&name.as_str()))
}

/// The names in the header line of `text`, in small letters.
fn fields(text: &str, separator: u8) -> Vec<String> {
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text.as_bytes());
    let header = reader.headers().cloned().unwrap_or_default();
    header.iter().map(|name| name.trim().to_lowercase()).collect()
}

/// What separates the columns: that of which the header has most.
fn separator(text: &str) -> u8 {
    let columns = |separator: &u8| fields(text, *separator).len();
    // Of equals the last is taken.
    [b'\t', b';', b','].into_iter().max_by_key(columns).unwrap_or(b',')
}

fn csv_rows(text: &str) -> Result<Vec<Cells>> {
    let separator = separator(text);
    let header = fields(text, separator);
    let mut names = header.clone();
    names.sort();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two columns are called `{}`; rename one", twice[0]);
    }
    let mut reader =
        csv::ReaderBuilder::new().delimiter(separator).flexible(true).from_reader(text.as_bytes());
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.context("this is not CSV")?;
        if record.len() != header.len() {
            let line = record.position().map_or(0, csv::Position::line);
            bail!(
                "line {line} has {} columns, the header has {}; put texts that hold a `{}` in double quotes, \
                 or call the file .txt if it has a prompt a line",
                record.len(),
                header.len(),
                char::from(separator).escape_default()
            );
        }
        let cells = record.iter().map(|value| Cell::Text(value.to_owned()));
        rows.push(header.iter().cloned().zip(cells).collect());
    }
    Ok(rows)
}

/// A JSON list, an object that holds one, or an object a line.
fn json_rows(text: &str) -> Result<Vec<Cells>> {
    match parse::json::<Value>(text) {
        Ok(Value::Array(list)) => list_rows(list),
        Ok(Value::Object(mut object)) => match listed(&mut object)? {
            Some(list) => list_rows(list),
            None => Ok(vec![object_row(object)?]),
        },
        Ok(other) => bail!("this is {}; it must be a list of prompts", kind(&other)),
        Err(whole) => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let mut rows = Vec::new();
            for (i, line) in lines {
                match parse::json::<Value>(line) {
                    // Not JSON lines at all: what is wrong with the whole says more.
                    Err(_) if i == 0 => return Err(whole.into()),
                    Err(problem) => bail!("line {}: {}", i + 1, problem.what()),
                    Ok(value) => rows.push(row(value).with_context(|| format!("line {}", i + 1))?),
                }
            }
            Ok(rows)
        }
    }
}

/// The list that an object is around: COCO's captions, or one under a name that says so.
fn listed(object: &mut Map<String, Value>) -> Result<Option<Vec<Value>>> {
    if let Some(Value::Array(list)) = object.remove("annotations") {
        if list.iter().any(|annotation| annotation.get("caption").is_none()) {
            bail!("its annotations have no `caption`; give one of COCO's captions_*.json");
        }
        return Ok(Some(list));
    }
    let list = ["prompts", "data"].into_iter().find_map(|name| match object.get(name) {
        Some(Value::Array(list)) => Some(list.clone()),
        _ => None,
    });
    Ok(list)
}

fn list_rows(list: Vec<Value>) -> Result<Vec<Cells>> {
    let rows = list.into_iter().enumerate();
    rows.map(|(i, value)| row(value).with_context(|| format!("row {}", i + 1))).collect()
}

fn row(value: Value) -> Result<Cells> {
    match value {
        Value::Object(object) => object_row(object),
        Value::String(prompt) => Ok(one_prompt(prompt)),
        other => bail!("this is {}; it must be an object or a text", kind(&other)),
    }
}

fn object_row(object: Map<String, Value>) -> Result<Cells> {
    let mut cells = Cells::new();
    for (name, value) in object {
        let cell = match value {
            Value::Null => continue,
            Value::String(text) => Cell::Text(text),
            Value::Number(number) => Cell::Number(number.to_string()),
            other => Cell::Other(kind(&other)),
        };
        let name = name.trim().to_lowercase();
        if cells.insert(name.clone(), cell).is_some() {
            bail!("two fields are called `{name}`; rename one");
        }
    }
    Ok(cells)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(true) => "true",
        Value::Bool(false) => "false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
