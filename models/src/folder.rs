//! Pipeline folders as diffusers saves them, and the content hash that identifies a model.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::config::read_object;
use crate::{Error, Result};

/// Files that decide what a model computes; documentation, pictures and other formats do not count.
const HASHED: [&str; 3] = ["json", "safetensors", "txt"];
/// Deeper than any model folder; a bound against links in circles.
const DEEPEST: usize = 8;

/// A folder with a `model_index.json`: a pipeline class and its components in folders of their own.
#[derive(Debug, Clone)]
pub struct PipelineFolder {
    path: PathBuf,
    class_name: String,
    index: Map<String, Value>,
}

impl PipelineFolder {
    /// Reads `model_index.json` of `dir`. The components are looked at when they are asked for.
    ///
    /// # Errors
    /// When the file is missing, is not a JSON object, or names no pipeline class.
    pub fn open(dir: &Path) -> Result<Self> {
        let file = dir.join("model_index.json");
        if !file.is_file() {
            let hint = "give the folder of a diffusers pipeline, the one that holds unet, vae, \
                        text_encoder, tokenizer and scheduler";
            return Err(Error::MissingFile { path: file, hint: hint.into() });
        }
        let index = read_object(&file)?;
        match index.get("_class_name").and_then(Value::as_str) {
            Some(name) => Ok(Self { path: dir.to_owned(), class_name: name.to_owned(), index }),
            None => Err(Error::Malformed {
                path: file,
                what: "_class_name must be a string, such as \"StableDiffusionPipeline\"".into(),
            }),
        }
    }

    /// The pipeline class, such as `StableDiffusionPipeline`.
    pub fn class_name(&self) -> &str {
        &self.class_name
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a component such as `unet`.
    ///
    /// # Errors
    /// When `model_index.json` does not name it, names it as absent (`[null, null]`), or its folder is
    /// not there.
    pub fn component(&self, name: &str) -> Result<PathBuf> {
        let class = self.component_class(name);
        let dir = self.path.join(name);
        match class {
            Some(_) if dir.is_dir() => Ok(dir),
            Some(class) => Err(Error::MissingFile {
                path: dir,
                hint: format!(
                    "model_index.json lists it as {class}; the folder is not a complete download"
                ),
            }),
            None => Err(Error::Config {
                path: self.path.join("model_index.json"),
                what: format!(
                    "no component \"{name}\" in this {}, but it is needed; it lists {}",
                    self.class_name,
                    self.components().collect::<Vec<_>>().join(", ")
                ),
            }),
        }
    }

    /// The class of a component as `model_index.json` gives it, such as `UNet2DConditionModel`;
    /// `None` when the pipeline has no such component.
    pub fn component_class(&self, name: &str) -> Option<&str> {
        self.index.get(name)?.as_array()?.get(1)?.as_str()
    }

    /// The names of the components that are present according to `model_index.json`.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str).filter(|name| self.component_class(name).is_some())
    }

    /// The hash that names this model in safety records; see [`content_hash`].
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn hash(&self) -> Result<String> {
        content_hash(&self.path)
    }
}

/// SHA-256, in hex, of everything in `dir` that decides what the model computes.
///
/// It covers every `.json`, `.txt` and `.safetensors` file, hidden ones aside, in the order of their paths
/// relative to `dir`: for each the path, a zero byte, the length as eight little-endian bytes, and the
/// content. Where the folder lies and when its files were written does not matter.
///
/// # Errors
/// When a file or folder cannot be read, or there is nothing to hash.
pub fn content_hash(dir: &Path) -> Result<String> {
    let mut files = Vec::new();
    collect(dir, "", DEEPEST, &mut files)?;
    files.sort();
    if files.is_empty() {
        let hint = "no model files to hash here; give the folder of a model";
        return Err(Error::MissingFile { path: dir.join("config.json"), hint: hint.into() });
    }
    let mut hash = Sha256::new();
    for name in &files {
        hash_file(&mut hash, dir, name).map_err(|e| Error::unreadable(&dir.join(name), e))?;
    }
    Ok(hex::encode(hash.finalize()))
}

fn hash_file(hash: &mut Sha256, dir: &Path, name: &str) -> std::io::Result<()> {
    let mut file = fs::File::open(dir.join(name))?;
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

/// Adds the paths of the files to hash below `dir`, relative to the root and with `/` between names.
fn collect(dir: &Path, prefix: &str, depth: usize, files: &mut Vec<String>) -> Result<()> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    for entry in entries.map_err(|e| Error::unreadable(dir, e))? {
        let path = entry.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| !n.starts_with('.'))
        else {
            continue;
        };
        let relative = format!("{prefix}{name}");
        if path.is_dir() {
            if depth == 0 {
                let what = "folders nested too deeply for a model; is there a link in a circle?";
                return Err(Error::Malformed { path, what: what.into() });
            }
            collect(&path, &format!("{relative}/"), depth - 1, files)?;
        } else if path.extension().is_some_and(|e| HASHED.iter().any(|kind| e == *kind)) {
            files.push(relative);
        }
    }
    Ok(())
}
