//! The tape: what a forward pass saves for its backward pass.
//!
//! Every layer pushes what its input gradient needs and nothing more; the backward pass pops in
//! reverse order, so memory falls as it goes. No weight is ever on the tape.
//!
//! The tape goes through every layer, so it also carries what stops a pass: layers that compute much ask
//! it before they begin.

use std::{fmt, sync::Arc};

use candle_core::Tensor;

use crate::{Error, Result};

/// A stack of saved tensors, or nothing at all when no gradient is wanted.
pub struct Tape {
    stack: Option<Vec<Tensor>>,
    stop: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stack, stop } = self;
        f.debug_struct("Tape").field("stack", stack).field("can_stop", &stop.is_some()).finish()
    }
}

impl Tape {
    /// A tape that records: a backward pass may follow.
    pub fn recording() -> Self {
        Self { stack: Some(Vec::new()), stop: None }
    }

    /// A tape that saves nothing: for forward passes alone.
    pub fn off() -> Self {
        Self { stack: None, stop: None }
    }

    /// The same tape for passes that end with [`Error::Stopped`] once `stop` says so.
    pub fn stopped_by(self, stop: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { stop: Some(Arc::new(stop)), ..self }
    }

    /// Asked by a layer before it computes.
    ///
    /// # Errors
    /// [`Error::Stopped`] once the pass is to end.
    pub fn go_on(&self) -> Result<()> {
        match &self.stop {
            Some(stop) if stop() => Err(Error::Stopped),
            _ => Ok(()),
        }
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
