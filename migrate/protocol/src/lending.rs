//! What is said on a channel that reads the bundles of another host.
//!
//! ```text
//!   reader                                  depot
//!     Hello::Bundles ────────────────────────▶
//!     Open{file, path} ──────────────────────▶
//!     ◀───────────────────────── Opened{bytes}  or  Missing  or  Failed
//!     Read{file, at, bytes} ─────────────────▶
//!     ◀──── Data{bytes}, then so many bytes      or  Failed
//! ```
//! Requests may be sent before earlier ones are answered; answers come in the order of the requests. The
//! reader numbers the files that it opens; a number that is used again closes the file that had it.

use serde::{Deserialize, Serialize};

/// The version of these messages.
pub const LENDING_VERSION: u16 = 1;
/// Most bytes that one `Read` may ask for.
pub const MAX_READ_BYTES: u32 = 1 << 20;
/// Files that a channel may have open.
pub const MAX_OPEN_FILES: u16 = 256;
/// Longest path of a file, in bytes.
pub const MAX_PATH_BYTES: usize = 4096;
/// No [`ToDepot`] is larger than this.
pub const MAX_TO_DEPOT_BYTES: usize = MAX_PATH_BYTES + 64;
/// No [`ToReader`] is larger than this, the bytes behind `Data` aside.
pub const MAX_TO_READER_BYTES: usize = 1024;

/// From the reader to the host that has bundles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDepot {
    /// Open a file of a bundle.
    Open {
        /// Its number from now on, below [`MAX_OPEN_FILES`].
        file: u16,
        /// Where it is, from the directory that is served.
        path: String,
    },
    /// Read from an open file.
    Read {
        /// Which.
        file: u16,
        /// From which byte on.
        at: u64,
        /// How many bytes, at most [`MAX_READ_BYTES`].
        bytes: u32,
    },
}

/// From the host that has bundles to the reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToReader {
    /// The file is open.
    Opened {
        /// Its length.
        bytes: u64,
    },
    /// There is no such file, or none that is lent.
    Missing {
        /// How so.
        why: String,
    },
    /// What was asked for cannot be had.
    Failed {
        /// Why.
        why: String,
    },
    /// So many bytes follow: all that were asked for.
    Data {
        /// How many.
        bytes: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn the_longest_message_fits_and_not_much_more_does() {
        let path = "x".repeat(MAX_PATH_BYTES);
        let open = wire::encode(&ToDepot::Open { file: MAX_OPEN_FILES, path }).unwrap();
        assert!((open.len()..open.len() + 64).contains(&MAX_TO_DEPOT_BYTES), "{}", open.len());
        let read = ToDepot::Read { file: 1, at: u64::MAX, bytes: MAX_READ_BYTES };
        assert!(wire::encode(&read).unwrap().len() <= MAX_TO_DEPOT_BYTES);
        const { assert!(MAX_READ_BYTES as usize > MAX_PATH_BYTES) };
    }
}
