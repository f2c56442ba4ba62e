//! How commands say things. Everything that a person sees goes through here, where nothing that others
//! wrote (prompts, reasons, names, texts of pictures) can act on the terminal; `clippy.toml` keeps
//! `println!` and its like out of the rest.

use std::{
    collections::BTreeSet,
    fmt,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use fairlead_common::text;
use fairlead_proto::v1::ConceptScore;

/// Exit status of a program that writes to a pipe which nobody reads any longer, as shells have it.
const BROKEN_PIPE: i32 = 141;

/// Writes a line of results. Where nobody reads it any longer, as in `fairlead concepts | head`, the
/// process ends as other programs do: `println!` would panic.
pub(crate) fn write_line(line: fmt::Arguments<'_>) {
    write_results(&text::printable(&line.to_string()));
}

/// [`write_line`] for text of several lines that a command composed. What it holds of others has passed
/// [`text::printable`], or could write lines of its own.
pub(crate) fn write_lines(lines: &str) {
    write_results(&text::printable_lines(lines));
}

#[expect(clippy::disallowed_methods, reason = "the one place that writes to standard output")]
fn write_results(safe: &str) {
    match writeln!(std::io::stdout(), "{safe}") {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(BROKEN_PIPE),
        Err(error) => {
            tell!("error: standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// Writes a line to standard error: progress, errors. Where that is closed nobody is to be told.
pub(crate) fn tell_line(line: fmt::Arguments<'_>) {
    tell_lines(&text::printable(&line.to_string()));
}

/// [`tell_line`] for text of several lines that this program composed.
#[expect(clippy::disallowed_methods, reason = "the one place that writes to standard error")]
pub(crate) fn tell_lines(lines: &str) {
    let _ = writeln!(std::io::stderr(), "{}", text::printable_lines(lines));
}

/// [`write_line`] with the arguments of `println!`.
macro_rules! say {
    ($($argument:tt)*) => { $crate::output::write_line(format_args!($($argument)*)) };
}
pub(crate) use say;

/// [`tell_line`] with the arguments of `eprintln!`.
macro_rules! tell {
    ($($argument:tt)*) => { $crate::output::tell_line(format_args!($($argument)*)) };
}
pub(crate) use tell;

/// An error with its causes on one line; what a gRPC status wraps is reduced to its message.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = match cause.downcast_ref::<tonic::Status>() {
            Some(status) => format!("{} ({:?})", status.message(), status.code()),
            None => cause.to_string(),
        };
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

/// The concept closest to its gate, for one-line displays.
pub(crate) fn top_score(scores: &[ConceptScore]) -> Option<&ConceptScore> {
    scores.iter().max_by(|a, b| (a.z - a.gate).total_cmp(&(b.z - b.gate)))
}

/// A file name from a prompt: lower-case words joined by hyphens, at most 48 characters.
pub(crate) fn slug(text: &str) -> String {
    let mut slug = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        if c.is_alphanumeric() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        if slug.chars().count() >= 48 {
            break;
        }
    }
    let slug = slug.trim_matches('-');
    if slug.is_empty() { "image".to_owned() } else { slug.to_owned() }
}

/// Creates `folder` and returns it.
pub(crate) fn ensure_folder(folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create the output folder {}", folder.display()))?;
    Ok(folder.to_owned())
}

/// `name`, or if it is taken the first of `name-2`, `name-3`, ... that is not; takes it.
pub(crate) fn unused(name: &str, taken: &mut BTreeSet<String>) -> String {
    let numbered = (2..).map(|number: u64| format!("{name}-{number}"));
    let mut candidates = std::iter::once(name.to_owned()).chain(numbered);
    let free = candidates.find(|name| !taken.contains(name)).expect("the numbers do not end");
    taken.insert(free.clone());
    free
}

/// Writes a file whole or not at all: a reader never sees half of it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, bytes)
        .and_then(|()| std::fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file whole that its owner alone can read.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    // Others may not read a temporary file from the moment it is made.
    tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
        .and_then(|mut file| file.write_all(bytes).map(|()| file))
        .and_then(|file| Ok(file.persist(path)?))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slugs_read_like_the_prompt() {
        assert_eq!(slug("A cat, and a kitchen knife!"), "a-cat-and-a-kitchen-knife");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("\u{1f52a}"), "image");
    }

    proptest! {
        #[test]
        fn slugs_are_safe_file_names(text in ".*") {
            let slug = slug(&text);
            prop_assert!(!slug.is_empty() && slug.chars().count() <= 48);
            prop_assert!(slug.chars().all(|c| c.is_alphanumeric() || c == '-'));
        }
    }
}
