//! A journal: results of long work, kept one a line as they come, so that the work goes on where it
//! stopped.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions, TryLockError},
    io::{Read as _, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use anyhow::{Context, Result, bail};
use fairlead_common::parse;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// An open journal. The first line says what the work is; every other one is a result under its
/// key.
pub(crate) struct Journal {
    path: PathBuf,
    file: Mutex<File>,
}

#[derive(Serialize)]
struct Entry<'a, T> {
    key: &'a str,
    value: &'a T,
}

#[derive(Deserialize)]
struct Read<T> {
    key: String,
    value: T,
}

impl Journal {
    /// Opens or begins the journal of `work` at `path` and returns what it holds. A line cut short by
    /// a kill is dropped. The file is locked until the journal is dropped: two processes that make the
    /// same images would mix their lines.
    pub(crate) fn open<W: Serialize, T: DeserializeOwned>(
        path: &Path,
        work: &W,
    ) -> Result<(Self, BTreeMap<String, T>)> {
        let context = || format!("journal {}", path.display());
        let work = serde_json::to_string(work)?;
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .with_context(context)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "{} is being written by another process: wait for its end or name another file or \
                 folder",
                path.display()
            ),
            Err(TryLockError::Error(error)) => return Err(error).with_context(context),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(context)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text[..whole].lines();
        let mut done = BTreeMap::new();
        let begun = lines.next();
        if begun.is_some_and(|begun| begun != work) {
            bail!(
                "{} belongs to other work (other models, prompts or settings): remove it to begin \
                 anew, or name another file or folder",
                path.display()
            );
        }
        for (number, line) in (2..).zip(lines) {
            let entry: Read<T> = parse::json(line).map_err(|problem| {
                anyhow::anyhow!(
                    "{}, line {number}: {}; remove the line to have its work done again",
                    path.display(),
                    problem.what()
                )
            })?;
            done.insert(entry.key, entry.value);
        }
        file.set_len(whole as u64).with_context(context)?;
        let journal = Self { path: path.to_owned(), file: Mutex::new(file) };
        if begun.is_none() {
            journal.line(&work)?;
        }
        Ok((journal, done))
    }

    /// Adds a result.
    pub(crate) fn add<T: Serialize>(&self, key: &str, value: &T) -> Result<()> {
        self.line(&serde_json::to_string(&Entry { key, value })?)
    }

    fn line(&self, text: &str) -> Result<()> {
        let mut file = self.file.lock().expect("nobody panics while writing");
        file.write_all(format!("{text}\n").as_bytes())
            .with_context(|| format!("cannot write the journal {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_on_where_it_stopped_and_half_a_line_is_forgotten() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("work.jsonl");
        let open = |work: &str| Journal::open::<_, u32>(&path, &work);
        let (journal, done) = open("a").expect("begun");
        assert!(done.is_empty());
        journal.add("one", &1).expect("written");
        journal.add("two", &2).expect("written");
        drop(journal);
        let text = std::fs::read_to_string(&path).expect("it is there");
        std::fs::write(&path, format!("{text}{{\"key\": \"thr")).expect("cut short");
        let (journal, done) = open("a").expect("continued");
        assert_eq!(done, BTreeMap::from([("one".to_owned(), 1), ("two".to_owned(), 2)]));
        journal.add("three", &3).expect("written");
        let busy = open("a").err().expect("it is open").to_string();
        assert!(busy.contains("written by another process"), "{busy}");
        drop(journal);
        assert_eq!(open("a").expect("continued").1.len(), 3);
        let refused = open("b").err().expect("other work").to_string();
        assert!(refused.contains("belongs to other work"), "{refused}");
    }
}
