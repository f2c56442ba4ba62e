//! Working memory and output memory of the kernels.

use std::cell::RefCell;
use std::mem::MaybeUninit;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` a buffer of `len` floats with arbitrary contents. The thread keeps the buffer for its next
/// call, so steady work allocates nothing.
pub(crate) fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

/// An output that nobody has written yet.
pub(crate) type Unset = [MaybeUninit<f32>];

/// A vector of `len` floats that `fill` writes. It is not cleared before: on large tensors that takes as
/// long as an activation.
///
/// # Safety
/// `fill` writes every element.
pub(crate) unsafe fn written(len: usize, fill: impl FnOnce(&mut Unset)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is there, and the caller promises that all elements are written.
    unsafe { values.set_len(len) };
    values
}

/// A pointer to an output that several tasks write at once, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: a `Shared` is only written through, and every user of it documents why the elements that its
// tasks write are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Shares a slice that outlives the tasks.
    pub(crate) fn new(out: &mut [f32]) -> Self {
        Self(out.as_mut_ptr())
    }

    /// The elements from `offset` on.
    ///
    /// # Safety
    /// `offset` is within the slice that was shared.
    pub(crate) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller stays within one allocation.
        unsafe { self.0.add(offset) }
    }
}
