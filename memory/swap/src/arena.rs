//! Room for compressed pages: slabs of objects of one size, given back to the host when they are empty.

use memmap2::MmapMut;

/// A slab: small enough that a size that is seldom needed wastes little.
pub(crate) const SLAB_BYTES: usize = 64 << 10;
/// Sizes differ by this much: an object wastes half of it on average.
const STEP: usize = 128;
const CLASSES: usize = 4096 / STEP;

/// Where an object lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    slab: u32,
    index: u16,
}

#[derive(Debug)]
struct Slab {
    memory: MmapMut,
    class: usize,
    /// Objects that are free; they were used once, all behind `fresh` never.
    free: Vec<u16>,
    fresh: u16,
    used: u16,
}

impl Slab {
    fn is_full(&self) -> bool {
        self.free.is_empty() && usize::from(self.fresh) == objects(self.class)
    }
}

/// All slabs; no more than a bound.
#[derive(Debug)]
pub(crate) struct Arena {
    slabs: Vec<Option<Slab>>,
    empty: Vec<u32>,
    /// Slabs that have room, by class; some may be full or gone by now.
    open: [Vec<u32>; CLASSES],
    most: usize,
}

fn size(class: usize) -> usize {
    (class + 1) * STEP
}

fn objects(class: usize) -> usize {
    SLAB_BYTES / size(class)
}

impl Arena {
    /// Room for no more than `bytes`, slabs as a whole.
    pub(crate) fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes / SLAB_BYTES as u64).unwrap_or(usize::MAX);
        let most = most.min(u32::MAX as usize);
        Self { slabs: Vec::new(), empty: Vec::new(), open: Default::default(), most }
    }

    /// Bytes of the host that it uses.
    pub(crate) fn bytes(&self) -> u64 {
        ((self.slabs.len() - self.empty.len()) * SLAB_BYTES) as u64
    }

    /// Puts `bytes`, at most a page, into the arena; none if there is no room.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Option<Slot> {
        let class = bytes.len().max(1).div_ceil(STEP) - 1;
        let slab = self.with_room(class)?;
        let number = slab as usize;
        let slab_of = self.slabs[number].as_mut()?;
        let index = slab_of.free.pop().unwrap_or_else(|| {
            slab_of.fresh += 1;
            slab_of.fresh - 1
        });
        slab_of.used += 1;
        let at = usize::from(index) * size(class);
        slab_of.memory[at..at + bytes.len()].copy_from_slice(bytes);
        Some(Slot { slab, index })
    }

    /// A slab with room for an object of `class`.
    fn with_room(&mut self, class: usize) -> Option<u32> {
        let open = self.open.get_mut(class)?;
        while let Some(number) = open.last() {
            match &self.slabs[*number as usize] {
                Some(slab) if slab.class == class && !slab.is_full() => return Some(*number),
                _ => open.pop(),
            };
        }
        if self.empty.is_empty() && self.slabs.len() >= self.most {
            return None;
        }
        let memory = MmapMut::map_anon(SLAB_BYTES).ok()?;
        let slab = Slab { memory, class, free: Vec::new(), fresh: 0, used: 0 };
        let number = match self.empty.pop() {
            Some(number) => number,
            None => {
                self.slabs.push(None);
                u32::try_from(self.slabs.len() - 1).ok()?
            }
        };
        self.slabs[number as usize] = Some(slab);
        self.open[class].push(number);
        Some(number)
    }

    /// The first `bytes` bytes of the object in `slot`.
    pub(crate) fn get(&self, slot: Slot, bytes: usize) -> &[u8] {
        let slab = self.slabs[slot.slab as usize].as_ref();
        slab.map_or(&[], |slab| {
            let at = usize::from(slot.index) * size(slab.class);
            &slab.memory[at..at + bytes]
        })
    }

    /// Frees `slot`.
    pub(crate) fn free(&mut self, slot: Slot) {
        let place = &mut self.slabs[slot.slab as usize];
        let Some(slab) = place else { return };
        let class = slab.class;
        let was_full = slab.is_full();
        slab.used -= 1;
        slab.free.push(slot.index);
        if slab.used == 0 {
            *place = None;
            self.empty.push(slot.slab);
        } else if was_full {
            self.open[class].push(slot.slab);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_of_any_size_are_kept_and_the_bound_holds() {
        let mut arena = Arena::new(4 * SLAB_BYTES as u64);
        let mut kept = Vec::new();
        for n in 0usize.. {
            let bytes = vec![n.to_le_bytes()[0]; 1 + n * 37 % 4096];
            match arena.put(&bytes) {
                Some(slot) => kept.push((slot, bytes)),
                None => break,
            }
        }
        assert_eq!(arena.bytes(), 4 * SLAB_BYTES as u64);
        for (slot, bytes) in &kept {
            assert_eq!(arena.get(*slot, bytes.len()), &bytes[..]);
        }
        for (slot, _) in kept.drain(..) {
            arena.free(slot);
        }
        assert_eq!(arena.bytes(), 0);
        // Nothing is lost of the room.
        let page = [3; 4096];
        let slots: Vec<_> = std::iter::from_fn(|| arena.put(&page)).collect();
        assert_eq!(slots.len(), 4 * SLAB_BYTES / 4096);
        arena.free(slots[5]);
        assert!(arena.put(&page).is_some());
        assert!(arena.put(&page).is_none());
    }
}
