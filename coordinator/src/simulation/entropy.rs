//! Where this process takes randomness from. Ids, keys, hash maps and the order in which `select!` looks at
//! its branches come from the system's; a run that can be repeated needs it to come from the seed.

use std::ffi::{c_uint, c_void};

use parking_lot::Mutex;
use rand::{RngCore, SeedableRng, rngs::StdRng};

static SEEDED: Mutex<Option<StdRng>> = Mutex::new(None);

/// From now on, everything in this process that asks the system for randomness gets it from `seed`.
pub(super) fn seed(seed: u64) {
    *SEEDED.lock() = Some(StdRng::seed_from_u64(seed));
}

/// Stands in for the C library's function in this test binary.
// SAFETY: the name and signature are those of getrandom(2), and it keeps that contract: at most `length`
// bytes from `buffer` on are written, and their number is returned.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    match &mut *SEEDED.lock() {
        // Some callers ask for nothing, to learn whether the call exists.
        Some(_) if length == 0 => 0,
        Some(rng) => {
            // SAFETY: the caller owns `length` bytes from `buffer` on.
            let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
            rng.fill_bytes(bytes);
            length.cast_signed()
        }
        // SAFETY: the arguments are the caller's own.
        None => unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize },
    }
}
