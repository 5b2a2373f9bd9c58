//! Compiles the bare-metal program in `kernel/` with the `rustc` that builds this crate, for the host
//! target: no other target needs to be installed.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("ferry-guest: {why}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let var = |name| env::var(name).map_err(|e| format!("{name}: {e}"));
    if var("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        return Err("the test guest is an x86-64 program; build on an x86-64 host".into());
    }
    let folder = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let elf = PathBuf::from(var("OUT_DIR")?).join("ferry-guest.elf");
    for watched in ["kernel", "src", "build.rs"] {
        println!("cargo:rerun-if-changed={}", folder.join(watched).display());
    }
    let script = folder.join("kernel/guest.ld");
    let mut rustc = Command::new(var("RUSTC")?);
    rustc
        .args(["--edition=2024", "--crate-type=bin", "--crate-name=ferry_guest_kernel"])
        .args(["-Copt-level=3", "-Cpanic=abort", "-Crelocation-model=static", "-Ccode-model=small"])
        // A guest has no red zone to lose, but its interrupts come on another stack: the TSS sees to it.
        .args(["-Ccodegen-units=1", "-Cforce-unwind-tables=no", "-Cstrip=debuginfo"])
        .args(["-Clink-arg=-nostdlib", "-Clink-arg=-static", "-Clink-arg=-no-pie"])
        .args(["-Clink-arg=-Wl,--build-id=none", "-Clink-arg=-Wl,-z,max-page-size=4096"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&elf)
        .arg(folder.join("kernel/main.rs"));
    // Cargo hands these to build scripts; they are meant for the crate, not for the guest.
    rustc.env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTFLAGS");
    let status = rustc.status().map_err(|e| format!("cannot run {rustc:?}: {e}"))?;
    if !status.success() {
        return Err(format!(
            "the guest in {}/kernel does not compile ({status})",
            folder.display()
        ));
    }
    Ok(())
}
