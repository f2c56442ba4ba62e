//! What the allocator does with freed memory.

use std::ffi::{c_int, c_long};

// Links the library that defines `mi_option_set`.
use libmimalloc_sys as _;

/// `mi_option_purge_delay` of `mimalloc.h`: milliseconds until freed memory goes back to the system.
const PURGE_DELAY: c_int = 15;
/// Never.
const NEVER: c_long = -1;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// Has mimalloc, if it is the program's global allocator, keep freed memory instead of giving it back to the
/// system, as torch's caching allocator does on a GPU.
///
/// Activations of large images are allocated and freed at every layer; fetching their pages from the system
/// each time, which clears them, is a quarter of the time of a 256 px decoder gradient. The process then
/// stays as large as it has ever been. Call it once at the start of a program that runs networks.
pub fn keep_freed_memory() {
    // SAFETY: the function only stores a number in mimalloc's table of options, and 15 is within the table in
    // versions 2 and 3.
    unsafe { mi_option_set(PURGE_DELAY, NEVER) }
}
