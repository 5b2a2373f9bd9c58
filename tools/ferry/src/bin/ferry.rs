//! The command's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    ferry::main()
}
