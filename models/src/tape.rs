//! The tape: what a forward pass saves for its backward pass.
//!
//! Every layer pushes what its input gradient needs and nothing more; the backward pass pops in
//! reverse order, so memory falls as it goes. No weight is ever on the tape.

use candle_core::Tensor;

use crate::{Error, Result};

/// A stack of saved tensors, or nothing at all when no gradient is wanted.
#[derive(Debug)]
pub struct Tape {
    stack: Option<Vec<Tensor>>,
}

impl Tape {
    /// A tape that records: a backward pass may follow.
    pub fn recording() -> Self {
        Self { stack: Some(Vec::new()) }
    }

    /// A tape that saves nothing: for forward passes alone.
    pub fn off() -> Self {
        Self { stack: None }
    }

    /// Whether [`Tape::push`] saves anything.
    pub fn is_recording(&self) -> bool {
        self.stack.is_some()
    }

    /// How many tensors are saved: 0 after a complete backward pass.
    pub fn len(&self) -> usize {
        self.stack.as_ref().map_or(0, Vec::len)
    }

    /// Whether nothing is saved.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Saves a tensor (a reference to its storage, no copy) when the tape records.
    pub fn push(&mut self, t: &Tensor) {
        if let Some(stack) = &mut self.stack {
            stack.push(t.clone());
        }
    }

    /// Takes the tensor saved last.
    ///
    /// # Errors
    /// [`Error::TapeEmpty`] when there is none.
    pub fn pop(&mut self) -> Result<Tensor> {
        self.stack.as_mut().and_then(Vec::pop).ok_or(Error::TapeEmpty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn last_in_first_out_and_empty_is_an_error() {
        let (a, b) =
            (Tensor::new(1f32, &Device::Cpu).unwrap(), Tensor::new(2f32, &Device::Cpu).unwrap());
        let mut tape = Tape::recording();
        tape.push(&a);
        tape.push(&b);
        assert_eq!(tape.pop().unwrap().to_scalar::<f32>().unwrap(), 2.0);
        assert_eq!(tape.pop().unwrap().to_scalar::<f32>().unwrap(), 1.0);
        assert!(matches!(tape.pop(), Err(Error::TapeEmpty)));
        let mut off = Tape::off();
        off.push(&a);
        assert!(off.is_empty() && matches!(off.pop(), Err(Error::TapeEmpty)));
    }
}
