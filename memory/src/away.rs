//! Pages of a machine that are kept elsewhere than in its memory.

use std::fmt;
use std::sync::RwLockReadGuard;

use ferry_codec::PackedPage;
use ferry_dirtylog::DirtySource;
use ferry_pages::{PageSet, Run};

use crate::MemoryError;

/// While one of these is held, no page leaves memory: one that is not away can be copied from there without
/// waiting.
pub type Stay<'a> = RwLockReadGuard<'a, ()>;

/// Keeps pages of a machine while they are not in its memory (a compressed pool, a file), and brings them back
/// when they are touched.
///
/// A [`GuestView`](crate::GuestView) that has one reads such pages from here, without bringing them back, and
/// tells it of what is overwritten or given up.
pub trait Away: Send + Sync + fmt::Debug {
    /// Holds all pages that are in memory there.
    fn stay(&self) -> Stay<'_>;
    /// The pages that are away.
    fn pages(&self) -> PageSet;
    /// Whether page `gfn` is away.
    fn has(&self, gfn: u64) -> bool;
    /// Copies page `gfn` to `page` if it is away; false if it is in memory.
    ///
    /// # Errors
    /// It is away, and cannot be read now.
    fn read(&self, gfn: u64, page: &mut [u8]) -> Result<bool, MemoryError>;
    /// Calls `take` with page `gfn` as it is kept, if it is away; whether it is.
    ///
    /// # Errors
    /// It is away, and cannot be read now.
    fn packed(&self, gfn: u64, take: &mut dyn FnMut(&PackedPage<'_>)) -> Result<bool, MemoryError>;
    /// Takes in a page that came from elsewhere, in the place of what was kept of it; false if there is no room.
    /// It must not be in memory.
    fn keep(&self, page: &PackedPage<'_>) -> bool;
    /// Forgets what is kept of the pages of `run`: they were overwritten, or given up.
    fn forget(&self, run: Run);
    /// Begins to bring pages back when they are touched: called before anybody touches memory of a machine
    /// that has pages away.
    ///
    /// # Errors
    /// The memory cannot be watched.
    fn serve(&self) -> Result<(), MemoryError>;
    /// Of memory that is watched for touches, a tracker of writes: another userfaultfd cannot have it.
    fn tracker(&self) -> Option<Box<dyn DirtySource>>;
}
