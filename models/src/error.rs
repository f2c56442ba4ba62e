//! What can go wrong in this crate. Every message names what, where and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::device::DeviceName;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a network, a layer or a loader.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model folder lacks a file that its layout requires.
    #[error("{path}: no such file; {hint}", path = path.display())]
    MissingFile {
        /// The file that was looked for.
        path: PathBuf,
        /// What it is for, and how to get it.
        hint: String,
    },
    /// A file is there but cannot be read.
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is not what its name says: broken JSON, a truncated safetensors file, a bad tokenizer.
    #[error("{path}: {what}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// A configuration asks for something that this crate does not build, or contradicts itself.
    #[error("{path}: {what}", path = path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field, its value, and what is supported.
        what: String,
    },
    /// The weights of a file do not fit the network that its configuration describes.
    #[error(
        "{path}: the weights do not fit the configuration:{keys} take config.json and weights from the same model",
        path = path.display()
    )]
    Weights {
        /// The weights file (or folder).
        path: PathBuf,
        /// Every key that does not fit.
        keys: Box<KeyProblems>,
    },
    /// The caller passed something that the layer or network cannot take.
    #[error("{what}: {problem}")]
    InvalidInput {
        /// The layer, network or function.
        what: &'static str,
        /// What was passed and what is expected.
        problem: String,
    },
    /// A text is longer than what the model takes at once.
    #[error("the text has {tokens} tokens, the model takes {most}; shorten it")]
    TextTooLong {
        /// Tokens of the text, marks not counted.
        tokens: usize,
        /// The most it may have.
        most: usize,
    },
    /// A backward pass found no saved tensor: its forward pass ran with the tape off, or a backward
    /// pass was called twice or out of order.
    #[error(
        "the tape is empty: run the forward pass with `Tape::recording()` and one backward pass per forward pass, in reverse order"
    )]
    TapeEmpty,
    /// A device that is not there.
    #[error("device {device}: {why}")]
    Device {
        /// As asked for.
        device: DeviceName,
        /// What is missing.
        why: String,
    },
    /// Whoever asked for the pass has no use for it any longer.
    #[error("stopped")]
    Stopped,
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An [`Error::InvalidInput`].
    pub fn invalid(what: &'static str, problem: impl Into<String>) -> Self {
        Self::InvalidInput { what, problem: problem.into() }
    }

    /// An [`Error::Malformed`].
    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), what: what.into() }
    }

    /// An [`Error::Read`], or [`Error::MissingFile`] when that is why.
    pub(crate) fn unreadable(path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::MissingFile {
                path,
                hint: "is this a model in the diffusers or transformers layout, and complete?"
                    .into(),
            },
            _ => Self::Read { path, source },
        }
    }
}

/// The keys of a weights file that do not fit the network.
#[derive(Debug, Default, Clone)]
pub struct KeyProblems {
    /// Keys that the network needs, with their shapes.
    pub missing: Vec<String>,
    /// Keys in the file that the network does not know.
    pub unexpected: Vec<String>,
    /// Keys of another shape, with both shapes.
    pub misshaped: Vec<String>,
    /// Keys whose numbers are not finite, or not of a type that can be read (f32, f16, bf16).
    pub unusable: Vec<String>,
}

impl KeyProblems {
    /// Whether every key fits.
    pub fn is_empty(&self) -> bool {
        self.lists().into_iter().all(|(_, keys)| keys.is_empty())
    }

    fn lists(&self) -> [(&'static str, &[String]); 4] {
        [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("of another shape", &self.misshaped),
            ("unusable", &self.unusable),
        ]
    }
}

/// `" 2 missing: a, b; 1 unexpected: c;"`, without the empty lists.
impl fmt::Display for KeyProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lists = self.lists().into_iter().filter(|(_, keys)| !keys.is_empty());
        lists.try_for_each(|(label, keys)| {
            write!(f, " {} {label}: {};", keys.len(), keys.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_error_lists_every_key() {
        let keys = KeyProblems {
            missing: vec!["a.weight [2, 3]".into(), "a.bias [2]".into()],
            misshaped: vec!["b.weight is [1], expected [4]".into()],
            ..KeyProblems::default()
        };
        let e = Error::Weights { path: "unet/model.safetensors".into(), keys: keys.into() };
        let text = e.to_string();
        assert!(text.contains("2 missing: a.weight [2, 3], a.bias [2];"), "{text}");
        assert!(text.contains("1 of another shape: b.weight is [1], expected [4];"), "{text}");
        assert!(!text.contains("unexpected"), "{text}");
    }
}
