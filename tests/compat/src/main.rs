//! Writes the golden files of this version that are not there yet: `cargo run -p ferry-compat`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let dir = ferry_compat::golden(ferry_compat::VERSION);
    match ferry_compat::write(&dir) {
        Ok(others) if others.is_empty() => {
            println!("{} is whole", dir.display());
            ExitCode::SUCCESS
        }
        Ok(others) => {
            eprintln!(
                "{} of {} were written otherwise, and stay as they are: {}",
                others.len(),
                dir.display(),
                others.join(", ")
            );
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("{}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}
