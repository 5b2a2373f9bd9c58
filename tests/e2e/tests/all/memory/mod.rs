//! Machines whose memory is not all in memory, or not all of use.

mod hints;
mod swapped;
