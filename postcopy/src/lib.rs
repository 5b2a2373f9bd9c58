//! What the destination holds of each page.
//!
//! Pages of several rounds reach a destination over several lanes, and nothing but this ledger keeps
//! an old copy from landing on a newer one. [`ChunkLedger`] is pure: it says whether a page may be
//! installed; who copies it, and under which lock, is the engine's business. It also remembers each
//! page's digest, so that what was installed can be compared with the source at the end.

mod ledger;

pub use ledger::{Admission, CHUNK_PAGES, ChunkLedger, by_chunk};
