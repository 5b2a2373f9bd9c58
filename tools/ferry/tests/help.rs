//! What the command says of itself.

use std::process::{Command, Output};

fn ferry(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry")).args(words).output().expect("ferry starts")
}

/// How many commands there are below `words`; each has its usage and an example in its help.
fn explained(words: &[&str]) -> usize {
    let said = ferry(&[words, &["--help"]].concat());
    let help = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "{words:?}: {said:?}");
    assert!(help.contains(&format!("Usage: ferry {}", words.join(" "))), "{help}");
    let Some((_, commands)) = help.split_once("\nCommands:\n") else {
        assert!(help.contains("\nExample"), "no example: {help}");
        return 1;
    };
    // A line that goes on with the one before has more spaces in front.
    let names = commands.lines().take_while(|line| !line.is_empty()).filter_map(|line| {
        line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split(' ').next()
    });
    let below = names.filter(|name| *name != "help");
    below.map(|name| explained(&[words, &[name]].concat())).sum()
}

#[test]
fn every_command_says_how_it_is_used_with_an_example() {
    assert!(explained(&[]) > 20);
}

#[test]
fn a_command_that_is_none_is_refused_with_one_that_is_meant() {
    let said = ferry(&["migrat"]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(String::from_utf8_lossy(&said.stderr).contains("'migrate'"), "{said:?}");
}
