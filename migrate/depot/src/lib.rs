//! Bundles of another host: lends them, and reads them over the network.
//!
//! ```text
//!   a host that has bundles                 a host that reads one: Chain::open_on(&Network, …)
//!     serve(Depot) ◀═══ demand ═════════════  Haste::Waited: a request is answered in a round trip
//!                  ◀═══ ahead ══════════════  Haste::Ahead: read-ahead, several requests on their way
//! ```
//!
//! [`Network`] is a [`Shelf`](ferry_bundle::Shelf): a path that begins with `ferry://HOST:PORT/` is a file
//! of that host, any other one of this host. So whatever reads bundles reads them over the network in the same
//! way, and what comes is verified by the checksums that each bundle has: a host that lends bundles is
//! believed no more than a disk.
//!
//! **Two channels**, each a connection of its own: a page that a machine waits for never stands behind those
//! that are read ahead, in no buffer of either host. Once anyone waits for pages, read-ahead also goes no
//! faster than the link takes it without a queue ([`PushPace`](ferry_postcopy::PushPace)).
//!
//! **A link that is lost** is made again, for two minutes ([`PATIENCE`]) of each read; only the first
//! connection must succeed at once. Files are opened again by their names, and the names of memory and state
//! have the random token of their writing: a bundle that was replaced meanwhile has other files, which is an
//! error and never mixed content. While the link holds, replacing or removing a bundle does no harm: the
//! depot has its files open.
//!
//! **A depot gives nothing else away**: it opens files below one directory, which the kernel sees to
//! (`RESOLVE_BENEATH`), and only those whose names are a bundle's.
//!
//! This crate does not know what is in the files, nor when a page is needed.

mod depot;
mod lane;
mod network;

pub use depot::{Depot, DepotEvent, serve};
pub use network::{Network, PATIENCE};
