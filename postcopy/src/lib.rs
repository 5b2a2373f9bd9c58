//! What the destination holds of each page, and in which order and how fast the rest follows.
//!
//! Before the hand-over, pages of several rounds reach a destination over several lanes, and nothing but
//! [`ChunkLedger`] keeps an old copy from landing on a newer one. It also remembers each page's digest,
//! so that what was installed can be compared with the source at the end.
//!
//! After the hand-over (post-copy) the machine runs at the destination while the source still owes it pages.
//! [`Demand`] says there what becomes of each fault and of each page that comes. At the source,
//! [`PushQueue`] says which pages go next without being asked for, and [`PushPace`] how fast, so that no
//! queue stands in front of a page that a thread waits for.
//!
//! All are pure: no clock, thread, socket or `unsafe`; time is an argument. They do not know who copies a
//! page, under which lock, what a page holds, or how a fault is noticed: that is the engine's business.

mod demand;
mod ledger;
mod pace;
mod push;
mod waited;

pub use demand::{Admit, Demand, DemandCounts, Fault, Waited};
pub use ledger::{Admission, CHUNK_PAGES, ChunkLedger, by_chunk};
pub use pace::PushPace;
pub use push::PushQueue;
pub use waited::WaitedTime;
