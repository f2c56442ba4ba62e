//! Models in a Hugging Face cache, by their repository's id, by the repository's folder in the
//! cache, or by a snapshot's.
//!
//! The cache (`HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`) has a folder
//! `models--org--name` for each repository: `refs/main` names a commit, `snapshots/<commit>` is the
//! model. Nothing is ever fetched.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::read_text;
use crate::{Error, ModelFolder, Result};

/// Between the parts of a repository's id in the name of its folder.
const BETWEEN: &str = "--";
const PREFIX: &str = "models--";
/// Longest id, as the hub has it.
const LONGEST_ID: usize = 96;
/// Most models of a cache in a message.
const SHOWN: usize = 8;

impl ModelFolder {
    /// The model that `given` stands for: a folder, or in the caches of this process' environment a
    /// repository's id such as `org/name`.
    ///
    /// # Errors
    /// [`Error::MissingFile`] if there is no such folder or no such repository in a cache.
    pub fn find(given: &Path) -> Result<Self> {
        Self::find_in(given, &caches(|name| std::env::var_os(name)))
    }

    fn find_in(given: &Path, caches: &[PathBuf]) -> Result<Self> {
        if given.exists() {
            return of_folder(given);
        }
        let looked =
            || caches.iter().map(|c| c.display().to_string()).collect::<Vec<_>>().join(", ");
        let Some(folder) = id(given).map(|id| format!("{PREFIX}{}", id.replace('/', BETWEEN)))
        else {
            let hint =
                "give the folder of a model, or the id org/name of one in a Hugging Face cache";
            return Err(Error::MissingFile { path: given.to_owned(), hint: hint.into() });
        };
        match caches.iter().map(|cache| cache.join(&folder)).find(|dir| dir.is_dir()) {
            Some(repository) => Ok(Self::new(&snapshot(&repository)?)),
            None => Err(Error::MissingFile {
                path: given.to_owned(),
                hint: format!(
                    "and no model of that id in a Hugging Face cache (looked in {}); fetch it with \
                     `hf download {}` or give a folder",
                    looked(),
                    given.display()
                ),
            }),
        }
    }

    /// The model's name, for people and requests: that of its folder, or of its repository where
    /// the folder is a snapshot in a Hugging Face cache.
    ///
    /// # Errors
    /// [`Error::MissingFile`] if the folder is not there or has no name.
    pub fn name(&self) -> Result<String> {
        let path = self.path();
        let full = path.canonicalize().map_err(|error| Error::unreadable(&path, error))?;
        let name = repository(&full).or_else(|| full.file_name()?.to_str().map(str::to_owned));
        name.ok_or_else(|| Error::MissingFile {
            path,
            hint: "a folder without a name in UTF-8 is no model's folder".into(),
        })
    }
}

/// The caches in the order in which they are looked into, of an environment.
fn caches(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let home = env("HOME").map(PathBuf::from);
    let set = |name: &str| {
        let path = PathBuf::from(env(name).filter(|value| !value.is_empty())?);
        // Python expands it, shells do not within quotes.
        match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => Some(home.join(rest)),
            _ => Some(path),
        }
    };
    let hub = |home: PathBuf| home.join("huggingface").join("hub");
    // As huggingface_hub: the first that is set is the cache, and there is one.
    [
        set("HF_HUB_CACHE"),
        set("HUGGINGFACE_HUB_CACHE"),
        set("HF_HOME").map(|home| home.join("hub")),
        set("XDG_CACHE_HOME").map(hub),
        set("HOME").map(|home| hub(home.join(".cache"))),
    ]
    .into_iter()
    .flatten()
    .take(1)
    .collect()
}

/// A repository's id: two names and a slash.
fn id(given: &Path) -> Option<&str> {
    let text = given.to_str().filter(|text| text.len() <= LONGEST_ID)?;
    let (owner, name) = text.split_once('/')?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_name = |part: &str| {
        !part.is_empty()
            && part.chars().all(allowed)
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains(BETWEEN)
    };
    [owner, name].into_iter().all(is_name).then_some(text)
}

/// What a folder that exists stands for.
fn of_folder(dir: &Path) -> Result<ModelFolder> {
    if dir.join("snapshots").is_dir() && dir.join("refs").is_dir() {
        return Ok(ModelFolder::new(&snapshot(dir)?));
    }
    let names = ModelFolder::new(dir).names();
    let models: Vec<String> =
        names.iter().filter_map(|name| name.strip_prefix(PREFIX)).map(to_id).collect();
    if !models.is_empty() {
        let more = if models.len() > SHOWN { " and more" } else { "" };
        let listed = models[..models.len().min(SHOWN)].join(", ");
        let what = format!("this is a Hugging Face cache; give one of its models: {listed}{more}");
        return Err(Error::malformed(dir, what));
    }
    Ok(ModelFolder::new(dir))
}

/// `org--name` as an id.
fn to_id(folder: &str) -> String {
    folder.replacen(BETWEEN, "/", 1)
}

/// The snapshot of a repository in a cache that `refs/main` names.
fn snapshot(repository: &Path) -> Result<PathBuf> {
    let main = repository.join("refs").join("main");
    let snapshots = repository.join("snapshots");
    if !main.is_file() {
        let names = ModelFolder::new(&snapshots).names();
        let hint = format!(
            "the download of this repository's main revision is not complete; give one of the folders \
             in {}: {}",
            snapshots.display(),
            names.join(", ")
        );
        return Err(Error::MissingFile { path: main, hint });
    }
    let commit = read_text(&main)?.trim().to_owned();
    if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(Error::malformed(&main, "it must name a commit"));
    }
    let dir = snapshots.join(&commit);
    if !dir.is_dir() {
        let hint =
            format!("refs/main names it; fetch the repository again ({})", repository.display());
        return Err(Error::MissingFile { path: dir, hint });
    }
    Ok(dir)
}

/// The name of the repository whose snapshot `dir` is.
fn repository(dir: &Path) -> Option<String> {
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let folder = snapshots.parent()?.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    // Without its owner: the name ends up in names of files.
    let name = folder.rsplit(BETWEEN).next().filter(|name| !name.is_empty())?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const COMMIT: &str = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14";

    /// A cache with one repository of two snapshots.
    fn cache() -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--runwayml--stable-diffusion-v1-5");
        for commit in [COMMIT, "0000"] {
            fs::create_dir_all(repository.join("snapshots").join(commit)).unwrap();
        }
        fs::create_dir(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        cache
    }

    fn find(given: impl AsRef<Path>, cache: &Path) -> std::result::Result<ModelFolder, String> {
        ModelFolder::find_in(given.as_ref(), &[cache.to_owned()]).map_err(|e| e.to_string())
    }

    #[test]
    fn an_id_a_repository_and_a_snapshot_are_one_model_of_the_repositorys_name() {
        let cache = cache();
        let repository = cache.path().join("models--runwayml--stable-diffusion-v1-5");
        let snapshot = repository.join("snapshots").join(COMMIT);
        let id = PathBuf::from("runwayml/stable-diffusion-v1-5");
        for given in [&id, &repository, &snapshot] {
            let found = find(given, cache.path()).unwrap();
            assert_eq!(found.path(), snapshot);
            assert_eq!(found.name().unwrap(), "stable-diffusion-v1-5");
        }
        let other = find(repository.join("snapshots/0000"), cache.path()).unwrap();
        assert!(other.path().ends_with("0000"), "a snapshot that is given is taken");
        fs::write(repository.join("refs/main"), "0000\n").unwrap();
        assert!(find(&id, cache.path()).unwrap().path().ends_with("0000"), "refs/main decides");
    }

    #[test]
    fn what_is_not_there_says_where_it_was_looked_for() {
        let cache = cache();
        let refusal = |given: &Path| find(given, cache.path()).unwrap_err();
        let absent = refusal(Path::new("org/absent"));
        assert!(absent.contains("hf download org/absent"), "{absent}");
        assert!(absent.contains(&cache.path().display().to_string()), "{absent}");
        for none in ["", "a/b/c", "../x", "a/..", ".a/b", "a/b c", "absent-folder", "a/b--c"] {
            let message = refusal(Path::new(none));
            assert!(!message.contains("download"), "{none}: {message}");
        }
        let whole = refusal(cache.path());
        assert!(
            whole.contains("give one of its models: runwayml/stable-diffusion-v1-5"),
            "{whole}"
        );

        let repository = cache.path().join("models--runwayml--stable-diffusion-v1-5");
        for (main, part) in [("../../x", "must name a commit"), ("12ab", "12ab: no such file")] {
            fs::write(repository.join("refs/main"), main).unwrap();
            let message = refusal(&repository);
            assert!(message.contains(part), "{message}");
        }
        fs::remove_file(repository.join("refs/main")).unwrap();
        let partial = refusal(&repository);
        assert!(partial.contains("not complete") && partial.contains(COMMIT), "{partial}");
    }

    #[test]
    fn the_environment_names_the_cache() {
        let of = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> =
                set.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect();
            let env = |name: &str| set.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
            caches(env).first().map(|cache| cache.display().to_string()).unwrap_or_default()
        };
        let home = ("HOME", "/home/me");
        assert_eq!(of(&[home]), "/home/me/.cache/huggingface/hub");
        assert_eq!(of(&[home, ("HF_HOME", "/data/hf")]), "/data/hf/hub");
        assert_eq!(of(&[home, ("XDG_CACHE_HOME", "/c")]), "/c/huggingface/hub");
        assert_eq!(of(&[("HF_HOME", "/a"), ("HF_HUB_CACHE", "/b")]), "/b");
        assert_eq!(of(&[home, ("HF_HUB_CACHE", "")]), "/home/me/.cache/huggingface/hub");
        assert_eq!(of(&[home, ("HF_HOME", "~/hf")]), "/home/me/hf/hub");
        assert_eq!(of(&[]), "");
    }
}
