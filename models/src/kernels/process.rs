//! What holds for the whole process: who computes, and what becomes of freed memory.

use std::{
    env,
    ffi::{c_int, c_long},
};

// Links the library that defines `mi_option_set`.
use libmimalloc_sys as _;

/// `mi_option_purge_delay` of `mimalloc.h`: milliseconds until freed memory goes back to the system.
const PURGE_DELAY: c_int = 15;
/// Never.
const NEVER: c_long = -1;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// How many threads candle's own pool has.
const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";

/// Prepares a program that runs networks: freed memory is kept, and candle starts no threads of its own,
/// unless the environment variable `CANDLE_NUM_THREADS` gives it some. Call it first in `main`.
///
/// For elementwise operations candle 0.11 has a pool beside rayon's, whose threads wait for their next work
/// by spinning. The kernels of this crate compute in rayon's, so that on a machine with as many threads as
/// cores the one pool takes from the other more than the operations gain: an eighth of the time of an
/// energy with CLIP ViT-B/32.
///
/// # Safety
/// No other thread runs yet: the environment is changed.
pub unsafe fn prepare_process() {
    if env::var_os(CANDLE_THREADS).is_none() {
        // SAFETY: promised by the caller.
        unsafe { env::set_var(CANDLE_THREADS, "1") };
    }
    keep_freed_memory();
}

/// Has mimalloc, if it is the program's global allocator, keep freed memory instead of giving it back to the
/// system, as torch's caching allocator does on a GPU.
///
/// Activations of large images are allocated and freed at every layer; fetching their pages from the system
/// each time, which clears them, is a quarter of the time of a 256 px decoder gradient. The process then
/// stays as large as it has ever been.
fn keep_freed_memory() {
    // SAFETY: the function only stores a number in mimalloc's table of options, and 15 is within the table in
    // versions 2 and 3.
    unsafe { mi_option_set(PURGE_DELAY, NEVER) }
}
