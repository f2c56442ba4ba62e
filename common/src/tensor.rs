//! Tensors on the wire: `fairlead.v1.Tensor` to and from `f32` values.

use fairlead_proto::v1::{Datatype, Tensor};
use half::{f16, slice::HalfFloatSliceExt};

/// A tensor that does not hold what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The datatype is unset or unknown.
    #[error("tensor `{name}`: datatype {datatype} is not supported; send F16 (2) or F32 (1)")]
    Datatype {
        /// Name of the tensor.
        name: String,
        /// The number received.
        datatype: i32,
    },
    /// The shape is not the one expected.
    #[error("tensor `{name}`: shape {shape:?}, expected {expected}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// The shape received.
        shape: Vec<i64>,
        /// What was expected, for people.
        expected: String,
    },
    /// The bytes do not fit shape and datatype.
    #[error("tensor `{name}`: {bytes} bytes, but shape {shape:?} needs {needed}")]
    Bytes {
        /// Name of the tensor.
        name: String,
        /// The shape received.
        shape: Vec<i64>,
        /// Bytes received.
        bytes: usize,
        /// Bytes that shape and datatype need.
        needed: usize,
    },
}

/// Encodes row-major `values` of `shape` in `datatype` (F16 unless F32 is asked for).
pub fn encode(name: &str, shape: &[usize], values: &[f32], datatype: Datatype) -> Tensor {
    debug_assert_eq!(shape.iter().product::<usize>(), values.len());
    let (datatype, data) = match datatype {
        Datatype::F32 => (Datatype::F32, bytes(values, f32::to_le_bytes)),
        Datatype::F16 | Datatype::Unspecified => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            (Datatype::F16, bytes(&halves, f16::to_le_bytes))
        }
    };
    Tensor {
        name: name.to_owned(),
        datatype: datatype.into(),
        shape: shape.iter().map(|&side| side as i64).collect(),
        data,
    }
}

/// One after the other. Filling a buffer becomes a copy of memory, which collecting an iterator of bytes
/// does not.
fn bytes<T: Copy, const N: usize>(values: &[T], to_bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; N * values.len()];
    for (bytes, &value) in bytes.chunks_exact_mut(N).zip(values) {
        bytes.copy_from_slice(&to_bytes(value));
    }
    bytes
}

/// Decodes `tensor` into its shape and row-major values.
pub fn decode(tensor: &Tensor) -> Result<(Vec<usize>, Vec<f32>), TensorError> {
    let name = || tensor.name.clone();
    let size = match tensor.datatype() {
        Datatype::F32 => 4,
        Datatype::F16 => 2,
        Datatype::Unspecified => {
            return Err(TensorError::Datatype { name: name(), datatype: tensor.datatype });
        }
    };
    let shape = tensor
        .shape
        .iter()
        .map(|&side| usize::try_from(side).ok().filter(|&side| side > 0))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| TensorError::Shape {
            name: name(),
            shape: tensor.shape.clone(),
            expected: "positive sides".to_owned(),
        })?;
    let needed = shape.iter().try_fold(size, |product: usize, &side| product.checked_mul(side));
    if needed != Some(tensor.data.len()) {
        return Err(TensorError::Bytes {
            name: name(),
            shape: tensor.shape.clone(),
            bytes: tensor.data.len(),
            needed: needed.unwrap_or(usize::MAX),
        });
    }
    let values = match size {
        4 => tensor
            .data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        _ => {
            let halves = tensor.data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]));
            halves.collect::<Vec<_>>().to_f32_vec()
        }
    };
    Ok((shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use proptest::prelude::*;
    use prost::Message;

    proptest! {
        #[test]
        fn f32_round_trips_exactly(values in prop::collection::vec(any::<f32>(), 1..64)) {
            let tensor = encode("x", &[values.len()], &values, Datatype::F32);
            let (shape, back) = decode(&tensor).expect("it decodes");
            prop_assert_eq!(shape, vec![values.len()]);
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&back), bits(&values));
        }

        #[test]
        fn decoding_never_panics(
            datatype in -1i32..4,
            shape in prop::collection::vec(any::<i64>(), 0..5),
            data in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            if let Ok((shape, values)) = decode(&Tensor { name: "x".into(), datatype, shape, data }) {
                prop_assert_eq!(shape.iter().product::<usize>(), values.len());
            }
        }
    }

    #[test]
    fn f16_keeps_eleven_bits() {
        let tensor = encode("x", &[3], &[1.0, 0.333_333_34, -2.5], Datatype::F16);
        assert_eq!(tensor.data.len(), 6);
        let (_, values) = decode(&tensor).expect("it decodes");
        assert!((values[1] - 0.333_333_34).abs() < 2e-4 && values[0] == 1.0 && values[2] == -2.5);
    }

    #[test]
    fn lies_about_shape_and_type_are_refused() {
        let mut tensor = encode("x", &[2, 2], &[0.0; 4], Datatype::F32);
        tensor.shape = vec![2, 3];
        assert!(matches!(decode(&tensor), Err(TensorError::Bytes { needed: 24, .. })));
        tensor.shape = vec![-2, -2];
        assert!(matches!(decode(&tensor), Err(TensorError::Shape { .. })));
        tensor.datatype = 9;
        assert!(matches!(decode(&tensor), Err(TensorError::Datatype { datatype: 9, .. })));
    }

    #[test]
    fn spoiled_tensors_hold_what_they_say_or_are_refused_by_name() {
        let values: Vec<f32> = (0..48).map(|i| i as f32 / 48.0).collect();
        let valid = encode("pixels", &[1, 3, 4, 4], &values, Datatype::F16).encode_to_vec();
        fuzz(spoiled(valid), |bytes| {
            let Ok(tensor) = Tensor::decode(&*bytes) else { return };
            match bounded(bytes.len(), || decode(&tensor)) {
                Ok((shape, values)) => {
                    assert_eq!(shape.iter().product::<usize>(), values.len());
                    let size = if tensor.datatype() == Datatype::F32 { 4 } else { 2 };
                    assert_eq!(values.len() * size, tensor.data.len());
                }
                Err(error) => assert!(error.to_string().contains(&tensor.name), "{error}"),
            }
        });
    }
}
