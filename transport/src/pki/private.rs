//! Whether a key's file is its owner's alone.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::PkiError;

/// What others than the owner must not have of a key.
const OTHERS: u32 = 0o077;
/// The same of a key of root, whose group may read it: so a service gets a key that it cannot change.
const OTHERS_THAN_THE_GROUP: u32 = 0o037;

/// # Errors
/// Others can read or change it.
pub(super) fn check_private(path: &Path) -> Result<(), PkiError> {
    let about = fs::metadata(path).map_err(PkiError::io("read", path))?;
    let forbidden = if about.uid() == 0 { OTHERS_THAN_THE_GROUP } else { OTHERS };
    match about.mode() & forbidden {
        0 => Ok(()),
        _ => Err(PkiError::Exposed { path: path.to_owned(), mode: about.mode() & 0o777 }),
    }
}
