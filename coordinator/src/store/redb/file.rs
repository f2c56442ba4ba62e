//! The file of the embedded store: opened with care, watched while it is in use, and opened again after
//! its disk has failed. redb does nothing more after an error of the disk until it is opened anew.

use std::{
    fmt, fs,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use ::redb::{Builder, Database, DatabaseError, StorageError};
use parking_lot::RwLock;

use crate::{place::Place, store::StoreError};

/// Opens the file at a path; one that is not there is made.
pub(super) type Opening = Arc<dyn Fn(&Path) -> Result<Database, DatabaseError> + Send + Sync>;

/// Bytes that a disk must take before a file on it is used again.
const ROOM: usize = 1 << 20;

/// Memory for pages of the file; redb would take a gibibyte before it forgets any.
const CACHE: usize = 64 << 20;

/// A file on a disk.
pub(super) fn on_disk() -> Opening {
    Arc::new(|path| {
        let mut builder = Builder::new();
        // Checked whole: a spoiled page is found now, and not by a panic later.
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true).create(path)
    })
}

pub(super) struct DataFile {
    path: PathBuf,
    place: Place,
    opening: Opening,
    /// The database, or why there is none now.
    state: RwLock<Result<Database, String>>,
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataFile({})", self.path.display())
    }
}

impl DataFile {
    /// Opens the file at `path`. If there is none, it appears there once `prepare` has succeeded, so that a
    /// file without its tables is one that somebody else has spoiled.
    pub(super) fn open(
        path: &Path,
        opening: Opening,
        prepare: impl Fn(&Database) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let io = |error: io::Error| failed(format!("{}: {error}", path.display()));
        match fs::metadata(path) {
            Ok(found) if found.len() == 0 => return Err(failed(is_damaged(path, "it is empty"))),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let new = path.with_extension("redb.new");
                match fs::remove_file(&new) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
                    _ => {}
                }
                let database = open(&new, &opening).map_err(failed)?;
                prepare(&database)?;
                drop(database);
                fs::rename(&new, path).map_err(io)?;
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = fs::File::open(folder.unwrap_or(Path::new("."))).map_err(io)?;
                folder.sync_all().map_err(io)?;
            }
            Err(error) => return Err(io(error)),
        }
        let place = Place::new(path).map_err(io)?;
        let database = open(path, &opening).map_err(failed)?;
        prepare(&database).map_err(|error| match error {
            StoreError::Away { problem, .. } => failed(format!("{}: {problem}", path.display())),
            error => failed(is_damaged(path, &error.to_string())),
        })?;
        Ok(Self { path: path.to_owned(), place, opening, state: RwLock::new(Ok(database)) })
    }

    /// Runs `body` on the database; blocks. After an error of the disk the database is closed.
    pub(super) fn run<T>(
        &self,
        what: &'static str,
        body: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let away = |problem| StoreError::Away { what, problem };
        self.place.check().map_err(away)?;
        let done = match &*self.state.read() {
            Ok(database) => body(database),
            Err(problem) => return Err(away(problem.clone())),
        };
        let Err(StoreError::Away { problem, .. }) = done else { return done };
        let problem = format!("{}: {problem}", self.path.display());
        tracing::error!(problem, "the store is closed until its disk works again");
        *self.state.write() = Err(problem.clone());
        Err(away(problem))
    }

    /// Whether the database is open and its file where it was.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let away = |problem| StoreError::Away { what: "check", problem };
        self.place.check().map_err(away)?;
        // Held by nobody for long but by who opens it again.
        match self.state.try_read().as_deref() {
            Some(Ok(_)) => Ok(()),
            Some(Err(problem)) => Err(away(problem.clone())),
            None => Err(away(format!("{} is being opened", self.path.display()))),
        }
    }

    /// Opens a database again that was closed, if `prepare` can then write to it; blocks. Says whether it
    /// had to.
    pub(super) fn reopen(
        &self,
        prepare: impl Fn(&Database) -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        let away = |problem| StoreError::Away { what: "open", problem };
        self.place.check().map_err(away)?;
        if self.state.read().is_ok() {
            return Ok(false);
        }
        let mut state = self.state.write();
        has_room(&self.path).map_err(|error| away(format!("{}: {error}", self.path.display())))?;
        let database = open(&self.path, &self.opening).map_err(away)?;
        match prepare(&database) {
            Ok(()) => {
                *state = Ok(database);
                tracing::warn!(path = %self.path.display(), "the store is open again");
                Ok(true)
            }
            Err(error) => {
                let problem = format!("{}: {error}", self.path.display());
                *state = Err(problem.clone());
                Err(away(problem))
            }
        }
    }
}

/// Whether the disk takes more than a few pages: those that the file has free are soon used up.
fn has_room(path: &Path) -> io::Result<()> {
    let probe = path.with_extension("redb.room");
    let written = fs::File::create(&probe).and_then(|mut file| {
        file.write_all(&vec![0; ROOM])?;
        file.sync_all()
    });
    let removed = fs::remove_file(&probe);
    written.and(removed)
}

fn failed(problem: String) -> StoreError {
    StoreError::Backend { what: "open", problem }
}

/// What to do with a file that cannot be used.
fn is_damaged(path: &Path, problem: &str) -> String {
    let path = path.display();
    format!(
        "{path} is damaged ({problem}) and is left as it is; restore it from a backup, or move it away to begin \
         without jobs"
    )
}

/// Opens the file at `path`, or says what is wrong and what to do.
fn open(path: &Path, opening: &Opening) -> Result<Database, String> {
    let opened = catch_unwind(AssertUnwindSafe(|| opening(path)));
    let Ok(opened) = opened else { return Err(is_damaged(path, "redb panicked over it")) };
    opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => format!(
            "{} is held by another coordinator; stop it or use another --data-dir",
            path.display()
        ),
        DatabaseError::Storage(StorageError::Io(error))
            if !matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            format!("{}: {error}", path.display())
        }
        error => is_damaged(path, &error.to_string()),
    })
}
