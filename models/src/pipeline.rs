//! Pipeline folders as diffusers saves them: `model_index.json` and a folder for each component.

use std::path::PathBuf;

use serde_json::Value;

use crate::config::ConfigFile;
use crate::{Error, ModelFolder, Result};

const INDEX: &str = "model_index.json";

/// A folder with a `model_index.json`: a pipeline class and its components in folders of their own.
#[derive(Debug, Clone)]
pub struct PipelineFolder {
    folder: ModelFolder,
    class_name: String,
    index: ConfigFile,
    /// Names of the components that are there, with their classes.
    components: Vec<(String, String)>,
}

impl PipelineFolder {
    /// Reads `model_index.json` of `dir`. The components are looked at when they are asked for.
    ///
    /// # Errors
    /// When the file is missing, is not a JSON object, names no pipeline class, or an entry is
    /// neither a setting nor a component's library and class.
    pub fn open(dir: impl Into<ModelFolder>) -> Result<Self> {
        let folder = dir.into();
        if !folder.has(INDEX) {
            let hint = "give the folder of a diffusers pipeline, the one that holds unet, vae, \
                        text_encoder, tokenizer and scheduler";
            let path = folder.path().join(INDEX);
            return Err(Error::MissingFile { path, hint: hint.into() });
        }
        let index = folder.config(INDEX)?;
        let Some(class_name) = index.get("_class_name").and_then(Value::as_str).map(str::to_owned)
        else {
            return Err(Error::Malformed {
                path: folder.path().join(INDEX),
                what: "_class_name must be a string, such as \"StableDiffusionPipeline\"".into(),
            });
        };
        let components = components(&index)?;
        Ok(Self { folder, class_name, index, components })
    }

    /// The pipeline class, such as `StableDiffusionPipeline`.
    pub fn class_name(&self) -> &str {
        &self.class_name
    }

    /// The folder itself, with the list of what was read of it.
    pub fn folder(&self) -> &ModelFolder {
        &self.folder
    }

    /// Where the pipeline lies.
    pub fn path(&self) -> PathBuf {
        self.folder.path()
    }

    /// The folder of a component such as `unet`.
    ///
    /// # Errors
    /// When `model_index.json` does not name it, names it as absent (`[null, null]`), or its folder
    /// is not there.
    pub fn component(&self, name: &str) -> Result<ModelFolder> {
        let part = self.folder.at(name);
        match self.component_class(name) {
            Some(_) if part.path().is_dir() => Ok(part),
            Some(class) => Err(Error::MissingFile {
                path: part.path(),
                hint: format!("{INDEX} lists it as {class}; the folder is not a complete download"),
            }),
            None => Err(Error::Config {
                path: self.folder.path().join(INDEX),
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
        self.components.iter().find(|(known, _)| known == name).map(|(_, class)| class.as_str())
    }

    /// The names of the components that are present according to `model_index.json`.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.components.iter().map(|(name, _)| name.as_str())
    }

    /// Holds every component and setting of the pipeline to account: one of `used` is needed, one
    /// of `unused` is known and left out, which the returned notices say.
    ///
    /// # Errors
    /// When there is a component or a setting that nobody knows: it might change what the model
    /// computes.
    pub fn account(&self, used: &[&str], unused: &[(&str, &str)]) -> Result<Vec<String>> {
        let mut notices = Vec::new();
        for (name, class) in &self.components {
            if used.contains(&name.as_str()) {
                continue;
            }
            match unused.iter().find(|(known, _)| known == name) {
                Some((_, "")) => {}
                Some((_, why)) => {
                    notices.push(format!("the model's own {name} ({class}) is not used: {why}"));
                }
                None => {
                    return Err(self.index.unsupported(
                        name,
                        format!("{} of a {}", used.join(", "), self.class_name),
                    ));
                }
            }
        }
        let known: Vec<&str> = used.iter().copied().chain(unused.iter().map(|row| row.0)).collect();
        self.index.finish(&[&known[..], &["requires_safety_checker"]].concat())?;
        Ok(notices)
    }
}

/// The entries that are lists: library and class of a component that is there, or two nulls.
fn components(index: &ConfigFile) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for name in index.names() {
        let Some(value) = index.peek(name).filter(|_| !name.starts_with('_')) else { continue };
        match value {
            Value::Array(entry) => match entry.as_slice() {
                [Value::Null, Value::Null] => drop(index.get(name)),
                [Value::String(_), Value::String(class)] => {
                    found.push((name.to_owned(), class.clone()));
                }
                _ => {
                    let wanted = "a library and a class, or two nulls";
                    return Err(index.unsupported(name, wanted));
                }
            },
            Value::String(_) | Value::Object(_) => {
                return Err(index.unsupported(name, "a list of a library and a class"));
            }
            // Settings of the pipeline, which `account` goes through.
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    Ok(found)
}
