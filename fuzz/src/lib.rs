//! Spoiled inputs for the tests of whatever reads bytes from outside.
//!
//! A test hands a valid input to [`spoiled`] and says in [`fuzz`] what must hold for anything that comes
//! out: a thousand cases in an ordinary run, and as many as fit into `FUZZ_SECONDS` where that is set
//! (`make fuzz`). What fails is shrunk and printed as bytes to paste into a plain test. A decoder that
//! hangs is ended and named by the test runner's own limit.
//!
//! Linking this crate replaces the global allocator with one that counts: it is for tests alone.

mod change;
mod png;

use std::{
    fmt,
    ops::Deref,
    panic::{self, AssertUnwindSafe},
    time::{Duration, Instant},
};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use change::Change;
pub use png::mend_png;

/// Inputs of an ordinary run, where `PROPTEST_CASES` does not say otherwise.
const CASES: u32 = 1_024;
/// Most changes of one input.
const CHANGES: usize = 6;
/// Longest input that has nothing to do with the valid one.
const UNRELATED: usize = 256;
/// What a decoder may hold for any input: buffers of fixed size, messages of errors.
const ALLOWANCE: usize = 1 << 20;
/// What it may hold for each byte of its input.
const PER_BYTE: usize = 256;

/// An input; its debug form is a byte string to paste.
#[derive(Clone)]
pub struct Bytes(Vec<u8>);

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

/// `valid` as it is or changed in some places, and now and then bytes that have nothing to do with it.
pub fn spoiled(valid: Vec<u8>) -> impl Strategy<Value = Bytes> {
    let changed = prop::collection::vec(any::<Change>(), 0..=CHANGES).prop_map(move |changes| {
        let mut bytes = valid.clone();
        changes.iter().for_each(|change| change.apply(&mut bytes));
        bytes
    });
    let unrelated = prop::collection::vec(any::<u8>(), 0..UNRELATED);
    prop_oneof![9 => changed, 1 => unrelated].prop_map(Bytes)
}

/// [`spoiled`] for decoders of text: what is not UTF-8 is replaced.
pub fn spoiled_text(valid: &str) -> impl Strategy<Value = String> + use<> {
    spoiled(valid.as_bytes().to_vec())
        .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Tries `check`, which panics where something does not hold, on many of `inputs`.
///
/// # Panics
/// With the smallest input found for which `check` panics.
pub fn fuzz<S: Strategy>(inputs: S, check: impl Fn(S::Value)) {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = CASES;
    }
    let mut runner = TestRunner::new(config);
    let end = Instant::now() + seconds();
    loop {
        let tried = runner.run(&inputs, |input| {
            check(input);
            Ok(())
        });
        if let Err(failure) = tried {
            panic!("{failure}");
        }
        if Instant::now() >= end {
            break;
        }
    }
}

fn seconds() -> Duration {
    let Ok(text) = std::env::var("FUZZ_SECONDS") else { return Duration::ZERO };
    let seconds = text.parse().expect("FUZZ_SECONDS is a whole number of seconds");
    Duration::from_secs(seconds)
}

/// What `decode` returns.
///
/// # Panics
/// If it took more memory at once, on its own thread, than an input of `length` bytes can be worth.
pub fn bounded<T>(length: usize, decode: impl FnOnce() -> T) -> T {
    bounded_by(ALLOWANCE + PER_BYTE * length, decode)
}

/// [`bounded`] by a limit of the decoder's own.
///
/// # Panics
/// If it took more than `limit` bytes at once, on its own thread.
pub fn bounded_by<T>(limit: usize, decode: impl FnOnce() -> T) -> T {
    let mut result = None;
    // A panic must not leave the counter behind in the middle of a measurement.
    let used = allocation_counter::measure(|| {
        result = Some(panic::catch_unwind(AssertUnwindSafe(decode)));
    });
    match result.expect("the measurement ran it") {
        Err(panicked) => panic::resume_unwind(panicked),
        Ok(value) => {
            let held = used.bytes_max;
            assert!(held <= limit as u64, "it held {held} bytes at once, allowed are {limit}");
            value
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A decoder with the usual mistakes: it believes the length that the input begins with.
    fn naive(bytes: &[u8]) -> Option<Vec<u8>> {
        let (length, data) = bytes.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(&data[..length.min(data.len())]);
        Some(out)
    }

    const VALID: &[u8] = b"\x05\0\0\0hello";

    #[test]
    fn a_length_that_is_believed_is_found() {
        let found = panic::catch_unwind(|| {
            fuzz(spoiled(VALID.to_vec()), |bytes| drop(bounded(bytes.len(), || naive(&bytes))));
        });
        let message = *found.expect_err("it must be found").downcast::<String>().expect("a text");
        assert!(message.contains("bytes at once") && message.contains("b\""), "{message}");
    }

    #[test]
    fn a_panic_is_found_and_measuring_goes_on() {
        for _ in 0..3 {
            let found = panic::catch_unwind(|| {
                fuzz(spoiled(VALID.to_vec()), |bytes| {
                    bounded(bytes.len(), || assert!(bytes.starts_with(b"\x05"), "another start"));
                });
            });
            assert!(found.is_err(), "it must be found");
        }
        assert_eq!(bounded(0, || 7), 7);
    }

    #[test]
    fn a_sound_decoder_passes_and_sees_the_valid_input_too() {
        let seen = std::cell::Cell::new(false);
        fuzz(spoiled(VALID.to_vec()), |bytes| {
            seen.set(seen.get() || &*bytes == VALID);
            bounded(bytes.len(), || bytes.to_vec());
        });
        assert!(seen.get());
    }
}
