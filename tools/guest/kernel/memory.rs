//! The machine's memory: what the VMM says there is, and what becomes of it.

use crate::status::{BYTES, GPA, MAX_EXTENTS};
use crate::workload::{Arena, PAGE_BYTES, Params};

const START_INFO_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// `boot.s` keeps room for page directories up to here.
const TOP: u64 = 64 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

unsafe extern "C" {
    static program_end: u8;
    static mut pdpt: [u64; 512];
    static mut high_directories: [[u64; 512]; 60];
}

/// What the VMM left in memory for the guest, copied out of the way.
pub(crate) struct Boot {
    command_line: [u8; 2048],
    command_line_bytes: usize,
    ram: [(u64, u64); MAX_EXTENTS],
    ram_extents: usize,
}

/// Reads a `T` of the boot information.
fn peek<T: Copy>(at: u64) -> T {
    // SAFETY: the first 4 GiB are mapped, and integers have no invalid values. Where the VMM gave a
    // wrong address, the value is wrong, or the machine faults and says so.
    unsafe { (at as *const T).read_unaligned() }
}

impl Boot {
    /// Reads the PVH start information (Xen's `hvm_start_info`, version 1).
    pub(crate) fn read(at: u64) -> Result<Self, &'static str> {
        if peek::<u32>(at) != START_INFO_MAGIC {
            return Err("no PVH start information: ebx does not point to it");
        }
        if peek::<u32>(at + 4) < 1 {
            return Err("the PVH start information is of version 0, which has no memory map");
        }
        let mut boot = Self {
            command_line: [0; 2048],
            command_line_bytes: 0,
            ram: [(0, 0); MAX_EXTENTS],
            ram_extents: 0,
        };
        let text = peek::<u64>(at + 24);
        if text != 0 {
            while peek::<u8>(text + boot.command_line_bytes as u64) != 0 {
                let Some(byte) = boot.command_line.get_mut(boot.command_line_bytes) else {
                    return Err("the command line is longer than 2048 bytes");
                };
                *byte = peek(text + boot.command_line_bytes as u64);
                boot.command_line_bytes += 1;
            }
        }
        let map = peek::<u64>(at + 40);
        let entries = u64::from(peek::<u32>(at + 48));
        let first = (&raw const program_end as u64).next_multiple_of(PAGE_BYTES);
        for entry in (0..entries).map(|i| map + 24 * i) {
            let (start, bytes, kind) =
                (peek::<u64>(entry), peek::<u64>(entry + 8), peek::<u32>(entry + 16));
            let end = start.saturating_add(bytes).min(TOP) / PAGE_BYTES * PAGE_BYTES;
            let start = start.max(first).next_multiple_of(PAGE_BYTES);
            if kind != RAM || start >= end {
                continue;
            }
            let Some(slot) = boot.ram.get_mut(boot.ram_extents) else {
                return Err("the memory map has more than 8 extents of RAM");
            };
            *slot = (start, end - start);
            boot.ram_extents += 1;
        }
        if boot.ram_extents == 0 {
            return Err("no memory is left above the program: give the machine 8 MiB or more");
        }
        boot.ram[..boot.ram_extents].sort_unstable();
        Ok(boot)
    }

    pub(crate) fn command_line(&self) -> &str {
        core::str::from_utf8(&self.command_line[..self.command_line_bytes])
            .unwrap_or("command-line=not-text")
    }
}

/// The arena and the table of versions.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    /// Address and pages of each extent.
    extents: [(u64, u64); MAX_EXTENTS],
    count: usize,
    pages: u64,
    expected: u64,
    /// Address and pages of what lies behind the arena and is never used.
    spare: [(u64, u64); MAX_EXTENTS],
}

impl Memory {
    /// Divides the RAM: the table first, then the arena. Maps what lies above 4 GiB.
    pub(crate) fn divide(boot: &Boot, params: &Params) -> Result<Self, &'static str> {
        let all =
            boot.ram[..boot.ram_extents].iter().map(|(_, bytes)| bytes / PAGE_BYTES).sum::<u64>();
        let most = all.saturating_sub((all * 4).div_ceil(PAGE_BYTES));
        let wanted = if params.arena_bytes > 0 { params.arena_bytes / PAGE_BYTES } else { most };
        if wanted > most {
            crate::record::refuse(format_args!(
                "arena={} is larger than the {} bytes of memory that are left",
                params.arena_bytes,
                most * PAGE_BYTES
            ));
        }
        if wanted < u64::from(params.cpus) {
            return Err("the arena has fewer pages than there are vCPUs");
        }
        let mut memory = Self {
            extents: [(0, 0); MAX_EXTENTS],
            count: 0,
            pages: wanted,
            expected: boot.ram[0].0,
            spare: [(0, 0); MAX_EXTENTS],
        };
        let mut table = (wanted * 4).next_multiple_of(PAGE_BYTES);
        if table > boot.ram[0].1 {
            return Err("the first extent of memory cannot hold the table of versions");
        }
        let mut left = wanted;
        for (&(start, bytes), spare) in boot.ram[..boot.ram_extents].iter().zip(&mut memory.spare) {
            let table = core::mem::take(&mut table);
            let (start, bytes) = (start + table, bytes - table);
            let pages = (bytes / PAGE_BYTES).min(left);
            map(start, pages * PAGE_BYTES);
            *spare = (start + pages * PAGE_BYTES, bytes / PAGE_BYTES - pages);
            if pages > 0 {
                memory.extents[memory.count] = (start, pages);
                memory.count += 1;
                left -= pages;
            }
        }
        Ok(memory)
    }

    pub(crate) fn extents(&self) -> &[(u64, u64)] {
        &self.extents[..self.count]
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that are neither arena nor anything else's.
    pub(crate) fn spare_pages(&self) -> u64 {
        self.spare.iter().map(|(_, pages)| pages).sum()
    }

    /// The address of spare page `index`.
    pub(crate) fn spare(&self, index: u64) -> u64 {
        nth(&self.spare, index)
    }

    /// Whether there is memory at `address`.
    pub(crate) fn has(&self, address: u64) -> bool {
        self.extents()
            .iter()
            .chain(&self.spare)
            .any(|(start, pages)| (*start..*start + pages * PAGE_BYTES).contains(&address))
    }

    pub(crate) fn table(&self) -> u64 {
        self.expected
    }
}

// SAFETY: `divide` gave every index below `pages` a page of RAM that is mapped and nobody else's, and
// an entry in the table in front of them; all vCPUs use both as atomics.
unsafe impl Arena for Memory {
    #[inline]
    fn page(&self, index: u64) -> *mut u64 {
        nth(self.extents(), index) as *mut u64
    }

    #[inline]
    fn expected(&self, index: u64) -> *mut u32 {
        (self.expected + 4 * index) as *mut u32
    }
}

/// The address of page `index` of `extents`.
#[inline]
fn nth(extents: &[(u64, u64)], index: u64) -> u64 {
    let mut left = index;
    for (start, pages) in extents {
        if left < *pages {
            return start + left * PAGE_BYTES;
        }
        left -= pages;
    }
    panic!("no page {index}")
}

/// Maps what lies above 4 GiB in large pages, where it is not yet.
fn map(start: u64, bytes: u64) {
    let mut at = start.max(4 * GIB) / LARGE_PAGE * LARGE_PAGE;
    while at < start + bytes {
        let gib = (at / GIB) as usize;
        let entry = (at % GIB / LARGE_PAGE) as usize;
        // SAFETY: the tables are this program's; below `TOP` there are 60 of them after the first 4
        // GiB; entries go from not present to present, which needs no flush.
        unsafe {
            let directory = &raw mut high_directories[gib - 4];
            pdpt[gib] = directory as u64 | 7;
            (*directory)[entry] = at | 0x87;
        }
        at += LARGE_PAGE;
    }
}

/// The status page, which lies below the program.
pub(crate) fn status_page() -> *mut u8 {
    const _: () = assert!(GPA + BYTES as u64 <= 0x20_0000);
    GPA as *mut u8
}
