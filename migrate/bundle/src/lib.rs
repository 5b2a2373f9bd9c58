//! A machine as files.
//!
//! A *bundle* is a directory that holds one machine as it stood at one moment. It can be copied, and
//! started elsewhere.
//!
//! ```text
//!  DIR/manifest.json     what the bundle is: version, ids, the machine's specification, checksums
//!  DIR/memory-TOKEN      ┌ head │ frame │ frame │ … │ frame │ record │ index ┐
//!  DIR/state-TOKEN       vCPU and device state: the sections of a StateWriter
//! ```
//!
//! **Frames** are those of `ferry-codec`, exactly as they travel: header, run table, payload, a digest
//! over the pages. They are appended as the machine is read, of [`FRAME_PAGES`] pages at most, so that
//! one page is had by reading one short frame. A page that was read again stands in a later frame; the
//! older copy is dead weight until [`merge`] leaves it out.
//!
//! **The index** says of each run of pages in which frame it is and where in it, with the digest of each
//! page, or that it is zero. A page that no index has reads as zeros: untouched memory takes no room.
//!
//! **The record** names the pages that the guest wrote last, the latest first, then those that it only
//! read, as far as they are known: for a reader that brings pages while the machine runs already. A bundle may have none; those of version 1 have none.
//!
//! **A chain**: a bundle may name a *base*, by the base's id. It then holds only pages whose digest is
//! not the base's (a page that became zero is held as such). Digests are compared, not a dirty log: the
//! machine may have been migrated or paused since, and no log need have lasted. A page of one machine
//! is taken for unchanged when 64 bits of xxh3 agree, as everywhere in Ferry. All bundles of a chain
//! are of one machine, told by its lasting number: a machine that was restored is another one.
//!
//! **The commit point** is the rename of `manifest.json`. The files of a writing carry its random token
//! in their names, so they stand beside those of the bundle that is replaced; they are synced, then the
//! manifest under a temporary name, then the directory; then the rename, and the directory again. A
//! crash leaves the old bundle or the new one, whole, and at most files that belong to no manifest,
//! which the next writing removes. A writer holds a lock on the directory.
//!
//! **Nothing in a file is believed**: the manifest and the index have checksums, lengths are bounded
//! by the file and the machine's layout before they are used, and pages come out of the codec's
//! decoder, which verifies them.
//!
//! [`Draft`] writes a bundle; [`Chain`] reads one with its bases, from a [`Shelf`]; [`Pages`] has any page
//! by its frame number. This crate does not know guests, nor when a page may be read from one, nor how a
//! shelf of another host is reached.

mod chain;
mod draft;
mod error;
mod index;
mod manifest;
mod number;
mod pages;
mod record;
mod shelf;

pub use chain::{Chain, Layer, Place, Verified};
pub use draft::{Committed, Draft, merge, remove};
pub use error::BundleError;
pub use manifest::{Base, MANIFEST, Manifest, MemoryPart, StatePart, VERSION, is_file_of_bundle};
pub use number::{BundleId, Sum};
pub use pages::Pages;
pub use record::{RECORD_PAGES, RecordPart};
pub use shelf::{Blob, Haste, Local, Shelf};

/// Most pages in one frame: 256 KiB of memory. Long enough to compress well, short enough that a page
/// wanted by itself costs a tenth of a millisecond.
pub const FRAME_PAGES: usize = 64;
