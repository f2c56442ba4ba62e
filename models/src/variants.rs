//! Which files of a folder hold a network's weights.
//!
//! diffusers and transformers save one network under many names: whole or in shards with an index,
//! and each of these as a *variant* such as `fp16`. The first of these that a folder has is loaded:
//!
//! | order | variant | whole | sharded: the index |
//! |---|---|---|---|
//! | 1 | none | `model.safetensors` | `model.safetensors.index.json` |
//! | 2 to 6 | `fp32`, `fp16`, `bf16`, `ema`, `non_ema` | `model.fp16.safetensors` | `model.safetensors.index.fp16.json`, `model.fp16.safetensors.index.json` |
//! | 7 | any other, if it is the only one | | |
//!
//! In each row the whole file comes before the index. The stem is `diffusion_pytorch_model` in
//! diffusers' folders.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::config::read_object;
use crate::{Error, ModelFolder, Result};

/// Variants in the order in which they are taken; the empty one has no name.
const ORDER: [&str; 6] = ["", "fp32", "fp16", "bf16", "ema", "non_ema"];
const WHOLE: &str = ".safetensors";
/// Ends of files that hold weights in formats that are not read.
const OTHER_FORMATS: [&str; 9] =
    [".bin", ".bin.index.json", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"];
/// Most names in a message.
const SHOWN: usize = 8;

/// One way to load the network.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    variant: String,
    name: String,
    is_index: bool,
}

/// The names of the safetensors files in `folder` to load: one file, or the shards its index lists.
pub(crate) fn weight_files(folder: &ModelFolder, stem: &str) -> Result<Vec<String>> {
    let names = folder.names();
    let mut candidates: Vec<Candidate> =
        names.iter().filter_map(|name| candidate(name, stem)).collect();
    let rank = |candidate: &Candidate| ORDER.iter().position(|known| *known == candidate.variant);
    let others = candidates.iter().filter(|candidate| rank(candidate).is_none());
    let others: BTreeSet<&str> = others.map(|candidate| candidate.variant.as_str()).collect();
    let is_only = others.len() == 1;
    candidates.retain(|candidate| is_only || rank(candidate).is_some());
    candidates
        .sort_by_key(|candidate| (rank(candidate).unwrap_or(ORDER.len()), candidate.is_index));
    match candidates.into_iter().next() {
        None => Err(nothing_to_load(folder, stem, &names)),
        Some(Candidate { name, is_index: true, .. }) => shards(&folder.file(&name)),
        Some(Candidate { name, .. }) => Ok(vec![name]),
    }
}

/// What the file `name` is to the network saved under `stem`, if anything.
fn candidate(name: &str, stem: &str) -> Option<Candidate> {
    let rest = name.strip_prefix(stem)?;
    let (variant, is_index) = match rest.strip_suffix(".json") {
        None => (rest.strip_suffix(WHOLE)?, false),
        Some(index) => match index.split_once(".safetensors.index")? {
            ("", after) => (after, true),
            (before, "") => (before, true),
            _ => return None,
        },
    };
    let variant = match variant {
        "" => "",
        named => named.strip_prefix('.').filter(|variant| !variant.is_empty())?,
    };
    // `model.fp16-00001-of-00002.safetensors` is a part, which its index names.
    if is_shard(variant) {
        return None;
    }
    Some(Candidate { variant: variant.to_owned(), name: name.to_owned(), is_index })
}

/// Whether a name ends as shards' names do: `-00001-of-00002`.
fn is_shard(name: &str) -> bool {
    let mut parts = name.rsplit('-');
    let is_number =
        |part: Option<&str>| part.is_some_and(|part| part.bytes().all(|b| b.is_ascii_digit()));
    is_number(parts.next()) && parts.next() == Some("of") && is_number(parts.next())
}

/// The error for a folder without weights that can be loaded; it names what is there instead.
fn nothing_to_load(folder: &ModelFolder, stem: &str, names: &[String]) -> Error {
    let ends = |name: &str, ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let is_weights = |name: &&String| ends(name, &OTHER_FORMATS) || name.contains(WHOLE);
    let found: Vec<&str> = names.iter().filter(is_weights).map(String::as_str).collect();
    let all = |format: &[&str]| !found.is_empty() && found.iter().all(|name| ends(name, format));
    let reason = if found.is_empty() {
        "the folder is not a complete download".to_owned()
    } else if all(&OTHER_FORMATS) {
        "the folder has weights in other formats only; save the model with safe_serialization=True"
            .to_owned()
    } else if found.iter().all(|name| name.starts_with(stem) && !is_index(name)) {
        let known = ORDER[1..].join(", ");
        format!(
            "it has variants of which none is known (those are {known}), or shards without their \
             index; keep one variant, whole"
        )
    } else {
        format!("none of its weights is called {stem}.safetensors or a variant of that")
    };
    let mut listed = found[..found.len().min(SHOWN)].join(", ");
    if found.len() > SHOWN {
        listed.push_str(&format!(" and {} more", found.len() - SHOWN));
    }
    let hint = if found.is_empty() { reason } else { format!("{reason}; found: {listed}") };
    Error::MissingFile { path: folder.path().join(format!("{stem}{WHOLE}")), hint }
}

fn is_index(name: &str) -> bool {
    name.contains(".index.")
}

/// The shard names that an index file lists, each once.
fn shards(index: &Path) -> Result<Vec<String>> {
    let fields = read_object(index)?;
    let bad =
        || Error::malformed(index, "weight_map must map every key to a file name in this folder");
    let map = fields.get("weight_map").and_then(Value::as_object).ok_or_else(bad)?;
    let mut names = BTreeSet::new();
    for value in map.values() {
        let name = value.as_str().ok_or_else(bad)?;
        if Path::new(name).file_name().is_none_or(|file| file != name) {
            return Err(bad());
        }
        names.insert(name.to_owned());
    }
    if names.is_empty() { Err(bad()) } else { Ok(names.into_iter().collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEM: &str = "model";

    /// A folder of empty files; an index lists one shard named as diffusers would.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let content = if is_index(name) { r#"{"weight_map": {"a": "shard"}}"# } else { "" };
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn chosen(names: &[&str]) -> String {
        let folder = folder(names);
        let files = weight_files(&folder.path().into(), STEM);
        files.map_or_else(|error| error.to_string(), |files| files.join(" "))
    }

    #[test]
    fn every_variant_is_found_in_the_documented_order() {
        let mut names = vec!["model.safetensors", "model.safetensors.index.json"];
        for variant in &ORDER[1..] {
            for name in [
                format!("model.{variant}.safetensors"),
                format!("model.safetensors.index.{variant}.json"),
            ] {
                names.push(name.leak());
            }
        }
        // A part of a variant is none by itself.
        names.push("model.fp16-00001-of-00002.safetensors");
        // Whatever lies in the folder first is taken; without it, the next.
        for (first, name) in names[..names.len() - 1].iter().enumerate() {
            let expected = if is_index(name) { "shard" } else { name };
            assert_eq!(chosen(&names[first..]), expected, "{name} is first");
        }
        assert_eq!(chosen(&["model.bf16.safetensors.index.json"]), "shard");
        assert_eq!(chosen(&["model.mine.safetensors"]), "model.mine.safetensors");
        assert_eq!(
            chosen(&["model.mine.safetensors", "model.ema.safetensors"]),
            "model.ema.safetensors"
        );
    }

    #[test]
    fn what_was_found_is_listed() {
        for (names, parts) in [
            (&[][..], &["model.safetensors: no such file", "complete download"][..]),
            (
                &["model.a.safetensors", "model.b.safetensors"],
                &["model.a.safetensors, model.b", "fp16"],
            ),
            (
                &["model.fp16-00001-of-00002.safetensors"],
                &["without their index", "00001-of-00002"],
            ),
            (&["pytorch_model.bin"], &["safe_serialization=True", "found: pytorch_model.bin"]),
            (&["unet.safetensors", "x.bin"], &["none of its weights", "unet.safetensors, x.bin"]),
        ] {
            let message = chosen(names);
            assert!(parts.iter().all(|part| message.contains(part)), "{names:?}: {message}");
        }
        let many: Vec<&str> = (0..20).map(|i| &*format!("{i:02}.bin").leak()).collect();
        assert!(chosen(&many).ends_with("07.bin and 12 more"), "{}", chosen(&many));
    }
}
