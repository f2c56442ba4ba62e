//! Every command explains itself, and so does a mistake.

use std::process::{Command, Output};

const COMMANDS: [&str; 10] = [
    "up",
    "generate",
    "coordinator",
    "worker",
    "energy",
    "concepts",
    "calibrate",
    "inspect",
    "demo",
    "evaluate",
];

fn fairlead(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fairlead")).args(arguments).output().expect("it starts")
}

#[test]
fn every_command_has_a_help_that_names_its_options() {
    let overview = fairlead(&["--help"]);
    let overview = String::from_utf8_lossy(&overview.stdout).into_owned();
    for command in COMMANDS {
        assert!(overview.contains(command), "`{command}` is not in the overview");
        let help = fairlead(&[command, "--help"]);
        let text = String::from_utf8_lossy(&help.stdout).into_owned();
        assert!(help.status.success(), "{command}: {}", String::from_utf8_lossy(&help.stderr));
        assert!(text.contains("Usage: fairlead") && text.contains("--help"), "{text}");
    }
}

#[test]
fn a_mistyped_command_gets_a_suggestion() {
    let output = fairlead(&["generat", "a cat"]);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("generate"), "{message}");
}
