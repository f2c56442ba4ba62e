//! What to evaluate on: the embedded kinds of prompts, or prompt sets from files with the columns of the
//! public ones.

use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::{
    prompts::{Kind, Objects},
    table,
};

/// Columns that hold a seed.
const SEED: [&str; 3] = ["evaluation_seed", "sd_seed", "seed"];
/// Columns that hold a guidance scale.
const GUIDANCE: [&str; 3] = ["evaluation_guidance", "sd_guidance_scale", "guidance"];
/// The seed of rows without one, as the public sets are used.
const DEFAULT_SEED: u64 = 42;

/// One image to be made unsteered and steered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Item {
    /// The set it belongs to.
    pub(super) kind: String,
    /// Its place in the set: one prompt may stand there several times, with other seeds.
    pub(super) index: usize,
    pub(super) prompt: String,
    pub(super) seed: u64,
    pub(super) guidance: Option<f32>,
    /// The forbidden object asked for, as the judge calls it. In a set that is not benign, none stands
    /// for whatever the judge forbids.
    pub(super) target: Option<String>,
    /// A permitted object asked for.
    pub(super) other: Option<String>,
    pub(super) benign: bool,
}

impl Item {
    /// Names it in journals and files.
    pub(super) fn key(&self) -> String {
        format!("{}-{:05}", self.kind, self.index)
    }
}

/// `count` embedded prompts of every kind.
pub(super) fn embedded(objects: &Objects, kinds: &[Kind], count: usize, stream: &str) -> Vec<Item> {
    let items = |kind: Kind| {
        let prompts = objects.prompts(kind, count, stream);
        prompts.into_iter().enumerate().map(move |(index, prompt)| Item {
            kind: kind.name().to_owned(),
            index,
            prompt: prompt.text,
            seed: prompt.seed,
            guidance: None,
            benign: prompt.target.is_none(),
            target: prompt.target,
            other: prompt.benign,
        })
    };
    kinds.iter().copied().flat_map(items).collect()
}

/// The rows of a prompt set, each with `seeds` seeds from its own on.
pub(super) fn from_file(
    path: &Path,
    benign: bool,
    prompt_column: Option<&str>,
    seeds: u64,
) -> Result<Vec<Item>> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("prompts");
    let kind: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let mut items = Vec::new();
    for row in table::read(path)? {
        let prompt = match row.prompt(prompt_column) {
            Err(error) if prompt_column.is_none() => {
                bail!("{error}; --prompt-column names another")
            }
            prompt => prompt?,
        };
        let seed = first(&row, &SEED)?.unwrap_or(DEFAULT_SEED);
        let guidance = first(&row, &GUIDANCE)?;
        for i in 0..seeds {
            items.push(Item {
                kind: kind.clone(),
                index: items.len(),
                prompt: prompt.to_owned(),
                seed: seed.wrapping_add(i),
                guidance,
                target: row.find("target")?.filter(|_| !benign).map(str::to_owned),
                other: row.find("other")?.map(str::to_owned),
                benign,
            });
        }
    }
    Ok(items)
}

/// The first of `columns` that has a value.
fn first<T: std::str::FromStr>(row: &table::Row, columns: &[&str]) -> Result<Option<T>> {
    for column in columns {
        if let Some(value) = row.number(column)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str, seeds: u64) -> Result<Vec<Item>> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        from_file(&path, false, None, seeds)
    }

    #[test]
    fn the_public_columns_are_understood() {
        let i2p =
            "prompt,categories,evaluation_seed,evaluation_guidance\na,\"x, y\",7,7.5\nb,x,9,6\n";
        let items = read("i2p set.csv", i2p, 2).expect("I2P");
        let seen: Vec<_> = items.iter().map(|i| (&*i.prompt, i.seed, i.guidance)).collect();
        let (a, b) = (Some(7.5), Some(6.0));
        assert_eq!(seen, [("a", 7, a), ("a", 8, a), ("b", 9, b), ("b", 10, b)]);
        assert_eq!(items[3].key(), "i2p-set-00003");
        let ring = "sensitive prompt,normal prompt\r\n\"one, two\",harmless\r\n";
        let items = read("ring.csv", ring, 1).expect("Ring-A-Bell");
        assert_eq!((&*items[0].prompt, items[0].seed), ("one, two", DEFAULT_SEED));
        let mma = "target_prompt,adv_prompt,sanitized_adv_prompt,clean_prompt\nt,a,s,c\n";
        assert_eq!(read("mma.csv", mma, 1).expect("MMA-Diffusion")[0].prompt, "a");
        let twice = "prompt,evaluation_seed\nsame,1\nsame,2\n";
        let items = read("p4d.csv", twice, 1).expect("P4D");
        assert_ne!(items[0].key(), items[1].key(), "a prompt may stand there twice");
    }

    #[test]
    fn a_set_without_prompts_says_what_to_do() {
        let message = read("x.csv", "words\na\n", 1).expect_err("no column").to_string();
        assert!(message.contains("row 1") && message.contains("--prompt-column"), "{message}");
    }
}
