//! Tables of prompts: CSV with a header line, or JSON lines.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail, ensure};

/// One row, by the names of its columns.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Where it is from, for errors.
    place: String,
    fields: BTreeMap<String, String>,
}

impl Row {
    /// The value of a column that must be there.
    pub(crate) fn get(&self, column: &str) -> Result<&str> {
        match self.find(column) {
            Some(value) => Ok(value),
            None => {
                let known: Vec<&str> = self.fields.keys().map(String::as_str).collect();
                bail!("{}: no value of `{column}`; there are {}", self.place, known.join(", "))
            }
        }
    }

    /// The value of a column, if it has one.
    pub(crate) fn find(&self, column: &str) -> Option<&str> {
        self.fields.get(column).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The value of a column as a number.
    pub(crate) fn number<T: std::str::FromStr>(&self, column: &str) -> Result<Option<T>> {
        let parse = |value: &str| {
            value.parse().ok().with_context(|| {
                format!("{}: `{column}` is `{value}`, which is no such number", self.place)
            })
        };
        self.find(column).map(parse).transpose()
    }

    /// "file, row 7".
    pub(crate) fn place(&self) -> &str {
        &self.place
    }
}

/// Reads the rows of `path`: JSON lines if its name ends in `.jsonl`, `.ndjson` or `.json`, else CSV.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the table {}", path.display()))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let fields = match extension {
        "jsonl" | "ndjson" | "json" => json_lines(path, &text)?,
        _ => csv_rows(path, &text)?,
    };
    ensure!(!fields.is_empty(), "{}: the table has no row", path.display());
    let row = |(i, fields)| Row { place: format!("{}, row {}", path.display(), i + 1), fields };
    Ok(fields.into_iter().enumerate().map(row).collect())
}

fn csv_rows(path: &Path, text: &str) -> Result<Vec<BTreeMap<String, String>>> {
    // A byte order mark would become part of the first column's name.
    let text = text.trim_start_matches('\u{feff}');
    let mut reader = csv::ReaderBuilder::new().flexible(false).from_reader(text.as_bytes());
    let header = reader.headers().with_context(|| path.display().to_string())?.clone();
    reader
        .records()
        .map(|record| {
            let record = record.with_context(|| path.display().to_string())?;
            let fields = header.iter().map(|name| name.trim().to_owned());
            Ok(fields.zip(record.iter().map(str::to_owned)).collect())
        })
        .collect()
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<BTreeMap<String, String>>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line)
                .with_context(|| {
                    format!("{}, line {}: not a JSON object", path.display(), i + 1)
                })?;
            let value = |value: serde_json::Value| match value {
                serde_json::Value::String(text) => text,
                serde_json::Value::Null => String::new(),
                other => other.to_string(),
            };
            Ok(fields.into_iter().map(|(name, v)| (name, value(v))).collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, text: &str) -> Result<Vec<Row>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        read(&path)
    }

    #[test]
    fn csv_and_json_lines_say_the_same() {
        let csv = "\u{feff}prompt,seed,concept\r\n\"a cat, and a \"\"dog\"\"\",7,\r\nb,,axe\r\n";
        let json = "{\"prompt\": \"a cat, and a \\\"dog\\\"\", \"seed\": 7}\n\n\
                    {\"prompt\": \"b\", \"seed\": null, \"concept\": \"axe\"}\n";
        for (name, text) in [("p.csv", csv), ("p.jsonl", json)] {
            let rows = rows(name, text).expect("it is a table");
            assert_eq!(rows.len(), 2);
            assert_eq!(rows[0].get("prompt").expect("there"), "a cat, and a \"dog\"");
            assert_eq!(rows[0].number::<u64>("seed").expect("a number"), Some(7));
            assert_eq!((rows[0].find("concept"), rows[1].find("concept")), (None, Some("axe")));
            assert_eq!(rows[1].number::<u64>("seed").expect("none"), None);
            let missing = rows[0].get("concept").expect_err("empty").to_string();
            assert!(missing.contains("row 1") && missing.contains("`concept`"), "{missing}");
        }
    }

    #[test]
    fn a_broken_table_says_where() {
        assert!(rows("p.csv", "prompt\n").expect_err("empty").to_string().contains("no row"));
        let uneven = format!("{:#}", rows("p.csv", "a,b\n1\n").expect_err("uneven"));
        assert!(uneven.contains("p.csv") && uneven.contains("line: 2"), "{uneven}");
        let json = format!("{:#}", rows("p.jsonl", "{}\n[1]\n").expect_err("no object"));
        assert!(json.contains("line 2"), "{json}");
        let word = rows("p.csv", "seed\nx\n").expect("a table");
        let word = word[0].number::<u64>("seed").expect_err("no number").to_string();
        assert!(word.contains("`seed` is `x`"), "{word}");
        let none = read(Path::new("/nowhere/p.csv")).expect_err("absent").to_string();
        assert!(none.contains("/nowhere/p.csv"), "{none}");
    }
}
