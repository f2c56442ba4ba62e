//! Reads safetensors files and holds every key to account.
//!
//! A network asks a [`Scope`] for its tensors by name and shape. Whatever does not fit is written down and
//! loading goes on, so that [`load`] can name every missing, unexpected, mis-shaped and mistyped
//! key at once. Files are read tensor by tensor: at no time is a whole file in memory.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::config::not_json;
use crate::error::KeyProblems;
use crate::variants::weight_files;
use crate::{Error, ModelFolder, Result};

/// Keys that old versions of transformers saved although no network needs them.
const IGNORABLE: [&str; 3] = [
    "embeddings.position_ids",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
];
/// A safetensors header larger than this is a corrupt file (the format's own limit).
const LARGEST_HEADER: u64 = 100_000_000;
/// Numbers that may stand in for keys that do not fit, in all, beside as many as the files hold. A config
/// that asks for more is not that of these files, and its list of problems is long enough.
const STAND_INS: usize = 1 << 16;

/// Opens the weights of `folder`, hands them to `build`, and returns what it built if every key was used and
/// every key it asked for was there.
///
/// `stem` is `model` in transformers folders and `diffusion_pytorch_model` in diffusers folders;
/// which files of that stem are taken, [`crate::variants`] says.
///
/// # Errors
/// [`Error::Weights`] with the whole list of problems; [`Error::Malformed`] for a file that is cut
/// short or is not safetensors.
pub(crate) fn load<T>(
    folder: &ModelFolder,
    stem: &str,
    device: &Device,
    build: impl FnOnce(&Scope<'_>) -> Result<T>,
) -> Result<T> {
    load_renamed(folder, stem, device, |_| None, build)
}

/// [`load`] of files with other names: `alias` says where a key is that `build` asks for, `None`
/// under its own name.
pub(crate) fn load_renamed<T>(
    folder: &ModelFolder,
    stem: &str,
    device: &Device,
    alias: fn(&str) -> Option<Alias>,
    build: impl FnOnce(&Scope<'_>) -> Result<T>,
) -> Result<T> {
    let weights = Weights { alias, ..Weights::open(folder, stem, device)? };
    let built = build(&Scope { weights: &weights, prefix: String::new() })?;
    weights.finish()?;
    Ok(built)
}

/// Where the files keep a tensor.
pub(crate) struct Alias {
    pub(crate) name: String,
    pub(crate) part: Part,
}

/// What of the files' tensor is the one asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// The matrix the other way around.
    Transposed,
    /// One third of its rows.
    Third(usize),
}

impl Part {
    /// The shape in the files of a tensor of `shape`.
    fn stored(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Self::Whole => shape.to_vec(),
            Self::Transposed => shape.iter().rev().copied().collect(),
            Self::Third(_) => shape.iter().enumerate().map(|(i, n)| n * [3, 1][i.min(1)]).collect(),
        }
    }

    /// The part of a tensor of the files that is asked for.
    fn of(self, stored: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Whole => stored.clone(),
            Self::Transposed => stored.t()?.contiguous()?,
            Self::Third(index) => {
                let rows = stored.dim(0)? / 3;
                stored.narrow(0, index * rows, rows)?.contiguous()?
            }
        })
    }
}

/// One tensor as its file's header describes it.
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Position of the first byte, counted from the start of the file.
    start: u64,
    bytes: usize,
}

struct Weights {
    folder: ModelFolder,
    device: Device,
    names: Vec<String>,
    files: RefCell<Vec<File>>,
    entries: HashMap<String, Entry>,
    used: RefCell<BTreeSet<String>>,
    problems: RefCell<KeyProblems>,
    /// Numbers that may still stand in for keys.
    stand_ins: Cell<usize>,
    alias: fn(&str) -> Option<Alias>,
}

impl Weights {
    fn open(folder: &ModelFolder, stem: &str, device: &Device) -> Result<Self> {
        let names = weight_files(folder, stem)?;
        let mut files = Vec::with_capacity(names.len());
        let mut entries = HashMap::new();
        for (file, name) in names.iter().enumerate() {
            let path = folder.file(name);
            let mut opened =
                File::open(&path).map_err(|source| Error::unreadable(&path, source))?;
            let (start, header) = read_header(&path, &mut opened)?;
            for (key, info) in header.tensors() {
                let entry = Entry {
                    file,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    start: start + info.data_offsets.0 as u64,
                    bytes: info.data_offsets.1 - info.data_offsets.0,
                };
                if entries.insert(key.clone(), entry).is_some() {
                    return Err(Error::malformed(
                        &path,
                        format!("{key} is in another shard as well"),
                    ));
                }
            }
            files.push(opened);
        }
        let held: usize = entries.values().map(|entry: &Entry| entry.bytes / 2).sum();
        Ok(Self {
            folder: folder.clone(),
            device: device.clone(),
            stand_ins: Cell::new(STAND_INS + held),
            names,
            files: RefCell::new(files),
            entries,
            used: RefCell::default(),
            problems: RefCell::default(),
            alias: |_| None,
        })
    }

    /// The tensor `key` as f32, or zeros of the right shape after noting what is wrong with it.
    fn tensor(&self, key: String, shape: &[usize]) -> Result<Tensor> {
        match (self.alias)(&key) {
            None => self.stored(key, shape),
            Some(Alias { name, part }) => part.of(&self.stored(name, &part.stored(shape))?),
        }
    }

    /// The same by the name and shape of the files.
    fn stored(&self, key: String, shape: &[usize]) -> Result<Tensor> {
        let found = self.check(&key, shape).map(|entry| self.values(&key, entry)).transpose()?;
        self.used.borrow_mut().insert(key);
        if let Some(values) = found {
            return Ok(Tensor::from_vec(values, shape, &self.device)?);
        }
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let left = count.and_then(|count| self.stand_ins.get().checked_sub(count));
        self.stand_ins.set(left.ok_or_else(|| self.report())?);
        Ok(Tensor::zeros(shape, DType::F32, &self.device)?)
    }

    /// The entry of `key`, or `None` after noting why it does not fit.
    fn check(&self, key: &str, shape: &[usize]) -> Option<&Entry> {
        let mut problems = self.problems.borrow_mut();
        let Some(entry) = self.entries.get(key) else {
            problems.missing.push(format!("{key} {shape:?}"));
            return None;
        };
        let file = &self.names[entry.file];
        if entry.shape != shape {
            let found = &entry.shape;
            problems.misshaped.push(format!("{key} is {found:?} in {file}, expected {shape:?}"));
            return None;
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let found = entry.dtype;
            let problem = format!("{key} is {found:?} in {file}, expected F32, F16 or BF16");
            problems.unusable.push(problem);
            return None;
        }
        Some(entry)
    }

    fn values(&self, key: &str, entry: &Entry) -> Result<Vec<f32>> {
        let name = &self.names[entry.file];
        let mut bytes = vec![0; entry.bytes];
        let file = &mut self.files.borrow_mut()[entry.file];
        file.seek(SeekFrom::Start(entry.start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| Error::unreadable(&self.folder.path().join(name), source))?;
        let values = to_f32(entry.dtype, &bytes);
        if values.iter().any(|value| !value.is_finite()) {
            let problem = format!("{key} in {name} holds NaN or infinity");
            self.problems.borrow_mut().unusable.push(problem);
        }
        Ok(values)
    }

    /// Notes the keys nobody asked for, and refuses the files if anything was noted.
    fn finish(&self) -> Result<()> {
        let used = self.used.borrow();
        let unexpected: BTreeMap<_, _> = self
            .entries
            .iter()
            .filter(|(key, _)| !used.contains(*key) && !IGNORABLE.contains(&key.as_str()))
            .map(|(key, entry)| (key, (&entry.shape, &self.names[entry.file])))
            .collect();
        self.problems.borrow_mut().unexpected = unexpected
            .iter()
            .map(|(key, (shape, file))| format!("{key} {shape:?} in {file}"))
            .collect();
        if self.problems.borrow().is_empty() { Ok(()) } else { Err(self.report()) }
    }

    fn report(&self) -> Error {
        let path = match self.names.as_slice() {
            [only] => self.folder.path().join(only),
            _ => self.folder.path(),
        };
        Error::Weights { path, keys: Box::new(self.problems.borrow().clone()) }
    }
}

/// A prefix into the weights of one network, as `down_blocks.0.resnets.1.`.
pub(crate) struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Scope<'_> {
    /// The scope one name further down.
    pub(crate) fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: format!("{}{name}.", self.prefix) }
    }

    /// Where the network's tensors go.
    pub(crate) fn device(&self) -> &Device {
        &self.weights.device
    }

    /// Whether the files hold this key.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.weights.entries.contains_key(&format!("{}{name}", self.prefix))
    }

    /// The tensor `name` of this scope as contiguous f32 on the network's device.
    ///
    /// A key that is missing or does not fit is noted, and zeros stand in for it until [`load`]
    /// refuses the network.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.tensor(format!("{}{name}", self.prefix), shape)
    }
}

/// Reads a safetensors header; returns where the data starts, too. Checks that the file has every byte that
/// the header promises.
fn read_header(path: &Path, file: &mut File) -> Result<(u64, Metadata)> {
    let length = file.metadata().map_err(|source| Error::unreadable(path, source))?.len();
    let short = |wanted: u64| {
        let reason = format!(
            "truncated: {length} bytes where the header asks for {wanted}; fetch the file again"
        );
        Error::malformed(path, reason)
    };
    let mut size = [0; 8];
    if length < 8 {
        return Err(short(8));
    }
    file.read_exact(&mut size).map_err(|source| Error::unreadable(path, source))?;
    let size = u64::from_le_bytes(size);
    if size > LARGEST_HEADER {
        return Err(Error::malformed(path, "not a safetensors file: its header length is absurd"));
    }
    if length < 8 + size {
        return Err(short(8 + size));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(|source| Error::unreadable(path, source))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| {
        let why = if error.is_data() { "it describes no tensors".into() } else { not_json(&error) };
        Error::malformed(path, format!("not a safetensors file: bad header: {why}"))
    })?;
    let wanted = 8 + size + header.data_len() as u64;
    if length < wanted {
        return Err(short(wanted));
    }
    if length > wanted {
        let reason = format!("{} bytes too long for its header", length - wanted);
        return Err(Error::malformed(path, reason));
    }
    Ok((8 + size, header))
}

/// Little-endian numbers as f32. `dtype` is one that [`Weights::check`] lets through.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let words = |bytes: &[u8]| -> Vec<u16> {
        bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
    };
    match dtype {
        Dtype::F16 => {
            let halves: Vec<f16> = words(bytes).into_iter().map(f16::from_bits).collect();
            halves.to_f32_vec()
        }
        Dtype::BF16 => words(bytes).into_iter().map(|w| bf16::from_bits(w).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
