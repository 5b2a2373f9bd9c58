//! Equal pages of machines: found at memory speed, merged by the kernel where it is worth it.
//!
//! ```text
//!   what was written ──▶ Scanner ──▶ Census ──▶ Proposal ──▶ Merger ──▶ madvise, ksmd for a burst
//!     (a dirty log)      reads what   groups of   ranges of              └─▶ reads back what it merged
//!                        lasts        equal pages  2 MiB worth it
//!                                        │ ▲
//!                          Fingerprints ─┘ └─ Twins: who has an equal in another process
//! ```
//!
//! The kernel can merge equal pages by itself (KSM, Documentation/admin-guide/mm/ksm.rst), but looks for them at
//! 20 MB/s, in all memory, over and over. Here the looking is done beforehand: a [`Scanner`] hashes at memory
//! speed what was not written for some passes, a [`Census`] counts in proportion to what changed, and a
//! [`Merger`] advises only ranges with enough equal pages, wakes the kernel's thread for as long as it has
//! something to do, and sets it back to what it was. [`Sharing`] is all of that for one machine.
//!
//! Nothing is ever merged by a hash: in one process the bytes of some pages are compared before they count as equal
//! (of one in eight, and of all once any was found that only seemed equal), across processes only hashes are
//! exchanged, and the kernel compares before it merges, always.
//!
//! # Tenants
//! Pages of different tenants are not shared unless [`Between::AllTenants`] says so, which tells why. Since the
//! kernel merges whatever is advised, pages of one tenant only are advised on a host at a time: that of which
//! most can be given back. A VMM beside Ferry that advises its own memory is not seen by that.
//!
//! # Where the kernel cannot
//! It merges private memory of normal pages only: none that is shared (memfd) or in huge pages (hugetlb), and
//! needs root to be woken. [`MergeError`] says which. Then pages of zeros and pages that are never written are
//! proposed to be swapped out; they are never discarded here, since the guest may write to them at that moment.
//!
//! # Beside dirty logs and migration
//! Merged memory may be tracked, and pages may be missing (userfaultfd, both). A page that is merged loses its
//! write-protection, and reads as written once; a write to it is reported like any other. So a machine that is
//! being migrated should not be merged: each page that the kernel merges is sent again.
//!
//! This crate does not know when to look or merge, nor how a page is swapped.

mod census;
mod error;
mod fingerprints;
mod ksmd;
mod lease;
mod merger;
mod propose;
mod scanner;
mod sharing;

pub use census::{Between, Census, Content, Counts, MachineNo, RANGE_PAGES, TooManyPages};
pub use error::{MergeError, ScanError};
pub use fingerprints::{Fingerprints, SAMPLE_BITS, Tenant, Twins, best_tenant, estimate};
pub use ksmd::{Burst, HostFigures, Ksm, ProcessFigures, Rest};
pub use merger::{Merged, Merger};
pub use propose::{Proposal, Worth};
pub use scanner::{Pass, Scanner, page_hash};
pub use sharing::{Options, Report, Sharing};
