//! Between candle's tensors and the kernels' slices.

use std::ops::Deref;

use candle_core::{CpuStorage, Device, Shape, Storage, StorageRef, Tensor};

use crate::{Error, Result};

/// The floats of a contiguous tensor in main memory.
pub(super) struct Floats<'a> {
    storage: StorageRef<'a>,
    range: (usize, usize),
}

/// Reads a tensor that is `f32`, contiguous and on the CPU.
pub(super) fn floats(t: &Tensor) -> Result<Floats<'_>> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some(range)) => Ok(Floats { storage, range }),
        _ => Err(Error::invalid(
            "kernel",
            format!("{t:?} is not a contiguous f32 tensor on the CPU"),
        )),
    }
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.0..self.range.1],
            _ => unreachable!("`floats` accepts nothing else"),
        }
    }
}

/// A new tensor whose floats `fill` writes.
pub(super) fn build(shape: impl Into<Shape>, fill: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let shape = shape.into();
    let mut values = vec![0f32; shape.elem_count()];
    fill(&mut values);
    tensor(values, shape)
}

/// A tensor of these floats.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}
