//! Firecracker's message: where the memory of the machine lies. Pure.

use ferry_pages::{PAGE_BYTES, Run};
use serde::Deserialize;

/// A longer message is not Firecracker's: it sends some 100 bytes for each of a few regions.
pub(crate) const MAX_TEXT: usize = 64 << 10;
/// Firecracker's largest pages.
const MAX_PAGE_BYTES: u64 = 2 << 20;
/// No address of a process is higher.
const MAX_ADDRESS: u64 = 1 << 56;

/// Why a hand-over is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The connection ended before the message did.
    #[error(
        "the connection ended after {0} bytes of the hand-over: is it Firecracker that connected?"
    )]
    Cut(usize),
    /// Nothing more came.
    #[error("no complete hand-over came within {seconds} s: is it Firecracker that connected?")]
    Slow {
        /// How long was waited.
        seconds: u64,
    },
    /// More than a hand-over can be.
    #[error("the hand-over is longer than {MAX_TEXT} bytes: is it Firecracker that connected?")]
    TooLong,
    /// Not what Firecracker sends.
    #[error("the hand-over is not Firecracker's list of regions: {0}")]
    NotRegions(serde_json::Error),
    /// No memory.
    #[error("the hand-over names no memory")]
    Empty,
    /// Pages that are none.
    #[error(
        "the hand-over's region {region} has pages of {bytes} bytes; 4096 to 2097152, the same for all regions, are served"
    )]
    PageSize {
        /// Counted from 0.
        region: usize,
        /// Of its pages.
        bytes: u64,
    },
    /// A region that cannot be.
    #[error(
        "the hand-over's region {region} ({size:#x} bytes at {host:#x}, offset {offset:#x}) {why}"
    )]
    Region {
        /// Counted from 0.
        region: usize,
        /// Its address.
        host: u64,
        /// Its length, in bytes.
        size: u64,
        /// Its place in the memory, in bytes.
        offset: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Memory of another machine.
    #[error(
        "Firecracker's machine has {machine} bytes of memory, {source_name} holds {memory}: start the pager with the memory that belongs to the snapshot"
    )]
    OtherMemory {
        /// Of the machine.
        machine: u64,
        /// Of the source.
        memory: u64,
        /// What the source is.
        source_name: String,
    },
    /// Not one descriptor.
    #[error("the hand-over came with {0} descriptors; Firecracker sends one, a userfaultfd")]
    Descriptors(usize),
    /// A descriptor of something else.
    #[error("the descriptor of the hand-over is not a userfaultfd: {0}")]
    NotUserfault(std::io::Error),
}

/// A region as Firecracker tells it. It sends more fields, and may send others in the future.
#[derive(Deserialize)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// In bytes; versions before 1.7 have 4 KiB pages and do not send it.
    page_size: Option<u64>,
    /// What it was called before 1.11: also in bytes.
    page_size_kib: Option<u64>,
}

/// A region of the machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Its address in Firecracker's process.
    pub(crate) host: u64,
    /// Its pages, counted in the memory without holes.
    pub(crate) run: Run,
}

/// Where the memory of a machine lies in another process. Pages have that machine's page size, and are
/// counted from the beginning of the memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    page_bytes: u64,
    /// Ascending by page.
    regions: Vec<Region>,
}

impl Handover {
    /// Parses what has come of the message; none if it is not complete.
    ///
    /// # Errors
    /// It is not a list of regions, or one of them cannot be.
    pub fn parse(text: &[u8]) -> Result<Option<Self>, HandoverError> {
        if text.len() > MAX_TEXT {
            return Err(HandoverError::TooLong);
        }
        match serde_json::from_slice::<Vec<Told>>(text) {
            Ok(told) => Self::new(&told).map(Some),
            Err(e) if e.is_eof() => Ok(None),
            Err(e) => Err(HandoverError::NotRegions(e)),
        }
    }

    fn new(told: &[Told]) -> Result<Self, HandoverError> {
        let bytes_of = |t: &Told| t.page_size.or(t.page_size_kib).unwrap_or(PAGE_BYTES as u64);
        let page_bytes = told.first().map(bytes_of).ok_or(HandoverError::Empty)?;
        let mut regions = Vec::new();
        for (region, t) in told.iter().enumerate() {
            let bytes = bytes_of(t);
            let served = PAGE_BYTES as u64..=MAX_PAGE_BYTES;
            if !bytes.is_power_of_two() || !served.contains(&bytes) || bytes != page_bytes {
                return Err(HandoverError::PageSize { region, bytes });
            }
            let ends = |start: u64| start.checked_add(t.size).is_some_and(|end| end <= MAX_ADDRESS);
            let why = if t.size == 0 {
                "is empty"
            } else if (t.base_host_virt_addr | t.size | t.offset) % bytes != 0 {
                "is not made of whole pages"
            } else if !ends(t.base_host_virt_addr) || !ends(t.offset) {
                "ends beyond all memory"
            } else if told[..region].iter().any(|other| overlap(t, other)) {
                "overlaps another one"
            } else {
                let run = Run::new(t.offset / bytes, t.size / bytes);
                regions.push(Region { host: t.base_host_virt_addr, run });
                continue;
            };
            return Err(HandoverError::Region {
                region,
                host: t.base_host_virt_addr,
                size: t.size,
                offset: t.offset,
                why,
            });
        }
        regions.sort_unstable_by_key(|region| region.run);
        Ok(Self { page_bytes, regions })
    }

    /// Whether the machine's memory is all of a memory of `memory` bytes, and no more; `source_name` says
    /// what that is.
    ///
    /// # Errors
    /// It is not: the memory is another machine's, or was cut.
    pub fn check(&self, memory: u64, source_name: &str) -> Result<(), HandoverError> {
        // Regions do not overlap: with this sum and this end there is no hole.
        let end = self.regions.last().map_or(0, |region| region.run.end() * self.page_bytes);
        let machine = end.max(self.pages() * self.page_bytes);
        if machine != memory || self.pages() * self.page_bytes != memory {
            let source_name = source_name.to_owned();
            return Err(HandoverError::OtherMemory { machine, memory, source_name });
        }
        Ok(())
    }

    /// Bytes in a page.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages of the machine.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.run.pages).sum()
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The page at `address` in Firecracker's process.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let page = address.checked_sub(region.host)? / self.page_bytes;
            (page < region.run.pages).then(|| region.run.start + page)
        })
    }

    /// The pages that lie wholly between two addresses of one region.
    pub fn pages_between(&self, start: u64, end: u64) -> Option<Run> {
        let region = self.regions.iter().find(|region| {
            let bytes = region.run.pages * self.page_bytes;
            start >= region.host && end <= region.host + bytes && start < end
        })?;
        let first = (start - region.host).div_ceil(self.page_bytes);
        let after = (end - region.host) / self.page_bytes;
        (first < after).then(|| Run::new(region.run.start + first, after - first))
    }

    /// The address of page `page`, and how many pages of its region there are from it on.
    pub fn address_of(&self, page: u64) -> Option<(u64, u64)> {
        let region = self.regions.iter().find(|r| r.run.start <= page && page < r.run.end())?;
        let inside = page - region.run.start;
        Some((region.host + inside * self.page_bytes, region.run.pages - inside))
    }
}

fn overlap(a: &Told, b: &Told) -> bool {
    let meet = |a_start: u64, b_start: u64| {
        // Of `b`, it was checked that it ends.
        a_start < b_start + b.size && b_start < a_start.saturating_add(a.size)
    };
    meet(a.base_host_virt_addr, b.base_host_virt_addr) || meet(a.offset, b.offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    fn region(host: u64, size: u64, offset: u64, rest: &str) -> String {
        format!(r#"{{"base_host_virt_addr":{host},"size":{size},"offset":{offset}{rest}}}"#)
    }

    fn parse(regions: &[String]) -> Result<Option<Handover>, HandoverError> {
        Handover::parse(format!("[{}]", regions.join(",")).as_bytes())
    }

    #[test]
    fn what_every_version_of_firecracker_sends_is_understood() {
        let huge = 2 * M;
        for (rest, bytes) in [
            ("", 4096),
            (r#","page_size_kib":4096"#, 4096),
            (r#","page_size":4096,"page_size_kib":4096"#, 4096),
            (r#","page_size_kib":2097152"#, huge),
            (r#","page_size":2097152,"page_size_kib":2097152,"more":[1]"#, huge),
        ] {
            // Two regions, the second lower in the address space.
            let told = [region(64 * M, 8 * M, 0, rest), region(16 * M, 4 * M, 8 * M, rest)];
            let handover = parse(&told).unwrap().unwrap();
            assert_eq!((handover.page_bytes(), handover.pages()), (bytes, 12 * M / bytes));
            handover.check(12 * M, "it").unwrap();
            let second = 8 * M / bytes;
            assert_eq!(handover.page_at(16 * M + bytes + 5), Some(second + 1));
            assert_eq!(handover.page_at(20 * M), None);
            assert_eq!(handover.page_at(16 * M - 1), None);
            assert_eq!(handover.address_of(second + 1), Some((16 * M + bytes, 4 * M / bytes - 1)));
            assert_eq!(handover.address_of(handover.pages()), None);
        }
    }

    #[test]
    fn a_message_in_pieces_is_waited_for() {
        let text = format!("[{},{}]", region(M, M, 0, ""), region(4 * M, M, M, ""));
        for cut in 0..text.len() {
            assert!(Handover::parse(&text.as_bytes()[..cut]).unwrap().is_none(), "{cut}");
        }
        assert!(Handover::parse(text.as_bytes()).unwrap().is_some());
    }

    #[test]
    fn regions_that_cannot_be_are_refused_with_the_reason() {
        let page = |bytes: u64| format!(r#","page_size":{bytes}"#);
        for (told, why) in [
            (vec![], "names no memory"),
            (vec![region(M, 0, 0, "")], "region 0 (0x0 bytes at 0x100000, offset 0x0) is empty"),
            (vec![region(M + 1, M, 0, "")], "whole pages"),
            (vec![region(M, M + 512, 0, "")], "whole pages"),
            (vec![region(M, M, 100, "")], "whole pages"),
            (vec![region(M, 2 * M, 0, &page(2 * M))], "whole pages"),
            (vec![region(u64::MAX - 4095, 4096, 0, "")], "ends beyond"),
            (vec![region(M, u64::MAX - 4095, 0, "")], "ends beyond"),
            (vec![region(M, M, u64::MAX - 4095, "")], "ends beyond"),
            (vec![region(M, 2 * M, 0, ""), region(2 * M, M, 2 * M, "")], "region 1"),
            (vec![region(M, M, 0, ""), region(8 * M, M, 4096, "")], "overlaps"),
            (vec![region(M, M, 0, ""), region(0, u64::MAX - 4095, M, "")], "ends beyond"),
            (vec![region(M, M, 0, &page(0))], "pages of 0 bytes"),
            (vec![region(M, M, 0, &page(4097))], "pages of 4097 bytes"),
            (vec![region(M, M, 0, &page(1 << 30))], "pages of 1073741824 bytes"),
            (vec![region(M, M, 0, ""), region(8 * M, 2 * M, M, &page(2 * M))], "region 1"),
            (vec![region(M, M, 0, r#","page_size":-1"#)], "not Firecracker's list"),
            (vec![r#"{"size":4096}"#.into()], "missing field"),
        ] {
            let words = parse(&told).unwrap_err().to_string();
            assert!(words.contains(why), "{told:?}: {words}");
        }
        for text in ["{}", "null", "[1]", "hello", "[] []", "\0", "[{}]x"] {
            let words = Handover::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(words.contains("not Firecracker's list"), "{text}: {words}");
        }
        let long = vec![b' '; MAX_TEXT + 1];
        assert!(matches!(Handover::parse(&long), Err(HandoverError::TooLong)));
    }

    #[test]
    fn memory_that_is_not_the_machines_is_refused() {
        let whole = parse(&[region(M, M, 0, ""), region(4 * M, M, M, "")]).unwrap().unwrap();
        let holed = parse(&[region(M, M, 0, ""), region(4 * M, M, 2 * M, "")]).unwrap().unwrap();
        whole.check(2 * M, "the file").unwrap();
        for (handover, memory) in [
            (&whole, 2 * M - 1),
            (&whole, 2 * M + 4096),
            (&whole, 0),
            (&holed, 3 * M),
            (&holed, 2 * M),
        ] {
            let words = handover.check(memory, "the file").unwrap_err().to_string();
            assert!(words.contains(&format!("the file holds {memory}")), "{words}");
        }
    }

    #[test]
    fn only_whole_pages_count_as_given_back() {
        let handover =
            parse(&[region(8 * M, 8 * M, 0, r#","page_size":2097152"#)]).unwrap().unwrap();
        let between = |start, end| handover.pages_between(start, end);
        assert_eq!(between(8 * M, 16 * M), Some(Run::new(0, 4)));
        assert_eq!(between(8 * M + 4096, 13 * M), Some(Run::new(1, 1)));
        assert_eq!(between(9 * M, 11 * M), None);
        assert_eq!(between(8 * M, 17 * M), None);
        assert_eq!(between(9 * M, 8 * M), None);
    }
}
