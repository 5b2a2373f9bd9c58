//! Which pages are away, and where the bytes of each are: in memory, or in the file. Pure but for its memory.
//!
//! Pages with the same content share one *blob*. A blob is in the arena first, and may move to the file; it goes
//! when its last page goes.
//!
//! ```text
//!   page ──▶ blob ──▶ arena            keep: equal bytes are found by their hash, and compared
//!   page ──▶  │  └──▶ file: segment, offset
//! ```

use std::collections::{HashMap, VecDeque};

use ferry_codec::{Codec, PackedPage};
use ferry_pages::{PageSet, Run};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::arena::{Arena, Slot};
use crate::segments::{Place, Segments};

#[derive(Clone, Copy, Debug)]
struct Entry {
    blob: u32,
    /// The page's digest.
    digest: u64,
}

#[derive(Clone, Copy, Debug)]
enum At {
    Arena(Slot),
    File(Place),
}

#[derive(Clone, Copy, Debug)]
struct Blob {
    codec: Codec,
    bytes: u16,
    pages: u32,
    /// Tells it from others that had its number before.
    born: u64,
    hash: u64,
    at: At,
}

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found<'a> {
    /// Here.
    Here(PackedPage<'a>),
    /// In the file.
    Filed(Filed),
}

/// A page in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filed {
    pub(crate) place: Place,
    pub(crate) codec: Codec,
    pub(crate) digest: u64,
    born: u64,
}

/// A blob on its way to the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving {
    blob: u32,
    born: u64,
    pub(crate) place: Place,
}

/// The pages of one machine that are away.
#[derive(Debug)]
pub(crate) struct Pool {
    arena: Arena,
    most_bytes: u64,
    pages: HashMap<u64, Entry>,
    away: PageSet,
    blobs: Vec<Option<Blob>>,
    free: Vec<u32>,
    by_hash: HashMap<u64, u32>,
    /// Blobs in the arena, oldest first; some may be gone or filed by now.
    order: VecDeque<(u32, u64)>,
    born: u64,
    pub(crate) segments: Segments,
}

/// What a pool holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holds {
    /// Pages.
    pub(crate) pages: u64,
    /// Different contents.
    pub(crate) blobs: u64,
    /// Bytes of the host's memory, slabs as a whole.
    pub(crate) arena_bytes: u64,
    /// Bytes of live content in the file.
    pub(crate) file_bytes: u64,
}

impl Pool {
    pub(crate) fn new(arena_bytes: u64, file_bytes: u64) -> Self {
        Self {
            arena: Arena::new(arena_bytes),
            most_bytes: arena_bytes,
            pages: HashMap::new(),
            away: PageSet::new(),
            blobs: Vec::new(),
            free: Vec::new(),
            by_hash: HashMap::new(),
            order: VecDeque::new(),
            born: 0,
            segments: Segments::new(file_bytes),
        }
    }

    pub(crate) fn holds(&self) -> Holds {
        Holds {
            pages: self.away.len(),
            blobs: (self.blobs.len() - self.free.len()) as u64,
            arena_bytes: self.arena.bytes(),
            file_bytes: self.segments.live_bytes(),
        }
    }

    /// Less than an eighth of the arena is free.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.arena.bytes() > self.most_bytes / 8 * 7
    }

    pub(crate) fn pages(&self) -> &PageSet {
        &self.away
    }

    fn blob(&self, entry: &Entry) -> Option<&Blob> {
        self.blobs[entry.blob as usize].as_ref()
    }

    /// Keeps `page`, in the place of what was kept of it; false if there is no room, and then nothing is kept.
    pub(crate) fn keep(&mut self, page: &PackedPage<'_>) -> bool {
        self.remove(page.gfn);
        let hash = xxh3_64_with_seed(page.bytes, page.codec.to_wire().into());
        let twin = self.by_hash.get(&hash).copied().filter(|twin| {
            self.blobs[*twin as usize].as_ref().is_some_and(|blob| match blob.at {
                At::Arena(slot) if blob.codec == page.codec => {
                    self.arena.get(slot, blob.bytes.into()) == page.bytes
                }
                // Reading it to compare would cost more than the room.
                _ => false,
            })
        });
        let number = match twin {
            Some(number) => number,
            None => {
                let Some(number) = self.add(page.codec, page.bytes, hash) else { return false };
                number
            }
        };
        if let Some(blob) = &mut self.blobs[number as usize] {
            blob.pages += 1;
        }
        self.pages.insert(page.gfn, Entry { blob: number, digest: page.digest });
        self.away.insert(page.gfn);
        true
    }

    fn add(&mut self, codec: Codec, bytes: &[u8], hash: u64) -> Option<u32> {
        let length = u16::try_from(bytes.len()).ok()?;
        let at = At::Arena(self.arena.put(bytes)?);
        self.born += 1;
        let blob = Blob { codec, bytes: length, pages: 0, born: self.born, hash, at };
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.blobs.push(None);
                u32::try_from(self.blobs.len() - 1).ok()?
            }
        };
        self.blobs[number as usize] = Some(blob);
        self.by_hash.insert(hash, number);
        self.order.push_back((number, self.born));
        if self.order.len() > 2 * (self.blobs.len() - self.free.len()) + 1024 {
            let blobs = &self.blobs;
            self.order.retain(|(number, born)| {
                let blob = blobs[*number as usize].filter(|blob| blob.born == *born);
                blob.is_some_and(|blob| matches!(blob.at, At::Arena(_)))
            });
        }
        Some(number)
    }

    /// Where page `gfn` is, if it is away.
    pub(crate) fn find(&self, gfn: u64) -> Option<Found<'_>> {
        let entry = self.pages.get(&gfn)?;
        let &Blob { codec, bytes, born, at, .. } = self.blob(entry)?;
        let digest = entry.digest;
        Some(match at {
            At::Arena(slot) => {
                let bytes = self.arena.get(slot, bytes.into());
                Found::Here(PackedPage { gfn, codec, bytes, digest })
            }
            At::File(place) => Found::Filed(Filed { place, codec, digest, born }),
        })
    }

    /// Whether page `gfn` is still where it was found.
    pub(crate) fn is_still(&self, gfn: u64, filed: Filed) -> bool {
        matches!(self.find(gfn), Some(Found::Filed(now)) if now == filed)
    }

    /// Page `gfn` is not away any more; whether it was.
    pub(crate) fn remove(&mut self, gfn: u64) -> bool {
        let Some(entry) = self.pages.remove(&gfn) else { return false };
        self.away.remove(gfn);
        let place = &mut self.blobs[entry.blob as usize];
        let Some(blob) = place else { return true };
        blob.pages -= 1;
        if blob.pages == 0 {
            let blob = *blob;
            *place = None;
            self.free.push(entry.blob);
            if self.by_hash.get(&blob.hash) == Some(&entry.blob) {
                self.by_hash.remove(&blob.hash);
            }
            match blob.at {
                At::Arena(slot) => self.arena.free(slot),
                At::File(place) => self.segments.release(place),
            }
        }
        true
    }

    /// The pages of `run` are not away any more.
    pub(crate) fn forget(&mut self, run: Run) {
        let away: Vec<u64> = self.away.runs_in(run).flat_map(|r| r.start..r.end()).collect();
        for gfn in away {
            self.remove(gfn);
        }
    }

    /// Copies the oldest blobs of the arena to `buffer`, a segment, which is to be written as `segment`.
    pub(crate) fn take_oldest(&mut self, segment: u32, buffer: &mut [u8]) -> Vec<Leaving> {
        let (mut leaving, mut at) = (Vec::new(), 0);
        while let Some((number, born)) = self.order.front().copied() {
            let blob = self.blobs[number as usize].filter(|blob| blob.born == born);
            if let Some(Blob { bytes, at: At::Arena(slot), .. }) = blob {
                let end = at + usize::from(bytes);
                let Some(room) = buffer.get_mut(at..end) else { break };
                room.copy_from_slice(self.arena.get(slot, bytes.into()));
                let place = Place { segment, at, bytes };
                leaving.push(Leaving { blob: number, born, place });
                at = end;
            }
            self.order.pop_front();
        }
        leaving
    }

    /// What was taken is in the file.
    pub(crate) fn are_filed(&mut self, leaving: &[Leaving]) {
        for Leaving { blob, born, place } in leaving {
            let Some(blob) = self.blobs[*blob as usize].as_mut().filter(|b| b.born == *born) else {
                continue;
            };
            if let At::Arena(slot) = blob.at {
                blob.at = At::File(*place);
                self.arena.free(slot);
                self.segments.fill(*place);
            }
        }
    }

    /// What was taken could not be written: it stays, and is the next to be tried.
    pub(crate) fn stay(&mut self, leaving: &[Leaving]) {
        for Leaving { blob, born, .. } in leaving.iter().rev() {
            self.order.push_front((*blob, *born));
        }
    }

    /// The blobs in `segment`, and where each would be if it were written to `buffer` of segment `to` from byte
    /// `at` on; `read` is what is in `segment`. How far that came.
    pub(crate) fn move_blobs(
        &mut self,
        segment: u32,
        read: &[u8],
        (to, buffer, mut at): (u32, &mut [u8], usize),
    ) -> (Vec<Leaving>, usize) {
        let mut moving = Vec::new();
        for (number, blob) in (0u32..).zip(&self.blobs) {
            let Some(Blob { at: At::File(from), born, bytes, .. }) = blob else { continue };
            if from.segment != segment {
                continue;
            }
            let (first, bytes) = (from.at, *bytes);
            let end = at + usize::from(bytes);
            let (Some(content), Some(room)) =
                (read.get(first..first + usize::from(bytes)), buffer.get_mut(at..end))
            else {
                break;
            };
            room.copy_from_slice(content);
            let place = Place { segment: to, at, bytes };
            moving.push(Leaving { blob: number, born: *born, place });
            at = end;
        }
        (moving, at)
    }

    /// What was moved within the file is where it was to be.
    pub(crate) fn are_moved(&mut self, moved: &[Leaving]) {
        for Leaving { blob, born, place } in moved {
            let Some(blob) = self.blobs[*blob as usize].as_mut().filter(|b| b.born == *born) else {
                continue;
            };
            if let At::File(from) = blob.at {
                blob.at = At::File(*place);
                self.segments.fill(*place);
                self.segments.release(from);
            }
        }
    }
}
