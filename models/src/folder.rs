//! A model's folder: it notes which files are read, so that the hash that identifies the model
//! covers those files and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::config::ConfigFile;
use crate::{Error, Result};

/// A folder of a model, or of a part of it such as `unet`. Clones and parts share one list of the
/// files that were read.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    root: PathBuf,
    /// Where this part lies below the root: empty, or `unet/`.
    part: String,
    read: Arc<Mutex<BTreeSet<String>>>,
}

impl ModelFolder {
    /// The folder `dir`. Nothing is looked at yet.
    pub fn new(dir: &Path) -> Self {
        Self { root: dir.to_owned(), part: String::new(), read: Arc::default() }
    }

    /// The folder of a part of the model.
    pub fn at(&self, part: &str) -> Self {
        Self { part: format!("{}{part}/", self.part), ..self.clone() }
    }

    /// Where it lies.
    pub fn path(&self) -> PathBuf {
        // Without the slash at the end, which would show in messages.
        self.root.join(self.part.trim_end_matches('/'))
    }

    /// Whether it holds the file `name`.
    pub fn has(&self, name: &str) -> bool {
        self.path().join(name).is_file()
    }

    /// The path of the file `name`, which counts as read from now on.
    pub fn file(&self, name: &str) -> PathBuf {
        let name = format!("{}{name}", self.part);
        let path = self.root.join(&name);
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        path
    }

    /// The JSON object in the file `name`.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn config(&self, name: &str) -> Result<ConfigFile> {
        ConfigFile::read(&self.file(name))
    }

    /// The names of all files and folders in it, sorted; for messages and for choosing among them.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// SHA-256, in hex, of every file that was read so far; it names the model in safety records
    /// and calibrations once all of the model is loaded.
    ///
    /// The files come in the order of their paths relative to the model's folder: for each the
    /// path, a zero byte, the length as eight little-endian bytes, and the content. Where the
    /// folder lies, when its files were written and what else lies in it does not matter.
    ///
    /// # Errors
    /// When a file cannot be read, or none was.
    pub fn hash(&self) -> Result<String> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if read.is_empty() {
            let hint = "no file of the model was read; give the folder of a model";
            return Err(Error::MissingFile { path: self.root.clone(), hint: hint.into() });
        }
        let mut hash = Sha256::new();
        for name in &read {
            let path = self.root.join(name);
            hash_file(&mut hash, &path, name).map_err(|e| Error::unreadable(&path, e))?;
        }
        Ok(hex::encode(hash.finalize()))
    }
}

impl From<&Path> for ModelFolder {
    fn from(dir: &Path) -> Self {
        Self::new(dir)
    }
}

impl From<&PathBuf> for ModelFolder {
    fn from(dir: &PathBuf) -> Self {
        Self::new(dir)
    }
}

impl From<&ModelFolder> for ModelFolder {
    fn from(folder: &ModelFolder) -> Self {
        folder.clone()
    }
}

fn hash_file(hash: &mut Sha256, path: &Path, name: &str) -> std::io::Result<()> {
    let mut file = fs::File::open(path)?;
    hash.update(name.as_bytes());
    hash.update([0]);
    hash.update(file.metadata()?.len().to_le_bytes());
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(()),
            n => hash.update(&block[..n]),
        }
    }
}
