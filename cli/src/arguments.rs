//! Arguments that cannot be taken, told to the person who gave them: which one, what it is and what it
//! must be. clap's own words for values are those of Rust's parsers ("invalid digit found in string").

use std::{
    error::Error as StdError,
    ffi::OsString,
    net::AddrParseError,
    num::{ParseFloatError, ParseIntError, TryFromIntError},
    process::ExitCode,
};

use clap::{
    Arg, Command, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use fairlead_common::text;

use crate::output;

/// The command line of this process.
///
/// # Errors
/// What [`refuse`] prints.
pub(crate) fn parse<T: Parser>() -> Result<T, clap::Error> {
    parse_from(std::env::args_os())
}

fn parse_from<T: Parser>(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<T, clap::Error> {
    let mut matches = with_negative_values(T::command()).try_get_matches_from(arguments)?;
    T::from_arg_matches_mut(&mut matches)
}

/// Lets every option see values such as `-1`, to say what they must be: as a flag nobody knows them.
fn with_negative_values(command: Command) -> Command {
    let see = |option: Arg| {
        let has_value = option.get_action().takes_values() && !option.is_positional();
        if has_value { option.allow_negative_numbers(true) } else { option }
    };
    command.mut_args(see).mut_subcommands(with_negative_values)
}

/// Prints what clap says of a command line, which may be the help that was asked for, and returns the exit
/// status.
pub(crate) fn refuse(error: clap::Error) -> ExitCode {
    let said = match in_words(&error) {
        Some(words) => words,
        None => without_colours(&error.render().ansi().to_string()),
    };
    let plain = on_one_line(&said, std::env::args_os());
    let acts = plain != said || plain.chars().any(|c| c != '\n' && text::is_hidden(c));
    let said = plain;
    if acts || error.kind() == ErrorKind::ValueValidation {
        output::tell_lines(said.trim_end());
    } else {
        print(&error);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
}

/// `said` with each of `arguments` that breaks a line written out: else it could begin one of its own.
fn on_one_line(said: &str, arguments: impl Iterator<Item = OsString>) -> String {
    let mut plain = said.to_owned();
    for argument in arguments {
        let argument = argument.to_string_lossy();
        let parts = argument.split_once('=').into_iter().flat_map(|(name, value)| [name, value]);
        for part in
            std::iter::once(&*argument).chain(parts).filter(|part| part.contains(['\n', '\r']))
        {
            plain = plain.replace(part, &text::printable(part));
        }
    }
    plain
}

/// `text` without the codes that set colours.
fn without_colours(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.trim_start_matches(|c: char| c == ';' || c.is_ascii_digit()).strip_prefix('m') {
            Some(rest) => plain.push_str(rest),
            None => plain.extend(["\x1b[", part]),
        }
    }
    plain
}

/// Prints with clap's colours, where they are seen.
fn print(error: &clap::Error) {
    // Nobody is there to be told of a closed standard error.
    let _ = error.print();
}

/// What is wrong with a value: "error: --seed is `x`; it must be ...". `None` for everything else that clap
/// says, which is written for people.
fn in_words(error: &clap::Error) -> Option<String> {
    if error.kind() != ErrorKind::ValueValidation {
        return None;
    }
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text::printable(text)),
        _ => None,
    };
    let (argument, value) =
        (context(ContextKind::InvalidArg)?, context(ContextKind::InvalidValue)?);
    // "--seed <SEED>"
    let argument = argument.split(' ').next().unwrap_or_default();
    let wanted = wanted(error.source()?);
    let command = "For more information, try '--help'.";
    Some(format!("error: {argument} is `{value}`; {}\n\n{command}", text::printable(&wanted)))
}

/// What a value must be that a parser refused with `reason`.
fn wanted(reason: &(dyn StdError + 'static)) -> String {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    if let Some(error) = reason.downcast_ref::<ParseIntError>() {
        return match error.kind() {
            PosOverflow => "that is too large a number".to_owned(),
            NegOverflow => "that is too small a number".to_owned(),
            _ => "it must be a whole number of 0 or more".to_owned(),
        };
    }
    if reason.is::<ParseFloatError>() {
        return "it must be a number, e.g. 0.5".to_owned();
    }
    if reason.is::<TryFromIntError>() {
        return "that is too large a number".to_owned();
    }
    if reason.is::<AddrParseError>() {
        return "it must be an address and a port, e.g. 127.0.0.1:7100".to_owned();
    }
    let reason = reason.to_string();
    let range = reason.split_once(" is not in ").and_then(|(_, range)| range.split_once("..="));
    match range {
        Some((least, most)) => format!("it must be from {least} to {most}"),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use crate::Cli;

    fn refused(arguments: &[&str]) -> String {
        let all = ["fairlead"].iter().chain(arguments);
        let error = super::parse_from::<Cli>(all).err().expect("it is refused");
        super::in_words(&error).expect("a value is wrong")
    }

    #[test]
    fn only_colours_are_taken_out() {
        let text = "\x1b[1m\x1b[31merror:\x1b[0m x\x1b[2Jy\x1b]0;t\x07\x1b[";
        assert_eq!(super::without_colours(text), "error: x\x1b[2Jy\x1b]0;t\x07\x1b[");
    }

    #[test]
    fn values_are_refused_in_words_for_people() {
        for (arguments, expected) in [
            (
                &["generate", "a", "--steps", "many"][..],
                "--steps is `many`; it must be a whole number of 0 or more",
            ),
            (
                &["generate", "a", "--steps", "-1"],
                "--steps is `-1`; it must be from 0 to 4294967295",
            ),
            (
                &["generate", "a", "--steps", "99999999999"],
                "--steps is `99999999999`; it must be from 0 to 4294967295",
            ),
            (
                &["generate", "a", "--guidance", "high"],
                "--guidance is `high`; it must be a number, e.g. 0.5",
            ),
            (&["up", "--workers", "65"], "--workers is `65`; it must be from 1 to 64"),
            (
                &["up", "--listen", "here"],
                "--listen is `here`; it must be an address and a port, e.g. 127.0.0.1:7100",
            ),
            (&["up", "--listen", "\x1b[2J"], "--listen is `\\u{1b}[2J`; it must be an address"),
            (&["generate", "a", "--size", "big"], "--size is `big`; write WIDTHxHEIGHT in pixels"),
            (
                &["generate", "a", "--seed", "x"],
                "--seed is `x`; write a whole number of 0 or more, or -1",
            ),
        ] {
            let words = refused(arguments);
            assert!(words.starts_with(&format!("error: {expected}")), "{words}");
        }
    }
}
