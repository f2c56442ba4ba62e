//! Ways in which an input goes wrong: on the wire, on a disk, or on purpose.

use proptest::{prelude::*, sample::Index};

/// Values at the edges of what fields hold, in both byte orders.
const WORDS: [&[u8]; 9] = [
    &[0; 8],
    &[0xff; 4],
    &[0xff; 8],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0x7f, 0xff, 0xff, 0xff],
    &[0, 0, 0, 0, 0, 0, 0, 0x10],
    &[0x10, 0, 0, 0, 0, 0, 0, 0],
    &[0, 1, 0x86, 0xa0],
    // A varint of 2^63 and more.
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
];
/// The like in text.
const TEXTS: [&str; 18] = [
    "0",
    "-1",
    "0.5",
    "64",
    "65536",
    "16777215",
    "4294967295",
    "1152921504606846976",
    "18446744073709551615",
    "1e308",
    "1e999",
    "nan",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"x\"",
];
/// How deep something is nested to see whether its reader recurses without end.
const DEPTH: usize = 20_000;

/// One change. A place is relative to the length of what is changed.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Flip(Index, u8),
    Set(Index, u8),
    Truncate(Index),
    Remove(Index, u8),
    Insert(Index, Vec<u8>),
    /// Puts what stands in one place before another.
    Copy(Index, u8, Index),
    Overwrite(Index, &'static [u8]),
    /// Replaces a word or number of a text.
    Word(Index, &'static str),
    Nest(Index, u8),
}

impl Arbitrary for Change {
    type Parameters = ();
    type Strategy = BoxedStrategy<Self>;

    fn arbitrary_with((): ()) -> BoxedStrategy<Self> {
        let at = any::<Index>;
        prop_oneof![
            4 => (at(), 0..8u8).prop_map(|(at, bit)| Self::Flip(at, bit)),
            2 => (at(), any::<u8>()).prop_map(|(at, byte)| Self::Set(at, byte)),
            1 => at().prop_map(Self::Truncate),
            2 => (at(), any::<u8>()).prop_map(|(at, length)| Self::Remove(at, length)),
            2 => (at(), prop::collection::vec(any::<u8>(), 1..32))
                .prop_map(|(at, bytes)| Self::Insert(at, bytes)),
            2 => (at(), any::<u8>(), at()).prop_map(|(from, length, to)| Self::Copy(from, length, to)),
            4 => (at(), prop::sample::select(&WORDS[..]))
                .prop_map(|(at, word)| Self::Overwrite(at, word)),
            6 => (at(), prop::sample::select(&TEXTS[..])).prop_map(|(at, text)| Self::Word(at, text)),
            1 => (at(), prop::sample::select(&b"[{(\""[..]))
                .prop_map(|(at, byte)| Self::Nest(at, byte)),
        ]
        .boxed()
    }
}

impl Change {
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>) {
        let length = bytes.len();
        // A place may be the end.
        let place = |at: &Index| at.index(length + 1);
        let until = |from: usize, count: usize| (from + count).min(length);
        match self {
            Self::Truncate(at) => bytes.truncate(place(at)),
            Self::Insert(at, new) => drop(bytes.splice(place(at)..place(at), new.iter().copied())),
            Self::Nest(at, byte) => {
                drop(bytes.splice(place(at)..place(at), std::iter::repeat_n(*byte, DEPTH)));
            }
            Self::Remove(at, length) => {
                let from = place(at);
                bytes.drain(from..until(from, usize::from(*length)));
            }
            Self::Copy(from, length, to) => {
                let (from, to) = (place(from), place(to));
                let part = bytes[from..until(from, usize::from(*length))].to_vec();
                bytes.splice(to..to, part);
            }
            Self::Overwrite(at, word) => {
                let from = place(at);
                bytes.splice(from..until(from, word.len()), word.iter().copied());
            }
            Self::Word(at, text) => replace_word(bytes, at, text),
            Self::Flip(at, bit) => {
                if let Some(byte) = bytes.get_mut(place(at)) {
                    *byte ^= 1 << bit;
                }
            }
            Self::Set(at, new) => {
                if let Some(byte) = bytes.get_mut(place(at)) {
                    *byte = *new;
                }
            }
        }
    }
}

/// Replaces one of the words and numbers of a text; nothing where there are none.
fn replace_word(bytes: &mut Vec<u8>, at: &Index, text: &str) {
    let inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(byte);
    let mut words = Vec::new();
    let mut from = 0;
    for part in bytes.split(|byte| !inside(byte)) {
        if !part.is_empty() {
            words.push(from..from + part.len());
        }
        from += part.len() + 1;
    }
    if !words.is_empty() {
        bytes.splice(at.get(&words).clone(), text.bytes());
    }
}
