//! Files and folders that must stay what they were when the coordinator began to use them. A file that is
//! deleted can still be written to, and a folder that is deleted is made again by the next write: without
//! a look nobody would notice.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Where something was found.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    path: PathBuf,
    device: u64,
    /// Of a file. That of a folder is not always the same for as long as the folder is.
    inode: Option<u64>,
}

impl Place {
    /// A file or folder that is there.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        let inode = found.is_file().then_some(found.ino());
        // Absolute, so that messages say where it was.
        let path = std::path::absolute(path)?;
        Ok(Self { path, device: found.dev(), inode })
    }

    /// What has become of it, if it is not there any longer.
    pub(crate) fn check(&self) -> Result<(), String> {
        let path = self.path.display();
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
                "{path} is gone: it was deleted or unmounted while the coordinator used it; put it back, or \
                 stop the coordinator and restore the data folder from a backup"
            )),
            Err(error) => Err(format!("{path} cannot be looked at: {error}")),
            Ok(found)
                if found.dev() != self.device
                    || self.inode.is_some_and(|inode| inode != found.ino()) =>
            {
                Err(format!(
                    "{path} is another one than the coordinator has opened; put that one back, or restart the \
                     coordinator to use this one"
                ))
            }
            Ok(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deleted_or_replaced_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (folder, file) = (dir.path().join("folder"), dir.path().join("file"));
        fs::create_dir(&folder).expect("it is made");
        fs::write(&file, "one").expect("it is written");
        let places = [&folder, &file].map(|path| Place::new(path).expect("it is there"));
        places.iter().for_each(|place| place.check().expect("it is the same"));
        fs::write(&file, "another text").expect("it is written");
        places[1].check().expect("it is the same file");
        // Both are there at once, so that they are not the same.
        fs::write(dir.path().join("other"), "one").expect("it is written");
        fs::rename(dir.path().join("other"), &file).expect("it is moved");
        let replaced = places[1].check().expect_err("it is another");
        assert!(replaced.contains("another one") && replaced.contains("file"), "{replaced}");
        fs::remove_dir(&folder).expect("it is removed");
        let gone = places[0].check().expect_err("it is gone");
        assert!(gone.contains("is gone") && gone.contains("folder"), "{gone}");
    }
}
