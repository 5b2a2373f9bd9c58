//! Huge pages of the host for a test, given back when it ends; other test crates include this file.

use std::fs::{File, read_to_string, write};
use std::io;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that the host has more than before.
pub(crate) struct HugePages(u64);

impl HugePages {
    /// Has the host reserve enough for `bytes`; none, and a line that says why, where it does not.
    pub(crate) fn reserve(bytes: u64) -> Option<Self> {
        let pages = bytes.div_ceil(2 << 20);
        match change(|count| count + pages) {
            Ok(true) => Some(Self(pages)),
            Ok(false) => {
                println!("SKIP: the host has no room for {pages} huge pages more");
                let _ = change(|count| count.saturating_sub(pages));
                None
            }
            Err(e) => {
                println!("SKIP: huge pages cannot be reserved by {COUNT}: {e}");
                None
            }
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = change(|count| count.saturating_sub(self.0));
    }
}

/// Sets the host's number of huge pages; whether it is what was asked for. One process at a time.
fn change(to: impl FnOnce(u64) -> u64) -> io::Result<bool> {
    let alone = File::create(std::env::temp_dir().join("ferry-test-huge-pages.lock"))?;
    alone.lock()?;
    let read = || read_to_string(COUNT)?.trim().parse::<u64>().map_err(io::Error::other);
    let wanted = to(read()?);
    write(COUNT, wanted.to_string())?;
    Ok(read()? == wanted)
}
