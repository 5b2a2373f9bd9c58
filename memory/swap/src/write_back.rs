//! From the pool to the file: the oldest pages of the pool, a segment at a time.

use memmap2::MmapMut;

use crate::file::{SwapFile, buffer};
use crate::swap::Inner;

/// What trouble with it begins with.
pub(crate) const FILE: &str = "the swap file";

/// What segments are written and read by.
pub(crate) struct Buffers {
    out: MmapMut,
    back: MmapMut,
}

impl Buffers {
    /// None where there is no file.
    pub(crate) fn new(file: bool) -> std::io::Result<Option<Self>> {
        if !file {
            return Ok(None);
        }
        Ok(Some(Self { out: buffer()?, back: buffer()? }))
    }
}

impl Inner {
    /// Writes the oldest pages of the pool to the file until it is small enough; how many segments that
    /// were, none if it cannot be done now.
    pub(crate) fn write_back(&self, buffers: &mut Option<Buffers>) -> Option<u32> {
        let mut wrote = 0;
        let (Some(file), Some(buffers)) = (&self.file, buffers) else { return Some(0) };
        while !self.is_ending() {
            let taken = {
                let mut state = self.state();
                if !state.pool_is_too_large() {
                    return Some(wrote);
                }
                // The last one is for `compact`.
                match state.pool.segments.free() {
                    0 | 1 => None,
                    _ => state.pool.segments.take(),
                }
            };
            let Some(segment) = taken else {
                if self.compact(file, buffers) {
                    continue;
                }
                self.state()
                    .trouble(format!("{FILE} is full: what the pool cannot take stays in memory"));
                return None;
            };
            let leaving = self.state().pool.take_oldest(segment, &mut buffers.out);
            let written = file.write(segment, &buffers.out);
            let mut state = self.state();
            match written {
                Ok(()) => state.pool.are_filed(&leaving),
                Err(_) => state.pool.stay(&leaving),
            }
            state.pool.segments.settle(segment);
            if let Err(e) = written {
                state.trouble(format!(
                    "{FILE} cannot be written, and its pages stay in the pool: {e}"
                ));
                return None;
            }
            state.over(FILE);
            if leaving.is_empty() {
                return Some(wrote);
            }
            wrote += 1;
        }
        Some(wrote)
    }

    /// Writes what is of use in two segments to a third; whether one became free.
    fn compact(&self, file: &SwapFile, buffers: &mut Buffers) -> bool {
        let Some(to) = self.state().pool.segments.take() else { return false };
        let (mut moving, mut at) = (Vec::new(), 0);
        let emptiest = self.state().pool.segments.emptiest_two();
        for from in &emptiest {
            if let Err(e) = file.read_segment(*from, &mut buffers.back) {
                self.state().trouble(format!("{FILE} cannot be read: {e}"));
                continue;
            }
            let (more, end) =
                self.state().pool.move_blobs(*from, &buffers.back, (to, &mut buffers.out, at));
            moving.extend(more);
            at = end;
        }
        let written = if moving.is_empty() { Ok(()) } else { file.write(to, &buffers.out) };
        let mut state = self.state();
        let before = state.pool.segments.free();
        match written {
            Ok(()) => state.pool.are_moved(&moving),
            Err(e) => state.trouble(format!("{FILE} cannot be written: {e}")),
        }
        state.pool.segments.settle(to);
        // More than the one that it took.
        state.pool.segments.free() > before + 1
    }
}
