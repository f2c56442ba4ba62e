//! Concepts that were added while a node ran, kept in a folder for its next start: a pack for each set.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use crate::concepts::{ConceptSet, ConceptsError, files_of};

/// The sets in `folder`, which need not exist.
pub(crate) fn read(folder: &Path) -> Result<Vec<ConceptSet>, ConceptsError> {
    let files = match files_of(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        files => files.map_err(|source| ConceptsError::Read { path: folder.to_owned(), source })?,
    };
    files.into_iter().map(|file| ConceptSet::load(&[file])).collect()
}

/// Writes `set`, whole or not at all, under the hash that is its name, unless it is there; the folder is made if
/// missing.
pub(crate) fn write(folder: &Path, hash: &str, set: &ConceptSet) -> io::Result<()> {
    let whole = folder.join(format!("{hash}.toml"));
    if whole.exists() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    let part = folder.join(format!("{hash}.part"));
    let mut file = fs::File::create(&part)?;
    file.write_all(set.to_toml().as_bytes())?;
    file.sync_all()?;
    fs::rename(part, whole)?;
    fs::File::open(folder)?.sync_all()
}
