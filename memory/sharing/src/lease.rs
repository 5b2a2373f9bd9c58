//! Whose pages are merged on this host: one tenant's, and all processes agree on it by a locked file.
//!
//! The kernel merges whatever is advised, whoever advised it. So who advises pages holds a shared lock on a file
//! that names their tenant; who finds another name in it, and cannot have the file for itself, does not advise.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::ksmd::{TENANT_LOCK, open_lock};
use crate::{Ksm, MergeError, Tenant};

/// For the moment in which another process writes its name.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);
const NAME_BYTES: u64 = 4096;

/// Held as long as pages of this tenant may be merged.
#[derive(Debug)]
pub(crate) struct Lease {
    _locked: File,
}

impl Lease {
    /// For pages of `tenant`; of `None`, where tenants trust each other, of all.
    pub(crate) fn take(ksm: &Ksm, tenant: Option<&Tenant>) -> Result<Self, MergeError> {
        let path = ksm.lock_path(TENANT_LOCK);
        let mut file = open_lock(&path)?;
        let ours = tenant.map_or_else(|| "all".to_owned(), |t| format!("tenant {}", t.0));
        let mut theirs = String::new();
        for _ in 0..TRIES {
            if locked(file.try_lock(), &path)? {
                name(&mut file, &ours).map_err(|source| failed(&path, source))?;
            }
            // From alone to together is not one step: the name is read again.
            if locked(file.try_lock_shared(), &path)? {
                theirs = named(&mut file).map_err(|source| failed(&path, source))?;
                if theirs == ours {
                    return Ok(Self { _locked: file });
                }
                file.unlock().map_err(|source| failed(&path, source))?;
            }
            thread::sleep(BETWEEN_TRIES);
        }
        let theirs = Tenant(theirs.strip_prefix("tenant ").unwrap_or(&theirs).to_owned());
        Err(MergeError::OtherTenant { theirs, ours: tenant.cloned().unwrap_or_default() })
    }
}

fn locked(tried: Result<(), TryLockError>, path: &Path) -> Result<bool, MergeError> {
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(source)) => Err(failed(path, source)),
    }
}

fn failed(path: &Path, source: io::Error) -> MergeError {
    MergeError::File { path: path.to_owned(), source }
}

fn name(file: &mut File, name: &str) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(name.as_bytes())
}

fn named(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(NAME_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
