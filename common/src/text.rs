//! Text of others: read from files, and made safe to show.
//!
//! A prompt, a name or a reason may hold an escape sequence that moves the cursor, sets the clipboard
//! or hides what is beside it. Whatever shows text of others passes it through [`printable`].

use std::{
    borrow::Cow,
    fmt::Write as _,
    fs::File,
    io::{self, Read as _},
    path::Path,
};

/// Largest text file that is read.
const MAX_BYTES: u64 = 256 << 20;

/// The byte order mark that some editors write before UTF-8. It is no part of the text.
const MARK: char = '\u{feff}';

/// The text of a file, which must be UTF-8, without a byte order mark.
///
/// # Errors
/// If it cannot be read, is larger than 256 MiB or is not UTF-8; then the error says where.
pub fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        let problem = format!("it has more than {} MiB, the most that is read", MAX_BYTES >> 20);
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    decode(bytes).map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// `bytes` as text, without a byte order mark.
///
/// # Errors
/// If they are not UTF-8: where, and what to do.
pub fn decode(bytes: Vec<u8>) -> Result<String, NotUtf8> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(NotUtf8::Utf16);
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        NotUtf8::Byte { line: 1 + before.iter().filter(|&&byte| byte == b'\n').count() }
    })?;
    text.drain(..text.len() - without_mark(&text).len());
    Ok(text)
}

/// `text` without the byte order mark that it may begin with.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix(MARK).unwrap_or(text)
}

/// Why bytes are no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotUtf8 {
    /// They are UTF-16, by their first two.
    #[error("it is UTF-16; save it as UTF-8")]
    Utf16,
    /// A byte that is not UTF-8.
    #[error("line {line} is not UTF-8; save the file as UTF-8")]
    Byte {
        /// The line it is in, from 1.
        line: usize,
    },
}

/// Whether `c` acts on what displays it, or cannot be seen: control characters, separators of lines and
/// paragraphs, marks that turn the direction of text, characters without a width, tags.
pub fn is_hidden(c: char) -> bool {
    c.is_control() || is_separator_or_bidi(c) || is_without_width(c)
}

/// Whether `c` ends a line or turns the direction of what follows it.
pub(crate) fn is_separator_or_bidi(c: char) -> bool {
    matches!(c, '\u{2028}' | '\u{2029}' | '\u{061c}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn is_without_width(c: char) -> bool {
    matches!(
        c,
        '\u{00ad}' | '\u{034f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180e}'
    ) || matches!(c, '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}')
        || matches!(c, '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}')
        || matches!(c, '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// `text` on one line, with every hidden character written as an escape: `\n`, `\t`, `\u{1b}`. It is for
/// people to read: what is a backslash in `text` is not told from an escape.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(is_hidden) {
        Cow::Owned(escaped(text, |_| false))
    } else {
        Cow::Borrowed(text)
    }
}

/// [`printable`], except that line feeds stay: for text of several lines that this program composed. Text
/// of others goes into it through [`printable`], or it could write lines of its own.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| c != '\n' && is_hidden(c);
    if text.chars().any(hidden) {
        Cow::Owned(escaped(text, |c| c == '\n'))
    } else {
        Cow::Borrowed(text)
    }
}

/// [`printable`] for a line of a log, with the line feed that ends it.
pub(crate) fn printable_line(line: &str) -> String {
    ended(line, |text| printable(text).into_owned())
}

/// [`printable_line`] with the codes that set colours. Whoever formatted the line must have kept those of
/// others out.
pub(crate) fn printable_coloured_line(line: &str) -> String {
    ended(line, |text| {
        let mut parts = text.split("\x1b[");
        let mut safe = printable(parts.next().unwrap_or_default()).into_owned();
        for part in parts {
            let is_code = |c: char| c == ';' || c.is_ascii_digit();
            let start = if part.trim_start_matches(is_code).starts_with('m') {
                "\x1b["
            } else {
                "\\u{1b}["
            };
            safe.push_str(start);
            safe.push_str(&printable(part));
        }
        safe
    })
}

/// [`printable_line`] for JSON, in which hidden characters are only within strings.
pub(crate) fn printable_json_line(line: &str) -> String {
    ended(line, |json| {
        let mut safe = String::with_capacity(json.len());
        for c in json.chars() {
            if is_hidden(c) {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(safe, "\\u{unit:04x}");
                }
            } else {
                safe.push(c);
            }
        }
        safe
    })
}

/// `line` through `safe`, except for the line feed that ends it.
fn ended(line: &str, safe: impl Fn(&str) -> String) -> String {
    match line.strip_suffix('\n') {
        Some(line) => safe(line) + "\n",
        None => safe(line),
    }
}

fn escaped(text: &str, keep: fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if keep(c) || !is_hidden(c) => safe.push(c),
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            c => {
                let _ = write!(safe, "{}", c.escape_unicode());
            }
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_written_out() {
        assert_eq!(printable("\x1b]52;c;ZXZpbA==\x07"), "\\u{1b}]52;c;ZXZpbA==\\u{7}");
        assert_eq!(printable("a\r\nb\tc"), "a\\r\\nb\\tc");
        assert_eq!(printable("\u{9b}2J\u{7f}"), "\\u{9b}2J\\u{7f}");
        assert_eq!(printable("gnp.\u{202e}exe"), "gnp.\\u{202e}exe");
        assert_eq!(printable("ax\u{200b}e\u{feff}"), "ax\\u{200b}e\\u{feff}");
        assert_eq!(printable("tag\u{e0041}"), "tag\\u{e0041}");
        assert_eq!(printable_lines("one\ntwo\x1b[2K"), "one\ntwo\\u{1b}[2K");
    }

    #[test]
    fn what_can_be_read_stays() {
        for text in ["a café, 記録, Ünïcödé", "קפה", "🔪 ❤\u{fe0f} — “quoted”", "C:\\new"]
        {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_text() {
        assert_eq!(decode(b"\xef\xbb\xbfa cat".to_vec()).as_deref(), Ok("a cat"));
        assert_eq!(decode(b"a cat\xef\xbb\xbf".to_vec()).as_deref(), Ok("a cat\u{feff}"));
        assert_eq!(decode(b"\xff\xfea\0".to_vec()), Err(NotUtf8::Utf16));
        assert_eq!(decode(b"a\nb\xe9".to_vec()), Err(NotUtf8::Byte { line: 2 }));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("text");
        std::fs::write(&path, "\u{feff}two\nlines").expect("written");
        assert_eq!(read(&path).expect("it is text"), "two\nlines");
        std::fs::write(&path, b"caf\xe9").expect("written");
        let error = read(&path).expect_err("Latin-1").to_string();
        assert_eq!(error, "line 1 is not UTF-8; save the file as UTF-8");
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_left(text in any::<String>()) {
            prop_assert!(!printable(&text).chars().any(is_hidden));
            prop_assert!(!printable_lines(&text).chars().any(|c| c != '\n' && is_hidden(c)));
        }
    }
}
