//! Values of arguments and of columns in tables, as people and other programs write them.

use std::str::FromStr;

/// The digits of a whole number: `42`, or `42.0` as spreadsheets and data frames write it.
pub(crate) fn digits(text: &str) -> &str {
    match text.split_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|byte| byte == b'0') => {
            whole
        }
        _ => text,
    }
}

/// The seed of a first image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seed {
    /// This one.
    Given(u64),
    /// Another each time: `-1`, as other programs have it.
    Random,
}

impl Seed {
    /// The seed that was given.
    pub(crate) fn given(self) -> Option<u64> {
        match self {
            Self::Given(seed) => Some(seed),
            Self::Random => None,
        }
    }
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match digits(text) {
            "-1" => Ok(Self::Random),
            digits => digits.parse().map(Self::Given).map_err(|_| {
                format!(
                    "write a whole number of 0 or more, or -1 for another each time; at most {}",
                    u64::MAX
                )
            }),
        }
    }
}

/// Width and height: "640x384", or one side of a square.
pub(crate) fn size(text: &str) -> Result<(u32, u32), String> {
    let (width, height) = text.split_once(['x', 'X', '×']).unwrap_or((text, text));
    let side = |side: &str| digits(side.trim()).parse::<u32>().ok();
    let wrong = || "write WIDTHxHEIGHT in pixels, e.g. 640x384, or one number for both".to_owned();
    side(width).zip(side(height)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_whole_numbers_or_drawn() {
        assert_eq!("42".parse(), Ok(Seed::Given(42)));
        assert_eq!("42.0".parse(), Ok(Seed::Given(42)));
        assert_eq!("18446744073709551615.00".parse(), Ok(Seed::Given(u64::MAX)));
        assert_eq!("-1".parse(), Ok(Seed::Random));
        assert_eq!("-1.0".parse(), Ok(Seed::Random));
        for wrong in ["", "-2", "42.5", "42.", "1e3", "0x2a", " 7", "18446744073709551616"] {
            let error = wrong.parse::<Seed>().expect_err(wrong);
            assert!(error.contains("-1 for another each time"), "{error}");
        }
    }

    #[test]
    fn sizes_are_one_side_or_two() {
        assert_eq!(size("512"), Ok((512, 512)));
        assert_eq!(size("640x384"), Ok((640, 384)));
        for wrong in ["big", "-1x2", "640x", "x", "640x384x3", "64.5"] {
            assert!(size(wrong).expect_err(wrong).contains("WIDTHxHEIGHT"));
        }
    }
}
