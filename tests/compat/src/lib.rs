//! What Ferry writes, in small: frames, messages, state and bundles with content that is written down here.
//!
//! `golden/VERSION/` holds what each version made of it. A golden file is written once, by
//! `cargo run -p ferry-compat`, and never again: what it cannot read any more, this version has broken.

pub mod content;

use std::io;
use std::path::{Path, PathBuf};

/// The version that is built, and whose golden files are written.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where the golden files of `version` are.
pub fn golden(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(version)
}

/// Writes what is not there yet of this version's golden files; the names of those that are there and say
/// something else.
///
/// # Errors
/// A file that cannot be read or written, or a bundle that cannot.
pub fn write(dir: &Path) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let mut others = Vec::new();
    for (name, bytes) in content::files()? {
        let path = dir.join(&name);
        match std::fs::read(&path) {
            Ok(old) if old == bytes => {}
            Ok(_) => others.push(name),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(path.parent().unwrap_or(dir))?;
                std::fs::write(&path, bytes)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    // The names of a bundle's files are random: it is written whole, or not at all.
    if !dir.join("bundle").exists() {
        content::write_bundles(&dir.join("base"), &dir.join("bundle"))?;
    }
    Ok(others)
}
